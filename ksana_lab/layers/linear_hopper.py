"""y = x W^T for up to eight rows of x, on Hopper: weights stream into shared memory while the kernel that makes x still runs.

A matrix product of 10 us loses a third of its time to starting: launch, first bytes, last sums. Here every SM has one program with a ring
of shared memory of nearly all its size. One warp fills it through the tensor memory accelerator; it starts before the kernel ahead has
ended (programmatic dependent launch) and waits for that kernel only before it asks for x. Four warps multiply. The programs share W to the
byte: W [N, K] is cut into units of block_n x block_k, and program p takes the p-th part of the row of all units, whatever tiles it falls
into ("stream-K", Osama et al. 2023). Parts of one tile meet in float32 in memory; the program that comes last adds them in a fixed order.

Written in Gluon, whose interface Triton calls experimental: few_rows.has_hopper_kernel() says for which version this is."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ksana_lab.layers.few_rows import PLAIN, SILU_MUL, StreamConfig

_NUM_WARPS = 4  # that multiply


@gluon.jit
def _holder(unit, units, programs):
    """The program that holds a unit: program p begins at floor(units * p / programs)."""
    return ((unit + 1) * programs - 1) // units


@gluon.jit
def _ask_for_w(w, w_ring, full, unit, index, steps, n, STAGES: gl.constexpr, HALVES: gl.constexpr, X_BYTES: gl.constexpr):
    slot = index % STAGES
    BLOCK_N: gl.constexpr = w.block_type.shape[0]
    BLOCK_K: gl.constexpr = w.block_type.shape[1]
    mbarrier.expect(full.index(slot), HALVES * w.block_type.nbytes + X_BYTES)
    for half in gl.static_range(HALVES):
        where = [half * n + unit // steps * BLOCK_N, unit % steps * BLOCK_K]
        tma.async_copy_global_to_shared(w, where, full.index(slot), w_ring.index(slot * HALVES + half))


@gluon.jit
def _ask_for_x(x, x_ring, full, unit, index, steps, STAGES: gl.constexpr):
    slot = index % STAGES
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    tma.async_copy_global_to_shared(x, [0, unit % steps * BLOCK_K], full.index(slot), x_ring.index(slot))


@gluon.jit
def _fill(w, x, w_ring, x_ring, full, empty, begin, end, steps, n, STAGES: gl.constexpr, HALVES: gl.constexpr, PDL: gl.constexpr):
    X_BYTES: gl.constexpr = x.block_type.nbytes
    count = end - begin
    ahead = gl.minimum(count, STAGES)
    for i in range(ahead):  # weights do not depend on the kernel before
        _ask_for_w(w, w_ring, full, begin + i, i, steps, n, STAGES, HALVES, X_BYTES)
    if PDL:
        gdc_wait()
    for i in range(ahead):
        _ask_for_x(x, x_ring, full, begin + i, i, steps, STAGES)
    for i in range(ahead, count):
        mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)
        _ask_for_w(w, w_ring, full, begin + i, i, steps, n, STAGES, HALVES, X_BYTES)
        _ask_for_x(x, x_ring, full, begin + i, i, steps, STAGES)


@gluon.jit
def _write(
    acc, acc_up, y, tile, num_rows, n, stride_y,
    HALVES: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, EVEN_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    column = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    mask = (row < num_rows)[None, :]
    if not EVEN_N:
        mask = mask & (column < n)[:, None]
    if HALVES == 2:
        acc = acc / (1.0 + gl.exp(-acc)) * acc_up
    gl.store(y + row.to(gl.int64)[None, :] * stride_y + column[:, None], acc.to(y.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(
    w_ring, x_ring, full, empty, begin, end, steps, y, partial, counters, num_rows, n, stride_y, units,
    STAGES: gl.constexpr, HALVES: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, EVEN_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    SLOT: gl.constexpr = HALVES * BLOCK_N * ROWS
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    lane = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    cell = lane[:, None] * ROWS + row[None, :]
    live = (row < num_rows)[None, :] & (lane >= 0)[:, None]
    entered = begin // steps
    left = (end - 1) // steps
    for tile in range(entered, left + 1):
        acc = gl.zeros([BLOCK_N, ROWS], gl.float32, layout)
        acc_up = gl.zeros([BLOCK_N, ROWS], gl.float32, layout)
        start = gl.maximum(begin, tile * steps) - begin
        stop = gl.minimum(end, (tile + 1) * steps) - begin
        for i in range(start, stop):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            tile_x = x_ring.index(slot).permute((1, 0))
            if HALVES == 2:
                acc = warpgroup_mma(w_ring.index(slot * 2), tile_x, acc, is_async=True)
                acc_up = warpgroup_mma(w_ring.index(slot * 2 + 1), tile_x, acc_up, is_async=True)
                acc, acc_up = warpgroup_mma_wait(0, (acc, acc_up))
            else:
                acc = warpgroup_mma(w_ring.index(slot), tile_x, acc, is_async=True)
                acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(empty.index(slot), count=1)
        if _holder(tile * steps, units, programs) != _holder(tile * steps + steps - 1, units, programs):
            mine = partial + (program * 2 + (tile != entered).to(gl.int32)).to(gl.int64) * SLOT + cell
            gl.store(mine, acc, mask=live)
            if HALVES == 2:
                gl.store(mine + BLOCK_N * ROWS, acc_up, mask=live)
        else:
            _write(acc, acc_up, y, tile, num_rows, n, stride_y, HALVES, BLOCK_N, ROWS, EVEN_N, layout)

    # Only a program's first and last tile can be shared. All programs end at about the same time, so nobody waits for this.
    gl.thread_barrier()  # all of the program's parts are written before one thread says so (release)
    for which in gl.static_range(2):
        tile = entered if which == 0 else left
        first = _holder(tile * steps, units, programs)
        last = _holder(tile * steps + steps - 1, units, programs)
        if (first != last) & ((which == 0) | (entered != left)):  # noqa: SIM102
            if gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == last - first:
                gl.store(counters + tile, 0)
                acc = gl.zeros([BLOCK_N, ROWS], gl.float32, layout)
                acc_up = gl.zeros([BLOCK_N, ROWS], gl.float32, layout)
                for other in range(first, last + 1):
                    is_second = (units * other // programs) // steps != tile
                    theirs = partial + (other * 2 + is_second.to(gl.int32)).to(gl.int64) * SLOT + cell
                    acc += gl.load(theirs, mask=live, other=0.0, cache_modifier=".cg")
                    if HALVES == 2:
                        acc_up += gl.load(theirs + BLOCK_N * ROWS, mask=live, other=0.0, cache_modifier=".cg")
                _write(acc, acc_up, y, tile, num_rows, n, stride_y, HALVES, BLOCK_N, ROWS, EVEN_N, layout)


@gluon.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    w, x, y, partial, counters, num_rows, n, k, stride_y,
    HALVES: gl.constexpr, EVEN_N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # n: columns of y. With HALVES 2 W has 2 n rows, gate then up.
    BLOCK_N: gl.constexpr = w.block_type.shape[0]
    BLOCK_K: gl.constexpr = w.block_type.shape[1]
    ROWS: gl.constexpr = x.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, ROWS, 16])
    if PDL:
        gdc_launch_dependents()
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * HALVES, BLOCK_N, BLOCK_K], w.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, BLOCK_K], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    steps = k // BLOCK_K
    units = gl.cdiv(n, BLOCK_N) * steps
    begin = units * gl.program_id(0) // gl.num_programs(0)
    end = units * (gl.program_id(0) + 1) // gl.num_programs(0)
    gl.warp_specialize([
        (_multiply, (w_ring, x_ring, full, empty, begin, end, steps, y, partial, counters, num_rows, n, stride_y, units,
                     STAGES, HALVES, BLOCK_N, ROWS, EVEN_N, layout)),
        (_fill, (w, x, w_ring, x_ring, full, empty, begin, end, steps, n, STAGES, HALVES, PDL)),
    ], [1], [24])  # fmt: skip


def linear(x: Tensor, weight: Tensor, config: StreamConfig, counters: Tensor, epilogue: int = PLAIN, pdl: bool = False) -> Tensor:
    """As few_rows.linear; bfloat16, M <= config.rows, K a multiple of config.block_k. counters: few_rows.new_counters(N, …)."""
    num_rows, k = x.shape
    halves = 2 if epilogue == SILU_MUL else 1
    n = weight.shape[0] // halves
    assert num_rows <= config.rows and k % config.block_k == 0 and weight.is_contiguous() and x.stride(1) == 1, (x.shape, weight.shape)
    tiles = triton.cdiv(n, config.block_n)
    assert counters.numel() >= tiles, (counters.shape, tiles)
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(tiles * (k // config.block_k), num_sms)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs * 2 * halves * config.block_n * config.rows, dtype=torch.float32, device=x.device)
    _linear_kernel[(programs,)](
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [config.block_n, config.block_k], layout),
        TensorDescriptor(x, [num_rows, k], [x.stride(0), 1], [config.rows, config.block_k], layout),
        out, partial, counters, num_rows, n, k, out.stride(0),
        HALVES=halves, EVEN_N=n % config.block_n == 0, PDL=pdl,
        STAGES=(config.ring_kib << 10) // (2 * config.block_k * (halves * config.block_n + config.rows)),
        num_warps=_NUM_WARPS, maxnreg=128, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
