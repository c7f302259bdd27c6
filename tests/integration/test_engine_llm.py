import dataclasses

import pytest
from helpers_checkpoint import checkpoint, oracle_greedy, prompts

from ksana_lab.engine.llm import LLM
from ksana_lab.errors import CheckpointError, ConfigError, InvalidRequest, PromptTooLong
from ksana_lab.types import FinishReason, SamplingParams


@pytest.fixture(scope="module")
def llm():
    with LLM(checkpoint(), block_size=8, num_blocks=200, max_model_len=256) as made:
        yield made


def tokens(results):
    return [[output.token_ids for output in result.outputs] for result in results]


def test_text_in_text_out(llm):
    (result,) = llm.generate("The quick brown fox", SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    output = result.outputs[0]
    assert output.token_ids == oracle_greedy("qwen3", tuple(result.prompt_token_ids), 9)
    assert output.text == llm.tokenizer.decode(output.token_ids) and output.finish_reason is FinishReason.LENGTH


def test_a_stop_string_cuts_the_text_and_frees_the_blocks(llm):
    (whole,) = llm.generate(["Once upon"], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    stop = whole.outputs[0].text[8:11]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop=(stop,))
    (result,) = llm.generate(["Once upon"], params)
    assert result.outputs[0].text == whole.outputs[0].text.partition(stop)[0]
    assert result.outputs[0].finish_reason is FinishReason.STOP and len(result.outputs[0].token_ids) < 20
    llm.engine.step()
    assert llm.engine.is_idle and llm.engine.scheduler.check() == 0


def test_stop_token_is_the_last(llm):
    prompt = prompts(1)[0]
    third = oracle_greedy("qwen3", tuple(prompt), 5)[2]
    (result,) = llm.generate([prompt], SamplingParams(max_tokens=5, temperature=0.0, stop_token_ids=(third,), ignore_eos=True))
    assert result.outputs[0].token_ids == oracle_greedy("qwen3", tuple(prompt), 3)
    assert result.outputs[0].finish_reason is FinishReason.STOP


def test_seeded_samples_do_not_depend_on_the_batch(llm):
    batch = prompts(4, seed=2)
    params = [SamplingParams(max_tokens=12, seed=i, top_p=0.95, presence_penalty=0.5, ignore_eos=True) for i in range(4)]
    together = tokens(llm.generate(batch, params))
    alone = [tokens(llm.generate([prompt], param))[0] for prompt, param in zip(batch, params, strict=True)]
    assert together == alone


def test_n_samples_differ_and_the_first_is_that_of_n_1(llm):
    params = SamplingParams(max_tokens=10, seed=5, n=3, temperature=1.5, ignore_eos=True)
    ((first, *others),) = tokens(llm.generate(["Hi"], params))
    assert first == tokens(llm.generate(["Hi"], dataclasses.replace(params, n=1)))[0][0]
    assert len({tuple(ids) for ids in [first, *others]}) == 3


def test_samples_without_a_seed_differ_between_prompts_and_calls():
    params = SamplingParams(n=4, max_tokens=12, ignore_eos=True)

    def drawn(seed):
        with LLM(checkpoint(), num_blocks=100, max_model_len=64, seed=seed) as fresh:
            results = fresh.generate([[5, 6, 7, 8]] * 4, params) + fresh.generate([[5, 6, 7, 8]], params)
        return [tuple(ids) for prompt in tokens(results) for ids in prompt]

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert len(set(first + other)) == 40  # no two samples share a stream of random numbers
    assert again == first


def test_logprobs_come_with_each_token(llm):
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, ignore_eos=True)
    output = llm.generate(["Hi"], params)[0].outputs[0]
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) and len(entry.top) == 2 for entry in output.logprobs)


def test_length_is_bounded_by_the_model(llm):
    (result,) = llm.generate([[5] * 250], SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 6


def test_a_bad_prompt_leaves_nothing_behind(llm):
    for bad, error in (([5] * 256, PromptTooLong), ([], InvalidRequest), ([1 << 20], InvalidRequest)):
        with pytest.raises(error):
            llm.generate([[1, 2], bad])
    with pytest.raises(InvalidRequest, match="another list"):
        llm.generate([1, 2, 3])
    llm.engine.step()
    assert llm.engine.is_idle


def test_two_engines_in_one_process(llm):
    with LLM(checkpoint("llama"), num_blocks=20) as other:
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        prompt = prompts(1)[0]
        assert tokens(llm.generate([prompt], params)) == [[oracle_greedy("qwen3", tuple(prompt), 5)]]
        assert tokens(other.generate([prompt], params)) == [[oracle_greedy("llama", tuple(prompt), 5)]]
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        other.generate(["x"])


def test_wrong_options_name_the_right_one(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'num_blocks'"):
        LLM(checkpoint(), num_block=3)
    with pytest.raises(ConfigError, match=r"LLM: cache\.num_blocks: .* 2, got 1"):
        LLM(checkpoint(), num_blocks=1)
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path))
    with pytest.raises(ConfigError, match="not divide"):
        LLM(checkpoint(), tensor_parallel_size=3)
