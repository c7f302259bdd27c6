"""Where results live: a folder per finished run, made elsewhere and moved into place at once, so that what is there is whole.

    <folder>/sweep.json             version, name, axes, code version, the runs that belong to the sweep as it is now and what it calls them
    <folder>/runs/<run_id>/         point.json cluster.yaml nodes/ workload.yaml environment.json records.jsonl report.json summary.json
                                    vllm.json events/
    <folder>/failures.jsonl         a line per failed attempt
    <folder>/clusters/<key>/        logs of the processes

A run that is there is never made again; a killed one leaves a folder under ``partial/``, removed at the next start."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksana_lab.config import yaml_file
from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import save_records, summary_row, vllm_result
from ksana_lab.metrics.summary import SLO, summarize
from ksana_lab.sweep.environment import capture
from ksana_lab.sweep.space import SweepPoint, cluster_text
from ksana_lab.workload.loadgen import LoadReport

VERSION = 1  # of the folder's layout and of the files' meaning
MANIFEST = "sweep.json"
# The columns of a run that its measurement decided; the others are what the sweep calls it, and change with the sweep's file.
MEASURED = ("is_trustworthy", "send_lag_p99_s", "loop_lag_p99_s", "code_version")


@dataclass
class Manifest:
    name: str
    code_version: str
    axes: list[str]
    slo: dict[str, float] = field(default_factory=dict)
    target: float = 0.9
    # What the sweep, as it is now, calls each of its runs: id -> columns, in the order in which results are shown. Empty columns: what the
    # run was called when it was made (sweep.json once held ids alone).
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def run_ids(self) -> list[str]:
        return list(self.runs)

    def columns(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Of a run's row besides its summary; ``point`` is its point.json. A kept run goes by its present name, not by the one that it was
        made under."""
        if not (called := self.runs.get(point["run_id"])):
            return dict(point["columns"])
        return {**called, **{name: value for name, value in point["columns"].items() if name in MEASURED}}


def read_manifest(folder: str | Path) -> Manifest:
    """Raises ConfigError when the folder holds no sweep, or one of another version."""
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.pop("ksana_lab_sweep")
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no results of a sweep: there is no {MANIFEST}") from None
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as the results of a sweep: {type(error).__name__}: {error}") from None
    if version != VERSION:
        raise ConfigError(
            f"{folder} holds results of version {version}; this ksana_lab reads version {VERSION}: sweep again, with another --out"
        )
    try:
        if "run_ids" in data:
            data["runs"] = {run_id: {} for run_id in data.pop("run_ids")}
        return Manifest(**data)
    except TypeError as error:
        raise ConfigError(f"{path} cannot be read as the results of a sweep: {error}") from None


class Store:
    """The results of one sweep, for the one process that makes them. ``with Store(folder, manifest) as store``."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        """Touches nothing yet. Raises ConfigError when the folder holds something else."""
        self.folder, self.manifest = Path(folder), manifest
        self._lock: Any = None
        self._check()

    def _check(self) -> None:
        if (self.folder / MANIFEST).exists():
            found = read_manifest(self.folder)
            if found.name != self.manifest.name:
                raise ConfigError(f"{self.folder} holds the sweep {found.name!r}, not {self.manifest.name!r}; choose another --out")
        elif self.folder.is_dir() and any(path.name not in (".lock", MANIFEST + ".new") for path in self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and holds no sweep; choose another --out")
        elif self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file; choose another --out")

    def __enter__(self) -> Store:
        """Raises ConfigError while another process works on this folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when this process ends, however it ends
        except OSError:
            self._lock.close()
            raise ConfigError(f"another process runs the sweep in {self.folder}; wait for it, or choose another --out") from None
        self._check()
        for leftover in (*self.folder.glob("partial/*"), *self.folder.glob("clusters/*/events-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        self.write_manifest()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_manifest(self) -> None:
        path = self.folder / MANIFEST
        new = path.with_name(MANIFEST + ".new")
        new.write_text(_json({"ksana_lab_sweep": VERSION, **vars(self.manifest)}), encoding="utf-8")
        os.replace(new, path)

    def add_run(self, run_id: str, columns: Mapping[str, Any]) -> None:
        """A search names its runs as it goes."""
        if run_id not in self.manifest.runs:
            self.manifest.runs[run_id] = dict(columns)
            self.write_manifest()

    # ---- runs

    def path(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id

    def has(self, run_id: str) -> bool:
        return self.path(run_id).is_dir()

    def partial(self, run_id: str) -> Path:
        """An empty folder for what a run leaves while it goes (its events)."""
        path = self.folder / "partial" / run_id
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def save(
        self,
        run_id: str,
        point: SweepPoint,
        report: LoadReport,
        columns: Mapping[str, Any],
        *,
        slo: SLO | None,
        nodes: Mapping[str, str],
        timing: Mapping[str, float],
        folder: Path,
    ) -> None:
        """Completes ``folder`` (from ``partial``) and moves it to its place. ``nodes``: name -> the node's own file, ports and all."""
        summary = summarize(report.records, slo=slo)
        save_records(report.records, folder / "records.jsonl")
        (folder / "nodes").mkdir()
        files = {
            "cluster.yaml": cluster_text(point.setup.cluster),
            "workload.yaml": yaml_file.dump(point.workload.to_dict()),
            "environment.json": _json({"code_version": columns["code_version"], **capture()}),
            "report.json": _json(report_facts(report)),
            "summary.json": _json({name: value if name != "slo" else slo and vars(slo) for name, value in _plain(summary).items()}),
            "vllm.json": _json({**_vllm_context(point), **vllm_result(report.records, summary)}),
            "point.json": _json(
                {
                    "ksana_lab_run": VERSION,
                    "run_id": run_id,
                    "columns": dict(columns),
                    "slo": slo and vars(slo),
                    "summary": summary_row(summary),
                    "timing": dict(timing),
                }
            ),
            **{f"nodes/{name}.yaml": text for name, text in nodes.items()},
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        self.path(run_id).parent.mkdir(exist_ok=True)
        os.rename(folder, self.path(run_id))

    # ---- failures

    def fail(self, run_id: str, point: SweepPoint, error: str, details: str = "") -> None:
        line = {"run_id": run_id, "point": str(point), "error": error, "details": details, "unix_s": time.time()}
        with (self.folder / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- clusters

    def logs(self, cluster_key: str) -> Path:
        return self.folder / "clusters" / cluster_key / "logs"

    @contextlib.contextmanager
    def raw_events(self, cluster_key: str) -> Iterator[Path]:
        """Where a cluster's processes write their event logs while it runs."""
        path = self.folder / "clusters" / cluster_key / f"events-{time.time_ns()}"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def read_point(folder: str | Path, run_id: str) -> dict[str, Any]:
    """A finished run's point.json. Raises ConfigError when it is none of this version."""
    path = Path(folder) / "runs" / run_id / "point.json"
    try:
        point = json.loads(path.read_text(encoding="utf-8"))
        version = point["ksana_lab_run"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is no finished run: {type(error).__name__}: {error}; remove the folder to measure again") from None
    if version != VERSION:
        raise ConfigError(f"{path} is of version {version}; this ksana_lab reads version {VERSION}: sweep again, with another --out")
    return point


def other_runs(folder: str | Path, manifest: Manifest) -> list[str]:
    """Ids of finished runs that the sweep, as it is now, does not name: of a definition or a source before."""
    finished = sorted(path.name for path in (Path(folder) / "runs").glob("*") if path.is_dir())
    return [run_id for run_id in finished if run_id not in manifest.runs]


def read_environment(folder: str | Path, run_id: str) -> dict[str, Any]:
    """A finished run's environment.json; empty when it cannot be read."""
    try:
        return json.loads((Path(folder) / "runs" / run_id / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_failures(folder: str | Path) -> list[dict[str, Any]]:
    """Attempts whose run has not succeeded since, the latest of each. A line cut short by a kill is left out."""
    path = Path(folder) / "failures.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    latest: dict[str, dict[str, Any]] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            failure = json.loads(line)
            latest[failure["run_id"]] = failure
    return [failure for run_id, failure in latest.items() if not (Path(folder) / "runs" / run_id).is_dir()]


def report_facts(report: LoadReport) -> dict[str, Any]:
    """All of a LoadReport but its records."""
    return {
        "is_trustworthy": report.is_trustworthy,
        "duration_s": report.duration_s,
        "started_s": report.started_s,
        "num_requests": len(report.records),
        "num_failed": report.num_failed,
        "send_lag_p99_s": report.send_lag_p99_s,
        "send_lag_max_s": report.send_lag_max_s,
        "loop_lag_p99_s": report.loop_lag_p99_s,
        "num_warmup_failed": report.num_warmup_failed,
        "notes": report.notes,
        "lengths": vars(report.lengths),
        "text": str(report),
    }


def _vllm_context(point: SweepPoint) -> dict[str, Any]:
    """The keys by which vLLM says what was run."""
    workload = point.workload
    return {
        "backend": "ksana_lab",
        "model_id": point.setup.cluster.model_dir,
        "request_rate": workload.rate if workload.rate is None or workload.rate != float("inf") else "inf",
        "burstiness": workload.burstiness if workload.burstiness != float("inf") else "inf",
        "max_concurrency": workload.users,
    }


def _plain(summary: Any) -> dict[str, Any]:
    return {name: vars(value) if hasattr(value, "p50") else value for name, value in vars(summary).items()}


def _json(value: Any) -> str:
    """JSON knows neither nan nor infinity: both become null."""
    return json.dumps(_finite(value), indent=1, default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
