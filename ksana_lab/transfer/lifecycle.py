"""What becomes of each request's KV, on either side: two state machines without sockets, threads or clocks.

    P  (announced | computing, in either order) → sending → sent                    any state → doomed → failed
    D  waiting for its pair → arming → announced → received                         any state → doomed → failed

*Doomed*: it will not complete, but somebody may still touch the blocks. *Failed*: nobody does. Between the two every rank confirms that it
has dropped the request; on D ranks may need the peer's word for that (``CancelDone``), or its end. Times are monotonic ns, passed in."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from ksana_lab.core.connector import FirstToken, ReceivePlan
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import TransferKey

MAX_UNCLAIMED = 4096  # announcements whose request this P has not seen
MAX_TOMBSTONES = 4096


@dataclass(frozen=True)
class News:
    """For the scheduler's thread."""

    kind: Literal["sent", "received", "doomed", "failed", "begun"]
    seq_id: int  # of "begun": -1, the request may not be here yet
    reason: str = ""
    first: FirstToken | None = None
    key: TransferKey | None = None  # of "begun"


class Effects(Protocol):
    """How a ledger acts. None of these may call back into it."""

    def to_peer(self, session: int, message: msgspec.Struct) -> None:
        """Dropped silently when the session is over."""

    def to_ranks(self, message: msgspec.Struct) -> None: ...

    def news(self, news: News) -> None: ...


@dataclass(eq=False)
class PrefillEntry:
    key: TransferKey
    created_ns: int
    seq_id: int | None = None  # None = announced, its request not seen yet
    serial: int = 0
    num_tokens: int = 0  # of the prompt, as this node sees it
    prompt_hash: bytes = b""  # of the same; b"" = not known
    session: int = 0  # 0 = not announced yet
    window: int = 0
    num_tokens_announced: int = 0
    prompt_hash_announced: bytes = b""
    is_queued: bool = False  # D has the request, but no room yet
    first: FirstToken | None = None
    finished_ns: int | None = None  # the scheduler is done with it and holds its blocks
    sent: set[int] = field(default_factory=set)  # ranks
    awaited: set[int] = field(default_factory=set)  # doomed: ranks that have not dropped it yet
    reason: str = ""

    @property
    def state(self) -> str:
        if self.reason:
            return "doomed"
        if self.seq_id is None:
            return "announced"
        return "sending" if self.session else "unannounced"


class PrefillLedger:
    """P's requests, by key."""

    def __init__(self, num_ranks: int, *, lease_ns: int, claim_ns: int, session_of: Callable[[str], int], effects: Effects) -> None:
        """``lease_ns``: how long a finished prompt waits for D to hear of its request. ``claim_ns``: how long an announcement waits for its
        request, and a finished prompt for room on D. ``session_of(comm_key)``: of the connected pair, else 0."""
        self._num_ranks, self._lease_ns, self._claim_ns, self._effects = num_ranks, lease_ns, claim_ns, effects
        self._session_of = session_of
        self.entries: dict[TransferKey, PrefillEntry] = {}
        self.draining: dict[tuple[TransferKey, int, int], PrefillEntry] = {}  # by (key, serial, window)
        self._tombstones: OrderedDict[TransferKey, tuple[int, str]] = OrderedDict()  # failed before the other side spoke: (when, why)
        self.num_sent = self.num_failed = self.num_lease_expiries = 0

    # ---- this node ---------------------------------------------------------------------------------------------------

    def on_local(self, key: TransferKey, seq_id: int, serial: int, num_tokens: int, now_ns: int, prompt_hash: bytes = b"") -> None:
        """The scheduler has begun the prompt."""
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = PrefillEntry(key, now_ns)
        assert entry.seq_id is None, key
        entry.seq_id, entry.serial, entry.num_tokens, entry.prompt_hash = seq_id, serial, num_tokens, prompt_hash
        if (reason := self._exhume(key)) is not None:
            self._doom(entry, reason, now_ns)
        elif entry.session:
            self._is_same_prompt(entry, now_ns)
        else:
            self._say_begun(key)

    def on_first_token(self, key: TransferKey, serial: int, first: FirstToken) -> None:
        entry = self._local(key, serial)
        if entry is not None:
            entry.first = first
            self._send_first_token(entry)

    def on_finished(self, key: TransferKey, serial: int, now_ns: int) -> None:
        """The prompt is complete, its first token sampled; the scheduler holds the blocks until ``sent`` or ``failed``."""
        entry = self._local(key, serial)
        if entry is not None:
            entry.finished_ns = now_ns
            self._complete(entry)

    def on_abort(self, key: TransferKey, serial: int | None, reason: str, now_ns: int) -> None:
        """The scheduler gave it up; ``serial`` None: before it was begun."""
        entry = self.entries.get(key)
        if entry is None:
            if serial is None:
                self._bury(key, reason, now_ns)
                self._say_begun(key)
        elif entry.serial == (serial or 0):
            self._doom(entry, reason, now_ns, is_local=True)

    def on_rank_sent(self, rank: int, key: TransferKey, serial: int) -> None:
        entry = self._local(key, serial)
        if entry is not None:
            entry.sent.add(rank)
            self._complete(entry)

    def on_rank_failed(self, key: TransferKey, window: int, reason: str, now_ns: int) -> None:
        entry = self.entries.get(key)
        if entry is not None and entry.window == window:
            self._doom(entry, reason, now_ns)

    def on_dropped(self, rank: int, key: TransferKey, serial: int, window: int) -> None:
        entry = self.draining.get((key, serial, window))
        if entry is None:
            return
        entry.awaited.discard(rank)
        if not entry.awaited:
            del self.draining[key, serial, window]
            if entry.session:
                self._effects.to_peer(entry.session, wire.CancelDone(entry.session, key, window))
            if entry.seq_id is not None:
                self.num_failed += 1
                self._effects.news(News("failed", entry.seq_id, entry.reason))

    # ---- the peer ----------------------------------------------------------------------------------------------------

    def on_connected(self, comm_key: str) -> None:
        for key in [*(e.key for e in self.entries.values() if not e.session), *self._tombstones]:
            if key.comm_key == comm_key:
                self._say_begun(key)

    def on_queued(self, message: wire.Queued) -> None:
        entry = self.entries.get(message.key)
        if entry is not None and not entry.session:
            entry.is_queued = True

    def on_announce(self, message: wire.Announce, now_ns: int) -> None:
        key, entry = message.key, self.entries.get(message.key)
        reason = self._exhume(key)
        if entry is not None and entry.session:
            reason = f"request {key} is announced already"
        elif entry is None and sum(e.seq_id is None for e in self.entries.values()) >= MAX_UNCLAIMED:
            reason = f"the prefill node waits for the requests of {MAX_UNCLAIMED} announcements already"
        if reason is not None:
            self._effects.to_peer(message.session, wire.Failed(message.session, key, message.window, wire.clip(reason)))
            self._effects.to_peer(message.session, wire.CancelDone(message.session, key, message.window))
            return
        if entry is None:
            entry = self.entries[key] = PrefillEntry(key, now_ns)
        entry.session, entry.window = message.session, message.window
        entry.num_tokens_announced, entry.prompt_hash_announced = message.num_tokens, message.prompt_hash
        if not self._is_same_prompt(entry, now_ns):
            return
        self._effects.to_ranks(
            wire.Target(key, message.session, message.window, message.blocks, message.num_tokens, message.num_cached_tokens)
        )
        self._send_first_token(entry)

    def on_cancel(self, message: wire.Cancel, now_ns: int) -> None:
        key, entry = message.key, self.entries.get(message.key)
        if (key, message.window) in ((k, w) for k, _, w in self.draining):
            return  # ``CancelDone`` follows by itself
        if entry is not None and entry.window in (0, message.window):
            self._doom(entry, message.reason, now_ns, is_peers=True)
            if entry.session:
                return
        elif entry is None:
            self._bury(key, message.reason, now_ns)
        if message.window:
            self._effects.to_peer(message.session, wire.CancelDone(message.session, key, message.window))

    def on_session_lost(self, session: int, comm_key: str, reason: str, now_ns: int) -> None:
        """Ends what was announced, and what D would have announced: the blocks of a prompt that a dead D was to fetch need no lease."""
        for entry in [e for e in self.entries.values() if e.session == session]:
            self._doom(entry, reason, now_ns, is_peers=True)
        for entry in [e for e in self.entries.values() if not e.session and e.key.comm_key == comm_key]:
            self._doom(entry, reason, now_ns)

    # ---- time --------------------------------------------------------------------------------------------------------

    def expire(self, now_ns: int) -> None:
        for entry in list(self.entries.values()):
            if entry.seq_id is None and now_ns - entry.created_ns >= self._claim_ns:
                self.num_lease_expiries += 1
                waited = f"{self._claim_ns / 1e9:g} s"
                self._doom(entry, f"the prefill node did not see request {entry.key} within {waited} of its announcement", now_ns)
            elif entry.finished_ns is not None and not entry.session:
                patience_ns = self._claim_ns if entry.is_queued else self._lease_ns
                if now_ns - entry.finished_ns >= patience_ns:
                    self.num_lease_expiries += 1
                    did = "had no room for" if entry.is_queued else "never announced"
                    self._doom(entry, f"the decode node {did} request {entry.key} (waited {patience_ns / 1e9:g} s)", now_ns)
        while self._tombstones:
            key, (buried_ns, _) = next(iter(self._tombstones.items()))
            if now_ns - buried_ns < self._claim_ns:
                break
            del self._tombstones[key]

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _local(self, key: TransferKey, serial: int) -> PrefillEntry | None:
        entry = self.entries.get(key)
        return entry if entry is not None and entry.seq_id is not None and entry.serial == serial else None

    def _say_begun(self, key: TransferKey) -> None:
        if session := self._session_of(key.comm_key):
            self._effects.to_peer(session, wire.Begun(session, key))

    def _is_same_prompt(self, entry: PrefillEntry, now_ns: int) -> bool:
        """Both sides have tokenised the same body. Of different lengths nothing would ever be complete, of different ids D would answer
        another prompt: then it is doomed."""
        if not entry.session or entry.seq_id is None:
            return True
        difference = _difference(entry)
        if difference:
            why = f"the prompt of request {entry.key} has {difference}: their tokenizers or chat templates differ"
            self._doom(entry, why, now_ns)
        return not difference

    def _send_first_token(self, entry: PrefillEntry) -> None:
        if entry.first is not None and entry.session:
            first = entry.first
            self._effects.to_peer(entry.session, wire.FirstToken(entry.session, entry.key, entry.window, first.token_id, first.logprob))

    def _complete(self, entry: PrefillEntry) -> None:
        if len(entry.sent) == self._num_ranks and entry.finished_ns is not None and entry.first is not None:
            del self.entries[entry.key]
            self.num_sent += 1
            assert entry.seq_id is not None
            self._effects.news(News("sent", entry.seq_id))

    def _doom(self, entry: PrefillEntry, reason: str, now_ns: int, *, is_local: bool = False, is_peers: bool = False) -> None:
        """``is_local``: the scheduler knows. ``is_peers``: D knows, or is gone. Whoever has not spoken yet hears it when he does."""
        del self.entries[entry.key]
        if (entry.seq_id is None and not is_local) or (not entry.session and not is_peers):
            self._bury(entry.key, reason, now_ns)
        entry.reason = reason or "unknown"
        entry.awaited = set(range(self._num_ranks))
        self.draining[entry.key, entry.serial, entry.window] = entry
        if entry.session and not is_peers:
            self._effects.to_peer(entry.session, wire.Failed(entry.session, entry.key, entry.window, wire.clip(reason)))
        if entry.seq_id is not None and not is_local:
            self._effects.news(News("doomed", entry.seq_id, reason))
        self._effects.to_ranks(wire.Drop(entry.key, serial=entry.serial, window=entry.window))

    def _bury(self, key: TransferKey, reason: str, now_ns: int) -> None:
        self._tombstones[key] = (now_ns, reason)
        self._tombstones.move_to_end(key)
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    def _exhume(self, key: TransferKey) -> str | None:
        """Why ``key`` failed before this; said once."""
        tombstone = self._tombstones.pop(key, None)
        return None if tombstone is None else tombstone[1]


def _difference(entry: PrefillEntry) -> str:
    """What the two nodes' prompts do not have in common; "" when nothing is known."""
    here, there = entry.num_tokens, entry.num_tokens_announced
    if here != there:
        return f"{here} tokens on the prefill node and {there} on the decode node"
    if entry.prompt_hash and entry.prompt_hash_announced and entry.prompt_hash != entry.prompt_hash_announced:
        return f"{here} tokens on the prefill node and others, as many, on the decode node"
    return ""


@dataclass(frozen=True)
class Pair:
    """What D knows of a connected prefill node."""

    session: int
    name: str
    tp_size: int


@dataclass(eq=False)
class DecodeEntry:
    plan: ReceivePlan
    seq_id: int
    created_ns: int
    window: int
    prompt_hash: bytes = b""
    session: int = 0  # 0 = its pair is not connected
    armed: set[int] = field(default_factory=set)
    received: set[int] = field(default_factory=set)
    first: FirstToken | None = None
    is_announced: bool = False
    awaited: set[int] = field(default_factory=set)
    reason: str = ""

    @property
    def key(self) -> TransferKey:
        return self.plan.key

    @property
    def state(self) -> str:
        if self.reason:
            return "doomed"
        if not self.session:
            return "unconnected"
        return "receiving" if self.is_announced else "arming"


class DecodeLedger:
    """D's requests, by key and by window."""

    def __init__(
        self,
        num_ranks: int,
        num_kv_heads: int,
        *,
        lease_ns: int,
        timeout_ns: int,
        pair_of: Callable[[str], Pair | None],
        describe: Callable[[str], str],
        effects: Effects,
    ) -> None:
        """``pair_of(comm_key)``: the connected pair; ``describe(comm_key)``: what it waits for, for messages."""
        self._num_ranks, self._num_kv_heads = num_ranks, num_kv_heads
        self._lease_ns, self._timeout_ns = lease_ns, timeout_ns
        self._pair_of, self._describe, self._effects = pair_of, describe, effects
        self.entries: dict[TransferKey, DecodeEntry] = {}
        self.by_window: dict[int, DecodeEntry] = {}  # also those that are doomed
        self._queued: set[TransferKey] = set()  # requests that wait for room here
        self._begun: OrderedDict[TransferKey, None] = OrderedDict()  # what P has begun and is not here yet
        self._windows = itertools.count(1)
        self.num_received = self.num_failed = self.num_lease_expiries = 0

    @property
    def draining(self) -> list[DecodeEntry]:
        return [entry for entry in self.by_window.values() if entry.reason]

    # ---- this node ---------------------------------------------------------------------------------------------------

    def on_queued(self, key: TransferKey) -> None:
        """The request is here and has no blocks yet."""
        self._queued.add(key)
        if key in self._begun:
            self._say_queued(key)

    def on_local(self, plan: ReceivePlan, seq_id: int, now_ns: int, prompt_hash: bytes = b"") -> None:
        """Blocks are allocated: announce them as soon as the pair is connected and every rank accepts writes."""
        assert plan.key not in self.entries, plan.key
        self._forget_queued(plan.key)
        entry = DecodeEntry(plan, seq_id, now_ns, next(self._windows), prompt_hash)
        self.entries[plan.key] = self.by_window[entry.window] = entry
        pair = self._pair_of(plan.key.comm_key)
        if pair is not None:
            self._arm(entry, pair)

    def on_abort(self, key: TransferKey, reason: str) -> None:
        """The scheduler gave it up, perhaps before it had blocks."""
        self._forget_queued(key)
        entry = self.entries.get(key)
        if entry is not None:
            self._doom(entry, reason, is_local=True)
        elif (pair := self._pair_of(key.comm_key)) is not None:
            self._effects.to_peer(pair.session, wire.Cancel(pair.session, key, 0, wire.clip(reason)))

    def on_armed(self, rank: int, window: int) -> None:
        entry = self._alive(window)
        if entry is None:
            return
        entry.armed.add(rank)
        if len(entry.armed) == self._num_ranks:
            entry.is_announced = True
            plan = entry.plan
            self._effects.to_peer(
                entry.session,
                wire.Announce(
                    entry.session,
                    plan.key,
                    entry.window,
                    list(plan.block_table),
                    plan.num_tokens,
                    plan.num_cached_tokens,
                    entry.prompt_hash,
                ),
            )

    def on_rank_received(self, rank: int, window: int) -> None:
        entry = self._alive(window)
        if entry is not None:
            entry.received.add(rank)
            self._complete(entry)

    def on_rank_failed(self, window: int, reason: str) -> None:
        entry = self._alive(window)
        if entry is not None:
            self._doom(entry, reason)

    def on_dropped(self, rank: int, window: int) -> None:
        entry = self.by_window.get(window)
        if entry is None or not entry.reason:
            return
        entry.awaited.discard(rank)
        if not entry.awaited:
            self._fail(entry)

    # ---- the peer ----------------------------------------------------------------------------------------------------

    def on_connected(self, comm_key: str) -> None:
        pair = self._pair_of(comm_key)
        assert pair is not None
        for entry in [e for e in self.entries.values() if not e.session and e.key.comm_key == comm_key]:
            self._arm(entry, pair)

    def on_begun(self, message: wire.Begun) -> None:
        pair = self._pair_of(message.key.comm_key)
        if pair is not None and pair.session == message.session:
            self._effects.news(News("begun", -1, key=message.key))
            if message.key in self._queued:
                self._say_queued(message.key)
            elif message.key not in self.entries:
                self._begun[message.key] = None
                if len(self._begun) > MAX_UNCLAIMED:
                    self._begun.popitem(last=False)

    def on_first_token(self, message: wire.FirstToken) -> None:
        entry = self._alive(message.window)
        if entry is not None and entry.session == message.session:
            entry.first = FirstToken(message.token_id, message.logprob)
            self._complete(entry)

    def on_failed(self, message: wire.Failed) -> None:
        entry = self._alive(message.window)
        if entry is not None and entry.session == message.session:
            self._doom(entry, message.reason, is_peers=True)

    def on_cancel_done(self, message: wire.CancelDone) -> None:
        entry = self.by_window.get(message.window)
        if entry is not None and entry.reason and entry.session == message.session:
            self._effects.to_ranks(wire.Drop(entry.key, window=entry.window, is_writer_stopped=True))

    def on_session_lost(self, session: int, reason: str) -> None:
        for entry in [e for e in self.entries.values() if e.session == session]:
            self._doom(entry, reason, is_peers=True)

    # ---- time --------------------------------------------------------------------------------------------------------

    def expire(self, now_ns: int) -> None:
        for entry in list(self.entries.values()):
            age_ns = now_ns - entry.created_ns
            if not entry.session and age_ns >= self._lease_ns:
                self.num_lease_expiries += 1
                self._doom(entry, f"waited {self._lease_ns / 1e9:g} s for the prefill node: {self._describe(entry.key.comm_key)}")
            elif age_ns >= self._timeout_ns:
                self.num_lease_expiries += 1
                self._doom(entry, f"the KV of request {entry.key} did not arrive within {self._timeout_ns / 1e9:g} s")

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _alive(self, window: int) -> DecodeEntry | None:
        entry = self.by_window.get(window)
        return entry if entry is not None and not entry.reason else None

    def _say_queued(self, key: TransferKey) -> None:
        if (pair := self._pair_of(key.comm_key)) is not None:
            self._effects.to_peer(pair.session, wire.Queued(pair.session, key))

    def _forget_queued(self, key: TransferKey) -> None:
        self._queued.discard(key)
        self._begun.pop(key, None)

    def _arm(self, entry: DecodeEntry, pair: Pair) -> None:
        entry.session = pair.session
        plan = entry.plan
        self._effects.to_ranks(
            wire.Expect(
                plan.key, pair.session, entry.window, pair.name, plan.num_tokens, plan.num_cached_tokens, pair.tp_size, self._num_kv_heads
            )
        )

    def _complete(self, entry: DecodeEntry) -> None:
        if len(entry.received) == self._num_ranks and entry.first is not None:
            self._forget(entry)
            self.num_received += 1
            self._effects.news(News("received", entry.seq_id, first=entry.first))

    def _doom(self, entry: DecodeEntry, reason: str, *, is_local: bool = False, is_peers: bool = False) -> None:
        del self.entries[entry.key]
        entry.reason = reason or "unknown"
        if not entry.session:  # nobody was told
            self._fail(entry)
            return
        entry.awaited = set(range(self._num_ranks))
        if not is_local:
            self._effects.news(News("doomed", entry.seq_id, reason))
        if not is_peers:
            window = entry.window if entry.is_announced else 0
            self._effects.to_peer(entry.session, wire.Cancel(entry.session, entry.key, window, wire.clip(reason)))
        self._effects.to_ranks(wire.Drop(entry.key, window=entry.window, is_writer_stopped=not entry.is_announced))

    def _fail(self, entry: DecodeEntry) -> None:
        self._forget(entry)
        self.num_failed += 1
        self._effects.news(News("failed", entry.seq_id, entry.reason))

    def _forget(self, entry: DecodeEntry) -> None:
        self.by_window.pop(entry.window, None)
        if self.entries.get(entry.key) is entry:
            del self.entries[entry.key]
