"""KV over TCP: P sends the bytes out of its cache, D's receiver puts them into its own. No copy of either side in between on CPUs; a GPU's
cache is staged through pinned host memory, whose filling and sending overlap.

D receives the bytes itself, so closing a window is a fence: afterwards nothing of it is written, whatever P does."""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends.stream import DONE, ServedByStream, StreamLink, StreamServer, dial, staged
from ksana_lab.transfer.base import Link, LinkEvents, LinkReport, ServerEvents, Ticket
from ksana_lab.transfer.plan import Copies, shifted
from ksana_lab.transfer.staging import SLOT_BYTES, Slot, SlotPair, packed
from ksana_lab.types import family_of, is_loopback

_BURST_BYTES = 8 << 20
_LOOPBACK_BYTES_PER_S = 1e9  # what any host of today gives over its own loopback device


def host_view(cache: torch.Tensor, name: str) -> memoryview:
    """The bytes of a CPU cache. Raises TransferError for memory of a device."""
    if cache.device.type != "cpu":
        raise TransferError(f"backend {name} moves host memory only, and the KV cache lies on {cache.device}")
    return memoryview(cache.numpy())  # type: ignore[arg-type]


class TcpLink:
    is_device_ordered = False

    def __init__(self, stream: StreamLink, cache: torch.Tensor, host: str) -> None:
        self._stream, self._host = stream, host
        self._cache: torch.Tensor | None = cache  # None = closed
        self._stage = SlotPair(cache) if cache.is_cuda else None

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        """On a GPU ``after`` must be over, unless there is a ``source``: the caller waits for a layer."""
        if not len(copies):
            return DONE
        copies = shifted(copies, shift)
        if source is not None:
            return self._stream.write(copies, window, _host_bytes(source[: int((copies[:, 0] + copies[:, 2]).max())], after))
        return self._stream.write(copies, window) if self._stage is None else self._write_staged(self._stage, copies, window)

    def _write_staged(self, stage: SlotPair, copies: Copies, window: int) -> Ticket:
        with stage.lock:
            batches = staged(copies, SLOT_BYTES)
            to_stage = [packed(batch) for batch in batches]
            stage.slots[0].start_gather(to_stage[0])
            for i, batch in enumerate(batches):
                if i + 1 < len(batches):
                    stage.slots[(i + 1) % 2].start_gather(to_stage[i + 1])
                slot = stage.slots[i % 2]
                slot.wait()
                self._stream.write(np.column_stack((to_stage[i][:, 1], batch[:, 1:])), window, slot.host)
        return DONE

    def examine(self, timeout_s: float) -> LinkReport:
        """A burst for a window that nobody opened: D receives it and throws it away."""
        round_trip_s = self._stream.round_trip_s(timeout_s)
        if self._cache is None:
            raise TransferError("the link is closed")
        nbytes = min(_BURST_BYTES, self._cache.numel(), self._stream.peer_bytes)
        nbytes -= nbytes % 16
        burst = np.array([[0, 0, nbytes]], np.int64)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            self.write(burst, 0)
            self._stream.ping(timeout_s)
            seconds.append(max(1e-9, time.perf_counter() - begin - round_trip_s))
        is_here = is_loopback(self._host)
        path = ("loopback TCP" if is_here else "TCP") + (" through pinned host memory" if self._stage else "")
        return LinkReport(path, nbytes / min(seconds), round_trip_s, _LOOPBACK_BYTES_PER_S if is_here else None)

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        self._stream.close()
        self._cache = self._stage = None


def _host_bytes(source: torch.Tensor, after: Any) -> memoryview:
    if not source.is_cuda:
        return memoryview(source.numpy())  # type: ignore[arg-type]
    # A stream of its own: nothing else on the device is waited for.
    with torch.cuda.device(source.device), torch.cuda.stream(torch.cuda.Stream()):
        if after is not None:
            after.synchronize()
        return memoryview(source.cpu().numpy())  # type: ignore[arg-type]


class TcpBackend(ServedByStream):
    name = "tcp"

    def __init__(self, host: str) -> None:
        """``host``: the address of this machine that peers reach; data ports are chosen by the system."""
        self._host = host

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        family = family_of(self._host)
        try:
            listener = socket.create_server((self._host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransferError(f"cannot listen for KV on {self._host}: {error}; is it an address of this host?") from error
        if cache.is_cuda:
            self._server = StreamServer(listener, events, cache_bytes=cache.numel(), make_stage=lambda: Slot(cache))
        else:
            self._server = StreamServer(listener, events, cache_bytes=cache.numel(), cache=host_view(cache, self.name))
        return {"host": self._host, "port": listener.getsockname()[1], "secret": self._server.secret}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            address, secret = (str(endpoint["host"]), int(endpoint["port"])), str(endpoint["secret"])
        except (KeyError, ValueError, TypeError) as error:
            raise TransferError(f"the decode rank's tcp endpoint is malformed: {error!r}") from error
        sock = dial(family_of(address[0]), address, timeout_s)
        source = None if cache.is_cuda else host_view(cache, self.name)
        stream = StreamLink(sock, secret, session, events, timeout_s, source=source)
        stream.start()
        return TcpLink(stream, cache, address[0])
