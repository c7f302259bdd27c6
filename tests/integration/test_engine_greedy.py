"""The engine's greedy tokens are those of transformers, however the scheduler cut and mixed the work."""

import pytest
from helpers_checkpoint import ARCHITECTURES, checkpoint, oracle_greedy, prompts

from ksana_lab.config.engine import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions
from ksana_lab.engine.engine import Engine
from ksana_lab.engine.llm import LLM
from ksana_lab.protocol.engine import AddRequest
from ksana_lab.types import SamplingParams

NUM = 16
GREEDY = SamplingParams(max_tokens=NUM, temperature=0.0, ignore_eos=True)


def check(arch, batch, **options):
    """Run ``batch`` and compare; returns the engine's counters."""
    with LLM(checkpoint(arch), block_size=8, **options) as llm:
        results = llm.generate(batch, GREEDY)
        status = llm.engine.status()
    expected = [oracle_greedy(arch, tuple(prompt), NUM) for prompt in batch]
    assert [result.outputs[0].token_ids for result in results] == expected
    assert status.num_free_blocks == status.num_blocks and status.num_leaked_blocks == 0
    return status


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batched(arch):
    assert check(arch, prompts(6)).steps < 6 * NUM


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chunked(arch):
    check(arch, prompts(5), prefill_chunk_tokens=7, max_num_batched_tokens=19)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_with_prefix_hits(arch):
    shared = prompts(1, seed=9)[0] * 3
    batch = [shared[:30] + tail for tail in prompts(4, longest=12)] + [shared[:24]]
    assert check(arch, batch, enable_prefix_caching=True).prefix_hit_tokens == 3 * 24 + 16


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_after_preemption(arch):
    assert check(arch, prompts(5, seed=3), num_blocks=14).num_preemptions > 0


def test_everything_at_once():
    batch = [prompts(1, seed=5)[0] + tail for tail in prompts(6, seed=6)]
    options = {"num_blocks": 18, "enable_prefix_caching": True, "prefill_chunk_tokens": 9, "max_num_seqs": 4}
    assert check("qwen3", batch, **options).num_preemptions > 0


def test_tensor_parallel_ranks_say_the_same():
    batch = prompts(5, seed=3)
    assert check("qwen3", batch, tensor_parallel_size=2, num_blocks=14, prefill_chunk_tokens=20).num_preemptions > 0


def test_pipelined_steps_say_the_same():
    """As on CUDA: a step is scheduled before the tokens of the one before are known."""
    batch = prompts(5, seed=3)
    cache = CacheOptions(block_size=8, num_blocks=14, enable_prefix_caching=True)
    config = EngineConfig(model=ModelOptions(model_dir=checkpoint()), cache=cache, scheduler=SchedulerOptions(prefill_chunk_tokens=20))
    engine, tokens = Engine(config, pipeline_depth=1), {str(i): [] for i in range(5)}
    try:
        for i, prompt in enumerate(batch):
            engine.add(AddRequest(str(i), prompt, GREEDY, arrival_ns=1 << 62))
        while not engine.is_idle:
            for update in engine.step():
                tokens[update.request_id] += update.new_token_ids
        assert engine.scheduler.num_preemptions > 0 and engine.scheduler.check() == 0
    finally:
        engine.close()
    assert list(tokens.values()) == [oracle_greedy("qwen3", tuple(prompt), NUM) for prompt in batch]
