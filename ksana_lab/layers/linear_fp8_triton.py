"""The Triton side of linear_fp8.py: x times 8-bit weights for few rows of x, and the quantisation of activations for many.

The first is linear_triton.py's kernel (tiles, parts along K, early start) with another product in the middle: weights must be widened in
registers, at twice as many a microsecond as 16-bit ones arrive, so that instructions for each weight decide, not bytes alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ksana_lab.layers.few_rows import PLAIN, SILU_MUL, TileConfig
from ksana_lab.layers.linear_triton import finish, prefetch_l2

_PREFETCH = 2  # tiles of W
_MAX_REGISTERS = {4: 168, 8: 128}  # by warps: three programs of four, or two of eight, fit into an SM's 65,536

# Four e4m3 to bf16: sign and seven bits move to where bf16 has them, which is 2^-120 times the number (of subnormal ones, too); the
# product undoes it. Triton's own conversion takes an F2F for each weight, 16 a clock and SM: fewer than memory brings. (NaN, which
# no weight is, would become 480.)
_WIDEN = tl.constexpr("""{
    .reg .b32 high, low, up, none;
    mov.b32 up, 0x7b807b80;
    mov.b32 none, 0x80008000;
    shr.u32 high, $2, 4;
    and.b32 high, high, 0x07070707;
    lop3.b32 high, $2, 0x80808080, high, 0xea;
    shl.b32 low, $2, 4;
    and.b32 low, low, 0xf0f0f0f0;
    prmt.b32 $0, low, high, 0x5140;
    prmt.b32 $1, low, high, 0x7362;
    fma.rn.bf16x2 $0, $0, up, none;
    fma.rn.bf16x2 $1, $1, up, none;
}""")


@triton.jit
def _widen(tile, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_WIDEN, "=&r,=&r,r", [tile], dtype=tl.bfloat16, is_pure=True, pack=4)
    return tile.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x, w, scale, y, partial, counters, num_rows, n, k, stride_x, stride_y,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, EPILOGUE: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, GROUPS: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # n: columns of y. With SILU_MUL (EPILOGUE 1) W has 2 n rows, gate then up.
    tile = tl.program_id(0) // SPLIT_K
    split = tl.program_id(0) % SPLIT_K
    steps = tl.cdiv(k, BLOCK_K)
    first = steps * split // SPLIT_K
    last = steps * (split + 1) // SPLIT_K
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    source = column if EVEN_N else tl.minimum(column, n - 1)
    rows_w = w + source.to(tl.int64)[:, None] * k
    second = n.to(tl.int64) * k
    if PDL:
        gdc_launch_dependents()
        line = first * BLOCK_K + tl.arange(0, PREFETCH * BLOCK_K // 128) * 128
        ahead = rows_w + tl.minimum(line, k - 1)[None, :]
        prefetch_l2(ahead.to(tl.int64, bitcast=True))
        if EPILOGUE == 1:
            prefetch_l2((ahead + second).to(tl.int64, bitcast=True))
        gdc_wait()

    # A batch of products, one for each warp: every weight and every x is widened and read by one warp only. (As one product its warps
    # would share W and repeat that work, or take the asynchronous tensor core, whose layout reads 8-bit weights two at a time.)
    inner = tl.arange(0, GROUPS)[:, None, None] * (BLOCK_K // GROUPS) + tl.arange(0, BLOCK_K // GROUPS)[None, None, :]
    row = tl.arange(0, ROWS)
    live = (row < num_rows)[None, :, None]
    rows_w = rows_w[None, :, :]
    rows_x = x + row.to(tl.int64)[None, :, None] * stride_x
    acc = tl.zeros([GROUPS, BLOCK_N, ROWS], tl.float32)
    acc_up = tl.zeros([GROUPS, BLOCK_N, ROWS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * BLOCK_K + inner
        mask_w = None if EVEN_K else at < k
        tile_x = tl.load(rows_x + at, mask=live if EVEN_K else live & mask_w, other=0.0)
        turned = tl.permute(tile_x, (0, 2, 1))
        acc = tl.dot(_widen(tl.load(rows_w + at, mask=mask_w), tile_x.dtype), turned, acc)
        if EPILOGUE == 1:
            acc_up = tl.dot(_widen(tl.load(rows_w + second + at, mask=mask_w), tile_x.dtype), turned, acc_up)
    finish(
        tl.sum(acc, 0), tl.sum(acc_up, 0), scale, y, partial, counters, tile, split, SPLIT_K, num_rows, n, stride_y,
        ROWS=ROWS, BLOCK_N=BLOCK_N, EPILOGUE=EPILOGUE, EVEN_N=EVEN_N,
    )  # fmt: skip


def few_rows_linear(
    x: Tensor, weight: Tensor, scale: Tensor, config: TileConfig, counters: Tensor, epilogue: int = PLAIN, pdl: bool = False
) -> Tensor:
    """x [M, K], M <= config.rows, weight [N, K] float8_e4m3fn (SILU_MUL: [2 N, K] = gate | up), scale of its rows, float32 -> [M, N] in
    x's dtype. counters: few_rows.new_counters(N, …)."""
    num_rows, k = x.shape
    halves = 2 if epilogue == SILU_MUL else 1
    n = weight.shape[0] // halves
    assert num_rows <= config.rows and weight.is_contiguous() and x.stride(1) == 1, (x.shape, x.stride(), weight.shape)
    tiles = triton.cdiv(n, config.block_n)
    assert counters.numel() >= tiles, (counters.shape, tiles)
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    parts = tiles * config.split_k * halves * config.block_n * config.rows if config.split_k > 1 else 1
    partial = torch.empty(parts, dtype=torch.float32, device=x.device)
    _few_rows_kernel[(tiles * config.split_k,)](
        x, weight, scale, out, partial, counters, num_rows, n, k, x.stride(0), out.stride(0),
        ROWS=config.rows, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT_K=config.split_k, EPILOGUE=epilogue,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0, GROUPS=config.num_warps, PREFETCH=_PREFETCH,
        STAGES=config.stages, PDL=pdl, num_warps=config.num_warps, maxnreg=_MAX_REGISTERS[config.num_warps],
        **({"launch_pdl": True} if pdl else {}),
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
