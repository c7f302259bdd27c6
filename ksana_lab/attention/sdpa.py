"""Reference attention: gathers pages and calls torch's scaled_dot_product_attention. What a CPU node runs on, and the oracle on a GPU.

Decodes are vectorised in groups of similar length, so that padding at most doubles the work; prefill chunks run one sequence at a time.
A *row* is one head's keys (or values) in one block, [block_size, head_dim]: the smallest contiguous piece of the cache, and the unit
of gathering. Reading rows by number costs one copy and leaves keys contiguous as [kv_heads, tokens, head_dim]."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ksana_lab.attention.base import AttentionMetadata

_SMALLEST_GROUP_BLOCKS = 8  # decodes of up to this many blocks share a group: padding them is cheaper than another call


@dataclass
class _DecodeGroup:
    tokens: Tensor | None  # [n] int64: which tokens of the step; None = the first n, in order
    num_tokens: int
    rows: Tensor  # [2 * n * kv_heads * blocks] int64: rows of K, then of V
    mask: Tensor  # [n, 1, 1, blocks * block_size]: 0 where a key exists, -inf in the padding
    stale: Tensor  # [?] int64: tokens among the gathered [2 * n * kv_heads * blocks * block_size] that hold nothing of the sequence


@dataclass
class _PrefillChunk:
    tokens: slice
    rows: Tensor  # [2 * kv_heads * blocks] int64
    num_keys: int
    mask: Tensor | None  # [queries, keys]; None = plain causal, the chunk starts at position 0


@dataclass
class _Plan:
    decodes: list[_DecodeGroup]
    prefills: list[_PrefillChunk]
    num_tokens: int  # without padding


class SdpaBackend:
    name = "sdpa"

    def store(self, k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
        """Write k, v [T, kv_heads, head_dim] to their slots; a slot of -1 is skipped."""
        if bool((slot_mapping < 0).any()):
            is_real = slot_mapping >= 0
            k, v, slot_mapping = k[is_real], v[is_real], slot_mapping[is_real]
        block_size = kv_layer.shape[3]
        block, offset = slot_mapping // block_size, slot_mapping % block_size
        # [num_blocks, block_size, 2, kv_heads, head_dim]: with both indices in front, one assignment writes K and V of all heads.
        kv_layer.permute(0, 3, 1, 2, 4)[block, offset] = torch.stack([k, v], dim=1).to(kv_layer.dtype)

    def attend(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        """q [T, heads, head_dim] -> [T, heads, head_dim]; rows of padding come out as zeros."""
        if meta.plan is None:
            meta.plan = _make_plan(meta, kv_layer, q.dtype)
        plan: _Plan = meta.plan
        out = torch.empty_like(q) if plan.num_tokens == q.shape[0] else torch.zeros_like(q)
        rows = _rows_of(kv_layer)
        for group in plan.decodes:
            _attend_decodes(q, rows, kv_layer.shape[2:], group, scale, out)
        for chunk in plan.prefills:
            _attend_chunk(q, rows, kv_layer.shape[2:], chunk, scale, out)
        return out


def _attend_decodes(q: Tensor, rows: Tensor, cell: torch.Size, group: _DecodeGroup, scale: float, out: Tensor) -> None:
    kv_heads, _, head_dim = cell
    n = group.num_tokens
    chosen = q[:n] if group.tokens is None else q.index_select(0, group.tokens)
    pages = rows.index_select(0, group.rows).to(q.dtype)
    # A mask alone does not keep out a NaN that a slot's former owner left: 0 * NaN is NaN.
    pages.view(-1, head_dim).index_fill_(0, group.stale, 0.0)
    keys, values = pages.view(2, n, kv_heads, -1, head_dim)
    # The query heads that share a KV head stand where SDPA expects query positions: they see the same keys.
    grouped = chosen.reshape(n, kv_heads, -1, head_dim)
    result = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale).reshape(n, -1, head_dim)
    if group.tokens is None:
        out[:n] = result
    else:
        out[group.tokens] = result


def _attend_chunk(q: Tensor, rows: Tensor, cell: torch.Size, chunk: _PrefillChunk, scale: float, out: Tensor) -> None:
    kv_heads, _, head_dim = cell
    pages = rows.index_select(0, chunk.rows).to(q.dtype).view(2, 1, kv_heads, -1, head_dim)
    keys, values = pages[:, :, :, : chunk.num_keys]
    queries = q[chunk.tokens].transpose(0, 1).unsqueeze(0)
    is_grouped = q.shape[1] != kv_heads
    result = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scale, enable_gqa=is_grouped
    )
    out[chunk.tokens] = result[0].transpose(0, 1)


def _rows_of(kv_layer: Tensor) -> Tensor:
    """The cache from this layer's first cell on as rows, [num_rows, block_size * head_dim]. Rows of other layers lie in between; no number
    in a plan names them."""
    num_blocks, _, kv_heads, block_size, head_dim = kv_layer.shape
    row = block_size * head_dim
    assert kv_layer.stride()[1:] == (kv_heads * row, row, head_dim, 1), f"a cell must be contiguous, strides are {kv_layer.stride()}"
    num_rows = (num_blocks - 1) * (kv_layer.stride(0) // row) + 2 * kv_heads
    return kv_layer.as_strided((num_rows, row), (row, 1), kv_layer.storage_offset())


def _row_numbers(blocks: Tensor, kv_layer: Tensor) -> Tensor:
    """blocks [n, b] -> flat numbers of rows in the order [2, n, kv_heads, b]."""
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    rows_per_block = kv_layer.stride(0) // (block_size * head_dim)
    heads = torch.arange(2 * kv_heads, device=blocks.device).view(2, 1, kv_heads, 1)
    return (blocks.long()[None, :, None, :] * rows_per_block + heads).reshape(-1)


def _make_plan(meta: AttentionMetadata, kv_layer: Tensor, dtype: torch.dtype) -> _Plan:
    return _Plan(
        decodes=[_decode_group(members, meta, kv_layer, dtype) for members in _similar_lengths(meta, kv_layer.shape[3])],
        prefills=_prefill_chunks(meta, kv_layer, dtype),
        num_tokens=sum(meta.query_lens),
    )


def _similar_lengths(meta: AttentionMetadata, block_size: int) -> list[list[int]]:
    """Decodes by power of two of their number of blocks."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(meta.context_lens[: meta.num_decodes]):
        num_blocks = -(-length // block_size)
        groups[max(_SMALLEST_GROUP_BLOCKS - 1, num_blocks - 1).bit_length()].append(i)
    return list(groups.values())


def _decode_group(members: list[int], meta: AttentionMetadata, kv_layer: Tensor, dtype: torch.dtype) -> _DecodeGroup:
    device, block_size = kv_layer.device, kv_layer.shape[3]
    num_blocks = -(-max(meta.context_lens[i] for i in members) // block_size)
    is_all = len(members) == meta.num_decodes
    tokens = None if is_all else torch.tensor(members, device=device)
    tables, lengths = meta.block_tables[: meta.num_decodes, :num_blocks], meta.seq_lens[: meta.num_decodes]
    if tokens is not None:
        tables, lengths = tables.index_select(0, tokens), lengths.index_select(0, tokens)
    # Padding repeats a sequence's first block, whose content is its own: little is left that must be cleared.
    used_blocks = (lengths + block_size - 1) // block_size
    tables = torch.where(torch.arange(num_blocks, device=device) < used_blocks[:, None], tables, tables[:, :1])
    position = torch.arange(num_blocks * block_size, device=device)
    source = torch.where(position < used_blocks[:, None] * block_size, position, position % block_size)
    mask = _additive(position < lengths[:, None], dtype)[:, None, None, :]
    stale = _token_numbers((source >= lengths[:, None]).nonzero(), len(members), kv_layer.shape[2], len(position))
    return _DecodeGroup(tokens, len(members), _row_numbers(tables, kv_layer), mask, stale)


def _token_numbers(places: Tensor, n: int, kv_heads: int, width: int) -> Tensor:
    """places [m, 2] (sequence, position) -> flat numbers of these tokens in [2, n, kv_heads, width], for K and V and every head."""
    which = torch.arange(2, device=places.device).view(2, 1, 1)
    head = torch.arange(kv_heads, device=places.device).view(1, kv_heads, 1)
    return (((which * n + places[:, 0]) * kv_heads + head) * width + places[:, 1]).reshape(-1)


def _prefill_chunks(meta: AttentionMetadata, kv_layer: Tensor, dtype: torch.dtype) -> list[_PrefillChunk]:
    chunks, device = [], kv_layer.device
    start = meta.num_decodes
    for i in range(meta.num_decodes, len(meta.query_lens)):
        num_queries, num_keys = meta.query_lens[i], meta.context_lens[i]
        num_blocks = -(-num_keys // kv_layer.shape[3])
        mask = None
        if num_queries < num_keys:  # query j stands at position num_keys - num_queries + j
            is_visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
            mask = _additive(is_visible, dtype)
        rows = _row_numbers(meta.block_tables[i : i + 1, :num_blocks], kv_layer)
        chunks.append(_PrefillChunk(slice(start, start + num_queries), rows, num_keys, mask))
        start += num_queries
    return chunks


def _additive(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device).masked_fill_(~is_visible, float("-inf"))
