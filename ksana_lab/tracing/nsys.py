"""Reads what Nsight Systems exported as SQLite, and brings it to the clock of the event logs. Starting nsys is tracing/nsight.py's job.

Columns read, as nsys 2022.4 to 2025.3 write them: NVTX_EVENTS(start, end, eventType, text|textId, domainId, globalTid, int64Value …) with
59 = push/pop range, 60 = start/end range, 34 = mark, 75 = domain created; CUPTI_ACTIVITY_KIND_KERNEL, _GRAPH_TRACE, _MEMCPY and _RUNTIME,
joined by correlationId within a process; TARGET_INFO_SESSION_START_TIME(utcEpochNs). Times are ns since the session's start. A globalTid is
hardware << 48 | pid << 24 | tid. Tables and columns that a report lacks are taken as empty."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksana_lab.tracing.clock import Alignment
from ksana_lab.tracing.events import ProcessLog, beside
from ksana_lab.tracing.nsight import lacking
from ksana_lab.tracing.nvtx import DOMAIN

log = logging.getLogger(__name__)

COLUMNS = ["kind", "name", "process", "pid", "lane", "start_ns", "end_ns", "bytes", "request", "layer", "details"]
_PUSH_POP, _START_END, _MARK, _DOMAIN_CREATED = 59, 60, 34, 75
_COPY_KINDS = {1: "host to device", 2: "device to host", 8: "device to device", 10: "peer to peer"}


@dataclass(frozen=True)
class Report:
    """One report. ``offset_ns``: add it to a time of the report to get monotonic time of its host; ``anchor`` says how it is known."""

    nvtx: pd.DataFrame  # start, end, kind (range, span, mark), name, args, pid, tid
    kernels: pd.DataFrame  # start, end, name, pid, tid of the launch, device, stream, correlation
    copies: pd.DataFrame  # start, end, name, bytes, source, destination, pid, device, stream, correlation
    runtime: pd.DataFrame  # start, end, tid, pid, correlation
    offset_ns: int | None
    anchor: str  # clock mark, wall clock, none


def read_folder(folders: Sequence[Path], logs: Sequence[ProcessLog], alignment: Alignment | None) -> pd.DataFrame:
    """Rows of every report (``*.sqlite``) beside the logs, in reference time; what cannot be read is said and left out."""
    frames = []
    for path in sorted(file for folder in folders for file in folder.glob("*.sqlite")):
        try:
            lack, report = lacking(path), read(path)
        except sqlite3.DatabaseError as error:
            log.warning("%s is no report of Nsight Systems: %s", path, error)
            continue
        if lack:
            log.warning("%s %s", path, lack)
        frames.append(rows(report, beside(path, logs), alignment, path.stem))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def read(path: str | Path) -> Report:
    """Raises sqlite3.DatabaseError for a file that is no SQLite database."""
    with closing(sqlite3.connect(f"file:{Path(path)}?mode=ro", uri=True)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        nvtx = _nvtx(db, tables)
        marks = nvtx[(nvtx["kind"] == "mark") & (nvtx["name"] == "clock")]
        utc = db.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone() if _SESSION in tables else None
        if len(marks):  # the mark is made after its clock was read: the least delayed one tells best
            offset, anchor = int((marks["payload"] - marks["start"]).max()), "clock mark"
        elif utc:
            offset, anchor = int(utc[0]), "wall clock"
        else:
            offset, anchor = None, "none"
        return Report(nvtx, _kernels(db, tables), _copies(db, tables), _runtime(db, tables), offset, anchor)


_SESSION = "TARGET_INFO_SESSION_START_TIME"


def rows(report: Report, logs: Sequence[ProcessLog], alignment: Alignment | None, source: str) -> pd.DataFrame:
    """``Timeline.with_device_rows``' rows: ranges of our domain, kernels, copies, and each layer's and step's time on the GPU."""
    parts = [_nvtx_rows(report.nvtx), _device_rows(report.kernels, "kernel"), _device_rows(report.copies, "copy"), project(report)]
    frame = pd.concat([part for part in parts if len(part)] or [pd.DataFrame(columns=COLUMNS)], ignore_index=True)
    if not len(frame):
        return frame.reindex(columns=COLUMNS)
    by_pid = {log.pid: log for log in logs}
    frame["process"] = [by_pid[pid].role if pid in by_pid else source for pid in frame["pid"]]
    shifts = {pid: _shift(report, pid, by_pid, logs, alignment) for pid in frame["pid"].unique()}
    shift = frame["pid"].map(shifts)
    frame["start_ns"], frame["end_ns"] = frame["start_ns"] + shift, frame["end_ns"] + shift
    return frame.reindex(columns=COLUMNS)


def _shift(report: Report, pid: int, by_pid: dict[int, ProcessLog], logs: Sequence[ProcessLog], alignment: Alignment | None) -> int:
    """From the report's time to the reference's."""
    own = by_pid.get(pid) or next((by_pid[p] for p in report.nvtx["pid"].unique() if p in by_pid), logs[0] if logs else None)
    offset = report.offset_ns or 0
    if own is None:
        return offset
    if report.anchor == "wall clock":
        offset -= own.unix_ns - own.monotonic_ns
    return offset if alignment is None else alignment.to_reference(own.clock_domain, offset)


def project(report: Report) -> pd.DataFrame:
    """For every push/pop range ``layer`` and ``step``: from the start of the first kernel that was launched in it to the end of the last.
    ``details`` holds the number of kernels and the ns in which they ran."""
    launched = (
        report.kernels.merge(report.runtime, on=["pid", "correlation"], suffixes=("", "_call")) if len(report.kernels) else report.kernels
    )
    found = []
    for name in ("layer", "step"):
        ranges = report.nvtx[(report.nvtx["kind"] == "range") & (report.nvtx["name"] == name)]
        for tid, own in ranges.groupby("tid") if len(launched) else ():
            calls = launched[launched["tid_call" if "tid_call" in launched else "tid"] == tid]
            found += _projected(own.sort_values("start"), calls, name)
    return pd.DataFrame(found, columns=[c for c in COLUMNS if c != "process"])


def _projected(ranges: pd.DataFrame, calls: pd.DataFrame, name: str) -> list[tuple[Any, ...]]:
    starts, ends = ranges["start"].to_numpy(), ranges["end"].to_numpy()
    at = np.searchsorted(starts, calls["start_call"].to_numpy(), side="right") - 1
    inside = (at >= 0) & (calls["start_call"].to_numpy() <= ends[np.maximum(at, 0)])
    rows_ = []
    for number, own in calls[inside].groupby(at[inside]):
        row = ranges.iloc[int(number)]
        details = {"kernels": len(own), "busy_ns": int((own["end"] - own["start"]).sum()), **row["args"]}
        layer = _int(row["args"].get("layer"))
        label = f"{name} {layer if name == 'layer' else row['args'].get('step', '')}"
        rows_.append(
            (
                "gpu " + name,
                label,
                row["pid"],
                f"GPU {own['device'].iloc[0]} {name}s",
                own["start"].min(),
                own["end"].max(),
                None,
                None,
                layer,
                details,
            )
        )
    return rows_


# ---- tables ----------------------------------------------------------------------------------------------------------


def _select(db: sqlite3.Connection, tables: set[str], table: str, wanted: Sequence[str]) -> pd.DataFrame:
    """The wanted columns; one that the report's version lacks is None throughout."""
    if table not in tables:
        return pd.DataFrame(columns=list(wanted))
    there = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    chosen = ", ".join(f'"{c}"' if c in there else f'NULL AS "{c}"' for c in wanted)
    return pd.DataFrame(db.execute(f"SELECT {chosen} FROM {table}").fetchall(), columns=list(wanted), dtype=object)


def _strings(db: sqlite3.Connection, tables: set[str]) -> dict[int, str]:
    return dict(db.execute("SELECT id, value FROM StringIds").fetchall()) if "StringIds" in tables else {}


def _nvtx(db: sqlite3.Connection, tables: set[str]) -> pd.DataFrame:
    """Of our domain in every process. A report that began after the domain was created may not tell its name: its clock marks do."""
    columns = ["start", "end", "eventType", "text", "textId", "domainId", "globalTid", "int64Value", "uint64Value"]
    frame = _select(db, tables, "NVTX_EVENTS", columns)
    strings = _strings(db, tables)
    pids = ((frame["globalTid"].astype("int64") if len(frame) else frame["globalTid"]) // (1 << 24)) % (1 << 24)
    texts = [
        text if text is not None else strings.get(_int(number) or -1, "")
        for text, number in zip(frame["text"], frame["textId"], strict=True)
    ]
    ours = {
        (pid, domain)
        for pid, domain, kind, text in zip(pids, frame["domainId"], frame["eventType"], texts, strict=True)
        if (kind == _DOMAIN_CREATED and text == DOMAIN) or (kind == _MARK and text.startswith("clock role="))
    }
    kinds = {_PUSH_POP: "range", _START_END: "span", _MARK: "mark"}
    rows_ = []
    for row, pid, text in zip(frame.itertuples(index=False), pids, texts, strict=True):
        if row.eventType in kinds and (pid, row.domainId) in ours:
            name, args = parse(text)
            payload = row.int64Value if row.int64Value is not None and row.int64Value == row.int64Value else row.uint64Value
            end = row.end if row.end is not None and row.end == row.end else row.start
            rows_.append(
                (int(row.start), int(end), kinds[row.eventType], name, args, int(pid), int(row.globalTid) % (1 << 24), _int(payload))
            )
    return pd.DataFrame(rows_, columns=["start", "end", "kind", "name", "args", "pid", "tid", "payload"])


def parse(message: str) -> tuple[str, dict[str, str]]:
    """``send request=12.0 layer=3`` -> ("send", {request: "12.0", layer: "3"}); names may hold spaces."""
    words = message.split(" ")
    cut = next((i for i, word in enumerate(words) if "=" in word), len(words))
    return " ".join(words[:cut]), dict(word.split("=", 1) for word in words[cut:] if "=" in word)


def _kernels(db: sqlite3.Connection, tables: set[str]) -> pd.DataFrame:
    """A replayed CUDA graph is one row, as nsys records it unless told otherwise."""
    columns = ["start", "end", "shortName", "demangledName", "globalPid", "deviceId", "streamId", "correlationId"]
    frame = _select(db, tables, "CUPTI_ACTIVITY_KIND_KERNEL", columns)
    strings = _strings(db, tables)
    frame["name"] = [
        strings.get(_int(s) or -1) or strings.get(_int(d) or -1, "kernel")
        for s, d in zip(frame["shortName"], frame["demangledName"], strict=True)
    ]
    graphs = _select(db, tables, "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", columns).assign(name="CUDA graph")
    return _on_device(pd.concat([part for part in (frame, graphs) if len(part)], ignore_index=True) if len(graphs) else frame)


def _copies(db: sqlite3.Connection, tables: set[str]) -> pd.DataFrame:
    columns = ["start", "end", "bytes", "copyKind", "srcDeviceId", "dstDeviceId", "globalPid", "deviceId", "streamId", "correlationId"]
    frame = _select(db, tables, "CUPTI_ACTIVITY_KIND_MEMCPY", columns)
    frame["name"] = [f"copy {_COPY_KINDS.get(_int(kind) or 0, 'other')}" for kind in frame["copyKind"]]
    return _on_device(frame)


def _on_device(frame: pd.DataFrame) -> pd.DataFrame:
    pids = [((_int(value) or 0) >> 24) & 0xFFFFFF for value in frame["globalPid"]]
    frame = frame.rename(columns={"deviceId": "device", "streamId": "stream", "correlationId": "correlation"})
    return _whole(frame.assign(pid=pids).drop(columns=["globalPid"]), "start", "end", "correlation", "device", "stream")


def _runtime(db: sqlite3.Connection, tables: set[str]) -> pd.DataFrame:
    frame = _select(db, tables, "CUPTI_ACTIVITY_KIND_RUNTIME", ["start", "end", "globalTid", "correlationId"])
    numbers = [_int(value) or 0 for value in frame["globalTid"]]
    frame = frame.assign(pid=[(n >> 24) & 0xFFFFFF for n in numbers], tid=[n & 0xFFFFFF for n in numbers])
    return _whole(frame.rename(columns={"correlationId": "correlation"}).drop(columns=["globalTid"]), "start", "end", "correlation")


def _whole(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """These columns as int64; -1 for what is missing."""
    return frame.assign(**{name: pd.Series([-1 if (v := _int(x)) is None else v for x in frame[name]], dtype="int64") for name in columns})


# ---- rows ------------------------------------------------------------------------------------------------------------


def _nvtx_rows(nvtx: pd.DataFrame) -> pd.DataFrame:
    own = nvtx[nvtx["name"] != "clock"]
    return pd.DataFrame(
        {
            "kind": "nvtx " + own["kind"],
            "name": own["name"],
            "pid": own["pid"],
            "lane": ["requests" if kind == "span" else f"thread {tid}" for kind, tid in zip(own["kind"], own["tid"], strict=True)],
            "start_ns": own["start"],
            "end_ns": own["end"],
            "bytes": [_int(args.get("bytes")) for args in own["args"]],
            "request": [args.get("request_id") or args.get("request") for args in own["args"]],
            "layer": [_int(args.get("layer")) for args in own["args"]],
            "details": own["args"],
        }
    )


def _device_rows(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    details = [
        {"stream": row.stream, **({"source": row.srcDeviceId, "destination": row.dstDeviceId} if kind == "copy" else {})}
        for row in frame.itertuples(index=False)
    ]
    return pd.DataFrame(
        {
            "kind": kind,
            "name": frame["name"],
            "pid": frame["pid"],
            "lane": [f"GPU {device} stream {stream}" for device, stream in zip(frame["device"], frame["stream"], strict=True)],
            "start_ns": frame["start"],
            "end_ns": frame["end"],
            "bytes": frame.get("bytes"),
            "request": None,
            "layer": None,
            "details": details,
        }
    )


def _int(value: Any) -> int | None:
    """None for what is missing, in SQLite's way or in pandas'."""
    if value is None or value != value or value == "":
        return None
    return int(value)
