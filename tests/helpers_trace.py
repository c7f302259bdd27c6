"""Event logs of a run that never ran: one request after the other through router, prefill and decode, with numbers to choose."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ksana_lab.metrics.latency import PER_REQUEST
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.tracing.timeline import Timeline

MS = 1_000_000


@dataclass
class FakeRun:
    """Milliseconds. A layer of a request is computed for ``compute_ms``; its piece is on the wire for ``wire_ms``, one after the other."""

    num_requests: int = 3
    num_layers: int = 4
    compute_ms: float = 5.0
    wire_ms: float = 1.0
    ack_late_ms: float = 0.0  # the prefill node hears of a piece's arrival so much later
    looks_after_ms: float = 0.1  # when the request was handed to it: the prefill engine is in a step
    queueing_ms: float = 0.5  # from then on
    sampling_ms: float = 0.0  # from the end of the last layer to the end of its step
    announced_after_ms: float = 0.0  # after the request reached the decode node
    http_ms: float = 0.2  # each hop
    gap_ms: float = 100.0  # between requests
    mode: str = "layer"  # or bulk
    bytes: int = 1 << 20  # per layer
    copies: int = 4
    post_us: float = 10.0
    decode_wait_ms: float = 0.1
    decode_ms: float = 4.0
    num_decodes: int = 5
    free_blocks: int = 900
    num_ranks: int = 1  # of every node; rank r of one sends to rank r of the other, each over a link of its own
    num_prefills: int = 1  # nodes that take turns; the second's roles are keys of ``logs`` with a "#1" behind them
    domain_of_decode: str = "host-a"
    decode_clock_ahead_ms: float = 0.0
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    client: list[RequestRecord] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        turns = ["", *(f"#{n}" for n in range(1, self.num_prefills))]
        ranks = [f".tp{rank}" for rank in range(self.num_ranks)]
        roles = ["router", *(f"prefill{part}{turn}" for turn in turns for part in ("-api", *ranks)), "decode-api"]
        self.logs = {role: [] for role in (*roles, *(f"decode{rank}" for rank in ranks))}
        for number in range(self.num_requests):
            self._request(number, 1000.0 + number * self.gap_ms)
        folder.mkdir(parents=True, exist_ok=True)
        for pid, (key, events) in enumerate(self.logs.items(), start=100):
            role = key.partition("#")[0]
            domain = self.domain_of_decode if role.startswith("decode") else "host-a"
            clock = {"monotonic_ns": 0, "unix_ns": 0}
            args = {"role": role, "pid": pid, "host": domain, "clock_domain": domain, "clock": clock}
            end = {"ph": "M", "name": "end", "args": {"written": len(events), "dropped": 0}}
            lines = [{"ph": "M", "name": "process", "args": args}, *events, end]
            (folder / f"{role}-{pid}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    def _request(self, number: int, t: float) -> None:
        name, hop, node = f"r-{number}", self.http_ms, number % self.num_prefills
        turn, pair, step = f"#{node}" if node else "", f"p:{node + 1}__d:1", number // self.num_prefills
        ids = {"request_id": name, "comm_request_id": number}
        seq = {**ids, "seq_id": number}
        sent = t
        self._mark("router", t := t + hop, "ARRIVED", request_id=name)
        self._mark("router", t := t + 0.05, "ROUTED", comm_key=pair, prefill=f"p:{node + 1}", decode="d:1", **ids)
        at_decode = t + hop
        self._mark(f"prefill-api{turn}", t := t + hop, "ARRIVED", **ids)
        self._mark(f"prefill-api{turn}", t := t + 0.1, "QUEUED", num_prompt_tokens=64, **ids)
        self._mark(f"prefill.tp0{turn}", t := t + self.looks_after_ms, "QUEUED", **seq)
        announced = at_decode + 0.2 + self.announced_after_ms
        self._mark("decode-api", at_decode, "ARRIVED", **ids)
        self._mark("decode.tp0", at_decode + 0.2, "QUEUED", **seq)
        self._mark("decode.tp0", announced, "TRANSFER_START", **seq)
        self._mark(f"prefill.tp0{turn}", t := t + self.queueing_ms, "PREFILL_START", **seq)
        begin, end = t, t + self.num_layers * self.compute_ms + self.sampling_ms
        ends = [round((i + 1) * self.compute_ms * MS) for i in range(self.num_layers)]
        for rank in range(self.num_ranks):
            self._span(f"prefill.tp{rank}{turn}", begin, end - self.sampling_ms, "layers", "step", step=step, rank=rank, ends_ns=ends)
        span = {"step": step, "num_tokens": 64, "num_seqs": 1, "num_decodes": 0}
        self._span(f"prefill.tp0{turn}", begin, end, "step", "step", **span, seqs=[[number, 0, 64]])
        self._mark(f"prefill.tp0{turn}", end, "PREFILL_END", **seq)
        arrived = max(self._pieces(number, begin, announced, rank, pair, turn) for rank in range(self.num_ranks))
        self._mark(f"prefill-api{turn}", end + 0.1, "FIRST_TOKEN", **ids)
        first = end + 0.1 + 2 * hop
        self._mark("router", end + 0.1 + hop, "FIRST_TOKEN", ttft_us=round((end + 0.1 + hop - sent - hop) * 1000), request_id=name)
        t = max(arrived, end) + 0.1
        self._mark("decode.tp0", t, "TRANSFER_END", **seq)
        t += self.decode_wait_ms
        times = [first]
        for i in range(self.num_decodes):
            span = {"step": 1000 * number + i, "num_tokens": 1, "num_seqs": 1, "num_decodes": 1}
            self._span("decode.tp0", t, t + self.decode_ms, "step", "step", **span, seqs=[[number, 64 + i, 1]])
            t += self.decode_ms
            times.append(t + 2 * hop)
        self._mark("decode.tp0", t, "FINISHED", num_output_tokens=len(times), **seq)
        self._count("decode.tp0", t, free=self.free_blocks)
        self._mark("router", t + hop, "FINISHED", outcome="ok", error=None, request_id=name)
        seconds = [x / 1e3 for x in times]
        record = RequestRecord(name, 64, len(times), sent / 1e3, sent / 1e3, seconds, [1] * len(times), seconds[-1], "length")
        self.client.append(record)

    def _pieces(self, number: int, begin: float, announced: float, rank: int, pair: str, turn: str) -> float:
        """Sends and receives; returns when the last one was over."""
        num = self.num_layers
        groups = [(0, num)] if self.mode == "bulk" else [(i, 1) for i in range(num)]
        free = announced
        for layer, count in groups:
            ready = begin + (layer + count) * self.compute_ms
            start = max(ready, free)
            free = start + count * self.wire_ms
            args = {
                "request": f"{number}.0", "pair": pair, "layer": layer, "layers": count, "bytes": count * self.bytes, "chunk": 0,
                "ready_ns": round(ready * MS), "rank": rank, "copies": count * self.copies, "tokens": [0, 64], "post_us": self.post_us,
            }  # fmt: skip
            self._span(f"prefill.tp{rank}{turn}", start, free + self.ack_late_ms, "send", "transfer", peer=f"d:1.{rank}", **args)
            late = {**args, "ready_ns": round((ready + self.decode_clock_ahead_ms) * MS)}
            peer, begun = f"{pair.partition('__')[0]}.{rank}", start + 0.1 * count * self.wire_ms
            self._span(f"decode.tp{rank}", begun, free - 0.01, "recv", "transfer", peer=peer, **late)
        return free

    def _time(self, role: str, ms: float) -> int:
        return round((ms + (self.decode_clock_ahead_ms if role.startswith("decode") else 0.0)) * MS)

    def _mark(self, role: str, ms: float, name: str, **args: Any) -> None:
        self.logs[role].append({"ph": "i", "ts": self._time(role, ms), "name": name, "cat": "request", "args": args})

    def _span(self, role: str, start: float, end: float, name: str, cat: str, **args: Any) -> None:
        ts = self._time(role, start)
        self.logs[role].append({"ph": "X", "ts": ts, "dur": self._time(role, end) - ts, "name": name, "cat": cat, "args": args})

    def _count(self, role: str, ms: float, **values: float) -> None:
        self.logs[role].append({"ph": "C", "ts": self._time(role, ms), "name": "blocks", "cat": "step", "args": values})


def record_minus_timeline(records: list[RequestRecord], run: Timeline) -> pd.DataFrame:
    """Seconds, request × every name that both give a number; NaN where one of them does not. ``records`` have their phases."""
    requests = run.requests.set_index("request_id")
    names = [name for name in PER_REQUEST if name in requests]
    own = {record.request_id: {name: PER_REQUEST[name](record) for name in names} for record in records}
    felt = pd.DataFrame.from_dict(own, orient="index").astype(float)
    return felt - requests.loc[felt.index, names].astype(float)
