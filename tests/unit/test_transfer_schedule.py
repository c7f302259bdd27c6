"""Which layers go together, by measured computing and link speed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksana_lab.transfer.schedule import AUTO_BULK_TOKENS, Speeds, beside_s, choose_mode, equal, exposed_s, growing

LAYER_BYTES, LAYERS = 3_000_000, 36
FAST = Speeds(bandwidth=300e9, piece_s=50e-6, layer_s=1e-3)
STARVED = Speeds(bandwidth=1e9, piece_s=0.0, layer_s=1e-3)  # 3 ms to send a layer


def choose(speeds, tokens=8192, **more):
    return choose_mode("auto", 1, tokens, tokens * 4096, num_layers=LAYERS, speeds=speeds, **more)


def test_equal_groups_and_a_short_last_one():
    assert equal(8, 3) == (3, 6, 8)
    assert equal(4, 9) == (4,)


def test_exposed_is_the_last_layer_where_computing_is_slower():
    assert exposed_s(LAYER_BYTES, equal(LAYERS, 1), FAST) == pytest.approx(60e-6)
    assert exposed_s(LAYER_BYTES, (LAYERS,), FAST) == pytest.approx(36 * 10e-6 + 50e-6)


def test_exposed_is_the_whole_backlog_where_the_link_is_slower():
    assert exposed_s(LAYER_BYTES, equal(LAYERS, 1), STARVED) == pytest.approx(36 * 3e-3 - 35 * 1e-3)


def test_two_pieces_expose_no_more_than_one_a_layer_on_a_fast_link():
    schedule = growing(LAYERS, 1, LAYER_BYTES, FAST)
    assert schedule == (35, 36)
    assert exposed_s(LAYER_BYTES, schedule, FAST) == pytest.approx(exposed_s(LAYER_BYTES, equal(LAYERS, 1), FAST))


def test_pieces_grow_towards_the_front_while_the_link_keeps_up():
    speeds = Speeds(bandwidth=12e9, piece_s=0.0, layer_s=1e-3)  # four layers sent while one is computed, and 0.7 of it counted on
    sizes = [b - a for a, b in pairwise((0, *growing(LAYERS, 1, LAYER_BYTES, speeds)))]
    assert sizes == [14, 14, 5, 2, 1]


def test_on_a_link_slower_than_computing_pieces_are_equal():
    assert growing(LAYERS, 4, LAYER_BYTES, STARVED) == equal(LAYERS, 4)


@given(st.integers(1, 80), st.integers(1, 40), st.floats(1e8, 1e12), st.floats(0, 1e-2), st.floats(1e-6, 1e-1), st.integers(1, 1 << 28))
def test_every_schedule_covers_every_layer_once(layers, last, bandwidth, piece_s, layer_s, nbytes):
    schedule = growing(max(layers, last), last, nbytes, Speeds(bandwidth, piece_s, layer_s))
    assert schedule[-1] == max(layers, last) and all(a < b for a, b in pairwise((0, *schedule)))


def test_pieces_cost_a_prefill_what_was_measured():
    """8,192 tokens in 2, 4, 9 and 36 pieces: 0.5, 0.75, 1.6 and 1.6% of 208 ms."""
    assert [1e3 * beside_s(n, 0.208) for n in (1, 2, 4, 9, 36)] == pytest.approx([0, 1.0, 1.6, 3.3, 3.3], abs=0.5)


def test_auto_sends_short_prompts_in_bulk_and_unmeasured_ones_in_pieces_worth_sending():
    assert choose_mode("auto", 1, AUTO_BULK_TOKENS - 1, 1 << 19, num_layers=4) == ("bulk", (4,))
    assert choose_mode("auto", 1, AUTO_BULK_TOKENS, 1 << 19, num_layers=4) == ("layer", (2, 4))


def test_explicit_modes_are_taken_as_they_are():
    assert choose_mode("chunk", 5, 10, 1, num_layers=8) == ("chunk", (8,))
    assert choose_mode("layer", 5, 10, 1, num_layers=8) == ("layer", (5, 8))
    assert choose_mode("layer", 2, 300, 1, num_layers=8, bulk_below=512) == ("bulk", (8,))


def test_auto_hides_a_long_prompt_behind_few_pieces():
    """As on two H200s: 8,192 tokens, 5.8 ms of computing and 0.1 ms of sending a layer."""
    mode, schedule = choose(Speeds(bandwidth=330e9, piece_s=0.3e-3, layer_s=5.8e-3))
    assert mode == "layer" and len(schedule) == 2 and schedule[-1] - schedule[-2] <= 2


def test_auto_takes_smaller_pieces_of_what_a_slow_link_carries():
    mode, schedule = choose(Speeds(bandwidth=5e9, piece_s=0.1e-3, layer_s=5.8e-3))
    assert mode == "layer" and len(schedule) > 8


def test_auto_sends_in_bulk_what_is_not_worth_a_piece():
    assert choose(FAST, 256) == ("bulk", (LAYERS,))
    assert choose(Speeds(bandwidth=600e9, piece_s=0.0, layer_s=1e-2), 512)[0] == "bulk"  # 0.13 ms in all


def test_auto_sends_in_bulk_where_handling_pieces_would_take_more_than_a_tenth_of_computing():
    assert choose(Speeds(bandwidth=300e9, piece_s=0.1, layer_s=1e-3))[0] == "bulk"
