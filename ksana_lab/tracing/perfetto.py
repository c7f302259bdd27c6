"""A Timeline as Chrome trace events, which Perfetto (ui.perfetto.dev), chrome://tracing and TensorBoard open.

One process per node, with tracks for steps, layers, sends and receives; one for the requests with a track each; arrows (flows) from every
send to its receive; counters for free blocks and for what is on each link. Times are µs. Format: "Trace Event Format", Google, 2016."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd

from ksana_lab.tracing.timeline import Timeline
from ksana_lab.tracing.transfers import link_names

_REQUESTS = "requests"


class _Trace:
    """Numbers processes and threads, and names them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[int, str], int] = {}

    def at(self, process: str, thread: str) -> dict[str, int]:
        pid = self._pids.get(process)
        if pid is None:
            pid = self._pids[process] = len(self._pids) + 1
            self._name("process_name", process, pid, 0)
            self.events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        tid = self._tids.get((pid, thread))
        if tid is None:
            tid = self._tids[pid, thread] = len(self._tids) + 1
            self._name("thread_name", thread, pid, tid)
            self.events.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}})
        return {"pid": pid, "tid": tid}

    def _name(self, kind: str, name: str, pid: int, tid: int) -> None:
        self.events.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})

    def span(self, where: dict[str, int], name: str, cat: str, start_s: float, end_s: float, **args: Any) -> None:
        self.events.append(
            {"ph": "X", "name": name, "cat": cat, "ts": _us(start_s), "dur": max(0.0, _us(end_s - start_s)), "args": args, **where}
        )


def to_chrome(run: Timeline) -> dict[str, Any]:
    """{"traceEvents": [...], "displayTimeUnit": "ms"}."""
    trace = _Trace()
    _add_requests(trace, run)
    for node in run.processes["node"].drop_duplicates():
        trace.at(str(node), "steps")
    _add_steps(trace, run)
    _add_transfers(trace, run)
    _add_counters(trace, run)
    _add_device(trace, run)
    for row in run.events.itertuples(index=False):
        where = trace.at(str(row.node), "news")
        trace.events.append({"ph": "i", "s": "t", "name": row.name, "cat": row.cat, "ts": _us(row.at_s), "args": row.args, **where})
    return {"traceEvents": trace.events, "displayTimeUnit": "ms"}


def write(run: Timeline, path: str | Path) -> Path:
    """Writes ``to_chrome(run)`` as JSON; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(to_chrome(run), option=orjson.OPT_SERIALIZE_NUMPY, default=str))
    return path


def _add_requests(trace: _Trace, run: Timeline) -> None:
    order = run.requests["request_id"].tolist() if len(run.requests) else []
    phases = dict(list(run.breakdown.groupby("request_id"))) if len(run.breakdown) else {}
    for request in order:
        for phase in phases[request].itertuples(index=False) if request in phases else ():
            if phase.seconds > 0:
                where = trace.at(_REQUESTS, request)
                trace.span(where, phase.phase, "phase", phase.start_s, phase.end_s, request=request, is_ttft=bool(phase.is_ttft))


def _add_steps(trace: _Trace, run: Timeline) -> None:
    key = ["node", "pid", "step"]
    who = run.chunks.groupby(key)["request_id"].agg(list).to_dict() if len(run.chunks) else {}
    for step in run.steps.itertuples(index=False):
        requests = who.get((step.node, step.pid, step.step), [])
        name = "prefill" if step.num_decodes == 0 else "decode" if step.num_decodes == step.num_tokens else "mixed"
        trace.span(
            trace.at(str(step.node), "steps"), f"{name} {step.num_tokens}", "step", step.start_s, step.end_s,
            step=step.step, num_tokens=step.num_tokens, num_decodes=step.num_decodes, requests=requests,
        )  # fmt: skip
    for row in run.computes.itertuples(index=False):
        where = trace.at(str(row.node), f"layers, rank {row.rank}")
        trace.span(where, f"layer {row.layer}", "layer", row.start_s, row.end_s, step=row.step)


def _add_transfers(trace: _Trace, run: Timeline) -> None:
    """Sends may overlap on a link: each takes the first free lane."""
    nodes = run.requests.set_index("request_id")[["prefill_node", "decode_node"]] if len(run.requests) else None
    sending, receiving = _Lanes(), _Lanes()
    for number, piece in enumerate(run.transfers.itertuples(index=False), start=1):
        known = nodes is not None and piece.request_id in nodes.index
        prefill, decode = nodes.loc[piece.request_id] if known and nodes is not None else ("prefill0", "decode0")
        last = piece.layer + piece.num_layers - 1
        name = f"layer {piece.layer}" if piece.num_layers == 1 else f"layers {piece.layer}–{last}"
        args = {
            "request": piece.request_id, "bytes": piece.bytes, "chunk": piece.chunk, "tokens": [piece.first_token, piece.end_token],
            "hidden_ms": 1e3 * piece.hidden_s, "exposed_ms": 1e3 * piece.exposed_s, "copies": piece.copies,
        }  # fmt: skip
        lane = sending.take((prefill, piece.src_rank, piece.dst_rank), piece.wire_start_s, piece.end_s)
        source = trace.at(str(prefill), f"send {piece.src_rank}→{piece.dst_rank}, lane {lane}")
        trace.span(source, name, "send", piece.wire_start_s, piece.end_s, **args)
        if piece.recv_end_s == piece.recv_end_s:
            start = min(piece.recv_start_s, piece.recv_end_s)
            lane = receiving.take((decode, piece.src_rank, piece.dst_rank), start, piece.recv_end_s)
            target = trace.at(str(decode), f"receive {piece.src_rank}→{piece.dst_rank}, lane {lane}")
            trace.span(target, name, "recv", start, piece.recv_end_s, **args)
            flow = {"name": "KV", "cat": "flow", "id": number}
            trace.events.append({"ph": "s", **flow, "ts": _us(piece.wire_start_s), **source})
            trace.events.append({"ph": "f", "bp": "e", **flow, "ts": _us(piece.recv_end_s), **target})


class _Lanes:
    def __init__(self) -> None:
        self._until: dict[Any, list[float]] = {}

    def take(self, key: Any, start: float, end: float) -> int:
        lanes = self._until.setdefault(key, [])
        for number, until in enumerate(lanes):
            if until <= start:
                lanes[number] = end
                return number
        lanes.append(end)
        return len(lanes) - 1


def _add_counters(trace: _Trace, run: Timeline) -> None:
    for (node, counter), rows in run.counters.groupby(["node", "counter"]) if len(run.counters) else ():
        where = trace.at(str(node), "steps")
        for at, values in rows.groupby("at_s"):
            args = dict(zip(values["key"], values["value"], strict=True))
            trace.events.append({"ph": "C", "name": counter, "ts": _us(float(at)), "args": args, **where})
    for link, use in link_use(run).groupby("link"):
        where = trace.at("links", str(link))
        for row in use.itertuples(index=False):
            args = {"GB/s": row.bytes_per_s / 1e9}
            trace.events.append({"ph": "C", "name": f"{link} GB/s", "ts": _us(row.at_s), "args": args, **where})


def link_use(run: Timeline) -> pd.DataFrame:
    """link, at_s, bytes_per_s from then on, in_flight pieces. Each piece's bytes are spread evenly over the time it was on the wire."""
    frames = []
    for link, pieces in run.transfers.groupby(link_names(run.transfers)):
        rate = pieces["bytes"] / pieces["wire_s"].clip(lower=1e-9)
        at = np.concatenate([pieces["wire_start_s"], pieces["end_s"]])
        change = np.concatenate([rate, -rate])
        count = np.concatenate([np.ones(len(pieces)), -np.ones(len(pieces))])
        order = np.argsort(at, kind="stable")
        total = np.maximum(0.0, np.cumsum(change[order]))
        in_flight = np.cumsum(count[order]).astype(int)
        total[in_flight == 0] = 0.0
        frames.append(pd.DataFrame({"link": link, "at_s": at[order], "bytes_per_s": total, "in_flight": in_flight}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["link", "at_s", "bytes_per_s", "in_flight"])


def _add_device(trace: _Trace, run: Timeline) -> None:
    for row in run.device.itertuples(index=False):
        where = trace.at(f"{row.process} ({row.kind.partition(' ')[0]})", str(row.lane))
        args = {k: v for k, v in (("request", row.request), ("layer", row.layer), ("bytes", row.bytes)) if v is not None and v == v}
        if row.kind == "nvtx span":  # may overlap on one track
            common = {"cat": "nvtx", "name": row.name, "id": len(trace.events), **where}
            trace.events.append({"ph": "b", "ts": _us(row.start_s), "args": args, **common})
            trace.events.append({"ph": "e", "ts": _us(row.end_s), **common})
        elif row.kind == "nvtx mark":
            trace.events.append({"ph": "i", "s": "t", "name": row.name, "cat": "nvtx", "ts": _us(row.start_s), "args": args, **where})
        else:
            trace.span(where, row.name, row.kind, row.start_s, row.end_s, **args)


def flows(trace: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """(start, end) of every arrow of a trace."""
    starts = {e["id"]: e for e in trace["traceEvents"] if e["ph"] == "s"}
    return [(starts[e["id"]], e) for e in trace["traceEvents"] if e["ph"] == "f"]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
