"""From a StepCommand to the tensors of one step. Keeps what a rank knows of each running sequence in one table row.

Host arithmetic is numpy; ``Staging`` brings it to the device without waiting. A token that this rank sampled itself never needs to come
to the host first: its input id stays a placeholder, filled on the device from ``last_tokens``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionMetadata
from ksana_lab.engine.commands import NewSeq, StepCommand
from ksana_lab.engine.sampler import SamplingBatch, SamplingTable

_PLACEHOLDER = -1


class Staging:
    """Host arrays to device tensors. On CUDA through pinned memory, asynchronously: the caching host allocator keeps each buffer until
    its copy is over, so the next step may be staged while this one still runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"

    def upload(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self._device, non_blocking=True) if self._is_cuda else host


@dataclass
class StepInputs:
    """T tokens of S sequences; decodes (one token each) first."""

    seq_ids: list[int]
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attn: AttentionMetadata
    sample_seq_ids: list[int]  # the sequences that sample, in step order
    sample_rows: np.ndarray  # [N] their table rows
    last_token_rows: Tensor  # [N] int64, the same on the device
    logits_indices: Tensor | None  # [N] int64: token of the step whose hidden state is sampled from; None: the first N tokens
    sampling: SamplingBatch

    @property
    def is_pure_decode(self) -> bool:
        """Every sequence runs one token: what a captured graph can replay."""
        return self.attn.max_query_len <= 1


class InputBatch:
    """``max_num_seqs`` rows; a row belongs to a sequence from its first step until it is ``gone``."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_blocks = -(-max_model_len // block_size)  # of one sequence
        self.sampling = SamplingTable(max_num_seqs, vocab_size, device)
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # newest token sampled by each row
        self._staging = Staging(device)
        self._block_tables = np.zeros((max_num_seqs, self.max_num_blocks), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, np.int64)
        self._num_known = np.zeros(max_num_seqs, np.int64)  # tokens of the row in ``_tokens``
        self._tokens: list[np.ndarray] = [np.empty(0, np.int64)] * max_num_seqs
        self._rows: dict[int, int] = {}  # seq_id -> row
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def apply(self, command: StepCommand) -> None:
        """Forget, meet and extend sequences as ``command`` says."""
        for seq_id in command.gone:
            row = self._rows.pop(seq_id)
            self._block_tables[row, : self._num_blocks[row]] = 0
            self._num_blocks[row] = self._num_known[row] = 0
            self._tokens[row] = np.empty(0, np.int64)
            self._free_rows.append(row)
        for new in command.new:
            self._meet(new)
        for seq_id, blocks in command.new_blocks.items():
            row = self._rows[seq_id]
            end = self._num_blocks[row] + len(blocks)
            self._block_tables[row, self._num_blocks[row] : end] = blocks
            self._num_blocks[row] = end

    def prepare(self, command: StepCommand) -> StepInputs:
        """The tensors of a step that runs at least one token."""
        rows = np.fromiter((self._rows[seq_id] for seq_id in command.seq_ids), np.int64, len(command.seq_ids))
        starts = np.asarray(command.starts, np.int64)
        query_lens = np.asarray(command.num_tokens, np.int64)
        ends = starts + query_lens
        query_start_loc = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(query_lens, out=query_start_loc[1:])
        num_decodes = int((query_lens == 1).sum())

        token_rows = np.repeat(rows, query_lens)
        positions = np.arange(query_start_loc[-1]) + np.repeat(starts - query_start_loc[:-1], query_lens)
        slots = self._block_tables[token_rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size

        upload = self._staging.upload
        samples = np.asarray(command.samples, bool)
        sample_rows = rows[samples]
        max_seq_len = int(ends.max())
        attn = AttentionMetadata(
            num_decodes=num_decodes,
            query_start_loc=upload(query_start_loc.astype(np.int32)),
            seq_lens=upload(ends.astype(np.int32)),
            block_tables=upload(self._block_tables[rows, : -(-max_seq_len // self.block_size)]),
            slot_mapping=upload(slots),
            query_lens=command.num_tokens,
            context_lens=ends.tolist(),
            max_query_len=int(query_lens.max()),
            max_seq_len=max_seq_len,
        )
        is_head = bool(samples[: len(sample_rows)].all()) and len(sample_rows) <= num_decodes
        return StepInputs(
            seq_ids=command.seq_ids,
            input_ids=self._input_ids(rows, starts, query_lens, num_decodes),
            positions=upload(positions),
            attn=attn,
            sample_seq_ids=[seq_id for seq_id, does in zip(command.seq_ids, command.samples, strict=True) if does],
            sample_rows=sample_rows,
            last_token_rows=upload(sample_rows),
            logits_indices=None if is_head else upload(query_start_loc[1:][samples] - 1),
            sampling=self.sampling.select(sample_rows, ends[samples], upload),
        )

    def remember(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """``token_ids`` [N] were sampled for ``inputs.sample_seq_ids``; on the device, nothing waits."""
        self.last_tokens.index_copy_(0, inputs.last_token_rows, token_ids)

    def _meet(self, new: NewSeq) -> None:
        row = self._rows[new.seq_id] = self._free_rows.pop()
        self._tokens[row] = np.asarray(new.token_ids, np.int64)
        self._num_known[row] = len(new.token_ids)
        self.sampling.set_row(row, new.sampling, new.seed, new.token_ids, new.num_prompt_tokens, new.masked_token_ids)

    def _input_ids(self, rows: np.ndarray, starts: np.ndarray, query_lens: np.ndarray, num_decodes: int) -> Tensor:
        """[T] int64. Prompt tokens (and outputs known when the sequence was met) from the host, all others from ``last_tokens``."""
        is_known = self._num_known[rows[:num_decodes]] > starts[:num_decodes]
        heads = np.full(num_decodes, _PLACEHOLDER, np.int64)
        for i in is_known.nonzero()[0]:
            heads[i] = self._tokens[rows[i]][starts[i]]
        chunks = [
            self._tokens[row][start : start + num]
            for row, start, num in zip(rows[num_decodes:], starts[num_decodes:], query_lens[num_decodes:], strict=True)
        ]
        ids = self._staging.upload(np.concatenate([heads, *chunks]))
        if not is_known.all():
            decode_ids = ids[:num_decodes]
            sampled = self.last_tokens[self._staging.upload(rows[:num_decodes])]
            ids[:num_decodes] = torch.where(decode_ids < 0, sampled, decode_ids)
        return ids
