"""The part of a cluster's event logs that belongs to one run. The processes outlive a run, so their files are cut between two runs.

A copy begins with the header of its file (role, clock), so that it can be read like a whole one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

_ENDS = (b'"FINISHED"', b'"ABORTED"', b'"FAILED"')
_LOOK_EVERY_S = 0.02  # other processes write these files: there is nothing to wait on but their growth
_QUIET_S = 0.15  # longer than a process gathers events before it writes them


class EventTap:
    """``mark`` before a run, ``copy_to`` after it."""

    def __init__(self, trace_dir: Path) -> None:
        self._dir = trace_dir
        self._start: dict[Path, int] = {}

    def mark(self) -> None:
        self._start = {path: path.stat().st_size for path in self._files()}

    def copy_to(self, folder: Path, request_ids: Iterable[str], *, timeout_s: float = 5.0) -> bool:
        """Copies what was written since ``mark``, once the end of every request has been and nothing more comes. False: the time was up
        before, the copies may lack their last events."""
        is_complete = self._wait(set(request_ids), timeout_s)
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._files():
            data = self._written(path)
            header = b"" if self._start.get(path, 0) == 0 else _first_line(path)
            (folder / path.name).write_bytes(header + data[: data.rfind(b"\n") + 1])
        return is_complete

    def _wait(self, request_ids: set[str], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        sizes, quiet_since = self._sizes(), time.monotonic()
        while time.monotonic() < deadline:
            if time.monotonic() - quiet_since >= _QUIET_S:
                if request_ids <= self._ended():
                    return True
                quiet_since = time.monotonic()
            time.sleep(_LOOK_EVERY_S)
            if (now := self._sizes()) != sizes:
                sizes, quiet_since = now, time.monotonic()
        return False

    def _ended(self) -> set[str]:
        lines = (line for path in self._files() for line in self._written(path).splitlines() if any(end in line for end in _ENDS))
        return {_request_id(line) for line in lines}

    def _written(self, path: Path) -> bytes:
        with path.open("rb") as file:
            file.seek(self._start.get(path, 0))
            return file.read()

    def _sizes(self) -> dict[Path, int]:
        return {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return sorted(self._dir.glob("*.jsonl"))


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


def _request_id(line: bytes) -> str:
    """Empty for a line that is not whole yet."""
    try:
        return str(json.loads(line).get("args", {}).get("request_id", ""))
    except ValueError:
        return ""
