"""The whole model on a page: embedding, decoder layers, norm, head. Llama 3.x, Qwen2/2.5 and Qwen3 differ by flags of ModelConfig
(biases on q, k, v; norms on q and k; rope scaling; tied head), so there is one decoder.

It knows nothing of requests or blocks: a step is a flat batch of tokens, and ``ForwardContext`` says where their keys and values live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import torch
from torch import Tensor, nn

from ksana_lab.attention.base import ForwardContext
from ksana_lab.layers.attention import PagedAttention
from ksana_lab.layers.embedding import VocabEmbedding, VocabHead
from ksana_lab.layers.linear_fp8 import LINEARS, Linears
from ksana_lab.layers.norm import RMSNorm
from ksana_lab.layers.piece import Piece
from ksana_lab.layers.rotary import RotaryTable, llama3_frequencies, rotary_frequencies
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, linears: Linears, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        local_heads, local_kv_heads = config.num_local_heads(tp.size), config.num_local_kv_heads(tp.size)
        qk_norm_eps = config.rms_norm_eps if config.has_qk_norm else None
        self.qkv = linears.qkv(hidden, heads, config.num_kv_heads, head_dim, config.has_qkv_bias, tp, dtype, device)
        self.core = PagedAttention(layer, local_heads, local_kv_heads, head_dim, qk_norm_eps, dtype, device)
        self.output = linears.row(heads * head_dim, hidden, config.has_output_bias, tp, dtype, device)

    def mix(self, x: Tensor, cos_sin: Tensor, ctx: ForwardContext) -> Tensor:
        """All but the output projection: [T, hidden] -> this rank's heads [T, local_heads * head_dim]."""
        return self.core(self.qkv(x), cos_sin, ctx)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self.qkv.pieces(prefix)
        yield from self.core.pieces(prefix)
        yield from self.output.pieces(f"{prefix}.o_proj")


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, linears: Linears, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = linears.gate_up(config.hidden_size, config.intermediate_size, tp, dtype, device)
        self.down = linears.row(config.intermediate_size, config.hidden_size, False, tp, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up.activated(x))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self.gate_up.pieces(prefix)
        yield from self.down.pieces(f"{prefix}.down_proj")


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, linears: Linears, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, tp)
        self.attention = Attention(config, layer, linears, tp, dtype, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, tp)
        self.mlp = MLP(config, linears, tp, dtype, device)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, ctx: ForwardContext, wanted: Tensor | slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer's output is the sum of the ranks' ``x``, and ``residual``, left unsummed: the next norm adds them. The first layer's
        input is whole, and has no residual. ``wanted``: only these tokens' output; keys and values are every token's all the same."""
        x, residual = self.attention_norm(x, residual)
        x = self.attention.mix(x, cos_sin, ctx)
        if wanted is not None:
            x, residual = x[wanted], residual[wanted]
            if not len(x):
                return residual, residual
        x = self.attention.output(x)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self.attention_norm.pieces(f"{prefix}.input_layernorm")
        yield from self.attention.pieces(f"{prefix}.self_attn")
        yield from self.mlp_norm.pieces(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.pieces(f"{prefix}.mlp")


class Decoder(nn.Module):
    """One rank's share of a model. Weights are uninitialised until ``models/weights.py`` fills ``pieces()``."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, tp: TPGroup, quant_method: str = "auto") -> None:
        """``quant_method``: a key of ``LINEARS``; how the weights of the layers' products are kept."""
        super().__init__()
        config.check_tensor_parallel(tp.size)
        self.config = config
        self.tp = tp
        self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, tp, dtype, device)
        self.rotary = RotaryTable(_frequencies(config), config.max_position_embeddings, device)
        self.layers = nn.ModuleList(DecoderLayer(config, i, LINEARS[quant_method], tp, dtype, device) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, tp)
        tied_to = self.embedding.weight if config.tie_word_embeddings else None
        self.head = VocabHead(config.vocab_size, config.hidden_size, tp, dtype, device, tied_to)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext, wanted: Tensor | slice | None = None) -> Tensor:
        """input_ids, positions [T] int64 -> normalised hidden states [T, hidden], or those of the ``wanted`` tokens (indices, the same on
        every rank), which spare the last layer its second half for the others. Call under ``torch.inference_mode``."""
        cos_sin = self.rotary.at(positions)
        x, residual = self.embedding(input_ids), None
        *others, last = self.layers
        for layer in others:
            x, residual = layer(x, residual, cos_sin, ctx)
        x, residual = last(x, residual, cos_sin, ctx, wanted)
        return self.norm(x, residual)[0] if len(x) else x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] (rows of ``forward``'s result) -> float32 [S, vocab], the same on every rank."""
        return self.head(hidden).float()

    def pieces(self) -> Iterator[Piece]:
        """What a checkpoint must hold, and where this rank keeps its share of it."""
        yield from self.embedding.pieces("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.pieces(f"model.layers.{i}")
        yield from self.norm.pieces("model.norm")
        if not self.config.tie_word_embeddings:
            yield from self.head.pieces("lm_head")


def _frequencies(config: ModelConfig) -> Tensor:
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    return frequencies if config.rope_scaling is None else llama3_frequencies(frequencies, *astuple(config.rope_scaling))
