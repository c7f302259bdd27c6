"""One timeline of a run: what router, prefill, decode and client wrote, joined by request id on one clock.

    run = load("runs/trace", client=records)
    run.requests, run.breakdown, run.layers, run.checks()

All times are seconds since the run's first request; all frames are tidy (docs/tracing.md lists their columns). The log is enough; rows of
the GPU come on top when Nsight Systems or Kineto recorded some (``with_device_rows``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ksana_lab.metrics.export import load_records
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.tracing.clock import Alignment, align
from ksana_lab.tracing.events import ProcessLog, read_logs
from ksana_lab.tracing.transfers import join_transfers, layer_frame, request_transfers

CLIENT_FILE = "client.jsonl"
DEVICE_COLUMNS = ("kind", "name", "process", "pid", "lane", "start_s", "end_s", "bytes", "request", "layer", "details")
WARM_UP = "-warmup-"

# Phases in the order in which a request passes them, with the event that ends each: (process, event). One that an event is missing for is
# part of the next. Up to the first token there are two ways: the prefill node answers (ours), or the decode node (KsanaLLM's router).
_TO_NODE = [
    ("client → router", "router", "ARRIVED"),
    ("routing", "router", "ROUTED"),
    ("router → node", "first.api", "ARRIVED"),
    ("tokenising", "first.api", "QUEUED"),  # handed to the engine, which looks when the step that it is in is over
    ("queueing", "first.engine", "PREFILL_START"),
    ("prefill", "first.engine", "PREFILL_END"),
]
_ARRIVAL_OF_KV = [("rest of transfer", "transfer", "END"), ("noticing KV", "decode.engine", "TRANSFER_END")]
_TO_CLIENT = [
    ("detokenising", "answering.api", "FIRST_TOKEN"),
    ("node → router", "router", "FIRST_TOKEN"),
    ("router → client", "client", "FIRST_TOKEN"),
]
_REST = [("decode queue", "decode.engine", "DECODE_START"), ("decode", "decode.engine", "FINISHED"), ("delivery", "client", "LAST_TOKEN")]
PHASES = tuple(name for name, _, _ in _TO_NODE + _ARRIVAL_OF_KV + _TO_CLIENT + _REST)


@dataclass
class Timeline:
    """A run. Frames hold one row per …, times in seconds since the first request."""

    requests: pd.DataFrame  # request
    breakdown: pd.DataFrame  # request and phase; the phases of a request add up to its latency as the client saw it
    chunks: pd.DataFrame  # request and engine step that ran some of it: prefill chunks, decode steps
    computes: pd.DataFrame  # step, rank and layer: when it was computed
    transfers: pd.DataFrame  # piece sent: when it was ready, sent, arrived; hidden and exposed part
    layers: pd.DataFrame  # request, rank, peer and layer: compute, wire, hidden, exposed
    steps: pd.DataFrame  # engine step
    counters: pd.DataFrame  # sample of a counter
    processes: pd.DataFrame  # process: what it wrote, how its clock stands
    events: pd.DataFrame  # everything else that was recorded, as it is
    device: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(DEVICE_COLUMNS)))  # kernel, copy or range of a profiler
    origin_ns: int = 0  # second 0, on the reference's monotonic clock
    alignment: Alignment | None = None

    def checks(self) -> pd.DataFrame:
        """What must hold of a recording, each with its number: name, ok, value, limit, meaning."""
        from ksana_lab.tracing.checks import check

        return check(self)

    @property
    def measured(self) -> pd.DataFrame:
        """``requests`` without warm-up and without those that failed."""
        return self.requests[self.requests["is_measured"] & self.requests["is_ok"]]

    def with_device_rows(self, rows: pd.DataFrame) -> Timeline:
        """The same with rows of a profiler (``nsys.read``, ``kineto.read``) added. Their times are ns on the reference's clock."""
        rows = rows.assign(start_s=(rows["start_ns"] - self.origin_ns) / 1e9, end_s=(rows["end_ns"] - self.origin_ns) / 1e9)
        both = [frame for frame in (self.device, rows[list(DEVICE_COLUMNS)]) if len(frame)]
        merged = pd.concat(both, ignore_index=True).sort_values("start_s", ignore_index=True) if both else self.device
        return Timeline(**{**vars(self), "device": merged})


def load(folder: str | Path | Sequence[str | Path], *, client: Iterable[RequestRecord] | None = None, profilers: bool = True) -> Timeline:
    """Join everything in a trace folder, or in several (one per host). ``client``: the load generator's records; by default those of
    ``client.jsonl`` there. ``profilers``: also read Nsight Systems' *.sqlite and Kineto's kineto-*.json. Raises ConfigError."""
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(f) for f in folder]
    if client is None:
        client = [record for path in folders if (path / CLIENT_FILE).is_file() for record in load_records(path / CLIENT_FILE)]
    logs = read_logs(folders)
    run = join(logs, list(client))
    if profilers:
        from ksana_lab.tracing import kineto, nsys

        for rows in (nsys.read_folder(folders, logs, run.alignment), kineto.read_folder(folders, logs, run.alignment)):
            if len(rows):
                run = run.with_device_rows(rows)
    return run


def join(logs: Sequence[ProcessLog], client: Sequence[RequestRecord] = ()) -> Timeline:
    """The timeline of logs that were read already."""
    alignment = align(logs)
    origin_ns = _origin(logs, alignment, client)
    seen = _Marks(logs, alignment, origin_ns)
    seen.add_client(client)
    steps, chunks = _steps(seen)
    computes = _computes(seen)
    transfers = join_transfers(logs, seen.seconds, seen.request_of_transfer)
    transfers["clock_error_s"] = [
        alignment.error_ns(a, b) / 1e9 if isinstance(b, str) else 0.0
        for a, b in zip(transfers["src_domain"], transfers["dst_domain"], strict=True)
    ]
    seen.add_transfers(transfers)
    seen.add_chunks(chunks)
    requests, breakdown = _requests(seen, client)
    requests = _with_transfers(requests, transfers)
    return Timeline(
        requests=requests,
        breakdown=breakdown,
        chunks=chunks,
        computes=computes,
        transfers=transfers,
        layers=layer_frame(transfers, chunks, computes),
        steps=steps,
        counters=_counters(seen),
        processes=_processes(seen),
        events=_others(seen),
        origin_ns=origin_ns,
        alignment=alignment,
    )


def request_frame(logs: Sequence[ProcessLog], client: Sequence[RequestRecord]) -> tuple[pd.DataFrame, float]:
    """``Timeline.requests`` but for what needs the engines' steps, and the second on the client's clock from which its times count."""
    alignment = align(logs)
    origin_ns = _origin(logs, alignment, client)
    seen = _Marks(logs, alignment, origin_ns)
    seen.add_client(client)
    transfers = join_transfers(logs, seen.seconds, seen.request_of_transfer)
    seen.add_transfers(transfers)
    requests, _ = _requests(seen, client)
    return _with_transfers(requests, transfers), origin_ns / 1e9


def _origin(logs: Sequence[ProcessLog], alignment: Alignment, client: Sequence[RequestRecord]) -> int:
    times = [alignment.to_reference(log.clock_domain, e["ts"]) for log in logs for e in log.events if e.get("cat") == "request"]
    times += [round(r.sent_s * 1e9) for r in client if r.sent_s is not None]
    if not times:
        times = [alignment.to_reference(log.clock_domain, e["ts"]) for log in logs for e in log.events]
    return min(times, default=0)


class _Marks:
    """When what happened to each request: (request, process kind, event) -> seconds. Names of processes are settled here."""

    def __init__(self, logs: Sequence[ProcessLog], alignment: Alignment, origin_ns: int) -> None:
        self.logs, self.alignment, self.origin_ns = logs, alignment, origin_ns
        self.at: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
        self.info: dict[str, dict[str, Any]] = defaultdict(dict)
        self.request_of_seq: dict[tuple[int, int], str] = {}  # (log's index, seq_id)
        self._request_of_key: dict[tuple[str, int], str] = {}  # (pair or log's path, comm request id)
        for number, log in enumerate(logs):
            for event in log.events:
                if event.get("cat") == "request":
                    self._add(number, log, event)
        self.node_of = self._name_nodes()

    def seconds(self, log: ProcessLog, ts_ns: int) -> float:
        return (self.alignment.to_reference(log.clock_domain, ts_ns) - self.origin_ns) / 1e9

    def request_of_transfer(self, log: ProcessLog, args: dict[str, Any]) -> tuple[str, int]:
        """(request id, index of n) of a ``send`` or ``recv``."""
        number, _, index = str(args["request"]).partition(".")
        comm = int(number)
        known = self._request_of_key.get((args.get("pair", ""), comm)) or self._request_of_key.get((str(log.path), comm))
        return known or f"{args.get('pair', '?')}#{comm}", int(index or 0)

    def _add(self, number: int, log: ProcessLog, event: dict[str, Any]) -> None:
        args, name = event["args"], event["name"]
        request = args.get("request_id")
        if request is None:
            return
        process = "router" if log.kind == "router" else f"{log.kind}.{'engine' if log.is_engine else 'api'}"
        at, key, second = self.at[request], (process, name), self.seconds(log, event["ts"])
        if "ttft_us" in args and (process, "ARRIVED") in at:  # written late
            second = at[process, "ARRIVED"] + args["ttft_us"] / 1e6
        is_end = name in ("FINISHED", "PREFILL_END", "TRANSFER_END")
        if key not in at or (second > at[key] if is_end else second < at[key]):  # of n samples: the first to start, the last to end
            at[key] = second
        info = self.info[request]
        if "seq_id" in args:
            self.request_of_seq[number, args["seq_id"]] = request
        if args.get("comm_request_id") is not None:
            self._request_of_key[str(log.path), args["comm_request_id"]] = request
            if args.get("comm_key"):
                self._request_of_key[args["comm_key"], args["comm_request_id"]] = request
        info.setdefault("processes", {}).setdefault(process, number)
        for field_ in ("num_prompt_tokens", "num_output_tokens"):
            if args.get(field_) is not None:
                info[field_] = max(info.get(field_, 0), args[field_])
        if name == "ROUTED":
            info["prefill"], info["decode"] = args.get("prefill"), args.get("decode")
        elif name == "PREEMPTED":
            info["num_preemptions"] = info.get("num_preemptions", 0) + 1
        elif name in ("FAILED", "ABORTED"):
            info["error"] = ": ".join(str(args[key]) for key in ("error", "message") if args.get(key)) or name.lower()

    def _name_nodes(self) -> dict[int, str]:
        """A log's index -> which node it is of: the address that the router sent its requests to, else its role and number."""
        names: dict[int, str] = {}
        for info in self.info.values():
            for process, number in info.get("processes", {}).items():
                leg = process.partition(".")[0]
                address = info.get("prefill") if leg == "prefill" else info.get("decode") if leg in ("decode", "mixed") else None
                if address and number not in names:
                    names[number] = address
        names.update({number: names[engine] for number, engine in self._engines_of_ranks(names).items()})
        legs: dict[str, dict[str, int]] = defaultdict(dict)
        for number, log in enumerate(self.logs):
            if number in names:
                legs[log.kind].setdefault(names[number], len(legs[log.kind]))
        named = {}
        for number, log in enumerate(self.logs):
            order = legs[log.kind].get(names.get(number, ""), 0)
            named[number] = log.kind if log.kind in ("router", "llm") else f"{log.kind}{order}"
        return named

    def _engines_of_ranks(self, names: Iterable[int]) -> dict[int, int]:
        """Logs of engine processes that write nothing of requests -> the log among ``names`` whose steps their layers lie in."""
        ranks = [number for number, log in enumerate(self.logs) if log.is_engine and number not in names]
        engines = [number for number in names if self.logs[number].is_engine] if ranks else []
        steps = {number: self._spans_of_steps(self.logs[number], "step") for number in engines}
        found = {}
        for number in ranks:
            layers = self._spans_of_steps(self.logs[number], "layers")
            shared = {
                engine: sum(step in own and own[step][0] <= start <= own[step][1] for step, (start, _) in layers.items())
                for engine, own in steps.items()
                if self.logs[engine].kind == self.logs[number].kind
            }
            if any(shared.values()):
                found[number] = max(shared, key=lambda engine: shared[engine])
        return found

    def _spans_of_steps(self, log: ProcessLog, name: str) -> dict[int, tuple[float, float]]:
        return {e["args"]["step"]: (s := self.seconds(log, e["ts"]), s + e["dur"] / 1e9) for e in log.named(name, "step")}

    def add_client(self, records: Sequence[RequestRecord]) -> None:
        """Their clock is taken to be the router's: the load generator runs beside it."""
        for record in records:
            at = self.at[record.request_id]
            times = [("SENT", record.sent_s), ("FINISHED", record.finished_s)]
            if record.token_times_s:
                times += [("FIRST_TOKEN", record.token_times_s[0]), ("LAST_TOKEN", record.token_times_s[-1])]
            at.update({("client", name): t - self.origin_ns / 1e9 for name, t in times if t is not None})
            if record.token_times_s and record.sent_s is not None:
                at["client", "SENT"] = record.sent_s - self.origin_ns / 1e9
            self.info[record.request_id]["num_prompt_tokens"] = record.num_prompt_tokens

    def add_transfers(self, transfers: pd.DataFrame) -> None:
        """Where D says when it had a piece, that counts: it goes on then, and P may hear of it after the answer's end."""
        ends = transfers["recv_end_s"].fillna(transfers["end_s"]).groupby(transfers["request_id"]).max()
        for request, end in ends.items():
            self.at[str(request)]["transfer", "END"] = float(end)

    def add_chunks(self, chunks: pd.DataFrame) -> None:
        """The first decode step of each request, where it decodes."""
        decodes = chunks[chunks["kind"] == "decode"] if len(chunks) else chunks
        for request, start in decodes.groupby("request_id")["start_s"].min().items() if len(decodes) else ():
            at = self.at[str(request)]
            leg = (
                "mixed.engine" if ("mixed.engine", "QUEUED") in at else "llm.engine" if ("llm.engine", "QUEUED") in at else "decode.engine"
            )
            at[leg, "DECODE_START"] = float(start)


def _steps(seen: _Marks) -> tuple[pd.DataFrame, pd.DataFrame]:
    steps, chunks = [], []
    for number, log in enumerate(seen.logs):
        for event in log.named("step", "step"):
            args, start = event["args"], seen.seconds(log, event["ts"])
            end = start + event["dur"] / 1e9
            common = {
                "node": seen.node_of[number],
                "role": log.kind,
                "pid": log.pid,
                "step": args.get("step", -1),
                "start_s": start,
                "end_s": end,
            }
            steps.append({**common, **{name: args[name] for name in ("num_tokens", "num_seqs", "num_decodes")}})
            for seq_id, first, num in args.get("seqs", ()):
                request = seen.request_of_seq.get((number, seq_id), f"seq {seq_id}")
                ended = seen.at[request].get((f"{log.kind}.engine", "PREFILL_END")) if log.kind != "decode" else None
                is_prefill = (ended is None or end <= ended + 1e-6) if log.kind != "decode" else num > 1
                kind = "prefill" if is_prefill else "decode"
                chunks.append({"request_id": request, "seq_id": seq_id, **common, "kind": kind, "first_token": first, "num_tokens": num})
    step_columns = ["node", "role", "pid", "step", "start_s", "end_s", "num_tokens", "num_seqs", "num_decodes"]
    chunk_columns = [
        "request_id",
        "seq_id",
        "node",
        "role",
        "pid",
        "step",
        "start_s",
        "end_s",
        "kind",
        "first_token",
        "num_tokens",
        "chunk",
    ]
    chunk_frame = pd.DataFrame(chunks, columns=chunk_columns)
    if len(chunk_frame):
        chunk_frame = chunk_frame.sort_values(["start_s", "seq_id"], ignore_index=True)
        chunk_frame["chunk"] = chunk_frame.groupby(["request_id", "pid", "seq_id", "kind"]).cumcount()
    return pd.DataFrame(steps, columns=step_columns), chunk_frame


def _computes(seen: _Marks) -> pd.DataFrame:
    rows = []
    for number, log in enumerate(seen.logs):
        for event in log.named("layers", "step"):
            args, start = event["args"], seen.seconds(log, event["ts"])
            before = 0
            for layer, end in enumerate(args["ends_ns"]):
                rows.append(
                    (seen.node_of[number], log.kind, log.pid, args["rank"], args["step"], layer, start + before / 1e9, start + end / 1e9)
                )
                before = end
    return pd.DataFrame(rows, columns=["node", "role", "pid", "rank", "step", "layer", "start_s", "end_s"])


def _requests(seen: _Marks, client: Sequence[RequestRecord]) -> tuple[pd.DataFrame, pd.DataFrame]:
    records = {record.request_id: record for record in client}
    rows, phases = [], []
    for request, at in seen.at.items():
        info = seen.info[request]
        legs = _legs(at)
        segments, disorder = _phases(at, legs)
        record = records.get(request)
        error = record.error if record is not None else info.get("error")
        rows.append(
            {
                "request_id": request,
                "route": "+".join(dict.fromkeys(leg for leg in (legs["first"], legs["decode"]) if leg)),
                "prefill_node": seen.node_of.get(info.get("processes", {}).get(f"{legs['first']}.engine", -1)),
                "decode_node": seen.node_of.get(info.get("processes", {}).get(f"{legs['decode']}.engine", -1)),
                "num_prompt_tokens": info.get("num_prompt_tokens"),
                "num_output_tokens": record.num_output_tokens if record is not None else info.get("num_output_tokens"),
                "is_measured": request in records if records else WARM_UP not in request,
                "is_ok": error is None and bool(segments),
                "error": error,
                "num_preemptions": info.get("num_preemptions", 0),
                **_times(at, legs),
                "disorder_s": disorder,
            }
        )
        phases += [(request, name, start, end, end - start, is_ttft) for name, start, end, is_ttft in segments]
    frame = pd.DataFrame(rows)
    if len(frame):
        frame = frame.sort_values("sent_s", ignore_index=True)
    return frame, pd.DataFrame(phases, columns=["request_id", "phase", "start_s", "end_s", "seconds", "is_ttft"])


def _legs(at: dict[tuple[str, str], float]) -> dict[str, str]:
    """Which node computes the prompt, which decodes, and whose token the client saw first."""
    has = {process.partition(".")[0] for process, _ in at}
    first = next((leg for leg in ("prefill", "mixed", "llm", "decode") if leg in has), "")
    decode = "decode" if "decode" in has else first
    answering = first
    router = at.get(("router", "FIRST_TOKEN"))
    if first == "prefill" and decode == "decode" and router is not None:
        p = at.get(("prefill.api", "FIRST_TOKEN"))
        if p is None or router < p:
            answering = "decode"
    return {"first": first, "decode": decode, "answering": answering}


def _phases(at: dict[tuple[str, str], float], legs: dict[str, str]) -> tuple[list[tuple[str, float, float, bool]], float]:
    """Consecutive (phase, start, end, whether it is part of TTFT) from sending to the last token, and the seconds by which marks had to be
    moved to be in order: 0 when the log is consistent."""
    is_handed_over = legs["first"] != legs["decode"]
    arrival = _ARRIVAL_OF_KV if is_handed_over else []
    via_decode = legs["answering"] == "decode" and is_handed_over
    before = _TO_NODE + (arrival if via_decode else []) + _TO_CLIENT
    after = ([] if via_decode else arrival) + _REST
    api, engine = f"{legs['first']}.api", f"{legs['first']}.engine"  # without client and router: as far as there are logs
    handed = _handed(at, legs)
    start = next((at[key] for key in (("client", "SENT"), ("router", "ARRIVED"), (api, "ARRIVED"), (engine, "QUEUED")) if key in at), None)
    end = next(
        (at[k] for k in (("client", "LAST_TOKEN"), ("router", "FINISHED"), (f"{legs['decode']}.engine", "FINISHED")) if k in at), None
    )
    if start is None or end is None or not legs["first"]:
        return [], 0.0
    if handed is not None and handed > start:
        at = {**at, (api, "QUEUED"): handed}
    tokens = [(process, "FIRST_TOKEN") for process in ("client", "router", api, engine)]
    first_token = next((at[key] for key in tokens if key in at), end)
    segments, now, disorder = [], start, 0.0
    if first_token >= end:  # an answer of one token: nobody waits for what follows it
        after = []
    for part, limit, is_ttft in ((before, max(start, min(first_token, end)), True), (after, end, False)):
        for name, process, event in part:
            mark = at.get((_process(process, legs), event))
            if mark is None:
                continue
            kept = min(max(mark, now), limit)
            # What the first token does not wait for may lie before it; the router looks at its clock when its bytes have gone already.
            if (is_ttft or mark > limit) and (process, event) != ("router", "FIRST_TOKEN"):
                disorder += abs(mark - kept)
            segments.append((name, now, kept, is_ttft))
            now = kept
    if now < end:
        segments.append(("delivery", now, end, False))
    return segments, disorder


def _process(name: str, legs: dict[str, str]) -> str:
    leg, dot, part = name.partition(".")
    return f"{legs.get(leg, leg)}{dot}{part}" if dot else name


def _handed(at: dict[tuple[str, str], float], legs: dict[str, str]) -> float | None:
    """When the API process handed the request to the engine; where no log of it is at hand, when the engine took it up."""
    return at.get((f"{legs['first']}.api", "QUEUED"), at.get((f"{legs['first']}.engine", "QUEUED")))


def _times(at: dict[tuple[str, str], float], legs: dict[str, str]) -> dict[str, float | None]:
    first, decode = f"{legs['first']}.engine", f"{legs['decode']}.engine"
    get = at.get
    sent = get(("client", "SENT"), get(("router", "ARRIVED"), get((f"{legs['first']}.api", "ARRIVED"), get((first, "QUEUED")))))
    token = get(
        ("client", "FIRST_TOKEN"), get(("router", "FIRST_TOKEN"), get((f"{legs['first']}.api", "FIRST_TOKEN"), get((first, "FIRST_TOKEN"))))
    )
    last = get(("client", "LAST_TOKEN"), get(("router", "FINISHED"), get((decode, "FINISHED"))))
    return {
        "sent_s": sent,
        "first_token_s": token,
        "last_token_s": last,
        "ttft_s": _less(token, sent),
        "e2e_s": _less(last, sent),
        "handed_s": _handed(at, legs),
        "queued_s": get((first, "QUEUED")),
        "queueing_s": _less(get((first, "PREFILL_START")), _handed(at, legs)),
        "prefill_start_s": get((first, "PREFILL_START")),
        "prefill_end_s": get((first, "PREFILL_END")),
        "prefill_s": _less(get((first, "PREFILL_END")), get((first, "PREFILL_START"))),
        "decode_queued_s": get((decode, "QUEUED")),
        "announced_s": get(("decode.engine", "TRANSFER_START")),
        "kv_noticed_s": get(("decode.engine", "TRANSFER_END")),
        "decode_start_s": get((decode, "DECODE_START")),
        "decode_end_s": get((decode, "FINISHED")),
    }


def _with_transfers(requests: pd.DataFrame, transfers: pd.DataFrame) -> pd.DataFrame:
    """``requests`` and what was sent of each."""
    if not len(requests):
        return requests
    joined = requests.join(request_transfers(transfers), on="request_id")
    joined["exposed_transfer_s"] = (joined["transfer_end_s"] - joined["prefill_end_s"]).clip(lower=0.0)
    return joined


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _counters(seen: _Marks) -> pd.DataFrame:
    rows = [
        (seen.node_of[number], event["name"], key, seen.seconds(log, event["ts"]), value)
        for number, log in enumerate(seen.logs)
        for event in log.events
        if event["ph"] == "C"
        for key, value in event["args"].items()
    ]
    return pd.DataFrame(rows, columns=["node", "counter", "key", "at_s", "value"])


def _processes(seen: _Marks) -> pd.DataFrame:
    rows = []
    for number, log in enumerate(seen.logs):
        offset = seen.alignment.offsets[log.clock_domain]
        rows.append(
            {
                "process": log.role, "node": seen.node_of[number], "pid": log.pid, "host": log.host,
                "written": log.written, "read": len(log.events), "dropped": log.dropped, "malformed": log.num_malformed,
                "is_complete": log.is_complete, "clock_offset_us": offset.offset_ns / 1e3, "clock_error_us": offset.error_ns / 1e3,
                "clock_source": offset.source,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _others(seen: _Marks) -> pd.DataFrame:
    """Instants that are no phase of a request: pairs, links, sessions, news of transfers."""
    rows = [
        (seen.node_of[number], log.role, event["name"], event["cat"], seen.seconds(log, event["ts"]), event["args"])
        for number, log in enumerate(seen.logs)
        for event in log.events
        if event["ph"] == "i" and event["cat"] != "request"
    ]
    return pd.DataFrame(rows, columns=["node", "process", "name", "cat", "at_s", "args"])
