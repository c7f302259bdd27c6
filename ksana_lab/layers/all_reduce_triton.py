"""Sums over the GPUs of one host through each other's memory: in one step (two kernels: the first for the smallest messages), or in two.

Every rank *writes* to its peers and reads only its own memory. A message is cut into chunks, one a program, and program b of a rank meets
program b of the others and nobody else: it has its own places in every memory, its own flags, and its own count of calls (the epoch).

Order without a fence between calls: a place is written in every second call of the program (by the epoch's parity). Before a rank writes
a place again it has met every peer in the call between, and a peer came there only after it had read the place. Epochs count on the device,
so a replayed graph goes on where the call before stopped. Flags hold epochs and are never reset; they are compared by their difference,
which survives 2**31 calls.

Every rank adds in rank order, in float32, and rounds once: the sums are the same to the bit on all of them. The last kernel also adds
the sum to the residual and normalises it.

A wait is bounded: after ``most_looks`` looks, or when the word behind the table says so, a program gives up and writes 1 to that word,
which the host reads (all_reduce.py). What it then computes is worthless."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ksana_lab.layers import all_reduce_plan as plan

PROGRAMS = tl.constexpr(plan.PROGRAMS)
FLAG_WORDS = tl.constexpr(plan.FLAG_BYTES // 4)
_LOOKS_PER_WORD = tl.constexpr(1024)  # flags are looked at in L2, the word across the host's bus


@triton.jit
def _pointer(table, rank, offset, like):
    """Typed as ``like``: byte ``offset`` of a rank's memory."""
    return tl.multiple_of(tl.cast(tl.load(table + rank) + offset, like.dtype), 16)


@triton.jit
def _meet(table, which, program, epoch, most_looks, RANK: tl.constexpr, WORLD: tl.constexpr):
    """What this program wrote before is seen by its fellows on all ranks after it, and the other way round."""
    tl.debug_barrier()  # all threads have written before one of them says so (release)
    rank = tl.arange(0, WORLD)
    cell = (which * PROGRAMS + program) * FLAG_WORDS
    theirs = tl.cast(tl.load(table + rank), tl.pointer_type(tl.int32)) + (cell + RANK)
    tl.atomic_xchg(theirs, tl.zeros([WORLD], tl.int32) + epoch, sem="release", scope="sys")
    mine = tl.cast(tl.load(table + RANK), tl.pointer_type(tl.int32)) + (cell + rank)
    word = tl.cast(tl.load(table + WORLD), tl.pointer_type(tl.int32))
    behind = tl.min(tl.load(mine, volatile=True) - epoch, 0)
    looks = 0
    while (behind < 0) & (looks < most_looks):
        behind = tl.min(tl.load(mine, volatile=True) - epoch, 0)
        looks += 1
        if looks % _LOOKS_PER_WORD == 0:  # noqa: SIM102
            if tl.load(word, volatile=True) != 0:
                looks = most_looks
    if behind < 0:
        tl.store(word, 1)
    tl.atomic_add(mine, tl.zeros([WORLD], tl.int32), sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["most_looks"])
def one_shot(
    x, table, epochs, n, chunk, area, region, most_looks,
    RANK: tl.constexpr, WORLD: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # x [n], summed in place; chunk elements a program. Memory behind byte ``area``: [2 parities, WORLD - 1 senders, PROGRAMS, region].
    if PDL:  # the next kernel may come near, this one has come early: nothing is touched before the one ahead has ended
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    lane = tl.arange(0, TILE)
    begin = program * chunk
    count = tl.minimum(n - begin, chunk)
    parity = (epoch & 1) * (WORLD - 1)
    for step in tl.static_range(1, WORLD):
        # The peer step ranks on, so that not everybody writes to rank 0 first; there, senders are numbered by their distance, less 1.
        inbox = _pointer(table, (RANK + step) % WORLD, area, x) + ((parity + WORLD - step - 1) * PROGRAMS + program) * region
        for start in range(0, count, TILE):
            at = start + lane
            tl.store(inbox + at, tl.load(x + begin + at, mask=at < count), mask=at < count)
    _meet(table, 0, program, epoch, most_looks, RANK, WORLD)
    mine = _pointer(table, RANK, area, x)
    for start in range(0, count, TILE):
        at = start + lane
        total = tl.zeros([TILE], tl.float32)
        for rank in tl.static_range(WORLD):
            if rank == RANK:
                piece = tl.load(x + begin + at, mask=at < count)
            else:
                inbox = mine + ((parity + (rank - RANK + WORLD) % WORLD - 1) * PROGRAMS + program) * region
                piece = tl.load(inbox + at, mask=at < count, cache_modifier=".cg")
            total += piece.to(tl.float32)
        tl.store(x + begin + at, total.to(x.dtype.element_ty), mask=at < count)
    tl.store(epochs + program, epoch)


@triton.jit(do_not_specialize=["most_looks"])
def two_shot(
    x, table, epochs, n, share, area, region, most_looks,
    RANK: tl.constexpr, WORLD: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # As above; a chunk is a share for each rank, which sums it for all. Memory: [2 parities, in | sums, WORLD ranks, PROGRAMS, region].
    if PDL:  # the next kernel may come near, this one has come early: nothing is touched before the one ahead has ended
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    lane = tl.arange(0, TILE)
    begin = program * share * WORLD
    parity = (epoch & 1) * (2 * WORLD)
    mine = _pointer(table, RANK, area, x)
    for step in tl.static_range(1, WORLD):
        peer = (RANK + step) % WORLD
        first = begin + peer * share
        count = tl.minimum(n - first, share)
        inbox = _pointer(table, peer, area, x) + ((parity + RANK) * PROGRAMS + program) * region
        for start in range(0, count, TILE):
            at = start + lane
            tl.store(inbox + at, tl.load(x + first + at, mask=at < count), mask=at < count)
    _meet(table, 1, program, epoch, most_looks, RANK, WORLD)
    first = begin + RANK * share
    count = tl.minimum(n - first, share)
    for start in range(0, count, TILE):
        at = start + lane
        total = tl.zeros([TILE], tl.float32)
        for rank in tl.static_range(WORLD):
            if rank == RANK:
                piece = tl.load(x + first + at, mask=at < count)
            else:
                piece = tl.load(mine + ((parity + rank) * PROGRAMS + program) * region + at, mask=at < count, cache_modifier=".cg")
            total += piece.to(tl.float32)
        piece = total.to(x.dtype.element_ty)
        tl.store(x + first + at, piece, mask=at < count)
        for step in tl.static_range(1, WORLD):
            peer = (RANK + step) % WORLD
            sums = _pointer(table, peer, area, x) + ((parity + WORLD + RANK) * PROGRAMS + program) * region
            tl.store(sums + at, piece, mask=at < count)
    _meet(table, 2, program, epoch, most_looks, RANK, WORLD)
    for step in tl.static_range(1, WORLD):
        peer = (RANK + step) % WORLD
        first = begin + peer * share
        count = tl.minimum(n - first, share)
        sums = mine + ((parity + WORLD + peer) * PROGRAMS + program) * region
        for start in range(0, count, TILE):
            at = start + lane
            tl.store(x + first + at, tl.load(sums + at, mask=at < count, cache_modifier=".cg"), mask=at < count)
    tl.store(epochs + program, epoch)


@triton.jit
def _halves(word, DTYPE: tl.constexpr):
    """word int32: two numbers of 16 bits -> (first, second) float32; or one of 32 bits, and no second."""
    if DTYPE.primitive_bitwidth == 16:
        first = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    else:
        first = word.to(tl.float32, bitcast=True)
        second = first
    return first, second


@triton.jit
def _word(first, second, DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 16:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low | (second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        word = first.to(tl.int32, bitcast=True)
    return word


@triton.jit
def _sum_of_words(
    own, at, live, table, program, epoch, area, region, most_looks, RANK: tl.constexpr, WORLD: tl.constexpr, DTYPE: tl.constexpr
):
    """own int32, this rank's words (``_halves``) -> their sums over the ranks, (first, second) float32, not rounded.

    Words travel with the epoch in one store of 8 bytes, which arrives whole (as NCCL's LL protocol has it): no fence, no flag behind.
    Memory behind byte ``area``: [2 parities, WORLD - 1 senders, PROGRAMS, region] of 8 bytes."""
    parity = (epoch & 1) * (WORLD - 1)
    for step in tl.static_range(1, WORLD):
        memory = tl.cast(tl.load(table + (RANK + step) % WORLD) + area, tl.pointer_type(tl.int64))
        inbox = tl.multiple_of(memory, 16) + ((parity + WORLD - step - 1) * PROGRAMS + program) * region
        # Here, not before the loop: then the address is on its way while the words are, and not asked for after them.
        packed = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
        tl.store(inbox + at, packed, mask=live)
    mine = tl.multiple_of(tl.cast(tl.load(table + RANK) + area, tl.pointer_type(tl.int64)), 16)
    word = tl.cast(tl.load(table + WORLD), tl.pointer_type(tl.int32))
    first = tl.zeros(own.shape, tl.float32)
    second = tl.zeros(own.shape, tl.float32)
    for rank in tl.static_range(WORLD):
        if rank == RANK:
            a, b = _halves(own, DTYPE)
        else:
            inbox = mine + ((parity + (rank - RANK + WORLD) % WORLD - 1) * PROGRAMS + program) * region
            got = tl.load(inbox + at, mask=live, other=0, volatile=True)
            is_late = tl.max((live & ((got >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)
            looks = 0
            while (is_late != 0) & (looks < most_looks):
                got = tl.load(inbox + at, mask=live, other=0, volatile=True)
                is_late = tl.max((live & ((got >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)
                looks += 1
                if looks % _LOOKS_PER_WORD == 0:  # noqa: SIM102
                    if tl.load(word, volatile=True) != 0:
                        looks = most_looks
            if is_late != 0:
                tl.store(word, 1)
            a, b = _halves(got.to(tl.int32), DTYPE)
        first += a
        second += b
    return first, second


@triton.jit(do_not_specialize=["most_looks"])
def ll(
    x, table, epochs, n, chunk, area, region, most_looks,
    RANK: tl.constexpr, WORLD: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # x [n] int32, each word two numbers of 16 bits or one of 32; a tile a program.
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    at = tl.arange(0, TILE)
    begin = program * chunk
    live = at < tl.minimum(n - begin, chunk)
    own = tl.load(x + begin + at, mask=live, other=0)
    first, second = _sum_of_words(own, at, live, table, program, epoch, area, region, most_looks, RANK, WORLD, DTYPE)
    tl.store(x + begin + at, _word(first, second, DTYPE), mask=live)
    tl.store(epochs + program, epoch)


@triton.jit(do_not_specialize=["most_looks"])
def ll_norm(
    x, residual, weight, out, table, epochs, hidden, words, eps, area, region, most_looks,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # x [rows, words] int32, each word two numbers of 16 bits; residual, out [rows, hidden] of DTYPE; a row a program. As ll and then
    # add_rms_norm of fused_triton.py would do it, to the bit: rounded where they round, its numbers in the same places of the same number
    # of threads, on which the order of a row's sum depends.
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    live = column < hidden
    at = tl.arange(0, BLOCK // 2)
    live_words = at < words
    w = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)  # a parameter: need not wait for the kernel before
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    epoch = tl.load(epochs + row) + 1
    own = tl.load(x + row * words + at, mask=live_words, other=0)
    before = tl.load(residual + row * hidden + column, mask=live, other=0.0).to(tl.float32)
    first, second = _sum_of_words(own, at, live_words, table, row, epoch, area, region, most_looks, RANK, WORLD, DTYPE)
    total = tl.interleave(first, second).to(DTYPE).to(tl.float32)
    rounded = (total + before).to(DTYPE)
    tl.store(residual + row * hidden + column, rounded, mask=live)
    y = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 0) / hidden + eps)
    tl.store(out + row * hidden + column, (y * scale * w).to(DTYPE), mask=live)
    tl.store(epochs + row, epoch)


KERNELS = {plan.LL: ll, plan.ONE_SHOT: one_shot, plan.TWO_SHOT: two_shot}
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
