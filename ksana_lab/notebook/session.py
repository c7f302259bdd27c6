"""The names a notebook imports, and the few calls that spare it a definition of its own.

from ksana_lab.notebook.session import Cluster, WorkloadSpec, config, latency_table, plots, tiny_model, to_frame"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

import ksana_lab
from ksana_lab.cluster.local import Cluster
from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import gaps_frame, load_records, save_records, summary_row, to_frame, vllm_result
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import SLO, distribution, is_cancelled, summarize
from ksana_lab.notebook import plots
from ksana_lab.notebook.uncertainty import goodput, interval_table
from ksana_lab.sweep.report import load_requests, load_results
from ksana_lab.sweep.runner import Sweep
from ksana_lab.tracing import timeline
from ksana_lab.tracing.timeline import Timeline
from ksana_lab.workload import loadgen
from ksana_lab.workload.spec import WorkloadSpec

__all__ = [
    "SLO",
    "Cluster",
    "ClusterConfig",
    "RequestRecord",
    "Sweep",
    "WorkloadSpec",
    "config",
    "different_tokens",
    "fresh_folder",
    "gaps_frame",
    "goodput",
    "interval_table",
    "latency_table",
    "load_records",
    "load_requests",
    "load_results",
    "load_timeline",
    "loadgen",
    "plots",
    "results_folder",
    "save_records",
    "summarize",
    "summary_row",
    "tiny_model",
    "to_frame",
    "vllm_result",
]

ROOT = Path(ksana_lab.__file__).resolve().parents[1]
RESULTS_VARIABLE = "KSANA_LAB_RESULTS"  # where notebooks keep what they measure, instead of runs/notebooks


def config(name: str) -> Path:
    """A file of ``configs/``, wherever the notebook runs. Raises ConfigError that lists what there is."""
    path = ROOT / "configs" / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none: run from a clone of the repository"
        raise ConfigError(f"there is no configs/{name}; there are: {known}")
    return path


def tiny_model(arch: str = "qwen3", shape: str = "tiny") -> Path:
    """A checkpoint with seeded random weights under ``.cache/``, made the first time (seconds)."""
    from ksana_lab.models.synth import synthesize  # brings torch

    folder = "tiny" if (arch, shape) == ("qwen3", "tiny") else f"{arch}-{shape}"
    return synthesize(ROOT / ".cache" / folder, arch, shape, seed=0)


def results_folder(name: str) -> Path:
    """Where a notebook keeps what it measures and finds it again: ``runs/notebooks/<name>`` of the clone, or under $KSANA_LAB_RESULTS."""
    return Path(os.environ.get(RESULTS_VARIABLE) or ROOT / "runs" / "notebooks") / name


def fresh_folder(name: str) -> Path:
    """A new, empty folder inside ``results_folder(name)``: what a second run writes is not mixed with what the first wrote."""
    parent = results_folder(name)
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent))


def load_timeline(folder: str | Path, *, client: Sequence[RequestRecord] = ()) -> Timeline:
    """The event logs of a cluster that was given ``trace_dir=folder``, joined by request; ``client``: what the load generator recorded."""
    return timeline.load(folder, client=client, profilers=False)


def latency_table(systems: Mapping[str, Sequence[RequestRecord]]) -> pd.DataFrame:
    """One row per system: how many requests, how many of them failed, TTFT and TPOT percentiles of the completed ones in milliseconds. What
    the client cancelled is in none of these."""
    rows = {}
    for system, records in systems.items():
        counted = [r for r in records if not is_cancelled(r)]
        row: dict[str, float | int] = {"requests": len(counted), "failed": sum(not r.is_ok for r in counted)}
        for name, metric in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
            values = distribution(records, metric)
            row |= {f"{name} p{p} (ms)": round(1e3 * getattr(values, f"p{p}"), 1) for p in (50, 90, 99)}
        rows[system] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def different_tokens(expected: Sequence[RequestRecord], got: Sequence[RequestRecord]) -> list[str]:
    """One line per request whose answers differ or are missing; empty when every token is identical."""
    lines = [] if len(expected) == len(got) else [f"{len(expected)} requests against {len(got)}"]
    for i, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a.error or b.error:
            lines.append(f"request {i}: {a.error or b.error}")
        elif a.output_token_ids != b.output_token_ids or not a.output_token_ids:
            x, y = a.output_token_ids or [], b.output_token_ids or []
            at = next((k for k, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
            lines.append(f"request {i} ({a.num_prompt_tokens} prompt tokens): differs from token {at} on, of {len(x)} and {len(y)}")
    return lines
