"""Which product takes which kernel: the cases that were measured, and that no configuration breaks its kernel's conditions."""

import itertools

import pytest

from ksana_lab.layers.few_rows import PLAIN, SILU_MUL, StreamConfig, TileConfig, choose, choose_fp8

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "down": (4096, 12288), "head": (151_936, 4096)}


def test_a_batch_of_one_streams_on_hopper_and_is_tiled_elsewhere():
    for n, k in SHAPES.values():
        assert choose(1, n, k, PLAIN, 132, True) == StreamConfig(8)
    assert choose(1, 4096, 12288, PLAIN, 132, False) == TileConfig(16, 64, 256, 2, 3)
    assert choose(1, 6144, 4096, PLAIN, 132, False) == TileConfig(16, 64, 256, 1, 3)


def test_gate_and_up_are_one_kernel_where_they_are_large():
    assert choose(8, 12288, 4096, SILU_MUL, 132, True) == TileConfig(16, 128, 128, 1, 3)
    assert choose(8, 3072, 1024, SILU_MUL, 132, True) is None


@pytest.mark.parametrize(
    ("rows", "name", "is_ours"), [(16, "o", True), (32, "o", False), (32, "qkv", False), (32, "down", True), (33, "down", False)]
)
def test_more_rows_leave_cublas_what_it_does_better(rows, name, is_ours):
    assert (choose(rows, *SHAPES[name], PLAIN, 132, True) is not None) == is_ours


def test_every_choice_holds_its_kernels_conditions():
    for rows, n, k, epilogue, sms in itertools.product(
        (1, 8, 9, 16, 17, 32), (128, 896, 4096, 151_936), (256, 1024, 4864, 12288), (PLAIN, SILU_MUL), (8, 132)
    ):
        for has_hopper in (False, True):
            config = choose(rows, n, k, epilogue, sms, has_hopper)
            if config is not None:
                assert rows <= config.rows and k % config.block_k == 0
            if isinstance(config, TileConfig):
                assert 1 <= config.split_k <= k // config.block_k


GATE_UP = (12288, 4096, SILU_MUL)
EIGHT_BITS = {**{name: (*SHAPES[name], PLAIN) for name in ("qkv", "o", "down")}, "gate_up": GATE_UP}


@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("tp", [1, 2])
def test_8_bit_weights_are_cut_so_that_each_sm_has_as_much(rows, tp):
    for name, (n, k, epilogue) in EIGHT_BITS.items():
        n, k = (n, k // tp) if name in ("o", "down") else (n // tp, k)
        config = choose_fp8(rows, n, k, epilogue, 132)
        each = n // config.block_n * config.split_k / 132
        assert rows <= config.rows and 1.9 < each <= 3 and n % config.block_n == 0, (name, config)
        assert (k // config.block_k) % config.split_k == 0, "parts of one length"


def test_8_bit_weights_of_any_shape_have_a_kernel():
    for rows, n, k, epilogue, sms in itertools.product((1, 17, 32), (16, 151_936), (16, 160, 4864), (PLAIN, SILU_MUL), (1, 132)):
        config = choose_fp8(rows, n, k, epilogue, sms)
        assert rows <= config.rows and 1 <= config.split_k <= -(-k // config.block_k)
