"""What one engine step runs, and what came out of it. Plain records between the scheduler and whoever executes its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from ksana_lab.core.connector import TransferMeta
from ksana_lab.core.sequence import Sequence
from ksana_lab.types import TokenLogprob


@dataclass(slots=True)
class ScheduledSeq:
    """Tokens [start, end) of ``seq`` (prompt + output) run in this step. Fixed when scheduled: ``seq`` itself moves on."""

    seq: Sequence
    start: int  # KV of everything before exists, or an earlier step writes it
    num_tokens: int
    samples: bool  # the step ends at the newest token, so its logits give the next one
    is_first: bool  # first step of the sequence since its blocks were allocated

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass
class SchedulerOutput:
    """One step. ``scheduled``: sequences that run one token first (decodes), then prefill chunks."""

    step_id: int
    scheduled: list[ScheduledSeq] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)  # seq_ids that stopped running (finished or preempted) since the last step
    transfer: TransferMeta | None = None
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (device block, host block) to copy before anything runs
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (host block, device block), likewise; never both in one step

    @property
    def is_empty(self) -> bool:
        """Workers have nothing to do or to hear (``gone`` can wait for the next step)."""
        return not (self.scheduled or self.swap_out or self.swap_in) and self.transfer is None

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)

    @property
    def num_decodes(self) -> int:
        return sum(item.num_tokens == 1 for item in self.scheduled)


@dataclass
class StepTokens:
    """The tokens a step sampled, by seq_id; ``logprobs`` for those sequences that asked."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
