"""Per-process event log: JSON lines, never blocking the caller, bounded in memory and on disk.

A line: {"ts": ns (time.monotonic_ns), "ph": "X"|"i"|"C", "name", "cat", "dur": ns (X only), "pid", "tid", "args": {…}}. The first line of a
file is a header {"ph": "M", "name": "process", "args": {role, pid, host, clock_domain, version, clock: {monotonic_ns, unix_ns}}}, the last
{"ph": "M", "name": "end", "args": {written, dropped}}; ``written`` counts neither of the two. A file without its last line is of a process
that was killed. ``Recorder`` is passed to whoever records; ``NullRecorder`` is off. What the events mean: docs/tracing.md."""

from __future__ import annotations

import collections
import functools
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger(__name__)

NVTX_VARIABLE = "KSANA_LAB_NVTX"  # "1": what is recorded is annotated for profilers, too
MAX_FILE_BYTES = 1 << 30
_GATHER_S = 0.05  # events are written in batches: a wake-up per event would cost the recording threads more than the event
_CLOSE_TIMEOUT_S = 10.0


class NullRecorder:
    """Records nothing. ``enabled`` lets a hot path skip building arguments; ``annotates`` that somebody wants ranges while they last."""

    enabled = False
    annotates = False

    def instant(self, name: str, cat: str, **args: Any) -> None: ...

    def span(self, name: str, cat: str, start_ns: int, end_ns: int, **args: Any) -> None: ...

    def counter(self, name: str, cat: str, **values: float) -> None: ...

    def open(self, name: str, cat: str, **args: Any) -> Any:
        """A range that begins now; give what is returned to ``shut``, from any thread. For profilers: the log has ``span``."""

    def shut(self, handle: Any) -> None: ...

    def push(self, name: str, cat: str, **args: Any) -> None:
        """A range of this thread that begins now and encloses whatever it calls, until ``pop``. For profilers."""

    def pop(self) -> None: ...

    def close(self) -> None: ...


class Recorder(NullRecorder):
    """Appends to ``<trace_dir>/<role>-<pid>.jsonl`` from a thread of its own. When more than ``capacity`` events wait, or the file has
    ``max_bytes``, new ones are dropped and counted: a full disk or a slow one never slows a step."""

    enabled = True

    def __init__(self, trace_dir: str | Path, role: str, *, capacity: int = 1 << 16, max_bytes: int = MAX_FILE_BYTES) -> None:
        from ksana_lab import __version__

        self._events: collections.deque[dict] = collections.deque()  # append and popleft are atomic
        self._capacity, self._max_bytes = capacity, max_bytes
        self._dropped = self._written = self._num_bytes = 0
        self._closed = False
        self._pid = os.getpid()
        directory = Path(trace_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{role}-{self._pid}.jsonl"
        self._file = self.path.open("ab")
        header = {
            "role": role,
            "pid": self._pid,
            "host": socket.gethostname(),
            "clock_domain": clock_domain(),
            "version": __version__,
            "clock": {"monotonic_ns": time.monotonic_ns(), "unix_ns": time.time_ns()},
        }
        self._write_line({"ph": "M", "name": "process", "args": header})
        self._file.flush()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write, name="trace-writer", daemon=True)
        self._thread.start()

    def instant(self, name: str, cat: str, **args: Any) -> None:
        self._put({"ph": "i", "ts": time.monotonic_ns(), "name": name, "cat": cat, "args": args})

    def span(self, name: str, cat: str, start_ns: int, end_ns: int, **args: Any) -> None:
        self._put({"ph": "X", "ts": start_ns, "dur": end_ns - start_ns, "name": name, "cat": cat, "args": args})

    def counter(self, name: str, cat: str, **values: float) -> None:
        self._put({"ph": "C", "ts": time.monotonic_ns(), "name": name, "cat": cat, "args": values})

    def _put(self, event: dict) -> None:
        if self._closed or len(self._events) >= self._capacity:
            self._dropped += 1
            return
        event["pid"], event["tid"] = self._pid, threading.get_native_id()
        self._events.append(event)
        if not self._wake.is_set():
            self._wake.set()

    @property
    def num_waiting(self) -> int:
        """Events that are not written yet."""
        return len(self._events)

    # ---- the writer's thread -----------------------------------------------------------------------------------------

    def _write(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._stop.wait(_GATHER_S)
            self._wake.clear()
            self._drain()

    def _drain(self) -> None:
        while self._events:
            event = self._events.popleft()
            try:
                fits = self._num_bytes < self._max_bytes
                if fits:
                    self._write_line(event)
            except (OSError, TypeError) as error:  # a full disk; an argument that is no JSON
                if not self._dropped:
                    log.warning("%s: an event was not written: %s", self.path, error)
                fits = False
            self._written += fits
            self._dropped += not fits
        try:
            self._file.flush()
        except OSError as error:
            log.warning("%s: %s", self.path, error)

    def _write_line(self, event: dict) -> None:
        line = orjson.dumps(event, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        self._file.write(line)
        self._num_bytes += len(line)

    def close(self) -> None:
        """Writes what waits, then the closing line. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._wake.set()
        try:
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        finally:  # a second SIGTERM may raise just here
            self._finish()

    def _finish(self) -> None:
        self._drain()
        end = {"written": self._written, "dropped": self._dropped}
        try:
            self._write_line({"ph": "M", "name": "end", "args": end})
            self._file.close()
        except OSError as error:
            log.warning("%s: the closing line was not written: %s", self.path, error)


@functools.cache
def clock_domain() -> str:
    """Equal for processes that share a monotonic clock: the boot of one kernel, whatever containers call their host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def open_recorder(trace_dir: str | Path | None, role: str) -> NullRecorder:
    """What ``role`` records with: the log if there is a ``trace_dir``, annotations if ``KSANA_LAB_NVTX`` is 1 and a profiler listens."""
    recorder = Recorder(trace_dir, role) if trace_dir else NullRecorder()
    if os.environ.get(NVTX_VARIABLE) == "1":
        from ksana_lab.tracing.nvtx import annotate

        return annotate(recorder, role)
    return recorder
