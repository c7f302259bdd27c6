"""FP8 through whole engines: weights, KV cache, both, on one node and on a pair."""

import pytest
from helpers_checkpoint import checkpoint, prompts
from helpers_fp8 import widened_checkpoint
from helpers_pair import EnginePair

from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.llm import LLM
from ksana_lab.types import SamplingParams

NUM = 12
FP8_CACHE = {"dtype": "fp8_e4m3"}
GREEDY = SamplingParams(max_tokens=NUM, temperature=0.0, ignore_eos=True)
BATCH = prompts(5, seed=11, longest=50)


@pytest.fixture(autouse=True)
def layer_tracker(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


def generate(model, **options):
    with LLM(str(model), block_size=8, **options) as llm:
        return [result.outputs[0].token_ids for result in llm.generate(BATCH, GREEDY)]


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_fp8_weights_give_the_tokens_of_widened_weights(tmp_path, arch):
    expected = generate(widened_checkpoint(checkpoint(arch), tmp_path / "wide"))
    assert generate(checkpoint(arch), quant_method="fp8_e4m3") == expected
    assert generate(checkpoint(arch), quant_method="fp8_e4m3", prefill_chunk_tokens=13) == expected
    assert generate(checkpoint(arch)) != expected


def test_a_pair_with_fp8_weights_equals_one_node():
    model = {"model_dir": checkpoint(), "quant_method": "fp8_e4m3"}
    with EnginePair(model=model, connector={"backend": "shm"}) as pair:
        assert pair.generate(BATCH, GREEDY) == generate(checkpoint(), quant_method="fp8_e4m3")


def generate_with_fp8_cache(batch=BATCH, arch="qwen3", quant_method="auto", times=1, preempts=False, sampling=GREEDY, **sections):
    config = EngineConfig.model_validate(
        {
            "model": {"model_dir": checkpoint(arch), "quant_method": quant_method},
            "cache": {"block_size": 8, "num_blocks": 160} | FP8_CACHE | sections.pop("cache", {}),
            **sections,
        }
    )
    with LLM(config) as llm:
        for _ in range(times):
            answers = [result.outputs[0].token_ids for result in llm.generate(batch, sampling)]
        assert (llm.engine.status().num_preemptions > 0) == preempts
        return answers


def test_an_fp8_cache_is_read_and_written_alike_in_chunks_and_whole():
    whole = generate_with_fp8_cache()
    assert generate_with_fp8_cache(scheduler={"prefill_chunk_tokens": 13}) == whole != generate(checkpoint())


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 2), ("float32", 4)])
def test_an_fp8_cache_takes_a_byte_a_number(dtype, ratio):
    def block_bytes(cache):
        sections = {"model": {"model_dir": checkpoint(), "dtype": dtype}, "cache": cache}
        with LLM(EngineConfig.model_validate(sections)) as llm:
            return llm.engine._executor.layout.block_bytes

    assert block_bytes({}) == ratio * block_bytes(FP8_CACHE)


@pytest.mark.parametrize("backend", ["tcp", "shm"])
@pytest.mark.parametrize(("mode", "quant_method"), [("bulk", "auto"), ("layer", "fp8_e4m3")])
def test_a_pair_with_fp8_caches_equals_one_node(backend, mode, quant_method):
    model = {"model_dir": checkpoint(), "quant_method": quant_method}
    connector = {"backend": backend, "transfer_mode": mode, "checksum": True}
    with EnginePair(model=model, cache=FP8_CACHE, connector=connector, scheduler={"prefill_chunk_tokens": 13}) as pair:
        assert pair.generate(BATCH, GREEDY) == generate_with_fp8_cache(quant_method=quant_method)
        assert pair.leaks() == {"prefill": 0, "decode": 0}


@pytest.mark.parametrize(("tp", "quant_method"), [((2, 1), "fp8_e4m3"), ((1, 2), "auto")])
def test_fp8_heads_find_their_ranks(tp, quant_method):
    """Ranks sum in another order, and a key halfway between two numbers of 8 bits may then fall to the other: nearly all answers agree."""
    model = {"model_dir": checkpoint(), "quant_method": quant_method}
    with EnginePair(tp=tp, model=model, cache=FP8_CACHE, connector={"backend": "tcp"}) as pair:
        answers = pair.generate(BATCH, GREEDY)
    expected = generate_with_fp8_cache(quant_method=quant_method)
    assert sum(ours == theirs for ours, theirs in zip(answers, expected, strict=True)) >= len(BATCH) - 1


def test_a_prefix_in_an_fp8_cache_is_found_again():
    shared = prompts(1, seed=21, longest=64)[0] * 2
    batch = [shared + tail for tail in prompts(4, seed=22, longest=9)]
    caching = {"enable_prefix_caching": True}
    expected = generate_with_fp8_cache(batch)
    assert generate_with_fp8_cache(batch, cache=caching, times=2) == expected
    with EnginePair(cache=FP8_CACHE | caching, connector={"backend": "shm"}) as pair:
        assert pair.generate(batch, GREEDY) == pair.generate(batch, GREEDY) == expected


def test_an_fp8_cache_is_not_paired_with_another():
    with EnginePair(cache=FP8_CACHE, decode={"cache": {"dtype": "auto"}}) as pair:
        states = [engine.scheduler.connector.pairs for engine in pair.engines.values()]
        pair.drive(lambda: all("differ" in state().get(pair.comm_key, "") for state in states))
        for state in states:
            assert "dtype is float8_e4m3fn on the prefill node and float32 on the decode node" in state()[pair.comm_key]


@pytest.mark.parametrize("scheduler", [{"preemption_mode": "swap"}, {"preemption_mode": "recompute"}])
def test_preempted_sequences_in_an_fp8_cache_go_on_as_if_nothing_had_been(scheduler):
    """Keys that are computed again are rounded as they were, bit for bit."""
    batch = prompts(5, seed=3)
    few, longer = {"num_blocks": 14, "host_memory_factor": 2.0}, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    expected = generate_with_fp8_cache(batch, sampling=longer)
    assert generate_with_fp8_cache(batch, sampling=longer, scheduler=scheduler, cache=few, preempts=True) == expected
