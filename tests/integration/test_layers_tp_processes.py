"""Two ranks as two processes, as an engine runs them."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from helpers_model import PagedBatch

from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.registry import load_model
from ksana_lab.models.synth import synthesize

pytestmark = pytest.mark.integration


def generate(rank: int, size: int, init_method: str, path: str) -> list[int]:
    torch.set_num_threads(1)
    tp = TPGroup.connect(rank, size, init_method, timeout_s=60)
    model = load_model(ModelConfig.from_dir(path), path, dtype=torch.float32, device=torch.device("cpu"), tp=tp)
    tokens = PagedBatch(model).greedy(list(range(5, 40)), 24)
    tp.barrier()
    tp.close()
    return tokens


def test_two_processes_generate_what_one_does(tmp_path):
    path = str(synthesize(tmp_path / "model", "qwen3", "tiny"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap_async(generate, [(rank, 2, f"file://{tmp_path}/meeting", path) for rank in range(2)]).get(timeout=100)
    assert results[0] == results[1] == generate(0, 1, "", path)
