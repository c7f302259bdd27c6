"""Percentiles, throughput, goodput, attainment and intervals of small made-up runs."""

import math
import statistics

import pytest

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import CANCELLED, SLO, confidence_interval, goodput_rps_per_gpu, slo_attainment, summarize


def answered(ttft, *, sent=0.0, tokens=5, gap=0.1) -> RequestRecord:
    times = [sent + ttft + k * gap for k in range(tokens)]
    return RequestRecord("r", 10, tokens, sent_s=sent, token_times_s=times, token_counts=[1] * tokens, finished_s=times[-1])


def failed() -> RequestRecord:
    return RequestRecord("f", 10, sent_s=0.0, finished_s=0.1, error="503: unavailable")


def cancelled() -> RequestRecord:
    return RequestRecord("c", 10, sent_s=0.0, finished_s=0.1, error="cancelled by the client", finish_reason=CANCELLED)


def test_throughput_is_of_completed_requests_over_first_send_to_last_end():
    summary = summarize([answered(0.6), answered(0.6, sent=1.0), failed()])
    assert summary.duration_s == pytest.approx(2.0)
    assert summary.request_throughput_rps == pytest.approx(1.0)
    assert summary.total_throughput_tps == pytest.approx((2 * 10 + 2 * 5) / 2.0)
    assert (summary.num_completed, summary.num_failed) == (2, 1)


def test_a_failure_counts_against_attainment_and_not_into_latency():
    summary = summarize([answered(0.1), failed()], slo=SLO(ttft_s=0.2))
    assert summary.slo_attainment == 0.5
    assert summary.ttft_s.count == 1


def test_a_request_the_client_cancelled_counts_neither_way():
    assert slo_attainment([answered(0.1), cancelled()], SLO(ttft_s=0.2)) == 1.0


def test_every_bound_must_hold():
    slow_tokens = answered(0.1, gap=0.3)
    assert SLO(ttft_s=0.2).is_met_by(slow_tokens)
    assert not SLO(ttft_s=0.2, tpot_s=0.2).is_met_by(slow_tokens)


def test_itl_bounds_the_worst_gap_where_tpot_bounds_the_mean():
    stalled = RequestRecord("s", 1, 4, sent_s=0, token_times_s=[1.0, 1.01, 1.5, 1.51], token_counts=[1] * 4)
    assert SLO(tpot_s=0.2).is_met_by(stalled)
    assert not SLO(itl_s=0.2).is_met_by(stalled)


def test_goodput_is_met_requests_per_second():
    summary = summarize([answered(0.6), answered(0.1, sent=1.5)], slo=SLO(ttft_s=0.2))
    assert summary.goodput_rps == pytest.approx(1 / 2.0)


def test_an_unknown_slo_metric_names_the_nearest():
    with pytest.raises(ConfigError, match=r"slo.tfft_s .* did you mean ttft_s"):
        SLO.from_dict({"tfft_s": 0.2})
    with pytest.raises(ConfigError, match=r"slo.ttft_s must be a number of seconds above 0"):
        SLO.from_dict({"ttft_s": "200ms"})


def test_goodput_per_gpu_is_interpolated_at_the_first_crossing():
    assert goodput_rps_per_gpu([4, 1, 2], [0.5, 1.0, 1.0], num_gpus=2) == pytest.approx((2 + 2 * 0.1 / 0.5) / 2)
    assert goodput_rps_per_gpu([1, 2], [0.5, 0.95], num_gpus=1) == 0.0
    assert goodput_rps_per_gpu([1, 2], [1.0, 0.95], num_gpus=1) == 2.0


def test_confidence_interval_is_students():
    interval = confidence_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(confidence_interval([1.0]).half_width)


@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (31, 2.0423), (32, 2.0395), (41, 2.0211), (121, 1.9799), (10_001, 1.9602)])
def test_the_interval_is_students_for_any_number_of_repeats(count, t):
    values = [1.0, 2.0] * (count // 2) + [1.5] * (count % 2)
    standard_error = statistics.stdev(values) / math.sqrt(count)
    assert confidence_interval(values).half_width == pytest.approx(t * standard_error, rel=5e-4)


def test_an_empty_run_has_no_latency_rather_than_zero():
    summary = summarize([])
    assert summary.ttft_s.count == 0
    assert math.isnan(summary.ttft_s.p99)
