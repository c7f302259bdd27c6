"""Write a step's keys and values into their slots of the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def to_cache(x, to: tl.constexpr):
    """``x`` in the cache's element type, saturated where that is FP8, which has no infinity (attention/cache_dtype.py)."""
    if to == tl.float8e4nv:
        return tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(to)
    else:
        return x.to(to)


@triton.jit
def _store_kernel(
    k,
    v,
    kv,
    slots,
    stride_k,
    stride_v,
    stride_block,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + token)
    if slot < 0:
        return
    element = tl.arange(0, WIDTH)
    live = element < KV_HEADS * HEAD_DIM
    cell = kv + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * HEAD_DIM
    target = cell + element // HEAD_DIM * (BLOCK_SIZE * HEAD_DIM) + element % HEAD_DIM
    to = kv.dtype.element_ty
    tl.store(target, to_cache(tl.load(k + token * stride_k + element, mask=live), to), mask=live)
    tl.store(target + KV_HEADS * BLOCK_SIZE * HEAD_DIM, to_cache(tl.load(v + token * stride_v + element, mask=live), to), mask=live)


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor, pdl: bool = False) -> None:
    """k, v [T, kv_heads, head_dim] (contiguous within a token) -> kv_layer [num_blocks, 2, kv_heads, block_size, head_dim] at
    slot_mapping [T] int64 = block * block_size + offset; -1 is skipped."""
    num_tokens, num_kv_heads, head_dim = k.shape
    width = triton.next_power_of_2(num_kv_heads * head_dim)
    _store_kernel[(num_tokens,)](
        k,
        v,
        kv_layer,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        kv_layer.stride(0),
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_layer.shape[3],
        WIDTH=width,
        PDL=pdl,
        num_warps=4 if width >= 1024 else 1,
        **({"launch_pdl": True} if pdl else {}),
    )
