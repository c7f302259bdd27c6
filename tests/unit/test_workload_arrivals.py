"""Arrival processes have the rate and the burstiness that they were asked for."""

import math

import numpy as np
import pytest

from ksana_lab.workload import arrivals


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_asked_mean_and_spread(burstiness):
    gaps = np.diff(arrivals.steady(20_000, 5.0, burstiness, rng()))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


@pytest.mark.parametrize("burstiness", [0.1, 1.0, math.inf])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_few_requests_come_at_the_asked_rate_too(count, burstiness):
    assert arrivals.steady(count, 4.0, burstiness, rng())[-1] == pytest.approx((count - 1) / 4)


def test_infinite_burstiness_is_a_constant_gap_and_infinite_rate_is_at_once():
    assert arrivals.steady(4, 2.0, math.inf, rng()) == pytest.approx([0, 0.5, 1.0, 1.5])
    assert not arrivals.steady(4, math.inf, 1.0, rng()).any()


def test_a_ramp_has_the_asked_rate_at_every_moment():
    count, duration = 4000, 2 * 4000 / (2 + 8)
    times = arrivals.ramp(count, 2.0, 8.0, math.inf, rng())
    first, last = (times < duration / 10).sum(), (times > duration * 9 / 10).sum()
    assert first / (duration / 10) == pytest.approx(2.3, rel=0.02)
    assert last / (duration / 10) == pytest.approx(7.7, rel=0.02)


def test_a_falling_ramp_ends_and_stays_in_order():
    times = arrivals.ramp(500, 8.0, 2.0, 1.0, rng())
    assert np.isfinite(times).all() and (np.diff(times) >= 0).all()


def test_replay_starts_at_zero():
    assert arrivals.replay(np.array([5.0, 6.0]), 0.5).tolist() == [0.0, 0.5]
