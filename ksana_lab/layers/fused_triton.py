"""The Triton side of layers/fused.py: wrappers with the same names and arguments. Imported only where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ksana_lab.attention.store_kv import to_cache


def _options(pdl: bool, **options: Any) -> dict[str, Any]:
    return {**options, "PDL": pdl, **({"launch_pdl": True} if pdl else {})}


@triton.jit
def _rms_norm_kernel(x, residual, weight, out, stride_x, hidden, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < hidden
    w = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)  # a parameter: need not wait for the kernel before
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(x + row * stride_x + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(residual + row * hidden + column, mask=live, other=0.0).to(tl.float32)
        rounded = y.to(residual.dtype.element_ty)
        tl.store(residual + row * hidden + column, rounded, mask=live)
        y = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 0) / hidden + eps)
    tl.store(out + row * hidden + column, (y * scale * w).to(out.dtype.element_ty), mask=live)


def _launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, pdl: bool) -> Tensor:
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(rows.shape[0],)](
        rows, residual if residual is not None else rows, weight, out, rows.stride(0), hidden, eps,
        ADD=residual is not None, BLOCK=block, **_options(pdl, num_warps=min(8, max(1, block // 512))),
    )  # fmt: skip
    return out.view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:
    return _launch_rms_norm(x, None, weight, eps, pdl)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:
    assert residual.is_contiguous()
    return _launch_rms_norm(x, residual, weight, eps, pdl)


@triton.jit
def _silu_mul_kernel(gate_up, out, ffn, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = column < ffn
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * ffn + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * ffn + ffn + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * ffn + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=live)


def silu_mul(gate_up: Tensor, pdl: bool = False) -> Tensor:
    num_tokens, width = gate_up.shape
    ffn = width // 2
    out = torch.empty(num_tokens, ffn, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(ffn))
    if num_tokens > 65535:  # the second axis of a grid ends there
        for start in range(0, num_tokens, 65535):
            out[start : start + 65535] = silu_mul(gate_up[start : start + 65535], pdl)
        return out
    _silu_mul_kernel[(triton.cdiv(ffn, block), num_tokens)](gate_up, out, ffn, BLOCK=block, **_options(pdl, num_warps=4))
    return out


@triton.jit
def _norm_rope(left, right, cos, sin, w_left, w_right, eps, NORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """left, right [heads, head_dim / 2] float32."""
    if NORM:
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / HEAD_DIM + eps)
        left = left * scale[:, None] * w_left[None, :]
        right = right * scale[:, None] * w_right[None, :]
    return left * cos[None, :] - right * sin[None, :], right * cos[None, :] + left * sin[None, :]


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv, kv, slots, cos_sin, q_weight, k_weight, stride_qkv, stride_block, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr, GROUP_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    half = tl.arange(0, HALF)
    member = tl.arange(0, GROUP_PADDED)
    if NORM:
        wq_left = tl.load(q_weight + half).to(tl.float32)
        wq_right = tl.load(q_weight + HALF + half).to(tl.float32)
        wk_left = tl.load(k_weight + half).to(tl.float32)
        wk_right = tl.load(k_weight + HALF + half).to(tl.float32)
    else:
        wq_left = half.to(tl.float32)  # not read
        wq_right = wq_left
        wk_left = wq_left
        wk_right = wq_left
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    cos = tl.load(cos_sin + token * HEAD_DIM + half)
    sin = tl.load(cos_sin + token * HEAD_DIM + HALF + half)
    slot = tl.load(slots + token)

    q = qkv + token * stride_qkv + ((kv_head * GROUP + member) * HEAD_DIM)[:, None] + half[None, :]
    live = (member < GROUP)[:, None]
    left = tl.load(q, mask=live, other=0.0).to(tl.float32)
    right = tl.load(q + HALF, mask=live, other=0.0).to(tl.float32)
    # One row more for the key would not be a power of two: the key is rotated by itself.
    one = tl.arange(0, 1)
    k = qkv + token * stride_qkv + ((HEADS + kv_head + one) * HEAD_DIM)[:, None] + half[None, :]
    k_left = tl.load(k).to(tl.float32)
    k_right = tl.load(k + HALF).to(tl.float32)
    v_left = tl.load(k + KV_HEADS * HEAD_DIM)
    v_right = tl.load(k + KV_HEADS * HEAD_DIM + HALF)

    left, right = _norm_rope(left, right, cos, sin, wq_left, wq_right, eps, NORM, HEAD_DIM)
    tl.store(q, left.to(qkv.dtype.element_ty), mask=live)
    tl.store(q + HALF, right.to(qkv.dtype.element_ty), mask=live)
    k_left, k_right = _norm_rope(k_left, k_right, cos, sin, wk_left, wk_right, eps, NORM, HEAD_DIM)
    k_left = k_left.to(qkv.dtype.element_ty)
    k_right = k_right.to(qkv.dtype.element_ty)
    tl.store(k, k_left)
    tl.store(k + HALF, k_right)
    if slot >= 0:
        cell = kv + slot // BLOCK_SIZE * stride_block + (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + one[:, None] + half[None, :]
        to = kv.dtype.element_ty
        VALUES: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM
        tl.store(cell, to_cache(k_left, to))
        tl.store(cell + HALF, to_cache(k_right, to))
        tl.store(cell + VALUES, to_cache(v_left, to))
        tl.store(cell + VALUES + HALF, to_cache(v_right, to))


def qk_norm_rope_store(
    qkv: Tensor,
    num_heads: int,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    pdl: bool = False,
) -> None:
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    _qk_norm_rope_store_kernel[(qkv.shape[0], num_kv_heads)](
        qkv, kv_layer, slot_mapping, cos_sin, q_weight, k_weight, qkv.stride(0), kv_layer.stride(0), eps,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, NORM=q_weight is not None,
        GROUP_PADDED=triton.next_power_of_2(num_heads // num_kv_heads), **_options(pdl, num_warps=1),
    )  # fmt: skip


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["loops"])  # it differs by batch size, which must not cost a compilation while serving
def _sample_kernel(
    logits, temperature, keys, part_score, part_token, arrived, out, vocab, stride_logits, loops,
    RANDOM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    heat = 0.0
    first = tl.full([1], 0, tl.uint32)
    second = tl.full([1], 0, tl.uint32)
    if RANDOM:
        heat = tl.load(temperature + row)
        first += tl.load(keys + row * 2).to(tl.uint32)
        second += tl.load(keys + row * 2 + 1).to(tl.uint32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    for loop in range(loops):
        token = (split * loops + loop) * BLOCK + tl.arange(0, BLOCK)
        score = tl.load(logits + row.to(tl.int64) * stride_logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        if RANDOM:  # noqa: SIM102  (known when compiling; the other when running)
            if heat > 0.0:
                bits = _mix(_mix(token.to(tl.uint32) ^ first) ^ second)
                x = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2 ** -32
                # log1p: near 0, where races are decided, the logarithm alone would have lost the digits
                series = x * (1.0 + x * (0.5 + x * (0.33333333333 + x * 0.25)))
                score = score / heat - tl.log(tl.where(x < 0.01, series, -tl.log(1.0 - x)))
        better = score > best
        best = tl.where(better, score, best)
        best_token = tl.where(better, token, best_token)
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, best_token, vocab), 0)
    slot = row * SPLITS + split
    tl.store(part_score + slot, top)
    tl.store(part_token + slot, winner)
    tl.debug_barrier()
    before = tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(0) - 1:
        tl.store(arrived + row, 0)
        index = tl.arange(0, SPLITS)
        live = index < tl.num_programs(0)
        score = tl.load(part_score + row * SPLITS + index, mask=live, other=float("-inf"), cache_modifier=".cg")
        token = tl.load(part_token + row * SPLITS + index, mask=live, other=0, cache_modifier=".cg")
        top = tl.max(score, 0)
        tl.store(out + row, tl.min(tl.where((score == top) & live, token, vocab), 0).to(tl.int64))


def sample(logits: Tensor, temperature: Tensor | None, keys: Tensor | None, pdl: bool = False) -> Tensor:
    """As fused.sample; without temperature the maximum."""
    batch, vocab = logits.shape
    block = 2048
    loops = max(1, triton.cdiv(batch * vocab, block * 1024))  # about a thousand programs, eight for each SM
    num_splits = triton.cdiv(vocab, block * loops)
    splits = triton.next_power_of_2(triton.cdiv(vocab, block))  # at most
    device = logits.device
    out = torch.empty(batch, dtype=torch.int64, device=device)
    part_score = torch.empty(batch, splits, dtype=torch.float32, device=device)
    part_token = torch.empty(batch, splits, dtype=torch.int32, device=device)
    arrived = torch.zeros(batch, dtype=torch.int32, device=device)
    _sample_kernel[(num_splits, batch)](
        logits, temperature, keys, part_score, part_token, arrived, out, vocab, logits.stride(0), loops,
        RANDOM=temperature is not None, BLOCK=block, SPLITS=splits, **_options(pdl, num_warps=4),
    )  # fmt: skip
    return out
