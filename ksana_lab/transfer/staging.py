"""Pinned host memory between a GPU's cache and a backend that moves host bytes: gathered into on the way out, scattered from on the way
in. For pairs without peer access, and for nodes on several hosts.

One kernel moves all runs of a batch between the cache and the (mapped) host memory, so that fragments cost nothing extra. On a CPU
cache the same interface copies by itself: what uses it can be tried without a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer.plan import Copies

SLOT_BYTES = 8 << 20
ALIGNMENT = 16  # bytes; the kernel moves 16 at a time
_NUM_PROGRAMS = 32  # the host link is full long before


def check_alignment(copies: Copies) -> None:
    if len(copies) and (copies % ALIGNMENT).any():
        raise TransferError(f"a copy that is not aligned to {ALIGNMENT} bytes: head_dim times the KV dtype's size must be a multiple of it")


def packed(copies: Copies) -> Copies:
    """From the cache to one place after the other in a stage."""
    to_stage = copies.copy()
    to_stage[:, 1] = np.cumsum(copies[:, 2]) - copies[:, 2]
    return to_stage


class Slot:
    """One staging buffer of one thread. ``host``: its bytes; with ``on_device`` it lies beside the cache, and only ``memory`` has them.
    ``memory``: host memory to be used, pinned if the cache lies on a GPU; else it has its own."""

    def __init__(
        self, cache: torch.Tensor, nbytes: int = SLOT_BYTES, *, on_device: bool = False, memory: torch.Tensor | None = None
    ) -> None:
        self._cache, self._is_device = cache, cache.is_cuda
        if memory is not None:
            self.memory = memory
        elif on_device:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=cache.device)
        else:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._is_device)
        self.host = memoryview(b"" if self.memory.is_cuda else self.memory.numpy())  # type: ignore[arg-type]
        self._event: Any = None
        if self._is_device:
            with torch.cuda.device(cache.device):
                self._stream = torch.cuda.Stream(priority=-1)
                self._event = torch.cuda.Event(blocking=True)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """What is enqueued within comes behind the slot's own copies."""
        if not self._is_device:
            yield
            return
        with torch.cuda.device(self._cache.device), torch.cuda.stream(self._stream):
            yield

    def start_gather(self, copies: Copies, source: torch.Tensor | None = None) -> None:
        """``copies``: offset in the cache, or in ``source``, offset in ``memory``, bytes. ``wait`` says when they are there. The source
        bytes must exist."""
        self._move(copies, self._cache if source is None else source, self.memory)

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def scatter(self, copies: Copies, target: torch.Tensor | None = None) -> None:
        """``copies``: offset in ``memory``, offset in the cache, or in ``target``, bytes. They are there when this returns."""
        self._move(copies, self.memory, self._cache if target is None else target)
        self.wait()

    def _move(self, copies: Copies, source: torch.Tensor, target: torch.Tensor) -> None:
        if not self._is_device:
            origin, destination = source.numpy(), target.numpy()
            for a, b, n in copies.tolist():
                destination[b : b + n] = origin[a : a + n]
            return
        from ksana_lab.transfer import gather_copy

        check_alignment(copies)
        pieces = gather_copy.pieces(copies)
        with torch.cuda.device(self._cache.device), torch.cuda.stream(self._stream):
            table = torch.from_numpy(pieces).to(self._cache.device)
            gather_copy.launch(source.data_ptr(), target.data_ptr(), table, len(pieces), _NUM_PROGRAMS)
            self._event.record()


class SlotPair:
    """Two buffers in turn: one is filled while the other is sent. For one thread at a time."""

    def __init__(self, cache: torch.Tensor) -> None:
        self.slots = (Slot(cache), Slot(cache))
        self.lock = threading.Lock()
