"""One sequence inside one engine: counters and tokens. Phases are derived from the counters, not stored beside them.

Knows nothing of queues (scheduler.py) or of who may own a block (block_manager.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ksana_lab.protocol.engine import TransferKey
from ksana_lab.types import FinishReason, SamplingParams


@dataclass(eq=False)
class Sequence:
    seq_id: int  # unique in this engine, increasing with arrival
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_ns: int
    eos_token_ids: frozenset[int] = frozenset()
    transfer: TransferKey | None = None

    output_token_ids: list[int] = field(default_factory=list)
    output_limit: int = 0  # most output tokens this engine may make; set by Scheduler.add
    block_table: list[int] = field(default_factory=list)
    host_block_table: list[int] = field(default_factory=list)  # while swapped out: where the KV of the computed tokens is, in host memory
    num_computed_tokens: int = 0  # KV exists, or a scheduled step will write it, for this many tokens (of prompt + output)
    num_pending_tokens: int = 0  # sampled by steps whose outcome the scheduler has not heard yet
    num_inflight_steps: int = 0  # such steps that touch the block table, whether they sample or not
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first allocation
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    block_hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks; grown by the block manager
    num_committed_blocks: int = 0  # of block_table, offered to the prefix cache already

    scheduled_ns: int = 0
    prefill_end_ns: int = 0
    first_token_ns: int = 0
    transfer_start_ns: int = 0
    transfer_end_ns: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens whose value the scheduler knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to be run before the next one can be sampled; 1 = an ordinary decode."""
        return self.num_tokens + self.num_pending_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_swapped_out(self) -> bool:
        return bool(self.host_block_table)

    @property
    def has_reached_limit(self) -> bool:
        """Nothing more to sample: the outputs known and under way are all it may have."""
        return len(self.output_token_ids) + self.num_pending_tokens >= self.output_limit

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids [start, end) of prompt + output."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]

    def __repr__(self) -> str:
        counts = f"{self.num_prompt_tokens}+{len(self.output_token_ids)} tokens, {self.num_computed_tokens} computed"
        swapped = f" + {len(self.host_block_table)} host" if self.host_block_table else ""
        end = f", {self.finish_reason.value}" if self.finish_reason else ""
        return f"<seq {self.seq_id} {self.request_id!r} {counts}, {len(self.block_table)} blocks{swapped}{end}>"
