"""Decode attention over the paged cache: one query token a sequence, GQA, split over the keys.

The work of a step is cut once, by ``plan_decode``: every sequence into chunks of about equal length, so that one long sequence among
many short ones is spread over the whole GPU. One program then reads one chunk of one KV head for all query heads of its group; the
program that finishes a sequence's last chunk combines the partial results. Everything is decided on the device from ``seq_lens`` and
the grid depends only on the batch size, so a captured CUDA graph stays right for any lengths.

Knows nothing of models. The online softmax is that of FlashAttention (Dao et al. 2022), the split that of Flash-Decoding (2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ITEM_FIELDS = 8  # int32 each: sequence (-1 = no work), first key, end key, first item of the sequence, items of the sequence, 3 unused


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is cut."""

    tile: int = 64  # keys read at once
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 3  # how many run on an SM at once, by their shared memory and registers
    min_chunk: int = 64  # keys
    combine_splits: int = 16  # partial results added at once by the combining program


def config_for(num_seqs: int) -> DecodeConfig:
    """The fastest inside captured steps of the Qwen3-8B shape on an H200 (docs/LOG.md, 2026-11-22); differences are 1 to 4 %."""
    if num_seqs <= 16:
        return DecodeConfig(64, num_warps=2, num_stages=3, programs_per_sm=3)
    if num_seqs <= 48:
        return DecodeConfig(32, num_warps=1, num_stages=3, programs_per_sm=6, combine_splits=4)
    if num_seqs < 192:
        return DecodeConfig(32, num_warps=2, num_stages=4, programs_per_sm=2)
    return DecodeConfig()


@dataclass
class DecodePlan:
    """A step's cut, made on the device; shared by all its layers."""

    config: DecodeConfig
    items: Tensor  # [max_items, ITEM_FIELDS] int32
    partial_out: Tensor  # [max_items, heads, head_dim] float32
    partial_lse: Tensor  # [max_items, heads, 2] float32: maximum (base 2) and sum
    arrived: Tensor  # [S, kv_heads] int32, zero between launches


# Integers that change from step to step are not specialised on: a value of 1 or 16 must not cost a compilation while serving.
@triton.jit(do_not_specialize=["num_seqs", "max_items", "target_items", "min_chunk"])
def _plan_kernel(
    seq_lens,
    items,
    num_seqs,
    max_items,
    target_items,
    min_chunk,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq = tl.arange(0, BLOCK)
    is_real = seq < num_seqs
    lens = tl.load(seq_lens + seq, mask=is_real, other=0)
    # The smallest chunk, in tiles, with which the items still fit in what runs at once: every program then has about the same work.
    # Never smaller than an even share of all keys, where sequences alone are more than run at once.
    limit = tl.maximum(target_items, num_seqs + target_items // 2)
    low = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(lens), target_items), min_chunk), TILE)
    high = tl.maximum(tl.cdiv(tl.max(lens), TILE), low)
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.where(is_real, tl.maximum(tl.cdiv(lens, middle * TILE), 1), 0)) <= limit:
            high = middle
        else:
            low = middle + 1
    count = tl.maximum(tl.cdiv(lens, low * TILE), 1)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(lens, count), TILE), 1) * TILE  # even parts, one size for each sequence
    count = tl.where(is_real, tl.maximum(tl.cdiv(lens, chunk), 1), 0)
    first = tl.cumsum(count, 0) - count
    for split in range(tl.max(count)):
        item = items + (first + split) * FIELDS
        live = split < count
        tl.store(item, seq, mask=live)
        tl.store(item + 1, split * chunk, mask=live)
        tl.store(item + 2, tl.minimum((split + 1) * chunk, lens), mask=live)
        tl.store(item + 3, first, mask=live)
        tl.store(item + 4, count, mask=live)
    used = tl.sum(count)
    for start in range(0, max_items, BLOCK):
        row = start + seq
        tl.store(items + row * FIELDS, -1, mask=(row >= used) & (row < max_items))


@triton.jit(do_not_specialize=["stride_table"])
def _decode_kernel(
    q,
    kv,
    block_tables,
    items,
    out,
    partial_out,
    partial_lse,
    arrived,
    stride_q,
    stride_out,
    stride_block,
    stride_table,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    COMBINE: tl.constexpr,
    FIELDS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    item_index = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    item = items + item_index * FIELDS
    seq = tl.load(item)
    begin = tl.load(item + 1)
    end = tl.load(item + 2)
    first = tl.load(item + 3)
    count = tl.load(item + 4)
    if seq < 0:
        return

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, TILE)
    heads = head * GROUP + row
    is_head = row < GROUP
    queries = tl.load(q + seq.to(tl.int64) * stride_q + heads[:, None] * HEAD_DIM + dim[None, :], mask=is_head[:, None], other=0.0)

    keys = kv + head * (BLOCK_SIZE * HEAD_DIM)
    values = keys + KV_HEADS * (BLOCK_SIZE * HEAD_DIM)
    table = block_tables + seq.to(tl.int64) * stride_table
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    # The block numbers of a tile are read one iteration early: reading them where they are needed would put two latencies in a row
    # and halve the pipeline's depth.
    if TILE <= BLOCK_SIZE:  # chunks and tiles start on multiples of TILE: a tile lies within one block
        block = tl.load(table + begin // BLOCK_SIZE)
    else:
        block = tl.load(table + (begin + key) // BLOCK_SIZE, mask=begin + key < end, other=0)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        live = start + key < end
        if TILE <= BLOCK_SIZE:
            offset = block.to(tl.int64) * stride_block + (start % BLOCK_SIZE + key)[:, None] * HEAD_DIM + dim[None, :]
            block = tl.load(table + (start + TILE) // BLOCK_SIZE, mask=start + TILE < end, other=0)
        else:
            offset = (block.to(tl.int64) * stride_block + (start + key) % BLOCK_SIZE * HEAD_DIM)[:, None] + dim[None, :]
            block = tl.load(table + (start + TILE + key) // BLOCK_SIZE, mask=start + TILE + key < end, other=0)
        k = tl.load(keys + offset, mask=live[:, None], other=0.0).to(queries.dtype)
        scores = tl.where(live[None, :], tl.dot(queries, tl.trans(k)), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_peak[:, None])  # one fused multiply-add each
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        # A slot past the end may hold anything, NaN too: it is masked, not multiplied by zero.
        v = tl.load(values + offset, mask=live[:, None], other=0.0).to(queries.dtype)
        acc = tl.dot(weights.to(queries.dtype), v, acc * shrink[:, None])
        peak = new_peak

    if count == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # an empty (padding) sequence gives zeros
        target = out + seq.to(tl.int64) * stride_out + heads[:, None] * HEAD_DIM + dim[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=is_head[:, None])
        return

    HEADS: tl.constexpr = KV_HEADS * GROUP
    slot = item_index.to(tl.int64) * HEADS + heads
    tl.store(partial_out + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_head[:, None])
    tl.store(partial_lse + slot * 2, peak, mask=is_head)
    tl.store(partial_lse + slot * 2 + 1, total, mask=is_head)
    tl.debug_barrier()  # all threads' partial results are written before one thread says so (release)
    before = tl.atomic_add(arrived + seq * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
    if before == count - 1:
        tl.store(arrived + seq * KV_HEADS + head, 0)
        member = tl.arange(0, GROUP_PADDED)
        is_member = member < GROUP
        split = tl.arange(0, COMBINE)
        peak_all = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        total_all = tl.zeros([GROUP_PADDED], tl.float32)
        sum_all = tl.zeros([GROUP_PADDED, HEAD_DIM], tl.float32)
        for done in range(0, count, COMBINE):
            live = (done + split < count)[:, None] & is_member[None, :]
            source = (first + done + split).to(tl.int64)[:, None] * HEADS + (head * GROUP + member)[None, :]
            # .cg: read from L2, where the other programs' results are
            part_peak = tl.load(partial_lse + source * 2, mask=live, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(partial_lse + source * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
            part = tl.load(partial_out + source[:, :, None] * HEAD_DIM + dim, mask=live[:, :, None], other=0.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak_all, tl.max(part_peak, 0))
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # padded members have no score at all
            shrink = tl.exp2(peak_all - safe)
            weight = tl.exp2(part_peak - safe[None, :])
            total_all = total_all * shrink + tl.sum(part_total * weight, 0)
            sum_all = sum_all * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
            peak_all = new_peak
        result = sum_all / tl.where(total_all == 0.0, 1.0, total_all)[:, None]
        target = out + seq.to(tl.int64) * stride_out + (head * GROUP + member)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=is_member[:, None])


def plan_decode(
    seq_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int,
    config: DecodeConfig | None = None,
    pdl: bool = False,
) -> DecodePlan:
    """Cut a step's decode work. seq_lens [S] int32 on the device, keys of each sequence (0 = padding, its output becomes zero)."""
    num_seqs = seq_lens.shape[0]
    config = config or config_for(num_seqs)
    target_items = max(1, num_sms * config.programs_per_sm // num_kv_heads)
    max_items = max(target_items, num_seqs + target_items // 2)
    device = seq_lens.device
    plan = DecodePlan(
        config=config,
        items=torch.empty(max_items, ITEM_FIELDS, dtype=torch.int32, device=device),
        partial_out=torch.empty(max_items, num_heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(max_items, num_heads, 2, dtype=torch.float32, device=device),
        arrived=torch.zeros(num_seqs, num_kv_heads, dtype=torch.int32, device=device),
    )
    _plan_kernel[(1,)](
        seq_lens,
        plan.items,
        num_seqs,
        max_items,
        target_items,
        config.min_chunk,
        TILE=config.tile,
        FIELDS=ITEM_FIELDS,
        BLOCK=triton.next_power_of_2(max(num_seqs, 256)),
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return plan


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    plan: DecodePlan,
    scale: float,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """q [S, heads, head_dim] (any token stride), kv_layer [num_blocks, 2, kv_heads, block_size, head_dim] (contiguous within a block)
    -> [S, heads, head_dim]."""
    config = plan.config
    num_seqs, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    if out is None:
        out = torch.empty(num_seqs, num_heads, head_dim, dtype=q.dtype, device=q.device)
    group = num_heads // num_kv_heads
    _decode_kernel[(num_kv_heads, plan.items.shape[0])](
        q,
        kv_layer,
        block_tables,
        plan.items,
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.arrived,
        q.stride(0),
        out.stride(0),
        kv_layer.stride(0),
        block_tables.stride(0),
        scale * 1.4426950408889634,  # log2(e): the kernel takes powers of two
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        ROWS=max(16, triton.next_power_of_2(group)),
        GROUP_PADDED=triton.next_power_of_2(group),
        COMBINE=config.combine_splits,
        FIELDS=ITEM_FIELDS,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
