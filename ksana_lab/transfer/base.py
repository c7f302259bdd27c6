"""The seams of KV transfer below the scheduler: the worker's connector, and the backends that move bytes.

Who calls what: the engine's model thread calls ``register``, ``begin_step``, ``layer_done``, ``poll``; everything that waits runs on
threads the connector owns. A backend knows bytes, offsets and endpoints; it never hears of requests or layers.

Writes are one-sided: P names offsets in D's cache. Two things keep that safe. Every write belongs to a *window*, a number that D opened
for one request and closes with it. And a *notice* delivered behind the bytes is the only thing that makes them count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ksana_lab.core.connector import TransferMeta
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.transfer.plan import Copies


class WorkerConnector(Protocol):
    """One per TP rank. Ranks tell the scheduler's side themselves what was sent and received (through a socket in the node's ``ipc_dir``),
    also while no step runs; an executor carries nothing. ``on_first_layer``, if set, is called with ``layer_done(0)`` of every step."""

    on_first_layer: Callable[[], None] | None

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [nbytes], zeroed: memory for the cache that the node's backends can serve."""

    def register(self, kv_cache: torch.Tensor, layout: KVLayout) -> None:
        """Once, before any step. ``kv_cache``: uint8 [layout.total_bytes], the cache's memory itself."""

    def endpoint(self) -> dict[str, Any]:
        """After ``register``: how a peer reaches this rank's cache; JSON-like, for ``make_scheduler_connector(worker_endpoints=[…])``."""

    def begin_step(self, meta: TransferMeta | None) -> None:
        """Before the forward pass of a step (also of a step without tokens). Does not block."""

    def layer_done(self, layer: int) -> None:
        """The kernels that write layer ``layer``'s KV of this step were just enqueued on the current stream. Must not block."""

    def poll(self) -> None:
        """Never blocks. Raises TransferError if one of the connector's own threads has died: the rank cannot go on."""

    def stats(self) -> dict[str, float]:
        """This rank's counters by metric name. They are in the scheduler side's ``stats`` already, summed over ranks."""

    def close(self) -> None: ...


class Ticket(Protocol):
    """One batch of copies under way."""

    def done(self) -> bool:
        """True once every byte is in the peer's cache (or, on a stream, ordered before any later notice); the source bytes are not read
        any more. Raises TransferError when the copy failed."""

    def wait(self, timeout_s: float) -> bool:
        """Block until ``done``, at most ``timeout_s``; returns ``done()``."""


@runtime_checkable
class DeviceTicket(Protocol):
    """A ticket of a copy that a device makes, which knows its clock."""

    @property
    def wire_s(self) -> float:
        """How long the copy took, once it is done."""

    def since(self, event: Any) -> float:
        """Seconds from ``event`` to the end of the copy; both are over."""


@dataclass(frozen=True)
class LinkReport:
    """What a new link does, measured before it carries anything of a request."""

    path: str  # in words: "NVLink peer access", "shared memory", …
    bandwidth: float  # bytes/s
    round_trip_s: float  # a notice and its acknowledgement
    expected: float | None = None  # bytes/s that the hardware should give for such a burst; None = nobody knows


class LinkEvents(Protocol):
    """What a link tells its owner, from a thread of the backend; must not block."""

    def on_ack(self, token: int, error: str | None) -> None:
        """The notice sent with ``token`` was accepted by the peer, or refused with ``error``. In the order of ``notify``."""

    def on_lost(self, reason: str) -> None:
        """The link is gone; nothing sent and not acknowledged will be. Once, and not after ``close``."""


class Link(Protocol):
    """P's connected way into one rank's cache on D. ``write`` and ``notify`` are called from one sender thread; ``close`` from any."""

    is_device_ordered: bool  # ``write`` returns at once and the device itself waits for ``after``

    def examine(self, timeout_s: float) -> LinkReport:
        """Measure the way, outside anybody's cache. Before the first ``write``. Raises TransferError when the peer does not answer."""

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        """Start copying ``copies`` (int64 [n, 3]: offset here, offset there, bytes), all offsets moved by ``shift`` (here, there): the same
        array serves every layer, and a link may keep what it made of it. ``after``: an event on whose completion the source bytes exist
        (CUDA), or None. ``source``: uint8 on the cache's device that "here" is counted in, None = the cache; a backend that takes one is
        in ``registry._PACKS``, others never see it. May block on flow control, bounded. Raises TransferError when the link is gone."""

    def notify(self, window: int, token: int, notice: bytes) -> None:
        """Deliver ``notice`` to the peer. Call it when the tickets of the writes it speaks of are done."""

    def close(self) -> None:
        """Nothing is written after it returns. May be called twice."""


class ServerEvents(Protocol):
    """What a backend tells the owner of a served cache, from its own threads."""

    def on_notice(self, session: int, window: int, notice: bytes, first_ns: int) -> str | None:
        """``notice`` came on an open ``window``; the bytes it speaks of are visible. ``first_ns``: when the first of them was seen here.
        Returns None, or why it is refused."""

    def on_writer_gone(self, session: int, reason: str) -> None:
        """A connected writer of ``session`` is gone; ``TransferBackend.num_writers`` says how many are left."""


class TransferBackend(Protocol):
    """One per TP rank. Name → class in ``transfer/registry.py``."""

    name: str

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [nbytes], zeroed: memory this backend can serve as a cache (for shm shared memory, for cuda_ipc plain cudaMalloc).
        Raises TransferError when it cannot."""

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        """D: accept writers. Returns the endpoint, msgpack-able, that a peer passes to ``connect``. Raises TransferError."""

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        """P: reach a D rank, and warm the way. Raises TransferError."""

    def open_window(self, window: int) -> None:
        """D: accept writes and notices for ``window``."""

    def close_window(self, window: int) -> bool:
        """D: refuse what comes for ``window``. True: from now on no byte of it can be written (D itself receives the bytes). False: the
        writer reaches the memory by itself; wait until it says that it has stopped, or until ``num_writers`` of its session is 0."""

    def num_writers(self, session: int) -> int:
        """D: connections of ``session`` that may still write."""

    def forget(self, session: int) -> None:
        """D: refuse new writers of ``session`` and ask those that are connected to go; ``on_writer_gone`` tells when they are."""

    def close(self) -> None:
        """May be called twice."""
