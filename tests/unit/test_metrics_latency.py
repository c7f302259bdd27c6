"""Each latency function against a record whose times were made up by hand."""

import pytest

from ksana_lab.metrics import latency
from ksana_lab.metrics.record import RequestRecord


def record(times, counts=None, **fields) -> RequestRecord:
    counts = counts or [1] * len(times)
    return RequestRecord("r", 8, sum(counts), sent_s=10.0, token_times_s=list(times), token_counts=counts, **fields)


def test_ttft_is_first_message_after_the_post():
    assert latency.ttft_s(record([10.5, 10.6])) == pytest.approx(0.5)


def test_tpot_divides_by_tokens_and_not_by_messages():
    burst = record([11.0, 12.0], counts=[1, 4])
    assert latency.tpot_s(burst) == pytest.approx(1.0 / 4)
    assert latency.itl_s(burst) == pytest.approx([1.0])
    assert latency.itl_per_token_s(burst) == pytest.approx([0.25])


def test_tpot_of_one_token_is_undefined_and_not_zero():
    assert latency.tpot_s(record([10.5])) is None


def test_a_record_without_tokens_has_no_latency():
    empty = record([])
    assert [latency.ttft_s(empty), latency.e2e_s(empty), latency.first_gap_s(empty)] == [None] * 3
    assert latency.itl_s(empty) == []


def test_ttft_and_tpot_add_up_to_end_to_end():
    r = record([10.2, 10.3, 10.7, 10.8])
    assert latency.ttft_s(r) + latency.tpot_s(r) * (r.num_output_tokens - 1) == pytest.approx(latency.e2e_s(r))


def test_send_lag_needs_a_schedule():
    assert latency.send_lag_s(record([11.0], scheduled_s=9.75)) == pytest.approx(0.25)
    assert latency.send_lag_s(record([11.0])) is None


def test_transfer_that_ended_during_prefill_is_not_exposed():
    hidden = record([11.0], phases={"prefill_end": 3.0, "transfer_end": 2.5, "transfer_start": 1.0})
    assert latency.exposed_transfer_s(hidden) == 0.0
    assert latency.transfer_s(hidden) == pytest.approx(1.5)
