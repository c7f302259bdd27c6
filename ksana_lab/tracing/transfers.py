"""KV pieces, from P's ``send`` to D's ``recv``, and what of each was hidden behind computing.

A piece is a rectangle of tokens × layers. It can travel once the last of it is computed (``ready``), so it is on the wire from
max(send began, ready) until D has acknowledged it. What of that lies before the end of the prompt's last layer on the same rank is
*hidden*, the rest *exposed*; the two add up to the wire time by construction of the cut, per piece and per layer. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from ksana_lab.tracing.events import ProcessLog

PIECE_COLUMNS = [
    "request_id", "index", "pair", "peer", "src_rank", "dst_rank", "layer", "num_layers", "chunk", "first_token", "end_token", "bytes",
    "copies", "src_pid", "ready_s", "start_s", "end_s", "recv_start_s", "recv_end_s", "dst_pid", "post_s", "device_wire_s",
    "wire_start_s", "wire_s", "compute_end_s", "hidden_s", "exposed_s", "src_domain", "dst_domain",
]  # fmt: skip
_KEY = ["request_id", "index", "src_rank", "dst_rank", "layer", "first_token", "end_token"]

Seconds = Callable[[ProcessLog, int], float]
RequestOf = Callable[[ProcessLog, dict[str, Any]], tuple[str, int]]


def join_transfers(logs: Sequence[ProcessLog], seconds: Seconds, request_of: RequestOf) -> pd.DataFrame:
    """One row per piece sent; the receiver's columns are NaN where it wrote nothing of it. The last attempt of a piece counts."""
    sends = [_piece(log, event, seconds, request_of) for log in logs for event in log.named("send", "transfer")]
    recvs = [_piece(log, event, seconds, request_of) for log in logs for event in log.named("recv", "transfer")]
    if not sends:
        return pd.DataFrame(columns=PIECE_COLUMNS)
    frame = pd.DataFrame(sends).rename(columns={"own_rank": "src_rank", "peer_rank": "dst_rank", "pid": "src_pid", "domain": "src_domain"})
    frame = frame.drop_duplicates(_KEY, keep="last")
    if recvs:
        names = {"start_s": "recv_start_s", "end_s": "recv_end_s", "pid": "dst_pid", "domain": "dst_domain"}
        got = pd.DataFrame(recvs).rename(columns={"own_rank": "dst_rank", "peer_rank": "src_rank", **names})
        got = got.drop_duplicates(_KEY, keep="last")
        frame = frame.merge(got[[*_KEY, "recv_start_s", "recv_end_s", "dst_pid", "dst_domain"]], on=_KEY, how="left")
    frame = frame.reindex(columns=PIECE_COLUMNS)
    return _cut(frame.sort_values("start_s", ignore_index=True))


def _piece(log: ProcessLog, event: dict[str, Any], seconds: Seconds, request_of: RequestOf) -> dict[str, Any]:
    args, start = event["args"], seconds(log, event["ts"])
    request, index = request_of(log, args)
    peer, _, peer_rank = args["peer"].rpartition(".")
    first, end = args.get("tokens", (0, 0))
    return {
        "request_id": request, "index": index, "pair": args.get("pair", ""), "peer": peer, "own_rank": args["rank"],
        "peer_rank": int(peer_rank),
        "layer": args["layer"], "num_layers": args["layers"], "chunk": args["chunk"], "first_token": first, "end_token": end,
        "bytes": args["bytes"], "copies": args.get("copies", 0), "pid": log.pid, "domain": log.clock_domain,
        "ready_s": seconds(log, args["ready_ns"]) if args.get("ready_ns") else start,
        "start_s": start, "end_s": start + event["dur"] / 1e9,
        "post_s": (args.get("post_us") or 0.0) / 1e6, "device_wire_s": (args.get("wire_us") or 0.0) / 1e6,
    }  # fmt: skip


def _cut(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill in wire, hidden and exposed."""
    frame["wire_start_s"] = frame[["start_s", "ready_s"]].max(axis=1)
    frame["end_s"] = frame[["end_s", "wire_start_s"]].max(axis=1)
    frame["wire_s"] = frame["end_s"] - frame["wire_start_s"]
    frame["compute_end_s"] = frame.groupby(["request_id", "index", "src_rank"])["ready_s"].transform("max")
    frame["exposed_s"] = frame["end_s"] - frame[["wire_start_s", "compute_end_s"]].max(axis=1)
    frame["exposed_s"] = frame["exposed_s"].clip(lower=0.0)
    frame["hidden_s"] = (frame[["end_s", "compute_end_s"]].min(axis=1) - frame["wire_start_s"]).clip(lower=0.0)
    return frame


def link_names(transfers: pd.DataFrame) -> pd.Series:
    """Of each piece, the way it took: "<prefill node> → <decode node>, rank <its rank> → <the other's>"."""
    prefill = transfers["pair"].astype(str).str.split("__").str[0]
    ranks = transfers["src_rank"].astype(str) + " → " + transfers["dst_rank"].astype(str)
    return prefill + " → " + transfers["peer"].astype(str) + ", rank " + ranks


def request_transfers(transfers: pd.DataFrame) -> pd.DataFrame:
    """Per request, over all its ranks: bytes, pieces, first piece sent to last one arrived, and how long after the last layer that was.

    ``wire_s`` and its parts ``hidden_s`` and ``exposed_wire_s`` add up the links (a pair of ranks each); on one link pieces that wait for
    one another overlap, and what overlaps counts once, as in the counter of the same name."""
    columns = ["kv_bytes", "num_pieces", "num_copies", "transfer_start_s", "transfer_end_s", "compute_end_s", "transfer_s", "wire_s",
               "hidden_s", "exposed_wire_s", "after_last_layer_s"]  # fmt: skip
    if not len(transfers):
        return pd.DataFrame(columns=columns)
    links = ["request_id", "src_rank", "dst_rank"]
    ordered = transfers.sort_values("wire_start_s")
    ordered["seen_s"] = ordered.groupby(links)["end_s"].cummax()
    begin = pd.concat([ordered["wire_start_s"], ordered.groupby(links)["seen_s"].shift()], axis=1).max(axis=1)
    ordered["hidden_s"] = (ordered[["end_s", "compute_end_s"]].min(axis=1) - begin).clip(lower=0.0)
    ordered["exposed_s"] = (ordered["end_s"] - pd.concat([begin, ordered["compute_end_s"]], axis=1).max(axis=1)).clip(lower=0.0)
    groups = ordered.groupby("request_id")
    frame = pd.DataFrame(
        {
            "kv_bytes": groups["bytes"].sum(),
            "num_pieces": groups.size(),
            "num_copies": groups["copies"].sum(),
            "transfer_start_s": groups["wire_start_s"].min(),
            "transfer_end_s": groups["end_s"].max(),
            "compute_end_s": groups["compute_end_s"].max(),
            "hidden_s": groups["hidden_s"].sum(),
            "exposed_wire_s": groups["exposed_s"].sum(),
        }
    )
    frame["wire_s"] = frame["hidden_s"] + frame["exposed_wire_s"]
    frame["transfer_s"] = frame["transfer_end_s"] - frame["transfer_start_s"]
    frame["after_last_layer_s"] = (frame["transfer_end_s"] - frame["compute_end_s"]).clip(lower=0.0)
    return frame[columns]


def layer_frame(transfers: pd.DataFrame, chunks: pd.DataFrame, computes: pd.DataFrame) -> pd.DataFrame:
    """Per request, sample, ranks, piece and layer. A piece of several layers is divided evenly among them: they are equally large."""
    columns = ["request_id", "index", "src_rank", "dst_rank", "chunk", "layer", "bytes", "ready_s", "wire_start_s", "end_s", "wire_s",
               "hidden_s", "exposed_s", "compute_start_s", "compute_end_s", "compute_s"]  # fmt: skip
    rows = []
    for piece in transfers.itertuples(index=False):
        n = piece.num_layers
        for layer in range(piece.layer, piece.layer + n):
            rows.append(
                (piece.request_id, piece.index, piece.src_rank, piece.dst_rank, piece.chunk, layer, piece.bytes / n, piece.ready_s,
                 piece.wire_start_s, piece.end_s, piece.wire_s / n, piece.hidden_s / n, piece.exposed_s / n)
            )  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns[:13])
    computed = _compute_of(chunks, computes)
    if not len(frame) or not len(computed):
        return frame.reindex(columns=columns)
    return frame.merge(computed, on=["request_id", "src_rank", "chunk", "layer"], how="left").reindex(columns=columns)


def _compute_of(chunks: pd.DataFrame, computes: pd.DataFrame) -> pd.DataFrame:
    """When each layer of each prefill chunk of a request was computed, per rank. Ranks of a node run the same steps by number."""
    if not len(chunks) or not len(computes):
        return pd.DataFrame()
    prefills = chunks[(chunks["kind"] == "prefill") & (chunks["role"] != "decode")][["request_id", "node", "step", "chunk"]]
    prefills = prefills.drop_duplicates(["request_id", "chunk"])
    timed = computes[["node", "rank", "step", "layer", "start_s", "end_s"]]
    joined = prefills.merge(timed, on=["node", "step"])
    joined = joined.rename(columns={"rank": "src_rank", "start_s": "compute_start_s", "end_s": "compute_end_s"})
    joined["compute_s"] = joined["compute_end_s"] - joined["compute_start_s"]
    return joined[["request_id", "src_rank", "chunk", "layer", "compute_start_s", "compute_end_s", "compute_s"]]
