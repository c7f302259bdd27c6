"""``python -m ksana_lab.notebook.study runs/h200_2gpu … --out docs/results.md``: a sweep's folder as a section with tables and figures.

A section stands between two comments with the sweep's name; made again, it is replaced, and what people wrote around it stays. Figures go
to ``<out's folder>/results/<name>/`` as PNG, PDF and CSV. Knows what is in the folders, not how it came about."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.summary import SLO
from ksana_lab.notebook import plots, uncertainty
from ksana_lab.notebook.configurations import groups
from ksana_lab.notebook.uncertainty import Estimate
from ksana_lab.sweep import report
from ksana_lab.sweep.store import read_failures, read_manifest
from ksana_lab.workload.spec import WorkloadSpec

LOADS = ("rate", "ramp_to", "users", "think_time_s", "time_scale", "num_requests")  # how much of a workload, not which
ALL = "all requests"  # a sweep without an axis over workloads has one part
INTERVALS = (
    "In parentheses 95% intervals: of the mean over repeats, or where there is one run what its number of requests allows, as if they were "
    "independent. They share queues, so the truth is wider.\n"
)


def write_study(folders: Sequence[str | Path], out: str | Path, *, slo: SLO | None = None, also: Sequence[SLO] = ()) -> list[str]:
    """Writes ``out`` and the figures beside it; the verdicts, one sentence per sweep and trace. ``slo``: other bounds than the sweep's;
    ``also``: bounds to give the goodput under, besides. Raises ConfigError for a folder without finished runs."""
    out = Path(out)
    text = out.read_text(encoding="utf-8") if out.exists() else "# Results\n"
    verdicts: list[str] = []
    for folder in map(Path, folders):
        study = _Study(folder, out.parent, slo, also)
        section = "\n".join(study.lines())
        verdicts += study.verdicts
        text = _with_section(text, study.manifest.name, section)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return verdicts


def _with_section(text: str, name: str, section: str) -> str:
    begin, end = f"<!-- study {name} -->", f"<!-- end of {name} -->"
    block = f"{begin}\n{section.rstrip()}\n{end}"
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return found.sub(lambda _: block, text) if found.search(text) else f"{text.rstrip()}\n\n{block}\n"


class _Study:
    """One folder."""

    def __init__(self, folder: Path, base: Path, slo: SLO | None, also: Sequence[SLO] = ()) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.runs = report.load_results(folder, slo=slo)
        if self.runs.empty:
            raise ConfigError(f"{folder} has no finished run yet")
        self.requests = report.load_requests(folder)
        self.also = [(_said(bounds), report.load_results(folder, slo=bounds)) for bounds in also]
        self.slo = slo or (SLO.from_dict(self.manifest.slo) if self.manifest.slo else None)
        self.workload_axes = [axis for axis in self.manifest.axes if self._is_of_workload(axis)]
        self.base, self.figures = base, base / "results" / self.manifest.name
        self.verdicts: list[str] = []

    def lines(self) -> Iterator[str]:
        yield f"## {self.manifest.name}"
        yield ""
        yield self._facts()
        for trace, runs, requests in self._parts():
            yield f"\n### {self.manifest.name}: {trace}\n"
            yield from self._part(trace, runs, requests)
        if failures := read_failures(self.folder):
            yield "\n**Failed points**\n"
            yield from (f"- {failure['point']}: {failure['error'].splitlines()[0]}" for failure in failures)

    def _facts(self) -> str:
        """Where and of what; the bounds."""
        path = Path(self.runs["folder"].iloc[0])
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
        gpus = environment.get("gpus") or []
        machine = f"{len(gpus)} × {gpus[0]}" if gpus else f"no GPU, {environment.get('cpu')}, {environment.get('num_usable_cores')} cores"
        versions = environment.get("versions", {})
        changed = " with changes" if environment.get("git_dirty") else ""
        return " ".join(
            [
                f"{len(self.runs)} runs,",
                f"{self.runs['num_completed'].sum():.0f} requests completed, {self.runs['num_failed'].sum():.0f} failed.",
                f"Machine: {machine}.",
                f"torch {versions.get('torch', '?')}, source {', '.join(self.runs['code_version'].unique())},",
                f"commit {str(environment.get('git_commit'))[:10]}{changed}.",
                f"SLO: {_said(self.slo) if self.slo else 'none'}, for {self.manifest.target:.0%} of the requests.",
                "A percentile over few requests (see ok) says little.",
            ]
        )

    def _parts(self) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
        """A workload each: systems are compared under the same requests only."""
        if not self.workload_axes:
            yield ALL, self.runs, self.requests
            return
        for values, runs in self.runs.groupby(self.workload_axes, sort=False, dropna=False):
            said = [str(v).removesuffix("_sample") if a == "trace" else f"{a}={v}" for a, v in zip(self.workload_axes, values, strict=True)]
            yield " · ".join(said), runs, self.requests[self.requests["run_id"].isin(runs["run_id"])]

    def _is_of_workload(self, axis: str) -> bool:
        """By its name; or because the runs of one rate have another seed for each of its values, and a seed stands for a workload."""
        if axis in LOADS or axis == "split" or axis not in self.runs:
            return False
        if axis == "trace" or axis.split(".")[0] in WorkloadSpec.model_fields:
            return True
        has_several = self.runs.groupby("rate", dropna=False)[axis].nunique().max() > 1
        return bool(has_several and self.runs.groupby("seed")[axis].nunique().max() <= 1)

    def _part(self, trace: str, runs: pd.DataFrame, requests: pd.DataFrame) -> Iterator[str]:
        axes = [axis for axis in self.manifest.axes if axis not in self.workload_axes]
        yield report.markdown(runs.drop(columns="slo_attainment", errors="ignore"), axes)
        if self.slo is not None:
            yield "Share of the requests that met the SLO:\n"
            yield attainment_table(runs, axes)
            yield INTERVALS
        if self.slo is not None and runs["rate"].notna().any():
            table = uncertainty.goodput(runs, axes, target=self.manifest.target)
            said = verdict(table, axes)
            self.verdicts.append(f"{self.manifest.name}, {trace}: {said}")
            yield f"**{said}**\n"
            yield self._figure(trace, "goodput", plots.goodput_by_split(table, sweep_axes=axes), table, "Goodput per GPU.")
        if self.also and runs["rate"].notna().any():
            yield "Requests/s per GPU within other bounds:\n"
            yield self._other_bounds(runs, axes)
        if len(parts := report.decomposition(requests, axes)):
            yield "Where the time to first token went (ms):\n"
            yield report.parts_table(parts)
        yield from self._curves(trace, runs, requests, axes)

    def _other_bounds(self, runs: pd.DataFrame, axes: Sequence[str]) -> str:
        """A row per SLO, a column per configuration."""
        found: dict[str, dict[str, Estimate]] = {}
        for said, judged in self.also:
            table = uncertainty.goodput(judged[judged["run_id"].isin(runs["run_id"])], axes, target=self.manifest.target)
            found[said] = {name: uncertainty.goodput_estimate(rows) for name, rows in groups(table, "split", sweep_axes=axes)}
        names = list(dict.fromkeys(name for row in found.values() for name in row))
        lines = [" | ".join(["bounds", *names]), " | ".join("---" for _ in ["bounds", *names])]
        lines += [" | ".join([said, *(str(row.get(name, "-")) for name in names)]) for said, row in found.items()]
        return "".join(f"| {line} |\n" for line in lines)

    def _curves(self, trace: str, runs: pd.DataFrame, requests: pd.DataFrame, axes: Sequence[str]) -> Iterator[str]:
        bounds = vars(self.slo) if self.slo is not None else {}
        if runs["rate"].nunique() > 1:
            for metric in ("ttft_s_p90", "tpot_s_p90"):
                slo_s = bounds.get(metric.removesuffix("_p90"))
                figure = plots.latency_vs_rate(runs, metric=metric, by="split", slo_s=slo_s, sweep_axes=axes)
                yield self._figure(
                    trace, metric.removesuffix("_s_p90"), figure, runs, f"{metric[:4].upper()} p90 against the offered rate."
                )
            if self.slo is not None:
                figure = plots.attainment_vs_rate(runs, by="split", target=self.manifest.target, sweep_axes=axes)
                yield self._figure(trace, "attainment", figure, None, "Share of the requests that met the SLO, with 95% intervals.")
        figure = plots.pareto(runs, by="split", sweep_axes=axes)
        yield self._figure(trace, "pareto", figure, None, "Tokens/s per user against tokens/s per GPU.")
        rates = sorted(requests["rate"].dropna().unique())
        if rates:
            middle = rates[len(rates) // 2]
            figure = plots.latency_cdfs(requests[requests["rate"] == middle], by="split", sweep_axes=axes)
            yield self._figure(trace, "cdf", figure, None, f"Latencies at {middle:g} requests/s.")

    def _figure(self, trace: str, name: str, figure: Any, frame: pd.DataFrame | None, caption: str) -> str:
        stem = self.figures / f"{re.sub(r'[^a-zA-Z0-9]+', '_', trace)}_{name}"
        plots.save(figure, stem, None if frame is None else frame.drop(columns="folder", errors="ignore"))
        return f"![{caption}]({stem.relative_to(self.base).as_posix()}.png)\n"


def _said(slo: SLO) -> str:
    return ", ".join(f"{name} ≤ {value:g} s" for name, value in vars(slo).items() if value)


def _parse_slo(text: str) -> SLO:
    """Raises ConfigError."""
    try:
        return SLO.from_dict({name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))})
    except ValueError:
        raise ConfigError(f"bounds are NAME=SECONDS with commas between them, ttft_s=0.5,tpot_s=0.03 for example; got {text!r}") from None


def attainment_table(runs: pd.DataFrame, sweep_axes: Sequence[str] | None = None) -> str:
    """A row per rate, a column per configuration: the share of requests within the SLO and its 95% interval."""
    named = runs["rate"].astype(object).where(runs["rate"].notna(), "-")  # a closed loop has no rate
    runs = uncertainty.with_attainment_interval(runs.assign(rate=named))
    columns = {
        name: {rate: uncertainty.estimate(at_rate, "slo_attainment") for rate, at_rate in rows.groupby("rate")}
        for name, rows in groups(runs, "split", without=("rate",), sweep_axes=sweep_axes)
    }
    lines = ["| " + " | ".join(["rate", *columns]) + " |", "|" + "---|" * (1 + len(columns))]
    for rate in sorted(named.unique(), key=lambda rate: (isinstance(rate, str), rate)):
        cells = [_attainment(found[rate]) if rate in found else "-" for found in columns.values()]
        lines.append("| " + " | ".join([rate if isinstance(rate, str) else f"{rate:g}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def _attainment(found: Estimate) -> str:
    if not found.has_interval:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({max(0.0, found.low):.3f} to {min(1.0, found.high):.3f})"


def verdict(goodput: pd.DataFrame, sweep_axes: Sequence[str] | None = None) -> str:
    """Who serves more within the SLO, per GPU: the best configuration of either system; honest where disaggregation loses, and where chance
    could have decided."""
    best: dict[str, tuple[Estimate, str]] = {}
    for name, rows in groups(goodput, "split", sweep_axes=sweep_axes):
        system, found = str(rows["system"].iloc[0]), uncertainty.goodput_estimate(rows)
        if not math.isnan(found.value) and (system not in best or found.value >= best[system][0].value):
            best[system] = (found, name)
    said = ", ".join(f"{name} {found}" for found, name in best.values())
    text = f"Requests/s per GPU within the SLO: {said or 'none'}"
    if not {"disaggregated", "aggregated"} <= set(best):
        return f"{text}."
    return f"{text}: {_compared(best['disaggregated'][0], best['aggregated'][0])}."


def _compared(pair: Estimate, mixed: Estimate) -> str:
    if pair.is_lower_bound and mixed.is_lower_bound:
        return "both met it at the highest rate that was tried, so this says nothing about which is better"
    if pair.value == mixed.value == 0:
        return "neither does at a rate that was tried"
    if pair.overlaps(mixed):
        return "no clear difference, the intervals overlap"
    if mixed.value == 0 or pair.value == 0:
        return f"only {'disaggregation does' if mixed.value == 0 else 'the mixed nodes do'} at a rate that was tried"
    gain = pair.value / mixed.value - 1
    if abs(gain) < 0.03:
        return "as much as each other"
    bound = "at least " if (pair.is_lower_bound and gain > 0) or (mixed.is_lower_bound and gain < 0) else ""
    return f"disaggregation {'wins' if gain > 0 else 'loses'} by {bound}{abs(gain):.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.notebook.study", description="Tables and figures of finished sweeps.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a sweep, for example runs/h200_2gpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page to write (docs/results.md)")
    parser.add_argument("--slo", default=None, metavar="BOUNDS", help="judge by other bounds: --slo ttft_s=0.5,tpot_s=0.03")
    parser.add_argument("--also", action="append", default=[], metavar="BOUNDS", help="goodput under these, too; may be given again")
    options = parser.parse_args(arguments)
    try:
        slo = _parse_slo(options.slo) if options.slo else None
        verdicts = write_study(options.folders, options.out, slo=slo, also=[_parse_slo(text) for text in options.also])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*verdicts, f"written: {options.out}, figures in {options.out.parent / 'results'}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
