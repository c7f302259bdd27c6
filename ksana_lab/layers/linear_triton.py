"""y = x W^T for few rows of x, in Triton.

cuBLAS takes 4 to 6 us more than the bytes of W need, whatever their number; at decode's sizes that is a fifth of the time. Here the tile
of W is the left operand of the tensor core (64 or 128 rows), x the narrow right one, so a batch of 1 wastes little. Where there are fewer
tiles than SMs, W is cut along K too, and the program that finishes a tile last adds the parts, in a fixed order. A program asks for its
first weights (into L2) before it waits for the kernel that makes x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ksana_lab.layers.few_rows import PLAIN, SILU_MUL, TileConfig

_PREFETCH = 2  # tiles of W


@triton.jit
def prefetch_l2(address):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def finish(
    acc, acc_up, scale, y, partial, counters, tile, split, split_k, num_rows, n, stride_y,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Add the parts along K of a tile, apply scales of W's rows (None: there are none) and the gate, write."""
    row = tl.arange(0, ROWS)
    live = row < num_rows
    is_last = True
    if split_k > 1:
        HALVES: tl.constexpr = 2 if EPILOGUE == 1 else 1
        cell = tl.arange(0, BLOCK_N)[:, None] * ROWS + row[None, :]
        mine = partial + (tile * split_k + split).to(tl.int64) * (HALVES * BLOCK_N * ROWS) + cell
        tl.store(mine, acc, mask=live[None, :])
        if EPILOGUE == 1:
            tl.store(mine + BLOCK_N * ROWS, acc_up, mask=live[None, :])
        tl.debug_barrier()  # all threads' parts are written before one thread says so (release)
        is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == split_k - 1
        if is_last:
            tl.store(counters + tile, 0)
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            acc_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for other in tl.range(0, split_k):  # in a fixed order: the sum does not depend on who came last
                theirs = partial + (tile * split_k + other).to(tl.int64) * (HALVES * BLOCK_N * ROWS) + cell
                acc += tl.load(theirs, mask=live[None, :], other=0.0, cache_modifier=".cg")
                if EPILOGUE == 1:
                    acc_up += tl.load(theirs + BLOCK_N * ROWS, mask=live[None, :], other=0.0, cache_modifier=".cg")
    if is_last:
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if scale is not None:
            source = column if EVEN_N else tl.minimum(column, n - 1)
            acc *= tl.load(scale + source)[:, None]
            if EPILOGUE == 1:
                acc_up *= tl.load(scale + n + source)[:, None]
        if EPILOGUE == 1:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        mask = live[None, :] if EVEN_N else live[None, :] & (column < n)[:, None]
        tl.store(y + row.to(tl.int64)[None, :] * stride_y + column[:, None], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "split_k"])
def _linear_kernel(
    x, w, y, partial, counters, num_rows, n, k, stride_x, stride_y, split_k,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EPILOGUE: tl.constexpr,
    EVEN_N: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # n: columns of y. With SILU_MUL (EPILOGUE 1) W has 2 n rows, gate then up.
    tile = tl.program_id(0) // split_k
    split = tl.program_id(0) % split_k
    steps = k // BLOCK_K
    first = steps * split // split_k
    last = steps * (split + 1) // split_k
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    source = column if EVEN_N else tl.minimum(column, n - 1)
    inner = tl.arange(0, BLOCK_K)
    rows_w = w + source.to(tl.int64)[:, None] * k
    second = n.to(tl.int64) * k
    if PDL:
        gdc_launch_dependents()
        line = tl.arange(0, PREFETCH * BLOCK_K // 64) * 64  # 128 bytes
        ahead = rows_w + (first * BLOCK_K + line)[None, :]
        prefetch_l2(ahead.to(tl.int64, bitcast=True))
        if EPILOGUE == 1:
            prefetch_l2((ahead + second).to(tl.int64, bitcast=True))
        gdc_wait()

    row = tl.arange(0, ROWS)
    live = row < num_rows
    rows_x = x + row.to(tl.int64)[:, None] * stride_x
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    acc_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * BLOCK_K + inner
        tile_x = tl.load(rows_x + at[None, :], mask=live[:, None], other=0.0)
        acc = tl.dot(tl.load(rows_w + at[None, :]), tl.trans(tile_x), acc)
        if EPILOGUE == 1:
            acc_up = tl.dot(tl.load(rows_w + second + at[None, :]), tl.trans(tile_x), acc_up)

    finish(
        acc, acc_up, None, y, partial, counters, tile, split, split_k, num_rows, n, stride_y,
        ROWS=ROWS, BLOCK_N=BLOCK_N, EPILOGUE=EPILOGUE, EVEN_N=EVEN_N,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, config: TileConfig, counters: Tensor, epilogue: int = PLAIN, pdl: bool = False) -> Tensor:
    """As few_rows.linear; M <= config.rows, K a multiple of config.block_k. counters: few_rows.new_counters(N, …)."""
    num_rows, k = x.shape
    halves = 2 if epilogue == SILU_MUL else 1
    n = weight.shape[0] // halves
    assert num_rows <= config.rows and k % config.block_k == 0 and weight.is_contiguous() and x.stride(1) == 1, (x.shape, weight.shape)
    tiles = triton.cdiv(n, config.block_n)
    assert counters.numel() >= tiles, (counters.shape, tiles)
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    parts = tiles * config.split_k * halves * config.block_n * config.rows if config.split_k > 1 else 1
    partial = torch.empty(parts, dtype=torch.float32, device=x.device)
    _linear_kernel[(tiles * config.split_k,)](
        x, weight, out, partial, counters, num_rows, n, k, x.stride(0), out.stride(0), config.split_k,
        ROWS=config.rows, BLOCK_N=config.block_n, BLOCK_K=config.block_k, EPILOGUE=epilogue, EVEN_N=n % config.block_n == 0,
        PREFETCH=_PREFETCH, STAGES=config.stages, PDL=pdl, num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
