"""``python -m ksana_lab.sweep FILE``: run a sweep, or go on with one that was ended.

Exit codes: 0 every point is measured, 1 some failed (failures.jsonl says which and why), 2 nothing was started because something given is
wrong, 130 Ctrl-C, 143 SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ksana_lab import log as log_format
from ksana_lab.config.environment import drop_proxies
from ksana_lab.errors import CheckpointError, ConfigError
from ksana_lab.metrics.export import INSTALL_PARQUET, has_parquet
from ksana_lab.sweep.report import markdown, notes
from ksana_lab.sweep.runner import Sweep
from ksana_lab.workload import loadgen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.sweep", description="Run every point of a sweep; again to resume it.")
    parser.add_argument("file", type=Path, help="for example configs/sweeps/pd_ratio_cpu.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print points, cluster starts and an estimate; start nothing")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="results, found again when resumed; default runs/<name>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the sweep or of its cluster")
    parser.add_argument("--model-dir", type=Path, default=None, metavar="DIR", help="the checkpoint of every node")
    options = parser.parse_args(arguments)
    log_format.setup("sweep", level="WARNING")
    logging.getLogger(loadgen.__name__).setLevel("ERROR")  # what it warns of is in the table
    drop_proxies(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sweep = Sweep.from_yaml(options.file, overrides=options.set, out=options.out, model_dir=options.model_dir)
        if options.dry_run:
            print(sweep.describe())
            return 0
        return _run(sweep)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def _run(sweep: Sweep) -> int:
    print(sweep.describe().splitlines()[0], flush=True)
    runs = sweep.run_sync(on_progress=None if sys.stderr.isatty() else lambda step: print(f"{step.state}: {step.point}", flush=True))
    print(f"\n{markdown(runs, [axis.name for axis in sweep.space.axes])}")
    for note in notes(sweep.folder):
        print(f"{note}\n")
    print(f"results   {sweep.folder}: results.md, results.csv, requests.csv, and a folder per run in runs/")
    if not has_parquet():
        print(f"          as Parquet, too, with pyarrow: {INSTALL_PARQUET}")
    for failure in sweep.failures:
        print(f"failed    {failure['point']}: {failure['error'].splitlines()[0]}")
    return 1 if sweep.failures else 0


if __name__ == "__main__":
    sys.exit(main())
