"""FP8 through whole engines: weights, KV cache, both, on one node and on a pair."""

import pytest
from helpers_checkpoint import checkpoint, prompts
from helpers_fp8 import widened_checkpoint
from helpers_pair import EnginePair

from ksana_lab.engine.llm import LLM
from ksana_lab.types import SamplingParams

NUM = 12
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


@pytest.mark.parametrize("tp", [(1, 1), (2, 1)])
def test_a_pair_with_fp8_weights_equals_one_node(tp):
    model = {"model_dir": checkpoint(), "quant_method": "fp8_e4m3"}
    with EnginePair(tp=tp, model=model, connector={"backend": "shm"}) as pair:
        assert pair.generate(BATCH, GREEDY) == generate(checkpoint(), quant_method="fp8_e4m3")
