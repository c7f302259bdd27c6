"""The API process's view of its engine: submit sequences, read their news, abort them, learn how the engine is.

Knows message types and which sequence belongs to which request; knows no text and no HTTP. Everything runs on one asyncio loop.
No wait is unbounded: when the engine ends, fails or falls silent on a request, that request's stream raises."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ksana_lab.errors import EngineDead, QueueFull, RequestError, RequestTimeout, ServiceUnavailable
from ksana_lab.protocol.channel import ServerChannel
from ksana_lab.protocol.engine import (
    AbortRequest,
    AddRequest,
    DeclineRequest,
    EngineFailed,
    EngineReady,
    EngineStatus,
    FromEngine,
    GetStatus,
    PeerUpdate,
    Profile,
    SequenceUpdate,
    Shutdown,
    StepUpdates,
    ToEngine,
    TransferKey,
)

log = logging.getLogger(__name__)

LIVENESS_PERIOD_S = 0.1  # a process's death can only be asked for
PROBE_PERIOD_S = 1.0  # of GetStatus, so that /health and heartbeats know a recent state
NEWS_GRACE_S = 5.0  # the engine times requests out by itself; this much later the API process does
_MAX_DYING = 4096


@dataclass
class _Entry:
    stream: RequestStream
    index: int
    has_started: bool = False


class RequestStream:
    """News of one client request's sequences, in the order the engine sent them. Made by ``EngineClient.submit``."""

    def __init__(self, client: EngineClient, ids: Sequence[str], now_s: float) -> None:
        self._client = client
        self._open = dict.fromkeys(ids)  # not finished by the engine yet
        self._ready: list[tuple[int, SequenceUpdate]] = []
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.last_news_s = now_s

    async def next(self) -> list[tuple[int, SequenceUpdate]]:
        """What arrived since the last call, at least one (index, update); several when the caller was slow.

        Raises the RequestError given to ``fail``."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        return ready

    def push(self, index: int, update: SequenceUpdate, now_s: float) -> None:
        self.last_news_s = now_s
        if update.finish is not None:
            self._open.pop(update.request_id, None)
        self._ready.append((index, update))
        self._wake()

    @property
    def is_open(self) -> bool:
        """The engine still owes news of a sequence."""
        return bool(self._open) and self._error is None

    def fail(self, error: RequestError) -> None:
        """``next`` raises ``error`` once what is ready has been read. The first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def abort(self, request_id: str, reason: str) -> None:
        """End one sequence early; its further news is dropped."""
        if request_id in self._open:
            del self._open[request_id]
            self._client._abort(request_id, reason)

    def close(self, reason: str = "the request is over") -> None:
        """Abort what has not finished. May be called twice."""
        for request_id in list(self._open):
            self.abort(request_id, reason)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """``engine_alive`` returns None while the engine's process lives, else the tail of its log.

    ``failure`` is None, or why this engine will never serve again; ``failed`` is set with it."""

    def __init__(
        self,
        api_address: str,
        engine_alive: Callable[[], str | None],
        *,
        max_num_waiting: int = 1200,
        waiting_timeout_s: float = 600.0,
        probe_period_s: float = PROBE_PERIOD_S,
        node: str = "node",
    ) -> None:
        """``node``: what messages to clients call it, who may have sent their request to a router."""
        self._node = node
        self._channel = ServerChannel(api_address, self._on_message, self._on_error)
        self._engine_alive = engine_alive
        self._max_num_waiting = max_num_waiting
        self._news_timeout_s = waiting_timeout_s + NEWS_GRACE_S
        self._probe_period_s = probe_period_s
        self._entries: dict[str, _Entry] = {}
        self._dying: dict[str, None] = {}  # aborted here, last news not seen yet: such an id must not be used again
        self._streams: set[RequestStream] = set()
        self._asked: dict[int, asyncio.Future[EngineStatus]] = {}
        self._tokens = itertools.count(1)
        self._became_ready = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._num_unstarted = 0
        self.failed = asyncio.Event()
        self.failure: str | None = None
        self.ready: EngineReady | None = None
        self.status: EngineStatus | None = None
        self.last_news_s = time.monotonic()
        self.on_status: Callable[[EngineStatus], None] | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Bind, and begin to watch the engine. On the running loop."""
        self._channel.open()
        self._watch = asyncio.create_task(self._watch_engine(), name="watch-engine")

    async def wait_ready(self, timeout_s: float) -> EngineReady:
        """Until the engine has loaded its model. Raises EngineDead when it fails before that, or takes longer than ``timeout_s``."""
        ready, failed = asyncio.ensure_future(self._became_ready.wait()), asyncio.ensure_future(self.failed.wait())
        try:
            await asyncio.wait((ready, failed), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            failed.cancel()
        if self.ready is None and self.failure is None:
            self._fail(f"it was not ready after {timeout_s:g} s")
        if self.ready is None or self.failure is not None:
            raise EngineDead(f"the engine is gone: {self.failure}")
        return self.ready

    async def close(self) -> None:
        """Tell the engine to end, fail what is in flight. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
            if self.failure is None:
                self.fail_requests(ServiceUnavailable(f"this {self._node} is shutting down"))
                self._send_or_note(Shutdown())
        self._channel.close()

    # ---- requests ----------------------------------------------------------------------------------------------------

    @property
    def num_unstarted(self) -> int:
        """Sequences submitted of which the engine has sent no news yet."""
        return self._num_unstarted

    @property
    def num_in_flight(self) -> int:
        return len(self._entries)

    def check_admission(self) -> EngineReady:
        """Raises ServiceUnavailable (no engine, or still loading) or QueueFull."""
        if self.failure is not None:
            raise ServiceUnavailable(f"the engine of this {self._node} is gone: {gist_of(self.failure)}")
        if self.ready is None:
            raise ServiceUnavailable(f"this {self._node} is still loading its model")
        if self._num_unstarted >= self._max_num_waiting:
            raise QueueFull(f"{self._num_unstarted} sequences are waiting, the limit of this {self._node}; try again later")
        return self.ready

    def free_id(self, request_id: str) -> str:
        """``request_id``, or with a suffix when sequences of that name are still in the engine (a client may repeat its x-request-id)."""
        candidates = itertools.chain([request_id], (f"{request_id}#{i}" for i in itertools.count(2)))
        return next(c for c in candidates if f"{c}:0" not in self._entries and f"{c}:0" not in self._dying)

    def submit(self, requests: Sequence[AddRequest]) -> RequestStream:
        """Hand the sequences of one client request to the engine. Raises what ``check_admission`` raises.

        The caller must ``close`` the stream, whatever happens."""
        self.check_admission()
        now_s = time.monotonic()
        stream = RequestStream(self, [r.request_id for r in requests], now_s)
        self._streams.add(stream)
        for index, request in enumerate(requests):
            self._entries[request.request_id] = _Entry(stream, index)
            self._num_unstarted += 1
        try:
            for request in requests:
                self._channel.send(request)
        except (EngineDead, ValueError) as error:  # ValueError: larger than the channel takes
            stream.close(str(error))
            self._streams.discard(stream)
            raise ServiceUnavailable(f"the engine did not take the request: {error}") from error
        return stream

    def release(self, stream: RequestStream, reason: str = "the request is over") -> None:
        """Close ``stream`` and forget it. May be called twice."""
        stream.close(reason)
        self._streams.discard(stream)

    def decline(self, transfers: Iterable[TransferKey], reason: str) -> None:
        """Have the engine tell the peers of ``transfers`` that their part here will not run."""
        for transfer in transfers:
            self._send_or_note(DeclineRequest(transfer, reason))

    def fail_requests(self, error: RequestError) -> None:
        """Every request in flight ends with ``error``."""
        for stream in list(self._streams):
            stream.fail(error)

    def _abort(self, request_id: str, reason: str) -> None:
        self._forget(request_id)
        self._note_dying(request_id)
        self._send_or_note(AbortRequest(request_id, reason))

    def _note_dying(self, request_id: str) -> None:
        if len(self._dying) >= _MAX_DYING:  # the engine owes no last news of those that ended with a stop string
            del self._dying[next(iter(self._dying))]
        self._dying[request_id] = None

    def _forget(self, request_id: str) -> _Entry | None:
        entry = self._entries.pop(request_id, None)
        if entry is not None and not entry.has_started:
            self._num_unstarted -= 1
        return entry

    # ---- the engine itself -------------------------------------------------------------------------------------------

    async def get_status(self, timeout_s: float) -> EngineStatus:
        """A fresh status. Raises EngineDead when the engine is gone or does not answer in ``timeout_s``."""
        token = next(self._tokens)
        answer = self._asked[token] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(GetStatus(token))
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            raise EngineDead(f"the engine did not answer in {timeout_s:g} s") from None
        finally:
            del self._asked[token]

    def update_peers(self, update: PeerUpdate) -> None:
        """Raises EngineDead."""
        self._channel.send(update)

    def profile(self, start: bool) -> None:
        """Raises EngineDead."""
        self._channel.send(Profile(start))

    @property
    def silence_s(self) -> float:
        """Since the last message of any kind. Above a few probe periods the engine's loop is stuck, or in one very long step."""
        return time.monotonic() - self.last_news_s

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _on_message(self, message: FromEngine) -> None:
        self.last_news_s = time.monotonic()
        if isinstance(message, StepUpdates):
            for update in message.updates:
                self._on_update(update)
        elif isinstance(message, EngineStatus):
            self.status = message
            if (asked := self._asked.get(message.token)) is not None and not asked.done():
                asked.set_result(message)
            if self.on_status is not None:
                self.on_status(message)
        elif isinstance(message, EngineReady):
            self.ready = message
            self._became_ready.set()
        elif isinstance(message, EngineFailed):
            self._fail(message.error)

    def _on_update(self, update: SequenceUpdate) -> None:
        entry = self._entries.get(update.request_id)
        if entry is None:  # aborted here a moment ago
            if update.finish is not None:
                self._dying.pop(update.request_id, None)
            return
        if not entry.has_started:
            entry.has_started = True
            self._num_unstarted -= 1
        if update.finish is not None:
            self._forget(update.request_id)
        entry.stream.push(entry.index, update, self.last_news_s)

    def _on_error(self, error: Exception) -> None:
        log.error("cannot go on with this engine", exc_info=error)
        self._fail(f"its messages cannot be read: {error}")

    def _fail(self, reason: str) -> None:
        if self.failure is not None:
            return
        self.failure = reason
        log.error("the engine is gone: %s", reason)
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(EngineDead(reason))
        self.fail_requests(ServiceUnavailable(f"the engine of this {self._node} is gone: {gist_of(reason)}"))
        self.failed.set()

    def _send_or_note(self, message: ToEngine) -> None:
        """For messages that a dead engine need not hear."""
        try:
            self._channel.send(message)
        except EngineDead as error:
            log.debug("%s not sent: %s", type(message).__name__, error)

    async def _watch_engine(self) -> None:
        try:
            await self._watch_until_failure()
        except Exception as error:  # a watchdog that dies in silence would leave requests hanging
            self._on_error(error)

    async def _watch_until_failure(self) -> None:
        next_probe_s = 0.0
        while self.failure is None:
            if (tail := self._engine_alive()) is not None:
                self._fail(f"its process ended\n{tail}".rstrip())
                return
            now_s = time.monotonic()
            if now_s >= next_probe_s and self.ready is not None:
                next_probe_s = now_s + self._probe_period_s
                self._send_or_note(GetStatus(0))
                self._time_out(now_s)
            await asyncio.sleep(LIVENESS_PERIOD_S)

    def _time_out(self, now_s: float) -> None:
        for stream in list(self._streams):
            if stream.is_open and now_s - stream.last_news_s > self._news_timeout_s:
                stream.fail(RequestTimeout(f"the engine sent nothing for {now_s - stream.last_news_s:.0f} s"))


def gist_of(failure: str) -> str:
    """One line for clients: of a traceback the exception's first, which follows the innermost frame; else the first line."""
    head, *lines = failure.splitlines() or [""]
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] :] if frames else []
    exception = next((line for line in after if line.strip() and not line.startswith(" ")), "")
    if not exception:
        return head
    return exception if head.startswith("Traceback") else f"{head}: {exception}"
