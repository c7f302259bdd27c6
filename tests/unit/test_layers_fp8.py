"""Weights of 8 bits: how far they are off, that ranks hold the same numbers, and that nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from helpers_checkpoint import checkpoint
from helpers_fp8 import lone_rank, widened_checkpoint
from helpers_model import PagedBatch

from ksana_lab.layers import linear_fp8
from ksana_lab.layers.linear_fp8 import FP8, dequantize_rows, fp8_linear, quantize_rows, quantized_bytes
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.registry import load_model

CPU = torch.device("cpu")


def load(path, quant_method="fp8_e4m3", tp=None):
    return load_model(ModelConfig.from_dir(path), path, dtype=torch.float32, device=CPU, tp=tp, quant_method=quant_method)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e5])
def test_a_weight_is_off_by_a_sixteenth_at_most(spread):
    wide = torch.randn(40, 300) * spread
    wide[:, 0] *= 50  # an outlier in every row
    narrow, scale = quantize_rows(wide)
    error = (dequantize_rows(narrow, scale, torch.float32) - wide).abs()
    assert narrow.dtype == FP8 and (error <= torch.maximum(wide.abs() / 16, scale[:, None] / 1024) * 1.001).all()
    largest = wide.abs().argmax(1, keepdim=True)
    assert (error.gather(1, largest) <= wide.gather(1, largest).abs() * 1e-6).all()
    assert error.max() > 0


def test_a_row_of_zeros_stays_zero():
    narrow, scale = quantize_rows(torch.zeros(2, 8))
    assert not dequantize_rows(narrow, scale, torch.float32).any() and (scale > 0).all()


def test_the_product_is_that_of_widened_weights():
    narrow, scale = quantize_rows(torch.randn(24, 32))
    x, bias = torch.randn(3, 32), torch.randn(24)
    expected = x.double() @ dequantize_rows(narrow, scale, torch.float64).t() + bias
    torch.testing.assert_close(fp8_linear(x, narrow, scale, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_a_model_gives_the_logits_of_widened_weights(tmp_path, arch):
    prompt = list(range(3, 203, 5))

    def logits(model):
        batch = PagedBatch(model)
        seq = batch.new_sequence(60)
        return batch.step([(seq, prompt)])[0], batch.step([(seq, [7])])[0]

    ours = logits(load(checkpoint(arch)))
    expected = logits(load(widened_checkpoint(checkpoint(arch), tmp_path / "wide"), "auto"))
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(ours[0], logits(load(checkpoint(arch), "auto"))[0])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_ranks_hold_shares_of_the_same_numbers(arch):
    whole = load(checkpoint(arch)).layers[1]
    shards = [load(checkpoint(arch), tp=lone_rank(rank, 2)).layers[1] for rank in range(2)]

    def wide(linear):
        return dequantize_rows(linear.weight, linear.scale, torch.float32)

    assert torch.equal(torch.cat([wide(s.mlp.down) for s in shards], 1), wide(whole.mlp.down))
    assert torch.equal(torch.cat([wide(s.attention.output) for s in shards], 1), wide(whole.attention.output))
    halves = [wide(s.mlp.gate_up).chunk(2) for s in shards]
    assert torch.equal(torch.cat([h[0] for h in halves] + [h[1] for h in halves]), wide(whole.mlp.gate_up))
    parts = [wide(s.attention.qkv).split(s.attention.qkv.rows) for s in shards]
    assert torch.equal(torch.cat([p[i] for i in range(3) for p in parts]), wide(whole.attention.qkv))


def test_only_the_layers_products_are_narrow():
    model, plain = load(checkpoint("qwen2")), load(checkpoint("qwen2"), "auto")
    narrow = {name for name, p in model.named_parameters() if p.dtype == FP8}
    assert narrow == {
        f"layers.{i}.{name}.weight"
        for i in range(len(model.layers))
        for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    }
    before = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert name in narrow or name.endswith(".scale") or torch.equal(p, before[name]), name
    total, eight_bits = quantized_bytes(model)
    wide = sum(before[name].nbytes for name in narrow)
    assert total == sum(p.nbytes for p in before.values()) - wide + eight_bits and wide / 4 < eight_bits < wide / 3.6


def test_a_kernel_that_fails_its_proof_is_not_used(monkeypatch, caplog):
    model = load(checkpoint())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(linear_fp8, "_fault", lambda rows, dtype, device, few_rows, epilogue=0: "wrong" if few_rows else "")
    linear_fp8.prove(model, torch.bfloat16, torch.device("cuda"))
    assert model.layers[0].mlp.down.few_rows == 0 and "few rows" in caplog.text
    monkeypatch.setattr(linear_fp8, "_fault", lambda rows, dtype, device, few_rows, epilogue=0: "wrong")
    with pytest.raises(linear_fp8.ConfigError, match="leave quantization_config"):
        linear_fp8.prove(model, torch.bfloat16, torch.device("cuda"))


def test_the_proof_itself_passes_what_is_right_and_sees_what_is_wrong(monkeypatch):
    assert linear_fp8._fault(5, torch.float32, CPU, 32) == "" == linear_fp8._fault(200, torch.bfloat16, CPU, 0)
    monkeypatch.setattr(linear_fp8, "fp8_linear", lambda x, weight, scale, bias, few_rows: x @ weight.float().t())
    assert "5 rows are off by" in linear_fp8._fault(5, torch.float32, CPU, 32)
