"""KV in eight bits: what is lost, what it takes, and that no unit touches another's bytes."""

import numpy as np
import pytest
import torch

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import LayoutMismatch, TransferError
from ksana_lab.protocol.transfer import Packed, Shape
from ksana_lab.transfer import packing, plan
from ksana_lab.transfer.registry import make_backends


def layout_of(dtype="bfloat16", heads=2, order="block_major"):
    return KVLayout(12, 3, heads, 4, 16, dtype, order)


def random_cache(layout, seed=0):
    numbers = torch.randn(layout.total_bytes // layout.itemsize, generator=torch.Generator().manual_seed(seed))
    return numbers.to(getattr(torch, layout.dtype)).view(torch.uint8)


def carry(src, dst, slices, here, there, start, end, layers, caches):
    """Pack, copy, expand; returns bytes on the wire."""
    packer, total = packing.Packer(caches[0]), 0
    for batch in packing.batches(src, plan.cells(src, dst, slices, here, there, start, end, layers)):
        stage, _ = packer.pack(batch, 0)
        for a, b, n in batch.copies.tolist():
            caches[1][b : b + n] = stage[a : a + n]
        form, targets = packing.read(dst, batch.describe(0))
        for part in packing.steps(form, targets):
            packing.Unpacker(caches[1]).expand(form, part)
        total += batch.wire_bytes
    return total


def numbers(cache, layout):
    """[num_blocks, layers, 2, heads, block_size, head_dim] float32."""
    shaped = cache.view(getattr(torch, layout.dtype)).view(layout.shape)
    return (shaped if layout.order == "block_major" else shaped.transpose(0, 1)).float()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("order", ["block_major", "layer_major"])
@pytest.mark.parametrize(("start", "end"), [(0, 12), (3, 11), (5, 7), (6, 7), (4, 9)])
def test_exactly_the_tokens_asked_for_arrive_within_eight_bits(dtype, order, start, end):
    src, dst = layout_of(dtype), layout_of(dtype, order=order)
    here, there, layers = [5, 1, 9], [2, 11, 0], range(1, 3)
    caches = [random_cache(src), random_cache(dst, 1)]
    before = numbers(caches[1].clone(), dst)
    nbytes = carry(src, dst, [plan.HeadSlice(0, 0, 0, 0, 2)], here, there, start, end, layers, caches)
    assert nbytes == packing.wire_bytes(src, dst, [plan.HeadSlice(0, 0, 0, 0, 2)], start, end, len(layers))
    expected, found = before, numbers(caches[1], dst)
    largest = numbers(caches[0], src).abs().max()
    for token in range(start, end):
        block, place = there[token // 4], token % 4
        asked = numbers(caches[0], src)[here[token // 4], 1:, :, :, place]
        lost = (found[block, 1:, :, :, place] - asked).abs()
        assert (lost <= asked.abs() / 14 + largest / 448 / 512).all() and lost.max() > 0
        expected[block, 1:, :, :, place] = found[block, 1:, :, :, place]
    assert torch.equal(found, expected)  # nothing else was touched


def test_a_rank_with_half_of_the_heads_gets_its_half():
    src, dst = layout_of(heads=4), layout_of(heads=2)
    caches = [random_cache(src), torch.zeros(dst.total_bytes, dtype=torch.uint8)]
    carry(src, dst, [plan.HeadSlice(0, 1, 2, 0, 2)], [3], [7], 0, 4, range(3), caches)
    asked, found = numbers(caches[0], src)[3, :, :, 2:], numbers(caches[1], dst)[7]
    assert (found - asked).abs().max() < asked.abs().max() / 14


def test_each_head_has_its_own_scale():
    layout = layout_of(heads=2)
    cache = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    view = cache.view(torch.bfloat16).view(layout.shape)
    view[0, 0, 0, 0], view[0, 0, 0, 1], view[0, 0, 1] = 1e4, 1e-4, float("nan")
    form = packing.Form(layout, 0, 4, 4)
    target = torch.empty((1, form.wire_bytes), dtype=torch.uint8)
    packing.quantise(cache, form, np.array([0]), target)
    cache[: form.wire_bytes] = target[0]
    packing.expand(cache, form, np.array([0]))
    torch.testing.assert_close(view[0, 0, 0, :, 0, 0].float(), torch.tensor([1e4, 1e-4]), rtol=5e-3, atol=0)
    assert view[0, 0, 1].isnan().all()  # what was no number stays none


def test_bytes_halve_for_bfloat16_and_quarter_for_float32():
    for dtype, ratio in (("bfloat16", 0.5), ("float32", 0.25)):
        layout = KVLayout(64, 4, 8, 16, 128, dtype)
        nbytes = packing.wire_bytes(layout, layout, [plan.HeadSlice(0, 0, 0, 0, 8)], 0, 1024, 4)
        scales = 4 * 4 * 64 * 2 * 8  # bytes, layers, blocks, K and V, heads
        assert nbytes == ratio * 1024 * layout.token_bytes + scales


def test_a_cache_that_cannot_shrink_is_refused():
    packing.check(layout_of())
    with pytest.raises(TransferError, match="float8_e4m3fn already"):
        packing.check(layout_of("float8_e4m3fn"))
    with pytest.raises(TransferError, match="8 x bfloat16"):
        packing.check(KVLayout(4, 1, 1, 4, 8, "bfloat16"))


@pytest.mark.parametrize(
    "packed",
    [
        Packed(0, 5, 1, b""),
        Packed(2, 2, 1, b""),
        Packed(0, 4, 5, b""),
        Packed(0, 2, 2, b""),
        Packed(0, 4, 1, b"x"),
        Packed(0, 4, 4, np.array([12 * 3 * 4 * 128 - 128], "<i8").tobytes()),
        Packed(0, 4, 1, np.array([64], "<i8").tobytes()),
        Packed(0, 4, 1, np.array([-128], "<i8").tobytes()),
    ],
)
def test_a_notice_of_units_that_do_not_exist_is_refused(packed):
    with pytest.raises(TransferError):
        packing.read(layout_of(), packed)


def test_a_pair_that_does_not_agree_hears_both_values():
    shape = {
        "dtype": "bfloat16",
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 16,
        "block_size": 4,
        "num_blocks": 9,
        "order": "",
        "tp_size": 1,
    }
    with pytest.raises(LayoutMismatch, match="fp8_e4m3 on the prefill node and auto on the decode node"):
        plan.check_shapes(Shape(**shape, wire_dtype="fp8_e4m3"), Shape(**shape))


def test_a_backend_that_cannot_carry_packed_kv_is_refused_with_those_that_can():
    with pytest.raises(TransferError, match="needs communication_type cuda_ipc, shm, tcp"):
        make_backends("nixl", "127.0.0.1", is_packed=True)


def test_a_device_whose_packing_is_wrong_is_found_at_start(monkeypatch):
    packing.prove(layout_of(), torch.device("cpu"))
    monkeypatch.setattr(packing, "LARGEST", 4480.0)  # beyond what eight bits hold
    with pytest.raises(TransferError, match="does not come back right"):
        packing.prove(layout_of(), torch.device("cpu"))
