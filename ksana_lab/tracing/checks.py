"""What must hold of a recording, each with its number. A recording that fails one is not to be trusted in that respect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from ksana_lab.tracing.timeline import Timeline

LATENCY_SHARE = 0.02  # or LATENCY_S, whichever is larger: how far phases may be from the client's latency
LATENCY_S = 0.001
_ROUNDING_S = 1e-6


class Check(NamedTuple):
    name: str
    is_ok: bool
    value: float  # compare with ``limit``
    limit: float
    meaning: str


def check(run: Timeline) -> pd.DataFrame:
    """One row per check that this recording allows."""
    found = [*_logs(run), *_latency(run), *_hidden(run), *_coverage(run), *_order(run)]
    return pd.DataFrame(found, columns=Check._fields)


def _logs(run: Timeline) -> list[Check]:
    processes = run.processes
    unclosed = processes["written"].isna()
    missing = float((processes["written"].fillna(0) - processes["read"].where(~unclosed, 0)).abs().sum() + processes["malformed"].sum())
    dropped = float(processes["dropped"].fillna(0).sum())
    return [
        Check("written = read", missing == 0, missing, 0, "events that writers counted and the log does not hold"),
        Check("logs closed", not unclosed.any(), float(unclosed.sum()), 0, "processes that were killed: their last events may be lost"),
        Check("nothing dropped", dropped == 0, dropped, 0, "events that writers had no room for"),
    ]


def _latency(run: Timeline) -> list[Check]:
    rows = run.measured.set_index("request_id") if len(run.requests) else run.requests
    if not len(rows):
        return []
    phases = run.breakdown[run.breakdown["request_id"].isin(rows.index)]
    found = []
    for name, column, part in (("TTFT", "ttft_s", phases[phases["is_ttft"]]), ("latency", "e2e_s", phases)):
        total = part.groupby("request_id")["seconds"].sum()
        allowed = (rows[column] * LATENCY_SHARE).clip(lower=LATENCY_S)
        excess = ((total - rows[column]).abs() / allowed).max()
        found.append(
            Check(f"phases = {name}", bool(excess <= 1), float(excess), 1, "worst difference, in units of max(1 ms, 2% of the latency)")
        )
    allowed = (rows["e2e_s"] * LATENCY_SHARE).clip(lower=LATENCY_S)
    excess = (rows["disorder_s"] / allowed).max()
    meaning = "by how much marks of different processes contradict each other, in the same units"
    return [*found, Check("marks in order", bool(excess <= 1), float(excess), 1, meaning)]


def _hidden(run: Timeline) -> list[Check]:
    if not len(run.layers):
        return []
    error = float((run.layers["hidden_s"] + run.layers["exposed_s"] - run.layers["wire_s"]).abs().max())
    return [Check("hidden + exposed = wire", error <= _ROUNDING_S, error, _ROUNDING_S, "worst layer, seconds")]


def _coverage(run: Timeline) -> list[Check]:
    """Every token of every layer went over every link exactly once, and as layers × chunks × ranks say. Not of requests that failed or were
    cancelled, which stop on their way, and of preempted ones, of which some goes twice."""
    broken = run.requests[~run.requests["is_ok"] | (run.requests["num_preemptions"] > 0)] if len(run.requests) else run.requests
    transfers = run.transfers[~run.transfers["request_id"].isin(broken["request_id"])] if len(broken) else run.transfers
    if not len(transfers):
        return []
    num_layers = int((run.transfers["layer"] + run.transfers["num_layers"]).max())
    lengths = run.requests.set_index("request_id")["num_prompt_tokens"]
    wrong = sends = expected = 0
    for (request, _index, _src, _dst), pieces in transfers.groupby(["request_id", "index", "src_rank", "dst_rank"]):
        length = lengths.get(request)
        first = int(pieces["first_token"].min())  # what lies before it, D had in its prefix cache
        area = int(((pieces["end_token"] - pieces["first_token"]) * pieces["num_layers"]).sum())
        wrong += length is not None and area != (length - first) * num_layers
        found, owed = _cells(run, str(request), pieces, num_layers)
        sends, expected = sends + found, expected + owed
    return [
        Check("KV sent once", wrong == 0, float(wrong), 0, "request × rank pairs of which tokens × layers are missing or sent twice"),
        Check(
            "layer sends", sends == expected, float(sends), float(expected),
            "layers × chunks × ranks; a piece of several layers or chunks counts as so many",
        ),
    ]  # fmt: skip


def _cells(run: Timeline, request: str, pieces: pd.DataFrame, num_layers: int) -> tuple[int, int]:
    """(cells that pieces cover, cells there are) of layers × chunks on one link. A chunk that ends inside a block that the next one fills
    travels with it: it is no cell of its own."""
    prefills = run.chunks[(run.chunks["request_id"] == request) & (run.chunks["kind"] == "prefill") & (run.chunks["role"] == "prefill")]
    prefills = prefills.drop_duplicates("chunk", keep="last").sort_values("chunk")
    ends = (prefills["first_token"] + prefills["num_tokens"]).tolist()
    if not ends:
        return 0, 0
    cells: dict[tuple[int, int], int] = {}
    for piece in pieces.itertuples(index=False):
        last = next((k for k, end in enumerate(ends) if end >= piece.end_token), len(ends) - 1)
        for chunk in range(min(piece.chunk, last), last + 1):
            for layer in range(piece.layer, piece.layer + piece.num_layers):
                cells[chunk, layer] = cells.get((chunk, layer), 0) + 1
    chunks = {chunk for chunk, _ in cells}
    return sum(cells.values()), num_layers * len(chunks)


def _order(run: Timeline) -> list[Check]:
    transfers: Any = run.transfers
    if not len(transfers) or transfers["recv_end_s"].isna().all():
        return []
    early = (transfers["start_s"] - transfers["recv_end_s"] - transfers["clock_error_s"]).max()
    meaning = "seconds by which an arrival lies before its sending, beyond the clocks' error; negative = none does"
    return [Check("sent before received", bool(early <= 0), float(early), 0, meaning)]
