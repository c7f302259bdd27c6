"""Sessions between prefill and decode nodes: who may talk to whom, since when, and whether they still do.

The decode node dials (``Dialer``), the prefill node accepts (``Acceptor``). One zmq connection carries one session: it begins with
Hello/Welcome, is *connected* when every P rank reaches the D ranks it feeds, and ends with its connection, with silence, with Bye, or when
the peer comes back as another incarnation. A session never resumes; a new one starts from nothing. What requests do inside a session is
not known here. Everything runs on the coordinator's thread; times are monotonic ns, passed in; nothing blocks."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ksana_lab.errors import LayoutMismatch
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import PeerUpdate
from ksana_lab.protocol.node import split_comm_key
from ksana_lab.tracing.clock import Offset, OffsetEstimator
from ksana_lab.tracing.recorder import clock_domain
from ksana_lab.transfer.lifecycle import Pair
from ksana_lab.transfer.plan import check_shapes
from ksana_lab.types import is_loopback

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
PEER_TIMEOUT_S = 10.0  # a peer that says nothing for this long is gone
HELLO_TIMEOUT_S = 5.0
ATTEMPT_TIMEOUT_S = 30.0  # from Welcome until every rank is connected
_BACKOFF_S = (0.05, 1.0)  # first and longest wait before dialling again
_REFUSED_BACKOFF_S = 5.0  # after a refusal that only somebody's configuration can change


class SessionOwner(Protocol):
    """What sessions need of the coordinator."""

    def to_ranks(self, message: msgspec.Struct) -> None: ...

    def on_session_up(self, comm_key: str) -> None: ...

    def on_session_lost(self, session: int, comm_key: str, reason: str, now_ns: int) -> None: ...

    def on_message(self, message: msgspec.Struct, now_ns: int) -> None:
        """A message of a living session, from its peer."""

    def on_clock(self, clock_domain: str, offset: Offset) -> None:
        """D only: how the peer's clock stands, better known than before."""


def configure(socket: zmq.Socket) -> None:
    """Bounds for a socket that strangers can reach."""
    socket.setsockopt(zmq.LINGER, 200)
    socket.setsockopt(zmq.SNDHWM, 100_000)
    socket.setsockopt(zmq.RCVHWM, 100_000)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


def _names(comm_key: str) -> tuple[str, str]:
    """(prefill, decode) for messages."""
    try:
        return split_comm_key(comm_key)
    except ValueError:
        return comm_key, comm_key


# ---- P ----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Accepted:
    session: int
    hello: wire.Hello
    identity: bytes
    fd: int  # of the connection: zmq tells of its end by this number
    last_seen_ns: int
    deadline_ns: int
    ranks: set[int] = field(default_factory=set)
    is_connected: bool = False


class Acceptor:
    """P's sessions, on a bound ROUTER."""

    def __init__(
        self, router: zmq.Socket, *, shape: wire.Shape, incarnation: str, checksum: bool, attempt_timeout_s: float, owner: SessionOwner
    ) -> None:
        self._router, self._shape, self._incarnation, self._checksum = router, shape, incarnation, checksum
        self._attempt_timeout_s, self._owner = attempt_timeout_s, owner
        self._monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._decoder = wire.Decoder(wire.ToPrefill)
        self._comm_ids: dict[str, str] = {}
        self._sessions: dict[int, _Accepted] = {}
        self._said: dict[str, str] = {}  # why a pair does not connect: said once, for the decode node tries each second
        self.num_bad_messages = 0

    @property
    def connected(self) -> list[str]:
        return sorted(s.hello.comm_key for s in self._sessions.values() if s.is_connected)

    def session_of(self, comm_key: str) -> int:
        """Of the connected pair; 0 when it is not."""
        return next((s.session for s in self._sessions.values() if s.is_connected and s.hello.comm_key == comm_key), 0)

    def describe(self) -> dict[str, str]:
        """State of every pair, in words."""
        states = dict.fromkeys(self._comm_ids, "waiting for the decode node to call")
        states.update((s.hello.comm_key, "ranks are connecting") for s in self._sessions.values())
        states.update(self._said)
        states.update((s.hello.comm_key, "connected") for s in self._sessions.values() if s.is_connected)
        return states

    def update(self, update: PeerUpdate) -> None:
        """Pairs that are not named any more keep their session for as long as it lives."""
        self._comm_ids = {pair.comm_key: pair.comm_id for pair in update.pairs}

    def sockets(self) -> Iterator[zmq.Socket]:
        yield self._monitor
        yield self._router

    def receive(self, now_ns: int) -> None:
        """Everything that has come. Ends of connections first: their numbers are used again."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                for s in [s for s in self._sessions.values() if s.fd == event["value"]]:
                    self._end(s, "the decode node closed the connection", now_ns, tell=False)
        while True:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(frames) != 2:
                self._reject(frames[0].bytes, f"message of {len(frames)} frames")
                continue
            try:
                message = self._decoder.decode(frames[1].bytes)
            except wire.BadMessage as error:
                self._reject(frames[0].bytes, str(error))
                continue
            self._handle(frames[0].bytes, int(frames[1].get(zmq.SRCFD)), message, now_ns)

    def send(self, session: int, message: msgspec.Struct) -> None:
        s = self._sessions.get(session)
        if s is not None:
            self._send(s.identity, message)

    def on_rank_connected(self, rank: int, session: int, num_ranks: int) -> None:
        s = self._sessions.get(session)
        if s is None:
            return
        s.ranks.add(rank)
        if len(s.ranks) == num_ranks and not s.is_connected:
            s.is_connected = True
            self._said.pop(s.hello.comm_key, None)
            log.info("pair %s is connected", s.hello.comm_key)
            self._send(s.identity, wire.Connected(session))
            self._owner.on_session_up(s.hello.comm_key)

    def on_rank_lost(self, session: int, reason: str, now_ns: int) -> None:
        s = self._sessions.get(session)
        if s is not None:
            self._end(s, reason, now_ns)

    def tick(self, now_ns: int) -> None:
        for s in list(self._sessions.values()):
            if now_ns - s.last_seen_ns > PEER_TIMEOUT_S * 1e9:
                self._end(s, f"the decode node said nothing for {PEER_TIMEOUT_S:g} s", now_ns)
            elif not s.is_connected and now_ns > s.deadline_ns:
                self._end(s, f"not every rank connected within {self._attempt_timeout_s:g} s", now_ns)

    def close(self, now_ns: int) -> None:
        for s in list(self._sessions.values()):
            self._end(s, "the prefill node is shutting down", now_ns, is_farewell=True)
        self._router.disable_monitor()
        self._monitor.close(linger=0)

    def _handle(self, identity: bytes, fd: int, message: msgspec.Struct, now_ns: int) -> None:
        if isinstance(message, wire.Hello):
            self._greet(identity, fd, message, now_ns)
            return
        s = self._sessions.get(message.session)  # type: ignore[attr-defined]
        if s is None or s.identity != identity:
            self._send(identity, wire.Refuse("", message.session, "this session is over", True))  # type: ignore[attr-defined]
            return
        s.last_seen_ns = now_ns
        if isinstance(message, wire.Ping):
            self._send(identity, wire.Pong(s.session, message.sent_ns, time.monotonic_ns(), clock_domain()))
        elif isinstance(message, wire.Bye):
            self._end(s, message.reason, now_ns, tell=False, is_farewell=True)
        elif (wrong := _why_wrong(message, s.hello)) is not None:
            self._reject(identity, wrong)
        else:
            self._owner.on_message(message, now_ns)

    def _greet(self, identity: bytes, fd: int, hello: wire.Hello, now_ns: int) -> None:
        why, retry = self._why_not(hello)
        if why is not None:
            if self._said.get(hello.comm_key) != why:
                log.log(logging.INFO if retry else logging.ERROR, "pair %s: %s", hello.comm_key, why)
            if hello.comm_key in self._comm_ids:
                self._said[hello.comm_key] = why
            self._send(identity, wire.Refuse(hello.comm_key, 0, wire.clip(why), retry))
            return
        for old in [s for s in self._sessions.values() if s.hello.comm_key == hello.comm_key]:
            is_same = old.hello.incarnation == hello.incarnation
            self._end(old, "the decode node connected anew" if is_same else "the decode node was restarted", now_ns)
        session = secrets.randbits(62) + 1
        deadline_ns = now_ns + int(self._attempt_timeout_s * 1e9)
        self._sessions[session] = _Accepted(session, hello, identity, fd, now_ns, deadline_ns)
        self._send(identity, wire.Welcome(hello.comm_key, session, self._incarnation, self._shape))
        name, checksum = _names(hello.comm_key)[1], hello.checksum or self._checksum
        self._owner.to_ranks(wire.ConnectPeer(session, name, hello.shape, hello.endpoints, checksum, self._attempt_timeout_s / 2))

    def _why_not(self, hello: wire.Hello) -> tuple[str | None, bool]:
        """Why ``hello`` is refused, and whether it may be otherwise soon."""
        comm_id = self._comm_ids.get(hello.comm_key)
        if comm_id is None:
            return "the prefill node has not heard of this pair from the router", True
        if comm_id != hello.comm_id:
            return f"comm id is {comm_id!r} on the prefill node and {hello.comm_id!r} on the decode node", True
        if sorted(e.rank for e in hello.endpoints) != list(range(hello.shape.tp_size)):
            return f"{len(hello.endpoints)} endpoints for {hello.shape.tp_size} ranks", False
        try:
            check_shapes(self._shape, hello.shape)
        except LayoutMismatch as error:
            return str(error), False
        return None, True

    def _end(self, s: _Accepted, reason: str, now_ns: int, *, tell: bool = True, is_farewell: bool = False) -> None:
        del self._sessions[s.session]
        if s.is_connected or is_farewell:
            log.log(logging.INFO if is_farewell else logging.WARNING, "pair %s: session ended: %s", s.hello.comm_key, reason)
        elif self._said.get(s.hello.comm_key) != reason:
            log.warning("pair %s is not connected: %s", s.hello.comm_key, reason)
            if s.hello.comm_key in self._comm_ids:
                self._said[s.hello.comm_key] = reason
        if tell:
            self._send(s.identity, wire.Bye(s.session, wire.clip(reason)))
        self._owner.to_ranks(wire.ClosePeer(s.session))
        self._owner.on_session_lost(s.session, s.hello.comm_key, reason, now_ns)

    def _reject(self, identity: bytes, why: str) -> None:
        self.num_bad_messages += 1
        log.warning("rejected a control message: %s", why)
        self._send(identity, wire.Refuse("", 0, wire.clip(f"message rejected: {why}"), False))

    def _send(self, identity: bytes, message: msgspec.Struct) -> None:
        try:
            self._router.send_multipart((identity, wire.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("%s not sent: %s", type(message).__name__, error)  # a full queue: the peer does not read, and liveness ends it


def _why_wrong(message: msgspec.Struct, hello: wire.Hello) -> str | None:
    """Range checks that need the session's shape."""
    key = getattr(message, "key", None)
    if key is not None and key.comm_key != hello.comm_key:
        return f"a key of pair {key.comm_key} in a session of {hello.comm_key}"
    if isinstance(message, wire.Announce):
        size, num_blocks = hello.shape.block_size, hello.shape.num_blocks
        needed = -(-message.num_tokens // size)
        is_good = (
            message.window > 0
            and message.num_tokens > 0
            and message.num_cached_tokens <= message.num_tokens
            and message.num_cached_tokens % size == 0
            and needed <= len(message.blocks)
            and all(block < num_blocks for block in message.blocks)
        )
        if not is_good:
            return f"announcement of {message.num_tokens} tokens in {len(message.blocks)} blocks of {num_blocks}"
    return None


# ---- D ----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Dial:
    """One pair, as the decode node sees it."""

    comm_key: str
    since_ns: int
    comm_id: str = ""
    address: str = ""
    is_named: bool = True
    socket: zmq.Socket | None = None
    monitor: zmq.Socket | None = None
    is_greeted: bool = False  # Hello is out
    session: int = 0  # 0 = no Welcome yet
    pair: Pair | None = None
    is_connected: bool = False
    next_try_ns: int = 0
    backoff_s: float = 0.0
    deadline_ns: int = 0
    last_seen_ns: int = 0
    next_ping_ns: int = 0
    why: str = "the router has not named the prefill node's control address yet"  # or why the last attempt failed
    has_complained: bool = False
    clock: OffsetEstimator = field(default_factory=OffsetEstimator)


def _whose(dial: _Dial) -> str:
    """A control address that means this very host, of a prefill node that the router calls elsewhere."""
    host, _, _ = dial.address.rpartition(":")
    if not is_loopback(host.strip("[]")) or _names(dial.comm_key)[0].rpartition(":")[0] == host:
        return ""
    return f"; to this node {host} is its own host: give the prefill node a coordinator_addr that other hosts reach"


class Dialer:
    """D's sessions, one DEALER per pair and attempt."""

    def __init__(
        self,
        context: zmq.Context,
        *,
        own_address: str,
        shape: wire.Shape,
        endpoints: list[wire.Endpoint],
        incarnation: str,
        checksum: bool,
        connect_timeout_s: float,
        attempt_timeout_s: float,
        owner: SessionOwner,
    ) -> None:
        self._context, self._own_address = context, own_address
        self._shape, self._endpoints, self._incarnation, self._checksum = shape, endpoints, incarnation, checksum
        self._connect_timeout_s, self._attempt_timeout_s, self._owner = connect_timeout_s, attempt_timeout_s, owner
        self._dials: dict[str, _Dial] = {}
        self._decoder = wire.Decoder(wire.ToDecode)
        self.num_bad_messages = self.num_retries = 0

    @property
    def connected(self) -> list[str]:
        return sorted(d.comm_key for d in self._dials.values() if d.is_connected)

    def describe(self) -> dict[str, str]:
        return {d.comm_key: "connected" if d.is_connected else d.why for d in self._dials.values()}

    def why(self, comm_key: str) -> str:
        """For a message to a user: what a request of this pair waits for."""
        dial = self._dials.get(comm_key)
        what = dial.why if dial is not None else "the router has not named this pair"
        return f"pair {comm_key} is not connected: {what}"

    def pair_of(self, comm_key: str) -> Pair | None:
        dial = self._dials.get(comm_key)
        return dial.pair if dial is not None and dial.is_connected else None

    def update(self, update: PeerUpdate, now_ns: int) -> None:
        """What the router names now. A living session of a pair that is not named stays; it is only not dialled again."""
        named = {pair.comm_key: pair for pair in update.pairs}
        for comm_key, dial in list(self._dials.items()):
            dial.is_named = comm_key in named
            if not dial.is_named and dial.socket is None:
                del self._dials[comm_key]
        for comm_key, pair in named.items():
            dial = self._dials.setdefault(comm_key, _Dial(comm_key, now_ns))
            address = next((a for _, _, a in pair.addresses if a != self._own_address), "")
            if (address and address != dial.address) or pair.comm_id != dial.comm_id:
                if dial.socket is not None and (not dial.is_connected or (address and address != dial.address)):
                    self._lose(dial, f"the prefill node is now at {address or 'an unknown address'}", now_ns)
                dial.next_try_ns, dial.backoff_s = now_ns, 0.0
            dial.comm_id, dial.address = pair.comm_id, address or dial.address

    def sockets(self) -> Iterator[zmq.Socket]:
        for dial in self._dials.values():
            if dial.socket is not None and dial.monitor is not None:
                yield dial.monitor
                yield dial.socket

    def receive(self, now_ns: int) -> None:
        for dial in list(self._dials.values()):
            self._read_messages(dial, now_ns)
            self._read_monitor(dial, now_ns)

    def send(self, session: int, message: msgspec.Struct) -> None:
        for dial in self._dials.values():
            if dial.session == session and session:
                self._send(dial, message)

    def on_rank_lost(self, session: int, reason: str, now_ns: int) -> None:
        for dial in self._dials.values():
            if dial.session == session and session:
                self._lose(dial, reason, now_ns, tell=True)

    def tick(self, now_ns: int) -> None:
        for dial in list(self._dials.values()):
            if dial.socket is None:
                self._tick_idle(dial, now_ns)
            elif now_ns > dial.deadline_ns and not dial.is_connected:
                self._lose(dial, f"the prefill node at {dial.address} did not answer in time", now_ns, tell=True)
            elif dial.session and now_ns - dial.last_seen_ns > PEER_TIMEOUT_S * 1e9:
                self._lose(dial, f"the prefill node at {dial.address} said nothing for {PEER_TIMEOUT_S:g} s", now_ns, tell=True)
            elif dial.session and now_ns >= dial.next_ping_ns:
                dial.next_ping_ns = now_ns + int(PING_INTERVAL_S * 1e9)
                self._send(dial, wire.Ping(dial.session, time.monotonic_ns()))

    def next_ns(self, now_ns: int) -> int:
        """When ``tick`` has something to do."""
        due = now_ns + int(PING_INTERVAL_S * 1e9)
        for dial in self._dials.values():
            if dial.socket is None and dial.is_named and dial.address and dial.comm_id:
                due = min(due, dial.next_try_ns)
        return due

    def close(self, now_ns: int) -> None:
        for dial in list(self._dials.values()):
            if dial.socket is not None:
                self._lose(dial, "the decode node is shutting down", now_ns, tell=True, is_farewell=True)

    def _tick_idle(self, dial: _Dial, now_ns: int) -> None:
        if not dial.is_named:
            del self._dials[dial.comm_key]
            return
        if now_ns - dial.since_ns > self._connect_timeout_s * 1e9 and not dial.has_complained:
            dial.has_complained = True
            log.error("pair %s is not connected after %g s: %s", dial.comm_key, self._connect_timeout_s, dial.why)
        if dial.address and dial.comm_id and now_ns >= dial.next_try_ns:
            self._dial(dial, now_ns)

    def _dial(self, dial: _Dial, now_ns: int) -> None:
        socket = self._context.socket(zmq.DEALER)
        configure(socket)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # one connection, one session: a new attempt is a new socket
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.IPV6, dial.address.startswith("["))
        dial.socket = socket
        dial.monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        dial.deadline_ns = now_ns + int(HELLO_TIMEOUT_S * 1e9)
        try:
            socket.connect(f"tcp://{dial.address}")
        except zmq.ZMQError as error:
            self._lose(dial, f"{dial.address} is no address: {error}", now_ns)

    def _read_monitor(self, dial: _Dial, now_ns: int) -> None:
        while dial.monitor is not None and dial.monitor.poll(0):
            event = recv_monitor_message(dial.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED and not dial.is_greeted:
                dial.is_greeted = True
                hello = wire.Hello(dial.comm_key, dial.comm_id, self._incarnation, self._shape, self._endpoints, self._checksum)
                self._send(dial, hello)
            elif event == zmq.EVENT_CLOSED:
                self._lose(dial, f"nothing answers at the prefill node's control address {dial.address}{_whose(dial)}", now_ns)
            elif event == zmq.EVENT_DISCONNECTED:
                self._lose(dial, f"the prefill node at {dial.address} closed the connection", now_ns)

    def _read_messages(self, dial: _Dial, now_ns: int) -> None:
        while dial.socket is not None:
            try:
                data = dial.socket.recv(zmq.NOBLOCK)
                message = self._decoder.decode(data)
            except zmq.Again:
                return
            except wire.BadMessage as error:
                self.num_bad_messages += 1
                log.warning("rejected a control message of %s: %s", dial.address, error)
                continue
            self._handle(dial, message, now_ns)

    def _handle(self, dial: _Dial, message: msgspec.Struct, now_ns: int) -> None:
        if isinstance(message, wire.Refuse):
            if message.session in (0, dial.session):
                self._lose(dial, f"the prefill node refused: {message.reason}", now_ns, is_final=not message.retry)
        elif isinstance(message, wire.Welcome):
            self._welcome(dial, message, now_ns)
        elif not dial.session or message.session != dial.session:  # type: ignore[attr-defined]
            self.num_bad_messages += 1
            log.warning("a %s of another session came from %s", type(message).__name__, dial.address)
        else:
            dial.last_seen_ns = now_ns
            self._handle_in_session(dial, message, now_ns)

    def _handle_in_session(self, dial: _Dial, message: msgspec.Struct, now_ns: int) -> None:
        if isinstance(message, wire.Bye):
            self._lose(dial, f"the prefill node ended the session: {message.reason}", now_ns, is_farewell=True)
        elif isinstance(message, wire.Connected):
            dial.is_connected, dial.backoff_s, dial.has_complained = True, 0.0, False
            log.info("pair %s is connected", dial.comm_key)
            self._owner.on_session_up(dial.comm_key)
        elif not isinstance(message, wire.Pong):
            self._owner.on_message(message, now_ns)
        elif message.ping_ns and message.clock_domain:
            offset = dial.clock.add(message.ping_ns, message.now_ns, time.monotonic_ns())
            if offset is not None:
                self._owner.on_clock(message.clock_domain, offset)

    def _welcome(self, dial: _Dial, message: wire.Welcome, now_ns: int) -> None:
        if dial.session or message.comm_key != dial.comm_key or not message.session:
            self._lose(dial, f"unexpected welcome for pair {message.comm_key}", now_ns)
            return
        try:
            check_shapes(message.shape, self._shape)
        except LayoutMismatch as error:
            self._lose(dial, str(error), now_ns, is_final=True)
            return
        dial.session = message.session
        dial.pair = Pair(message.session, _names(dial.comm_key)[0], message.shape.tp_size)
        dial.last_seen_ns = dial.next_ping_ns = now_ns
        dial.deadline_ns = now_ns + int(self._attempt_timeout_s * 1e9)

    def _lose(
        self, dial: _Dial, reason: str, now_ns: int, *, tell: bool = False, is_final: bool = False, is_farewell: bool = False
    ) -> None:
        """Back to no connection; ``is_final``: only a change of somebody's configuration helps, so try seldom."""
        if dial.is_connected:
            log.log(logging.INFO if is_farewell else logging.WARNING, "pair %s: session ended: %s", dial.comm_key, reason)
            dial.since_ns = now_ns
        elif reason != dial.why:
            log.log(logging.ERROR if is_final else logging.INFO, "pair %s: %s", dial.comm_key, reason)
        session = dial.session
        if tell and session:
            self._send(dial, wire.Bye(session, wire.clip(reason)))
        if dial.socket is not None and dial.monitor is not None:
            dial.socket.disable_monitor()
            dial.monitor.close(linger=0)
            dial.socket.close()
        dial.socket = dial.monitor = dial.pair = None
        dial.is_greeted = dial.is_connected = False
        dial.session, dial.why = 0, reason
        self.num_retries += 1
        first_s, longest_s = _BACKOFF_S
        dial.backoff_s = _REFUSED_BACKOFF_S if is_final else min(longest_s, max(first_s, dial.backoff_s * 2))
        dial.next_try_ns = now_ns + int(dial.backoff_s * 1e9)
        if session:
            self._owner.to_ranks(wire.ClosePeer(session))
            self._owner.on_session_lost(session, dial.comm_key, reason, now_ns)

    def _send(self, dial: _Dial, message: msgspec.Struct) -> None:
        if dial.socket is None:
            return
        try:
            dial.socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("%s to %s not sent: %s", type(message).__name__, dial.address, error)
