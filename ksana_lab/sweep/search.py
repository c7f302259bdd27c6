"""The highest rate that still meets a target: bisection on a logarithmic scale, in a bounded number of steps. Who measures is passed in.

A rate's outcome is asked for once, and the rates depend on the outcomes alone: with finished runs kept, a search that was killed goes the
same way again without measuring anything twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """``rate``: the highest that met the target, 0 when ``low`` already missed it. ``missed``: the lowest tried above it that did not; None
    when even ``high`` met it (``rate`` is then a lower bound)."""

    rate: float
    missed: float | None
    outcomes: dict[float, float]  # rate -> attainment, in the order of trying


def highest_rate(
    attainment: Callable[[float], float | None], low: float, high: float, *, target: float, tolerance: float, max_rates: int
) -> Found | None:
    """``attainment(rate)`` measures; None means that it could not, which ends the search without a result. Stops when ``missed / rate`` is
    at most 1 + ``tolerance`` or ``max_rates`` have been tried. Between two rates the attainment is taken to fall with the rate."""
    outcomes: dict[float, float] = {}

    def is_met(rate: float) -> bool | None:
        outcome = attainment(rate)
        if outcome is None:
            return None
        outcomes[rate] = outcome
        return outcome >= target  # nan, of a run in which nothing counted, is a miss

    met, missed = 0.0, None
    for rate in (low, high):
        is_good = is_met(rate)
        if is_good is None:
            return None
        if not is_good:
            missed = rate
            break
        met = rate
    while met and missed is not None and missed / met > 1 + tolerance and len(outcomes) < max_rates:
        middle = rounded(math.sqrt(met * missed))
        if not met < middle < missed:
            break
        is_good = is_met(middle)
        if is_good is None:
            return None
        met, missed = (middle, missed) if is_good else (met, middle)
    return Found(met, missed, outcomes)


def rounded(rate: float, digits: int = 4) -> float:
    """To significant digits: a rate is a name of its run, and is read by people."""
    return float(f"{rate:.{digits}g}")
