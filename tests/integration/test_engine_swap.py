"""An engine that swaps preempted sequences to host memory says what transformers says, and gives every block back."""

import pytest
from helpers_checkpoint import checkpoint, oracle_greedy, prompts
from helpers_pair import EnginePair

from ksana_lab.config.engine import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions
from ksana_lab.engine.engine import Engine
from ksana_lab.engine.llm import LLM
from ksana_lab.errors import ConfigError
from ksana_lab.protocol.engine import AddRequest
from ksana_lab.types import SamplingParams

NUM = 16
GREEDY = SamplingParams(max_tokens=NUM, temperature=0.0, ignore_eos=True)
SWAP = {"preemption_mode": "swap", "host_memory_factor": 2.0}


def expected(batch, arch="qwen3"):
    return [oracle_greedy(arch, tuple(prompt), NUM) for prompt in batch]


def is_clean(status):
    free = status.num_free_blocks == status.num_blocks and status.num_free_host_blocks == status.num_host_blocks
    return free and status.num_leaked_blocks == status.num_swapped == 0


def check(batch, arch="qwen3", **options):
    """Run ``batch`` and compare; returns the engine's counters."""
    with LLM(checkpoint(arch), block_size=8, **SWAP | options) as llm:
        results = llm.generate(batch, GREEDY)
        status = llm.engine.status()
    assert [result.outputs[0].token_ids for result in results] == expected(batch, arch)
    assert is_clean(status)
    return status


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_after_swapping(arch):
    status = check(prompts(5, seed=3), arch, num_blocks=14)
    assert status.num_swap_ins == status.num_swap_outs == status.num_preemptions > 0 and status.num_host_blocks == 28


def test_what_finds_no_host_block_is_computed_again():
    status = check(prompts(8, seed=3, longest=30), num_blocks=14, host_memory_factor=0.3)
    assert 0 < status.num_swap_outs < status.num_preemptions


def test_with_prefix_hits_and_chunks():
    batch = [prompts(1, seed=5)[0] + tail for tail in prompts(6, seed=6)]
    options = {"num_blocks": 18, "enable_prefix_caching": True, "prefill_chunk_tokens": 9, "max_num_seqs": 4}
    assert check(batch, **options).num_swap_ins > 0


def test_tensor_parallel_ranks_swap_their_heads():
    assert check(prompts(5, seed=3), tensor_parallel_size=2, num_blocks=14, prefill_chunk_tokens=20).num_swap_ins > 0


@pytest.mark.parametrize("dtype", ["auto", "fp8_e4m3"])
def test_swapping_changes_no_bit_of_what_follows(dtype):
    """Probabilities as in a run that has room for all."""
    params = SamplingParams(max_tokens=NUM, temperature=0.0, logprobs=3, ignore_eos=True)
    said = []
    for num_blocks in (14, 100):
        cache = CacheOptions(block_size=8, num_blocks=num_blocks, dtype=dtype)
        with LLM(EngineConfig(model=ModelOptions(model_dir=checkpoint()), cache=cache), **SWAP) as llm:
            said.append([result.outputs[0].logprobs for result in llm.generate(prompts(5, seed=3), params)])
            assert (llm.engine.status().num_swap_ins > 0) == (num_blocks == 14)
    assert said[0] == said[1]


def test_pipelined_steps_and_seeded_sampling():
    batch = prompts(5, seed=3)
    sampling = SamplingParams(max_tokens=NUM, temperature=1.2, top_p=0.9, seed=4, presence_penalty=0.5, ignore_eos=True)
    with LLM(checkpoint(), block_size=8, num_blocks=100) as llm:
        alone = [result.outputs[0].token_ids for result in llm.generate(batch, sampling)]
    config = EngineConfig(
        model=ModelOptions(model_dir=checkpoint()),
        cache=CacheOptions(block_size=8, num_blocks=14, host_memory_factor=2.0),
        scheduler=SchedulerOptions(prefill_chunk_tokens=20, preemption_mode="swap"),
    )
    engine, tokens = Engine(config, pipeline_depth=1), {str(i): [] for i in range(5)}
    try:
        for i, prompt in enumerate(batch):
            engine.add(AddRequest(str(i), prompt, sampling, arrival_ns=1 << 62))
        while not engine.is_idle:
            for update in engine.step():
                tokens[update.request_id] += update.new_token_ids
        assert engine.status().num_swap_ins > 0 and is_clean(engine.status())
    finally:
        engine.close()
    assert list(tokens.values()) == alone


@pytest.mark.parametrize("depth", [0, 1])
def test_a_decode_node_swaps_and_says_the_same(monkeypatch, depth):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")
    batch = prompts(6, seed=31, longest=40)
    options = {"cache": {"num_blocks": 15, "host_memory_factor": 2.0}, "scheduler": {"preemption_mode": "swap"}}
    with EnginePair(connector={"backend": "shm"}, **options) as pair:
        pair.engines["decode"]._depth = depth
        assert pair.generate(batch, GREEDY) == expected(batch)
        assert pair.engines["decode"].status().num_swap_ins > 0
        assert all(is_clean(engine.status()) for engine in pair.engines.values())


def test_more_than_the_host_has_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"block_host_memory_factor 1e\+09 asks for .* GiB are available"):
        LLM(checkpoint(), num_blocks=64, **SWAP | {"host_memory_factor": 1e9})


def test_no_host_blocks_means_recompute_and_is_said_once(caplog):
    with caplog.at_level("INFO"):
        status = check(prompts(5, seed=3), num_blocks=14, host_memory_factor=0.0)
    assert status.num_preemptions > 0 and status.num_swap_outs == status.num_host_blocks == 0
    assert caplog.text.count("preempted sequences are computed again") == 1
