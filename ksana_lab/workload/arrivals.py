"""When requests are sent: offsets in seconds from the start of a run, the first at 0. Knows nothing of what is sent.

Gaps are Gamma(shape = burstiness, scale = 1 / (rate * burstiness)): 1 is a Poisson process, below 1 burstier, above 1 smoother,
infinity a constant gap. They are then scaled so that their mean is that of the rate, as ``vllm bench serve`` does: 40 requests "at 4 per
second" would else come at anything from 3.2 to 4.8, and what a rate costs would be read off at another. A ramp is the same process under a
change of time, so its rate at time t is exactly the line asked for."""

from __future__ import annotations

import math

import numpy as np


def unit_rate(count: int, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """[count] float64, non-decreasing, from 0 to exactly count - 1: one request per unit of time."""
    if count < 2:
        return np.zeros(count)
    gaps = np.ones(count - 1) if math.isinf(burstiness) else rng.gamma(burstiness, 1.0 / burstiness, size=count - 1)
    times = np.concatenate(([0.0], np.cumsum(gaps)))
    return times * ((count - 1) / times[-1]) if times[-1] > 0 else np.arange(count, dtype=np.float64)


def steady(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """[count] seconds at ``rate`` requests per second; an infinite rate sends all at once."""
    return np.zeros(count) if math.isinf(rate) else unit_rate(count, burstiness, rng) / rate


def ramp(count: int, start_rate: float, end_rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """[count] seconds while the rate goes linearly from ``start_rate`` to ``end_rate``.

    The ramp lasts T = 2 count / (start + end), in which count requests are expected; with L(t) = start t + (end - start) t^2 / 2T
    requests expected by t, arrivals are L^-1 of a unit-rate process. One that falls behind T continues at ``end_rate``."""
    expected = unit_rate(count, burstiness, rng)
    if start_rate == end_rate:
        return expected / start_rate
    duration = 2 * count / (start_rate + end_rate)
    slope = (end_rate - start_rate) / duration
    inside = np.minimum(expected, count)
    times = (np.sqrt(np.maximum(0.0, start_rate**2 + 2 * slope * inside)) - start_rate) / slope
    return times + (expected - inside) / end_rate


def replay(timestamps_s: np.ndarray, time_scale: float) -> np.ndarray:
    """A trace's own times from its first, stretched: 2 = twice as long, half the rate. Rows out of order are an error of the reader."""
    return (timestamps_s - timestamps_s[:1]) * time_scale
