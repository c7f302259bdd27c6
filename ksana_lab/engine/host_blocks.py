"""Host memory for the KV of sequences that are swapped out, and the copies there and back. Knows blocks, not whose they are.

On CUDA the memory is pinned and copies are enqueued on the stream that computes, block by block, straight between cache and host. So they
need no memory of their own, and come after all that earlier steps do to a block and before all that later ones do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ksana_lab.config.engine import EngineConfig
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import ConfigError
from ksana_lab.layers.tp import TPGroup

log = logging.getLogger(__name__)

_MAX_SHARE = 0.9  # of the host memory that is available: what is pinned is lost to everything else
_CGROUP = Path("/sys/fs/cgroup")
# limit, use, name of what of it can be reclaimed: cgroup v2, v1
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def num_host_blocks(config: EngineConfig, layout: KVLayout) -> int:
    """How many blocks each rank keeps on the host; ``layout``: one rank's cache. Raises ConfigError when all ranks together would take
    more than nine tenths of the host memory that is available."""
    if config.scheduler.preemption_mode != "swap":
        return 0
    factor, num_ranks = config.cache.host_memory_factor, config.parallel.tensor_parallel_size
    num_blocks = int(factor * layout.num_blocks)
    if not num_blocks:
        log.info("no host blocks (block_host_memory_factor %g): preempted sequences are computed again", factor)
        return 0
    wanted, available = num_blocks * layout.block_bytes * num_ranks, available_host_bytes()
    if wanted > _MAX_SHARE * available:
        most = _MAX_SHARE * available / (layout.total_bytes * num_ranks)
        raise ConfigError(
            f"block_host_memory_factor {factor:g} asks for {wanted / 2**30:.1f} GiB of host memory ({num_ranks} x {num_blocks} blocks of "
            f"{layout.block_bytes} bytes), and {available / 2**30:.1f} GiB are available, of which at most {_MAX_SHARE:.0%} are used; "
            f"lower it to at most {int(most * 100) / 100:g}, lower ksana_lab.num_blocks, or set preempt_mode: 1 (recompute)"
        )
    return num_blocks


def available_host_bytes(cgroup: Path = _CGROUP) -> int:
    """What this process may still use: of the host, and of its control group where that has a limit."""
    available = psutil.virtual_memory().available
    for limit, use, stat, reclaimable in _LIMITS:
        try:
            most = int((cgroup / limit).read_text())  # "max": none
            used = int((cgroup / use).read_text())
            counts = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        available = min(available, most - used + int(counts.get(reclaimable, 0)))
    return max(0, available)


class HostBlocks:
    """One rank's. Owned by the thread that computes; ``copy`` never waits for the device."""

    def __init__(self, cache: Tensor, layout: KVLayout, num_blocks: int, tp: TPGroup) -> None:
        """``cache``: uint8 [layout.total_bytes], all zeros. Raises ConfigError when the memory cannot be pinned, or a block does not come
        back whole."""
        shape = (layout.num_blocks, layout.num_layers) if layout.order == "block_major" else (layout.num_layers, layout.num_blocks)
        cells = cache.view(*shape, layout.cell_bytes)
        by_block = cells if layout.order == "block_major" else cells.transpose(0, 1)
        self._cache, self._tp = by_block, tp
        self._host = torch.empty(num_blocks, *by_block.shape[1:], dtype=torch.uint8)
        self._is_pinned = False
        try:
            if cache.is_cuda:
                self._pin()
            self._prove()
        except BaseException:
            self.close()
            raise

    def copy(self, swap_out: list[tuple[int, int]], swap_in: list[tuple[int, int]]) -> None:
        """Enqueue copies of (device block, host block) out, then of (host block, device block) in."""
        for device, host, num in _runs(swap_out):
            self._host[host : host + num].copy_(self._cache[device : device + num], non_blocking=True)
        for host, device, num in _runs(swap_in):
            self._cache[device : device + num].copy_(self._host[host : host + num], non_blocking=True)

    def meet(self) -> None:
        """Enqueue a meeting of all ranks: what comes behind it on one comes behind what all have enqueued before. A step that computes
        needs none, the sums of its layers are such meetings."""
        if self._tp.size > 1:
            self._tp.all_reduce(torch.zeros(1, device=self._cache.device))

    def close(self) -> None:
        """Let go of the memory, once the device is done with it. May be called twice."""
        if self._is_pinned:
            self._is_pinned = False
            try:
                torch.cuda.synchronize(self._cache.device)
                torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())  # type: ignore[attr-defined]
            except RuntimeError as error:  # the device is lost, and the process with it
                log.warning("host blocks stay pinned: %s", error)
        self._host = self._cache = torch.empty(0, dtype=torch.uint8)

    def _pin(self) -> None:
        """Registered, not allocated by torch: its allocator of pinned memory rounds up to a power of two."""
        with torch.cuda.device(self._cache.device):
            status = int(torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), self._host.numel(), 0))  # type: ignore[attr-defined]
        if status:
            raise ConfigError(
                f"{self._host.numel() >> 20} MiB of host memory cannot be pinned (cudaHostRegister: error {status}); lower "
                "block_host_memory_factor, or set preempt_mode: 1 (recompute)"
            )
        self._is_pinned = True

    def _prove(self) -> None:
        """A block goes there and comes back, before anything depends on it; the cache is as before, zeros."""
        last, block = len(self._host) - 1, self._cache[0]
        pattern = (torch.arange(block.numel(), device=block.device) % 251).to(torch.uint8).view_as(block)
        block.copy_(pattern)
        self.copy([(0, last)], [])
        block.zero_()
        self.copy([], [(last, 0)])
        is_whole = torch.equal(block, pattern)
        block.zero_()
        if not is_whole:
            raise ConfigError(f"a KV block did not come back whole from the host memory of {block.device}; set preempt_mode: 1 (recompute)")


def _runs(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(source, target) blocks as (first source, first target, how many), consecutive ones together."""
    first: tuple[int, int] | None = None
    num = 0
    for source, target in pairs:
        if first is not None and (source, target) == (first[0] + num, first[1] + num):
            num += 1
            continue
        if first is not None:
            yield (*first, num)
        first, num = (source, target), 1
    if first is not None:
        yield (*first, num)
