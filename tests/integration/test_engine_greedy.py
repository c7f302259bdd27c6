"""The engine's greedy tokens are those of transformers, however the scheduler cut and mixed the work."""

import pytest
from helpers_checkpoint import ARCHITECTURES, checkpoint, oracle_greedy, prompts

from ksana_lab.engine.llm import LLM
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
