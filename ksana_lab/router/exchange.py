"""One request on one route: the same body to prefill and decode at once, their replies merged into one for the client.

Knows nothing of choosing, registration or metrics. Whatever goes wrong first, on either side or at the client, decides; then both upstream
connections are closed, which tells the nodes to give up. Nothing here waits without a bound: ``check``, called on a timer, ends an exchange
whose node or client has been silent for too long. A reply in one piece is silence until it is whole: before a stream is known to be one,
a node is waited for while it lives. The merging rules are those of KsanaLLM's router and, where the decode node acknowledges
``FIRST_TOKEN_HEADER``, those of protocol/node.py."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import aiohttp
import orjson
from multidict import CIMultiDict
from yarl import URL

from ksana_lab.errors import TransferFailed
from ksana_lab.protocol.node import FIRST_TOKEN_FROM_PREFILL, FIRST_TOKEN_HEADER
from ksana_lab.router.comm_groups import Route
from ksana_lab.router.registry import Node
from ksana_lab.router.streams import Framing, NulFraming, ObjectTooLarge, RawFraming, error_in, framing_of

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

DELIVER_S = 5.0  # for a request to reach its node, after its client or the other node has given up
BLAME_S = 0.25  # for the other node to say itself what a node blames it for
TELL_S = 5.0  # for a client to take its error
FAILED_NODE_HEADER = "x-ksana-lab-failed-node"  # on an error that a node gave: which one, "<role> <inference_addr>"
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
_NOT_FOR_THE_CLIENT = _HOP_BY_HOP | {b"content-length", FIRST_TOKEN_HEADER.encode()}


@dataclass(eq=False)
class Failure(Exception):
    """Why a request did not end well; what the client is told."""

    outcome: str  # the metric's label
    status: int
    type: str
    message: str
    node: Node | None = None  # whose fault it is, if a node's
    blames_peer: bool = False  # the node says that the other one is why
    is_retryable: bool = False  # nothing was accepted: another route may be tried
    reply: tuple[Headers, bytes] | None = None  # the node's own answer with ``status``, to be passed on
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """Readable by the OpenAI API's clients (``error``) and by KsanaLLM's (``detail``)."""
        error: dict[str, Any] = {"message": self.message, "type": self.type, "code": self.status, "param": None}
        if self.node is not None:
            error |= {"side": self.node.role.value, "node": self.node.inference_addr}
        return {"error": error, "detail": self.message}


class ClientGone(Exception):
    """It went away while its request was being read."""


class BodyTooLarge(Exception):
    pass


class Client:
    """The client's side of one request: gets bytes in order, and is watched for going away. Serves all attempts at its request."""

    def __init__(self, receive: Receive, send: Send, request_id: bytes) -> None:
        self._receive, self._send = receive, send
        self._request_id = request_id
        self._lock = asyncio.Lock()  # both sides of a pair may want to send
        self._head: tuple[int, Headers] | None = None
        self.is_started = False  # it has seen a status line
        self.is_finished = False
        self.is_gone = False
        self.blocked_since_s: float | None = None  # monotonic; it does not read what we send
        self.first_byte_s: float | None = None  # monotonic
        self.on_gone: Callable[[], None] = lambda: None

    async def read_body(self, max_bytes: int) -> bytes:
        """Raises BodyTooLarge, ClientGone."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > max_bytes:
                raise BodyTooLarge
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def watch(self) -> None:
        """Runs beside the exchange; returns when the client has gone away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.is_finished:
            self.is_gone = True
            self.on_gone()

    def will_start(self, status: int, headers: Headers) -> None:
        """What the first piece is preceded by: the later the status line goes out, the more failures can still have their own."""
        self._head = (status, self._with_request_id(headers))

    async def piece(self, data: bytes, *, is_last: bool = False) -> None:
        async with self._lock:
            self.blocked_since_s = time.monotonic()
            try:
                if not self.is_started:
                    assert self._head is not None
                    self.is_started = True
                    await self._send({"type": "http.response.start", "status": self._head[0], "headers": self._head[1]})
                self.is_finished |= is_last
                await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
            finally:
                self.blocked_since_s = None
            if self.first_byte_s is None:
                self.first_byte_s = time.monotonic()

    async def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer at once."""
        self.will_start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.piece(body, is_last=True)

    def _with_request_id(self, headers: Headers) -> Headers:
        if any(name == b"x-request-id" for name, _ in headers):
            return headers
        return [*headers, (b"x-request-id", self._request_id)]


class _State(Enum):
    CONNECTING = 0  # bounded by the HTTP client
    WAITING = 1  # for the node's next byte
    HELD = 2  # for the other side: not this node's fault
    OVER = 3


class Leg:
    """One of the two upstream requests."""

    __slots__ = ("node", "response", "sent", "since_s", "state", "url")

    def __init__(self, node: Node, url: URL) -> None:
        self.node, self.url = node, url
        self.response: aiohttp.ClientResponse | None = None
        self.sent = asyncio.Event()  # the node will read the request, or never
        self.state = _State.CONNECTING
        self.since_s = time.monotonic()  # last sign of progress

    def wait(self) -> None:
        self.state, self.since_s = _State.WAITING, time.monotonic()

    def failure(self, status: int, type_: str, message: str, **more: Any) -> Failure:
        return Failure(f"{self.node.role.value}_failed", status, type_, f"{self.node}: {message}", node=self.node, **more)


class Exchange:
    """``run`` it once."""

    def __init__(
        self, session: aiohttp.ClientSession, client: Client, route: Route, target: str, body: bytes, headers: CIMultiDict[str]
    ) -> None:
        self.route, self.client = route, client
        self._session, self._body, self._headers = session, body, headers
        self._path = target.partition("?")[0]
        self._decode = Leg(route.decode, url_of(route.decode, target))
        self._prefill = Leg(route.prefill, url_of(route.prefill, target)) if route.prefill is not None else None
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Failure | None] = loop.create_future()
        self._decode_head: asyncio.Future[aiohttp.ClientResponse] = loop.create_future()
        self._prefill_head: asyncio.Future[None] = loop.create_future()
        self._prefill_end: asyncio.Future[None] = loop.create_future()
        self._is_stream = False  # a node's headers said so; those of a stream come at once
        self._has_decode_output = False  # decode's output is on its way to the client: prefill has done its part
        self.framing: Framing | None = None  # of the client's stream, once it is known to be one
        self.first_data_s: float | None = None  # monotonic: when the first bytes of a reply came from a node

    async def run(self, on_side_over: Callable[[Node], None]) -> Failure | None:
        """None: the client has its whole answer. A failure: both sides are closed, and the client is yet to be told. ``on_side_over`` is
        called once for each node when its part has ended, however it ended."""
        self.client.on_gone = self._client_gone
        if self.client.is_gone:
            self._client_gone()
        tasks = {self._decode: self._start(self._decode, self._run_decode, on_side_over)}
        if self._prefill is not None:
            tasks[self._prefill] = self._start(self._prefill, self._run_prefill, on_side_over)
        else:
            self._prefill_head.set_result(None)
            self._prefill_end.set_result(None)
        try:
            failure = await self._over
            if failure is not None:
                await self._deliver(tasks)
        finally:
            for task in tasks.values():
                task.cancel()
        if failure is not None:
            await asyncio.wait(tasks.values())  # nothing of theirs may follow the error
        return failure

    def fail(self, failure: Failure) -> None:
        """The first failure decides."""
        if not self._over.done():
            self._over.set_result(failure)

    def check(self, now_s: float, read_timeout_s: float, reply_timeout_s: float, why_dead: Callable[[Node, float], str | None]) -> None:
        """Called on a timer. ``why_dead(node, silent_s)`` says why a silent node need not be waited for any longer, if so."""
        blocked_s = self.client.blocked_since_s
        if blocked_s is not None:
            if now_s - blocked_s > read_timeout_s:
                self.fail(
                    Failure("client_stalled", 499, "client_stalled", f"the client read nothing for {read_timeout_s:g} s (read_timeout_s)")
                )
            return
        for leg in (self._prefill, self._decode):
            if leg is None or leg.state is not _State.WAITING:
                continue
            silent_s = now_s - leg.since_s
            if self._is_stream and silent_s > read_timeout_s:
                self.fail(leg.failure(504, "timeout", f"sent nothing for {read_timeout_s:g} s, the router's read_timeout_s"))
            elif silent_s > reply_timeout_s:
                self.fail(leg.failure(504, "timeout", f"gave no reply in {reply_timeout_s:g} s, the router's reply_timeout_s"))
            elif (why := why_dead(leg.node, silent_s)) is not None:
                self.fail(leg.failure(502, "node_failed", why))

    # ---- the two sides -----------------------------------------------------------------------------------------------

    async def _run_decode(self, leg: Leg) -> None:
        response = await self._open(leg)
        framing = self._framing(response)
        _settle(self._decode_head, response)
        self.client.will_start(response.status, _client_headers(response, is_stream=framing is not None))
        if framing is None:
            # Decode's answer is whole only after prefill's work, whatever becomes of prefill's reply.
            body = await response.read()
            self.first_data_s = self.first_data_s or time.monotonic()
            await self.client.reply(response.status, _client_headers(response, is_stream=False), body)
            return self._end()
        self.framing = framing()
        await self._hold(leg, self._prefill_head)
        async for piece in self._pieces(leg, self.framing):
            if not self._has_decode_output:
                self._refuse_error(leg, piece)
                if self._is_first_from_prefill(response):
                    await self._hold(leg, self._prefill_end)
                self._has_decode_output = True
            await self.client.piece(piece)
        await self._finish_stream(leg, response, self.framing)

    async def _run_prefill(self, leg: Leg) -> None:
        response = await self._open(leg)
        framing = self._framing(response)
        _settle(self._prefill_head, None)
        decode_response = await self._hold(leg, self._decode_head)
        if framing is None or self._framing(decode_response) is not framing:
            leg.wait()
            await response.read()  # of no use to the client
            return _settle(self._prefill_end, None)
        is_first_here = self._is_first_from_prefill(decode_response)
        num_pieces = 0
        async for piece in self._pieces(leg, framing()):
            self._refuse_error(leg, piece)
            num_pieces += 1
            # Each object of /generate repeats what came before it: one of prefill's that comes late can be left out.
            is_wanted = (is_first_here or num_pieces == 1) if framing is NulFraming else is_first_here
            if is_wanted and not self._has_decode_output:
                await self.client.piece(piece)
        if not num_pieces and not is_first_here and not self._has_decode_output:
            raise leg.failure(502, "node_failed", "ended its stream without a token")
        _settle(self._prefill_end, None)

    async def _finish_stream(self, leg: Leg, response: aiohttp.ClientResponse, framing: Framing) -> None:
        if not self._has_decode_output:
            if not self._is_first_from_prefill(response):
                raise leg.failure(502, "node_failed", "ended its stream without a token")
            await self._hold(leg, self._prefill_end)  # the first token was the last
            if not self.client.is_started:
                raise leg.failure(502, "node_failed", "ended its stream without a token, and so did its prefill node")
        await self.client.piece(framing.done, is_last=True)
        self._end()

    # ---- steps of both -----------------------------------------------------------------------------------------------

    def _start(self, leg: Leg, run: Callable[[Leg], Awaitable[None]], on_over: Callable[[Node], None]) -> asyncio.Task[None]:
        def over(_: object) -> None:  # also of a task that was cancelled before it began
            leg.state = _State.OVER
            leg.sent.set()
            if leg.response is not None:
                leg.response.close()  # does nothing to a connection that went back to the pool after a whole reply
            on_over(leg.node)

        task = asyncio.get_running_loop().create_task(self._guard(leg, run))
        task.add_done_callback(over)
        return task

    async def _guard(self, leg: Leg, run: Callable[[Leg], Awaitable[None]]) -> None:
        """Every way in which a side can fail becomes a ``Failure``."""
        try:
            await run(leg)
        except Failure as failure:
            self._side_failed(leg, failure)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            is_retryable = all(leg.response is None for leg in (self._prefill, self._decode) if leg is not None)
            self._side_failed(leg, leg.failure(502, "node_unreachable", f"cannot connect: {_reason(error)}", is_retryable=is_retryable))
        except ObjectTooLarge as error:
            self._side_failed(leg, leg.failure(502, "node_failed", f"sent {error}"))
        except (aiohttp.ClientError, OSError) as error:
            when = "before it answered" if leg.response is None else "in the middle of its reply"
            why = "" if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError)) else f" ({_reason(error)})"
            self._side_failed(leg, leg.failure(502, "node_failed", f"closed the connection {when}{why}"))
        except Exception as error:
            logger.exception("request on %s", self.route)
            self.fail(Failure("internal_error", 500, "internal_error", f"the router failed: {type(error).__name__}"))

    def _side_failed(self, leg: Leg, failure: Failure) -> None:
        if leg is self._prefill and self._has_decode_output:
            logger.info("%s, after its part was done", failure.message)
            return
        if failure.blames_peer:  # a queue that is full is 429 and worth another try; the word of it may come first from the other side
            asyncio.get_running_loop().call_later(BLAME_S, self.fail, failure)
            return
        self.fail(failure)

    def _client_gone(self) -> None:
        self.fail(Failure("client_gone", 499, "aborted", "the client went away"))

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    async def _open(self, leg: Leg) -> aiohttp.ClientResponse:
        """Send the request, wait for the status line. An error status becomes a Failure that carries the node's answer."""
        leg.wait()
        response = await self._session.request(
            "POST", leg.url, data=self._body, headers=self._headers, allow_redirects=False, trace_request_ctx=leg
        )
        leg.response = response
        leg.wait()
        if 300 <= response.status < 400:
            why = "a redirect, which would lead past the router; a '/' too many at the end of the path is the usual reason"
            raise leg.failure(502, "node_failed", f"answered {response.status}, {why}")
        if response.status >= 400:
            body = await response.read()
            failure = leg.failure(response.status, "node_error", f"answered {response.status}")
            failure.reply = (_client_headers(response, is_stream=False), body)
            failure.blames_peer = (error_in(body) or {}).get("type") == TransferFailed.type
            if response.status < 500:
                failure.outcome = "rejected"  # the request's fault, or there are too many
            raise failure
        return response

    async def _deliver(self, tasks: Mapping[Leg, asyncio.Task[None]]) -> None:
        """A request that one node has heard of must reach the other, though nobody wants its answer: the one may have done its part and
        keep blocks for the other, which alone can tell it that it is over."""
        for leg, task in tasks.items():
            if leg.sent.is_set():
                task.cancel()
        late = [leg for leg in tasks if not leg.sent.is_set()]
        if late and len(late) < len(tasks):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*(leg.sent.wait() for leg in late)), DELIVER_S)

    async def _hold(self, leg: Leg, future: asyncio.Future[Any]) -> Any:
        if future.done():
            return future.result()
        leg.state = _State.HELD
        result = await future
        leg.wait()
        return result

    async def _pieces(self, leg: Leg, framing: Framing) -> AsyncIterator[bytes]:
        """The node's stream in whole objects, as they come."""
        assert leg.response is not None
        content = leg.response.content
        leg.wait()
        while data := await content.readany():
            leg.since_s = time.monotonic()
            self.first_data_s = self.first_data_s or leg.since_s
            for piece in framing.feed(data):
                yield piece
            leg.since_s = time.monotonic()  # whatever the client took to read is not this node's silence
        if rest := framing.rest():
            yield rest

    def _framing(self, response: aiohttp.ClientResponse) -> type[Framing] | None:
        headers = response.headers
        is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        framing = framing_of(self._path, headers.get("content-type", "").lower(), is_chunked)
        self._is_stream |= framing is not None
        return framing

    def _is_first_from_prefill(self, decode_response: aiohttp.ClientResponse) -> bool:
        """Decode has understood that the first token is prefill's to show."""
        return self._prefill is not None and decode_response.headers.get(FIRST_TOKEN_HEADER) == FIRST_TOKEN_FROM_PREFILL

    def _refuse_error(self, leg: Leg, piece: bytes) -> None:
        """An error that a node could only say inside its stream: while the client has no status line yet, it can get the true one."""
        error = error_in(piece)
        if error is not None:
            code = error.get("code")
            status = code if isinstance(code, int) and 400 <= code < 600 else 502
            type_ = str(error.get("type") or "node_failed")
            raise leg.failure(status, type_, str(error.get("message") or error), blames_peer=type_ == TransferFailed.type)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    """A side that was given up while it waited has cancelled what it waited for."""
    if not future.done():
        future.set_result(result)


def note_sent() -> aiohttp.TraceConfig:
    """For the session that exchanges use: sets ``Leg.sent``."""

    async def on_sent(session: aiohttp.ClientSession, context: Any, params: aiohttp.TraceRequestChunkSentParams) -> None:
        if isinstance(context.trace_request_ctx, Leg):
            context.trace_request_ctx.sent.set()

    trace = aiohttp.TraceConfig()
    trace.on_request_chunk_sent.append(on_sent)
    return trace


async def tell(client: Client, failure: Failure, framing: Framing | None) -> None:
    """Give the client its error: a JSON answer before the stream, an event inside it, or a cut where neither can be or it does not read."""
    if client.is_gone or client.is_finished or failure.outcome == "client_stalled":
        return
    if not client.is_started:
        told = client.reply(*_error_reply(failure))
    elif (event := (framing or RawFraming()).error_event(failure.body())) is not None:
        told = client.piece(event, is_last=True)
    else:
        return
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(told, TELL_S)


def _error_reply(failure: Failure) -> tuple[int, Headers, bytes]:
    if failure.reply is not None:
        headers, body = failure.reply
        assert failure.node is not None
        failed = f"{failure.node.role.value} {failure.node.inference_addr}".encode()
        return failure.status, [*headers, (FAILED_NODE_HEADER.encode(), failed)], body
    headers = [(b"content-type", b"application/json")]
    if failure.retry_after_s is not None:
        headers.append((b"retry-after", str(failure.retry_after_s).encode()))
    return failure.status, headers, orjson.dumps(failure.body())


def url_of(node: Node, target: str) -> URL:
    return URL(f"http://{node.inference_addr}{target}", encoded=True)


def _client_headers(response: aiohttp.ClientResponse, *, is_stream: bool) -> Headers:
    headers = [(name.lower(), value) for name, value in response.raw_headers]
    headers = [(name, value) for name, value in headers if name not in _NOT_FOR_THE_CLIENT]
    if is_stream and not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"application/octet-stream"))
    return headers


def _reason(error: BaseException) -> str:
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
