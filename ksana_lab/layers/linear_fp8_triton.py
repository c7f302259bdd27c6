"""The Triton side of linear_fp8.py: x times 8-bit weights for few rows of x, and the quantisation of activations for many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Narrow tiles, so that the smallest product of an 8B model (4,096 outputs) has a program for nearly every SM, and deep ones, so that each
# has 64 KiB on the way. Chosen by arithmetic, not by measurement.
_BLOCK_N = 32
_BLOCK_K = 512
_STAGES = 4


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x, w, scale, y, num_rows, n, k, stride_x, stride_y,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.minimum(column, n - 1)
    inner = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    live = row < num_rows
    rows_w = w + source.to(tl.int64)[:, None] * k
    rows_x = x + row.to(tl.int64)[:, None] * stride_x
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        at = start + inner
        if EVEN_K:
            tile_w = tl.load(rows_w + at[None, :])
            tile_x = tl.load(rows_x + at[None, :], mask=live[:, None], other=0.0)
        else:
            tile_w = tl.load(rows_w + at[None, :], mask=(at < k)[None, :], other=0.0)
            tile_x = tl.load(rows_x + at[None, :], mask=live[:, None] & (at < k)[None, :], other=0.0)
        acc = tl.dot(tile_w.to(tile_x.dtype), tl.trans(tile_x), acc)  # 8 bits become 16 without loss
    acc *= tl.load(scale + source)[:, None]
    target = y + row.to(tl.int64)[None, :] * stride_y + column[:, None]
    tl.store(target, acc.to(y.dtype.element_ty), mask=live[None, :] & (column < n)[:, None])


def few_rows_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, K], at most 32 rows, weight [N, K] float8_e4m3fn, scale [N] float32 -> [M, N] in x's dtype."""
    num_rows, k = x.shape
    n = weight.shape[0]
    assert num_rows <= 32 and weight.is_contiguous() and x.stride(1) == 1, (x.shape, x.stride(), weight.shape)
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    block_k = min(_BLOCK_K, triton.next_power_of_2(k))
    _few_rows_kernel[(triton.cdiv(n, _BLOCK_N),)](
        x, weight, scale, out, num_rows, n, k, x.stride(0), out.stride(0),
        ROWS=max(16, triton.next_power_of_2(num_rows)), BLOCK_N=_BLOCK_N, BLOCK_K=block_k, EVEN_K=k % block_k == 0, STAGES=_STAGES,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _quantize_kernel(x, out, scales, k, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride_x + column, mask=column < k, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / 448.0
    narrow = tl.clamp(values / scale, -448.0, 448.0).to(out.dtype.element_ty)
    tl.store(out + row * k + column, narrow, mask=column < k)
    tl.store(scales + row, scale)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> float8_e4m3fn [T, K] and float32 scales [T]: each token's largest value becomes 448."""
    num_rows, k = x.shape
    assert x.stride(1) == 1, x.stride()
    out = torch.empty(num_rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    _quantize_kernel[(num_rows,)](x, out, scales, k, x.stride(0), BLOCK=block, num_warps=min(16, max(1, block // 1024)))
    return out, scales
