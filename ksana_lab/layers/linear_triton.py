"""y = x W^T for few rows of x: a step of decoding, where reading W is the whole cost.

cuBLAS reaches about 3.6 TB/s here at large layers and much less at small ones. This kernel cuts W [N, K] into tiles of rows and, so that
every SM has an equal share, also along K; the program that finishes a tile last adds the parts. The tile of W is the left operand of the
tensor core (64 or 128 rows), x the narrow right one, so a batch of 1 wastes little. A program asks for its first weights (into L2) before
it waits for the kernel that makes x: with programmatic dependent launch the weights stream while the predecessor drains.

Epilogues: add a residual; or silu(gate) * up of the two halves of W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PLAIN, SILU_MUL = 0, 1


@dataclass(frozen=True)
class LinearConfig:
    rows: int  # BLOCK_M: rows of x, padded
    block_n: int  # rows of W in a tile (of each half with SILU_MUL)
    block_k: int
    split_k: int
    stages: int
    num_warps: int = 4
    prefetch: int = 2  # tiles of W asked for before waiting


@triton.jit
def _prefetch_l2(address):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["num_rows", "split_k"])
def _linear_kernel(
    x, w, residual, y, partial, arrived, num_rows, n, k, stride_x, stride_y, stride_residual, split_k,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EPILOGUE: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN_N: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # n: columns of y. With SILU_MUL W has 2 n rows, gate then up.
    tile = tl.program_id(0) // split_k
    split = tl.program_id(0) % split_k
    steps = k // BLOCK_K
    first = steps * split // split_k
    last = steps * (split + 1) // split_k
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    source = column if EVEN_N else tl.minimum(column, n - 1)
    inner = tl.arange(0, BLOCK_K)
    rows_w = w + source.to(tl.int64)[:, None] * k
    SECOND = n.to(tl.int64) * k
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            line = tl.arange(0, PREFETCH * BLOCK_K // 64) * 64  # 128 bytes
            ahead = rows_w + (first * BLOCK_K + line)[None, :]
            _prefetch_l2(ahead.to(tl.int64, bitcast=True))
            if EPILOGUE == 1:
                _prefetch_l2((ahead + SECOND).to(tl.int64, bitcast=True))
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
            acc_up = tl.dot(tl.load(rows_w + SECOND + at[None, :]), tl.trans(tile_x), acc_up)

    is_last = True
    if split_k > 1:
        HALVES: tl.constexpr = 2 if EPILOGUE == 1 else 1
        cell = tl.arange(0, BLOCK_N)[:, None] * ROWS + row[None, :]
        mine = partial + (tile * split_k + split).to(tl.int64) * (HALVES * BLOCK_N * ROWS) + cell
        tl.store(mine, acc, mask=live[None, :])
        if EPILOGUE == 1:
            tl.store(mine + BLOCK_N * ROWS, acc_up, mask=live[None, :])
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == split_k - 1
        if is_last:
            tl.store(arrived + tile, 0)
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            acc_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for other in tl.range(0, split_k):  # in a fixed order: the sum does not depend on who came last
                theirs = partial + (tile * split_k + other).to(tl.int64) * (HALVES * BLOCK_N * ROWS) + cell
                acc += tl.load(theirs, mask=live[None, :], other=0.0, cache_modifier=".cg")
                if EPILOGUE == 1:
                    acc_up += tl.load(theirs + BLOCK_N * ROWS, mask=live[None, :], other=0.0, cache_modifier=".cg")
    if is_last:
        if EPILOGUE == 1:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        mask = live[None, :] if EVEN_N else live[None, :] & (column < n)[:, None]
        if RESIDUAL:
            acc += tl.load(residual + row.to(tl.int64)[None, :] * stride_residual + column[:, None], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row.to(tl.int64)[None, :] * stride_y + column[:, None], acc.to(y.dtype.element_ty), mask=mask)


class LinearWorkspace:
    """Memory for the parts of split sums. One per stream: launches that share it must follow one another."""

    def __init__(self, device: torch.device, partial_bytes: int = 64 << 20, tiles: int = 16384):
        self.partial = torch.empty(partial_bytes // 4, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    config: LinearConfig,
    workspace: LinearWorkspace,
    residual: Tensor | None = None,
    epilogue: int = PLAIN,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """x [M, K] (M <= config.rows), weight [N, K] contiguous -> [M, N]; plus residual [M, N], which may be ``out``.
    With SILU_MUL weight is [2 N, K] = gate | up and the result silu(x gate^T) * (x up^T)."""
    num_rows, k = x.shape
    n = weight.shape[0] // (2 if epilogue == SILU_MUL else 1)
    assert num_rows <= config.rows and k % config.block_k == 0 and weight.is_contiguous(), (x.shape, weight.shape, config)
    if out is None:
        out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(n, config.block_n)
    _linear_kernel[(tiles * config.split_k,)](
        x, weight, residual, out, workspace.partial, workspace.arrived, num_rows, n, k,
        x.stride(0), out.stride(0), residual.stride(0) if residual is not None else 0, config.split_k,
        ROWS=config.rows, BLOCK_N=config.block_n, BLOCK_K=config.block_k, EPILOGUE=epilogue, RESIDUAL=residual is not None,
        EVEN_N=n % config.block_n == 0, PREFETCH=config.prefetch, STAGES=config.stages, PDL=pdl,
        num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
