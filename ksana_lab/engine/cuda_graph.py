"""Decode steps as CUDA graphs: everything from token ids to logits and their maxima, replayed with one launch.

One graph for each of a ladder of batch sizes; a step takes the next larger one, and its rows of padding have no keys and no slot. What a
graph reads and writes is allocated here, outside any graph, and refilled before a replay. Lengths are read on the device, so a graph stays
right for any of them. Knows nothing of sampling but the maximum."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionBackend, AttentionMetadata, ForwardContext
from ksana_lab.engine.input_batch import StepInputs
from ksana_lab.layers import fused
from ksana_lab.models.decoder import Decoder

log = logging.getLogger(__name__)


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: at most a quarter of a step is padding above 4, a sixteenth above 64."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32)]
    largest = min(max_num_seqs, sizes[-1])
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """Owned by the model's thread. Capture once, after the cache exists; every rank of a group captures the same sizes in step."""

    def __init__(
        self, model: Decoder, backend: AttentionBackend, kv_layers: Sequence[Tensor], *, max_num_seqs: int, max_num_blocks: int
    ) -> None:
        """``max_num_blocks``: the widest block table of a sequence."""
        device = kv_layers[0].device
        self._model, self._backend, self._kv_layers = model, backend, kv_layers
        self.sizes = ladder(max_num_seqs)
        largest = self.sizes[-1]
        self._input_ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._positions = torch.zeros(largest, dtype=torch.int64, device=device)
        self._slots = torch.full((largest,), -1, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(largest, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(largest, max_num_blocks, dtype=torch.int32, device=device)
        self._query_start_loc = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(largest, model.config.vocab_size, dtype=model.embedding.weight.dtype, device=device)
        self._tokens = torch.zeros(largest, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Largest first, so that the smaller ones find its memory free again."""
        start = time.monotonic()
        with torch.inference_mode():
            for size in reversed(self.sizes):
                self._run(size)  # compiles kernels, and lets libraries allocate what they keep
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._run(size)
                self._graphs[size] = graph
        torch.cuda.synchronize()
        log.info("%d decode graphs up to batch %d captured in %.1f s", len(self.sizes), self.sizes[-1], time.monotonic() - start)

    def close(self) -> None:
        """A replay under way goes on to its end."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def fits(self, inputs: StepInputs) -> bool:
        """One token each, and each samples (a prompt chunk may be one token that does not)."""
        num = len(inputs.seq_ids)
        return inputs.is_pure_decode and len(inputs.sample_seq_ids) == num and num <= self.sizes[-1]

    def replay(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """(logits [S, vocab] in the model's dtype, their maxima's ids [S] int64) of a step that ``fits``; overwritten by the next."""
        num = len(inputs.seq_ids)
        size = self.sizes[bisect.bisect_left(self.sizes, num)]
        tables = inputs.attn.block_tables
        self._input_ids[:num].copy_(inputs.input_ids)
        self._positions[:num].copy_(inputs.positions)
        self._slots[:num].copy_(inputs.attn.slot_mapping)
        self._seq_lens[:num].copy_(inputs.attn.seq_lens)
        self._block_tables[:num, : tables.shape[1]].copy_(tables)
        if size > num:
            self._slots[num:size].fill_(-1)
            self._seq_lens[num:size].zero_()
        self._graphs[size].replay()
        return self._logits[:num], self._tokens[:num]

    def _run(self, size: int) -> None:
        max_len = self._block_tables.shape[1] * self._kv_layers[0].shape[3]
        attn = AttentionMetadata(
            num_decodes=size,
            query_start_loc=self._query_start_loc[: size + 1],
            seq_lens=self._seq_lens[:size],
            block_tables=self._block_tables[:size],
            slot_mapping=self._slots[:size],
            query_lens=[1] * size,
            context_lens=[max_len] * size,
            max_query_len=1,
            max_seq_len=max_len,
        )
        context = ForwardContext(attn, self._kv_layers, self._backend)
        logits = self._model.head(self._model(self._input_ids[:size], self._positions[:size], context))
        self._logits[:size].copy_(logits)
        self._tokens[:size].copy_(fused.argmax(logits))
