"""Runs a model on hand-made batches: a paged cache, shuffled block tables, a ForwardContext per step. What an engine does, in a page."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionBackend, AttentionMetadata, ForwardContext, load_backend
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.decoder import Decoder


def new_cache(layout: KVLayout, *, device: torch.device | str = "cpu", fill: float = float("nan")) -> list[Tensor]:
    """Per-layer views [num_blocks, 2, kv_heads, block_size, head_dim] of one allocation. Poisoned: reading what nobody wrote shows."""
    cache = torch.full(layout.shape, fill, dtype=getattr(torch, layout.dtype), device=device)
    return list(cache.unbind(1 if layout.order == "block_major" else 0))


def blas_sums_rows_alike() -> bool:
    """Whether a row of a product is bitwise the same in a batch of 8 and of 64, as the CPU path relies on."""
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    return torch.equal((a @ b)[:8], a[:8] @ b) and torch.equal((a @ b)[:4], a[:4] @ b)


@dataclass
class PagedSequence:
    """Tokens whose KV exists (``num_computed``) and where (``block_table``)."""

    block_table: list[int]
    num_computed: int = 0


def make_metadata(
    chunks: list[tuple[PagedSequence, int]], block_size: int, *, num_padding: int = 0, device: torch.device | str = "cpu"
) -> AttentionMetadata:
    """``chunks``: (sequence, how many new tokens) in the step's order, ones first. ``num_padding`` tokens follow and are not stored."""
    query_lens = [count for _, count in chunks]
    context_lens = [seq.num_computed + count for seq, count in chunks]
    num_decodes = next((i for i, count in enumerate(query_lens) if count > 1), len(chunks))
    slots = [
        seq.block_table[position // block_size] * block_size + position % block_size
        for seq, count in chunks
        for position in range(seq.num_computed, seq.num_computed + count)
    ]
    width = max(-(-length // block_size) for length in context_lens)
    tables = [(seq.block_table[:width] + [0] * width)[:width] for seq, _ in chunks]
    starts = [sum(query_lens[:i]) for i in range(len(chunks) + 1)]
    return AttentionMetadata(
        num_decodes=num_decodes,
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(slots + [-1] * num_padding, dtype=torch.int64, device=device),
        query_lens=query_lens,
        context_lens=context_lens,
        max_query_len=max(query_lens),
        max_seq_len=max(context_lens),
    )


@dataclass
class PagedBatch:
    """A model, its cache, and sequences that grow step by step."""

    model: Decoder
    block_size: int = 8
    num_blocks: int = 64
    order: str = "block_major"
    backend: AttentionBackend = field(default_factory=lambda: load_backend("sdpa"))
    device: torch.device | str = "cpu"
    on_layer_done: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        config: ModelConfig = self.model.config
        kv_heads = config.num_local_kv_heads(self.model.tp.size)
        dtype = str(self.model.norm.weight.dtype).removeprefix("torch.")
        layout = KVLayout(self.num_blocks, config.num_layers, kv_heads, self.block_size, config.head_dim, dtype, self.order)  # type: ignore[arg-type]
        self.kv_layers = new_cache(layout, device=self.device)
        self._free = random.Random(0).sample(range(self.num_blocks), self.num_blocks)

    def new_sequence(self, max_tokens: int, shared_blocks: list[int] | None = None) -> PagedSequence:
        """``shared_blocks``: a cached prefix, already computed."""
        blocks = list(shared_blocks or [])
        num_cached = len(blocks) * self.block_size
        while len(blocks) * self.block_size < max_tokens:
            blocks.append(self._free.pop())
        return PagedSequence(blocks, num_cached)

    @torch.inference_mode()
    def step(self, chunks: list[tuple[PagedSequence, list[int]]], *, num_padding: int = 0) -> list[Tensor]:
        """Run one step over (sequence, new tokens); logits of every new token, one [count, vocab] per sequence."""
        counts = [(seq, len(tokens)) for seq, tokens in chunks]
        meta = make_metadata(counts, self.block_size, num_padding=num_padding, device=self.device)
        ids = [token for _, tokens in chunks for token in tokens] + [0] * num_padding
        positions = [seq.num_computed + i for seq, tokens in chunks for i in range(len(tokens))] + [0] * num_padding
        ctx = ForwardContext(meta, self.kv_layers, self.backend, self.on_layer_done)
        hidden = self.model(torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device), ctx)
        logits = self.model.compute_logits(hidden[: sum(meta.query_lens)])
        for seq, count in counts:
            seq.num_computed += count
        return list(logits.split(meta.query_lens))

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """One sequence alone, whole prompt in one step, then ``num_tokens`` greedy tokens."""
        seq = self.new_sequence(len(prompt) + num_tokens)
        output: list[int] = []
        new = prompt
        while len(output) < num_tokens:
            new = [int(self.step([(seq, new)])[0][-1].argmax())]
            output += new
        return output
