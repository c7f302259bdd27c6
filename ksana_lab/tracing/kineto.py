"""Reads the chrome traces that ``/start_profile`` and ``/stop_profile`` leave (torch.profiler, Kineto): GPU rows for users without nsys.

Kineto's times are µs; ``baseTimeNanoseconds`` says which wall-clock instant they count from (torch >= 2.4), else they are wall clock. The
log's header ties wall clock and monotonic clock of the process together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import orjson
import pandas as pd

from ksana_lab.tracing.clock import Alignment
from ksana_lab.tracing.events import ProcessLog, beside
from ksana_lab.tracing.nsys import COLUMNS

log = logging.getLogger(__name__)

_KINDS = {
    "kernel": "kernel",
    "gpu_memcpy": "copy",
    "gpu_memset": "kernel",
    "user_annotation": "annotation",
    "gpu_user_annotation": "annotation",
}
_CPU_OPS = "cpu_op"  # without a GPU there is nothing else; only the outermost of each thread are kept


def read_folder(folders: Sequence[Path], logs: Sequence[ProcessLog], alignment: Alignment | None) -> pd.DataFrame:
    frames = []
    for path in sorted(file for folder in folders for file in folder.glob("kineto-*.json")):
        try:
            frames.append(read(path, beside(path, logs), alignment))
        except (orjson.JSONDecodeError, KeyError) as error:
            log.warning("%s is no trace of torch.profiler: %s", path, error)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def read(path: str | Path, logs: Sequence[ProcessLog], alignment: Alignment | None = None) -> pd.DataFrame:
    """Rows for ``Timeline.with_device_rows``. Raises JSONDecodeError or KeyError for another kind of file."""
    data = orjson.loads(Path(path).read_bytes())
    base_ns = int(data.get("baseTimeNanoseconds", 0))
    events = [e for e in data["traceEvents"] if e.get("ph") == "X" and (e.get("cat") in _KINDS or e.get("cat") == _CPU_OPS)]
    own = _log_of(Path(path), events, logs)
    shift_ns = base_ns
    if own is not None:
        shift_ns -= own.unix_ns - own.monotonic_ns
        if alignment is not None:
            shift_ns = alignment.to_reference(own.clock_domain, shift_ns)
    rows: list[tuple] = []
    ends: dict[str, float] = {}  # of the outermost op of each thread
    for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e.get("dur", 0)))):
        start, length = float(event["ts"]), float(event.get("dur", 0))
        args, lane = event.get("args", {}), f"thread {event.get('tid')}"
        if event["cat"] == _CPU_OPS:
            if start < ends.get(lane, 0.0):
                continue  # inside another one
            ends[lane] = start + length
        elif "device" in args:
            lane = f"GPU {args['device']} stream {args.get('stream', '?')}"
        start_ns = shift_ns + round(start * 1e3)
        rows.append(
            (
                _KINDS.get(event["cat"], "cpu op"), event["name"], own.role if own else Path(path).stem, own.pid if own else 0, lane,
                start_ns, start_ns + round(length * 1e3), args.get("bytes"), None, None, {},
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _log_of(path: Path, events: Sequence[dict], logs: Sequence[ProcessLog]) -> ProcessLog | None:
    """The process that was profiled: by pid, else by the role in the file's name (``kineto-prefill-….json``)."""
    pids = {event.get("pid") for event in events}
    role = path.stem.split("-")[1] if "-" in path.stem else ""
    by_pid = next((log for log in logs if log.pid in pids), None)
    return by_pid or next((log for log in logs if log.is_engine and log.kind == role and log.rank == 0), None)
