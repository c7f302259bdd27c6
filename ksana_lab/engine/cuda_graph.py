"""Steps as CUDA graphs, so that the host launches a few of them and not hundreds of kernels: decode steps whole, steps of short prompts
cut behind every layer's attention, where a layer's KV is complete and may be sent.

One graph, or one row of them, for each of a ladder of sizes; a step takes the next larger one, and what is padded has no keys and no slot.
What a graph reads and writes is allocated here, outside any graph, and refilled before a replay. Lengths are read on the device, so a graph
stays right for any of them. Knows nothing of sampling but the maximum."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionBackend, AttentionMetadata, ForwardContext
from ksana_lab.engine.input_batch import StepInputs
from ksana_lab.layers import fused
from ksana_lab.layers.replay import capture
from ksana_lab.models.decoder import Decoder

log = logging.getLogger(__name__)

MAX_PROMPTS = 8  # chunks of a step that is replayed
# Of logits, by norm, against the same step launched kernel by kernel: other sizes round otherwise, which random weights amplify to some
# percent; what is wrong has nothing in common.
_MAX_ERROR = 0.3


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: at most a quarter of a step is padding above 4, a sixteenth above 64."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32)]
    largest = min(max_num_seqs, sizes[-1])
    return [size for size in sizes if size < largest] + [largest]


class _Graphs:
    """What graphs read and write, which is allocated outside of any."""

    def __init__(
        self,
        model: Decoder,
        backend: AttentionBackend,
        kv_layers: Sequence[Tensor],
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_num_blocks: int,
    ) -> None:
        """``max_num_blocks``: the widest block table of a sequence."""
        device = kv_layers[0].device
        self._model, self._backend, self._kv_layers = model, backend, kv_layers
        self._input_ids = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._slots = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(max_num_seqs, max_num_blocks, dtype=torch.int32, device=device)
        self._logits = torch.zeros(max_num_seqs, model.config.vocab_size, dtype=model.embedding.weight.dtype, device=device)
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    @property
    def _max_len(self) -> int:
        """What a block table can hold; how long sequences really are is read on the device."""
        return self._block_tables.shape[1] * self._kv_layers[0].shape[3]

    def _fill_rows(self, ids: Tensor, positions: Tensor, attn: AttentionMetadata, num_tokens: int, num_seqs: int) -> None:
        """A step, padded to so many tokens and sequences."""
        tokens, seqs = len(ids), len(attn.seq_lens)
        self._input_ids[:tokens].copy_(ids)
        self._positions[:tokens].copy_(positions)
        self._slots[:tokens].copy_(attn.slot_mapping)
        self._seq_lens[:seqs].copy_(attn.seq_lens)
        self._block_tables[:seqs, : attn.block_tables.shape[1]].copy_(attn.block_tables)
        if num_tokens > tokens:
            self._slots[tokens:num_tokens].fill_(-1)
        if num_seqs > seqs:
            self._seq_lens[seqs:num_seqs].zero_()

    def _compute(self, num_tokens: int, context: ForwardContext, wanted: Tensor | None = None) -> None:
        """From token ids to logits and their maxima."""
        logits = self._model.head(self._model(self._input_ids[:num_tokens], self._positions[:num_tokens], context, wanted))
        self._logits[: len(logits)].copy_(logits)
        self._tokens[: len(logits)].copy_(fused.argmax(logits))


class DecodeGraphs(_Graphs):
    """Owned by the model's thread. Capture once, after the cache exists; every rank of a group captures the same sizes in step."""

    def __init__(
        self, model: Decoder, backend: AttentionBackend, kv_layers: Sequence[Tensor], *, max_num_seqs: int, max_num_blocks: int
    ) -> None:
        self.sizes = ladder(max_num_seqs)
        largest = self.sizes[-1]
        super().__init__(model, backend, kv_layers, max_num_tokens=largest, max_num_seqs=largest, max_num_blocks=max_num_blocks)
        self._query_start_loc = torch.arange(largest + 1, dtype=torch.int32, device=self._slots.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Largest first, so that the smaller ones find its memory free again."""
        start = time.monotonic()
        with torch.inference_mode():
            for size in reversed(self.sizes):
                self._run(size)  # compiles kernels, and lets libraries allocate what they keep
                self._graphs[size], _ = capture(lambda size=size: self._run(size))  # type: ignore[misc]
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
        self._fill_rows(inputs.input_ids, inputs.positions, inputs.attn, size, size)
        self._graphs[size].replay()
        return self._logits[:num], self._tokens[:num]

    def _run(self, size: int) -> None:
        attn = AttentionMetadata(
            num_decodes=size,
            query_start_loc=self._query_start_loc[: size + 1],
            seq_lens=self._seq_lens[:size],
            block_tables=self._block_tables[:size],
            slot_mapping=self._slots[:size],
            query_lens=[1] * size,
            context_lens=[self._max_len] * size,
            max_query_len=1,
            max_seq_len=self._max_len,
        )
        self._compute(size, ForwardContext(attn, self._kv_layers, self._backend))


def prefill_ladder(max_num_tokens: int) -> list[int]:
    """Numbers of tokens to capture: every 64 up to 512, then every 128."""
    sizes = [*range(64, 512, 64), *range(512, 4097, 128)]
    return [size for size in sizes if size < max_num_tokens] + [max_num_tokens]


class PrefillGraphs(_Graphs):
    """Short prompt chunks, no decodes among them. Owned by the model's thread; every rank of a group captures the same sizes in step."""

    def __init__(
        self, model: Decoder, backend: AttentionBackend, kv_layers: Sequence[Tensor], *, max_num_tokens: int, max_num_blocks: int
    ) -> None:
        """``max_num_tokens``: of a step; below what attention leaves to other kernels than the paged one."""
        self.sizes = prefill_ladder(max_num_tokens)
        super().__init__(model, backend, kv_layers, max_num_tokens=self.sizes[-1], max_num_seqs=MAX_PROMPTS, max_num_blocks=max_num_blocks)
        device = self._slots.device
        self._query_start_loc = torch.zeros(MAX_PROMPTS + 1, dtype=torch.int32, device=device)
        self._wanted = torch.zeros(MAX_PROMPTS, dtype=torch.int64, device=device)
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # up to the first layer's KV, up to the second's, …, the rest

    def capture(self) -> None:
        """Largest first, so that the smaller ones find its memory free again."""
        start, pool = time.monotonic(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        with torch.inference_mode():
            for size in reversed(self.sizes):
                self._run(size)
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    self._graphs[size] = self._capture(size, pool)
        torch.cuda.synchronize()
        log.info(
            "prefill graphs for %d sizes up to %d tokens captured in %.1f s", len(self.sizes), self.sizes[-1], time.monotonic() - start
        )

    def _capture(self, size: int, pool: Any) -> list[torch.cuda.CUDAGraph]:
        """One pool for all: they are replayed in this order, and what a later one reads is alive while it is captured."""
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(pool=pool)

        def cut(layer: int) -> None:
            graphs[-1].capture_end()
            begin()

        begin()
        try:
            self._run(size, cut)
        finally:
            graphs[-1].capture_end()
        return graphs

    def prove(self) -> bool:
        """Whether every size gives what the same step gives kernel by kernel; the log says where not. All ranks come to the same answer,
        as they have the same logits. Writes the cache's first blocks and clears them again."""
        dice, worst = torch.Generator().manual_seed(0), 0.0
        with torch.inference_mode():
            for size in self.sizes:
                ids, positions, attn, wanted = self._two_prompts(size - 3, dice)
                self._fill(size, ids, positions, attn, wanted)
                for graph in self._graphs[size]:  # first, and so it finds no keys but its own
                    graph.replay()
                ours = self._logits[:2].float()
                context = ForwardContext(attn, self._kv_layers, self._backend)
                theirs = self._model.head(self._model(ids, positions, context, wanted)).float()
                for layer in self._kv_layers:
                    layer[: int(attn.block_tables.max()) + 1].zero_()
                error = ((ours - theirs).norm() / theirs.norm()).item()
                if not error < _MAX_ERROR:  # NaN, too
                    log.warning("prefill is not replayed: a graph of %d tokens is WRONG by %.0f%%", size, 100 * error)
                    return False
                worst = max(worst, error)
        log.info("prefill graphs are right: logits differ by %.1f%% at most from those of single kernels", 100 * worst)
        return True

    def _two_prompts(self, num_tokens: int, dice: torch.Generator) -> tuple[Tensor, Tensor, AttentionMetadata, Tensor]:
        """(ids, positions, attention, indices of the last tokens) of a step of random prompts, in the first blocks of the cache."""
        device, block_size = self._slots.device, self._kv_layers[0].shape[3]
        lens = [num_tokens // 3, num_tokens - num_tokens // 3]
        first_blocks = [0, -(-lens[0] // block_size)]
        positions = [torch.arange(n) for n in lens]
        tables = torch.zeros(2, -(-lens[1] // block_size), dtype=torch.int32)
        for table, first, n in zip(tables, first_blocks, lens, strict=True):
            num_blocks = -(-n // block_size)
            table[:num_blocks] = torch.arange(first, first + num_blocks)
        attn = AttentionMetadata(
            num_decodes=0,
            query_start_loc=torch.tensor([0, lens[0], num_tokens], dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            slot_mapping=torch.cat([at + first * block_size for at, first in zip(positions, first_blocks, strict=True)]).to(device),
            query_lens=lens,
            context_lens=lens,
            max_query_len=max(lens),
            max_seq_len=max(lens),
        )
        ids = torch.randint(0, self._model.config.vocab_size, (num_tokens,), generator=dice).to(device)
        return ids, torch.cat(positions).to(device), attn, torch.tensor([lens[0] - 1, num_tokens - 1], device=device)

    def close(self) -> None:
        """A replay under way goes on to its end."""
        for graphs in self._graphs.values():
            for graph in graphs:
                graph.reset()
        self._graphs.clear()

    def fits(self, inputs: StepInputs) -> bool:
        return inputs.attn.num_decodes == 0 and len(inputs.seq_ids) <= MAX_PROMPTS and len(inputs.input_ids) <= self.sizes[-1]

    def replay(self, inputs: StepInputs, on_layer_done: Callable[[int], None] | None) -> tuple[Tensor, Tensor]:
        """(logits [S, vocab] in the model's dtype, their maxima's ids [S] int64) of those that sample; overwritten by the next."""
        size = self.sizes[bisect.bisect_left(self.sizes, len(inputs.input_ids))]
        self._fill(size, inputs.input_ids, inputs.positions, inputs.attn, inputs.logits_indices)
        *layers, last = self._graphs[size]
        for layer, graph in enumerate(layers):
            graph.replay()
            if on_layer_done is not None:
                on_layer_done(layer)
        last.replay()
        num = len(inputs.sample_seq_ids)
        return self._logits[:num], self._tokens[:num]

    def _fill(self, size: int, ids: Tensor, positions: Tensor, attn: AttentionMetadata, wanted: Tensor | None) -> None:
        self._fill_rows(ids, positions, attn, size, MAX_PROMPTS)
        num_seqs = len(attn.seq_lens)
        self._query_start_loc[: num_seqs + 1].copy_(attn.query_start_loc)
        self._query_start_loc[num_seqs + 1 :].fill_(len(ids))
        self._wanted.zero_()  # an index of a larger step would lie outside of this one
        if wanted is not None:
            self._wanted[: len(wanted)].copy_(wanted)

    def _run(self, size: int, on_layer_done: Callable[[int], None] | None = None) -> None:
        attn = AttentionMetadata(
            num_decodes=0,
            query_start_loc=self._query_start_loc,
            seq_lens=self._seq_lens,
            block_tables=self._block_tables,
            slot_mapping=self._slots[:size],
            query_lens=[size] + [0] * (MAX_PROMPTS - 1),
            context_lens=[self._max_len] * MAX_PROMPTS,
            max_query_len=size,
            max_seq_len=self._max_len,
        )
        self._compute(size, ForwardContext(attn, self._kv_layers, self._backend, on_layer_done), self._wanted)
