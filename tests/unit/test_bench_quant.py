"""The comparison of logits: its sums against plain formulas, and that every variant does what its name says."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from helpers_checkpoint import checkpoint
from helpers_fp8 import widened_checkpoint

from ksana_lab.bench import quant

CPU = torch.device("cpu")
TEXT = list(range(3, 99, 2))


def numbers(difference):
    return {name: value for name, value in asdict(difference).items() if name != "variant"}


def measure(path, texts=(TEXT,), chunk=20):
    return quant.measure(str(path), texts, chunk=chunk, dtype=torch.float32, device=CPU)


def test_differences_are_those_of_all_positions_together():
    a, b = torch.randn(9, 50), torch.randn(9, 50)
    next_tokens = list(range(8))
    comparison = quant.Comparison()
    comparison.add(a[:4], b[:4], next_tokens[:4])
    comparison.add(a[4:], b[4:], next_tokens[4:])
    d = comparison.result("x", 1, 2)
    assert d.max_abs == pytest.approx(float((a - b).abs().max())) and d.mean_abs == pytest.approx(float((a - b).abs().mean()))
    assert d.relative == pytest.approx(float((a - b).square().mean().sqrt() / a.std(correction=0)), rel=1e-5)
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="batchmean")
    assert d.kl_mean == pytest.approx(float(kl), rel=1e-5) and d.kl_p99 >= d.kl_mean > 0
    assert d.top1 == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert d.nll == pytest.approx(float(torch.nn.functional.cross_entropy(b[:8], torch.tensor(next_tokens))), rel=1e-5)
    assert d.nll_reference == pytest.approx(float(torch.nn.functional.cross_entropy(a[:8], torch.tensor(next_tokens))), rel=1e-5)


@pytest.fixture(scope="module")
def report():
    return measure(checkpoint())


def test_every_variant_differs_and_keeps_fewer_bytes_where_it_says_so(report):
    rows = {d.variant: d for d in report.differences}
    reference, weights, cache, both = (rows[n] for n in ("reference", "FP8 weights", "FP8 KV cache", "FP8 weights and KV cache"))
    assert reference.max_abs == reference.kl_mean == 0 and reference.top1 == 1
    assert 0 < rows["bfloat16"].relative < min(weights.relative, cache.relative) < both.relative
    assert weights.relative < rows["FP8 weights, activations rounded too"].relative
    assert weights.parameter_bytes == both.parameter_bytes < cache.parameter_bytes == reference.parameter_bytes
    assert cache.kv_bytes_per_token * 4 == both.kv_bytes_per_token * 4 == weights.kv_bytes_per_token == reference.kv_bytes_per_token
    assert len({d.nll_reference for d in rows.values()}) == 1


def test_chunks_do_not_change_what_is_measured(report):
    for ours, theirs in zip(measure(checkpoint(), chunk=7).differences, report.differences, strict=True):
        assert ours.variant == theirs.variant and numbers(ours) == pytest.approx(numbers(theirs), rel=1e-3)


def test_a_checkpoint_of_fp8_numbers_loses_next_to_nothing_to_fp8_weights(tmp_path, report):
    again = {d.variant: d for d in measure(widened_checkpoint(checkpoint(), tmp_path / "wide")).differences}
    assert again["FP8 weights"].relative < 0.01 * next(d.relative for d in report.differences if d.variant == "FP8 weights")


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    assert quant.main(["--model", checkpoint(), "--tokens", "32", "--sequences", "1", "--json", str(tmp_path / "q.json")]) == 0
    assert "| FP8 weights and KV cache |" in capsys.readouterr().out
    written = json.loads((tmp_path / "q.json").read_text())
    assert written["tokens"] == 32 and len(written["differences"]) == 6 and len(written["ranges"]) == 4
    assert quant.main(["--model", checkpoint(), "--tokens", "1000000"]) == 2
    assert "give a longer --text" in capsys.readouterr().out
