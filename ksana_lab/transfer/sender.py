"""A prefill rank's half of the data plane: sends each piece of KV as soon as it is both computed and announced.

The model's thread only notes that a layer is done; control messages only note where things go; sender threads do everything that may wait.
Each link belongs to one sender thread, so what goes to one decode rank arrives in order. One lock guards the bookkeeping; it is never held
while bytes move."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import torch

from ksana_lab.config.engine import ConnectorOptions
from ksana_lab.core.connector import SendStep
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer import packing
from ksana_lab.transfer.base import DeviceTicket, Link, LinkReport, Ticket, TransferBackend
from ksana_lab.transfer.checksum import crc_of
from ksana_lab.transfer.layer_tracker import LayerTracker
from ksana_lab.transfer.link import Pacer, Pacers
from ksana_lab.transfer.outgoing import Outgoing, Piece, Route, Step
from ksana_lab.transfer.plan import HeadSlice, between, cells, copies, head_slices, rank_layout, shifted, slice_bytes
from ksana_lab.transfer.registry import host_id, needs_one_host
from ksana_lab.transfer.schedule import Speeds, bulk_minimum, choose_mode

log = logging.getLogger(__name__)

P = TypeVar("P")

_MAX_TOMBSTONES = 4096
_MAX_PLANS = 8
_SLOW_LINK = 0.5  # of what the hardware should give: below it the doctor warns
_EXAMINE_S = 10.0
_CLOSE_S = 5.0
_KEEP = 0.8  # of the old value in a running mean
_NO_CACHE = torch.empty(0, dtype=torch.uint8)  # after ``close``: the memory is its owner's alone
# A copy that a device is making is looked at when it has gone on for so much longer than at the last look: looking takes the interpreter's
# lock, and the model's thread has the prompt's token to bring home just then. At least once a millisecond: D's first step waits for it.
_POLL_DEVICE_S, _POLL_SHARE, _MAX_POLL_S = 20e-6, 0.1, 1e-3
# Layers are enqueued faster than computed, so by the time a prompt's announcement says which of them end a piece, all may be enqueued, and
# nobody would be woken before the last. While an announcement may still come, the end of every so many layers is waited for.
_LAYERS_UNTIL_ANNOUNCED = 4


@dataclass(eq=False)
class _Flight:
    """One piece on its way."""

    out: Outgoing[_PeerLink]
    route: Route[_PeerLink]
    attempt: int
    piece: Piece
    due_ns: int  # not to arrive before this: the emulated link
    start_ns: int = 0
    nbytes: int = 0  # in the caches
    wire_bytes: int = 0
    num_copies: int = 0
    tickets: list[Ticket] = field(default_factory=list)
    post_s: float = 0.0
    device_wire_s: float = 0.0
    device_exposed_s: float = 0.0  # of the prompt, on its last piece
    is_written: bool = False
    notice: wire.Notice | None = None
    range: object = None  # a profiler's, while it is on its way


@dataclass(eq=False)
class _PeerLink:
    """The way to one rank of one decode node."""

    peer: _Peer
    rank: int
    slices: list[HeadSlice]
    owner: Sender
    link: Link | None = None
    thread: _SendThread | None = None
    written: deque[_Flight] = field(default_factory=deque)  # bytes handed to the backend, notice not sent yet
    unacked: dict[int, _Flight] = field(default_factory=dict)  # by token
    report: LinkReport | None = None
    is_lost: bool = False
    wire_until_ns: int = 0
    packer: packing.Packer | None = None  # its sender thread's

    def on_ack(self, token: int, error: str | None) -> None:
        self.owner._on_ack(self, token, error)

    def on_lost(self, reason: str) -> None:
        self.owner._on_lost(self, reason)


@dataclass(eq=False)
class _Peer:
    """One decode node, for one session."""

    session: int
    name: str
    layout: KVLayout
    pacer: Pacer
    wants_checksum: bool
    is_packed: bool  # KV travels in eight bits
    links: dict[int, _PeerLink] = field(default_factory=dict)
    is_closed: bool = False


class Sender:
    """``report`` is called from any thread and must not block. ``begin_step`` and ``layer_done`` belong to the model's thread."""

    def __init__(
        self,
        *,
        rank: int,
        tp_size: int,
        layout: KVLayout,
        cache: torch.Tensor,
        backends: Sequence[TransferBackend],
        options: ConnectorOptions,
        recorder: NullRecorder,
        report: Callable[[msgspec.Struct], None],
        on_fatal: Callable[[BaseException], None],
        kernels: packing.Kernels | None = None,
    ) -> None:
        self._rank, self._tp_size = rank, tp_size
        self._layout, self._cache, self._backends = layout, cache, backends
        self._options, self._recorder, self._report, self._on_fatal = options, recorder, report, on_fatal
        self._kernels = kernels  # None = nothing was to be packed so far
        self._pacers = Pacers(options.link, tp_size)
        self._lock = threading.Lock()
        self._outgoing: dict[TransferKey, Outgoing[_PeerLink]] = {}  # in order of arrival; also those only announced
        self._dropping: dict[Outgoing[_PeerLink], wire.Dropped] = {}  # said when the last write under way is over
        self._tombstones: OrderedDict[TransferKey, int] = OrderedDict()  # key -> serial: later steps of it are ignored
        self._peers: dict[int, _Peer] = {}
        self._threads: list[_SendThread] = []
        self._helpers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those that run are kept by threading itself
        self._helpers_lock = threading.Lock()
        self._steps: dict[int, Step] = {}
        # Layers after which somebody's piece ends, or may end. Read without the lock: who reads an old one is woken too often, or later.
        self._awaited: frozenset[int] = frozenset()
        self._next_step = 0
        self._next_token = 0
        self._is_closed = False
        self._counters = dict.fromkeys(
            (
                "bytes_sent", "transfers", "copies", "requests_sent_ranks", "post_s", "wire_s", "exposed_s", "device_wire_s",
                "device_exposed_s", "send_failures", "connect_retries",
            ),
            0.0,
        )  # fmt: skip
        self._layer_s_per_token = 0.0  # computing, as measured; 0 = not yet
        self._post_s = 0.0  # handing one piece to a backend that returns at once
        is_cuda = cache.device.type == "cuda"
        self._tracker = LayerTracker(
            layout.num_layers,
            self._on_layers,
            make_event=(lambda: torch.cuda.Event(enable_timing=True, blocking=True)) if is_cuda else None,
            on_posted=self._on_posted if is_cuda and any(backend.name == "cuda_ipc" for backend in backends) else None,
            is_awaited=lambda layer: layer + 1 in self._awaited,
        )

    # ---- the model's thread ------------------------------------------------------------------------------------------

    def begin_step(self, sends: Sequence[SendStep]) -> None:
        """Raises TransferError when the step before was not reported whole."""
        if not sends:
            self._tracker.begin_step(None)
            return
        step = Step(self._layout.num_layers, num_tokens=sum(send.end - send.start for send in sends))
        with self._lock:
            number = self._next_step
            self._next_step += 1
            self._steps[number] = step
            for send in sends:
                self._add(send, step)
            self._set_awaited()
        self._tracker.begin_step(number)

    def layer_done(self, layer: int) -> None:
        self._tracker.layer_done(layer)

    def _on_posted(self, number: int, layer: int, event: object) -> None:
        """Without the lock, most times: it is called for every layer while the device waits for the host."""
        step = self._steps[number]  # it stays until all its layers are done
        step.events.append(event)
        if layer + 1 in self._awaited or step.is_posted:
            with self._lock:
                if step.is_posted or any(out.is_early for out in self._outgoing.values()):
                    self._wake_senders()

    def _on_layers(self, number: int, ready_ns: list[int]) -> None:
        with self._lock:
            step = self._steps[number]
            news = range(step.num_ready + 1, step.num_ready + 1 + len(ready_ns))  # layers, counted from 1
            step.ready_ns += ready_ns
            is_awaited = step.is_done or not self._awaited.isdisjoint(news)
            if step.is_done:
                del self._steps[number]
                self._learn(step)
                self._report_sent([out for out in self._outgoing.values() if out.chunks and out.chunks[-1].step is step], ready_ns[-1])
                self._set_awaited()
            if is_awaited:
                self._wake_senders()

    def _set_awaited(self) -> None:
        """Under the lock, when a prompt or its announcement comes, and when a step is over."""
        awaited: set[int] = set()
        for out in self._outgoing.values():
            if out.target is not None and out.mode == "layer":
                awaited.update(out.schedule)
            elif out.target is None and not out.chunks[-1].step.is_done and self._may_go_by_layers(out):
                awaited.update(range(_LAYERS_UNTIL_ANNOUNCED, self._layout.num_layers, _LAYERS_UNTIL_ANNOUNCED))
        self._awaited = frozenset(awaited)

    def _may_go_by_layers(self, out: Outgoing[_PeerLink]) -> bool:
        """As far as is known without its announcement."""
        option, most = self._options.transfer_mode, out.chunks[-1].end
        return option in ("layer", "auto") and not (out.is_complete and most < bulk_minimum(option, self._options.bulk_below_tokens))

    def _learn(self, step: Step) -> None:
        """How fast this node computes; a step's first layer is left out, since work before it counts there."""
        if step.num_layers < 2 or not step.num_tokens:
            return
        measured = (step.ready_ns[-1] - step.ready_ns[0]) / 1e9 / (step.num_layers - 1) / step.num_tokens
        old = self._layer_s_per_token
        self._layer_s_per_token = measured if not old else _KEEP * old + (1 - _KEEP) * measured

    def _speeds(self, links: Sequence[_PeerLink], num_tokens: int) -> Speeds | None:
        """For ``auto``: what the doctor measured of the slowest link, and what prefill showed."""
        reports = [link.report for link in links if link.report is not None]
        if not reports or not self._layer_s_per_token:
            return None
        bandwidth = min(report.bandwidth for report in reports)
        if self._options.link.bandwidth_gbps is not None:
            bandwidth = min(bandwidth, self._options.link.bandwidth_gbps * 1e9 / 8 / self._tp_size)
        piece_s = max(self._post_s, max(report.round_trip_s for report in reports))
        return Speeds(bandwidth, piece_s, self._layer_s_per_token * num_tokens)

    def _add(self, send: SendStep, step: Step) -> None:
        if self._tombstones.get(send.key, -1) >= send.serial:
            return  # dropped while this step was on its way here
        out = self._outgoing.get(send.key)
        if out is None:
            out = self._outgoing[send.key] = self._new_outgoing(send.key)
        assert out.serial in (0, send.serial), (out.key, out.serial, send.serial)  # the scheduler's side refuses a key that is in use
        out.serial = send.serial
        out.add(send, step)

    def _new_outgoing(self, key: TransferKey) -> Outgoing[_PeerLink]:
        return Outgoing(key, 0, self._layout.num_layers, self._layout.block_size)

    # ---- control -----------------------------------------------------------------------------------------------------

    def connect_peer(self, message: wire.ConnectPeer) -> None:
        """In the background."""
        self._in_background("kv-connect", self._connect, message)

    def close_peer(self, message: wire.ClosePeer) -> None:
        """In the background: nothing is written to the peer once its links are closed, which it sees."""
        with self._lock:
            peer = self._peers.pop(message.session, None)
            links = self._retire(peer) if peer is not None else []
        if links:
            self._in_background("kv-disconnect", _close_all, links)

    def target(self, message: wire.Target) -> None:
        """Where a prompt goes is known; what is computed of it goes now."""
        with self._lock:
            peer = self._peers.get(message.session)
            if peer is None:
                self._fail(message.key, message.window, "the connection to the decode node is gone")
                return
            out = self._outgoing.get(message.key)
            if out is None:
                out = self._outgoing[message.key] = self._new_outgoing(message.key)
            out.target, out.announced_ns = message, time.monotonic_ns()
            out.routes = [Route(link) for link in peer.links.values()]
            num_tokens = message.num_tokens - message.num_cached_tokens
            first = message.num_cached_tokens
            layer_bytes = max((self._wire_bytes(link, first, first + num_tokens, 1) for link in peer.links.values()), default=0)
            links, options = list(peer.links.values()), self._options
            out.mode, out.schedule = choose_mode(
                options.transfer_mode, options.layers_per_chunk, num_tokens, layer_bytes,
                num_layers=self._layout.num_layers, speeds=self._speeds(links, num_tokens), bulk_below=options.bulk_below_tokens,
            )  # fmt: skip
            # An emulated link starts a piece when it is computed, and a checksum or packing reads it then: they need to know when that is.
            has_emulation = options.link.bandwidth_gbps is not None or options.link.latency_us > 0
            out.is_early = (
                all(link.link is not None and link.link.is_device_ordered for link in links)
                and not has_emulation
                and not (options.checksum or peer.wants_checksum or peer.is_packed)
            )
            self._set_awaited()
            self._report_sent([out], time.monotonic_ns())
            self._wake_senders()

    def drop(self, message: wire.Drop) -> None:
        """Nothing more is read for this key; ``Dropped`` is reported when that is certain."""
        reply = wire.Dropped(self._rank, message.key, message.serial, message.window)
        with self._lock:
            if message.serial:
                self._tombstones[message.key] = message.serial
                self._tombstones.move_to_end(message.key)
                if len(self._tombstones) > _MAX_TOMBSTONES:
                    self._tombstones.popitem(last=False)
            out = self._outgoing.pop(message.key, None)
            self._set_awaited()
            if out is not None:
                out.is_dropped = True
                if out.num_writing:
                    self._dropping[out] = reply
                    return
        self._report(reply)

    def stats(self) -> dict[str, float]:
        with self._lock:
            links = [link for peer in self._peers.values() for link in peer.links.values()]
            counters, reports = dict(self._counters), [link.report for link in links if link.report is not None and not link.is_lost]
        if reports:
            counters["link_bytes_per_s"] = min(report.bandwidth for report in reports)
            counters["link_round_trip_s"] = max(report.round_trip_s for report in reports)
            counters["link_share_of_expected"] = min((r.bandwidth / r.expected for r in reports if r.expected), default=1.0)
        return counters

    def reconfigure(self, options: ConnectorOptions) -> None:
        """Mode, grouping, emulated link and dtype on the wire of what is announced from now on. Nothing may be under way."""
        if options.wire_dtype != "auto" and self._kernels is None:
            self._kernels = packing.choose(self._layout, self._cache.device)
        with self._lock:
            assert not self._outgoing, "a prompt is being sent"
            self._options = options
            self._pacers = Pacers(options.link, self._tp_size)
            for peer in self._peers.values():
                peer.pacer = self._pacers.make()
                peer.is_packed = options.wire_dtype != "auto"

    def close(self) -> None:
        """Stops sending; links are closed. May be called twice."""
        with self._lock:
            self._is_closed = True
            links = [link for peer in self._peers.values() for link in self._retire(peer)]
            self._peers.clear()
            self._wake_senders()
        self._tracker.close()
        _close_all(links)
        # A thread that is inside a native library when the interpreter ends aborts the process.
        with self._helpers_lock:
            helpers = list(self._helpers)
        deadline = time.monotonic() + _CLOSE_S
        for thread in [*self._threads, *helpers]:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._cache = _NO_CACHE

    def _in_background(self, name: str, what: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=what, args=args, name=name, daemon=True)
        with self._helpers_lock:
            thread.start()
            self._helpers.add(thread)

    # ---- connections -------------------------------------------------------------------------------------------------

    def _connect(self, message: wire.ConnectPeer) -> None:
        is_packed = self._options.wire_dtype != "auto"
        peer = _Peer(message.session, message.peer, rank_layout(message.shape), self._pacers.make(), message.checksum, is_packed)
        slices = head_slices(self._tp_size, message.shape.tp_size, message.shape.num_kv_heads)
        try:
            for endpoint in message.endpoints:
                if mine := between(slices, self._rank, endpoint.rank):
                    link = peer.links[endpoint.rank] = _PeerLink(peer, endpoint.rank, mine, self)
                    link.link = self._reach(endpoint, message, link)
            self._adopt(peer)
        except TransferError as error:
            with self._lock:
                self._counters["connect_retries"] += 1
            _close_all(self._retire_unlocked(peer))
            self._report(wire.PeerLost(self._rank, message.session, wire.clip(str(error))))
        except Exception as error:
            self._on_fatal(error)
        else:
            self._report(wire.PeerConnected(self._rank, message.session))

    def _examine(self, link: Link, name: str, where: str) -> LinkReport:
        """The doctor: what the new link really does, against what the hardware should give."""
        report = link.examine(_EXAMINE_S)
        found = f"{report.path}: {report.bandwidth / 1e9:.2f} GB/s, round trip {report.round_trip_s * 1e6:.0f} us"
        if report.expected is not None and report.bandwidth < _SLOW_LINK * report.expected:
            log.warning(
                "the KV link to %s by %s is slow: %s, where %.2f GB/s were to be expected; check the topology (nvidia-smi topo -m), "
                "what else uses the link, and communication_type",
                where, name, found, report.expected / 1e9,
            )  # fmt: skip
        else:
            log.info("KV link to %s by %s: %s", where, name, found)
        self._recorder.instant(
            "link", "transfer", peer=where, backend=name, path=report.path, bandwidth=report.bandwidth,
            round_trip_s=report.round_trip_s, expected=report.expected,
        )  # fmt: skip
        return report

    def _reach(self, endpoint: wire.Endpoint, message: wire.ConnectPeer, link: _PeerLink) -> Link:
        """By the best backend that both sides have. Raises TransferError that names what was tried."""
        tried = []
        for backend in self._backends:
            address = endpoint.backends.get(backend.name)
            if address is None:
                continue
            if needs_one_host(backend.name) and endpoint.host_id != host_id():
                tried.append(f"{backend.name}: the decode node is on another host")
                continue
            try:
                reached = backend.connect(address, self._cache, message.session, link, message.timeout_s)
            except TransferError as error:
                tried.append(f"{backend.name}: {error}")
                continue
            try:
                link.report = self._examine(reached, backend.name, f"{message.peer}.{endpoint.rank}")
            except TransferError as error:
                reached.close()
                tried.append(f"{backend.name}: {error}")
                continue
            log.info("rank %d reaches rank %d of %s by %s", self._rank, endpoint.rank, message.peer, backend.name)
            return reached
        mine, theirs = [b.name for b in self._backends], list(endpoint.backends)
        raise TransferError(
            f"no way to rank {endpoint.rank} of {message.peer}: this node has {mine}, the decode node {theirs}; {'; '.join(tried)}"
        )

    def _adopt(self, peer: _Peer) -> None:
        """The links are up: give each to a sender thread."""
        with self._lock:
            if self._is_closed or any(link.is_lost for link in peer.links.values()):
                raise TransferError("the connection was lost while it was made")
            self._peers[peer.session] = peer
            for link in peer.links.values():
                if len(self._threads) < self._options.num_send_threads:
                    self._threads.append(_SendThread(self, self._lock))
                    self._threads[-1].start()
                link.thread = min(self._threads, key=lambda thread: len(thread.links))
                link.thread.links.append(link)

    def _retire_unlocked(self, peer: _Peer) -> list[Link]:
        with self._lock:
            return self._retire(peer)

    def _retire(self, peer: _Peer) -> list[Link]:
        """Take a peer's links out of service; the caller closes what is returned, without the lock."""
        peer.is_closed = True
        for link in peer.links.values():
            self._abandon(link)
            if link.thread is not None and link in link.thread.links:
                link.thread.links.remove(link)
        return [link.link for link in peer.links.values() if link.link is not None]

    def _abandon(self, link: _PeerLink) -> None:
        """Nothing goes over ``link`` any more."""
        link.is_lost = True
        for flight in link.written:
            self._set_written(flight)
        link.written.clear()
        link.unacked.clear()

    def _on_lost(self, link: _PeerLink, reason: str) -> None:
        with self._lock:
            is_news = not link.peer.is_closed and not link.is_lost
            self._abandon(link)
            self._counters["send_failures"] += is_news
        if is_news:
            self._report(
                wire.PeerLost(self._rank, link.peer.session, wire.clip(f"rank {link.rank} of the decode node {link.peer.name}: {reason}"))
            )

    # ---- sending -----------------------------------------------------------------------------------------------------

    def _wake_senders(self) -> None:
        for thread in self._threads:
            thread.wake.notify()

    def _next_job(self, links: Sequence[_PeerLink], now_ns: int) -> tuple[_PeerLink | None, _Flight | None, float | None]:
        """Under the lock: (link, flight) whose notice is due or whose bytes may go; else how many seconds to wait at most (None = until
        woken)."""
        wait_s: float | None = None
        for link in links:
            while link.written:
                flight = link.written[0]
                if flight.tickets and not flight.piece.is_ready:
                    break  # its copy waits on the device; the layer's end wakes us
                if not self._is_written(link, flight):
                    wait_s = _sooner(wait_s, _look_again_s(flight, now_ns))
                    break
                if flight.due_ns > now_ns:
                    wait_s = _sooner(wait_s, (flight.due_ns - now_ns) / 1e9)
                    break
                link.written.popleft()
                if not flight.out.is_dropped and flight.attempt == flight.out.attempt:
                    return link, flight, None
        for out in self._outgoing.values():
            for route in out.routes:
                link = route.link
                if link.is_lost or link not in links:
                    continue
                if link.peer.is_packed and any(flight.out is out and flight.attempt != out.attempt for flight in link.unacked.values()):
                    continue  # D may be expanding it, where this attempt's bytes go; the acknowledgement wakes us
                if busy_ns := link.peer.pacer.wait_ns(now_ns):
                    wait_s = _sooner(wait_s, busy_ns / 1e9)
                    continue
                if (piece := out.take(route)) is not None:
                    return link, self._begin(out, route, piece, now_ns), None
        return None, None, wait_s

    def _begin(self, out: Outgoing[_PeerLink], route: Route[_PeerLink], piece: Piece, now_ns: int) -> _Flight:
        out.num_writing += 1
        nbytes = slice_bytes(self._layout, route.link.slices, piece.end - piece.start, len(piece.layers))
        wire_bytes = self._wire_bytes(route.link, piece.start, piece.end, len(piece.layers))
        due_ns = route.link.peer.pacer.book(wire_bytes, now_ns, max(piece.ready_ns, out.announced_ns) if piece.is_ready else None)
        return _Flight(out, route, out.attempt, piece, due_ns, now_ns, nbytes, wire_bytes)

    def _wire_bytes(self, link: _PeerLink, start: int, end: int, num_layers: int) -> int:
        """What tokens [start, end) of ``num_layers`` layers are on their way over ``link``."""
        if link.peer.is_packed:
            return packing.wire_bytes(self._layout, link.peer.layout, link.slices, start, end, num_layers)
        return slice_bytes(self._layout, link.slices, end - start, num_layers)

    def _is_written(self, link: _PeerLink, flight: _Flight) -> bool:
        if flight.is_written:  # and measured; an emulated link makes it wait on
            return True
        try:
            if not all(ticket.done() for ticket in flight.tickets):
                return False
        except TransferError as error:
            log.warning("a copy to %s failed: %s", link.peer.name, error)
            if link.link is not None:
                self._in_background("kv-disconnect", link.link.close)
            self._abandon(link)
            self._report(wire.PeerLost(self._rank, link.peer.session, wire.clip(str(error))))
            return False
        self._set_written(flight)
        self._measure(flight)
        return True

    def _measure(self, flight: _Flight) -> None:
        """By the device's own clock, where there is one."""
        out, piece = flight.out, flight.piece
        for ticket in flight.tickets:
            if isinstance(ticket, DeviceTicket):
                flight.device_wire_s += ticket.wire_s
                is_last = out.is_complete and piece.end == out.chunks[-1].end and piece.layers.stop == self._layout.num_layers
                if is_last and piece.step.events:
                    flight.device_exposed_s = max(0.0, ticket.since(piece.step.events[-1]))
        self._counters["device_wire_s"] += flight.device_wire_s
        self._counters["device_exposed_s"] += flight.device_exposed_s

    def _set_written(self, flight: _Flight) -> None:
        """The source is not read any more."""
        if flight.is_written:
            return
        flight.is_written = True
        out = flight.out
        out.num_writing -= 1
        if not out.num_writing and (reply := self._dropping.pop(out, None)) is not None:
            self._report(reply)

    def _write(self, link: _PeerLink, flight: _Flight) -> None:
        """Without the lock: hand the bytes to the backend."""
        out, piece = flight.out, flight.piece
        assert out.target is not None and link.link is not None
        if self._recorder.annotates:
            flight.range = self._recorder.open(
                "send", "transfer", request=str(out.key), layer=piece.layers.start, layers=len(piece.layers), chunk=piece.chunk,
                bytes=flight.wire_bytes, peer=f"{link.peer.name}.{link.rank}", rank=self._rank,
            )  # fmt: skip
        try:
            begin = time.perf_counter()
            if link.peer.is_packed:
                self._write_packed(link, flight, out.target.window)
            else:
                self._write_plain(link, flight, out.target.window)
            flight.post_s = time.perf_counter() - begin
        except TransferError as error:
            log.warning("sending KV of %s to %s failed: %s", out.key, link.peer.name, error)
            with self._lock:
                self._set_written(flight)
                if not out.is_dropped:
                    self._fail(out.key, out.target.window, str(error))
            return
        with self._lock:
            if link.is_lost:
                self._set_written(flight)
            else:
                link.written.append(flight)

    def _write_plain(self, link: _PeerLink, flight: _Flight, window: int) -> None:
        assert link.link is not None
        runs, shift = self._plan(link, flight.out, flight.piece, copies)
        flight.num_copies = len(runs)
        flight.notice = self._notice(link, flight)
        if self._wants_checksum(link):
            moved = shifted(runs, shift)
            flight.notice.crc = crc_of(self._cache, moved[:, [0, 2]])
            flight.notice.spans = moved[:, 1:].astype("<i8").tobytes()
        most, after = self._options.transfer_batch, flight.piece.after
        for first in range(0, len(runs), most):
            part = runs if len(runs) <= most else runs[first : first + most]
            flight.tickets.append(link.link.write(part, window, after, shift))

    def _write_packed(self, link: _PeerLink, flight: _Flight, window: int) -> None:
        """As ``_write_plain``, through a stage: what goes to D's cache is to be expanded there."""
        assert link.link is not None
        batches, shift = self._plan(link, flight.out, flight.piece, self._batches)
        link.packer = packer = link.packer or packing.Packer(self._cache, self._kernels)
        flight.num_copies = sum(len(batch.copies) for batch in batches)
        flight.notice = notice = self._notice(link, flight)
        for batch in batches:
            stage, is_there = packer.pack(batch, shift[0])
            if self._wants_checksum(link):
                if is_there is not None:
                    is_there.synchronize()
                notice.crc = crc_of(stage, batch.copies[:, [0, 2]], notice.crc or 0)
            flight.tickets.append(link.link.write(batch.copies, window, is_there, (0, shift[1]), stage))
            packer.lend(flight.tickets[-1])
            notice.packed.append(batch.describe(shift[1]))

    def _batches(self, *what: Any) -> list[packing.Batch]:
        return packing.batches(self._layout, cells(*what), self._options.transfer_batch, packing.stage_bytes(self._cache.device))

    def _plan(self, link: _PeerLink, out: Outgoing[_PeerLink], piece: Piece, make: Callable[..., P]) -> tuple[P, tuple[int, int]]:
        """What ``make`` (``plan.copies`` or alike) says of ``piece``, and how far to move it: other layers of the same tokens lie a
        constant distance away, so it is worked out once."""
        assert out.target is not None
        key, first = (link.rank, piece.start, piece.end, len(piece.layers)), piece.layers.start
        if key not in out.plans:
            if len(out.plans) >= _MAX_PLANS:
                out.plans.clear()
            blocks = out.target.blocks
            plan = make(self._layout, link.peer.layout, link.slices, out.block_table, blocks, piece.start, piece.end, piece.layers)
            out.plans[key] = (first, plan)
        base, plan = out.plans[key]
        here, there = (layout.cell_offset(0, first) - layout.cell_offset(0, base) for layout in (self._layout, link.peer.layout))
        return plan, (here, there)

    def _wants_checksum(self, link: _PeerLink) -> bool:
        return self._options.checksum or link.peer.wants_checksum

    def _notice(self, link: _PeerLink, flight: _Flight) -> wire.Notice:
        out, piece = flight.out, flight.piece
        assert out.target is not None
        return wire.Notice(
            key=out.key, window=out.target.window, serial=out.serial, attempt=flight.attempt, rank=self._rank,
            start=piece.start, end=piece.end, first_layer=piece.layers.start, num_layers=len(piece.layers),
            nbytes=flight.nbytes, num_copies=flight.num_copies, chunk=piece.chunk, ready_ns=piece.ready_ns,
            wire_bytes=flight.wire_bytes,
        )  # fmt: skip

    def _notify(self, link: _PeerLink, flight: _Flight) -> None:
        """Without the lock: say that the bytes are there."""
        out = flight.out
        assert out.target is not None and link.link is not None and flight.notice is not None
        flight.notice.ready_ns = ready_ns = flight.piece.ready_ns
        flight.start_ns = max(flight.start_ns, ready_ns)
        with self._lock:
            token = self._next_token = self._next_token + 1
            link.unacked[token] = flight
        try:
            link.link.notify(out.target.window, token, msgspec.msgpack.encode(flight.notice))
        except TransferError as error:
            log.warning("telling %s of KV of %s failed: %s", link.peer.name, out.key, error)  # the link tells of its end itself

    def _on_ack(self, link: _PeerLink, token: int, error: str | None) -> None:
        now_ns = time.monotonic_ns()
        with self._lock:
            flight = link.unacked.pop(token, None)
            if flight is None:
                return
            out = flight.out
            self._count(link, flight, now_ns)
            if out.is_dropped or flight.attempt != out.attempt:
                self._wake_senders()  # a packed new attempt waits for the end of the old one
                return
            assert out.target is not None
            if error is not None:
                self._fail(out.key, out.target.window, error)
                return
            flight.route.num_unacked -= 1
            self._report_sent([out], now_ns)
        if self._recorder.enabled:
            self._recorder.shut(flight.range)
            piece = flight.piece
            is_last = out.last_step is piece.step and piece.layers.stop == self._layout.num_layers
            last_ready_ns = piece.ready_ns if is_last else 0
            self._recorder.span(
                "send", "transfer", flight.start_ns, now_ns,
                request=str(out.key), layer=piece.layers.start, layers=len(piece.layers), bytes=flight.wire_bytes,
                chunk=piece.chunk, peer=f"{link.peer.name}.{link.rank}", ready_ns=piece.ready_ns, rank=self._rank, copies=flight.num_copies,
                pair=out.key.comm_key, tokens=[piece.start, piece.end], post_us=flight.post_s * 1e6, wire_us=flight.device_wire_s * 1e6,
                exposed_us=max(0, now_ns - last_ready_ns) / 1e3 if last_ready_ns else None,
            )  # fmt: skip

    def _count(self, link: _PeerLink, flight: _Flight, now_ns: int) -> None:
        counters = self._counters
        counters["bytes_sent"] += flight.wire_bytes
        counters["transfers"] += 1
        counters["copies"] += flight.num_copies
        counters["post_s"] += flight.post_s
        if link.link is not None and link.link.is_device_ordered:
            self._post_s = flight.post_s if not self._post_s else _KEEP * self._post_s + (1 - _KEEP) * flight.post_s
        counters["wire_s"] += max(0, now_ns - max(flight.start_ns, link.wire_until_ns)) / 1e9  # pieces overlap; time does not count twice
        link.wire_until_ns = now_ns

    def _report_sent(self, candidates: Sequence[Outgoing[_PeerLink]], now_ns: int) -> None:
        for out in candidates:
            if out.is_sent and self._outgoing.get(out.key) is out:
                del self._outgoing[out.key]
                self._set_awaited()
                self._counters["requests_sent_ranks"] += 1
                self._counters["exposed_s"] += max(0, now_ns - out.chunks[-1].step.ready_ns[-1]) / 1e9
                self._report(wire.RankSent(self._rank, out.key, out.serial))

    def _fail(self, key: TransferKey, window: int, reason: str) -> None:
        self._counters["send_failures"] += 1
        self._report(wire.RankFailed(self._rank, key, window, wire.clip(reason)))


class _SendThread(threading.Thread):
    """Serves some links, until the sender is closed."""

    def __init__(self, sender: Sender, lock: threading.Lock) -> None:
        super().__init__(name="kv-send", daemon=True)
        self._sender = sender
        self.wake = threading.Condition(lock)
        self.links: list[_PeerLink] = []

    def run(self) -> None:
        try:
            while self._serve_one():
                pass
        except BaseException as error:
            log.exception("a KV sender thread stopped")
            self._sender._on_fatal(error)

    def _serve_one(self) -> bool:
        sender = self._sender
        with self.wake:
            while True:
                if sender._is_closed:
                    return False
                link, flight, wait_s = sender._next_job(self.links, time.monotonic_ns())
                if link is not None and flight is not None:
                    break
                self.wake.wait(wait_s)
        if flight.is_written:
            sender._notify(link, flight)
        else:
            sender._write(link, flight)
        return True


def _look_again_s(flight: _Flight, now_ns: int) -> float:
    """How late the end of the copy of ``flight``, whose layers are computed, may be seen."""
    age_s = (now_ns - max(flight.piece.ready_ns, flight.start_ns)) / 1e9
    return min(max(_POLL_DEVICE_S, _POLL_SHARE * age_s), _MAX_POLL_S)


def _close_all(links: Sequence[Link]) -> None:
    for link in links:
        link.close()


def _sooner(a: float | None, b: float) -> float:
    return b if a is None else min(a, b)
