"""FP8 kernels against float64 of the numbers as FP8 rounds them. As test_kernels_attention.py."""

import os
from dataclasses import replace

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
pytest.importorskip("triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 1e-5 if INTERPRETED else 6e-3


def relative_error(ours, reference):
    assert ours.isfinite().all()
    return ((ours.double() - reference).norm() / reference.norm()).item()


@pytest.fixture
def poison_new_memory(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))


FEW_ROWS = [  # rows of x, columns of the result, K
    (1, 64, 512),
    (5, 80, 1024),
    (8, 320, 2560),
    (13, 72, 2048),
    (17, 200, 160),
    (32, 96, 1040),
]


@pytest.mark.parametrize("epilogue", [0, 1])
@pytest.mark.parametrize("split_k", [None, 3])
@pytest.mark.parametrize(("rows", "n", "k"), FEW_ROWS)
def test_few_rows_times_weights_of_8_bits(poison_new_memory, rows, n, k, split_k, epilogue):
    from ksana_lab.layers import few_rows, linear_fp8_triton
    from ksana_lab.layers.linear_fp8 import dequantize_rows, quantize_rows

    config = few_rows.choose_fp8(rows, n, k, epilogue, 8)
    if split_k is not None:
        config = replace(config, split_k=min(split_k, -(-k // config.block_k)))
    size = (n * (1 + epilogue), 1)
    weight, scale = quantize_rows(torch.randn(size[0], k, device=DEVICE) * torch.rand(size, device=DEVICE) * k**-0.5)
    x = torch.randn(rows, k + 16, device=DEVICE).to(DTYPE)[:, :k]
    counters = few_rows.new_counters(n, torch.device(DEVICE))
    expected = x.double() @ dequantize_rows(weight, scale, torch.float64).t()
    if epilogue:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    for pdl in (False, *([] if INTERPRETED else [True])):
        ours = linear_fp8_triton.few_rows_linear(x, weight, scale, config, counters, epilogue, pdl)
        assert relative_error(ours, expected) < TOLERANCE
    assert not counters.any()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter widens by itself")
@pytest.mark.parametrize("rows", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_8_bits_is_widened_without_loss(dtype, rows):
    from ksana_lab.layers import linear_fp8

    numbers = torch.arange(256, device=DEVICE).to(torch.uint8).view(torch.float8_e4m3fn)
    weight = torch.where(numbers.float().isnan(), 0.0, numbers.float()).to(torch.float8_e4m3fn).expand(64, 256).contiguous()
    scale = torch.ones(64, device=DEVICE)
    for first in range(0, 256, rows):
        x = torch.eye(256, device=DEVICE, dtype=dtype)[first : first + rows]
        got = linear_fp8.few_rows_linear(x, weight, scale)
        assert torch.equal(got.float(), weight.float()[:, first : first + rows].t())


@pytest.mark.parametrize(("rows", "k"), [(1, 512), (7, 4096), (3, 160)])
def test_tokens_are_quantised_as_torch_does(rows, k):
    from ksana_lab.layers.linear_fp8 import dequantize_rows, quantize_rows
    from ksana_lab.layers.linear_fp8_triton import quantize_tokens

    x = torch.randn(rows, k, device=DEVICE).to(DTYPE)
    x[-1, :-1] = 0  # one value alone, and then none
    if INTERPRETED:  # Triton 3.6 interprets a rounding that should carry into the exponent as one that does not
        x[:, 0] = 7.0
        x = (x * 64).to(torch.float8_e4m3fn).to(DTYPE) / 64
    narrow, scale = quantize_tokens(torch.cat([x, torch.zeros_like(x[:1])]))
    expected, expected_scale = quantize_rows(x)
    torch.testing.assert_close(scale[:-1], expected_scale, rtol=1e-6, atol=0)
    got, wanted = dequantize_rows(narrow[:-1], scale[:-1], torch.float64), dequantize_rows(expected, expected_scale, torch.float64)
    # A value halfway between two may go either way when its quotient is rounded differently.
    assert ((got - wanted).abs() <= wanted.abs() / 8 + 1e-12).all() and (got == wanted).float().mean() > 0.99
    assert not narrow[-1].float().any()


@pytest.mark.skipif(INTERPRETED, reason="torch's FP8 product runs on a GPU only")
@pytest.mark.parametrize("rows", [33, 200, 4096])
def test_many_rows_are_as_near_as_two_roundings_allow(rows):
    from ksana_lab.layers.linear_fp8 import dequantize_rows, fp8_linear, quantize_rows

    weight, scale = quantize_rows(torch.randn(1536, 1024, device=DEVICE))
    x, bias = torch.randn(rows, 1024, device=DEVICE).to(DTYPE), torch.randn(1536, device=DEVICE).to(DTYPE)
    narrow, token_scale = quantize_rows(x)
    wide = dequantize_rows(weight, scale, torch.float64)
    expected = dequantize_rows(narrow, token_scale, torch.float64) @ wide.t() + bias.double()
    got = fp8_linear(x, weight, scale, bias)
    assert relative_error(got, expected) < TOLERANCE
    assert relative_error(got, x.double() @ wide.t() + bias.double()) < 0.05


@pytest.mark.skipif(INTERPRETED, reason="graphs are captured on a GPU only")
@pytest.mark.parametrize("rows", [4, 64])
def test_products_can_be_captured(rows):
    from ksana_lab.layers.linear_fp8 import fp8_linear, quantize_rows

    weight, scale = quantize_rows(torch.randn(512, 1024, device=DEVICE))
    x = torch.randn(rows, 1024, device=DEVICE).to(DTYPE)
    fp8_linear(x, weight, scale, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_linear(x, weight, scale, None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, fp8_linear(x, weight, scale, None))


@pytest.mark.skipif(INTERPRETED, reason="graphs are captured on a GPU only")
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_replayed_chain_with_dependent_launch_is_the_chain_of_eager_launches(rows):
    """Layers share the counters of their parts along K, and start before the kernel ahead has ended."""
    from ksana_lab.layers import few_rows, fused
    from ksana_lab.layers.linear_fp8 import few_rows_linear, quantize_rows
    from ksana_lab.layers.replay import capture

    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("dependent launch needs compute capability 9")
    size, ones = 2048, torch.ones(2048, device=DEVICE, dtype=DTYPE)
    layers = [(quantize_rows(torch.randn(2 * size, size, device=DEVICE)), epilogue) for epilogue in (0, 1) * 4]
    start, counters = torch.randn(rows, size, device=DEVICE).to(DTYPE), few_rows.new_counters(2 * size, torch.device(DEVICE))

    def chain(pdl):
        x = start
        for (weight, scale), epilogue in layers:
            x = few_rows_linear(fused.rms_norm(x[:, :size], ones, 1e-6, pdl), weight, scale, counters, epilogue, pdl)
        return x

    wanted = chain(False)
    chain(True)
    graph, said = capture(lambda: chain(True))
    for _ in range(20):
        graph.replay()
        assert torch.equal(said, wanted)
    assert not counters.any()
