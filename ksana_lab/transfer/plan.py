"""Which bytes of a prefill node's caches go where in a decode node's: plain arithmetic on layouts, no sockets, no tensors.

Heads: with tensor parallelism over ``tp`` ranks and ``H`` KV heads, rank r owns heads [r·H/tp, (r+1)·H/tp) if tp <= H; otherwise head
r // (tp/H), so that tp/H consecutive ranks hold replicas of one head. ``head_slices`` says who feeds whom, ``copies`` turns one such
pair's share of a token range and some layers into the fewest contiguous runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import LayoutMismatch
from ksana_lab.protocol.transfer import Shape

Copies = np.ndarray  # [n, 3] int64: offset in the source cache, offset in the destination cache, bytes


@dataclass(frozen=True)
class HeadSlice:
    """Heads [src_head, src_head + num_heads) of rank src_rank's cache are heads [dst_head, …) of rank dst_rank's. Rank-local numbers."""

    src_rank: int
    dst_rank: int
    src_head: int
    dst_head: int
    num_heads: int


def heads_of(rank: int, tp_size: int, num_kv_heads: int) -> range:
    """The model's KV heads that ``rank`` holds. Raises LayoutMismatch when they cannot be divided evenly."""
    if max(tp_size, num_kv_heads) % min(tp_size, num_kv_heads):
        raise LayoutMismatch(f"{num_kv_heads} KV heads cannot be shared evenly by {tp_size} tensor-parallel ranks")
    if tp_size > num_kv_heads:
        head = rank // (tp_size // num_kv_heads)
        return range(head, head + 1)
    share = num_kv_heads // tp_size
    return range(rank * share, (rank + 1) * share)


def head_slices(src_tp: int, dst_tp: int, num_kv_heads: int) -> list[HeadSlice]:
    """Every head of every destination rank exactly once, from a rank that holds it; where sources are replicas, destinations that want the
    same head are spread evenly over them."""
    src_replicas, dst_replicas = max(1, src_tp // num_kv_heads), max(1, dst_tp // num_kv_heads)
    slices: list[HeadSlice] = []
    for dst_rank in range(dst_tp):
        replica = (dst_rank % dst_replicas) * src_replicas // dst_replicas
        for dst_head, head in enumerate(heads_of(dst_rank, dst_tp, num_kv_heads)):
            src_rank = head * src_replicas + replica if src_replicas > 1 else head * src_tp // num_kv_heads
            src_head = head - heads_of(src_rank, src_tp, num_kv_heads).start
            last = slices[-1] if slices else None
            if last and (last.src_rank, last.dst_rank, last.src_head + last.num_heads) == (src_rank, dst_rank, src_head):
                slices[-1] = HeadSlice(src_rank, dst_rank, last.src_head, last.dst_head, last.num_heads + 1)
            else:
                slices.append(HeadSlice(src_rank, dst_rank, src_head, dst_head, 1))
    return slices


def between(slices: Sequence[HeadSlice], src_rank: int, dst_rank: int) -> list[HeadSlice]:
    return [s for s in slices if (s.src_rank, s.dst_rank) == (src_rank, dst_rank)]


def slice_bytes(layout: KVLayout, slices: Sequence[HeadSlice], num_tokens: int, num_layers: int) -> int:
    """K and V of ``num_tokens`` tokens in ``num_layers`` layers, of the heads in ``slices``."""
    heads = sum(s.num_heads for s in slices)
    return heads * num_tokens * num_layers * 2 * layout.head_dim * layout.itemsize


def copies(
    src: KVLayout,
    dst: KVLayout,
    slices: Sequence[HeadSlice],
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    start_token: int,
    end_token: int,
    layers: range,
) -> Copies:
    """The runs that carry tokens [start_token, end_token) of ``layers`` from one rank's cache to another's.

    ``slices``: of one (source, destination) pair. The block tables are the sequence's: token t lies in block_table[t // block_size].
    Returns int64 [n, 3]; every byte asked for is written exactly once, neighbours that are contiguous on both sides are one run.
    Raises LayoutMismatch for a table that is too short for the tokens, and for what lies outside of a cache."""
    parts = [runs for _, _, runs in cells(src, dst, slices, src_blocks, dst_blocks, start_token, end_token, layers)]
    return _coalesce(np.concatenate(parts)) if parts else np.empty((0, 3), np.int64)


def cells(
    src: KVLayout,
    dst: KVLayout,
    slices: Sequence[HeadSlice],
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    start_token: int,
    end_token: int,
    layers: range,
) -> list[tuple[int, int, Copies]]:
    """As ``copies``, but no run reaches beyond its cell: (first, last, runs), tokens [first, last) within each block that the runs are
    of. At most three: the rest of a block, whole blocks, the beginning of a block."""
    if start_token >= end_token or not slices or not len(layers):
        return []
    size = src.block_size
    if min(len(src_blocks), len(dst_blocks)) * size < end_token:
        tables = f"{len(src_blocks)} blocks on the prefill node and {len(dst_blocks)} on the decode node"
        raise LayoutMismatch(f"{end_token} tokens do not fit into {tables}, of {size} tokens each")
    parts = []
    for first, last, blocks in token_parts(start_token, end_token, size):
        # In the order of memory, so that tables which run backwards on both sides coalesce, too.
        pairs = sorted((src_blocks[block], dst_blocks[block]) for block in blocks)
        runs = _runs(src, dst, slices, [pair[0] for pair in pairs], [pair[1] for pair in pairs], first, last, layers)
        parts.append((first, last, runs))
    return parts


def token_parts(start_token: int, end_token: int, block_size: int) -> list[tuple[int, int, range]]:
    """Tokens [start_token, end_token) as (first, last, blocks): tokens [first, last) of each of these blocks of the table."""
    size, parts = block_size, []
    first_whole, end_whole = -(-start_token // size), end_token // size
    if start_token % size:
        block = start_token // size
        parts.append((start_token % size, min(size, end_token - block * size), range(block, block + 1)))
    if first_whole < end_whole:
        parts.append((0, size, range(first_whole, end_whole)))
    if end_token % size and end_whole >= first_whole:
        parts.append((0, end_token % size, range(end_whole, end_whole + 1)))
    return parts


def _runs(
    src: KVLayout,
    dst: KVLayout,
    slices: Sequence[HeadSlice],
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    first: int,
    last: int,
    layers: range,
) -> Copies:
    """Tokens [first, last) within each of the given blocks, in the order of the source's memory as far as the block tables allow."""
    offsets = [_cell_offsets(layout, blocks, layers, src.order) for layout, blocks in ((src, src_blocks), (dst, dst_blocks))]
    within = np.concatenate([within_cell(src, dst, s, first, last) for s in slices])
    within = within[np.argsort(within[:, 0], kind="stable")]
    runs = np.empty((len(offsets[0]), len(within), 3), np.int64)
    runs[:, :, 0] = offsets[0][:, None] + within[:, 0]
    runs[:, :, 1] = offsets[1][:, None] + within[:, 1]
    runs[:, :, 2] = within[:, 2]
    return runs.reshape(-1, 3)


def _cell_offsets(layout: KVLayout, blocks: Sequence[int], layers: range, walk: str) -> np.ndarray:
    """Byte offsets [len(blocks) * len(layers)] of the cells, the source's outermost axis slowest."""
    table, layer = np.asarray(blocks, np.int64), np.asarray(layers, np.int64)
    if table.min() < 0 or table.max() >= layout.num_blocks:
        raise LayoutMismatch(f"block {table.min()}..{table.max()} is outside a cache of {layout.num_blocks} blocks")
    if layer.min() < 0 or layer.max() >= layout.num_layers:
        raise LayoutMismatch(f"layer {layer.min()}..{layer.max()} is outside a model of {layout.num_layers} layers")
    per_block, per_layer = (layout.num_layers, 1) if layout.order == "block_major" else (1, layout.num_blocks)
    index = table[:, None] * per_block + layer * per_layer
    return (index if walk == "block_major" else index.T).reshape(-1) * layout.cell_bytes


def within_cell(src: KVLayout, dst: KVLayout, s: HeadSlice, first: int, last: int) -> np.ndarray:
    """Runs [n, 3] of one cell, offsets relative to it: K and V of the slice's heads, tokens [first, last)."""
    if not (s.src_head + s.num_heads <= src.num_kv_heads and s.dst_head + s.num_heads <= dst.num_kv_heads):
        raise LayoutMismatch(f"{s} does not fit into {src.num_kv_heads} and {dst.num_kv_heads} KV heads per rank")
    token = src.head_dim * src.itemsize
    heads = np.arange(s.num_heads, dtype=np.int64)
    runs = np.empty((2, s.num_heads, 3), np.int64)
    for kv in (0, 1):
        runs[kv, :, 0] = (kv * src.num_kv_heads + s.src_head + heads) * src.head_bytes + first * token
        runs[kv, :, 1] = (kv * dst.num_kv_heads + s.dst_head + heads) * dst.head_bytes + first * token
    runs[:, :, 2] = (last - first) * token
    return _coalesce(runs.reshape(-1, 3))


def _coalesce(runs: Copies) -> Copies:
    """Join each run with its successor where both sides are contiguous."""
    if len(runs) < 2:
        return runs
    ends = runs[:-1, :2] + runs[:-1, 2:]
    starts_new = np.flatnonzero(np.concatenate(([True], (ends != runs[1:, :2]).any(axis=1))))
    joined = runs[starts_new].copy()
    joined[:, 2] = np.add.reduceat(runs[:, 2], starts_new)
    return joined


def shifted(runs: Copies, shift: tuple[int, int]) -> Copies:
    """``runs`` with the offsets moved by (source, destination) bytes."""
    return runs if shift == (0, 0) else runs + np.array([*shift, 0], np.int64)


def rank_layout(shape: Shape, order: str | None = None) -> KVLayout:
    """The layout of one rank's cache on a node of this shape (all ranks are alike)."""
    heads = len(heads_of(0, shape.tp_size, shape.num_kv_heads))
    return KVLayout(shape.num_blocks, shape.num_layers, heads, shape.block_size, shape.head_dim, shape.dtype, order or shape.order)  # type: ignore[arg-type]


def check_shapes(prefill: Shape, decode: Shape) -> None:
    """Raises LayoutMismatch that names what differs and both values."""
    names = ("dtype", "num_layers", "num_kv_heads", "head_dim", "block_size")
    differing = [
        f"{name} is {getattr(prefill, name)} on the prefill node and {getattr(decode, name)} on the decode node"
        for name in names
        if getattr(prefill, name) != getattr(decode, name)
    ]
    if differing:
        raise LayoutMismatch("the KV caches of the pair differ: " + "; ".join(differing))
    if prefill.wire_dtype != decode.wire_dtype:
        raise LayoutMismatch(
            f"ksana_lab.wire_dtype is {prefill.wire_dtype} on the prefill node and {decode.wire_dtype} on the decode node: "
            "say the same on both"
        )
    heads_of(0, prefill.tp_size, prefill.num_kv_heads)
    heads_of(0, decode.tp_size, decode.num_kv_heads)
