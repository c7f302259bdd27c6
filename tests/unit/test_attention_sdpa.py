"""Paged reference attention against a dense float64 one, over random shapes; and the same bits for a token whatever surrounds it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from helpers_model import PagedSequence, blas_sums_rows_alike, make_metadata, new_cache

from ksana_lab.attention.base import load_backend
from ksana_lab.core.kv_layout import KVLayout

BACKEND = load_backend("sdpa")


class Pages:
    """A poisoned one-layer-of-two cache and the dense keys and values of every sequence in it."""

    def __init__(
        self, block_size: int, kv_heads: int, head_dim: int, order: str = "block_major", num_blocks: int = 256, dtype: str = "float32"
    ) -> None:
        layout = KVLayout(num_blocks, 2, kv_heads, block_size, head_dim, dtype, order)  # type: ignore[arg-type]
        self.layer = new_cache(layout)[1]
        self.shape, self.block_size = (kv_heads, head_dim), block_size
        self.free = random.Random(1).sample(range(num_blocks), num_blocks)

    def add(self, length: int, kv: torch.Tensor | None = None) -> tuple[PagedSequence, torch.Tensor]:
        """A sequence whose ``length`` keys and values are stored; ``kv`` [2, length, kv_heads, head_dim], random if not given."""
        seq = PagedSequence([self.free.pop() for _ in range(-(-length // self.block_size))])
        kv = torch.randn(2, length, *self.shape) if kv is None else kv
        BACKEND.store(*kv, self.layer, make_metadata([(seq, length)], self.block_size).slot_mapping)
        return seq, kv

    def attend(self, chunks: list[tuple[PagedSequence, int, int]], q: torch.Tensor, num_padding: int = 0) -> torch.Tensor:
        """``chunks``: (sequence, queries, keys)."""
        placed = [(PagedSequence(seq.block_table, keys - queries), queries) for seq, queries, keys in chunks]
        return BACKEND.attend(q, self.layer, make_metadata(placed, self.block_size, num_padding=num_padding), self.shape[1] ** -0.5)


def dense(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """q [T, heads, head_dim], the last T positions of kv [2, L, kv_heads, head_dim]; float64."""
    keys, values = kv.double().repeat_interleave(q.shape[1] // kv.shape[2], dim=2).transpose(1, 2)
    is_visible = torch.ones(q.shape[0], kv.shape[1], dtype=torch.bool).tril(kv.shape[1] - q.shape[0])
    return F.scaled_dot_product_attention(q.double().transpose(0, 1), keys, values, attn_mask=is_visible).transpose(0, 1)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_match_dense_attention(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size, ratio = rng.choice([5, 16, 32, 64]), rng.choice([1, 2, 3, 8])
    pages = Pages(block_size, kv_heads=rng.choice([1, 2]), head_dim=rng.choice([16, 64]), order=rng.choice(["block_major", "layer_major"]))
    counts = sorted(rng.choice([1, 1, rng.randint(2, 150)]) for _ in range(6))
    sequences = [(*pages.add(count + rng.choice([0, 7, 130, 300])), count) for count in counts]
    q = torch.randn(sum(counts) + 2, ratio * pages.shape[0], pages.shape[1])
    out = pages.attend([(seq, count, kv.shape[1]) for seq, kv, count in sequences], q, num_padding=2)
    start = 0
    for _, kv, count in sequences:
        torch.testing.assert_close(out[start : start + count].double(), dense(q[start : start + count], kv), rtol=1e-4, atol=1e-5)
        start += count
    assert torch.equal(out[start:], torch.zeros_like(out[start:]))


def test_a_cache_of_8_bits_is_attention_over_rounded_and_saturated_keys_and_values():
    pages = Pages(16, kv_heads=2, head_dim=32, dtype="float8_e4m3fn")
    kv = torch.randn(2, 300, 2, 32)
    kv[1, ::50, :, ::7] *= 2000
    kv[0, 7, 0, 3] = 500
    seq, _ = pages.add(300, kv)
    rounded = kv.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert not rounded.float().isnan().any() and rounded.float().abs().max() == 448
    q = torch.randn(300, 4, 32)
    torch.testing.assert_close(pages.attend([(seq, 300, 300)], q).double(), dense(q, rounded), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pages.attend([(seq, 1, 300)], q[-1:]).double(), dense(q[-1:], rounded), rtol=1e-3, atol=1e-3)


def test_slot_minus_one_is_not_stored():
    layer = new_cache(KVLayout(2, 1, 1, 4, 2, "float32"), fill=0.0)[0]
    BACKEND.store(torch.ones(3, 1, 2), torch.full((3, 1, 2), 2.0), layer, torch.tensor([5, -1, 0]))
    assert layer[:, 0, 0, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert layer[:, 1, 0, :, 0].tolist() == [[2, 0, 0, 0], [0, 2, 0, 0]]


needs_steady_blas = pytest.mark.skipif(not blas_sums_rows_alike(), reason="this CPU's BLAS sums in an order that depends on the batch")


@needs_steady_blas
@pytest.mark.parametrize("chunk", [1, 3, 33, 100, 128, 200])
def test_chunking_does_not_change_a_bit(chunk):
    pages = Pages(16, kv_heads=2, head_dim=32)
    seq, _ = pages.add(700)
    q = torch.randn(700, 4, 32)
    whole = pages.attend([(seq, 700, 700)], q)
    pieces = [pages.attend([(seq, min(chunk, 700 - i), min(i + chunk, 700))], q[i : i + chunk]) for i in range(0, 700, chunk)]
    assert torch.equal(torch.cat(pieces), whole)


@needs_steady_blas
def test_company_does_not_change_a_bit():
    pages = Pages(16, kv_heads=2, head_dim=16, num_blocks=600)
    lengths = [1, 20, 128, 129, 255, 256, 257, 500, 640, 700, 1000, 1300]
    sequences = [pages.add(length)[0] for length in lengths]
    q = torch.randn(len(lengths), 4, 16)
    together = pages.attend([(seq, 1, length) for seq, length in zip(sequences, lengths, strict=True)], q)
    alone = [pages.attend([(seq, 1, n)], q[i : i + 1]) for i, (seq, n) in enumerate(zip(sequences, lengths, strict=True))]
    assert torch.equal(together, torch.cat(alone))
