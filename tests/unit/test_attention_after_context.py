"""A chunk after context, cut into parts and merged, against float64 over all keys at once. Dense attention, gathering and merging are
torch's here; results of padding, and every slot without a key of the sequence, are NaN."""

from __future__ import annotations

import logging
import math
import random
import weakref
from dataclasses import replace

import pytest
import torch

from ksana_lab.attention import after_context
from ksana_lab.attention.after_context import AfterContext, Cut, Kernels, Shape, cut

CPU = torch.device("cpu")


def dense(q, k, v, scale, is_causal):
    """As cuDNN: causality of a square, rows and log-sum-exp in the order of q. Rows of zeros are padding: NaN."""
    assert not is_causal or len(q) == len(k)
    assert q.isfinite().all() and k.isfinite().all() and v.isfinite().all()
    assert is_causal or k.flatten(1).any(1).all(), "padding among keys that every query sees"
    k, v = (x.to(torch.promote_types(q.dtype, torch.float32)).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.to(k.dtype), k) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), -torch.inf)
    out, lse = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).contiguous(), scores.logsumexp(-1)
    is_padding = ~q.flatten(1).any(1)
    out[is_padding], lse[:, is_padding] = torch.nan, torch.nan
    return out.to(q.dtype), lse


def gather(kv_layer, block_table, first, num_tokens, padded, dtype):
    token = torch.arange(first, first + num_tokens)
    block_size = kv_layer.shape[3]
    kv = kv_layer.to(dtype)[block_table.long()[token // block_size], :, :, token % block_size]  # [tokens, 2, kv_heads, head_dim]
    padding = kv.new_zeros(padded - num_tokens, *kv.shape[1:])
    return torch.cat((kv, padding)).unbind(1)


def merge(a, lse_a, b, lse_b, out, lse_out):
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [(part - lse).exp().transpose(0, 1)[:, :, None] for part in (lse_a, lse_b)]
    out.copy_(a * weights[0] + b * weights[1])
    lse_out.copy_(lse)


def paged(q, kv_layer, block_table, num_keys, scale):
    """All keys at once, in float64."""
    k, v = gather(kv_layer, block_table, 0, num_keys, num_keys, torch.float64)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * scale
    is_hidden = torch.ones(len(q), num_keys, dtype=torch.bool).triu(num_keys - len(q) + 1)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(is_hidden, -torch.inf).softmax(-1), v).to(q.dtype)


class Clock:
    """What is timed first is ours."""

    def __init__(self, apart=1.0, by_pages=2.0):
        self.answers = (apart, by_pages)

    def __call__(self, run):
        run()
        first, second = self.answers
        self.answers = second, first
        return first


KERNELS = Kernels(dense, gather, merge, paged, Clock())
SHAPE = Shape(4, 2, 8, 16, torch.float64, torch.float64)


@pytest.fixture
def small(monkeypatch):
    """All lengths a 64th of what they are."""
    for name in ("MIN_NEW", "MIN_CONTEXT", "_STEP", "_SQUARE_STEP", "_TIMED_CONTEXT"):
        monkeypatch.setattr(after_context, name, getattr(after_context, name) // 64)
    monkeypatch.setattr(after_context, "PIECES", tuple(piece // 64 for piece in after_context.PIECES))


def proven(kernels=KERNELS, shape=SHAPE, max_new=100, max_seq_len=700):
    ours = AfterContext(kernels, max_new, max_seq_len)
    ours.prove(shape, CPU)
    return ours


def random_cache(num_keys, kv_heads, block_size, dtype=torch.float64):
    num_blocks = -(-num_keys // block_size)
    table = torch.tensor(random.Random(num_keys).sample(range(num_blocks + 3), num_blocks), dtype=torch.int32)
    layer = torch.full((num_blocks + 3, 2, kv_heads, block_size, 8), torch.nan, dtype=torch.float64)
    for i, block in enumerate(table.tolist()):
        count = min(block_size, num_keys - i * block_size)
        layer[block, :, :, :count] = torch.randn(2, kv_heads, count, 8, dtype=torch.float64)
    return layer.to(dtype), table


@pytest.mark.parametrize("seed", range(12))
def test_parts_are_attention_over_all_keys(small, seed, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size: torch.full(size, torch.nan, dtype=x.dtype))
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads, group, block_size = rng.choice([1, 2, 3]), rng.choice([1, 4, 7]), rng.choice([5, 16, 32, 64])
    for n, context in [(rng.randint(2, 90), rng.randint(32, 1300)), (32 + seed % 2, 64 + seed), (64, 128)]:
        layer, table = random_cache(n + context, kv_heads, block_size)
        wide = torch.randn(n, kv_heads * group + 2, 8, dtype=torch.float64)  # queries are a view of a wider tensor
        q, out = wide[:, : kv_heads * group], torch.full((n + 2, kv_heads * group, 8), torch.nan, dtype=torch.float64)
        AfterContext(KERNELS, 100, 2000).attend(q, layer, table, n + context, 0.3, out[1:-1])
        torch.testing.assert_close(out[1:-1], paged(q, layer, table, n + context, 0.3), rtol=1e-10, atol=1e-12)
        assert out[[0, -1]].isnan().all()


def test_parts_of_real_lengths():
    layer, table = random_cache(2100 + 6200, 1, 64)
    q = torch.randn(2100, 1, 8, dtype=torch.float64)
    out = torch.full_like(q, torch.nan)
    AfterContext(KERNELS, 2100, 16384).attend(q, layer, table, 8300, 0.3, out)
    torch.testing.assert_close(out, paged(q, layer, table, 8300, 0.3), rtol=1e-10, atol=1e-12)


def test_a_cache_of_8_bits_is_read_as_it_was_rounded(small):
    layer, table = random_cache(300, 2, 16, torch.float8_e4m3fn)
    q = torch.randn(50, 4, 8, dtype=torch.float64)
    out = torch.full_like(q, torch.nan)
    AfterContext(KERNELS, 100, 700).attend(q, layer, table, 300, 0.3, out)
    torch.testing.assert_close(out, paged(q, layer, table, 300, 0.3), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("num_new", "context", "expected"),
    [
        (8192, 8192, Cut((8192,), 0, 8192, 8192)),
        (8190, 8190, Cut((4096, 2048), 2046, 8192, 10240)),  # two decodes in every step
        (2049, 4096 + 64, Cut((4096,), 64, 2560, 2560)),
        (4097, 100_000, Cut((32768, 32768, 32768), 1696, 5120, 6144)),
    ],
)
def test_lengths_are_cut_into_few(num_new, context, expected):
    assert cut(num_new, context, 8192) == expected


@pytest.mark.parametrize("max_new", [32, 65, 94, 100, 128])
def test_no_length_is_met_that_was_not_planned(small, max_new):
    met = set()

    def noting(q, k, v, scale, is_causal):
        met.add((len(q), len(k), is_causal))
        return dense(q, k, v, scale, is_causal)

    ours = proven(replace(KERNELS, dense=noting), max_new=max_new)
    planned, num_taken = frozenset(met), 0
    met.clear()
    for n in {32, 63, 64, 65, max_new - 1, max_new}:
        for context in (*range(64, 96), *range(100, 700, 31)):
            if ours.takes(n, n + context):
                layer, table = torch.ones(1, 2, 1, 16, 8, dtype=torch.float64), torch.zeros(60, dtype=torch.int32)
                q = torch.randn(n, 1, 8, dtype=torch.float64)
                ours.attend(q, layer, table, n + context, 1.0, torch.empty_like(q))
                num_taken += 1
    assert met <= planned and num_taken > 30


def test_chunks_that_are_short_or_mostly_padding_are_not_taken(small):
    ours = proven()
    assert ours.takes(64, 64 + 128) and ours.takes(32, 32 + 64) and ours.takes(100, 100 + 668)
    assert not ours.takes(31, 31 + 128) and not ours.takes(64, 64 + 63) and not ours.takes(64, 64)
    assert not ours.takes(101, 101 + 128), "longer than what was planned"
    assert not ours.takes(64, 64 + 700), "longer context than any sequence has"
    assert not ours.takes(65, 65 + 512), "80 rows for 65"


def test_what_was_gathered_is_let_go_before_the_next_is(small):
    alive = []

    def noting(*args):
        assert not any(there() is not None for there in alive)
        k, v = gather(*args)
        alive.extend((weakref.ref(k), weakref.ref(v)))
        return k, v

    layer, table = random_cache(50 + 1300, 1, 16)
    q = torch.randn(50, 2, 8, dtype=torch.float64)
    AfterContext(replace(KERNELS, gather=noting), 100, 2000).attend(q, layer, table, 1350, 1.0, torch.empty_like(q))
    assert len(alive) == 2 * (1 + 3)  # rest and chunk; 2 x 512 and 256 of context


def test_nothing_is_taken_before_it_is_proven(small):
    assert not AfterContext(KERNELS, 100, 700).takes(64, 192) and AfterContext(KERNELS, 100, 700).peak() is None


def log2_dense(*args):
    out, lse = dense(*args)
    return out, lse / math.log(2)


def upside_down(q, k, v, scale, is_causal):
    out, lse = dense(q, k, v, scale, is_causal)
    return out, lse.flip(1) if is_causal else lse


def wrong_for_one_length(q, k, v, scale, is_causal):
    out, lse = dense(q, k, v, scale, is_causal)
    return (out * 1.03 if len(q) == 112 and is_causal else out), lse


def broken(*args):
    raise RuntimeError("no plan")


@pytest.mark.parametrize("wrong", [log2_dense, upside_down, wrong_for_one_length, broken])
def test_parts_that_are_wrong_leave_the_chunks_to_pages(small, wrong, caplog):
    with caplog.at_level(logging.INFO):
        ours = proven(replace(KERNELS, dense=wrong))
    assert not any(ours.takes(n, n + context) for n in range(1, 101) for context in (64, 128, 256, 600))
    assert len(caplog.records) == 1 and "by pages" in caplog.text


def test_parts_that_are_slow_leave_the_chunks_to_pages(small, caplog):
    with caplog.at_level(logging.INFO):
        ours = proven(replace(KERNELS, time_us=Clock(1.0, 1.05)))
    assert not ours.takes(64, 192) and len(caplog.records) == 1 and "64 → pages (1 µs, by pages 1)" in caplog.text


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_roundings_of_bfloat16_are_no_error(small, cache_dtype, caplog):
    with caplog.at_level(logging.INFO):
        ours = proven(shape=Shape(4, 2, 64, 16, torch.bfloat16, cache_dtype), max_new=70)
    assert ours.takes(64, 192), caplog.text


def test_sequences_too_short_to_have_such_chunks_cost_nothing(small, caplog):
    unusable = Kernels(broken, broken, broken, broken, broken)
    with caplog.at_level(logging.INFO):
        for max_new, max_seq_len in [(31, 700), (64, 95)]:
            assert proven(unusable, max_new=max_new, max_seq_len=max_seq_len).peak() is None
    assert not caplog.records


def test_the_largest_chunk_is_one_that_is_taken(small):
    for max_new in (32, 65, 100):  # 65 itself is never taken: too much padding
        num_new, context = proven(max_new=max_new).peak()
        assert num_new == {32: 32, 65: 64, 100: 100}[max_new] and context >= 512
