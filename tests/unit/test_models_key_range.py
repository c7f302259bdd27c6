"""Keys are made to fit into 8 bits without changing a score."""

from __future__ import annotations

import pytest
import torch
from helpers_checkpoint import checkpoint
from helpers_fp8 import lone_rank
from helpers_model import PagedBatch

from ksana_lab.layers.linear_fp8 import FP8
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.key_range import fit_keys
from ksana_lab.models.registry import load_model

PROMPT = list(range(3, 203, 5))


def load(arch, **options):
    return load_model(ModelConfig.from_dir(checkpoint(arch)), checkpoint(arch), dtype=torch.float32, device=torch.device("cpu"), **options)


def run(model):
    """(logits, largest key of layer 1)."""
    batch = PagedBatch(model)
    seq = batch.new_sequence(len(PROMPT))
    logits = batch.step([(seq, PROMPT)])[0]
    return logits, batch.kv_layers[1][seq.block_table, 0].abs().nan_to_num(0.0).max().item()


def with_large_keys(arch, **options):
    """Layer 1 makes keys in the thousands."""
    model = load(arch, **options)
    attention = model.layers[1].attention
    if arch == "qwen3":
        attention.core.k_norm.weight.mul_(700)
        attention.core.q_norm.weight.div_(700)
    else:
        keys = attention.qkv.rows[0]
        attention.qkv.bias[keys : keys + 16] *= 5000  # the first KV head alone
    return model


@pytest.mark.parametrize(("arch", "quant_method"), [("qwen3", "auto"), ("qwen2", "auto"), ("qwen2", "fp8_e4m3")])
def test_large_keys_fit_and_no_logit_changes(arch, quant_method):
    before, largest_before = run(with_large_keys(arch, quant_method=quant_method))
    model = with_large_keys(arch, quant_method=quant_method)
    assert fit_keys(model) > 1
    after, largest_after = run(model)
    assert largest_before > 448 > largest_after > 50
    assert torch.equal(before, after)
    assert fit_keys(model) == 1


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_keys_that_fit_are_left_alone(arch):
    model, before = load(arch), load(arch)
    assert fit_keys(model) == 1
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ranks_divide_a_head_as_one_rank_does():
    whole = with_large_keys("qwen2")
    shard = load("qwen2", tp=lone_rank(0, 2))
    shard.layers[1].attention.qkv.bias[shard.layers[1].attention.qkv.rows[0] :][:16] *= 5000
    assert fit_keys(whole) == fit_keys(shard) > 1
    key = shard.layers[1].attention.qkv.rows[0]
    whole_key = whole.layers[1].attention.qkv.rows[0]
    assert torch.equal(
        shard.layers[1].attention.qkv.weight[key : key + 32], whole.layers[1].attention.qkv.weight[whole_key : whole_key + 32]
    )
    assert torch.equal(shard.layers[1].attention.qkv.weight[:key], whole.layers[1].attention.qkv.weight[:key])


def test_weights_of_8_bits_are_divided_in_their_scales():
    model, before = with_large_keys("qwen2", quant_method="fp8_e4m3"), with_large_keys("qwen2", quant_method="fp8_e4m3")
    fit_keys(model)
    qkv, old = model.layers[1].attention.qkv, before.layers[1].attention.qkv
    assert qkv.weight.dtype == FP8 and torch.equal(qkv.weight.float(), old.weight.float()) and not torch.equal(qkv.scale, old.scale)
