"""Many small copies between two address spaces a GPU can reach, as one kernel launch.

Why a kernel: a peer copy of thousands of 64 KiB fragments through the copy engines pays microseconds for each fragment; threads that
read local memory and write the peer's over NVLink do not. Its price is the SMs it occupies while prefill runs, so the number of
programs is bounded (``num_programs``): see docs/LOG.md for the trade-off measured."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

PIECE_BYTES = 32768  # one program's unit of work
WORD = 8  # bytes; every offset and size must be a multiple of 16 for full-width accesses


@triton.jit(do_not_specialize=["num_pieces"])  # one compilation, made when a pair connects
def _copy_pieces(src_base, dst_base, table, num_pieces, BLOCK: tl.constexpr):
    piece = tl.program_id(0)
    step = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    while piece < num_pieces:
        src = tl.multiple_of(tl.load(table + piece * 3), 16)
        dst = tl.multiple_of(tl.load(table + piece * 3 + 1), 16)
        words = tl.load(table + piece * 3 + 2)
        from_ptr = tl.cast(src_base + src, tl.pointer_type(tl.int64))
        to_ptr = tl.cast(dst_base + dst, tl.pointer_type(tl.int64))
        for start in range(0, words, BLOCK):
            index = start + lanes
            mask = index < words
            tl.store(to_ptr + index, tl.load(from_ptr + index, mask=mask, other=0), mask=mask)
        piece += step


def pieces(copies: np.ndarray) -> np.ndarray:
    """[N, 3] int64 (src, dst, nbytes) -> [M, 3] int64 (src, dst, words) of at most PIECE_BYTES each."""
    counts = -(-copies[:, 2] // PIECE_BYTES)
    row = np.repeat(np.arange(len(copies)), counts)
    first = np.cumsum(counts) - counts
    offset = (np.arange(len(row)) - first[row]) * PIECE_BYTES
    out = np.empty((len(row), 3), np.int64)
    out[:, 0] = copies[row, 0] + offset
    out[:, 1] = copies[row, 1] + offset
    out[:, 2] = np.minimum(copies[row, 2] - offset, PIECE_BYTES) // WORD
    return out


def launch(
    src_base: int, dst_base: int, table: torch.Tensor, num_pieces: int, num_programs: int, *, block: int = 2048, warps: int = 8
) -> None:
    """Enqueue on the current stream. ``table``: int64 [>= num_pieces, 3] on the source's device, as ``pieces`` makes it."""
    _copy_pieces[(min(num_programs, num_pieces),)](src_base, dst_base, table, num_pieces, BLOCK=block, num_warps=warps)
