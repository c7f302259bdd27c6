"""Same spec, same requests; lengths exact; faults told in one line."""

import math

import numpy as np
import pytest

from ksana_lab import WorkloadSpec
from ksana_lab.errors import ConfigError

AZURE = {"path": "azure_llm_2023_conv_sample"}
MOONCAKE = {"path": "mooncake_synthetic_sample"}


def prompts(**fields) -> list[list[int]]:
    return [r.prompt_token_ids.tolist() for r in WorkloadSpec.from_dict(fields).build().requests]


def test_the_line_of_the_readme_works():
    workload = WorkloadSpec(rate=4, num_requests=200, seed=0).build()
    assert len(workload.requests) == 200
    assert workload.requests[0].at_s == 0.0


def test_same_spec_same_requests_and_another_seed_others():
    same = dict(rate=4, num_requests=5, prompt_tokens={"kind": "lognormal", "median": 30, "sigma": 1.0})
    assert prompts(**same, seed=1) == prompts(**same, seed=1)
    assert prompts(**same, seed=1) != prompts(**same, seed=2)


def test_the_requests_of_a_spec_are_those_of_last_year():
    request = WorkloadSpec(rate=4, num_requests=3, seed=7).build(vocab_size=1000).requests[1]
    assert request.prompt_token_ids[:4].tolist() == [718, 532, 254, 52]
    assert request.at_s == pytest.approx(0.204166, abs=1e-6)


def test_asking_for_more_or_for_a_warmup_keeps_the_first_requests():
    assert prompts(rate=4, num_requests=9, num_warmup=3)[:4] == prompts(rate=4, num_requests=4)


def test_prompts_have_exactly_the_length_asked_for():
    workload = WorkloadSpec.from_dict(dict(rate=4, num_requests=50, prompt_tokens={"kind": "uniform", "low": 1, "high": 40})).build(512)
    lengths = [r.num_prompt_tokens for r in workload.requests]
    assert min(lengths) >= 1 and max(lengths) <= 40 and len(set(lengths)) > 10
    assert all(r.prompt_token_ids.min() >= 0 and r.prompt_token_ids.max() < 512 for r in workload.requests)


def test_shared_prefixes_are_part_of_the_length():
    a, b = prompts(rate=4, num_requests=2, prompt_tokens=20, shared_prefix={"tokens": 16})
    assert a[:16] == b[:16] and a[16:] != b[16:]
    assert len(a) == 20


def test_a_prompt_no_longer_than_its_prefix_keeps_a_token_of_its_own():
    heads = {tuple(p[:7]) for p in prompts(rate=4, num_requests=20, prompt_tokens=8, shared_prefix={"tokens": 16})}
    tails = {p[7] for p in prompts(rate=4, num_requests=20, prompt_tokens=8, shared_prefix={"tokens": 16})}
    assert len(heads) == 1 and len(tails) > 1


def test_prefix_groups_split_the_requests():
    heads = {tuple(p[:16]) for p in prompts(rate=4, num_requests=60, prompt_tokens=20, shared_prefix={"tokens": 16, "num_groups": 3})}
    assert len(heads) == 3


def test_clipping_is_reported():
    spec = WorkloadSpec.from_dict(dict(trace=AZURE, prompt_scale=0.1, output_scale=0.1, max_prompt_tokens=64, max_total_tokens=70))
    workload = spec.build()
    assert all(r.num_prompt_tokens <= 64 and r.num_prompt_tokens + r.max_tokens <= 70 for r in workload.requests)
    assert workload.lengths.num_prompts_clipped > 0
    assert "prompts x 0.1" in str(workload.lengths) and "clipped by" in str(workload.lengths)


def test_equal_mooncake_hashes_are_equal_tokens():
    rows = WorkloadSpec.from_dict(dict(trace=MOONCAKE, prompt_scale=1 / 64)).build().requests
    shared = [r.prompt_token_ids[:8].tolist() for r in rows]
    assert 1 < len({tuple(s) for s in shared}) < len(shared)


def test_trace_times_are_stretched_by_time_scale():
    once = WorkloadSpec.from_dict(dict(trace=AZURE, num_requests=10)).build().requests
    twice = WorkloadSpec.from_dict(dict(trace=AZURE, num_requests=10, time_scale=2)).build().requests
    assert twice[9].at_s == pytest.approx(2 * once[9].at_s)


def test_a_rate_replaces_the_trace_times():
    spec = WorkloadSpec.from_dict(dict(trace=AZURE, num_requests=5, rate=10, burstiness=math.inf))
    assert np.diff([r.at_s for r in spec.build().requests]) == pytest.approx(0.1)


def test_cancelled_share_is_near_what_was_asked():
    requests = WorkloadSpec(rate=4, num_requests=400, cancel_share=0.25).build().requests
    points = [r.cancel_after_messages for r in requests if r.cancel_after_messages is not None]
    assert 70 < len(points) < 130
    assert min(points) >= 0 and max(points) < 32


def test_a_spec_survives_yaml(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("rate: 2\nprompt_tokens: {kind: empirical, tokens: [8, 16], weights: [1, 3]}\ntrace: {path: mine.csv, skip: 1}\n")
    (tmp_path / "mine.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,4\n2023-11-16 18:15:47,3,4\n")
    spec = WorkloadSpec.from_yaml(path)
    assert len(spec.build().requests) == 1
    assert WorkloadSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "fields, told",
    [
        ({}, "say when requests are sent"),
        ({"rate": 1, "users": 2}, "exclude each other"),
        ({"rte": 1, "rate": 1}, "workload: rte is not a known key; did you mean rate"),
        ({"rate": 0}, "workload: rate: input should be greater than 0, got 0"),
        ({"rate": 1, "prompt_tokens": {"kind": "uniform", "low": 9, "high": 3}}, "low 9 is above high 3"),
        ({"rate": 1, "time_scale": 2}, "time_scale stretches a trace's own times"),
        ({"rate": math.inf, "ramp_to": 2}, "ramp_to needs a finite rate"),
    ],
)
def test_a_bad_field_is_one_clear_line(fields, told):
    with pytest.raises(ConfigError, match=told) as caught:
        WorkloadSpec.from_dict(fields)
    assert "\n" not in str(caught.value)


def test_a_trace_shorter_than_asked_is_an_error():
    with pytest.raises(ConfigError, match="has 200 requests: cannot take 300"):
        WorkloadSpec.from_dict(dict(trace=AZURE, num_requests=300)).build()


def test_a_trace_begins_again_where_it_is_told_to():
    trace = {"path": "azure_llm_2023_conv_sample", "skip": 198, "cycle": True}
    requests = WorkloadSpec(trace=trace, rate=5, num_requests=5).build().requests
    assert [r.max_tokens for r in requests[:2]] == [r.max_tokens for r in requests[2:4]]
    with pytest.raises(ConfigError, match="cannot take 5"):
        WorkloadSpec(trace={**trace, "cycle": False}, rate=5, num_requests=5).build()


def test_the_second_turn_of_a_trace_shares_no_prompt_with_the_first_and_as_much_within():
    rows = prompts(trace={**MOONCAKE, "cycle": True}, prompt_scale=1 / 16, rate=9, num_requests=200)
    heads = [tuple(p[:4]) for p in rows]
    first, second = set(heads[:100]), set(heads[100:])
    assert not first & second and len(first) == len(second) < 100


def lengths_of(num_requests: int, seed: int, order: str = "stratified") -> list[int]:
    trace = {**MOONCAKE, "order": order, "cycle": True}
    workload = WorkloadSpec.from_dict(dict(trace=trace, rate=9, num_requests=num_requests, seed=seed, max_prompt_tokens=15_360)).build()
    return [r.num_prompt_tokens for r in workload.requests]


def test_few_stratified_rows_are_like_the_whole_trace():
    whole = np.mean(lengths_of(100, 0, "recorded"))
    assert {round(np.mean(lengths_of(20, seed)) / whole, 1) for seed in range(20)} <= {0.9, 1.0, 1.1}
    assert abs(np.mean(lengths_of(20, 0, "recorded")) / whole - 1) > 0.2


def test_each_seed_takes_other_rows_in_another_order_and_no_row_twice():
    assert lengths_of(20, 1) != lengths_of(20, 2) != sorted(lengths_of(20, 2))
    assert sorted(lengths_of(100, 1)) == sorted(lengths_of(100, 0, "recorded"))
    assert sorted(lengths_of(130, 1)[:100]) == sorted(lengths_of(100, 1))


def test_a_stratified_trace_has_no_times_of_its_own():
    with pytest.raises(ConfigError, match=r"trace\.order: stratified needs rate or users"):
        WorkloadSpec.from_dict({"trace": {**AZURE, "order": "stratified"}})


def test_a_trace_does_not_happen_twice_at_its_own_times():
    with pytest.raises(ConfigError, match=r"trace\.cycle needs rate or users"):
        WorkloadSpec.from_dict({"trace": {"path": "azure_llm_2023_conv_sample", "cycle": True}})


def test_an_empty_answer_of_a_trace_is_sent_as_one_token_and_told(tmp_path):
    """Nobody can ask for no token; that the mean is not the trace's must not go unsaid."""
    path = tmp_path / "zero.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46,8,0\n" * 3 + "2023-11-16 18:15:47,8,5\n")
    workload = WorkloadSpec.from_dict({"trace": {"path": str(path)}}).build()
    assert [request.max_tokens for request in workload.requests] == [1, 1, 1, 5]
    assert workload.lengths.is_changed and "3 empty outputs sent as 1 token" in str(workload.lengths)


def test_too_short_a_trace_says_how_to_send_more():
    with pytest.raises(ConfigError, match=r"has 200 requests: cannot take 201 after skipping 0; with rate or users, trace\.cycle: true"):
        WorkloadSpec.from_dict({"trace": AZURE, "rate": 9, "num_requests": 201}).build()
