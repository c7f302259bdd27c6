"""Reference attention: gathers pages and calls torch's scaled_dot_product_attention. What a CPU node runs on, and the oracle on a GPU.

Decodes are vectorised in groups of similar length; prefill chunks run one sequence at a time, in tiles of queries.

On a CPU a token's result is bitwise the same however its sequence is cut into chunks, whatever else is in the batch, and whether it came
as a decode or in a prefill: a disaggregated pair then equals a mixed node, and recomputation the first computation, even where two
tokens are nearly equally likely. What it takes is that BLAS sums in one order. It sums in another one for fewer than four rows, and the
order over keys depends on how many of the 512 that torch's kernel takes at a time are there. So there are always rows enough, tiles lie
at fixed positions, and a token's position alone decides how many keys its last 512 hold; whole 512s of padding add exact zeros.

A *row* is one head's keys (or values) in one block, [block_size, head_dim]: the smallest contiguous piece of the cache, and the unit of
gathering. Reading rows by number costs one copy and leaves keys contiguous as [kv_heads, tokens, head_dim]."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ksana_lab.attention.base import AttentionMetadata
from ksana_lab.attention.cache_dtype import to_cache

_TILE = 128  # query positions per call; a tile starts at a multiple of it
_QUERY_ROWS = 8  # a tile's queries are padded to a multiple of this: the kernel takes 32 at a time, and no rest may fall below 4
_DECODE_ROWS = 4
_KERNEL_KEYS = 512


@dataclass
class _DecodeGroup:
    tokens: Tensor | None  # [n] int64: which tokens of the step; None = the first n, in order
    num_tokens: int
    rows: Tensor  # [2 * n * kv_heads * blocks] int64: rows of K, then of V
    mask: Tensor  # [n, 1, 1, keys]: 0 where a key exists, -inf in the padding
    stale: Tensor  # [?] int64: tokens among the gathered [2 * n * kv_heads * blocks * block_size] that hold nothing of the sequence


@dataclass
class _PrefillChunk:
    first_token: int  # in the step
    num_queries: int
    num_keys: int  # the last num_queries of them are the chunk's own
    rows: Tensor  # [2 * kv_heads * blocks] int64, up to the end of the last tile


@dataclass
class _Plan:
    num_tokens: int  # without padding
    decodes: list[_DecodeGroup]
    prefills: list[_PrefillChunk]
    causal: Tensor  # every tile's mask, from _causal_mask


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
        kv_layer.permute(0, 3, 1, 2, 4)[block, offset] = to_cache(torch.stack([k, v], dim=1), kv_layer.dtype)

    def warm_up(
        self, num_heads: int, num_kv_heads: int, head_dim: int, max_tokens: int, dtype: torch.dtype, device: torch.device,
        *, max_seq_len: int, block_size: int, cache_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        pass

    def peak_chunk(self) -> None:
        return None

    def remember(self, k: Tensor, v: Tensor, kv_layer: Tensor) -> None:
        pass  # pages are read, always

    def attend(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        """q [T, heads, head_dim] -> [T, heads, head_dim]; rows of padding come out as zeros."""
        if meta.plan is None:
            meta.plan = _make_plan(meta, kv_layer, q.dtype)
        plan: _Plan = meta.plan
        out = torch.empty_like(q) if plan.num_tokens == q.shape[0] else torch.zeros_like(q)
        rows = _rows_of(kv_layer)
        for group in plan.decodes:
            _attend_decodes(q, rows, kv_layer.shape[2], group, scale, out)
        for chunk in plan.prefills:
            _attend_chunk(q, rows, kv_layer.shape[2], chunk, plan.causal, scale, out)
        return out


def _attend_decodes(q: Tensor, rows: Tensor, kv_heads: int, group: _DecodeGroup, scale: float, out: Tensor) -> None:
    n, head_dim, num_keys = group.num_tokens, q.shape[2], group.mask.shape[3]
    chosen = q[:n] if group.tokens is None else q.index_select(0, group.tokens)
    pages = rows.index_select(0, group.rows).to(q.dtype)
    # A mask alone does not keep out a NaN that a slot's former owner left: 0 * NaN is NaN.
    pages.view(-1, head_dim).index_fill_(0, group.stale, 0.0)
    keys, values = pages.view(2, n, kv_heads, -1, head_dim)[:, :, :, :num_keys]
    # The query heads that share a KV head stand where SDPA expects query positions: they see the same keys.
    queries = chosen.reshape(n, kv_heads, -1, head_dim)
    num_sharing = queries.shape[2]
    queries = F.pad(queries, (0, 0, 0, max(0, _DECODE_ROWS - num_sharing)))
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=scale)
    result = result[:, :, :num_sharing].reshape(n, -1, head_dim)
    if group.tokens is None:
        out[:n] = result
    else:
        out[group.tokens] = result


def _attend_chunk(q: Tensor, rows: Tensor, kv_heads: int, chunk: _PrefillChunk, causal: Tensor, scale: float, out: Tensor) -> None:
    pages = rows.index_select(0, chunk.rows).to(q.dtype).view(2, 1, kv_heads, -1, q.shape[2])
    pages[:, :, :, chunk.num_keys :] = 0
    token, end = chunk.first_token, chunk.first_token + chunk.num_queries
    position = chunk.num_keys - chunk.num_queries
    while token < end:
        tile_start = position // _TILE * _TILE
        tile_end = tile_start + _TILE
        num_keys = _key_extent(tile_end)
        count = min(end - token, tile_end - position)
        padding = -count % _QUERY_ROWS
        queries = F.pad(q[token : token + count].transpose(0, 1), (0, 0, 0, padding)).unsqueeze(0)
        first_row = position - tile_start
        first_column = causal.shape[1] - _KERNEL_KEYS - tile_end
        mask = causal[first_row : first_row + count + padding, first_column : first_column + num_keys]
        keys, values = pages[:, :, :, :num_keys]
        result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=queries.shape[1] != kv_heads)
        out[token : token + count] = result[0, :, :count].transpose(0, 1)
        token, position = token + count, position + count


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
    prefills = _prefill_chunks(meta, kv_layer)
    return _Plan(
        num_tokens=sum(meta.query_lens),
        decodes=[_decode_group(members, meta, kv_layer, dtype) for members in _similar_lengths(meta)],
        prefills=prefills,
        causal=_causal_mask(max((chunk.num_keys for chunk in prefills), default=0), dtype, kv_layer.device),
    )


def _similar_lengths(meta: AttentionMetadata) -> list[list[int]]:
    """Decodes that may see the same number of keys: of one extent up to _KERNEL_KEYS, of one power of two beyond."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(meta.context_lens[: meta.num_decodes]):
        extent = _key_extent(length)
        groups[extent if extent <= _KERNEL_KEYS else _KERNEL_KEYS << (extent // _KERNEL_KEYS - 1).bit_length()].append(i)
    return list(groups.values())


def _decode_group(members: list[int], meta: AttentionMetadata, kv_layer: Tensor, dtype: torch.dtype) -> _DecodeGroup:
    device, kv_heads, block_size = kv_layer.device, kv_layer.shape[2], kv_layer.shape[3]
    num_keys = _key_extent(max(meta.context_lens[i] for i in members))
    num_blocks = -(-num_keys // block_size)
    tokens = None if len(members) == meta.num_decodes else torch.tensor(members, device=device)
    tables, lengths = meta.block_tables[: meta.num_decodes], meta.seq_lens[: meta.num_decodes]
    if tokens is not None:
        tables, lengths = tables.index_select(0, tokens), lengths.index_select(0, tokens)
    used_blocks = (lengths + block_size - 1) // block_size
    blocks = _padded_table(tables, used_blocks, num_blocks)
    position = torch.arange(num_blocks * block_size, device=device)
    source = torch.where(position < used_blocks[:, None] * block_size, position, position % block_size)
    stale = _token_numbers((source >= lengths[:, None]).nonzero(), len(members), kv_heads, len(position))
    mask = torch.zeros(len(members), num_keys, dtype=dtype, device=device)
    mask.masked_fill_(position[:num_keys] >= lengths[:, None], float("-inf"))
    return _DecodeGroup(tokens, len(members), _row_numbers(blocks, kv_layer), mask[:, None, None, :], stale)


def _prefill_chunks(meta: AttentionMetadata, kv_layer: Tensor) -> list[_PrefillChunk]:
    chunks: list[_PrefillChunk] = []
    first_token, block_size = meta.num_decodes, kv_layer.shape[3]
    for i in range(meta.num_decodes, len(meta.query_lens)):
        num_queries, num_keys = meta.query_lens[i], meta.context_lens[i]
        num_blocks = -(-_key_extent(num_keys) // block_size)
        used_blocks = torch.tensor([-(-num_keys // block_size)], device=kv_layer.device)
        blocks = _padded_table(meta.block_tables[i : i + 1], used_blocks, num_blocks)
        chunks.append(_PrefillChunk(first_token, num_queries, num_keys, _row_numbers(blocks, kv_layer)))
        first_token += num_queries
    return chunks


def _padded_table(tables: Tensor, used_blocks: Tensor, num_blocks: int) -> Tensor:
    """tables [n, ?], used_blocks [n] -> [n, num_blocks]. Padding repeats a sequence's first block: its content is the sequence's own, so
    that little of what is gathered must be cleared."""
    number = torch.arange(num_blocks, device=tables.device)
    return tables.gather(1, torch.where(number < used_blocks[:, None], number, 0))


def _token_numbers(places: Tensor, n: int, kv_heads: int, width: int) -> Tensor:
    """places [m, 2] (sequence, position) -> flat numbers of these tokens in [2, n, kv_heads, width], for K and V and every head."""
    which = torch.arange(2, device=places.device).view(2, 1, 1)
    head = torch.arange(kv_heads, device=places.device).view(1, kv_heads, 1)
    return (((which * n + places[:, 0]) * kv_heads + head) * width + places[:, 1]).reshape(-1)


def _causal_mask(longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[_TILE + _QUERY_ROWS, ?]: zeros, then a triangle of _TILE columns, then _KERNEL_KEYS columns of -inf. The mask of the tile that ends
    at position ``e`` starts ``e`` columns left of the triangle's end."""
    if longest == 0:
        return torch.empty(0, 0, dtype=dtype, device=device)
    before = -(-longest // _TILE) * _TILE - _TILE
    width = _TILE + _KERNEL_KEYS
    mask = torch.zeros(_TILE + _QUERY_ROWS, before + width, dtype=dtype, device=device)
    row, column = torch.arange(_TILE + _QUERY_ROWS, device=device), torch.arange(width, device=device)
    mask[:, before:].masked_fill_((column > row[:, None]) | (column >= _TILE), float("-inf"))
    return mask


def _key_extent(num_keys: int) -> int:
    """How many keys a kernel is shown to see ``num_keys``."""
    step = _TILE if num_keys <= _KERNEL_KEYS else _KERNEL_KEYS
    return -(-num_keys // step) * step
