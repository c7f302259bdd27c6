"""KV over TCP: P sends the bytes out of its cache, D's receiver puts them into its own. No copy of either side in between.

D receives the bytes itself, so closing a window is a fence: afterwards nothing of it is written, whatever P does."""

from __future__ import annotations

import socket
from typing import Any

import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends.stream import StreamLink, StreamServer, dial
from ksana_lab.transfer.base import Link, LinkEvents, ServerEvents, Ticket
from ksana_lab.transfer.plan import Copies


def host_view(cache: torch.Tensor, name: str) -> memoryview:
    """The bytes of a CPU cache. Raises TransferError for memory of a device."""
    if cache.device.type != "cpu":
        raise TransferError(f"backend {name} moves host memory only, and the KV cache lies on {cache.device}")
    return memoryview(cache.numpy())  # type: ignore[arg-type]


class TcpLink:
    def __init__(self, stream: StreamLink) -> None:
        self._stream = stream

    def write(self, copies: Copies, window: int, after: Any = None) -> Ticket:
        return self._stream.write(copies, window)

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        self._stream.close()


class TcpBackend:
    name = "tcp"

    def __init__(self, host: str) -> None:
        """``host``: the address of this machine that peers reach; data ports are chosen by the system."""
        self._host = host
        self._server: StreamServer | None = None

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        view = host_view(cache, self.name)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransferError(f"cannot listen for KV on {self._host}: {error}; is it an address of this host?") from error
        self._server = StreamServer(listener, events, cache_bytes=len(view), cache=view)
        return {"host": self._host, "port": listener.getsockname()[1], "secret": self._server.secret}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            address, secret = (str(endpoint["host"]), int(endpoint["port"])), str(endpoint["secret"])
        except (KeyError, ValueError, TypeError) as error:
            raise TransferError(f"the decode rank's tcp endpoint is malformed: {error!r}") from error
        sock = dial(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, address, timeout_s)
        stream = StreamLink(sock, secret, session, events, timeout_s, source=host_view(cache, self.name))
        stream.start()
        return TcpLink(stream)

    def open_window(self, window: int) -> None:
        assert self._server is not None
        self._server.open_window(window)

    def close_window(self, window: int) -> bool:
        return self._server is None or self._server.close_window(window)

    def num_writers(self, session: int) -> int:
        return 0 if self._server is None else self._server.num_writers(session)

    def forget(self, session: int) -> None:
        if self._server is not None:
            self._server.forget(session)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
