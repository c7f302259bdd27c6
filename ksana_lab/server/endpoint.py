"""The HTTP side of one generating route, on raw ASGI: read a body, answer, stream, notice a client that left. Knows no request's fields.

Every way a request can end is here: an error before the answer began becomes a status and a JSON body; after that, whatever
``error_event`` makes of it, and the end of the stream. A client that leaves aborts the request at once, in every phase."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import orjson

from ksana_lab.errors import InvalidRequest, RequestAborted, RequestError, RequestTimeout
from ksana_lab.server.context import RequestContext, read_context
from ksana_lab.server.generation import Generation, GenerationService

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY_BYTES = 32 << 20
BODY_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 120.0  # a client that reads nothing for so long has left without saying so

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
OCTET_STREAM = b"application/octet-stream"


class Response:
    """One answer being sent. ``blocked_since_s`` is set while the client does not read."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.headers: Headers = []  # go with whatever is answered
        self.has_started = False
        self.blocked_since_s: float | None = None

    async def json(self, body: bytes, *, status: int = 200, headers: Headers | None = None) -> None:
        self.has_started = True
        framing = [(b"content-type", JSON), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": framing + self.headers + (headers or [])})
        await self._write(body, more=False)

    async def start_stream(self, content_type: bytes) -> None:
        """Sends the headers now; without a length the body goes out chunked, which the reference router takes for "streaming"."""
        self.has_started = True
        headers = [(b"content-type", content_type), (b"cache-control", b"no-cache"), *self.headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        await self._write(data, more=True)

    async def end_stream(self, data: bytes = b"") -> None:
        await self._write(data, more=False)

    async def _write(self, data: bytes, *, more: bool) -> None:
        self.blocked_since_s = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.blocked_since_s = None


class StallWatch:
    """Ends requests whose client stopped reading; one timer for all of them."""

    def __init__(self, timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._watched: dict[Response, asyncio.Task[Any]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, response: Response) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._watched[response] = task
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s / 4, self._check)

    def discard(self, response: Response) -> None:
        self._watched.pop(response, None)

    def _check(self) -> None:
        self._timer = None
        limit_s = time.monotonic() - self._timeout_s
        for response, task in self._watched.items():
            if response.blocked_since_s is not None and response.blocked_since_s < limit_s:
                task.cancel("the client stopped reading")
        if self._watched:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s / 4, self._check)


class Endpoint(Protocol):
    """One generating route."""

    async def handle(self, ctx: RequestContext, body: bytes, response: Response, watch: DisconnectWatch) -> None:
        """Answer. Raises RequestError at any time."""

    def error_body(self, error: RequestError) -> bytes:
        """The JSON of an error answer."""

    def error_event(self, error: RequestError) -> bytes:
        """The last bytes of a stream that fails."""


class DisconnectWatch:
    """Awaits the client's disconnect beside the request, and aborts ``generation`` when it comes. No polling."""

    def __init__(self, receive: Receive) -> None:
        self._task = asyncio.ensure_future(self._wait(receive))
        self._generation: Generation | None = None
        self._has_left = False

    def watch(self, generation: Generation) -> None:
        """Also when the client has left already: ``generation.next`` then raises RequestAborted."""
        self._generation = generation
        if self._has_left:
            generation.abort("client disconnected")

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        if self._generation is not None:
            self._generation.abort("client disconnected")

    def close(self) -> None:
        self._task.cancel()


class GeneratingRoute:
    """The ASGI application around an Endpoint."""

    def __init__(self, endpoint: Endpoint, service: GenerationService, stalls: StallWatch) -> None:
        self._endpoint, self._service, self._stalls = endpoint, service, stalls
        self._connector = service.config.connector

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(send)
        self._stalls.add(response)
        outcome, ctx = "internal_error", None
        try:
            ctx = read_context(scope["headers"], self._connector.role, self._connector.inference_addr)
            response.headers = ctx.response_headers()
            self._record("ARRIVED", ctx, path=scope["path"], leg=ctx.leg.value)
            await self._serve(ctx, receive, response)
            outcome = "completed"
        except RequestError as error:
            outcome = error.type
            self._record("ABORTED" if isinstance(error, RequestAborted) else "FAILED", ctx, reason=str(error))
            await self._fail(response, error)
        except asyncio.CancelledError as error:
            outcome = "aborted"
            self._record("ABORTED", ctx, reason=str(error) or "cancelled")
            raise
        except Exception as error:
            log.exception("request %s failed", ctx.request_id if ctx else "?")
            self._record("FAILED", ctx, reason=repr(error))
            await self._fail(response, RequestError(f"{type(error).__name__}: {error}"))
        finally:
            self._stalls.discard(response)
            self._service.metrics.on_request_done(outcome)

    async def _serve(self, ctx: RequestContext, receive: Receive, response: Response) -> None:
        try:
            body = await read_body(receive)
        except RequestError as error:
            self._service.decline(ctx, 1, error)
            raise
        watch = DisconnectWatch(receive)
        try:
            await self._endpoint.handle(ctx, body, response, watch)
        finally:
            watch.close()

    async def _fail(self, response: Response, error: RequestError) -> None:
        if response.has_started:
            await response.end_stream(self._endpoint.error_event(error))
        else:
            await response.json(self._endpoint.error_body(error), status=error.status, headers=retry_headers(error))

    def _record(self, name: str, ctx: RequestContext | None, **args: object) -> None:
        recorder = self._service.recorder
        if recorder.enabled and ctx is not None:
            recorder.instant(name, "request", request_id=ctx.request_id, comm_request_id=ctx.comm_request_id, **args)


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises RequestAborted, RequestTimeout, or InvalidRequest for more than MAX_BODY_BYTES."""
    try:
        return await asyncio.wait_for(_read_body(receive), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"the request's body did not arrive in {BODY_TIMEOUT_S:.0f} s") from None


async def _read_body(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestAborted("the client left before its request was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
        if not message.get("more_body", False):
            return b"".join(parts)


def error_object(error: RequestError) -> dict[str, Any]:
    """OpenAI's: message, type, code (the HTTP status) and the field at fault."""
    return {"message": str(error), "type": error.type, "code": error.status, "param": getattr(error, "param", None)}


def error_json(error: RequestError) -> bytes:
    return orjson.dumps({"error": error_object(error)})


def retry_headers(error: RequestError) -> Headers:
    return [] if error.retry_after_s is None else [(b"retry-after", str(error.retry_after_s).encode())]
