import numpy as np
import pytest
import torch

from ksana_lab.engine.sampler import PLAIN_GREEDY, SamplingTable, _pick_logprobs, filter_logits, random_keys
from ksana_lab.layers.race import exponentials
from ksana_lab.types import SamplingParams

VOCAB = 12


def table(*params, tokens=(), num_prompt=None):
    """One row per SamplingParams; ``tokens``: prompt and output of every row."""
    made = SamplingTable(len(params), VOCAB, torch.device("cpu"))
    for row, param in enumerate(params):
        num = len(tokens) if num_prompt is None else num_prompt
        made.set_row(row, param, param.seed or 0, list(tokens), num, [1, 2, VOCAB + 5] if param.min_tokens else [])
    return made


def sample(made, logits, rows=None, ends=None):
    rows = np.arange(len(logits)) if rows is None else np.asarray(rows)
    ends = np.zeros(len(rows), np.int64) if ends is None else np.asarray(ends)
    return made.sample(logits.clone(), made.select(rows, ends, torch.from_numpy))


def draws(param, logits, num):
    """``num`` tokens of one sequence whose logits never change."""
    made = table(param)
    batch = made.select(np.zeros(num, np.int64), np.arange(num), torch.from_numpy)
    return made.sample(logits.expand(num, -1).clone(), batch).token_ids


def chi_square(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


def random_logits(num=1, seed=0, scale=2.0):
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def test_plain_greedy_needs_no_parameters():
    made = table(SamplingParams(temperature=0.0))
    assert made.select(np.zeros(1, np.int64), np.zeros(1, np.int64), torch.from_numpy) is PLAIN_GREEDY
    assert sample(made, torch.eye(VOCAB)[[5]]).token_ids.tolist() == [5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_with_their_probability(temperature):
    logits = random_logits(seed=1)
    tokens = draws(SamplingParams(temperature=temperature, seed=7), logits, 40_000)
    value, freedom = chi_square(tokens, (logits[0] / temperature).softmax(-1))
    assert value < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations of the chi-square distribution


def test_filtered_tokens_come_with_their_renormalised_probability():
    logits = random_logits(seed=2)
    tokens = draws(SamplingParams(temperature=0.9, seed=1, top_k=8, top_p=0.9, min_p=0.03), logits, 40_000)
    one = torch.ones(1, 1)
    kept = filter_logits(logits / 0.9, (one * 8).long(), one * 0.9, one * 0.03)[0]
    value, freedom = chi_square(tokens, kept.softmax(-1))
    assert freedom < VOCAB - 1 and value < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (6, 0.8, 0.05), (1, 0.01, 1.0)])
def test_filters_keep_what_transformers_keeps(seed, top_k, top_p, min_p):
    from transformers.generation import logits_process as hf

    logits = random_logits(4, seed)
    expected = logits
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = hf.MinPLogitsWarper(min_p)(None, expected)
    column = torch.ones(4, 1)
    ours = filter_logits(logits, (column * (top_k or VOCAB)).long(), column * top_p, column * min_p)
    assert torch.equal(ours, expected)


def test_the_race_is_exponential_and_independent_between_positions():
    keys = torch.from_numpy(random_keys(np.full(400, 5, np.uint64), np.arange(400)))
    e = exponentials(keys, 500).double()
    assert abs(e.mean() - 1) < 0.01 and abs(e.var() - 1) < 0.03
    below = (e[:, :, None] < torch.tensor([0.01, 0.5, 2.0])).double().mean(dim=(0, 1))
    assert torch.allclose(below, 1 - torch.exp(-torch.tensor([0.01, 0.5, 2.0]).double()), atol=0.004)
    assert torch.corrcoef(e[:20]).fill_diagonal_(0).abs().max() < 0.2


def test_random_numbers_are_pinned():
    """Two nodes of different versions, or a kernel and this code, must agree: these never change."""
    keys = random_keys(np.array([0, 12345], np.uint64), np.array([0, 7]))
    assert keys.tolist() == [[2802244911, 1293516399], [4225715304, 4203412972]]
    expected = torch.tensor([[0.3081903, 2.2243066, 1.2144188], [1.3700852, 1.6636891, 0.1412513]])
    assert torch.allclose(exponentials(torch.from_numpy(keys), 3), expected)


def test_a_seeded_sequence_does_not_feel_its_batch():
    logits, params = random_logits(6, 3), [SamplingParams(seed=i, top_p=0.9 if i % 2 else 1.0) for i in range(6)]
    made = table(*params)
    together = sample(made, logits, ends=[3] * 6).token_ids
    alone = [int(sample(made, logits[[row]], rows=[row], ends=[3]).token_ids) for row in range(6)]
    backwards = sample(made, logits.flip(0), rows=list(range(6))[::-1], ends=[3] * 6).token_ids.flip(0)
    assert together.tolist() == alone == backwards.tolist()


def test_seed_and_position_both_matter():
    logits = torch.zeros(1, VOCAB)
    by_seed = {tuple(draws(SamplingParams(seed=seed), logits, 8).tolist()) for seed in range(50)}
    assert len(by_seed) == 50
    assert len(set(draws(SamplingParams(seed=3), logits, 200).tolist())) == VOCAB


def test_greedy_rows_in_a_mixed_batch_take_the_largest():
    logits = random_logits(2, 4)
    made = table(SamplingParams(temperature=0.0), SamplingParams(seed=1))
    assert sample(made, logits).token_ids[0] == logits[0].argmax()


def test_repetition_penalty_is_that_of_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, seen = random_logits(1, 5), [0, 3, 3, 7]
    made = table(SamplingParams(temperature=0.0, repetition_penalty=1.7), tokens=seen, num_prompt=2)
    ours = made._penalize(logits.clone(), made.select(np.zeros(1, np.int64), np.array([4]), torch.from_numpy).penalties)
    assert torch.allclose(ours, RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone()))


def test_presence_and_frequency_count_output_tokens_only():
    made = table(SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5), tokens=[4, 4, 6, 6, 8], num_prompt=2)
    batch = made.select(np.zeros(1, np.int64), np.array([5]), torch.from_numpy)
    ours = made._penalize(torch.zeros(1, VOCAB), batch.penalties)[0]
    assert (ours[4], ours[6], ours[8]) == (0.0, -2.0, -1.5)


def test_sampled_tokens_are_counted_on_the_device():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 5] = 1.0, 0.8
    made = table(SamplingParams(temperature=0.0, frequency_penalty=0.3), tokens=[3], num_prompt=1)
    assert [int(sample(made, logits, ends=[i + 1]).token_ids) for i in range(4)] == [3, 5, 3, 5]


def test_ends_are_masked_until_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, 1], logits[0, 2], logits[0, 9] = 3.0, 2.0, 1.0
    made = table(SamplingParams(temperature=0.0, min_tokens=2), tokens=[5], num_prompt=1)
    assert [int(sample(made, logits, ends=[1 + i]).token_ids) for i in range(3)] == [9, 9, 1]


def test_ends_are_masked_in_the_rows_that_ask_for_it_alone():
    logits = torch.zeros(3, VOCAB)
    logits[:, 1], logits[:, 2], logits[:, 9] = 3.0, 2.0, 1.0
    made = table(*[SamplingParams(temperature=0.0)] * 4)
    made.set_row(2, SamplingParams(temperature=0.0, min_tokens=3), 0, [5], 1, [1])
    made.set_row(0, SamplingParams(temperature=0.0, min_tokens=2), 0, [5], 1, [1, 2])
    assert sample(made, logits, rows=[3, 2, 0], ends=[1, 1, 1]).token_ids.tolist() == [1, 2, 9]
    assert sample(made, logits, rows=[1, 0, 2], ends=[3, 3, 3]).token_ids.tolist() == [1, 1, 2]  # row 0 has its two tokens


def test_penalties_follow_the_sequence_that_has_the_table_row_now():
    penalized = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    made = table(*[SamplingParams(temperature=0.0)] * 4)
    for row, prompt in ((2, [5]), (0, [4]), (2, [6])):  # the sequence of row 2 ended, another has it
        made.set_row(row, penalized, 0, prompt, 1, [])
    batch = made.select(np.array([3, 0, 2]), np.array([1, 1, 1]), torch.from_numpy)
    lowered = made._penalize(torch.ones(3, VOCAB), batch.penalties) < 1
    assert lowered.nonzero().tolist() == [[1, 4], [2, 6]]


def test_ids_that_no_tensor_holds_are_no_tokens_to_mask():
    made = table(SamplingParams())
    made.set_row(0, SamplingParams(min_tokens=1), 0, [5], 1, [-1, 2, 1 << 63, (1 << 64) - 1])
    assert made._masked[0].tolist() == [2]


def test_more_logprobs_than_the_vocabulary_has_are_all_of_them():
    logprobs = torch.randn(1, 3).log_softmax(-1)
    assert _pick_logprobs(logprobs, torch.tensor([1]), 20).top_ids.shape == (1, 3)


def test_logprobs_are_raw():
    logits = random_logits(2, 6)
    params = SamplingParams(temperature=0.3, seed=2, logprobs=3, repetition_penalty=1.5)
    made = table(params, SamplingParams(temperature=0.0), tokens=[0, 1, 2])
    got = sample(made, logits, ends=[3, 3])
    raw = logits.log_softmax(-1)
    assert torch.allclose(got.logprobs.chosen, raw.gather(1, got.token_ids[:, None])[:, 0])
    assert torch.equal(got.logprobs.top_ids, raw.topk(3).indices)
    assert (made.num_logprobs(0), made.num_logprobs(1)) == (3, -1)
