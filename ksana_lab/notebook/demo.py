"""``make demo``: the same requests on one mixed node and on a prefill with a decode node; a table, a picture, every token compared.

Everything is real but small: a checkpoint in Hugging Face format with random weights, separate processes, a slice of the Azure
conversation trace whose lengths are scaled to the model. Random weights make the text meaningless and the comparison strict: one
wrong or late KV block changes every token after it. It shows that disaggregation is exact, not that it is fast."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd

from ksana_lab import log
from ksana_lab.errors import KsanaLabError
from ksana_lab.notebook import plots
from ksana_lab.notebook.session import (
    Cluster,
    RequestRecord,
    WorkloadSpec,
    config,
    different_tokens,
    latency_table,
    loadgen,
    save_records,
    tiny_model,
    to_frame,
)

MIXED, DISAGGREGATED = "one mixed node", "prefill + decode"
ONE_THREAD = ["num_threads=1"]  # per process: alike for both systems, and steady where other programs want the cores too
SYSTEMS = {MIXED: "mixed_cpu.yaml", DISAGGREGATED: "pd_1p1d_cpu.yaml"}


def azure_slice(num_requests: int) -> WorkloadSpec:
    """The first requests of the Azure conversation trace at four times their pace, lengths scaled to what a CPU can do."""
    return WorkloadSpec.from_dict(
        {
            "trace": {"path": "azure_llm_2023_conv_sample"},
            "num_requests": num_requests,
            "time_scale": 0.25,
            "prompt_scale": 0.5,
            "output_scale": 0.3,
            "max_prompt_tokens": 1024,
            "max_output_tokens": 64,
            "num_warmup": 2,
            "seed": 0,
        }
    )


def run(out: Path, model_dir: Path | None, num_requests: int) -> int:
    """Everything ``make demo`` does; the exit code. Writes table, figure and records under ``out``."""
    started_s = time.monotonic()
    model_dir = model_dir or tiny_model()
    spec = azure_slice(num_requests)
    print(f"model     {model_dir} (random weights)")
    print(f"workload  Azure LLM inference trace 2023, conversation (CC-BY-4.0): {spec.build().lengths}; times x {spec.time_scale:g}")
    reports = {system: _play(system, config(file), model_dir, spec) for system, file in SYSTEMS.items()}
    records = {system: report.records for system, report in reports.items()}
    table = latency_table(records).to_string()
    picture = _write(out, records, table)
    print(f"\n{table}\n\npicture   {picture} (PDF, CSV, table and records beside it)")
    for system, report in reports.items():
        if not report.is_trustworthy:
            print(f"note      {system}: {str(report).splitlines()[-1]}")
    print("read it   as a proof of equality: here the pair computes in two processes of one thread each, the mixed node in one")
    is_same = _verdict(records[MIXED], records[DISAGGREGATED])
    print(f"          {time.monotonic() - started_s:.0f} s in all")
    return 0 if is_same else 1


def _play(system: str, file: Path, model_dir: Path, spec: WorkloadSpec) -> loadgen.LoadReport:
    started_s = time.monotonic()
    print(f"{system}: starting ...", end=" ", flush=True)
    with Cluster.from_yaml(
        file, model_dir=model_dir, overrides=["num_threads=1"]
    ) as cluster:  # the same for both, steady on a busy machine
        print(f"serving after {time.monotonic() - started_s:.1f} s at {cluster.url}; playing ...", end=" ", flush=True)
        report = loadgen.measure(cluster.url, spec)
    print(f"{report.duration_s:.1f} s", flush=True)
    return report


def _write(out: Path, records: dict[str, list[RequestRecord]], table: str) -> Path:
    """The picture's path."""
    frame = pd.concat([to_frame(r, system=system) for system, r in records.items()], ignore_index=True)
    for system, of_system in records.items():
        save_records(of_system, out / f"records_{Path(SYSTEMS[system]).stem}.jsonl")
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    return plots.save(plots.comparison(frame), out / "demo", frame)[0]


def _verdict(expected: Sequence[RequestRecord], got: Sequence[RequestRecord]) -> bool:
    faults = different_tokens(expected, got)
    if faults:
        print(f"NOT identical: {len(faults)} of {len(expected)} requests", *faults, sep="\n  ")
        return False
    num_tokens = sum(len(r.output_token_ids or []) for r in expected)
    print(f"every token identical: {len(expected)} requests, {num_tokens} tokens")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ksana_lab.notebook.demo",
        description="One mixed node against prefill + decode on the same requests: table, picture, every token.",
    )
    parser.add_argument("--requests", type=int, default=60, metavar="N", help="how many of the bundled trace's 200 (default 60)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument("--model-dir", type=Path, default=None, metavar="DIR", help="a checkpoint; default: a tiny one made in .cache/")
    options = parser.parse_args(arguments)
    log.setup("demo", level="WARNING")
    logging.getLogger(loadgen.__name__).setLevel("ERROR")  # what it warns of is printed below the table
    matplotlib.use("agg")  # a demo on a server has no screen
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        return run(options.out, options.model_dir, options.requests)
    except (KsanaLabError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
