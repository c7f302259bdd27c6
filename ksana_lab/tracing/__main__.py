"""``python -m ksana_lab.tracing DIR [DIR…]``: reads what a run recorded, prints where its time went and why, and writes ``trace.json``
(open it at ui.perfetto.dev), figures and tables beside the logs. Several folders: one per host."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import load_records
from ksana_lab.tracing import perfetto
from ksana_lab.tracing.explain import explain
from ksana_lab.tracing.timeline import PHASES, Timeline, load


def main(argv: Sequence[str] | None = None) -> int:
    """0: read; 1: a check failed; 2: there is nothing to read."""
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.tracing", description="Join and explain a recorded run.")
    parser.add_argument("folder", nargs="+", type=Path, help="a trace folder (--trace DIR, trace_dir=); one per host")
    parser.add_argument("--client", type=Path, metavar="FILE", help="the load generator's records (client.jsonl in the folder)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where trace.json, figures and tables go (the first folder)")
    parser.add_argument("--no-figures", action="store_true", help="only the table, the explanation and trace.json")
    options = parser.parse_args(argv)
    try:
        client = None if options.client is None else load_records(options.client)
        run = load(options.folder, client=client)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or options.folder[0]
    print(table(run).to_string(float_format=lambda value: f"{value:.2f}"), end="\n\n")
    print(explain(run), end="\n\n")
    checks = run.checks()
    for row in checks.itertuples(index=False):
        print(f"{'ok  ' if row.is_ok else 'BAD '} {row.name}: {row.value:.6g} (limit {row.limit:g}; {row.meaning})")
    written = [perfetto.write(run, out / "trace.json"), *_write_tables(run, out)]
    if not options.no_figures:
        written += _write_figures(run, out)
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0 if checks["is_ok"].astype(bool).all() else 1


def table(run: Timeline) -> pd.DataFrame:
    """One row per phase, milliseconds over the measured requests: mean, p50, p99, and the share of the whole."""
    rows = run.breakdown[run.breakdown["request_id"].isin(run.measured["request_id"])] if len(run.requests) else run.breakdown
    total = rows["seconds"].sum()
    per_request = rows.groupby(["request_id", "phase"])["seconds"].sum().unstack(fill_value=0.0) * 1e3
    phases = [phase for phase in PHASES if phase in per_request]
    return pd.DataFrame(
        {
            "mean (ms)": per_request[phases].mean(),
            "p50 (ms)": per_request[phases].median(),
            "p99 (ms)": per_request[phases].quantile(0.99),
            "share (%)": per_request[phases].sum() / 10 / total if total else 0.0,
        },
        index=phases,
    )


def _write_tables(run: Timeline, out: Path) -> list[Path]:
    folder = out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ("requests", "breakdown", "layers"):
        written.append(folder / f"{name}.csv")
        getattr(run, name).to_csv(written[-1], index=False)
    return written


def _write_figures(run: Timeline, out: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from ksana_lab.tracing.figures import FIGURES

    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        if name in ("layer_lanes", "link_utilisation") and not len(run.transfers):
            continue
        written.append(folder / f"{name}.png")
        draw(run).savefig(written[-1], dpi=140)
    return written


if __name__ == "__main__":
    raise SystemExit(main())
