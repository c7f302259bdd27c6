"""How far a value may be off by chance: over repeats by Student's t, of one run by how many requests it had. Repeats that agree by chance
have no width by Student's t; how many requests they had still limits them, so of the two the wider counts.

A run's share of requests within the SLO has Wilson's interval, its goodput is read from the lower and from the upper bounds at all rates.
(Resampling the requests would do, too, but gives no width at all where every one of them met the bounds.) Both take the requests of a run
for independent, which they are not: they share queues, so the truth is wider."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ksana_lab.metrics.summary import Z95, confidence_interval
from ksana_lab.notebook.configurations import groups
from ksana_lab.sweep import report

GOODPUT = "goodput_rps_per_gpu"


@dataclass(frozen=True)
class Estimate:
    """``low`` and ``high``: 95% interval, nan when unknown. ``is_lower_bound``: the true value is at least ``value`` (``high`` is inf)."""

    value: float
    low: float = math.nan
    high: float = math.nan
    is_lower_bound: bool = False

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    def overlaps(self, other: Estimate) -> bool:
        """False where either has no interval."""
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        text = f"{'at least ' if self.is_lower_bound else ''}{self.value:.3g}"
        if not self.has_interval or (self.is_lower_bound and self.low == self.value):
            return text
        return f"{text} (95%: {self.low:.3g} {'or more' if math.isinf(self.high) else f'to {self.high:.3g}'})"


def wilson(num_met: float, num_counted: float) -> tuple[float, float]:
    """95% interval of a share, also where none or all count; nan of nothing."""
    if num_counted <= 0:
        return math.nan, math.nan
    share, z2 = num_met / num_counted, Z95**2
    middle = (share + z2 / (2 * num_counted)) / (1 + z2 / num_counted)
    half = Z95 / (1 + z2 / num_counted) * math.sqrt(share * (1 - share) / num_counted + z2 / (4 * num_counted**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def with_attainment_interval(runs: pd.DataFrame) -> pd.DataFrame:
    """``slo_attainment_low`` and ``_high`` of each run beside its ``slo_attainment``; the frame as it is where it lacks the counts."""
    if not {"slo_attainment", "num_completed", "num_failed"} <= set(runs):
        return runs
    counted = runs["num_completed"] + runs["num_failed"]
    bounds = [wilson(share * count, count) for share, count in zip(runs["slo_attainment"].astype(float), counted, strict=True)]
    return runs.assign(slo_attainment_low=[low for low, _ in bounds], slo_attainment_high=[high for _, high in bounds])


def goodput(runs: pd.DataFrame, axes: Sequence[str] | None = None, *, target: float = 0.9) -> pd.DataFrame:
    """``report.goodput`` with ``goodput_rps_per_gpu_low`` and ``_high``, the latter inf where the highest rate may have met the target, and
    at least the lowest rate where that missed it: below it nothing was tried. Raises as that does."""
    table = report.goodput(runs, axes, target=target)
    runs = with_attainment_interval(runs)
    low, high = (
        report.goodput(runs.assign(slo_attainment=runs[f"slo_attainment_{end}"]), axes, target=target)[GOODPUT] for end in ("low", "high")
    )
    high = high.where(table[GOODPUT] > 0, np.maximum(high, table["min_rate"] / table["num_gpus"]))
    return table.assign(
        **{f"{GOODPUT}_low": low, f"{GOODPUT}_high": high.where(~_is_highest_rate(table.assign(**{GOODPUT: high})), math.inf)}
    )


def estimate(rows: pd.DataFrame, column: str) -> Estimate:
    """Of one configuration: mean of its repeats. Where they have them, ``<column>_low`` and ``<column>_high`` are each row's own interval,
    and the one of the mean is at least as wide as those make it."""
    known = rows[rows[column].notna()]
    interval = confidence_interval(known[column].tolist())
    if known.empty or f"{column}_low" not in known:
        return Estimate(interval.mean, interval.low, interval.high)
    down, up = (float(np.sqrt(((known[column] - known[f"{column}_{end}"]) ** 2).sum())) / len(known) for end in ("low", "high"))
    low, high = np.fmin(interval.mean - down, interval.low), np.fmax(interval.mean + up, interval.high)  # nan is unknown
    return Estimate(interval.mean, float(low), float(high))


def interval_table(runs: pd.DataFrame, columns: Sequence[str], *, sweep_axes: Sequence[str] | None = None) -> pd.DataFrame:
    """For a paper: one row per configuration and rate, with ``num_runs`` repeats; of each of ``columns`` (as in ``load_results``, in its
    unit) the mean, and ``<column>_low`` and ``<column>_high``, its 95% interval, cut at 0 and a share at 1. nan where a single run has
    none."""
    runs, rows = with_attainment_interval(runs), []
    for name, curve in groups(runs, "split", without=("rate",), sweep_axes=sweep_axes):
        for rate, repeats in curve.groupby("rate", dropna=False):
            row: dict[str, Any] = {"configuration": name, "rate": rate, "num_runs": len(repeats)}
            for column in columns:
                found, most = estimate(repeats, column), 1.0 if column == "slo_attainment" else math.inf
                row |= {column: found.value, f"{column}_low": np.maximum(0.0, found.low), f"{column}_high": np.minimum(most, found.high)}
            rows.append(row)
    return pd.DataFrame(rows)


def goodput_estimate(rows: pd.DataFrame) -> Estimate:
    """Of one configuration's rows of ``goodput``: where one met the target at the highest rate that was tried, a lower bound. An interval
    that reaches beyond that rate ends nowhere: nothing was tried there."""
    found = estimate(rows, GOODPUT)
    low = max(0.0, found.low) if found.has_interval else found.low
    if "max_rate" not in rows or not _is_highest_rate(rows).any():
        is_beyond = "max_rate" in rows and found.high > float((rows["max_rate"] / rows["num_gpus"]).max())
        return Estimate(found.value, low, math.inf if is_beyond else found.high)
    return Estimate(found.value, low, math.inf if found.has_interval else math.nan, is_lower_bound=True)


def _is_highest_rate(table: pd.DataFrame) -> pd.Series:
    return table[GOODPUT] * table["num_gpus"] >= table["max_rate"] * (1 - 1e-9)
