"""The wire between a node's API process and its engine process: typed messages (``protocol.engine``) as msgpack over one zmq link.

Knows sockets and framing, not what the messages mean. ``ServerChannel`` binds and lives on an asyncio loop; ``EngineChannel`` connects,
is plain blocking code, and shows its socket so that an engine can poll it beside other things. Order is kept in both directions, sends
never block (no high-water mark: both ends are one node, and its admission limits bound what is in flight), nothing is unpickled.

The link is ROUTER (server) / DEALER (engine, with a fixed identity), so that a send to an engine that is not there fails at once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from ksana_lab.errors import EngineDead
from ksana_lab.protocol.engine import FromEngine, ToEngine

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20  # a prompt of a million tokens takes 5 MB
_ENGINE_IDENTITY = b"engine"
_CLOSE_LINGER_MS = 500  # lets a last Shutdown or EngineFailed leave

_encoder = msgspec.msgpack.Encoder()


def _encode(message: msgspec.Struct) -> bytes:
    """Raises ValueError above MAX_MESSAGE_BYTES: the receiver would drop the link instead of saying why."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{type(message).__name__} takes {len(data)} bytes on the wire; the limit is {MAX_MESSAGE_BYTES}")
    return data


def _open(context: zmq.Context, kind: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, _CLOSE_LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


class EngineChannel:
    """The engine's end. One thread only.

    Poll ``socket`` for ``zmq.POLLIN`` (``zmq.Poller`` takes it beside eventfds and other sockets), then call ``drain``."""

    def __init__(self, address: str) -> None:
        """``address``: what the server bound, e.g. ``ipc:///tmp/…``. Does not wait for the server to be there."""
        self._context = zmq.Context()
        self.socket = _open(self._context, zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, _ENGINE_IDENTITY)
        self.socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """Queues ``message``; never blocks."""
        self.socket.send(_encode(message))

    def recv(self, timeout_s: float | None = None) -> ToEngine | None:
        """The next message; None when ``timeout_s`` passed without one (None waits for ever, 0 does not wait).

        Raises ``msgspec.MsgspecError`` for bytes that are no ``ToEngine``: the two processes are of different versions."""
        if not self.socket.poll(None if timeout_s is None else math.ceil(max(0.0, timeout_s) * 1000)):
            return None
        return self._decoder.decode(self.socket.recv())

    def drain(self) -> list[ToEngine]:
        """Every message that is already here, oldest first. Never blocks."""
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(self._decoder.decode(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def close(self) -> None:
        """May be called twice."""
        if not self.socket.closed:
            self.socket.close()
            self._context.term()


class ServerChannel:
    """The API process's end, on the asyncio loop that called ``open``. Each message goes to ``on_message`` from that loop, in order.

    ``on_error`` gets what makes the link useless: bytes that are no ``FromEngine``, or an exception of ``on_message`` itself."""

    def __init__(self, address: str, on_message: Callable[[FromEngine], None], on_error: Callable[[Exception], None]) -> None:
        self.address = address
        self._on_message, self._on_error = on_message, on_error
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Binds. Raises ``zmq.ZMQError`` when the address is taken or cannot be bound."""
        self._context = zmq.Context()
        self._socket = _open(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(self.address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(int(self._socket.getsockopt(zmq.FD)), self._read)

    def send(self, message: ToEngine) -> None:
        """Queues ``message``; never blocks. Raises EngineDead when no engine is connected."""
        if self._socket is None or self._loop is None:
            raise EngineDead("the channel to the engine is closed")
        try:
            self._socket.send_multipart((_ENGINE_IDENTITY, _encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDead(f"the engine is not connected ({error.strerror})") from error
        # zmq's descriptor is edge-triggered, and a send may swallow the edge of a message that arrived meanwhile.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        while self._socket is not None:
            try:
                identity, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                log.warning("dropped a message that is not framed as an engine's")
                continue
            if identity != _ENGINE_IDENTITY:
                log.warning("dropped a message of a peer that is not this node's engine")
                continue
            try:
                self._on_message(self._decoder.decode(data))
            except Exception as error:
                self._on_error(error)

    def close(self) -> None:
        """May be called twice."""
        if self._socket is None or self._loop is None or self._context is None:
            return
        if not self._loop.is_closed():
            self._loop.remove_reader(int(self._socket.getsockopt(zmq.FD)))
        self._socket.close()
        self._context.term()
        self._socket = None
