"""What attention needs to know of one step, and the interface of a backend.

A step is a flat batch of T tokens of S sequences. The first ``num_decodes`` sequences contribute one token each; the others are prefill
chunks. Every key and value of the step is written into the paged cache before attention reads it, so a backend only ever reads pages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class AttentionMetadata:
    num_decodes: int
    query_start_loc: Tensor  # [S + 1] int32, device
    seq_lens: Tensor  # [S] int32, device: KV length including this step's tokens
    block_tables: Tensor  # [S, >= ceil(max_seq_len / block_size)] int32, device; entries past the end are 0
    slot_mapping: Tensor  # [T] int64, device: block * block_size + offset; -1 = do not store (padding)
    query_lens: Sequence[int]  # the same on the host, real sequences only
    context_lens: Sequence[int]  # seq_lens on the host
    max_query_len: int
    max_seq_len: int
    plan: Any = None  # what a backend derived from the fields above, once for all layers; who refills the fields in place sets it to None


@dataclass
class ForwardContext:
    """Everything of a step that is not a tensor argument of the model; handed down explicitly, never looked up."""

    attn: AttentionMetadata
    kv_layers: Sequence[Tensor]  # per layer: [num_blocks, 2, kv_heads, block_size, head_dim], views of one allocation
    backend: AttentionBackend
    on_layer_done: Callable[[int], None] | None = None  # after the kernels that write layer i's KV were enqueued and attention was, too


class AttentionBackend(Protocol):
    name: str

    def warm_up(
        self, num_heads: int, num_kv_heads: int, head_dim: int, max_tokens: int, dtype: torch.dtype, device: torch.device,
        *, max_seq_len: int, block_size: int, cache_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Once, before requests and in the thread that will serve them: make everything that would take time at the first use.
        ``max_tokens``: of one sequence in a step."""

    def peak_chunk(self) -> tuple[int, int] | None:
        """After ``warm_up``: new tokens and earlier context of a prefill chunk whose attention needs more memory than that of a prompt's
        first chunk may; None if there is none."""

    def store(self, k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
        """Write k, v [T, kv_heads, head_dim] to their slots; a slot of -1 is skipped."""

    def remember(self, k: Tensor, v: Tensor, kv_layer: Tensor) -> None:
        """Another kernel has stored this step's k, v [T, kv_heads, head_dim] of a layer; ``attend`` comes next and may read them."""

    def attend(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        """q [T, heads, head_dim] -> [T, heads, head_dim], causal within each sequence, GQA by heads // kv_heads."""


_BACKENDS = {
    "sdpa": "ksana_lab.attention.sdpa:SdpaBackend",
    "triton": "ksana_lab.attention.triton:TritonBackend",
}


def load_backend(name: str) -> AttentionBackend:
    """Import and make a backend by name; only the one asked for is imported. Raises KeyError for an unknown name."""
    module, _, attribute = _BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def default_backend(device: torch.device) -> AttentionBackend:
    return load_backend("triton" if device.type == "cuda" else "sdpa")
