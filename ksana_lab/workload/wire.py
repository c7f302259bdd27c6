"""HTTP/1.1 for a client that measures: every piece of a body is stamped when the event loop hands it over, before anything else is done.

A general client wakes a task for each piece, which under hundreds of streams costs more than reading it and delays every other stamp.
Here a piece is appended to a list, and only the end of an answer wakes who waits for it. Parsing is httptools'. Knows nothing of what the
bodies mean. Proxies, redirects, cookies and compression are left out on purpose."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httptools

from ksana_lab.errors import ConfigError


class ConnectionLost(Exception):
    """The server hung up, or spoke no HTTP, before the answer was complete."""


class Answer:
    """One response as it comes in. ``pieces``: (monotonic seconds, bytes) in order; whoever reads them may take them out."""

    def __init__(self, on_start: Callable[[Answer], None] | None = None, on_piece: Callable[[Answer], None] | None = None) -> None:
        self.status = 0  # 0: no header yet
        self.pieces: list[tuple[float, bytes]] = []
        self.is_cut_off = False
        self._on_start, self._on_piece = on_start, on_piece
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def cut_off(self) -> None:
        """Hang up now; ``wait`` returns."""
        self.is_cut_off = True
        self._finish(None)

    async def wait(self) -> None:
        """Until the answer is complete or cut off. Raises ConnectionLost."""
        await self._done

    def _start(self, status: int) -> None:
        self.status = status
        if self._on_start is not None:
            self._on_start(self)

    def _piece(self, at_s: float, body: bytes) -> None:
        self.pieces.append((at_s, body))
        if self._on_piece is not None:
            self._on_piece(self)

    def _finish(self, error: Exception | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class HttpClient:
    """A pool of connections to one server, as many as there are answers in flight."""

    def __init__(self, base_url: str, *, connect_timeout_s: float = 10.0) -> None:
        """Raises ConfigError when ``base_url`` is no http(s)://host[:port][/prefix]."""
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"{base_url!r} is no URL like http://127.0.0.1:9080")
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix, self._authority = parts.path.rstrip("/"), parts.netloc.rpartition("@")[2]
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        on_start: Callable[[Answer], None] | None = None,
        on_piece: Callable[[Answer], None] | None = None,
    ) -> Answer:
        """Sends and waits for the whole answer. ``on_start`` is called when the header has come, ``on_piece`` after each piece.

        Raises OSError when no connection can be made, asyncio.TimeoutError when that takes too long, ConnectionLost. Cancelling closes the
        connection."""
        message = self._encode(method, path, body, headers or {})
        while True:
            connection, is_fresh = await self._take()
            answer = Answer(on_start, on_piece)
            try:
                await connection.exchange(message, answer)
            except ConnectionLost:
                if is_fresh or answer.status:
                    raise
                continue  # an idle connection that the server had given up: nothing was answered, so ask on another
            finally:
                self._give_back(connection, answer)
            return answer

    async def close(self) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._idle.clear()

    def _encode(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._authority}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode("latin-1") + body

    async def _take(self) -> tuple[_Connection, bool]:
        """(connection, whether it is new)."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                self._busy.add(connection)
                return connection, False
        opening = asyncio.get_running_loop().create_connection(_Connection, self._host, self._port, ssl=self._tls)
        _, connection = await asyncio.wait_for(opening, self._connect_timeout_s)
        self._busy.add(connection)
        return connection, True

    def _give_back(self, connection: _Connection, answer: Answer) -> None:
        self._busy.discard(connection)
        if connection.is_usable and not answer.is_cut_off:
            self._idle.append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """One exchange at a time. The ``on_…`` methods are httptools' callbacks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._at_s = 0.0
        self._is_open = False
        self._is_complete = True  # no exchange is under way
        self._keeps_alive = True
        self._has_no_length = False  # neither Content-Length nor chunks: the body ends with the connection

    @property
    def is_usable(self) -> bool:
        return self._is_open and self._is_complete and self._keeps_alive

    async def exchange(self, message: bytes, answer: Answer) -> None:
        if not self._is_open:
            raise ConnectionLost("the server closed the connection")
        self._answer, self._is_complete = answer, False
        self._transport.write(message)
        await answer.wait()

    def close(self) -> None:
        if self._is_open:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a stream; uvloop's class is not asyncio.Transport
        self._is_open = True

    def data_received(self, data: bytes) -> None:
        self._at_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the server does not speak HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_open = False
        if self._ends_with_connection():
            self.on_message_complete()
        self._fail(f"the server closed the connection{f': {exc}' if exc else ''}")

    def _ends_with_connection(self) -> bool:
        """httptools cannot be told of this end."""
        return not self._is_complete and self._has_no_length and bool(self._answer and self._answer.status)

    def _fail(self, why: str) -> None:
        if not self._is_complete and self._answer is not None:
            self._answer._finish(ConnectionLost(why))

    def on_message_begin(self) -> None:
        self._has_no_length = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_no_length = False

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer._start(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._answer is not None and not self._answer.is_cut_off:
            self._answer._piece(self._at_s, body)

    def on_message_complete(self) -> None:
        self._is_complete = True
        self._keeps_alive = self._is_open and self._parser.should_keep_alive()
        if self._answer is not None:
            self._answer._finish(None)
            self._answer = None
