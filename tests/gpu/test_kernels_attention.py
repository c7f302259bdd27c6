"""Attention kernels against float64 over random lengths; every slot that holds no key of a sequence, and every output, is NaN before.

Where there is no GPU they run in Triton's interpreter, if TRITON_INTERPRET=1 is set (slow: minutes)."""

import os
import random

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
pytest.importorskip("triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 1e-5 if INTERPRETED else 6e-3

# block size, head dim, KV heads, group: every pair of values occurs
SHAPES = [
    (16, 64, 2, 1), (16, 128, 8, 4), (16, 128, 2, 7), (32, 64, 1, 8), (32, 128, 3, 2),
    (64, 64, 2, 4), (64, 64, 4, 2), (64, 128, 1, 8), (64, 128, 8, 4),
]  # fmt: skip
FP8 = torch.float8_e4m3fn
CASES = [(*shape, DTYPE) for shape in SHAPES] + [(*shape, FP8) for shape in (SHAPES[2:4] + SHAPES[-2:-1] if INTERPRETED else SHAPES)]


def relative_error(ours, reference):
    assert ours.isfinite().all()
    return ((ours.double() - reference).norm() / reference.norm()).item()


def make_cache(lengths, block_size, head_dim, kv_heads, order, seed, poison=float("nan"), dtype=DTYPE):
    """A cache of three layers full of NaN, and the middle layer's view, with random keys and values for each sequence, in float64 too."""
    rng = random.Random(seed)
    counts = [-(-n // block_size) for n in lengths]
    numbers = rng.sample(range(1, sum(counts) + 8), sum(counts))
    num_blocks = sum(counts) + 8
    outer = (num_blocks, 3) if order == "block_major" else (3, num_blocks)
    cache = torch.full((*outer, 2, kv_heads, block_size, head_dim), poison, dtype=dtype, device=DEVICE)
    layer = cache[:, 1] if order == "block_major" else cache[1]
    tables = torch.zeros(len(lengths), max(counts) + 2, dtype=torch.int32, device=DEVICE)
    contents = []
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        mine, numbers = numbers[:count], numbers[count:]
        tables[i, :count] = torch.tensor(mine, dtype=torch.int32)
        kv = torch.randn(2, kv_heads, n, head_dim, device=DEVICE).to(dtype)
        for j, block in enumerate(mine):
            piece = kv[:, :, j * block_size : (j + 1) * block_size]
            layer[block, :, :, : piece.shape[2]] = piece
        contents.append(kv.double())
    return layer, tables, contents


def reference(q, kv, scale):
    """q [n, heads, head_dim] are the last n of kv [2, kv_heads, m, head_dim]; float64."""
    n, m = q.shape[0], kv.shape[2]
    k, v = kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)
    scores = torch.einsum("nhd,hmd->hnm", q.double(), k) * scale
    hidden = torch.arange(m, device=q.device)[None] > torch.arange(m - n, m, device=q.device)[:, None]
    return torch.einsum("hnm,hmd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def poisoned(*shape):
    return torch.full(shape, float("nan"), dtype=DTYPE, device=DEVICE)


@pytest.mark.parametrize(  # each batch size has a configuration of its own
    ("batch", "order"), [(1, "block_major"), (17, "layer_major"), (49, "block_major"), (192, "layer_major")]
)
@pytest.mark.parametrize(("block_size", "head_dim", "kv_heads", "group", "dtype"), CASES)
def test_decode_attention_agrees_with_float64(block_size, head_dim, kv_heads, group, dtype, batch, order):
    from ksana_lab.attention.triton_decode import config_for, decode_attention, plan_decode

    rng = random.Random(f"{block_size} {head_dim} {kv_heads} {group} {order} {batch}")
    longest = 300 if INTERPRETED else 5000
    lengths = [1, block_size, block_size + 1, longest] + [rng.randrange(1, 400) for _ in range(2 if INTERPRETED else 29)]
    layer, tables, contents = make_cache(lengths, block_size, head_dim, kv_heads, order, rng.random(), dtype=dtype)
    wide = torch.randn(len(lengths), (kv_heads * group + 3) * head_dim, device=DEVICE).to(DTYPE)  # queries are a view of a wider tensor
    q = wide[:, : kv_heads * group * head_dim].view(len(lengths), kv_heads * group, head_dim)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    config = config_for(batch)
    plan = plan_decode(seq_lens, q.shape[1], kv_heads, head_dim, num_sms=4 if INTERPRETED else 132, config=config)
    plan.partial_out.fill_(float("nan"))
    out = poisoned(*q.shape)
    for _ in range(2):  # twice with one plan, as two layers do: the counters come back to zero
        decode_attention(q, layer, tables, plan, head_dim**-0.5, out)
        expected = torch.cat([reference(q[i : i + 1], kv, head_dim**-0.5) for i, kv in enumerate(contents)])
        assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize("lengths", [[100_000, 0, 0, 0], [0] * 40, [1] * 300, [16_000] + [300] * 31, [70_000, 5], [0, 64, 65, 0]])
def test_decode_plan_covers_every_key_once_and_fits(lengths):
    from ksana_lab.attention.triton_decode import DecodeConfig, plan_decode

    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for config in (DecodeConfig(), DecodeConfig(tile=32, programs_per_sm=2)):
        items = plan_decode(seq_lens, 8, 8, 64, 132, config).items.tolist()
        used = [item for item in items if item[0] >= 0]
        assert items[: len(used)] == used and len(used) <= len(items)
        for seq, length in enumerate(lengths):
            mine = [(i, item) for i, item in enumerate(used) if item[0] == seq]
            assert all(item[3] == mine[0][0] and item[4] == len(mine) for _, item in mine)
            edges = [item[1] for _, item in mine] + [length]
            assert edges[0] == 0 and [item[2] for _, item in mine] == edges[1:] and edges == sorted(edges)
        assert max(used, key=lambda item: item[0])[0] == len(lengths) - 1


def test_decode_attention_of_padding_is_zero_and_leaves_others_alone():
    from ksana_lab.attention.triton_decode import decode_attention, plan_decode

    layer, tables, contents = make_cache([70], 16, 64, 2, "block_major", 0)
    tables = torch.cat([tables, torch.zeros(2, tables.shape[1], dtype=torch.int32, device=DEVICE)])
    q = torch.randn(3, 4, 64, device=DEVICE).to(DTYPE)
    plan = plan_decode(torch.tensor([70, 0, 0], dtype=torch.int32, device=DEVICE), 4, 2, 64, 8)
    out = decode_attention(q, layer, tables, plan, 0.125, poisoned(3, 4, 64))
    assert relative_error(out[:1], reference(q[:1], contents[0], 0.125)) < TOLERANCE
    assert not out[1:].any()


@pytest.mark.parametrize("order", ["block_major", "layer_major"])
@pytest.mark.parametrize(("block_size", "head_dim", "kv_heads", "group", "dtype"), CASES)
def test_paged_prefill_agrees_with_float64(block_size, head_dim, kv_heads, group, dtype, order):
    from ksana_lab.attention.triton_prefill import prefill_attention

    rng = random.Random(f"{block_size} {head_dim} {kv_heads} {group} {order} prefill")
    count = 3 if INTERPRETED else 9
    new = [1] + [rng.randrange(1, 90 if INTERPRETED else 700) for _ in range(count)]
    lengths = [n + rng.choice([0, block_size, rng.randrange(200)]) for n in new]
    layer, tables, contents = make_cache(lengths, block_size, head_dim, kv_heads, order, rng.random(), dtype=dtype)
    decodes = 2  # tokens of other sequences stand before
    starts = torch.tensor([decodes + sum(new[:i]) for i in range(len(new) + 1)], dtype=torch.int32, device=DEVICE)
    q = torch.randn(decodes + sum(new), kv_heads * group, head_dim, device=DEVICE).to(DTYPE)
    out = poisoned(*q.shape)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    prefill_attention(q, layer, tables, starts, seq_lens, sum(new), head_dim**-0.5, out)
    assert out[:decodes].isnan().all()
    expected = torch.cat([reference(q[starts[i] : starts[i + 1]], kv, head_dim**-0.5) for i, kv in enumerate(contents)])
    assert relative_error(out[decodes:], expected) < TOLERANCE


def test_paged_prefill_takes_more_sequences_than_most_steps_have():
    from ksana_lab.attention.triton_prefill import FEW_SEQS, prefill_attention

    new = [1 + i % 3 for i in range(FEW_SEQS + 6)]
    layer, tables, contents = make_cache(new, 16, 64, 1, "block_major", 5)
    starts = torch.tensor([sum(new[:i]) for i in range(len(new) + 1)], dtype=torch.int32, device=DEVICE)
    q = torch.randn(sum(new), 2, 64, device=DEVICE).to(DTYPE)
    out = poisoned(*q.shape)
    prefill_attention(q, layer, tables, starts, torch.tensor(new, dtype=torch.int32, device=DEVICE), sum(new), 0.125, out)
    expected = torch.cat([reference(q[starts[i] : starts[i + 1]], kv, 0.125) for i, kv in enumerate(contents)])
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
def test_where_a_step_s_sequences_begin_costs_no_compilation():
    """Parts of a step read its tables from anywhere; a compilation takes most of a second, which every request under way would wait for."""
    from ksana_lab.attention.triton_prefill import _prefill_kernel, prefill_attention

    layer, tables, _ = make_cache([50] * 9, 16, 128, 2, "block_major", 6)
    starts = torch.arange(0, 500, 50, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((9,), 50, dtype=torch.int32, device=DEVICE)
    q = torch.randn(450, 8, 128, device=DEVICE).to(DTYPE)
    compiled = set()
    for first in (0, 1, 2, 3, 4):
        prefill_attention(q, layer, tables[first:], starts[first:], lengths[first:], 50 * (9 - first), 0.1, torch.empty_like(q))
        compiled.add(len(_prefill_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(compiled) == 1


def test_merge_of_two_key_sets_is_attention_over_both():
    from ksana_lab.attention.triton_prefill import merge_attention

    def part(keys, values):
        scores = torch.einsum("nhd,mhd->hnm", q.double(), keys.double())
        return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values.double()).contiguous(), scores.logsumexp(-1)

    q, k, v = (torch.randn(n, 4, 64, device=DEVICE).to(DTYPE) * 0.3 for n in (33, 50, 50))
    (a, lse_a), (b, lse_b) = part(k[:20], v[:20]), part(k[20:], v[20:])
    out = merge_attention(a.to(DTYPE), lse_a.float(), b.to(DTYPE), lse_b.float(), poisoned(33, 4, 64))
    assert relative_error(out, part(k, v)[0]) < TOLERANCE


@pytest.mark.parametrize(("block_size", "head_dim", "kv_heads", "group"), SHAPES[:4])
def test_stored_keys_and_values_are_gathered_back(block_size, head_dim, kv_heads, group):
    from ksana_lab.attention.store_kv import store_kv
    from ksana_lab.attention.triton_prefill import gather_kv

    layer, tables, _ = make_cache([77], block_size, head_dim, kv_heads, "block_major", 1)
    before = layer.clone()
    k, v = torch.randn(2, 78, kv_heads, head_dim, device=DEVICE).to(DTYPE)
    position = torch.arange(77, device=DEVICE)
    slots = tables[0].long()[position // block_size] * block_size + position % block_size
    store_kv(k, v, layer, torch.cat([slots, torch.tensor([-1], device=DEVICE)]))
    got_k, got_v = gather_kv(layer, tables[0], 77, DTYPE)
    assert torch.equal(got_k, k[:77]) and torch.equal(got_v, v[:77])
    before[slots // block_size, 0, :, slots % block_size] = k[:77]
    before[slots // block_size, 1, :, slots % block_size] = v[:77]
    assert torch.equal(layer.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(("block_size", "head_dim", "kv_heads", "group"), SHAPES[:4])
def test_what_is_too_large_for_an_fp8_cache_is_saturated(block_size, head_dim, kv_heads, group):
    from ksana_lab.attention.store_kv import store_kv
    from ksana_lab.attention.triton_prefill import gather_kv

    layer, tables, _ = make_cache([77], block_size, head_dim, kv_heads, "block_major", 1, dtype=FP8)
    kv = torch.randn(2, 77, kv_heads, head_dim, device=DEVICE).to(FP8).to(DTYPE)  # Triton 3.6 interprets roundings wrongly
    kv[:, ::5, :, ::3] *= 8192
    position = torch.arange(77, device=DEVICE)
    store_kv(kv[0], kv[1], layer, tables[0].long()[position // block_size] * block_size + position % block_size)
    for got, stored in zip(gather_kv(layer, tables[0], 77, DTYPE), kv, strict=True):
        assert torch.equal(got, stored.clamp(-448, 448)) and stored.abs().max() > 448


@pytest.mark.skipif(INTERPRETED, reason="cuDNN runs on a GPU only")
@pytest.mark.parametrize("stored_by_other", [False, True])
def test_backend_of_a_mixed_step_agrees_with_float64(stored_by_other):
    from ksana_lab.attention.base import AttentionMetadata
    from ksana_lab.attention.triton import TritonBackend

    lengths, new = [300, 41, 700, 513, 90, 1000], [1, 1, 700, 100, 90, 1000]
    layer, tables, contents = make_cache(lengths, 32, 128, 2, "block_major", 3)
    starts = [sum(new[:i]) for i in range(len(new) + 1)]
    meta = AttentionMetadata(
        2,
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        tables,
        torch.empty(0),
        new,
        lengths,
        1000,
        1000,
    )
    q = torch.randn(sum(new), 8, 128, device=DEVICE).to(DTYPE)
    backend = TritonBackend()
    if not stored_by_other:
        k, v = torch.cat([kv[:, :, kv.shape[2] - n :].transpose(1, 2) for kv, n in zip(contents, new, strict=True)], 1).to(DTYPE)
        backend.remember(k, v, layer)
    out = backend.attend(q, layer, meta, 128**-0.5)
    expected = torch.cat([reference(q[starts[i] : starts[i + 1]], kv, 128**-0.5) for i, kv in enumerate(contents)])
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize(("block_size", "head_dim", "kv_heads", "group", "dtype"), CASES[:4] + CASES[-2:])
def test_a_middle_of_a_sequence_is_gathered_and_padded_with_zeros(block_size, head_dim, kv_heads, group, dtype):
    from ksana_lab.attention.triton_prefill import gather_kv

    layer, tables, contents = make_cache([150], block_size, head_dim, kv_heads, "block_major", 1, dtype=dtype)
    for first, count in [(0, 150), (37, 100), (64, 86), (149, 1)]:
        for got, kv in zip(gather_kv(layer, tables[0], count, DTYPE, first, 160), contents[0], strict=True):
            assert torch.equal(got[:count].double(), kv[:, first : first + count].transpose(0, 1))
            assert got.shape[0] == 160 and not got[count:].any()


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (7, 128), (32, 128), (3, 64)])
def test_merging_in_place_one_after_the_other_is_attention_over_all_parts(heads, head_dim):
    from ksana_lab.attention.triton_prefill import merge_attention

    num_tokens = 33 if INTERPRETED else 3000
    q, k, v = (torch.randn(n, heads, head_dim, device=DEVICE).to(DTYPE) * 0.3 for n in (num_tokens, 80, 80))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k.double())

    def part(begin, end, before):
        """As a slice of what came with ``before`` rows of padding in front."""
        own = scores[:, :, begin:end]
        x = torch.einsum("hnm,mhd->nhd", own.softmax(-1), v[begin:end].double())
        wide, lse = poisoned(num_tokens + 9, heads, head_dim), torch.full((heads, num_tokens + 9), float("nan"), device=DEVICE)
        wide[before : before + num_tokens], lse[:, before : before + num_tokens] = x.to(DTYPE), own.logsumexp(-1).float()
        return wide[before : before + num_tokens], lse[:, before : before + num_tokens]

    out, lse = part(0, 10, 5)
    for begin, end, before in [(10, 11, 0), (11, 50, 9), (50, 80, 2)]:
        merge_attention(out, lse, *part(begin, end, before), out, lse)
    assert relative_error(out, torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v.double())) < 1.5 * TOLERANCE
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-5 if INTERPRETED else 2e-2)


def plain_dense(q, k, v, scale, is_causal):
    """What cuDNN does, where there is none."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * scale
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).to(q.dtype).contiguous(), scores.logsumexp(-1).float()


def meta_of(lengths, new, num_decodes, tables):
    from ksana_lab.attention.base import AttentionMetadata

    starts = [sum(new[:i]) for i in range(len(new) + 1)]
    starts_there, lengths_there = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, lengths))
    return AttentionMetadata(num_decodes, starts_there, lengths_there, tables, torch.empty(0), new, lengths, max(new), max(lengths))


# new tokens, all tokens: a decode, a chunk for pages, two in parts, the second with a rest, one for pages again
CHUNKS = [(1, 300), (100, 513), (2048, 4096 + 2048), (3000, 3000 + 5100), (90, 90)]


@pytest.mark.parametrize("dtype", [DTYPE, FP8])
def test_backend_of_a_step_with_chunks_after_context_agrees_with_float64(monkeypatch, dtype):
    from ksana_lab.attention import after_context, triton
    from ksana_lab.attention.triton_decode import plan_decode

    scale, lengths_scale = 128**-0.5, 64 if INTERPRETED else 1
    if INTERPRETED:  # there is no cuDNN, and everything is a 64th as long
        for name in ("MIN_NEW", "MIN_CONTEXT", "_STEP", "_SQUARE_STEP", "_TIMED_CONTEXT"):
            monkeypatch.setattr(after_context, name, getattr(after_context, name) // 64)
        monkeypatch.setattr(after_context, "PIECES", tuple(piece // 64 for piece in after_context.PIECES))
    new, lengths = ([max(1, n // lengths_scale) for n in column] for column in zip(*CHUNKS, strict=True))
    backend, max_new, longest = triton.TritonBackend(), 3072 // lengths_scale, 10240 // lengths_scale
    if INTERPRETED:
        kernels = after_context.Kernels(plain_dense, triton.KERNELS.gather, triton.KERNELS.merge, triton.KERNELS.paged, lambda run: 1.0)
        backend._after_context = after_context.AfterContext(kernels, max_new, longest)
        backend._after_context.prove(after_context.Shape(8, 2, 128, 32, DTYPE, dtype), torch.device(DEVICE))
        backend._after_context._chosen = frozenset(backend._after_context._lengths())  # whatever is faster here
    else:
        backend.warm_up(8, 2, 128, max_new, DTYPE, torch.device(DEVICE), max_seq_len=longest, block_size=32, cache_dtype=dtype)
        ours = backend._after_context
        ours._chosen = frozenset(ours._lengths())  # few heads of a small model: right is asked for here, not fast
    layer, tables, contents = make_cache(lengths, 32, 128, 2, "block_major", 3, dtype=dtype)
    meta = meta_of(lengths, new, 1, tables)
    if INTERPRETED:
        meta.plan = plan_decode(meta.seq_lens[:1], 8, 2, 128, num_sms=4)
    assert [backend._kernel_for(meta, i, DTYPE) for i in range(1, 5)] == ["pages", "after context", "after context", "pages"]
    q = torch.randn(sum(new), 8, 128, device=DEVICE).to(DTYPE)
    out = backend.attend(q, layer, meta, scale)
    for i, kv in enumerate(contents):
        mine = slice(sum(new[:i]), sum(new[: i + 1]))
        assert relative_error(out[mine], reference(q[mine], kv, scale)) < 1.5 * TOLERANCE


@pytest.mark.skipif(INTERPRETED, reason="cuDNN runs on a GPU only")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "cache_dtype"), [(32, 8, 128, DTYPE), (16, 8, 128, FP8), (14, 2, 64, DTYPE)])
def test_cudnn_proves_right_for_every_length_and_is_faster_for_long_chunks(heads, kv_heads, head_dim, cache_dtype, caplog):
    from ksana_lab.attention.triton import TritonBackend

    backend = TritonBackend()
    with caplog.at_level("INFO"):
        backend.warm_up(
            heads, kv_heads, head_dim, 8192, DTYPE, torch.device(DEVICE), max_seq_len=32768, block_size=64, cache_dtype=cache_dtype
        )
    print(caplog.text)
    assert "in parts by cuDNN" in caplog.text and "WRONG" not in caplog.text
    if (heads, head_dim) == (32, 128):  # the shape that was measured: 636 against 498 TFLOP/s
        assert backend._after_context.takes(8192, 16384) and backend.peak_chunk()[0] == 8192


@pytest.mark.skipif(INTERPRETED, reason="cuDNN runs on a GPU only")
def test_no_length_is_planned_while_serving():
    """A plan takes 40 ms of the host; a call whose lengths are planned takes well below one."""
    import time

    from ksana_lab.attention.triton import TritonBackend

    backend = TritonBackend()
    backend.warm_up(32, 8, 128, 4096, DTYPE, torch.device(DEVICE), max_seq_len=20_000, block_size=64, cache_dtype=DTYPE)
    ours = backend._after_context
    ours._chosen = frozenset(ours._lengths())
    layer, tables, _ = make_cache([20_000], 64, 128, 8, "block_major", 3)
    slowest = 0.0
    for n, context in [(4096, 8192), (4090, 4100), (3000, 9000), (2048, 17_000), (4096, 4096 + 64), (3584, 14_336)]:
        assert ours.takes(n, n + context)
        q = torch.randn(n, 32, 128, device=DEVICE).to(DTYPE)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        ours.attend(q, layer, tables[0], n + context, 128**-0.5, torch.empty_like(q))
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 0.02
