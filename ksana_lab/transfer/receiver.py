"""A decode rank's half of the data plane: opens windows, counts what arrives against what must arrive, verifies it.

Bytes are put into the cache by the backends; here they only begin to count. A prompt is complete when every source has delivered exactly
what the plan says it owes. Dropping a prompt is answered only when no writer can reach its blocks any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer import packing
from ksana_lab.transfer.base import TransferBackend
from ksana_lab.transfer.checksum import crc_of
from ksana_lab.transfer.plan import between, head_slices, slice_bytes

log = logging.getLogger(__name__)


@dataclass
class _Source:
    """What one P rank owes and has delivered of one prompt."""

    expected: int
    arrived: int = 0
    attempt: int = 0


@dataclass(eq=False)
class _Incoming:
    message: wire.Expect
    sources: dict[int, _Source] = field(default_factory=dict)
    expanding: threading.Lock = field(default_factory=threading.Lock)  # held while the blocks are written here

    def count(self, notice: wire.Notice) -> str | None:
        """Add what ``notice`` brings; returns what is wrong with it."""
        source = self.sources.get(notice.rank)
        if source is None:
            return f"rank {notice.rank} of the prefill node owes nothing of this request"
        if notice.attempt < source.attempt:
            return None  # the prompt was started again; these bytes were or will be written anew
        if notice.attempt > source.attempt:
            source.attempt, source.arrived = notice.attempt, 0
        source.arrived += notice.nbytes
        if source.arrived > source.expected:
            return f"rank {notice.rank} of the prefill node sent {source.arrived} bytes where {source.expected} were expected"
        return None

    @property
    def is_complete(self) -> bool:
        return all(source.arrived == source.expected for source in self.sources.values())


@dataclass
class _Quarantine:
    """Blocks that writers of ``session`` may still reach through ``backends``; ``reply`` is said when none can."""

    session: int
    backends: list[TransferBackend]
    reply: wire.Dropped

    @property
    def is_safe(self) -> bool:
        return not any(backend.num_writers(self.session) for backend in self.backends)


class Receiver:
    """``report`` is called from any thread and must not block."""

    def __init__(
        self,
        *,
        rank: int,
        tp_size: int,
        layout: KVLayout,
        cache: torch.Tensor,
        backends: Sequence[TransferBackend],
        recorder: NullRecorder,
        report: Callable[[msgspec.Struct], None],
        kernels: packing.Kernels | None = None,
    ) -> None:
        self._rank, self._tp_size = rank, tp_size
        self._layout, self._cache, self._backends = layout, cache, backends
        self._recorder, self._report = recorder, report
        self._lock = threading.Lock()
        self._incoming: dict[int, _Incoming] = {}  # by window
        self._quarantined: dict[int, _Quarantine] = {}  # by window
        self._open_sessions: set[int] = set()
        self._unpacker = packing.Unpacker(cache, kernels)
        self._decoder = msgspec.msgpack.Decoder(wire.Notice)
        self._counters = dict.fromkeys(("bytes_received", "notices", "recv_failures", "checksum_failures", "refused_notices"), 0.0)
        self.endpoints = {backend.name: backend.serve(cache, self) for backend in backends}

    # ---- control -----------------------------------------------------------------------------------------------------

    def expect(self, message: wire.Expect) -> None:
        incoming = _Incoming(message)
        num_tokens = message.num_tokens - message.num_cached_tokens
        slices = head_slices(message.peer_tp_size, self._tp_size, message.num_kv_heads)
        for rank in range(message.peer_tp_size):
            if mine := between(slices, rank, self._rank):
                incoming.sources[rank] = _Source(slice_bytes(self._layout, mine, num_tokens, self._layout.num_layers))
        with self._lock:
            self._incoming[message.window] = incoming
            self._open_sessions.add(message.session)
        for backend in self._backends:
            backend.open_window(message.window)
        self._report(wire.Armed(self._rank, message.key, message.window))
        if incoming.is_complete:  # D has all of it in its prefix cache
            self._finish(incoming)

    def drop(self, message: wire.Drop) -> None:
        reply = wire.Dropped(self._rank, message.key, message.serial, message.window)
        with self._lock:
            incoming = self._incoming.pop(message.window, None)
            self._quarantined.pop(message.window, None)
        if incoming is not None:
            with incoming.expanding:
                pass  # one step of an expansion at most; there is none after it
        unfenced = [backend for backend in self._backends if not backend.close_window(message.window)]
        if incoming is None or not unfenced or message.is_writer_stopped:
            self._report(reply)
            return
        with self._lock:
            self._quarantined[message.window] = _Quarantine(incoming.message.session, unfenced, reply)
        self._release_safe()

    def close_peer(self, message: wire.ClosePeer) -> None:
        with self._lock:
            self._open_sessions.discard(message.session)
        for backend in self._backends:
            backend.forget(message.session)
        self._release_safe()

    def stats(self) -> dict[str, float]:
        with self._lock:
            return {**self._counters, "quarantined": float(len(self._quarantined))}

    def close(self) -> None:
        """After the backends: nothing arrives any more."""
        self._cache = torch.empty(0, dtype=torch.uint8)
        self._unpacker = packing.Unpacker(self._cache)

    def _release_safe(self) -> None:
        """Blocks whose writers have all gone."""
        with self._lock:
            safe = [window for window, quarantine in self._quarantined.items() if quarantine.is_safe]
            replies = [self._quarantined.pop(window).reply for window in safe]
        for reply in replies:
            self._report(reply)

    # ---- what the backends tell --------------------------------------------------------------------------------------

    def on_writer_gone(self, session: int, reason: str) -> None:
        with self._lock:
            is_news = session in self._open_sessions
            self._open_sessions.discard(session)
        if is_news:
            self._report(wire.PeerLost(self._rank, session, wire.clip(f"the prefill node's data connection: {reason}")))
        self._release_safe()

    def on_notice(self, session: int, window: int, notice: bytes, first_ns: int) -> str | None:
        try:
            news = self._decoder.decode(notice)
        except msgspec.MsgspecError as error:
            return self._refuse(f"malformed notice: {error}")
        with self._lock:
            incoming = self._incoming.get(window)
        if incoming is None or news.window != window or news.key != incoming.message.key or session != incoming.message.session:
            return self._refuse("the decode node does not expect this request")
        error_text = self._verify(news) or self._expand(incoming, news)
        now_ns = time.monotonic_ns()
        with self._lock:
            if self._incoming.get(window) is not incoming:
                return None  # dropped meanwhile
            error_text = error_text or incoming.count(news)
            self._counters["notices"] += 1
            self._counters["bytes_received"] += news.wire_bytes or news.nbytes
            self._counters["recv_failures"] += error_text is not None
            is_complete = error_text is None and incoming.is_complete
        if self._recorder.enabled:
            self._recorder.span(
                "recv", "transfer", first_ns, now_ns,
                request=str(news.key), layer=news.first_layer, layers=news.num_layers, bytes=news.wire_bytes or news.nbytes,
                chunk=news.chunk, peer=f"{incoming.message.peer}.{news.rank}", ready_ns=news.ready_ns, rank=self._rank,
                copies=news.num_copies, pair=news.key.comm_key, tokens=[news.start, news.end],
            )  # fmt: skip
        if error_text is not None:
            log.error("KV of %s is unusable: %s", news.key, error_text)
            self._report(wire.RankFailed(self._rank, news.key, window, wire.clip(error_text)))
        elif is_complete:
            self._finish(incoming)
        return error_text

    def _refuse(self, why: str) -> str:
        with self._lock:
            self._counters["refused_notices"] += 1
        log.warning("refused a notice: %s", why)
        return why

    def _finish(self, incoming: _Incoming) -> None:
        """Everything is here. The window ends: nothing may be written behind the sequence that runs on it."""
        window = incoming.message.window
        with self._lock:
            if self._incoming.pop(window, None) is None:
                return
        for backend in self._backends:
            backend.close_window(window)
        self._report(wire.RankReceived(self._rank, incoming.message.key, window))

    def _verify(self, notice: wire.Notice) -> str | None:
        """Compare the checksum, if there is one, with the bytes as they lie in the cache."""
        if notice.crc is None:
            return None
        try:
            crc = self._crc_of(notice)
        except TransferError as error:
            return str(error)
        if crc == notice.crc:
            return None
        with self._lock:
            self._counters["checksum_failures"] += 1
        where = f"layers {notice.first_layer}..{notice.first_layer + notice.num_layers - 1}, tokens {notice.start}..{notice.end - 1}"
        return f"checksum of {where} is {crc:#010x} here and was {notice.crc:#010x} when it was sent"

    def _crc_of(self, notice: wire.Notice) -> int:
        """Of the bytes that the notice speaks of, packed or not. Raises TransferError when it speaks of others than it may."""
        crc = 0
        for packed in notice.packed:
            form, targets = packing.read(self._layout, packed)
            crc = crc_of(self._cache, np.column_stack((targets, np.full(len(targets), form.wire_bytes))), crc)
        if notice.packed:
            return crc
        if len(notice.spans) % 16:
            raise TransferError("malformed notice: odd spans")
        spans = np.frombuffer(notice.spans, "<i8").reshape(-1, 2)
        offsets, sizes = spans[:, 0], spans[:, 1]
        total = self._layout.total_bytes
        fits = (offsets >= 0) & (sizes >= 0) & (sizes <= total) & (offsets <= total - sizes)
        if not fits.all() or int(sizes.sum()) != notice.nbytes:
            raise TransferError("malformed notice: spans outside the cache")
        return crc_of(self._cache, spans)

    def _expand(self, incoming: _Incoming, notice: wire.Notice) -> str | None:
        """Turn packed KV into the cache's dtype, in its place, for as long as it is wanted; returns what is wrong with it."""
        if not notice.packed:
            return None
        try:
            units = [packing.read(self._layout, packed) for packed in notice.packed]
        except TransferError as error:
            return str(error)
        if sum(form.unit_bytes * len(targets) for form, targets in units) != notice.nbytes:
            return "malformed notice: packed units of another size than the piece"
        window, source = incoming.message.window, incoming.sources.get(notice.rank)
        for form, targets in units:
            for part in packing.steps(form, targets, packing.stage_bytes(self._cache.device)):
                with incoming.expanding:
                    if self._incoming.get(window) is not incoming or source is None or notice.attempt < source.attempt:
                        return None  # dropped, or void: written anew by now
                    self._unpacker.expand(form, part)
        return None
