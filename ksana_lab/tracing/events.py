"""Reads the event logs of a run as they were written: one file per process, nothing joined, nothing moved in time.

A log may end anywhere (its process was killed): what is whole is read, and ``ProcessLog`` says what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ksana_lab.errors import ConfigError


@dataclass
class ProcessLog:
    """One process. Times of ``events`` are its own monotonic ns."""

    path: Path
    role: str  # router, prefill-api, prefill.tp0, decode.tp1, …
    pid: int
    host: str = ""
    clock_domain: str = ""  # processes with the same one share a monotonic clock
    version: str = ""
    monotonic_ns: int = 0  # read together with unix_ns
    unix_ns: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    written: int | None = None  # as its last line says; None = there is none
    dropped: int | None = None
    num_malformed: int = 0

    @property
    def kind(self) -> str:
        """router, prefill, decode, mixed, llm."""
        return self.role.partition("-")[0].partition(".")[0]

    @property
    def is_engine(self) -> bool:
        """A process that runs steps; rank 0 also schedules them."""
        return ".tp" in self.role or self.role == "llm"

    @property
    def rank(self) -> int:
        number = self.role.rpartition(".tp")[2]
        return int(number) if number.isdecimal() else 0

    @property
    def is_complete(self) -> bool:
        """It was closed, and holds what its writer counted."""
        return self.written == len(self.events) and not self.num_malformed

    def named(self, name: str, cat: str | None = None) -> Iterator[dict[str, Any]]:
        return (event for event in self.events if event["name"] == name and (cat is None or event["cat"] == cat))


def read_logs(folder: str | Path | Sequence[str | Path]) -> list[ProcessLog]:
    """Every event log in one folder, or in several (one per host). Raises ConfigError when there is none."""
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(f) for f in folder]
    logs = [log for path in folders for file in sorted(path.glob("*.jsonl")) for log in _read_file(file)]
    if not logs:
        where = ", ".join(map(str, folders))
        raise ConfigError(f"no event log in {where}; record with Cluster.from_yaml(…, trace_dir=…) or launch … --trace DIR")
    return logs


def beside(path: Path, logs: Sequence[ProcessLog]) -> list[ProcessLog]:
    """Those in the folder of ``path``, which are of its host: another host may have given the same number to another process. All, when
    there is none."""
    return [log for log in logs if log.path.parent == path.parent] or list(logs)


def _read_file(path: Path) -> list[ProcessLog]:
    """One log; several when processes with the same pid and role appended one after the other; none for another kind of file."""
    logs: list[ProcessLog] = []
    with path.open("rb") as file:
        for line in file:
            try:
                event = orjson.loads(line)
                phase, name = event["ph"], event["name"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                if logs:
                    logs[-1].num_malformed += 1
                    continue
                return []  # not an event log
            if phase == "M" and name == "process":
                logs.append(_from_header(path, event["args"]))
            elif phase == "M" and name == "end" and logs:
                logs[-1].written, logs[-1].dropped = event["args"]["written"], event["args"]["dropped"]
            elif logs:
                logs[-1].events.append(event)
    return logs


def _from_header(path: Path, args: dict[str, Any]) -> ProcessLog:
    clock = args.get("clock", {})
    return ProcessLog(
        path,
        args["role"],
        args["pid"],
        args.get("host", ""),
        args.get("clock_domain") or args.get("host", ""),
        args.get("version", ""),
        clock.get("monotonic_ns", 0),
        clock.get("unix_ns", 0),
    )
