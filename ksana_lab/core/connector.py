"""The scheduler's seam to KV transfer: how a scheduler learns that KV comes from elsewhere, or must outlive its sequence. No torch.

Everything here is called on the engine's own thread, between steps; nothing may block. ``NoTransfer`` is a mixed node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ksana_lab.protocol.engine import TransferKey
from ksana_lab.types import TokenLogprob

if TYPE_CHECKING:
    from ksana_lab.core.scheduler import SchedulerOutput
    from ksana_lab.core.sequence import Sequence


@dataclass(frozen=True)
class SendStep:
    """P, one sequence in one step: after this step KV exists for tokens [start, end) of ``block_table``.

    On the first step of a sequence ``start`` is 0 even when a prefix hit computed part of it earlier: D needs it all."""

    key: TransferKey
    block_table: tuple[int, ...]
    start: int
    end: int
    is_last: bool  # the prompt is complete after this step
    serial: int = 0  # of the sequence on this node, never repeated: a key may be, by a router that restarts
    attempt: int = 0  # grows when the sequence starts again from token 0 (preemption); what was sent before is void


@dataclass(frozen=True)
class ReceivePlan:
    """D, one sequence: where its KV goes. ``num_cached_tokens`` (whole blocks) are already here and are not sent."""

    key: TransferKey
    block_table: tuple[int, ...]
    num_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True)
class TransferMeta:
    """Scheduler -> every worker, with each step (sent even when no token runs, if there is news)."""

    sends: tuple[SendStep, ...] = ()


@dataclass
class FirstToken:
    """P's sampled token for D, with what the client's answer may need."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass
class TransferNews:
    """What changed since the last call, by engine-local seq_id."""

    sent: list[int] = field(default_factory=list)  # P: every byte acknowledged; blocks may go
    received: dict[int, FirstToken] = field(default_factory=dict)  # D: all KV and the first token are here
    failed: dict[int, str] = field(default_factory=dict)  # either: it will never complete, and nobody touches the blocks any more; why
    doomed: dict[int, str] = field(default_factory=dict)  # D or P: will fail; blocks NOT yet safe (``failed`` follows)


class SchedulerConnector(Protocol):
    """Owned by the scheduler's thread."""

    def num_remote_tokens(self, seq: Sequence) -> int:
        """D: how many prompt tokens' KV will arrive instead of being computed (0: compute it here)."""

    def on_queued(self, seq: Sequence) -> None:
        """``seq`` waits here. D: P need not fear that nobody will fetch it."""

    def decline(self, key: TransferKey, reason: str) -> None:
        """A request that never became a sequence here; its peer need not wait for it. A key that is in use is left alone."""

    def has_begun(self, seq: Sequence) -> bool:
        """D: P has begun the prompt and will finish it whatever is admitted here, or there is no P to ask. P: not called."""

    def on_allocated(self, seq: Sequence) -> None:
        """Blocks for the whole prompt exist. D: announce them to P. P: called at first schedule, remember the sequence."""

    def step_meta(self, out: SchedulerOutput) -> TransferMeta | None:
        """What the workers must know with this step; None = nothing."""

    def on_first_token(self, seq: Sequence, first: FirstToken) -> None:
        """P: the prompt's token was sampled."""

    def on_finished(self, seq: Sequence) -> bool:
        """The scheduler is done with ``seq`` (finished, aborted, timed out). True: the connector keeps the blocks until
        ``poll`` reports the sequence in ``sent`` or ``failed``."""

    def poll(self) -> TransferNews:
        """News since the last call."""

    @property
    def has_pending(self) -> bool:
        """Anything held or awaited: the engine is not idle."""


class NoTransfer:
    """A node that computes all of its own KV."""

    has_pending = False

    def num_remote_tokens(self, seq: Sequence) -> int:
        return 0

    def on_queued(self, seq: Sequence) -> None: ...

    def decline(self, key: TransferKey, reason: str) -> None: ...

    def has_begun(self, seq: Sequence) -> bool:
        return True

    def on_allocated(self, seq: Sequence) -> None: ...

    def step_meta(self, out: SchedulerOutput) -> TransferMeta | None:
        return None

    def on_first_token(self, seq: Sequence, first: FirstToken) -> None: ...

    def on_finished(self, seq: Sequence) -> bool:
        return False

    def poll(self) -> TransferNews:
        return TransferNews()
