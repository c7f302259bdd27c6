"""KV transfer as the scheduler sees it: requests by sequence, news by poll. Everything that waits is the coordinator's business.

Owned by the engine's thread. What the scheduler knows and what the control thread knows differ by what is in the two queues between them;
the rules that hide it stand in ``on_finished`` and ``poll``."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ksana_lab.config.engine import EngineConfig
from ksana_lab.core.connector import FirstToken, ReceivePlan, SendStep, TransferMeta, TransferNews
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.core.sequence import Sequence
from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import PeerUpdate, TransferKey
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer.coordinator import Coordinator
from ksana_lab.transfer.lifecycle import News
from ksana_lab.types import Role

if TYPE_CHECKING:
    from ksana_lab.core.step import SchedulerOutput

log = logging.getLogger(__name__)

_MAX_BEGUN = 1 << 16  # far beyond what waits here; requests that never come must not pile up


@dataclass(eq=False)
class _Local:
    """A sequence whose blocks the connector may keep."""

    seq: Sequence
    key: TransferKey
    serial: int
    num_handed_out: int = 0  # prompt tokens the workers know of
    attempt: int = 0
    num_preemptions: int = 0
    has_first_token: bool = False
    is_finished: bool = False  # the scheduler has let go of it
    is_rejected: bool = False


class KVSchedulerConnector:
    """``core.connector.SchedulerConnector`` of a prefill or a decode node."""

    def __init__(self, coordinator: Coordinator, *, is_prefill: bool, block_size: int) -> None:
        self._coordinator, self._is_prefill, self._block_size = coordinator, is_prefill, block_size
        self._live: dict[int, _Local] = {}  # by seq_id
        self._by_key: dict[TransferKey, int] = {}
        self._received: set[int] = set()  # D: their KV is here, they run or wait to
        self._begun: OrderedDict[TransferKey, None] = OrderedDict()  # D: what P said it has begun
        self._rejected: list[int] = []
        self._serials = itertools.count(1)

    @property
    def address(self) -> str:
        """Where the coordinator listens."""
        return self._coordinator.address

    # ---- core.connector.SchedulerConnector ---------------------------------------------------------------------------

    def num_remote_tokens(self, seq: Sequence) -> int:
        return 0 if self._is_prefill or seq.transfer is None else seq.num_prompt_tokens

    def on_queued(self, seq: Sequence) -> None:
        key, decode = seq.transfer, self._coordinator.decode
        if key is not None and decode is not None:
            self._coordinator.post(lambda now_ns: decode.on_queued(key))

    def decline(self, key: TransferKey, reason: str) -> None:
        if key not in self._by_key:
            self._begun.pop(key, None)
            self._tell_peer(key, None, f"declined request {key}: {reason}")

    def has_begun(self, seq: Sequence) -> bool:
        key = seq.transfer
        return key is None or key in self._begun or key.comm_key not in self._coordinator.connected

    def on_allocated(self, seq: Sequence) -> None:
        key = seq.transfer
        if key is None or seq.seq_id in self._live:
            return
        local = self._live[seq.seq_id] = _Local(seq, key, next(self._serials), num_preemptions=seq.num_preemptions)
        if key in self._by_key:
            local.is_rejected = True
            self._rejected.append(seq.seq_id)
            return
        self._by_key[key] = seq.seq_id
        seq_id, serial, ids, num_tokens = seq.seq_id, local.serial, seq.prompt_token_ids, seq.num_prompt_tokens
        if self._is_prefill:
            prefill = self._coordinator.prefill
            assert prefill is not None
            self._coordinator.post(lambda now_ns: prefill.on_local(key, seq_id, serial, num_tokens, now_ns, wire.hash_prompt(ids)))
        else:
            decode = self._coordinator.decode
            assert decode is not None
            num_cached = seq.num_cached_tokens - seq.num_cached_tokens % self._block_size
            plan = ReceivePlan(key, self._blocks(seq, num_tokens), num_tokens, min(num_cached, num_tokens))
            self._coordinator.post(lambda now_ns: decode.on_local(plan, seq_id, now_ns, wire.hash_prompt(ids)))

    def step_meta(self, out: SchedulerOutput) -> TransferMeta | None:
        if not self._is_prefill:
            return None
        sends = []
        for item in out.scheduled:
            local = self._live.get(item.seq.seq_id)
            if local is not None and not local.is_rejected and (send := self._send_step(local, item.end)) is not None:
                sends.append(send)
        return TransferMeta(sends=tuple(sends)) if sends else None

    def on_first_token(self, seq: Sequence, first: FirstToken) -> None:
        local, prefill = self._live.get(seq.seq_id), self._coordinator.prefill
        if local is None or local.is_rejected or prefill is None:
            return
        local.has_first_token = True
        key, serial = local.key, local.serial
        self._coordinator.post(lambda now_ns: prefill.on_first_token(key, serial, first))

    def on_finished(self, seq: Sequence) -> bool:
        if seq.transfer is None:
            return False
        local = self._live.get(seq.seq_id)
        if local is None:
            if seq.seq_id in self._received:
                self._received.remove(seq.seq_id)
            else:
                self._begun.pop(seq.transfer, None)
                self._give_up(seq.transfer, None, seq)  # it never had blocks; the peer need not wait for it
            return False
        if not local.is_finished:
            local.is_finished = True
            if local.is_rejected:
                pass  # its key is another sequence's
            elif local.has_first_token:
                prefill, key, serial = self._coordinator.prefill, local.key, local.serial
                assert prefill is not None
                self._coordinator.post(lambda now_ns: prefill.on_finished(key, serial, now_ns))
            else:
                self._give_up(local.key, local.serial, seq)
        return True

    def poll(self) -> TransferNews:
        """Raises TransferError when the control thread has died."""
        out = TransferNews()
        for seq_id in self._rejected:
            local = self._live.pop(seq_id)
            out.failed[seq_id] = f"request id {local.key} of pair {local.key.comm_key} is in use on this node"
        self._rejected.clear()
        for news in self._coordinator.take_news():
            if news.kind == "begun":
                self._note_begun(news)
                continue
            local = self._live[news.seq_id]
            if news.kind == "doomed":
                if not local.is_finished:
                    out.doomed[news.seq_id] = news.reason
                continue
            del self._live[news.seq_id], self._by_key[local.key]
            self._begun.pop(local.key, None)
            if news.kind == "sent":
                out.sent.append(news.seq_id)
            elif news.kind == "received" and not local.is_finished:
                assert news.first is not None
                self._received.add(news.seq_id)
                out.received[news.seq_id] = news.first
            else:  # an abort and the arrival may cross: the blocks are as safe as after a failure
                out.failed[news.seq_id] = news.reason or "aborted while the last of its KV arrived"
        return out

    @property
    def has_pending(self) -> bool:
        return bool(self._live)

    # ---- the engine --------------------------------------------------------------------------------------------------

    def handle_peer_update(self, update: PeerUpdate) -> None:
        """What the router's heartbeat answer names now."""
        self._coordinator.update(update)

    def hold(self) -> None:
        """Until ``release``, what is said here leaves when there is time (``Coordinator.hold``)."""
        self._coordinator.hold()

    def release(self) -> None:
        self._coordinator.release()

    def connected(self) -> list[str]:
        """comm keys of the pairs whose every rank is connected."""
        return self._coordinator.connected

    def pairs(self) -> dict[str, str]:
        """comm key -> state in words, with the reason when it is not connected."""
        return self._coordinator.pairs

    def stats(self) -> dict[str, float]:
        """Counters by metric name, those of all ranks summed; ``state_*`` and ``quarantined`` are levels."""
        return self._coordinator.stats()

    def close(self) -> None:
        """Takes leave of the peers. May be called twice."""
        self._coordinator.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _note_begun(self, news: News) -> None:
        assert news.key is not None
        self._begun[news.key] = None
        if len(self._begun) > _MAX_BEGUN:
            self._begun.popitem(last=False)

    def _blocks(self, seq: Sequence, num_tokens: int) -> tuple[int, ...]:
        return tuple(seq.block_table[: -(-num_tokens // self._block_size)])

    def _send_step(self, local: _Local, end: int) -> SendStep | None:
        seq = local.seq
        if seq.num_preemptions != local.num_preemptions:
            local.num_preemptions, local.num_handed_out = seq.num_preemptions, 0
            local.attempt += 1
        start, end = local.num_handed_out, min(end, seq.num_prompt_tokens)
        if end <= start:
            return None
        local.num_handed_out = end
        is_last = end == seq.num_prompt_tokens
        return SendStep(local.key, self._blocks(seq, end), start, end, is_last, local.serial, local.attempt)

    def _give_up(self, key: TransferKey, serial: int | None, seq: Sequence) -> None:
        self._tell_peer(key, serial, f"gave request {key} up ({seq.finish_reason.value if seq.finish_reason is not None else 'ended'})")

    def _tell_peer(self, key: TransferKey, serial: int | None, what: str) -> None:
        prefill, decode = self._coordinator.prefill, self._coordinator.decode
        if prefill is not None:
            self._coordinator.post(lambda now_ns: prefill.on_abort(key, serial, f"the prefill node {what}", now_ns))
        elif decode is not None:
            self._coordinator.post(lambda now_ns: decode.on_abort(key, f"the decode node {what}"))


def make_scheduler_connector(
    config: EngineConfig,
    layout: KVLayout,
    tp_size: int,
    total_kv_heads: int,
    worker_endpoints: list[dict[str, Any]],
    recorder: NullRecorder,
    wake: Callable[[], None],
    ipc_dir: str,
) -> KVSchedulerConnector:
    """The scheduler's side of a prefill or decode node. ``worker_endpoints``: every rank's ``endpoint()``, by rank. ``wake`` is called from
    another thread when ``poll`` has news or ``connected`` changed. Raises TransferError when the control address cannot be bound."""
    options = config.connector
    if not options.role.is_disaggregated:
        raise TransferError("a mixed node has no KV transfer")
    shape = wire.Shape(
        layout.dtype, layout.num_layers, total_kv_heads, layout.head_dim, layout.block_size, layout.num_blocks, layout.order, tp_size,
        options.wire_dtype,
    )  # fmt: skip
    endpoints = [msgspec.convert(endpoint, wire.Endpoint) for endpoint in worker_endpoints]
    coordinator = Coordinator(
        options, shape=shape, endpoints=endpoints, waiting_timeout_s=config.scheduler.waiting_timeout_s, ipc_dir=ipc_dir, wake=wake,
        recorder=recorder,
    )  # fmt: skip
    return KVSchedulerConnector(coordinator, is_prefill=options.role is Role.PREFILL, block_size=layout.block_size)
