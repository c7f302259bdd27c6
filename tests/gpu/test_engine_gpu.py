"""The engine on CUDA: steps overlap, memory is measured, ranks meet over NCCL. Compared are runs that do the same arithmetic."""

import gc
import os
import signal

import pytest
import torch

from ksana_lab.engine.llm import LLM
from ksana_lab.errors import EngineDead
from ksana_lab.models.synth import synthesize
from ksana_lab.types import SamplingParams

PROMPTS = [[(i * j) % 150_000 + 5 for j in range(1, 40 + 60 * i)] for i in range(1, 9)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, seed=3, top_p=0.9, top_k=50, presence_penalty=0.4, logprobs=2, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(synthesize(tmp_path_factory.mktemp("checkpoint") / "q", "qwen3", "0.6b", has_weights=False))


def outputs(llm, params):
    return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, params)]


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_overlapping_steps_say_what_waiting_ones_say(model_dir, params):
    said = []
    for depth in (0, 1):
        with LLM(model_dir, num_blocks=2000) as llm:
            llm.engine._depth = depth
            said.append(outputs(llm, params))
            assert llm.engine.is_idle and llm.engine.scheduler.check() == 0
    assert said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_replayed_graphs_say_what_eager_steps_say(model_dir, params):
    said = []
    for has_graphs in (False, True):
        with LLM(model_dir, num_blocks=2000, max_num_seqs=16, enable_cuda_graph=has_graphs, few_rows_linear=False) as llm:
            said.append(outputs(llm, params))
    assert said[0] == said[1]


@pytest.mark.gpu
def test_the_cache_takes_what_is_left_and_a_step_still_fits(model_dir):
    gc.collect()
    torch.cuda.empty_cache()  # of models of earlier tests
    free, total = torch.cuda.mem_get_info()
    with LLM(model_dir, max_num_batched_tokens=16384, max_num_seqs=256, reserved_memory_ratio=0.1) as llm:
        cache = llm.engine.status().num_blocks * llm._engine._executor.layout.block_bytes
        assert 0.5 * free < cache < free - 0.1 * total
        llm.generate([[7] * 4096] * 8, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))


@pytest.mark.multi_gpu
def test_two_ranks_agree_with_one(model_dir):
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, ignore_eos=True)
    best = []
    for size in (1, 2):
        with LLM(model_dir, num_blocks=2000, tensor_parallel_size=size) as llm:
            best.append([result.outputs[0].logprobs[0] for result in llm.generate(PROMPTS, params)])
            outputs(llm, GREEDY)
    errors = [abs(one.logprob - two.logprob) for one, two in zip(*best, strict=True) if one.token_id == two.token_id]
    assert len(errors) >= len(PROMPTS) // 2 and max(errors) < 0.5


@pytest.mark.multi_gpu
@pytest.mark.timeout(100)  # it may not hang: graphs hold the communicator, kernels wait for the rank that is gone
def test_a_rank_that_is_killed_ends_the_engine(model_dir):
    with LLM(model_dir, num_blocks=2000, tensor_parallel_size=2) as llm:
        outputs(llm, GREEDY)
        os.kill(llm.engine._executor._children[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="rank 1"):
            outputs(llm, GREEDY)
