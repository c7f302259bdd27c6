"""Bisection for the highest rate that meets a target."""

import math

import pytest

from ksana_lab.sweep.search import highest_rate


def look(capacity, **options):
    tried = []

    def attainment(rate):
        tried.append(rate)
        return 1.0 if rate <= capacity else 0.0

    options = {"target": 0.9, "tolerance": 0.1, "max_rates": 20} | options
    return highest_rate(attainment, 1.0, 64.0, **options), tried


@pytest.mark.parametrize("capacity", [1.0, 3.7, 20.0, 63.0])
def test_it_brackets_the_capacity_within_the_tolerance(capacity):
    found, tried = look(capacity)
    assert found.rate <= capacity < found.missed and found.missed / found.rate <= 1.1
    assert len(tried) == len(set(tried)) == len(found.outcomes)


def test_steps_are_bounded():
    assert len(look(20.0, tolerance=1e-9, max_rates=5)[1]) == 5


def test_a_low_rate_that_misses_and_a_high_rate_that_meets_end_it():
    assert (look(0.5)[0].rate, look(0.5)[1]) == (0.0, [1.0])
    assert (look(100)[0].rate, look(100)[0].missed) == (64.0, None)


def test_a_rate_that_cannot_be_measured_ends_it_without_a_result():
    assert highest_rate(lambda rate: None, 1.0, 2.0, target=0.9, tolerance=0.1, max_rates=9) is None


def test_a_run_in_which_nothing_counted_is_a_miss():
    found = highest_rate(lambda rate: math.nan, 1.0, 2.0, target=0.9, tolerance=0.1, max_rates=9)
    assert found.rate == 0.0
