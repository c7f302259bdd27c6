"""The decoder on a GPU: the CPU's logits, varied tokens from large random shapes, and ranks over NCCL."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from helpers_model import PagedBatch

from ksana_lab.attention.base import load_backend
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.registry import load_model, random_model
from ksana_lab.models.synth import SHAPES, synthesize

PROMPT = list(range(3, 303))


def two_steps(path, device: str, backend: str, tp: TPGroup | None = None) -> torch.Tensor:
    """Logits [2, vocab] after a prompt and after one more token, float32."""
    model = load_model(ModelConfig.from_dir(path), path, dtype=torch.float32, device=torch.device(device), tp=tp)
    batch = PagedBatch(model, block_size=16, device=device, backend=load_backend(backend))
    seq = batch.new_sequence(320)
    prefill, decode = batch.step([(seq, PROMPT)])[0][-1:], batch.step([(seq, [7])])[0]
    return torch.cat([prefill, decode]).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_logits_equal_those_of_the_cpu(tmp_path, arch):
    path = synthesize(tmp_path / arch, arch, "tiny")
    torch.testing.assert_close(two_steps(path, "cuda", "sdpa"), two_steps(path, "cpu", "sdpa"), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2-0.5b", "llama-1b", "qwen3-8b"])
def test_large_random_shapes_answer_with_varied_tokens(name):
    device = torch.device("cuda")
    model = random_model(SHAPES[name], dtype=torch.bfloat16, device=device)
    batch = PagedBatch(model, block_size=16, device=device)
    output = batch.greedy(PROMPT[:40], 48)
    assert len(set(output)) > 32
    assert output != batch.greedy(PROMPT[:39], 48)  # what is far back matters


def rank_logits(rank: int, init_method: str, path: str) -> torch.Tensor:
    torch.cuda.set_device(rank)
    tp = TPGroup.connect(rank, 2, init_method, backend="nccl", timeout_s=60)
    logits = two_steps(path, f"cuda:{rank}", "sdpa", tp)
    tp.close()
    return logits


@pytest.mark.multi_gpu
def test_two_gpus_over_nccl_equal_one(tmp_path):
    path = str(synthesize(tmp_path / "model", "qwen3", "tiny"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        work = pool.starmap_async(rank_logits, [(rank, f"file://{tmp_path}/meeting", path) for rank in range(2)])
        one, other = work.get(timeout=110)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, two_steps(path, "cuda", "sdpa"), rtol=1e-3, atol=1e-3)
