"""What eight bits on the wire do to a model's answers: part ``fp8`` of ``python -m ksana_lab.bench transfer``.

A prompt is computed once. Of its KV one copy stays as it is, another goes through transfer/packing.py as it would between two nodes. Then
both are asked for the logits of the same continuation, token by token of what the first would have said (teacher forcing), in one step
of the same shape: what differs comes from the eight bits alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionBackend, AttentionMetadata, ForwardContext, default_backend
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.engine.kv_cache import make_layer_views
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.decoder import Decoder
from ksana_lab.models.registry import load_model
from ksana_lab.transfer import packing
from ksana_lab.transfer.plan import HeadSlice, cells

_BLOCK_SIZE = 16


class Prompt:
    """One sequence of a model, in a cache of its own."""

    def __init__(self, model: Decoder, layout: KVLayout, device: torch.device, backend: AttentionBackend) -> None:
        self._model, self._layout, self._device, self._backend = model, layout, device, backend
        self.cache = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
        self.num_computed = 0

    @torch.inference_mode()
    def step(self, tokens: list[int], *, is_prompt: bool = False) -> Tensor:
        """Logits [len(tokens), vocabulary], of a prompt those of its last token, float32 on the CPU."""
        first, count = self.num_computed, len(tokens)
        end = first + count

        def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        meta = AttentionMetadata(
            num_decodes=int(count == 1), query_start_loc=ints(0, count), seq_lens=ints(end),
            block_tables=ints(*range(-(-end // _BLOCK_SIZE)))[None],
            slot_mapping=ints(*range(first, end), dtype=torch.int64), query_lens=[count], context_lens=[end], max_query_len=count,
            max_seq_len=end,
        )  # fmt: skip
        context = ForwardContext(meta, make_layer_views(self.cache, self._layout), self._backend)
        positions = ints(*range(first, end), dtype=torch.int64)
        hidden = self._model(ints(*tokens, dtype=torch.int64), positions, context)
        self.num_computed = end
        return self._model.compute_logits(hidden[-1:] if is_prompt else hidden).float().cpu()

    def copy(self) -> Prompt:
        other = Prompt(self._model, self._layout, self._device, self._backend)
        other.cache.copy_(self.cache)
        other.num_computed = self.num_computed
        return other

    def rounded(self) -> Prompt:
        """A copy whose KV went through bfloat16."""
        other = self.copy()
        numbers = other.cache.view(getattr(torch, self._layout.dtype))
        numbers.copy_(numbers.to(torch.bfloat16))
        return other

    def through_the_wire(self, kernels: packing.Kernels) -> Prompt:
        """A copy whose KV was packed and expanded."""
        other, layout = self.copy(), self._layout
        blocks = list(range(-(-self.num_computed // _BLOCK_SIZE)))
        whole = [HeadSlice(0, 0, 0, 0, layout.num_kv_heads)]
        packer, unpacker = packing.Packer(self.cache, kernels), packing.Unpacker(other.cache, kernels)
        for batch in packing.batches(layout, cells(layout, layout, whole, blocks, blocks, 0, self.num_computed, range(layout.num_layers))):
            stage, event = packer.pack(batch, 0)
            if event is not None:
                event.synchronize()
            for at, target, count in batch.copies.tolist():
                other.cache[target : target + count] = stage[at : at + count]
            unpacker.expand(*packing.read(layout, batch.describe(0)))
        return other


def measure(model_dir: str, device: str, *, prompt_tokens: int, steps: int = 64, rounds: int = 4) -> Iterator[tuple[str, str, float]]:
    """(name, unit, value) of ``rounds`` random prompts, in bfloat16 on a GPU. On a CPU in float32, with a cache rounded to bfloat16 as the
    yardstick; the ratio of bytes is bfloat16's everywhere."""
    config, where = ModelConfig.from_dir(model_dir), torch.device(device)
    dtype = "bfloat16" if where.type == "cuda" else "float32"
    model = load_model(config, model_dir, dtype=getattr(torch, dtype), device=where)
    num_blocks = -(-(prompt_tokens + steps) // _BLOCK_SIZE)
    layout = KVLayout(num_blocks, config.num_layers, config.num_kv_heads, _BLOCK_SIZE, config.head_dim, dtype)
    backend, kernels = default_backend(where), packing.choose(layout, where)
    dice, exact, packed, rounded = random.Random(0), [], [], []
    for _ in range(rounds):
        prompt = Prompt(model, layout, where, backend)
        logits = prompt.step([dice.randrange(3, config.vocab_size) for _ in range(prompt_tokens)], is_prompt=True)
        said, teacher = prompt.copy(), [int(logits[-1].argmax())]
        while len(teacher) < steps:
            teacher.append(int(said.step(teacher[-1:])[-1].argmax()))
        packed.append(prompt.through_the_wire(kernels).step(teacher))
        if dtype == "float32":
            rounded.append(prompt.rounded().step(teacher))
        exact.append(prompt.step(teacher))
    half = replace(layout, dtype="bfloat16")
    nbytes = packing.wire_bytes(half, half, [HeadSlice(0, 0, 0, 0, config.num_kv_heads)], 0, prompt_tokens, config.num_layers)
    yield "fp8_wire.bytes_ratio", "x", nbytes / (prompt_tokens * half.token_bytes)
    yield from compare("fp8_wire", torch.cat(exact), torch.cat(packed))
    if rounded:
        yield from compare("bf16_cache", torch.cat(exact), torch.cat(rounded))


def compare(name: str, exact: Tensor, packed: Tensor) -> Iterator[tuple[str, str, float]]:
    """How far ``packed`` logits [positions, vocabulary] are from ``exact`` ones. ``logits_rms``: of the differences, over the spread of the
    exact ones; ``kl``: nats a position; ``top1``: share of positions with the same most probable token."""
    spread = (exact - exact.mean(-1, keepdim=True)).square().mean().sqrt()
    p, q = exact.log_softmax(-1), packed.log_softmax(-1)
    yield f"{name}.logits_max", "", float((packed - exact).abs().max())
    yield f"{name}.logits_rms", "x", float((packed - exact).square().mean().sqrt() / spread)
    yield f"{name}.kl", "nat", float((p.exp() * (p - q)).sum(-1).mean())
    yield f"{name}.top1", "x", float((exact.argmax(-1) == packed.argmax(-1)).float().mean())
