"""The seams of KV transfer below the scheduler: the worker's connector and the backends that move bytes.

Who calls what: the engine's model thread calls ``register``, ``begin_step``, ``layer_done``, ``poll``; everything that waits runs on
threads the connector owns. A backend knows bytes, offsets and endpoints; it never hears of requests or layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ksana_lab.core.connector import TransferMeta
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.protocol.engine import TransferKey


@dataclass(frozen=True)
class Copy:
    """``nbytes`` contiguous bytes from offset ``src`` of P's cache to offset ``dst`` of D's."""

    src: int
    dst: int
    nbytes: int


@dataclass
class TransferProgress:
    """One rank's news since its last ``poll``. The executor keeps a key back until every rank has said the same."""

    sent: list[TransferKey] = field(default_factory=list)  # P: all bytes of the prompt left and were acknowledged
    received: list[TransferKey] = field(default_factory=list)  # D: all bytes of the prompt arrived
    failed: dict[TransferKey, str] = field(default_factory=dict)
    dropped: list[TransferKey] = field(default_factory=list)  # nothing will touch this key's blocks any more


class WorkerConnector(Protocol):
    """One per TP rank."""

    def register(self, kv_cache: torch.Tensor, layout: KVLayout) -> None:
        """Once, before any step. ``kv_cache``: uint8 [layout.total_bytes], the cache's memory itself."""

    def begin_step(self, meta: TransferMeta | None) -> None:
        """Before the forward pass of a step (also of a step without tokens). Does not block."""

    def layer_done(self, layer: int) -> None:
        """The kernels that write layer ``layer``'s KV of this step were just enqueued on the current stream. Must not block."""

    def poll(self) -> TransferProgress:
        """Never blocks."""

    def stats(self) -> dict[str, float]:
        """Monotonic counters by metric name."""

    def close(self) -> None: ...


class Ticket(Protocol):
    """One batch of copies under way."""

    def done(self) -> bool:
        """True once every byte is in the peer's cache and its notice was accepted; raises TransferError when it cannot be."""

    @property
    def wire_ns(self) -> tuple[int, int]:
        """(first byte, acknowledged), monotonic ns; (0, 0) before."""


class Link(Protocol):
    """P's connected way into one rank's cache on D."""

    def write(self, copies: Sequence[Copy], notice: bytes, after: Any = None) -> Ticket:
        """Copy, then deliver ``notice`` to the peer's ``notices`` after the bytes are visible there. ``after``: an event on whose
        completion the source bytes exist (CUDA), or None. Called from a sender thread; may block on flow control, bounded."""

    def close(self) -> None: ...


class TransferBackend(Protocol):
    """One per TP rank. Name → class in ``transfer/backends/__init__``."""

    name: str

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [nbytes], zeroed: memory this backend can serve as a cache (for shm a shared segment, for cuda_ipc plain cudaMalloc)."""

    def serve(self, cache: torch.Tensor) -> dict[str, Any]:
        """D (and P, harmlessly): accept peers. Returns the endpoint, msgpack-able, that a peer passes to ``connect``."""

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, timeout_s: float) -> Link:
        """P: reach a D rank. Raises TransferError."""

    def notices(self) -> list[bytes]:
        """D: notices of writes whose bytes are visible, in arrival order. Never blocks. (A backend may also offer a callback.)"""

    def forget(self, endpoint_token: str) -> None:
        """D: refuse every later write from this peer; on return none is under way."""

    def close(self) -> None: ...
