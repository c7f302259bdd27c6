"""Per-process event log: JSON lines, never blocking the caller, bounded in memory and on disk.

A line: {"ts": ns (time.monotonic_ns), "ph": "X"|"i"|"C", "name", "cat", "dur": ns (X only), "pid", "tid", "args": {…}}. The first line of a
file is a header {"ph": "M", "name": "process", "args": {role, pid, host, clock_domain, version, clock: {monotonic_ns, unix_ns}}}, the last
{"ph": "M", "name": "end", "args": {written, dropped}}; ``written`` counts neither of the two. A file without its last line is of a process
that was killed. ``Recorder`` is passed to whoever records; ``NullRecorder`` is off. What the events mean: docs/tracing.md."""

from __future__ import annotations

import collections
import errno
import functools
import logging
import os
import socket
import threading
import time
from pathlib import Path
from threading import get_native_id
from typing import Any

import msgspec

log = logging.getLogger(__name__)

NVTX_VARIABLE = "KSANA_LAB_NVTX"  # "1": what is recorded is annotated for profilers, too
MAX_FILE_BYTES = 1 << 30
_WRITE_EVERY_S = 0.25  # what a killed process loses; each turn the writer's thread takes the interpreter from the step, 0.1 to 0.4 ms
_BATCH = 1024  # events written in one call; encoding them holds up other threads for half a millisecond
_CLOSE_TIMEOUT_S = 10.0


class _Event(msgspec.Struct, gc=False):
    """A line of the log. Not tracked by the garbage collector: those that wait would set it off in the middle of steps."""

    ph: str
    ts: int
    name: str
    cat: str
    args: dict[str, Any]
    pid: int
    tid: int


class _Span(_Event, gc=False):
    dur: int


def _to_json(value: Any) -> Any:
    if type(value).__module__ == "numpy":
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


_encoder = msgspec.json.Encoder(enc_hook=_to_json)


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

        self._events: collections.deque[_Event] = collections.deque()  # append and popleft are atomic
        self._capacity, self._max_bytes = capacity, max_bytes
        self._dropped = self._written = self._num_bytes = 0
        self._closed = False
        self._pid = os.getpid()
        directory = Path(trace_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{role}-{self._pid}.jsonl"
        self._file = self.path.open("ab", buffering=0)
        header = {
            "role": role,
            "pid": self._pid,
            "host": socket.gethostname(),
            "clock_domain": clock_domain(),
            "version": __version__,
            "clock": {"monotonic_ns": time.monotonic_ns(), "unix_ns": time.time_ns()},
        }
        self._append(_encoder.encode_lines([{"ph": "M", "name": "process", "args": header}]))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="trace-writer", daemon=True)
        self._thread.start()

    # A step pays for each line run and each object touched here some five times what a loop over it shows: the caches hold the model's.

    def instant(self, name: str, cat: str, **args: Any) -> None:
        self._put(_Event("i", time.monotonic_ns(), name, cat, args, self._pid, get_native_id()))

    def span(self, name: str, cat: str, start_ns: int, end_ns: int, **args: Any) -> None:
        self._put(_Span("X", start_ns, name, cat, args, self._pid, get_native_id(), end_ns - start_ns))

    def counter(self, name: str, cat: str, **values: float) -> None:
        self._put(_Event("C", time.monotonic_ns(), name, cat, values, self._pid, get_native_id()))

    def _put(self, event: _Event) -> None:
        if len(self._events) < self._capacity:
            self._events.append(event)
        else:
            self._dropped += 1

    @property
    def num_waiting(self) -> int:
        """Events that are not written yet."""
        return len(self._events)

    # ---- the writer's thread -----------------------------------------------------------------------------------------

    def _write(self) -> None:
        while not self._stop.wait(_WRITE_EVERY_S):
            self._drain()

    def _drain(self) -> None:
        while self._events:
            events = [self._events.popleft() for _ in range(min(len(self._events), _BATCH))]
            lines = self._encode(events)
            if (room := self._max_bytes - self._num_bytes) < len(lines):
                lines = lines[: lines.rfind(b"\n", 0, max(0, room)) + 1]
            written = lines.count(b"\n")
            try:
                self._append(lines)
            except OSError as error:  # a full disk
                self._warn(error)
                written = 0
            self._written += written
            self._dropped += len(events) - written

    def _encode(self, events: list[_Event]) -> bytes:
        try:
            return _encoder.encode_lines(events)
        except Exception as error:  # an argument that is no JSON costs its own event only
            if len(events) == 1:
                self._warn(error)
                return b""
            return b"".join(self._encode([event]) for event in events)

    def _warn(self, error: Exception) -> None:
        if not self._dropped:
            log.warning("%s: events are not written, the last line says how many: %s", self.path, error)

    def _append(self, lines: bytes) -> None:
        num_bytes = self._file.write(lines)
        if num_bytes < len(lines):
            self._file.truncate(self._file.tell() - num_bytes)  # what lies there may end within a line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._num_bytes += num_bytes

    def close(self) -> None:
        """Writes what waits, then the closing line. May be called twice."""
        if self._closed:
            return
        self._closed, self._capacity = True, 0  # what comes now is dropped and counted
        self._stop.set()
        try:
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        finally:  # a second SIGTERM may raise just here
            self._finish()

    def _finish(self) -> None:
        self._drain()
        end = {"written": self._written, "dropped": self._dropped}
        try:
            self._append(_encoder.encode_lines([{"ph": "M", "name": "end", "args": end}]))
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
