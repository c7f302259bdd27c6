"""Which kernel multiplies the few rows of a decode step, where reading the weights is the whole cost.

Plain decisions, no GPU needed; measured on an H200 with the shapes of Qwen3-8B and 0.6B inside whole captured steps (docs/LOG.md,
2026-11-22). cuBLAS is as good or better from 33 rows on, and for small weights; ``choose`` then returns None."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROW_CLASSES = (1, 8, 16, 32)  # numbers of rows that one kernel serves end here; captured batch sizes do not straddle them
PLAIN, SILU_MUL = 0, 1  # y = x W^T; or silu(x G^T) * (x U^T) with W = G | U stacked


@dataclass(frozen=True)
class TileConfig:
    """layers/linear_triton.py, and linear_fp8_triton.py: W in tiles of block_n rows, each cut into split_k parts along K."""

    rows: int  # of x, padded
    block_n: int  # rows of W in a tile (of each half with SILU_MUL)
    block_k: int
    split_k: int
    stages: int
    num_warps: int = 4


@dataclass(frozen=True)
class StreamConfig:
    """layers/linear_hopper.py: one program an SM, W streams through a ring in shared memory."""

    rows: int
    block_n: int = 64
    block_k: int = 128
    ring_kib: int = 190


def choose(num_rows: int, n: int, k: int, epilogue: int, num_sms: int, has_hopper_kernel: bool) -> TileConfig | StreamConfig | None:
    """For y [num_rows, n] of x [num_rows, k]; n counts columns of y. None: cuBLAS (and a kernel of its own for the gate)."""
    if num_rows > 32 or k % 256 or n % 128:
        return None
    if epilogue == SILU_MUL:
        return TileConfig(16 if num_rows <= 16 else 32, 128, 128, 1, 3) if n >= 8192 and num_rows > 1 else None
    if num_rows <= 8 and has_hopper_kernel and k >= 2048:
        return StreamConfig(8)
    if num_rows <= 16:
        if n >= 65536:
            return TileConfig(16, 64, 128, 1, 4)
        if k < 4096:
            return None
        tiles = n // 64
        split = 1 if tiles > 0.7 * num_sms else min(num_sms // tiles, k // 256)  # no cut where most SMs have a tile anyway
        return TileConfig(16, 64, 256, split, 3)
    if n >= 65536:
        return TileConfig(32, 64, 128, 1, 4)
    return TileConfig(32, 64, 128, 4, 4) if k >= 8192 else None


def choose_fp8(num_rows: int, n: int, k: int, epilogue: int, num_sms: int) -> TileConfig:
    """As ``choose``, for W of 8 bits and at most 32 rows. Any n; k a multiple of 16.

    Weights are widened by the warps that multiply, so an SM needs many of them: programs of four warps, three on an SM, cut along K until
    all run at once. Of the cuts that ``bench kernels --only fp8`` compares, the fastest on an H200 at 8, 16 and 32 rows (docs/LOG.md)."""
    rows = next(rows for rows in ROW_CLASSES if rows >= max(num_rows, 8))
    if epilogue == SILU_MUL:
        config = TileConfig(rows, 32, 256, 1, 4 if rows <= 16 else 3)
    else:
        config = {8: TileConfig(8, 64, 256, 1, 4), 16: TileConfig(16, 32, 512, 1, 3), 32: TileConfig(32, 32, 256, 1, 4)}[rows]
    return cut_evenly(config, n, k, 3 * num_sms)


def cut_evenly(config: TileConfig, n: int, k: int, programs: int) -> TileConfig:
    """With split_k the most parts of one length, up to 16, for which there are no more than so many programs."""
    tiles, steps = -(-n // config.block_n), -(-k // config.block_k)
    parts = [parts for parts in range(1, min(steps, 16) + 1) if steps % parts == 0 and tiles * parts <= programs]
    return replace(config, split_k=max(parts, default=1))


class Chosen:
    """A layer's own kernels, as start_up.py found them right and fast. ``config`` is None where cuBLAS does it."""

    def __init__(self, by_class: Mapping[int, TileConfig | StreamConfig], counters: Tensor, pdl: bool) -> None:
        self._by_class, self._counters, self._pdl = dict(by_class), counters, pdl

    def config(self, num_rows: int) -> TileConfig | StreamConfig | None:
        at = bisect_left(ROW_CLASSES, num_rows)
        return self._by_class.get(ROW_CLASSES[at]) if at < len(ROW_CLASSES) else None

    def run(self, x: Tensor, weight: Tensor, epilogue: int = PLAIN) -> Tensor | None:
        """As ``linear``; None where there is no kernel for so many rows."""
        config = self.config(x.shape[0])
        return None if config is None else linear(x, weight, config, self._counters, epilogue, self._pdl)


def new_counters(n: int, device: torch.device) -> Tensor:
    """What a layer keeps for its kernels: int32, one for each of the narrowest tiles, zero between launches. Launches that share it must
    follow one another."""
    return torch.zeros(-(-n // 32), dtype=torch.int32, device=device)


def has_hopper_kernel() -> bool:
    """Compute capability 9, and a Triton whose Gluon dialect is the one that layers/linear_hopper.py is written in."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    import triton

    return triton.__version__.startswith("3.6.")


def linear(
    x: Tensor, weight: Tensor, config: TileConfig | StreamConfig, counters: Tensor, epilogue: int = PLAIN, pdl: bool = True
) -> Tensor:
    """x [M, K], weight [N, K] (SILU_MUL: [2 N, K] = gate | up), both contiguous in K -> [M, N]."""
    if isinstance(config, StreamConfig):
        from ksana_lab.layers import linear_hopper

        return linear_hopper.linear(x, weight, config, counters, epilogue, pdl)
    from ksana_lab.layers import linear_triton

    return linear_triton.linear(x, weight, config, counters, epilogue, pdl)
