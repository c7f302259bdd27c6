"""Every byte of a decode node's blocks is written exactly once, and from the right (layer, K or V, head, token)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import LayoutMismatch
from ksana_lab.protocol.transfer import Shape
from ksana_lab.transfer.plan import between, check_shapes, copies, head_slices, heads_of, rank_layout, slice_bytes

TP = st.sampled_from([1, 2, 4, 8])


def shape(**changes) -> Shape:
    fields = dict(dtype="float32", num_layers=3, num_kv_heads=2, head_dim=2, block_size=4, num_blocks=12, order="block_major", tp_size=1)
    return Shape(**{**fields, **changes})


def labelled_cache(layout: KVLayout, rank: int, shape_: Shape, block_table: list[int]) -> np.ndarray:
    """A float32 cache whose every element says which (layer, kv, model head, token) it belongs to; 0 where no token lies."""
    cache = np.zeros(layout.shape, np.float32)
    heads = heads_of(rank, shape_.tp_size, shape_.num_kv_heads)
    for index, block in enumerate(block_table):
        for layer in range(layout.num_layers):
            cell = cache[block, layer] if layout.order == "block_major" else cache[layer, block]
            for local, head in enumerate(heads):
                for slot in range(layout.block_size):
                    token = index * layout.block_size + slot
                    for kv in (0, 1):
                        cell[kv, local, slot] = 1 + ((layer * 2 + kv) * 16 + head) * 1000 + token
    return cache


@settings(max_examples=60, deadline=None)
@given(src_tp=TP, dst_tp=TP, heads=st.sampled_from([1, 2, 4, 8, 16]))
def test_every_destination_head_comes_once_from_a_rank_that_holds_it(src_tp, dst_tp, heads):
    slices = head_slices(src_tp, dst_tp, heads)
    for dst_rank in range(dst_tp):
        want = list(heads_of(dst_rank, dst_tp, heads))
        got = {}
        for s in (s for s in slices if s.dst_rank == dst_rank):
            for i in range(s.num_heads):
                assert s.dst_head + i not in got
                got[s.dst_head + i] = heads_of(s.src_rank, src_tp, heads)[s.src_head + i]
        assert [got[i] for i in range(len(want))] == want


@settings(max_examples=40, deadline=None)
@given(src_tp=TP, dst_tp=TP, heads=st.sampled_from([1, 2, 4]))
def test_replicas_share_the_load(src_tp, dst_tp, heads):
    load: Counter[int] = Counter()
    for s in head_slices(src_tp, dst_tp, heads):
        load[s.src_rank] += s.num_heads
    copies_wanted = max(heads, dst_tp)
    assert sum(load.values()) == copies_wanted
    assert max(load.values()) == -(-copies_wanted // min(src_tp, copies_wanted))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), src_tp=TP, dst_tp=TP, heads=st.sampled_from([1, 2, 4, 8]), size=st.sampled_from([1, 3, 4]))
def test_every_byte_is_written_once_from_the_right_place(data, src_tp, dst_tp, heads, size):
    orders = st.sampled_from(["block_major", "layer_major"])
    p = shape(num_kv_heads=heads, tp_size=src_tp, block_size=size, order=data.draw(orders))
    d = shape(num_kv_heads=heads, tp_size=dst_tp, block_size=size, order=data.draw(orders), num_blocks=9)
    num_tokens = data.draw(st.integers(1, 4 * size))
    num_blocks = -(-num_tokens // size)
    src_table = data.draw(st.permutations(range(p.num_blocks)))[:num_blocks]
    dst_table = data.draw(st.permutations(range(d.num_blocks)))[:num_blocks]
    cut = data.draw(st.integers(0, num_tokens))  # two token ranges, and two layer ranges, must compose
    pieces = [(a, b, layers) for a, b in ((0, cut), (cut, num_tokens)) for layers in (range(0, 1), range(1, 3))]
    src, dst = rank_layout(p), rank_layout(d)
    slices = head_slices(src_tp, dst_tp, heads)
    for dst_rank in range(dst_tp):
        cache = np.zeros(dst.total_bytes, np.uint8)
        writes = np.zeros(dst.total_bytes, np.uint8)
        for src_rank in range(src_tp):
            source = labelled_cache(src, src_rank, p, src_table).view(np.uint8).reshape(-1)
            mine = between(slices, src_rank, dst_rank)
            for start, end, layers in pieces:
                runs = copies(src, dst, mine, src_table, dst_table, start, end, layers)
                assert runs[:, 2].sum() == slice_bytes(dst, mine, end - start, len(layers))
                for a, b, n in runs.tolist():
                    cache[b : b + n] = source[a : a + n]
                    writes[b : b + n] += 1
        want = labelled_cache(dst, dst_rank, d, dst_table)
        tokens = (want.astype(np.int64) - 1) % 1000
        want[(want == 0) | (tokens >= num_tokens)] = 0
        assert np.array_equal(cache.view(np.float32).reshape(dst.shape), want)
        assert np.array_equal(writes.view(np.uint32).reshape(dst.shape) != 0, want != 0)
        assert writes.max() == 1


def test_whole_adjacent_blocks_of_all_layers_are_one_copy():
    layout = rank_layout(shape())
    runs = copies(layout, layout, head_slices(1, 1, 2), [3, 4, 5], [7, 8, 9], 0, 12, range(3))
    assert runs.tolist() == [[layout.cell_offset(3, 0), layout.cell_offset(7, 0), 3 * layout.block_bytes]]


def test_tables_that_run_backwards_coalesce_too():
    layout = rank_layout(shape())
    assert len(copies(layout, layout, head_slices(1, 1, 2), [5, 4, 3], [9, 8, 7], 0, 12, range(3))) == 1


def test_one_layer_of_adjacent_blocks_is_one_copy_when_layers_are_outermost():
    layout = rank_layout(shape(order="layer_major"))
    assert len(copies(layout, layout, head_slices(1, 1, 2), [3, 4, 5], [7, 8, 9], 0, 12, range(1, 2))) == 1


def test_half_of_the_heads_needs_one_run_for_k_and_one_for_v():
    p, d = rank_layout(shape(num_kv_heads=4)), rank_layout(shape(num_kv_heads=4, tp_size=2))
    runs = copies(p, d, between(head_slices(1, 2, 4), 0, 1), [0], [0], 0, 4, range(1))
    assert runs[:, 2].tolist() == [2 * p.head_bytes] * 2


def test_a_block_outside_the_cache_is_refused():
    layout = rank_layout(shape())
    with pytest.raises(LayoutMismatch, match="12"):
        copies(layout, layout, head_slices(1, 1, 2), [12], [0], 0, 4, range(3))


def test_differing_shapes_are_refused_with_both_values():
    with pytest.raises(LayoutMismatch, match="block_size is 4 on the prefill node and 16 on the decode node"):
        check_shapes(shape(), shape(block_size=16))


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(LayoutMismatch, match="3 KV heads"):
        heads_of(0, 2, 3)


@pytest.mark.parametrize("tables", [([0, 1], [0]), ([0], [0, 1])])
def test_a_table_too_short_for_the_tokens_is_refused_with_both_lengths(tables):
    layout = rank_layout(shape())
    with pytest.raises(LayoutMismatch, match=r"8 tokens do not fit into . blocks on the prefill node and . on the decode node"):
        copies(layout, layout, head_slices(1, 1, 2), *tables, 0, 8, range(3))
