"""What the demo and the notebooks say of two runs."""

import pytest

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import CANCELLED
from ksana_lab.notebook import demo
from ksana_lab.notebook.session import config, different_tokens, latency_table


def answer(ids, error=None) -> RequestRecord:
    times = [1.0 + 0.1 * k for k in range(len(ids))]
    counts = [1] * len(ids)
    return RequestRecord("r", 7, len(ids), sent_s=0.5, token_times_s=times, token_counts=counts, output_token_ids=list(ids), error=error)


def test_equal_answers_have_no_difference():
    assert different_tokens([answer([1, 2]), answer([3])], [answer([1, 2]), answer([3])]) == []


def test_the_first_differing_token_is_named():
    assert different_tokens([answer([1, 2, 3])], [answer([1, 9, 3])]) == [
        "request 0 (7 prompt tokens): differs from token 1 on, of 3 and 3"
    ]
    assert "from token 2 on, of 3 and 2" in different_tokens([answer([1, 2, 3])], [answer([1, 2])])[0]


@pytest.mark.parametrize(
    "expected, got",
    [([answer([1])], []), ([answer([1], error="503: gone")], [answer([1])]), ([answer([])], [answer([])])],
)
def test_missing_failed_and_empty_answers_are_not_identical(expected, got):
    assert different_tokens(expected, got)


def test_verdict_counts_tokens_and_fails_when_one_differs(capsys):
    assert demo._verdict([answer([1, 2])], [answer([1, 2])])
    assert "every token identical: 1 requests, 2 tokens" in capsys.readouterr().out
    assert not demo._verdict([answer([1, 2])], [answer([1, 3])])


def test_latency_table_is_in_milliseconds_and_counts_failures():
    table = latency_table({"a": [answer([1, 2, 3]), answer([], error="503: gone")]})
    assert table.loc["a", "TTFT p50 (ms)"] == 500.0
    assert table.loc["a", "TPOT p99 (ms)"] == 100.0
    assert (table.loc["a", "requests"], table.loc["a", "failed"]) == (2, 1)


def test_a_request_that_the_client_cancelled_is_neither_counted_nor_failed():
    cancelled = answer([1], error="cancelled by the client")
    cancelled.finish_reason = CANCELLED
    table = latency_table({"a": [answer([1, 2, 3]), cancelled]})
    assert (table.loc["a", "requests"], table.loc["a", "failed"]) == (1, 0)


def test_an_unknown_config_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"pd_1p1d_cpu\.yaml"):
        config("nothing.yaml")
