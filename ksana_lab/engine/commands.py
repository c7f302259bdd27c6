"""What the scheduler's process tells every rank, and what ranks answer: msgpack over zmq, never pickled.

``CommandBuilder`` turns a SchedulerOutput into a StepCommand: ranks keep what they were told (tokens, parameters, block tables), so a
decode costs a few integers per step. Knows nothing of tensors."""

from __future__ import annotations

from typing import Any

import msgspec

from ksana_lab.core.connector import TransferMeta
from ksana_lab.core.output import masked_token_ids
from ksana_lab.core.sequence import Sequence
from ksana_lab.core.step import SchedulerOutput
from ksana_lab.types import SamplingParams

# ---- to a rank -------------------------------------------------------------------------------------------------------


class NewSeq(msgspec.Struct, array_like=True):
    """A sequence that a rank has not seen, or has forgotten since a preemption."""

    seq_id: int
    token_ids: list[int]  # prompt, and outputs known so far
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    masked_token_ids: list[int]  # not to be sampled before ``sampling.min_tokens``; empty when that is 0


class StepCommand(msgspec.Struct, tag=True):
    """One step. The parallel lists have one entry per sequence that runs, decodes (one token) first."""

    step_id: int
    gone: list[int]
    new: list[NewSeq]
    new_blocks: dict[int, list[int]]  # seq_id -> blocks to append to its table
    seq_ids: list[int]
    starts: list[int]  # tokens [start, start + num) run
    num_tokens: list[int]
    samples: list[bool]
    transfer: TransferMeta | None = None
    swap_out: list[tuple[int, int]] = []  # (device block, host block) to copy before anything runs
    swap_in: list[tuple[int, int]] = []  # (host block, device block), likewise; never both in one step


class SetCache(msgspec.Struct, tag=True):
    """All ranks have said what they can hold; this many blocks it is, and so many more in host memory."""

    num_blocks: int
    num_host_blocks: int = 0


class Stop(msgspec.Struct, tag=True):
    pass


ToRank = StepCommand | SetCache | Stop

# ---- from a rank -----------------------------------------------------------------------------------------------------


class RankSized(msgspec.Struct, tag=True):
    """The model is loaded; at most ``num_blocks`` fit on this rank."""

    rank: int
    num_blocks: int


class RankReady(msgspec.Struct, tag=True):
    """The cache is there. ``endpoint``: where a prefill node's rank reaches it (worker connector's)."""

    rank: int
    device_id: int
    device_type: str
    endpoint: dict[str, Any]


class RankFailed(msgspec.Struct, tag=True):
    rank: int
    error: str


FromRank = RankSized | RankReady | RankFailed


class CommandBuilder:
    """Remembers what ranks know. ``default_seed`` stands in for requests without one."""

    def __init__(self, default_seed: int = 0) -> None:
        self._default_seed = default_seed
        self._num_blocks_told: dict[int, int] = {}  # by seq_id, of sequences that ranks know
        self._gone: list[int] = []

    def build(self, out: SchedulerOutput) -> StepCommand:
        """Call for every step that is executed, in order; for others ``note_gone``."""
        self.note_gone(out.gone)
        gone, self._gone = self._gone, []
        command = StepCommand(out.step_id, gone, [], {}, [], [], [], [], out.transfer, out.swap_out, out.swap_in)
        for item in out.scheduled:
            seq = item.seq
            if (num_told := self._num_blocks_told.get(seq.seq_id)) is None:
                command.new.append(self._introduce(seq))
                num_told = 0
            if len(seq.block_table) > num_told:
                command.new_blocks[seq.seq_id] = seq.block_table[num_told:]
                self._num_blocks_told[seq.seq_id] = len(seq.block_table)
            command.seq_ids.append(seq.seq_id)
            command.starts.append(item.start)
            command.num_tokens.append(item.num_tokens)
            command.samples.append(item.samples)
        return command

    def note_gone(self, seq_ids: list[int]) -> None:
        """These will be told with the next command."""
        self._gone.extend(seq_id for seq_id in seq_ids if self._num_blocks_told.pop(seq_id, None) is not None)

    def _introduce(self, seq: Sequence) -> NewSeq:
        seed = seq.sampling.seed if seq.sampling.seed is not None else self._default_seed + seq.seq_id
        masked = sorted(masked_token_ids(seq)) if seq.sampling.min_tokens else []
        return NewSeq(seq.seq_id, seq.tokens(0, seq.num_tokens), seq.num_prompt_tokens, seq.sampling, seed, masked)
