"""Which sequences run in the next step, and what becomes of them. No torch, no clock, no randomness: time comes in as an argument.

A sequence's way:                          ┌──────────── preempted ───────────┐
    add → waiting ─(blocks for all its tokens)─→ running ─(last token)─→ finished → blocks freed
             └─(decode node: announced)→ waiting for KV ─(arrived)→ ready ─┘        └─(prefill node)→ held until sent

First come, first served. Running sequences go first, decodes before prefill chunks; what is left of the token budget goes to the head of
the queue. Nothing deadlocks: a sequence is admitted only with blocks for every token it has; sequences that grow may take the blocks of
newer ones (preemption); those that cannot be preempted (KV on its way in or out) end in bounded time by themselves. Two nodes do not wait
for each other either, though they may hear of requests in different order: see ``_room_for_unbegun``.

A preempted sequence is computed again, or swapped: its KV is copied to host blocks, as many as there are, and back when it is admitted
again. Each rank copies in the order of its steps, and before it computes, so blocks go to a next owner at once, with one exception: see
``_num_swap_outs_under_way``.

``schedule`` may be called once more before ``update`` of the step before it (pipeline depth 1): counters move when a step is scheduled, a
sampled token that is not known yet counts as pending, and one that turns out to follow the end of its sequence is dropped. Blocks of a
sequence that a scheduled step still writes are freed when that step is over."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

from ksana_lab.config.engine import SchedulerOptions
from ksana_lab.core.block_manager import BlockManager
from ksana_lab.core.connector import FirstToken, NoTransfer, SchedulerConnector
from ksana_lab.core.output import Finish, finish_of, output_limit
from ksana_lab.core.sequence import Sequence
from ksana_lab.core.step import ScheduledSeq, SchedulerOutput, StepTokens
from ksana_lab.errors import InvalidRequest, PromptTooLong, QueueFull, RequestAborted, RequestTimeout, TransferFailed
from ksana_lab.protocol.engine import SequenceUpdate
from ksana_lab.types import FinishReason, Role, TokenLogprob

__all__ = ["ScheduledSeq", "Scheduler", "SchedulerOutput", "StepTokens"]

# Of a prefill node's step. From some 1,000 tokens on a token costs as much alone as in company (docs/performance.md), so all that more
# prompts in a step gain is to wait for each other's end.
_PREFILL_STEP_TOKENS = 2048

STOPPED_BY_CALLER = "stop"  # AbortRequest.reason: the caller found a stop string and knows the end already


class EventSink(Protocol):
    """What the scheduler needs of a trace recorder."""

    enabled: bool

    def instant(self, name: str, cat: str, **args: Any) -> None: ...


class Scheduler:
    """Owned by one thread. ``max_model_len`` is cut to what the block pool holds, so that one sequence alone always fits."""

    def __init__(
        self,
        options: SchedulerOptions,
        blocks: BlockManager,
        *,
        max_model_len: int,
        vocab_size: int | None = None,
        role: Role = Role.MIXED,
        connector: SchedulerConnector | None = None,
        events: EventSink | None = None,
    ) -> None:
        self.options = options
        self.blocks = blocks
        self.role = role
        self.connector = connector or NoTransfer()
        self.max_model_len = min(max_model_len, blocks.num_blocks * blocks.block_size)
        self._vocab_size = vocab_size  # None: token ids are not checked
        self.max_num_seqs = min(options.max_num_seqs, options.max_num_batched_tokens)  # so that every decode runs in every step
        by_role = _PREFILL_STEP_TOKENS if role is Role.PREFILL else 0
        self._prefill_step_tokens = by_role if options.prefill_step_tokens is None else options.prefill_step_tokens
        self._max_unbegun_blocks = blocks.num_blocks - blocks.num_blocks_for(self.max_model_len)
        self._events = events if events is not None and events.enabled else None

        # A living sequence is in exactly one of these, by seq_id.
        self.waiting: dict[int, Sequence] = {}  # in order of arrival
        self.preempted: dict[int, Sequence] = {}  # wait as well, before the others
        self.waiting_kv: dict[int, Sequence] = {}  # decode node: blocks announced, KV on its way
        self.ready: dict[int, Sequence] = {}  # decode node: KV is here, no room in the batch yet
        self.running: dict[int, Sequence] = {}
        self.held: dict[int, Sequence] = {}  # finished; the connector still needs the blocks
        self.draining: dict[int, Sequence] = {}  # finished; a scheduled step still writes the blocks

        self._by_request: dict[str, Sequence] = {}
        self._deadlines: list[tuple[int, int, Sequence]] = []  # heap of (first token due by, seq_id, seq)
        self._updates: list[SequenceUpdate] = []
        self._gone: list[int] = []
        self._swap_out: list[tuple[int, int]] = []  # copies of the step that is being put together
        self._swap_in: list[tuple[int, int]] = []
        # Steps that read the blocks of sequences swapped out. A prefill node's writes do not wait for our steps: until these are over,
        # no block is announced to it.
        self._num_swap_outs_under_way = 0
        self._num_steps = 0

        self.num_preemptions = 0
        self.num_swap_outs = 0
        self.num_swap_ins = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0

    # ---- from the API ------------------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue ``seq``. Raises InvalidRequest, PromptTooLong or QueueFull; nothing is kept of it then, and a peer is told."""
        try:
            self._check_admissible(seq)
        except (InvalidRequest, QueueFull) as refusal:
            if seq.transfer is not None:
                self.connector.decline(seq.transfer, str(refusal))
            raise
        seq.output_limit = output_limit(seq, self.max_model_len) if not self._is_prefill_only(seq) else 1
        self._by_request[seq.request_id] = seq
        self.waiting[seq.seq_id] = seq
        heapq.heappush(self._deadlines, (seq.arrival_ns + int(self.options.waiting_timeout_s * 1e9), seq.seq_id, seq))
        if seq.transfer is not None:
            self.connector.on_queued(seq)
        self._event("QUEUED", seq)

    def abort(self, request_id: str, reason: str, now_ns: int) -> None:
        """End a sequence in whatever phase it is; unknown or finished ones are ignored (a prefill node's held blocks belong to the
        decode node now). ``reason`` "stop": the caller saw its end in the text, and hears no more of it."""
        if (seq := self._by_request.get(request_id)) is None:
            return
        if reason == STOPPED_BY_CALLER:
            self._retire(seq, FinishReason.STOP)
            self._event("FINISHED", seq, reason=reason)
        else:
            self._fail(seq, FinishReason.ABORT, RequestAborted.type, f"request was aborted: {reason}", now_ns)

    def fail_all(self, error_type: str, message: str, now_ns: int) -> None:
        """End every request with an error: the engine goes down."""
        for seq in list(self._by_request.values()):
            self._fail(seq, FinishReason.ERROR, error_type, message, now_ns)

    def _check_admissible(self, seq: Sequence) -> None:
        if seq.request_id in self._by_request:
            raise InvalidRequest(f"request id {seq.request_id!r} is in use")
        if not seq.prompt_token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if self._vocab_size is not None and not 0 <= min(seq.prompt_token_ids) <= max(seq.prompt_token_ids) < self._vocab_size:
            raise InvalidRequest(f"the prompt has token ids outside 0..{self._vocab_size - 1}, the model's vocabulary", param="prompt")
        if seq.num_prompt_tokens + 1 > self.max_model_len:
            raise PromptTooLong(
                f"prompt of {seq.num_prompt_tokens} tokens leaves no room for an answer: both together have {self.max_model_len} tokens"
            )
        if len(self.waiting) >= self.options.max_num_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already (max_num_waiting); try again later")

    # ---- the step ----------------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> SchedulerOutput:
        """What runs next. May be empty; may be called again before ``update`` of the last one, not more."""
        self._expire(now_ns)
        self._hear_connector(now_ns)
        self._promote_ready()
        step = SchedulerOutput(self._num_steps)
        budget = self.options.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in sorted(self.running.values(), key=attrgetter("seq_id")):
            (decodes if seq.num_uncomputed_tokens == 1 else prompts).append(seq)
        for seq in decodes:  # oldest first: a victim of preemption is newer than whoever needs its blocks, so never in the step already
            if not seq.has_reached_limit and seq.seq_id in self.running and self._make_room(seq):
                budget -= self._include(step, seq, 1)
        for seq in prompts:  # under way; their blocks exist
            if budget and seq.seq_id in self.running:
                budget -= self._include(step, seq, budget)
        if self.num_preemptions == num_preemptions:  # else what is free was just taken from someone
            self._admit(step, budget, now_ns)
        return self._seal(step)

    def update(self, step: SchedulerOutput, result: StepTokens, now_ns: int) -> None:
        """``step`` is over, ``result`` holds a token for each sequence of it that samples. What clients must hear: ``take_updates``."""
        self._num_swap_outs_under_way -= bool(step.swap_out)
        for item in step.scheduled:
            seq = item.seq
            seq.num_inflight_steps -= 1
            seq.num_pending_tokens -= item.samples
            if seq.is_finished:
                if seq.num_inflight_steps == 0 and self.draining.pop(seq.seq_id, None) is not None:
                    self.blocks.free(seq)
            elif item.samples:  # a token sampled before a preemption counts as any other
                self.generated_tokens += 1
                self._append(seq, result.tokens[seq.seq_id], result.logprobs.get(seq.seq_id), now_ns)

    def take_updates(self) -> list[SequenceUpdate]:
        """News for the clients since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def _make_room(self, seq: Sequence) -> bool:
        """A block for the next token of ``seq``, taken from the newest sequences if need be. False: ``seq`` was the newest itself."""
        while not self.blocks.grow(seq, seq.num_computed_tokens + 1):
            victim = max(self._preemptible(), key=attrgetter("seq_id"))
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preemptible(self) -> Iterator[Sequence]:
        """A prompt that is being sent to a decode node must stay where it is; it ends by itself."""
        return (seq for seq in chain(self.running.values(), self.ready.values()) if not self._is_prefill_only(seq))

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; its KV goes to host blocks, or is computed again later, on a decode node too (from prompt and outputs). The
        blocks may be used at once: a step under way that still writes them runs before any step that could."""
        self._leave_queue(seq)
        copies = self.blocks.swap_out(seq) if self.options.preemption_mode == "swap" else None
        if copies is None:
            self.blocks.free(seq)
        else:
            self._swap_out += copies
            self.num_swap_outs += 1
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted[seq.seq_id] = seq
        self._gone.append(seq.seq_id)
        self._event("PREEMPTED", seq, mode="recompute" if copies is None else "swap")

    def _include(self, step: SchedulerOutput, seq: Sequence, most: int, *, is_first: bool = False) -> int:
        """Run up to ``most`` tokens of ``seq`` in ``step``; returns how many."""
        num = min(seq.num_uncomputed_tokens, most, self.options.prefill_chunk_tokens or most)
        samples = num == seq.num_uncomputed_tokens
        step.scheduled.append(ScheduledSeq(seq, seq.num_computed_tokens, num, samples, is_first))
        seq.num_computed_tokens += num
        seq.num_pending_tokens += samples
        seq.num_inflight_steps += 1
        self.blocks.commit(seq)
        return num

    def _admit(self, step: SchedulerOutput, budget: int, now_ns: int) -> None:
        """Strictly in order: when the head of the queue does not fit, nobody behind it goes first. (On a decode node a prompt that the
        prefill node has not begun may have to step aside before that.)"""
        while (seq := self._head_of_queue()) is not None:
            if self._is_remote(seq):
                if not self._may_announce or not self._allocate(seq, now_ns):
                    return
                self.waiting_kv[seq.seq_id] = seq
                seq.transfer_start_ns = now_ns
                self.connector.on_allocated(seq)
                self._event("TRANSFER_START", seq)
            else:
                if not budget or len(self.running) >= self.max_num_seqs or self._is_company_enough(step, seq):
                    return
                if not self._allocate(seq, now_ns):
                    return
                self.running[seq.seq_id] = seq
                if self._is_prefill_only(seq):
                    seq.transfer_start_ns = now_ns
                    self.connector.on_allocated(seq)
                if seq.is_swapped_out:
                    self._swap_in += self.blocks.swap_in(seq)
                    self.num_swap_ins += 1
                    self._event("SWAPPED_IN", seq)
                else:
                    self._event("PREFILL_START", seq)
                budget -= self._include(step, seq, budget, is_first=True)

    def _is_company_enough(self, step: SchedulerOutput, seq: Sequence) -> bool:
        """``seq`` goes into a later step: this one has a prompt already, and both were too many tokens to compute."""
        if not self._prefill_step_tokens:
            return False
        num_tokens = sum(item.num_tokens for item in step.scheduled if item.num_tokens > 1)
        return num_tokens > 0 and num_tokens + self._num_tokens_of_first_chunk(seq) > self._prefill_step_tokens

    def _num_tokens_of_first_chunk(self, seq: Sequence) -> int:
        num_computed = max(seq.num_computed_tokens, self.blocks.num_cached_tokens(seq))
        return min(seq.num_tokens - num_computed, self.options.prefill_chunk_tokens or seq.num_tokens)

    def _head_of_queue(self) -> Sequence | None:
        if self.preempted:
            return self.preempted[min(self.preempted)]
        room: int | None = None
        for seq in self.waiting.values():
            if not self._is_remote(seq) or self.connector.has_begun(seq):
                return seq
            room = self._room_for_unbegun() if room is None else room
            if self.blocks.num_blocks_for(seq.num_tokens) <= room:
                return seq
        return None

    def _room_for_unbegun(self) -> int:
        """Decode node: how many blocks may go to prompts that P has not begun. P may have no room for them before a prompt that it has
        finished is fetched, and that one may be behind them in this queue. So they leave a place and the blocks of the longest sequence:
        whatever P has begun gets in some day, P goes on, and they are begun in their turn."""
        unbegun = [seq for seq in self.waiting_kv.values() if not self.connector.has_begun(seq)]
        if len(unbegun) + 1 >= self._max_num_seqs_with_kv:
            return 0
        return self._max_unbegun_blocks - sum(len(seq.block_table) for seq in unbegun)

    def _allocate(self, seq: Sequence, now_ns: int) -> bool:
        """Blocks for every token ``seq`` has, and some to spare for each sequence that is growing, lest it be preempted at once."""
        num_growing = 0 if self.role is Role.PREFILL else len(self.running) + len(self.ready)
        spare = self.options.swap_in_spare_blocks if seq.is_swapped_out else self.options.admission_spare_blocks
        if not self.blocks.allocate(seq, seq.num_tokens, reserve=math.ceil(num_growing * spare)):
            return False
        self._leave_queue(seq)
        if not seq.scheduled_ns:
            seq.scheduled_ns = now_ns
            seq.num_cached_tokens = seq.num_computed_tokens
            self.prompt_tokens += seq.num_prompt_tokens
            self.prefix_query_tokens += seq.num_prompt_tokens
            self.prefix_hit_tokens += seq.num_cached_tokens
        return True

    def _seal(self, step: SchedulerOutput) -> SchedulerOutput:
        step.scheduled.sort(key=lambda item: item.num_tokens > 1)
        step.gone, self._gone = self._gone, []
        step.swap_out, self._swap_out = self._swap_out, []
        step.swap_in, self._swap_in = self._swap_in, []
        assert not (step.swap_out and step.swap_in), "whoever preempts admits nobody"  # else one copy could read what another writes
        self._num_swap_outs_under_way += bool(step.swap_out)
        step.transfer = self.connector.step_meta(step)
        self._num_steps += bool(step.scheduled)
        return step

    # ---- KV from and to other nodes ----------------------------------------------------------------------------------

    def _is_prefill_only(self, seq: Sequence) -> bool:
        """This node computes the prompt and one token; a decode node goes on."""
        return self.role is Role.PREFILL and seq.transfer is not None

    def _is_remote(self, seq: Sequence) -> bool:
        """The prompt's KV will arrive. Not again after a preemption: what has arrived once is recomputed here."""
        return (
            self.role is Role.DECODE and seq.transfer is not None and not seq.output_token_ids and self.connector.num_remote_tokens(seq) > 0
        )

    @property
    def _may_announce(self) -> bool:
        """There is a place for one more, and blocks that are free are not being read."""
        num_places = self._max_num_seqs_with_kv - len(self.running) - len(self.ready) - len(self.waiting_kv)
        return num_places > 0 and not self._num_swap_outs_under_way

    @property
    def _max_num_seqs_with_kv(self) -> int:
        return self.max_num_seqs + self.options.max_num_pretransfer_seqs

    def _hear_connector(self, now_ns: int) -> None:
        news = self.connector.poll()
        for seq_id in news.sent:
            self._release_held(seq_id)
        for seq_id, first in news.received.items():
            if (seq := self.waiting_kv.get(seq_id)) is not None:
                self._receive(seq, first, now_ns)
        for seq_id, why in news.doomed.items():
            if (seq := self._find(seq_id)) is not None:
                self._fail(seq, FinishReason.ERROR, TransferFailed.type, why, now_ns)
        for seq_id, why in news.failed.items():
            if (seq := self._find(seq_id)) is not None:
                self._fail(seq, FinishReason.ERROR, TransferFailed.type, why, now_ns, is_connector_done=True)
            self._release_held(seq_id)

    def _receive(self, seq: Sequence, first: FirstToken, now_ns: int) -> None:
        """All KV of the prompt and the first token are here."""
        del self.waiting_kv[seq.seq_id]
        self.ready[seq.seq_id] = seq
        seq.num_computed_tokens = seq.num_prompt_tokens
        seq.transfer_end_ns = now_ns
        self._event("TRANSFER_END", seq)
        self._event("DECODE_QUEUED", seq)
        self.blocks.commit(seq)
        self._append(seq, first.token_id, first.logprob, now_ns)

    def _promote_ready(self) -> None:
        while self.ready and len(self.running) < self.max_num_seqs:
            seq_id = next(iter(self.ready))  # in order of arrival of their KV
            self.running[seq_id] = self.ready.pop(seq_id)

    def _release_held(self, seq_id: int) -> None:
        if (seq := self.held.pop(seq_id, None)) is not None:
            self._free(seq)

    # ---- the end of a sequence ---------------------------------------------------------------------------------------

    def _append(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None, now_ns: int) -> None:
        """The next output token of ``seq`` is known."""
        seq.output_token_ids.append(token_id)
        if not seq.first_token_ns:
            seq.first_token_ns = now_ns
            if not seq.transfer_end_ns:
                seq.prefill_end_ns = now_ns
                self._event("PREFILL_END", seq)
            self._event("FIRST_TOKEN", seq)
        finish = finish_of(seq, self.max_model_len)
        if self._is_prefill_only(seq):
            finish = finish or Finish(FinishReason.LENGTH)
            self.connector.on_first_token(seq, FirstToken(token_id, logprob))
        update = SequenceUpdate(seq.request_id, [token_id], logprobs=[logprob] if logprob else None)
        if finish:
            update.finish, update.stop_reason = finish.reason, finish.stop_token_id
            self.blocks.commit(seq)
            self._retire(seq, finish.reason)
            self._event("FINISHED", seq, reason=finish.reason.value, num_output_tokens=len(seq.output_token_ids))
        if finish or len(seq.output_token_ids) == 1:
            _add_phases(update, seq)
        self._updates.append(update)

    def _fail(self, seq: Sequence, reason: FinishReason, type_: str, message: str, now_ns: int, *, is_connector_done: bool = False) -> None:
        """End ``seq`` with an error towards its client."""
        self._retire(seq, reason, is_connector_done=is_connector_done)
        self._event("ABORTED" if reason is FinishReason.ABORT else "FAILED", seq, error=type_, message=message)
        update = SequenceUpdate(seq.request_id, [], finish=reason, error_type=type_, error=message)
        _add_phases(update, seq)
        self._updates.append(update)

    def _retire(self, seq: Sequence, reason: FinishReason, *, is_connector_done: bool = False) -> None:
        """``seq`` never runs again. Its blocks go as soon as neither the connector nor a scheduled step needs them."""
        seq.finish_reason = reason
        self._leave_queue(seq)
        del self._by_request[seq.request_id]
        self._gone.append(seq.seq_id)
        if seq.transfer is not None and not is_connector_done and self.connector.on_finished(seq):
            self.held[seq.seq_id] = seq
        else:
            self._free(seq)

    def _free(self, seq: Sequence) -> None:
        if seq.num_inflight_steps:
            self.draining[seq.seq_id] = seq
        else:
            self.blocks.free(seq)

    def _expire(self, now_ns: int) -> None:
        while (deadline := self.next_deadline_ns) is not None and deadline <= now_ns:
            seq = heapq.heappop(self._deadlines)[2]
            message = f"no first token within {self.options.waiting_timeout_s:g} s of arrival (waiting_timeout)"
            self._fail(seq, FinishReason.ERROR, RequestTimeout.type, message, now_ns)

    # ---- what others may ask -----------------------------------------------------------------------------------------

    @property
    def next_deadline_ns(self) -> int | None:
        """When ``schedule`` must be called at the latest, for the time-outs' sake."""
        while self._deadlines and (self._deadlines[0][2].is_finished or self._deadlines[0][2].first_token_ns):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.preempted)

    @property
    def num_swapped(self) -> int:
        """Of those that wait: their KV is in host blocks."""
        return sum(seq.is_swapped_out for seq in self.preempted.values())

    @property
    def num_running(self) -> int:
        return len(self.running) + len(self.ready)

    @property
    def is_idle(self) -> bool:
        """No sequence anywhere, and the connector waits for nothing."""
        return not any(self._queues) and not self.connector.has_pending

    def check(self) -> int:
        """Leaked blocks (see BlockManager.check). O(blocks in use)."""
        return self.blocks.check(chain.from_iterable(queue.values() for queue in self._queues))

    @property
    def _queues(self) -> tuple[dict[int, Sequence], ...]:
        return (self.waiting, self.preempted, self.waiting_kv, self.ready, self.running, self.held, self.draining)

    def _find(self, seq_id: int) -> Sequence | None:
        """A sequence that is not finished."""
        for queue in (self.waiting_kv, self.running, self.ready, self.waiting, self.preempted):
            if (seq := queue.get(seq_id)) is not None:
                return seq
        return None

    def _leave_queue(self, seq: Sequence) -> None:
        for queue in self._queues:
            if queue.pop(seq.seq_id, None) is not None:
                return

    def _event(self, name: str, seq: Sequence, **args: Any) -> None:
        if self._events is None:
            return
        request_id, _, index = seq.request_id.rpartition(":")  # "<x-request-id>:<index of n>"
        args["request_id"] = request_id if request_id and index.isdecimal() else seq.request_id
        if seq.transfer is not None:
            args["comm_request_id"] = seq.transfer.comm_request_id
        self._events.instant(name, "request", seq_id=seq.seq_id, **args)


def _add_phases(update: SequenceUpdate, seq: Sequence) -> None:
    update.num_cached_tokens = seq.num_cached_tokens
    update.scheduled_ns = seq.scheduled_ns
    update.prefill_end_ns = seq.prefill_end_ns
    update.first_token_ns = seq.first_token_ns
    update.transfer_start_ns = seq.transfer_start_ns
    update.transfer_end_ns = seq.transfer_end_ns
    update.num_preemptions = seq.num_preemptions
