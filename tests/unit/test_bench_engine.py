"""What bench engine makes of its measurements. That its paths work: ``python -m ksana_lab.bench engine --trial`` (and with ``--tp 2``)."""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ksana_lab.bench import engine, kernels
from ksana_lab.bench._results import Row, write_results
from ksana_lab.bench.engine import GPU, Ceilings, Floors
from ksana_lab.models.synth import SHAPES


def test_a_ratio_says_how_far_from_the_floor_or_below_the_ceiling():
    assert Row("a", "ms", 4.0, 5.0).ratio == 1.25 and Row("b", "tokens/s", 100.0, 50.0).ratio == 2.0
    assert Row("c", "ms", None, 5.0).ratio is None


def test_newer_rows_take_the_place_of_those_of_their_name(tmp_path):
    file = tmp_path / "results" / "engine.json"
    write_results(file, [Row("a", "ms", 1.0, 2.0), Row("b", "ms", None, 3.0)], "cpu")
    write_results(file, [Row("a", "ms", 1.0, 1.5)], "cpu")
    assert [(row["name"], row["ours"]) for row in json.loads(file.read_text())["rows"]] == [("a", 1.5), ("b", 3.0)]


def test_floors_of_the_8b_shape_are_its_bytes_and_multiplications():
    floors = Floors(SHAPES["qwen3-8b"], Ceilings(4.15e12, 779e12))
    assert floors.decode_s(1, GPU.context) * 1e3 == pytest.approx(3.7, rel=0.03)  # 15.1 GB of weights
    assert floors.decode_s(256, GPU.context) * 1e3 == pytest.approx(13.0, rel=0.03)  # and 38 GB of keys and values
    narrow = Floors(SHAPES["qwen3-8b"], Ceilings(4.15e12, 779e12), ("kv", "weights"))
    assert narrow.decode_s(1, GPU.context) * 1e3 == pytest.approx(2.0, rel=0.03)  # 8.2 GB of weights
    assert narrow.decode_s(256, GPU.context) * 1e3 == pytest.approx(6.6, rel=0.03)
    assert floors.prefill_s(16384) > 2 * floors.prefill_s(8192) and floors.prefill_s(1) == floors.decode_s(1, 0)


MODEL = SimpleNamespace(  # 100 numbers of embeddings, 100 of a head, 1100 of layers
    num_parameters=1300, vocab_size=10, hidden_size=10, tie_word_embeddings=False, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=5,
)  # fmt: skip
FLOORS = Floors(MODEL, Ceilings(read_bytes_per_s=100.0, matmul_flops_per_s=100.0))


def test_a_prefills_floor_is_its_layers_its_attention_and_one_heads_multiplications():
    layers, attention, head = 2 * 4 * 1100, 2 * 4**2 * 3 * 5 * 2, 2 * 100
    assert FLOORS.prefill_s(4) == pytest.approx((layers + attention + head) / 100) == pytest.approx(99.6)
    assert replace(FLOORS, fp8=("weights",)).prefill_s(4) == pytest.approx((layers / 2 + attention + head) / 100)
    assert replace(FLOORS, model=SimpleNamespace(**{**vars(MODEL), "tie_word_embeddings": True})).prefill_s(4) == pytest.approx(107.6)


def test_a_decode_steps_floor_is_its_weights_and_every_key_and_value():
    weights, kv = 2 * (1100 + 100), 2 * 7 * (2 * 2 * 1 * 5 * 2)  # two sequences of 7 tokens, 40 bytes each
    assert FLOORS.decode_s(2, 7) == pytest.approx((weights + kv) / 100) == pytest.approx(29.6)
    assert replace(FLOORS, fp8=("kv",)).decode_s(2, 7) == pytest.approx((weights + kv / 2) / 100)


def test_a_batchs_floor_is_its_prefills_and_its_steps():
    prefills, steps = 3 * 99.6, [(2400 + 3 * (4 + i) * 40) / 100 for i in (1, 2)]  # the first of 3 tokens is the prefill's
    assert FLOORS.offline_s(3, 4, 3) == pytest.approx(prefills + sum(steps)) == pytest.approx(360.0)


def test_a_gpus_ceiling_is_the_best_grid_of_the_kernel_that_only_reads(monkeypatch):
    us_of_grid = {400: 2000.0, 800: 1000.0, 1600: 1500.0}
    asked: list[int] = []
    module = SimpleNamespace(read=lambda data, sums, num_programs: asked.append(num_programs))
    monkeypatch.setitem(sys.modules, "ksana_lab.bench._read_kernel", module)
    monkeypatch.setattr(kernels, "_DEVICE", "meta")
    monkeypatch.setattr(kernels, "_num_sms", lambda: 100)
    monkeypatch.setattr(kernels, "median_us", lambda launch: (launch(0), us_of_grid[asked[-1]])[1])
    assert engine.read_bytes_per_s(torch.device("cuda")) == pytest.approx((4 << 30) / 1e-3)  # 4 GiB in the 1000 us of the best


def test_calls_that_warm_up_are_not_in_a_median(monkeypatch):
    seconds = [100.0, 100.0, 100.0, *range(1, 11)]
    stamps = itertools.chain.from_iterable((0.0, each) for each in seconds)
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(stamps)))
    assert engine._median_s(lambda: None, torch.device("cpu")) == 5.5
