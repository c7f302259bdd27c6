"""Results of a sweep as tables: a row per run, a row per request, goodput per GPU of each system; CSV and Markdown beside them.

Reads finished runs alone, so it works while the sweep goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import has_parquet, load_records, summary_row, to_frame, write_csv, write_parquet
from ksana_lab.metrics.latency import TTFT_PARTS
from ksana_lab.metrics.summary import SLO, goodput_rps_per_gpu, summarize
from ksana_lab.sweep.environment import differences
from ksana_lab.sweep.store import Manifest, other_runs, read_environment, read_manifest, read_point

# What a person looks at first, of all repeats together: a count's sum, by its title; the mean of the rest, with factor and digits.
_COUNTED = {"num_completed": "ok", "num_failed": "failed", "num_cancelled": "cancelled"}
_AVERAGED = (
    ("ttft_s_p50", "TTFT p50 ms", 1e3, 1),
    ("ttft_s_p99", "TTFT p99 ms", 1e3, 1),
    ("tpot_s_p50", "TPOT p50 ms", 1e3, 2),
    ("tpot_s_p99", "TPOT p99 ms", 1e3, 2),
    ("output_throughput_tps", "tokens/s", 1, 0),
    ("slo_attainment", "attainment", 1, 3),
    ("goodput_rps", "goodput", 1, 3),
)
_NOT_GROUPED = ("rate", "num_requests")  # differ along one curve


def load_results(folder: str | Path, *, slo: SLO | None = None) -> pd.DataFrame:
    """One row per finished run of the sweep as it was last started: what that calls it (``run_id system split rate repeat seed num_gpus
    transfer_mode``, the axes), what came out (``summary_row``), whether the client kept up (``is_trustworthy``), and its ``folder``.
    Goodput and attainment are under ``slo``; None = the sweep's own. ``attrs["axes"]`` names the sweep's axes.

    Raises ConfigError for a folder that holds no sweep, or one of another version."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    bounds = slo or (SLO.from_dict(manifest.slo) if manifest.slo else None)
    rows = []
    for run_id in _finished(folder, manifest):
        point = read_point(folder, run_id)
        path = folder / "runs" / run_id
        same_slo = point["slo"] == (bounds and vars(bounds))
        measured = point["summary"] if same_slo else summary_row(summarize(load_records(path / "records.jsonl"), slo=bounds))
        rows.append({"run_id": run_id, **measured, **manifest.columns(point), "folder": str(path)})
    return _of_sweep(pd.DataFrame(rows), manifest)


def load_requests(folder: str | Path) -> pd.DataFrame:
    """One row per request of every finished run, with the run's columns (``system split rate …``) in each. Raises as ``load_results``."""
    folder = Path(folder)
    manifest, frames = read_manifest(folder), []
    for run_id in _finished(folder, manifest):
        point = read_point(folder, run_id)
        records = load_records(folder / "runs" / run_id / "records.jsonl")
        for record in records:  # they carry what their run was called when it was made
            record.labels = {name: label for name, label in record.labels.items() if name not in point["columns"]}
        frames.append(to_frame(records, run_id=run_id, **manifest.columns(point)))
    return _of_sweep(pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), manifest)


def _of_sweep(frame: pd.DataFrame, manifest: Manifest) -> pd.DataFrame:
    """A frame alone does not tell what was varied from what came of it."""
    frame.attrs["axes"] = list(manifest.axes)
    return frame


def _finished(folder: Path, manifest: Manifest) -> list[str]:
    return [run_id for run_id in manifest.run_ids if (folder / "runs" / run_id).is_dir()]


def goodput(runs: pd.DataFrame, axes: Sequence[str] | None = None, *, target: float = 0.9) -> pd.DataFrame:
    """DistServe's goodput, one row per system, split, repeat and combination of the other ``axes`` (None: the sweep's): the highest offered
    rate at which ``target`` of the requests meet the SLO, per GPU (``goodput_rps_per_gpu``), and the lowest and the highest rate tried
    (``min_rate``, ``max_rate``): where it is the highest but for the GPUs, the true one is higher; where it is 0, the lowest rate missed
    the target, and the true one is below that.

    Raises ConfigError when the runs have no SLO or no rate."""
    if "slo_attainment" not in runs or runs["slo_attainment"].isna().all():
        raise ConfigError("goodput needs an SLO: give the sweep one (slo: {ttft_s: …}), or load_results(folder, slo=SLO(…))")
    if "rate" not in runs or runs["rate"].isna().all():
        raise ConfigError("goodput needs offered rates; these runs are closed loops")
    axes = runs.attrs.get("axes", ()) if axes is None else axes
    by = ["system", "split", *(a for a in axes if a in runs and a not in (*_NOT_GROUPED, "split")), "repeat"]
    rows = []
    for names, group in runs.dropna(subset=["rate", "slo_attainment"]).groupby(by, sort=False, dropna=False):
        num_gpus = int(group["num_gpus"].iloc[0])
        value = goodput_rps_per_gpu(group["rate"].tolist(), group["slo_attainment"].tolist(), num_gpus, target=target)
        rows.append(
            {
                **dict(zip(by, names, strict=True)),
                "num_gpus": num_gpus,
                "goodput_rps_per_gpu": value,
                "min_rate": group["rate"].min(),
                "max_rate": group["rate"].max(),
                "num_rates": group["rate"].nunique(),
                "is_trustworthy": bool(group["is_trustworthy"].all()),
            }
        )
    table = pd.DataFrame(rows)
    table.attrs["axes"] = list(axes)
    return table


def markdown(runs: pd.DataFrame, axes: Sequence[str] = ()) -> str:
    """A table of runs for people: of the repeats counts are added up, all else (latencies in ms) is averaged; a star where a client did not
    keep up."""
    if runs.empty:
        return "no finished runs\n"
    by = list(dict.fromkeys(["system", "split", *(axis for axis in axes if axis in runs), "rate"]))
    rows = []
    counted = {name: title for name, title in _COUNTED.items() if name in runs and (name != "num_cancelled" or runs[name].any())}
    curve = runs.groupby([name for name in by if name != "rate"], sort=False, dropna=False).ngroup()
    runs = runs.assign(curve=curve).sort_values(["curve", "rate"], kind="stable")  # a search tries rates out of order
    for names, group in runs.groupby(by, sort=False, dropna=False):
        row = {name: "-" if pd.isna(label) else _number(label) for name, label in zip(by, names, strict=True)}
        row["runs"] = f"{len(group)}{'' if group['is_trustworthy'].all() else ' *'}"
        row |= {title: f"{group[column].sum():.0f}" for column, title in counted.items()}
        for column, title, factor, digits in _AVERAGED:
            if column in group and group[column].notna().any():
                row[title] = f"{group[column].mean() * factor:.{digits}f}"
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    note = (
        []
        if runs["is_trustworthy"].all()
        else ["", "\\* the client did not keep up in at least one run: its latencies are partly its own."]
    )
    return "\n".join([*lines, *note]) + "\n"


def _number(label: object) -> str:
    return f"{label:g}" if isinstance(label, float) else str(label)


def decomposition(requests: pd.DataFrame, axes: Sequence[str] = ()) -> pd.DataFrame:
    """Where TTFT went, one row per system, split, rate and combination of the other ``axes``: means over the completed requests whose event
    log was there, ``num_requests`` of them. ``router_path_s queueing_s prefill_s first_token_path_s`` add up to ``ttft_s``."""
    if requests.empty or "first_token_path_s" not in requests or requests["first_token_path_s"].isna().all():
        return pd.DataFrame()
    known = requests[requests["is_ok"]].dropna(subset=["ttft_s", *TTFT_PARTS])
    by = list(dict.fromkeys(["system", "split", *(axis for axis in axes if axis in known), "rate"]))
    groups = known.groupby(by, sort=False, dropna=False)
    return groups[["ttft_s", *TTFT_PARTS]].mean().assign(num_requests=groups.size()).reset_index()


def parts_table(parts: pd.DataFrame) -> str:
    """``decomposition`` for people, in ms."""
    names = {
        "ttft_s": "TTFT",
        "router_path_s": "router",
        "queueing_s": "queue",
        "prefill_s": "prefill",
        "first_token_path_s": "first token",
    }
    shown = parts.assign(**{name: (1e3 * parts[name]).map("{:.1f}".format) for name in names}).rename(columns=names)
    lines = ["| " + " | ".join(map(str, shown.columns)) + " |", "|" + "---|" * len(shown.columns)]
    for row in shown.itertuples(index=False):
        lines.append("| " + " | ".join("-" if pd.isna(cell) else _number(cell) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def write_report(folder: str | Path) -> pd.DataFrame:
    """results.csv, requests.csv and results.md; where there are event logs ttft.csv; where there are an SLO and rates goodput.csv; where
    pyarrow is installed the first two as Parquet. In the sweep's folder; returns the runs."""
    folder = Path(folder)
    manifest, runs = read_manifest(folder), load_results(folder)
    if runs.empty:
        return runs
    requests = load_requests(folder)
    write_csv(runs, folder / "results.csv")
    write_csv(requests, folder / "requests.csv")
    if has_parquet():
        write_parquet(runs, folder / "results.parquet")
        write_parquet(requests, folder / "requests.parquet")
    text = f"# {manifest.name}\n\n{markdown(runs, manifest.axes)}"
    if len(parts := decomposition(requests, manifest.axes)):
        write_csv(parts, folder / "ttft.csv")
        text += f"\nWhere the time to first token went (ms, mean over the requests of all repeats):\n\n{parts_table(parts)}"
    if manifest.slo and runs["rate"].notna().any():
        table = goodput(runs, manifest.axes, target=manifest.target)
        write_csv(table, folder / "goodput.csv")
        text += f"\nGoodput at {manifest.target:.0%} attainment (requests/s per GPU, mean of the repeats):\n\n{_goodput_lines(table)}"
    text += "".join(f"\n{note}\n" for note in notes(folder))
    (folder / "results.md").write_text(text, encoding="utf-8")
    return runs


def notes(folder: str | Path) -> list[str]:
    """What a reader of the tables must know and cannot see in them, a sentence each: runs that were not measured alike, and runs that lie
    in the folder and in no table. Raises as ``load_results``."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    lines = []
    if mixed := differences(read_environment(folder, run_id) for run_id in _finished(folder, manifest)):
        said = (f"{name} " + ", ".join(f"{value} ({count} runs)" for value, count in values.items()) for name, values in mixed.items())
        lines.append(f"**These runs were not all measured in the same environment**: {'; '.join(said)}.")
    if others := other_runs(folder, manifest):
        lines.append(
            f"The folder holds {len(others)} other finished runs, of the sweep or the source as they were before. They are in none of "
            "these tables; with the sweep's file as it was, they are again."
        )
    return lines


def _goodput_lines(table: pd.DataFrame) -> str:
    by = [name for name in table.columns[: list(table.columns).index("num_gpus")] if name != "repeat"]
    lines = []
    for names, group in table.groupby(by, sort=False, dropna=False):
        known = [(axis, label) for axis, label in zip(by, names, strict=True) if not pd.isna(label)]
        what = " · ".join(label if isinstance(label, str) else f"{axis}={_number(label)}" for axis, label in known)
        if not group["goodput_rps_per_gpu"].any():
            lines.append(f"- {what}: below {(group['min_rate'] / group['num_gpus']).max():.3g}, the lowest rate that was tried")
            continue
        value = group["goodput_rps_per_gpu"].mean()
        at_least = bool((group["goodput_rps_per_gpu"] * group["num_gpus"] >= group["max_rate"]).any())
        lines.append(f"- {what}: {'at least ' if at_least else ''}{value:.3g}")
    return "\n".join(lines) + "\n"
