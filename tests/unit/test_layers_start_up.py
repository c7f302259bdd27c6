"""Which layers take own kernels for few rows, and that a layer uses what was chosen for it. The kernels: tests/gpu/test_few_rows_gpu.py."""

import pytest
import torch

from ksana_lab.layers import few_rows, start_up
from ksana_lab.layers.few_rows import PLAIN, SILU_MUL, Chosen, StreamConfig, TileConfig
from ksana_lab.layers.linear import GateUpLinear, QKVLinear, RowLinear
from ksana_lab.layers.start_up import Verdict
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.decoder import Decoder
from ksana_lab.models.synth import SHAPES

CPU, ONE = torch.device("cpu"), TPGroup.single()
STREAM, TILES = StreamConfig(8), TileConfig(32, 64, 128, 4, 4)


@pytest.fixture
def calls(monkeypatch):
    """few_rows.linear in plain torch; what it was asked for."""
    made = []

    def multiply(x, weight, config, counters, epilogue=PLAIN, pdl=True):
        made.append((x.shape[0], config, epilogue, pdl))
        y = x @ weight.T
        gate, up = y.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up if epilogue == SILU_MUL else y

    monkeypatch.setattr(few_rows, "linear", multiply)
    return made


@pytest.fixture
def chosen():
    return Chosen({1: STREAM, 8: STREAM, 32: TILES}, torch.zeros(1, dtype=torch.int32), pdl=False)


def test_rows_take_the_kernel_of_their_class(chosen):
    assert [chosen.config(rows) for rows in (1, 2, 8, 9, 16, 17, 32, 33)] == [STREAM] * 3 + [None, None, TILES, TILES, None]


@pytest.mark.parametrize(
    ("make", "out_size"),
    [
        (lambda: QKVLinear(64, 4, 2, 16, False, ONE, torch.float32, CPU), 128),
        (lambda: RowLinear(64, 96, False, ONE, torch.float32, CPU), 96),
        (lambda: GateUpLinear(64, 48, ONE, torch.float32, CPU), 48),
    ],
    ids=["qkv", "row", "gate and up"],
)
def test_a_layer_gives_the_same_through_its_own_kernel(calls, chosen, make, out_size):
    layer = make()
    layer.weight.normal_()
    run = layer.activated if isinstance(layer, GateUpLinear) else layer
    for rows in (1, 9, 20):
        x = torch.randn(rows, 64)
        layer.own = None
        expected = run(x)
        layer.own = chosen
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-3)
        assert expected.shape == (rows, out_size)
    epilogue = SILU_MUL if isinstance(layer, GateUpLinear) else PLAIN
    assert calls == [(1, STREAM, epilogue, False), (20, TILES, epilogue, False)]


def test_products_are_grouped_by_shape_and_fp8_and_biases_are_left_out():
    def names(shape, quant_method="auto", dtype=torch.bfloat16):
        model = Decoder(SHAPES[shape], dtype=dtype, device=CPU, tp=ONE, quant_method=quant_method)
        return {product.name: (product.n, product.epilogue, len(product.layers)) for product in start_up.products_of(model)}

    plain = {"row 64 x 128": (64, 0, 4), "gateup 320 x 64": (160, 1, 4), "row 64 x 160": (64, 0, 4), "head 1024 x 64": (1024, 0, 1)}
    assert names("qwen3-tiny") == {"qkv 256 x 64": (256, 0, 4), **plain}
    assert names("qwen2-tiny") == plain  # its q, k and v have biases
    assert names("qwen3-tiny", "fp8_e4m3") == {"head 1024 x 64": (1024, 0, 1)}
    assert names("qwen3-tiny", dtype=torch.float32) == {}


def test_ranks_agree_on_what_is_right_on_all_and_fast_on_the_first():
    first = {"a": {1: Verdict(True, 10, 12), 8: Verdict(True, 13, 12), 16: Verdict(True, 15, 12), 32: Verdict(True, 9, 12)}}
    second = {"a": {1: Verdict(True, 99, 1), 8: Verdict(True), 16: Verdict(True), 32: Verdict(False)}}
    assert start_up.agree([first, second]) == {"a": [1, 8]}
    assert start_up._decode(start_up._encode(first)) == first


def test_the_log_names_every_decision():
    verdicts = {"qkv 6144 x 4096": {1: Verdict(True, 11.9, 15.7), 16: Verdict(False)}}
    assert start_up.describe(verdicts, {"qkv 6144 x 4096": [1]}) == [
        "qkv 6144 x 4096, 1 rows, behind a norm: 15.7 µs by cuBLAS, 11.9 by ours → ours",
        "qkv 6144 x 4096, 16 rows, behind a norm: ours is WRONG → cuBLAS",
    ]


def test_without_a_hopper_gpu_nothing_is_set():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = Decoder(SHAPES["qwen3-tiny"], dtype=torch.bfloat16, device=CPU, tp=ONE)
    start_up.choose_kernels(model, ONE)
    assert all(getattr(layer, "own", None) is None and not getattr(layer, "pdl", False) for layer in model.modules())
