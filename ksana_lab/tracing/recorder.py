"""Per-process event log: JSON lines, never blocking the caller, bounded in memory.

A line: {"ts": ns (time.monotonic_ns), "ph": "X"|"i"|"C", "name", "cat", "dur": ns (X only), "pid", "tid", "args": {…}}. The first line of a
file is a header {"ph": "M", "name": "process", "args": {role, pid, host, version, clock: {monotonic_ns, unix_ns}}}, the last
{"ph": "M", "name": "end", "args": {written, dropped}}. ``Recorder`` is passed to whoever records; ``NullRecorder`` is off."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any


class NullRecorder:
    """Records nothing. ``enabled`` lets a hot path skip building arguments."""

    enabled = False

    def instant(self, name: str, cat: str, **args: Any) -> None: ...

    def span(self, name: str, cat: str, start_ns: int, end_ns: int, **args: Any) -> None: ...

    def counter(self, name: str, cat: str, **values: float) -> None: ...

    def close(self) -> None: ...


class Recorder(NullRecorder):
    """Appends to ``<trace_dir>/<role>-<pid>.jsonl`` from a thread of its own. When more than ``capacity`` events wait, new ones are
    dropped and counted: a full disk or a slow one never slows a step."""

    enabled = True

    def __init__(self, trace_dir: str | Path, role: str, *, capacity: int = 1 << 16) -> None:
        from ksana_lab import __version__

        self._queue: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._capacity, self._dropped, self._written = capacity, 0, 0
        self._closed = False
        directory = Path(trace_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{role}-{os.getpid()}.jsonl"
        self._file = self.path.open("a", encoding="utf-8")
        clock = {"monotonic_ns": time.monotonic_ns(), "unix_ns": time.time_ns()}
        header = {
            "role": role,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "version": __version__,
            "clock": clock,
        }
        self._queue.put({"ph": "M", "name": "process", "args": header})
        self._thread = threading.Thread(target=self._write, name="trace-writer", daemon=True)
        self._thread.start()

    def _put(self, event: dict) -> None:
        if self._closed or self._queue.qsize() >= self._capacity:
            self._dropped += 1
            return
        event["pid"], event["tid"] = os.getpid(), threading.get_native_id()
        self._queue.put(event)

    def instant(self, name: str, cat: str, **args: Any) -> None:
        self._put({"ph": "i", "ts": time.monotonic_ns(), "name": name, "cat": cat, "args": args})

    def span(self, name: str, cat: str, start_ns: int, end_ns: int, **args: Any) -> None:
        self._put({"ph": "X", "ts": start_ns, "dur": end_ns - start_ns, "name": name, "cat": cat, "args": args})

    def counter(self, name: str, cat: str, **values: float) -> None:
        self._put({"ph": "C", "ts": time.monotonic_ns(), "name": name, "cat": cat, "args": values})

    def _write(self) -> None:
        while (event := self._queue.get()) is not None:
            self._file.write(json.dumps(event, separators=(",", ":")) + "\n")
            self._written += 1
            if self._queue.empty():
                self._file.flush()

    def close(self) -> None:
        """Writes what waits, then the closing line. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout=10)
        end = {"ph": "M", "name": "end", "args": {"written": self._written, "dropped": self._dropped}}
        self._file.write(json.dumps(end) + "\n")
        self._file.close()


def open_recorder(trace_dir: str | Path | None, role: str) -> NullRecorder:
    return Recorder(trace_dir, role) if trace_dir else NullRecorder()
