"""Prefill attention over the paged cache: any number of new tokens a sequence after any context, causal, GQA.

A program takes a tile of new tokens of one sequence together with all query heads that share a KV head, so every key is read once for
the group. Reads pages only; the fast cases without earlier context are taken by others (attention/triton.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_SEQS = 64  # with more in a step another kernel is compiled


@triton.jit
def _blocks_of(table, start, seq_len, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block numbers of the keys start .. start + TILE: one number, or one for each key. Tiles start on multiples of TILE."""
    if TILE <= BLOCK_SIZE:
        return tl.load(table + start // BLOCK_SIZE, mask=start < seq_len, other=0)
    else:
        index = start + tl.arange(0, TILE)
        return tl.load(table + index // BLOCK_SIZE, mask=index < seq_len, other=0)


@triton.jit
def _attend_tile(
    acc, total, peak, queries, position, keys, values, block, start, seq_len, stride_block, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_DIM)
    index = start + key
    if TILE <= BLOCK_SIZE:
        offset = block.to(tl.int64) * stride_block + (start % BLOCK_SIZE + key)[:, None] * HEAD_DIM + dim[None, :]
    else:
        offset = (block.to(tl.int64) * stride_block + index % BLOCK_SIZE * HEAD_DIM)[:, None] + dim[None, :]
    if MASKED:
        k = tl.load(keys + offset, mask=(index < seq_len)[:, None], other=0.0).to(queries.dtype)
    else:
        k = tl.load(keys + offset).to(queries.dtype)
    scores = tl.dot(queries, tl.trans(k))
    if MASKED:
        scores = tl.where(index[None, :] <= position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])  # one fused multiply-add each
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        v = tl.load(values + offset, mask=(index < seq_len)[:, None], other=0.0).to(queries.dtype)
    else:
        v = tl.load(values + offset).to(queries.dtype)
    acc = tl.dot(weights.to(queries.dtype), v, acc * shrink[:, None])
    return acc, total, new_peak


# Sequences of a step that go together begin anywhere in its tables: how these are aligned must not cost a compilation while serving.
@triton.jit(do_not_specialize=["num_seqs", "num_tiles", "stride_table", "block_tables", "query_start_loc", "seq_lens"])
def _prefill_kernel(
    q, kv, out, block_tables, query_start_loc, seq_lens,
    num_seqs, num_tiles, stride_q, stride_out, stride_block, stride_table, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SEQS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP  # new tokens of a program
    tile = num_tiles - 1 - tl.program_id(1)  # late tiles have the most keys: first
    head = tl.program_id(0)
    candidate = tl.arange(0, SEQS)
    base = tl.load(query_start_loc)
    starts = tl.load(query_start_loc + candidate, mask=candidate < num_seqs, other=0) - base
    # Sequence i begins at tile starts[i] // TOKENS + i at the latest: an upper bound that needs no scan and wastes at most one tile each.
    first_tile = tl.where(candidate < num_seqs, starts // TOKENS + candidate, num_tiles + 1)
    seq = tl.sum((first_tile <= tile).to(tl.int32)) - 1
    begin = tl.load(query_start_loc + seq)
    num_new = tl.load(query_start_loc + seq + 1) - begin
    first_token = (tile - ((begin - base) // TOKENS + seq)) * TOKENS
    if first_token >= num_new:
        return
    seq_len = tl.load(seq_lens + seq)
    context = seq_len - num_new

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    token = first_token + row // GROUP
    heads = head * GROUP + row % GROUP
    live = (token < num_new) & (row < TOKENS * GROUP)
    where_q = (begin + token).to(tl.int64) * stride_q + heads * HEAD_DIM
    queries = tl.load(q + where_q[:, None] + dim[None, :], mask=live[:, None], other=0.0)
    position = context + token
    keys = kv + head * (BLOCK_SIZE * HEAD_DIM)
    values = keys + KV_HEADS * (BLOCK_SIZE * HEAD_DIM)
    table = block_tables + seq.to(tl.int64) * stride_table
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    open_keys = (context + first_token + 1) // TILE * TILE  # every row sees these
    end = tl.minimum(context + first_token + TOKENS, seq_len)
    block = _blocks_of(table, 0, seq_len, BLOCK_SIZE, TILE)
    for start in tl.range(0, open_keys, TILE, num_stages=STAGES):
        mine = block
        block = _blocks_of(table, start + TILE, seq_len, BLOCK_SIZE, TILE)  # one tile early: see triton_decode.py
        acc, total, peak = _attend_tile(
            acc, total, peak, queries, position, keys, values, mine, start, seq_len, stride_block, scale_log2,
            HEAD_DIM, BLOCK_SIZE, TILE, False,
        )  # fmt: skip
    for start in tl.range(open_keys, end, TILE, num_stages=1):
        block = _blocks_of(table, start, seq_len, BLOCK_SIZE, TILE)
        acc, total, peak = _attend_tile(
            acc, total, peak, queries, position, keys, values, block, start, seq_len, stride_block, scale_log2,
            HEAD_DIM, BLOCK_SIZE, TILE, True,
        )  # fmt: skip
    result = acc / total[:, None]
    where_out = (begin + token).to(tl.int64) * stride_out + heads * HEAD_DIM
    tl.store(out + where_out[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=live[:, None])


def prefill_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_new_tokens: int,
    scale: float,
    out: Tensor,
    rows: int = 128,
    tile: int = 64,
    num_warps: int = 8,
    num_stages: int = 3,
) -> Tensor:
    """Attention of the sequences that query_start_loc [n + 1], seq_lens [n] and block_tables [n, ...] name.

    q, out [T, heads, head_dim]: rows query_start_loc[0] .. query_start_loc[n] are read and written. num_new_tokens is their number."""
    num_seqs = seq_lens.shape[0]
    num_heads, head_dim = q.shape[1:]
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    group = num_heads // num_kv_heads
    num_tiles = num_new_tokens // (rows // group) + num_seqs
    most_seqs = FEW_SEQS if num_seqs <= FEW_SEQS else triton.next_power_of_2(max(num_seqs, 1024))
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q, kv_layer, out, block_tables, query_start_loc, seq_lens,
        num_seqs, num_tiles, q.stride(0), out.stride(0), kv_layer.stride(0), block_tables.stride(0), scale * 1.4426950408889634,
        KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        ROWS=rows, TILE=tile, SEQS=most_seqs, STAGES=num_stages, num_warps=num_warps,
    )  # fmt: skip
    return out


# A table's row and a slice of log-sum-exps begin anywhere, too.
@triton.jit(do_not_specialize=["table", "first", "num_tokens"])
def _gather_kernel(
    kv, table, k, v, stride_block, first, num_tokens,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, WIDTH)
    live = element < KV_HEADS * HEAD_DIM
    exists = number < num_tokens  # behind the last token nothing is read, and zeros are written
    token = first + number
    block = tl.load(table + token // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    source = kv + block * stride_block + token % BLOCK_SIZE * HEAD_DIM + element // HEAD_DIM * (BLOCK_SIZE * HEAD_DIM) + element % HEAD_DIM
    target = number * (KV_HEADS * HEAD_DIM) + element
    to = k.dtype.element_ty
    tl.store(k + target, tl.load(source, mask=live & exists, other=0.0).to(to), mask=live)
    tl.store(v + target, tl.load(source + KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=live & exists, other=0.0).to(to), mask=live)


def gather_kv(
    kv_layer: Tensor, block_table: Tensor, num_tokens: int, dtype: torch.dtype, first: int = 0, padded: int | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens first .. first + num_tokens of one sequence out of its blocks, then zeros up to ``padded`` tokens:
    [padded, kv_heads, head_dim] each."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    length = num_tokens if padded is None else padded
    k = torch.empty(length, num_kv_heads, head_dim, dtype=dtype, device=kv_layer.device)
    v = torch.empty_like(k)
    _gather_kernel[(length,)](
        kv_layer, block_table, k, v, kv_layer.stride(0), first, num_tokens,
        KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, WIDTH=triton.next_power_of_2(num_kv_heads * head_dim),
    )  # fmt: skip
    return k, v


@triton.jit(do_not_specialize=["lse_a", "lse_b", "lse_out"])
def _merge_kernel(
    a, lse_a, b, lse_b, out, lse_out,
    stride_a, stride_b, stride_out, stride_lse_a, stride_lse_b, stride_lse_out,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS_PADDED: tl.constexpr, WRITE_LSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, HEAD_DIM)
    live = head < HEADS
    la = tl.load(lse_a + head * stride_lse_a + token, mask=live, other=0.0)
    lb = tl.load(lse_b + head * stride_lse_b + token, mask=live, other=0.0)
    peak = tl.maximum(la, lb)
    wa = tl.exp(la - peak)
    wb = tl.exp(lb - peak)
    where = head[:, None] * HEAD_DIM + dim[None, :]
    xa = tl.load(a + token * stride_a + where, mask=live[:, None], other=0.0).to(tl.float32)
    xb = tl.load(b + token * stride_b + where, mask=live[:, None], other=0.0).to(tl.float32)
    x = (xa * wa[:, None] + xb * wb[:, None]) / (wa + wb)[:, None]
    tl.debug_barrier()  # every warp has read before one writes: ``out`` may be ``a``
    tl.store(out + token * stride_out + where, x.to(out.dtype.element_ty), mask=live[:, None])
    if WRITE_LSE:
        tl.store(lse_out + head * stride_lse_out + token, peak + tl.log(wa + wb), mask=live)


def merge_attention(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor, lse_out: Tensor | None = None) -> Tensor:
    """Softmax attention over the union of two disjoint key sets: a, b [T, heads, head_dim], lse [heads, T] float32 (natural).

    ``out`` and ``lse_out`` (the union's, if wanted) may be ``a`` and ``lse_a``."""
    num_tokens, num_heads, head_dim = a.shape
    target = lse_a if lse_out is None else lse_out
    assert all(lse.stride(1) == 1 for lse in (lse_a, lse_b, target)), "a head's tokens must be contiguous"
    assert all(x.stride()[1:] == (head_dim, 1) for x in (a, b, out)), "a token's heads must be contiguous"
    _merge_kernel[(num_tokens,)](
        a, lse_a, b, lse_b, out, target,
        a.stride(0), b.stride(0), out.stride(0), lse_a.stride(0), lse_b.stride(0), target.stride(0),
        HEADS=num_heads, HEAD_DIM=head_dim, HEADS_PADDED=triton.next_power_of_2(num_heads), WRITE_LSE=lse_out is not None,
    )  # fmt: skip
    return out
