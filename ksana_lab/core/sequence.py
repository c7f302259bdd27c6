"""One sequence inside one engine: counters and tokens. Phases are derived from the counters, not stored beside them."""

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
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # KV exists for this many tokens (of prompt + output)
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first allocation
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

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
        return len(self.prompt_token_ids) + len(self.output_token_ids)
