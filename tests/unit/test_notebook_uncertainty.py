"""Intervals of shares and of goodput, over repeats and of a single run."""

import math

import pandas as pd
import pytest

from ksana_lab.notebook.uncertainty import (
    GOODPUT,
    Estimate,
    estimate,
    goodput,
    goodput_estimate,
    interval_table,
    wilson,
    with_attainment_interval,
)


def runs(attainments, *, count=100, repeats=1) -> pd.DataFrame:
    rows = [{"rate": rate, "slo_attainment": share, "repeat": k} for rate, share in attainments.items() for k in range(repeats)]
    facts = {"system": "disaggregated", "split": "1P1D", "num_gpus": 2, "is_trustworthy": True, "num_failed": 0}
    return pd.DataFrame(rows).assign(num_completed=count, **facts)


def test_a_share_of_few_requests_may_be_far_off():
    assert wilson(18, 20) == (pytest.approx(0.699, abs=1e-3), pytest.approx(0.972, abs=1e-3))
    assert wilson(20, 20) == (pytest.approx(0.839, abs=1e-3), 1.0)
    assert all(map(math.isnan, wilson(0, 0)))


def test_goodput_lies_between_those_of_the_bounds_of_attainment():
    found = goodput_estimate(goodput(runs({2: 1.0, 4: 0.8})))
    assert found.value == pytest.approx(3 / 2)
    assert 2 / 2 < found.low < found.value < found.high < 4 / 2


def test_twenty_good_requests_do_not_show_that_nine_in_ten_are():
    assert goodput_estimate(goodput(runs({2: 1.0, 4: 0.1}, count=20))).low == 0.0


def test_a_highest_rate_that_may_have_met_the_target_leaves_the_goodput_open():
    nearly = goodput_estimate(goodput(runs({2: 1.0, 4: 0.88})))
    assert not nearly.is_lower_bound and math.isinf(nearly.high)
    met = goodput_estimate(goodput(runs({2: 1.0, 4: 1.0})))
    assert met.is_lower_bound and str(met) == "at least 2"


def test_below_the_lowest_rate_nothing_is_known():
    found = goodput_estimate(goodput(runs({8: 0.1, 16: 0.0})))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 8 / 2)


def test_repeats_that_differ_more_than_their_requests_explain_speak_for_themselves():
    table = pd.DataFrame({GOODPUT: [1.0, 2.0, 3.0], f"{GOODPUT}_low": [0.9, 1.9, 2.9], f"{GOODPUT}_high": [1.1, 2.1, 3.1]})
    assert estimate(table, GOODPUT).high == pytest.approx(2.0 + 4.303 / math.sqrt(3))


def test_repeats_that_agree_by_chance_are_as_uncertain_as_their_requests():
    """Student's t knows no width here; of 2 times 16 requests that all met the SLO, Wilson's does."""
    table = with_attainment_interval(runs({4: 1.0}, count=16, repeats=2))
    found = estimate(table, "slo_attainment")
    assert found.value == found.high == 1.0
    assert wilson(16, 16)[0] < found.low == pytest.approx(1 - (1 - wilson(16, 16)[0]) / math.sqrt(2))
    assert goodput_estimate(goodput(runs({4: 1.0, 8: 0.5}, count=16, repeats=2))).low < 4 / 2


def test_an_interval_does_not_end_beyond_the_rates_that_were_tried():
    """Two repeats of 0.5 and 2.5 requests/s per GPU are 1.5 ± 12.7 by Student's t; the highest rate was 3 per GPU."""
    rows = pd.DataFrame({"goodput_rps_per_gpu": [0.5, 2.5], "max_rate": 6.0, "num_gpus": 2})
    found = goodput_estimate(rows)
    assert (found.value, found.low, found.high) == (1.5, 0.0, math.inf) and not found.is_lower_bound
    assert goodput_estimate(rows.assign(max_rate=40.0)).high == pytest.approx(14.2, abs=0.1)


def test_a_target_that_a_repeat_may_have_met_at_the_highest_rate_leaves_the_goodput_of_all_open():
    assert math.isinf(goodput_estimate(goodput(runs({2: 1.0, 4: 0.88}, repeats=2))).high)


def test_a_table_for_a_paper_has_a_row_per_configuration_and_rate():
    frame = pd.concat([runs({2: 1.0, 4: 0.8}, repeats=2).assign(link=gbps) for gbps in (1, 10)]).assign(ttft_s_p90=[0.1, 0.3] * 4)
    table = interval_table(frame, ["ttft_s_p90", "slo_attainment"], sweep_axes=["link"])
    assert table[["configuration", "rate", "num_runs"]].iloc[0].tolist() == ["1P1D · link=1", 2, 2] and len(table) == 4
    assert table["ttft_s_p90_high"].iloc[0] == pytest.approx(0.2 + 12.706 * 0.1)
    assert table["slo_attainment_low"].iloc[0] < 1.0 == table["slo_attainment_high"].iloc[0]
    assert table["ttft_s_p90_low"].iloc[0] == 0.0


def test_estimates_say_their_interval():
    assert str(Estimate(1.5, 1.25, 2.0)) == "1.5 (95%: 1.25 to 2)"
    assert str(Estimate(24.0, 17.0, math.inf, is_lower_bound=True)) == "at least 24 (95%: 17 or more)"
    assert str(Estimate(1.5)) == "1.5"
