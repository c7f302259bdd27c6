"""Attention between its two projections: norm of queries and keys, rotary, store into pages, attend over pages. One place to fuse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ksana_lab.attention.base import ForwardContext
from ksana_lab.layers import fused
from ksana_lab.layers.norm import RMSNorm
from ksana_lab.layers.piece import Piece
from ksana_lab.layers.rotary import rotate


class PagedAttention(nn.Module):
    pdl = False  # start_up.py sets it

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm_eps: float | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``num_heads`` and ``num_kv_heads`` are this rank's. ``qk_norm_eps``: None for a model without norms on queries and keys."""
        super().__init__()
        self.layer = layer
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, dtype, device)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, dtype, device)

    def forward(self, qkv: Tensor, cos_sin: Tensor, ctx: ForwardContext) -> Tensor:
        """qkv [T, (heads + 2 * kv_heads) * head_dim], cos_sin [T, head_dim] -> [T, heads * head_dim].

        Writes this step's keys and values into ``ctx.kv_layers[layer]``, then tells ``ctx.on_layer_done``."""
        kv_layer = ctx.kv_layers[self.layer]
        store = self.fused_store if qkv.is_cuda else self.store
        q = store(qkv, kv_layer, cos_sin, ctx)
        out = ctx.backend.attend(q, kv_layer, ctx.attn, self.scale)
        if ctx.on_layer_done is not None:
            ctx.on_layer_done(self.layer)
        return out.reshape(qkv.shape[0], -1)

    def store(self, qkv: Tensor, kv_layer: Tensor, cos_sin: Tensor, ctx: ForwardContext) -> Tensor:
        """Put keys and values into their slots; returns the queries [T, heads, head_dim]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        qk = rotate(self.normalize(qk), cos_sin)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
        ctx.backend.store(k, v, kv_layer, ctx.attn.slot_mapping)
        return q

    def fused_store(self, qkv: Tensor, kv_layer: Tensor, cos_sin: Tensor, ctx: ForwardContext) -> Tensor:
        """The same in one kernel, in place."""
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        eps = 0.0 if self.q_norm is None else self.q_norm.eps
        pdl = fused.is_dependent(self.pdl, qkv)
        q, k, v = fused.qk_norm_rope_store(qkv, self.num_heads, kv_layer, ctx.attn.slot_mapping, cos_sin, q_weight, k_weight, eps, pdl)
        ctx.backend.remember(k, v, kv_layer)
        return q

    def normalize(self, qk: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
        return torch.cat([self.q_norm.normalize(q), self.k_norm.normalize(k)], dim=1)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.pieces(f"{prefix}.q_norm")
            yield from self.k_norm.pieces(f"{prefix}.k_norm")
