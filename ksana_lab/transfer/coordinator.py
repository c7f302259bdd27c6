"""The control thread of one node's KV transfer: talks to the peer nodes and to this node's own ranks, and drives the requests' ledger.

    engine thread ──post──> coordinator <──ipc──> every rank's worker connector
                  <──news──      ▲└──tcp──> the peers' coordinators
It never waits for anybody, so that a slow peer, a long step or a hanging rank delays nobody else. Ranks ≠ 0 live in other processes; rank 0
is reached the same way."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ksana_lab.config.engine import ConnectorOptions
from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import PeerUpdate
from ksana_lab.tracing.clock import Offset
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer.lifecycle import DecodeLedger, News, PrefillLedger
from ksana_lab.transfer.mailbox import Mailbox
from ksana_lab.transfer.sessions import ATTEMPT_TIMEOUT_S, Acceptor, Dialer, configure
from ksana_lab.types import NodeAddr, Role

log = logging.getLogger(__name__)

_EXPIRE_INTERVAL_NS = 200_000_000  # how late a lease may end
_MAX_IPC_PATH = 100  # the kernel allows 107 bytes


def control_address(ipc_dir: str) -> str:
    """Where the ranks reach the coordinator. Raises TransferError when the directory's name is too long for a socket."""
    path = str(Path(ipc_dir) / "kv-control")
    if len(path) > _MAX_IPC_PATH:
        raise TransferError(f"{path} is too long for a local socket ({len(path)} bytes, {_MAX_IPC_PATH} at most); use a shorter directory")
    return f"ipc://{path}"


class Coordinator:
    """Made, posted to and closed by the engine's thread; ``wake`` is called from the control thread when there is news."""

    def __init__(
        self,
        options: ConnectorOptions,
        *,
        shape: wire.Shape,
        endpoints: list[wire.Endpoint],
        waiting_timeout_s: float,
        ipc_dir: str,
        wake: Callable[[], None],
        recorder: NullRecorder,
    ) -> None:
        """Raises TransferError when ``coordinator_addr`` cannot be bound."""
        self._wake, self._recorder, self._num_ranks = wake, recorder, shape.tp_size
        self._is_prefill = options.role is Role.PREFILL
        self.incarnation = uuid.uuid4().hex
        self._context = zmq.Context()
        self._mailbox: Mailbox[Callable[[int], None] | None] = Mailbox()
        self._is_held = self._has_unsaid = False  # the engine's thread's
        self._polled: tuple[tuple[zmq.Socket, ...], zmq.Poller] = (), zmq.Poller()
        self._news: deque[News] = deque()
        self._fatal: BaseException | None = None
        self._rank_counters: dict[int, dict[str, float]] = {}
        self._backlog: dict[int, list[bytes] | None] = {rank: [] for rank in range(self._num_ranks)}  # None = the rank has reported
        self._decoder = wire.Decoder(wire.FromRank)
        self._expire_at_ns = 0
        self.connected: list[str] = []
        self.pairs: dict[str, str] = {}
        try:
            self._router, self.address = self._bind(options.coordinator_addr)
            self._hub = self._open_hub(ipc_dir)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        lease_ns = int(options.lease_s * 1e9)
        timeout_ns = int(waiting_timeout_s * 1e9)
        attempt_s = min(options.connect_timeout_s, ATTEMPT_TIMEOUT_S)
        self.prefill: PrefillLedger | None = None
        self.decode: DecodeLedger | None = None
        self._sessions: Acceptor | Dialer
        if self._is_prefill:
            self._sessions = acceptor = Acceptor(
                self._router, shape=shape, incarnation=self.incarnation, checksum=options.checksum, attempt_timeout_s=attempt_s, owner=self
            )
            self.prefill = PrefillLedger(
                self._num_ranks, lease_ns=lease_ns, claim_ns=max(lease_ns, timeout_ns), session_of=acceptor.session_of, effects=self
            )
        else:
            self._sessions = dialer = Dialer(
                self._context, own_address=self.address, shape=shape, endpoints=endpoints, incarnation=self.incarnation,
                checksum=options.checksum, connect_timeout_s=options.connect_timeout_s, attempt_timeout_s=attempt_s, owner=self,
            )  # fmt: skip
            self.decode = DecodeLedger(
                self._num_ranks, shape.num_kv_heads, lease_ns=lease_ns, timeout_ns=timeout_ns,
                pair_of=dialer.pair_of, describe=dialer.why, effects=self,
            )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="kv-control", daemon=True)
        self._thread.start()

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def post(self, action: Callable[[int], None]) -> None:
        """Run ``action(now_ns)`` on the control thread, in order."""
        self._mailbox.put(action, is_urgent=not self._is_held)
        self._has_unsaid = self._has_unsaid or self._is_held

    def hold(self) -> None:
        """From here to ``release`` what is posted wakes nobody: the engine's thread has something on its hands that must not wait for the
        interpreter's lock."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        if self._has_unsaid:
            self._has_unsaid = False
            self._mailbox.ring()

    def take_news(self) -> list[News]:
        """Raises TransferError when the control thread has died."""
        if self._fatal is not None:
            raise TransferError(f"the control thread of KV transfer died: {self._fatal!r}") from self._fatal
        news = []
        while self._news:
            news.append(self._news.popleft())
        return news

    def update(self, update: PeerUpdate) -> None:
        sessions = self._sessions
        if isinstance(sessions, Acceptor):
            self.post(lambda now_ns: sessions.update(update))
        else:
            self.post(lambda now_ns: sessions.update(update, now_ns))

    def stats(self) -> dict[str, float]:
        """Counters of the ranks, summed, and of the ledger. Read without a lock: each value by itself is right."""
        total: defaultdict[str, float] = defaultdict(float)
        links: dict[str, list[float]] = {}
        for counters in list(self._rank_counters.values()):
            for name, value in counters.items():
                if name.startswith("link_"):
                    links.setdefault(name, []).append(value)
                else:
                    total[name] += value
        stats = dict(total)
        stats |= {name: (max if name == "link_round_trip_s" else min)(values) for name, values in links.items()}  # the worst link's
        if stats.get("wire_s"):
            stats["hidden_fraction"] = 1.0 - min(1.0, stats["exposed_s"] / stats["wire_s"])
        stats["pairs_connected"] = float(len(self.connected))
        stats["bad_messages"] = float(self._sessions.num_bad_messages)
        if self.prefill is not None:
            ledger: PrefillLedger | DecodeLedger = self.prefill
            stats["requests_sent"] = float(self.prefill.num_sent)
            states = [e.state for e in [*self.prefill.entries.copy().values(), *self.prefill.draining.copy().values()]]
            names = ("announced", "unannounced", "sending", "doomed")
        else:
            assert self.decode is not None and isinstance(self._sessions, Dialer)
            ledger = self.decode
            stats["requests_received"] = float(self.decode.num_received)
            stats["connect_retries"] = stats.get("connect_retries", 0.0) + self._sessions.num_retries
            states = [e.state for e in self.decode.by_window.copy().values()]
            names = ("unconnected", "arming", "receiving", "doomed")
        stats["requests_failed"] = float(ledger.num_failed)
        stats["lease_expiries"] = float(ledger.num_lease_expiries)
        counts = Counter(states)
        stats.update({f"state_{name}": float(counts[name]) for name in names})
        return stats

    def close(self) -> None:
        """Say goodbye to the peers and end. May be called twice."""
        self._mailbox.put(None)
        self._thread.join(timeout=10)

    # ---- the control thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the control thread of KV transfer died")
            self._fatal = error
            self._wake()
        finally:
            self._shut_down()

    def _turn(self) -> bool:
        """Wait for something, handle everything that is there. False: the end."""
        now_ns = time.monotonic_ns()
        self._poller_of(tuple(self._sockets())).poll(max(0, -(-(self._next_ns(now_ns) - now_ns) // 1_000_000)))
        now_ns = time.monotonic_ns()
        # Ranks first in, last handled: what the engine posted before it ran a step precedes what that step makes a rank say.
        reports = self._read_ranks()
        for action in self._mailbox.take_all():
            if action is None:
                return False
            action(now_ns)
        for report in reports:
            self._hear_rank(report, now_ns)
        self._sessions.receive(now_ns)
        if isinstance(self._sessions, Dialer):
            self._turn_strangers_away()
        self._sessions.tick(now_ns)
        if now_ns >= self._expire_at_ns:
            self._expire_at_ns = now_ns + _EXPIRE_INTERVAL_NS
            (self.prefill or self.decode).expire(now_ns)  # type: ignore[union-attr]
        self.connected, self.pairs = self._sessions.connected, self._sessions.describe()
        return True

    def _poller_of(self, sockets: tuple[zmq.Socket, ...]) -> zmq.Poller:
        if sockets != self._polled[0]:
            poller = zmq.Poller()
            for source in (*sockets, self._mailbox.fileno()):
                poller.register(source, zmq.POLLIN)
            self._polled = sockets, poller
        return self._polled[1]

    def _sockets(self) -> Iterator[zmq.Socket]:
        yield self._hub
        if isinstance(self._sessions, Dialer):
            yield self._router
        yield from self._sessions.sockets()

    def _next_ns(self, now_ns: int) -> int:
        entries = self.prefill.entries if self.prefill is not None else self.decode.entries  # type: ignore[union-attr]
        due = self._expire_at_ns if entries else now_ns + 1_000_000_000
        return min(due, self._sessions.next_ns(now_ns)) if isinstance(self._sessions, Dialer) else due

    def _read_ranks(self) -> list[Any]:
        reports: list[Any] = []
        while True:
            try:
                identity, data = self._hub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return reports
            reports.append(self._decoder.decode(data))  # of our own processes: anything malformed is a bug, and fatal
            self._open_backlog(reports[-1].rank, identity)

    def _hear_rank(self, message: msgspec.Struct, now_ns: int) -> None:
        if isinstance(message, wire.RankStats):
            self._rank_counters[message.rank] = message.counters
        elif isinstance(message, wire.PeerLost):
            self._sessions.on_rank_lost(message.session, message.reason, now_ns)
        elif isinstance(message, wire.PeerConnected):
            assert isinstance(self._sessions, Acceptor)
            self._sessions.on_rank_connected(message.rank, message.session, self._num_ranks)
        elif self.prefill is not None:
            self._prefill_rank(self.prefill, message, now_ns)
        elif self.decode is not None:
            self._decode_rank(self.decode, message)

    @staticmethod
    def _prefill_rank(ledger: PrefillLedger, message: msgspec.Struct, now_ns: int) -> None:
        if isinstance(message, wire.RankSent):
            ledger.on_rank_sent(message.rank, message.key, message.serial)
        elif isinstance(message, wire.RankFailed):
            ledger.on_rank_failed(message.key, message.window, message.reason, now_ns)
        elif isinstance(message, wire.Dropped):
            ledger.on_dropped(message.rank, message.key, message.serial, message.window)

    @staticmethod
    def _decode_rank(ledger: DecodeLedger, message: msgspec.Struct) -> None:
        if isinstance(message, wire.Armed):
            ledger.on_armed(message.rank, message.window)
        elif isinstance(message, wire.RankReceived):
            ledger.on_rank_received(message.rank, message.window)
        elif isinstance(message, wire.RankFailed):
            ledger.on_rank_failed(message.window, message.reason)
        elif isinstance(message, wire.Dropped):
            ledger.on_dropped(message.rank, message.window)

    def _turn_strangers_away(self) -> None:
        """A decode node calls and is not called; its address is bound so that a mistaken caller hears why."""
        while True:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            log.warning("somebody called this decode node's control address %s; only prefill nodes are called", self.address)
            reason = f"{self.address} is a decode node; a decode node calls its prefill nodes"
            self._router.send_multipart((frames[0], wire.encode(wire.Refuse("", 0, reason, False))), zmq.NOBLOCK)

    # ---- Effects, SessionOwner ---------------------------------------------------------------------------------------

    def to_peer(self, session: int, message: msgspec.Struct) -> None:
        self._sessions.send(session, message)

    def to_ranks(self, message: msgspec.Struct) -> None:
        data = wire.encode(message)
        for rank, backlog in self._backlog.items():
            if backlog is None:
                self._hub.send_multipart((_identity(rank), data), zmq.NOBLOCK)
            else:
                backlog.append(data)

    def news(self, news: News) -> None:
        self._recorder.instant(news.kind, "transfer", seq_id=news.seq_id, reason=news.reason)
        self._news.append(news)
        self._wake()

    def on_session_up(self, comm_key: str) -> None:
        self.connected = self._sessions.connected
        ledger = self.prefill or self.decode
        assert ledger is not None
        ledger.on_connected(comm_key)
        self._recorder.instant("pair_connected", "transfer", comm_key=comm_key)
        self._wake()  # the registrar is told of connected pairs

    def on_session_lost(self, session: int, comm_key: str, reason: str, now_ns: int) -> None:
        self._recorder.instant("session_lost", "transfer", session=session, reason=reason)
        self.connected = self._sessions.connected
        if self.prefill is not None:
            self.prefill.on_session_lost(session, comm_key, reason, now_ns)
        elif self.decode is not None:
            self.decode.on_session_lost(session, reason)
        self._wake()

    def on_clock(self, clock_domain: str, offset: Offset) -> None:
        self._recorder.instant("offset", "clock", domain=clock_domain, offset_ns=offset.offset_ns, error_ns=offset.error_ns)

    def on_message(self, message: msgspec.Struct, now_ns: int) -> None:
        if self.prefill is not None:
            if isinstance(message, wire.Queued):
                self.prefill.on_queued(message)
            elif isinstance(message, wire.Announce):
                self.prefill.on_announce(message, now_ns)
            elif isinstance(message, wire.Cancel):
                self.prefill.on_cancel(message, now_ns)
        elif self.decode is not None:
            if isinstance(message, wire.Begun):
                self.decode.on_begun(message)
            elif isinstance(message, wire.FirstToken):
                self.decode.on_first_token(message)
            elif isinstance(message, wire.Failed):
                self.decode.on_failed(message)
            elif isinstance(message, wire.CancelDone):
                self.decode.on_cancel_done(message)

    # ---- sockets -----------------------------------------------------------------------------------------------------

    def _bind(self, wanted: NodeAddr | None) -> tuple[zmq.Socket, str]:
        if wanted is None:
            raise TransferError("setting.connector.coordinator_addr is needed on a prefill or decode node (an address of this host)")
        router = self._context.socket(zmq.ROUTER)
        configure(router)
        router.setsockopt(zmq.IPV6, ":" in wanted.host)
        try:
            router.bind(f"tcp://{wanted}")
        except zmq.ZMQError as error:
            router.close(linger=0)
            hint = "is another node running there?" if error.errno == zmq.EADDRINUSE else "it must be an address of this host"
            raise TransferError(f"cannot bind coordinator_addr {wanted}: {error.strerror}; {hint}") from error
        return router, router.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0").removeprefix("tcp://")  # type: ignore[union-attr]

    def _open_hub(self, ipc_dir: str) -> zmq.Socket:
        hub = self._context.socket(zmq.ROUTER)
        hub.setsockopt(zmq.LINGER, 200)
        hub.setsockopt(zmq.SNDHWM, 0)
        hub.setsockopt(zmq.RCVHWM, 0)
        hub.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            hub.bind(control_address(ipc_dir))
        except zmq.ZMQError as error:
            hub.close(linger=0)
            raise TransferError(f"cannot open the ranks' control socket in {ipc_dir}: {error.strerror}") from error
        return hub

    def _open_backlog(self, rank: int, identity: bytes) -> None:
        """A rank's first message: from now on it can be reached."""
        backlog = self._backlog[rank]
        if backlog is not None:
            assert identity == _identity(rank), identity
            self._backlog[rank] = None
            for data in backlog:
                self._hub.send_multipart((identity, data), zmq.NOBLOCK)

    def _shut_down(self) -> None:
        try:
            self._sessions.close(time.monotonic_ns())
        except Exception:
            log.exception("ending the sessions failed")
        self.connected = []
        self._router.close()
        self._hub.close()
        self._context.term()
        self._mailbox.close()


def _identity(rank: int) -> bytes:
    return f"rank-{rank}".encode()
