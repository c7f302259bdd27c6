"""What scheduler tests share: sequences, a loop that plays the workers, and a connector that does what a test tells it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ksana_lab.config.engine import SchedulerOptions
from ksana_lab.core.block_manager import BlockManager
from ksana_lab.core.connector import FirstToken, TransferNews
from ksana_lab.core.scheduler import Scheduler
from ksana_lab.core.sequence import Sequence
from ksana_lab.core.step import SchedulerOutput, StepTokens
from ksana_lab.protocol.engine import SequenceUpdate, TransferKey
from ksana_lab.types import Role, SamplingParams

VOCAB = 50
EOS = 49
BLOCK = 4


def true_next(tokens: list[int]) -> int:
    """The token that the fake model says after ``tokens``: any mix-up of blocks, positions or order changes what follows."""
    return int.from_bytes(hashlib.blake2b(bytes(tokens), digest_size=4).digest(), "big") % VOCAB


def true_output(prompt: list[int], sampling: SamplingParams, max_len: int = 1 << 30, eos: int = EOS) -> list[int]:
    output: list[int] = []
    while len(output) < sampling.max_tokens and len(prompt) + len(output) < max_len:
        output.append(true_next(prompt + output))
        if output[-1] == eos and not sampling.ignore_eos:
            break
    return output


def sequence(seq_id: int, prompt: int | list[int], max_tokens: int = 8, *, arrival_ns: int = 0, key: bool = False, **sampling) -> Sequence:
    """``prompt``: token ids, or how many to make up (different for each seq_id)."""
    ids = [(seq_id * 7 + i) % (VOCAB - 1) for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)
    transfer = TransferKey("p:1__d:1", seq_id + 100) if key else None
    return Sequence(seq_id, f"r{seq_id}", ids, params, arrival_ns, frozenset({EOS}), transfer)


def scheduler(
    num_blocks: int = 64,
    *,
    num_host_blocks: int = 0,
    caching: bool = False,
    max_len: int = 1 << 20,
    vocab_size=None,
    role=Role.MIXED,
    connector=None,
    **options,
) -> Scheduler:
    """With host blocks: preemption by swapping."""
    blocks = BlockManager(num_blocks, BLOCK, enable_prefix_caching=caching, num_host_blocks=num_host_blocks)
    options.setdefault("preemption_mode", "swap" if num_host_blocks else "recompute")
    return Scheduler(SchedulerOptions(**options), blocks, max_model_len=max_len, vocab_size=vocab_size, role=role, connector=connector)


@dataclass
class _Submitted:
    """A step as it was when it was scheduled: sequences move on before it runs."""

    out: SchedulerOutput
    gone: list[int]
    tables: list[list[int]]
    tokens: list[list[int]]


@dataclass
class FakeWorkers:
    """Plays a model with a paged cache: it stores which token stands in which slot, and samples from what the block table leads to.
    ``depth``: steps under way when the next is scheduled. Steps run in order, as on a GPU stream, and as late as can be: when their
    outcome is asked for."""

    scheduler: Scheduler
    depth: int = 0
    now_ns: int = 1
    updates: list[SequenceUpdate] = field(default_factory=list)
    on_step: Callable[[SchedulerOutput], None] | None = None
    num_steps: int = 0
    is_busy: bool = False

    def __post_init__(self) -> None:
        self._cache: dict[int, int] = {}  # slot -> token
        self._host_cache: dict[int, list[int | None]] = {}  # host block -> its slots
        self._tables: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}  # what the workers know of each sequence: prompt, outputs
        self._gone: list[int] = []
        self._inflight: deque[_Submitted] = deque()

    def store(self, block_table: list[int], tokens: list[int]) -> None:
        """KV that came from elsewhere."""
        for i, token in enumerate(tokens):
            self._cache[block_table[i // BLOCK] * BLOCK + i % BLOCK] = token

    def turn(self) -> SchedulerOutput:
        out = self.scheduler.schedule(self.now_ns)
        self._gone += out.gone
        if not out.is_empty:
            self._inflight.append(self._submit(out))
            self.num_steps += bool(out.scheduled)
            if self.on_step:
                self.on_step(out)
        self.is_busy = bool(self._inflight)
        if self._inflight and (out.is_empty or len(self._inflight) > self.depth):
            step = self._inflight.popleft()
            self.scheduler.update(step.out, self._execute(step), self.now_ns)
        self.updates += self.scheduler.take_updates()
        return out

    def drain(self, max_turns: int = 5000) -> None:
        """Turns until nothing is left to run."""
        for _ in range(max_turns):
            self.turn()
            if not self.is_busy:
                return
        raise AssertionError(f"not drained after {max_turns} turns: {self.scheduler.running} {self.scheduler.waiting}")

    def outputs(self) -> dict[str, list[int]]:
        result: dict[str, list[int]] = {}
        for update in self.updates:
            result.setdefault(update.request_id, []).extend(update.new_token_ids)
        return result

    def finishes(self) -> dict[str, str]:
        return {u.request_id: u.error_type or u.finish.value for u in self.updates if u.finish}

    def _submit(self, out: SchedulerOutput) -> _Submitted:
        gone, self._gone = self._gone, []
        seqs = [item.seq for item in out.scheduled]
        return _Submitted(out, gone, [list(seq.block_table) for seq in seqs], [seq.tokens(0, seq.num_tokens) for seq in seqs])

    def _execute(self, step: _Submitted) -> StepTokens:
        for seq_id in step.gone:
            self._tokens.pop(seq_id, None)
        self._swap(step.out)
        for item, table, tokens in zip(step.out.scheduled, step.tables, step.tokens, strict=True):
            seq_id = item.seq.seq_id
            known = self._tokens.setdefault(seq_id, tokens)
            self._tables[seq_id] = table
            for position in range(item.start, item.end):  # stores of the whole step come before any read, as in a layer
                self._cache[self._slot(seq_id, position)] = known[position]
        result = StepTokens()
        for item in step.out.scheduled:
            if item.samples:
                seq_id = item.seq.seq_id
                context = [self._cache[self._slot(seq_id, position)] for position in range(item.end)]
                result.tokens[seq_id] = true_next(context)
                self._tokens[seq_id].append(result.tokens[seq_id])
        return result

    def _swap(self, out: SchedulerOutput) -> None:
        for device, host in out.swap_out:
            self._host_cache[host] = [self._cache.get(device * BLOCK + i) for i in range(BLOCK)]
        for host, device in out.swap_in:
            for i, token in enumerate(self._host_cache.pop(host)):
                self._cache[device * BLOCK + i] = token

    def _slot(self, seq_id: int, position: int) -> int:
        return self._tables[seq_id][position // BLOCK] * BLOCK + position % BLOCK


@dataclass
class FakeConnector:
    """A connector whose peer is the test."""

    news: TransferNews = field(default_factory=TransferNews)
    keeps_blocks: bool = True  # what on_finished answers
    remote: bool = True
    unbegun: set[int] = field(default_factory=set)  # prompts that P has not begun
    queued: list[int] = field(default_factory=list)
    declined: dict[TransferKey, str] = field(default_factory=dict)
    announced: list[int] = field(default_factory=list)
    first_tokens: dict[int, int] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    sends: list[tuple[int, int, int]] = field(default_factory=list)

    has_pending = False

    def num_remote_tokens(self, seq: Sequence) -> int:
        return seq.num_prompt_tokens if self.remote else 0

    def on_queued(self, seq: Sequence) -> None:
        self.queued.append(seq.seq_id)

    def decline(self, key: TransferKey, reason: str) -> None:
        self.declined[key] = reason

    def has_begun(self, seq: Sequence) -> bool:
        return seq.seq_id not in self.unbegun

    def on_allocated(self, seq: Sequence) -> None:
        self.announced.append(seq.seq_id)

    def step_meta(self, out: SchedulerOutput) -> None:
        self.sends += [(item.seq.seq_id, 0 if item.is_first else item.start, item.end) for item in out.scheduled if item.seq.transfer]

    def on_first_token(self, seq: Sequence, first: FirstToken) -> None:
        self.first_tokens[seq.seq_id] = first.token_id

    def on_finished(self, seq: Sequence) -> bool:
        self.finished.append(seq.seq_id)
        return self.keeps_blocks

    def poll(self) -> TransferNews:
        news, self.news = self.news, TransferNews()
        return news
