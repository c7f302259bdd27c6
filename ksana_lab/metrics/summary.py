"""What a run of many requests amounts to: percentiles, throughput, goodput and attainment under an SLO, intervals over repeats.

Formulas: docs/metrics.md. A failed request counts against attainment and never enters a latency distribution; a request that the
client itself cancelled is counted apart and enters neither."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ksana_lab.errors import ConfigError
from ksana_lab.metrics import latency
from ksana_lab.metrics.record import RequestRecord

CANCELLED = "cancelled"  # finish_reason of a request that the load generator cut off on purpose

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution
# And of Student's t, for 1..30 degrees of freedom; beyond, _t95 has a series.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class SLO:
    """Upper bounds in seconds; None = no bound. ``itl_s`` bounds every gap of a request, the others its one value."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    itl_s: float | None = None
    first_gap_s: float | None = None

    @classmethod
    def from_dict(cls, bounds: Mapping[str, float]) -> SLO:
        """Raises ConfigError for a metric that is not one of the fields, or a bound that is not a positive number."""
        known = [f.name for f in fields(cls)]
        for name, bound in bounds.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise ConfigError(f"slo.{name} is not a metric an SLO can bound; {hint}")
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
                raise ConfigError(f"slo.{name} must be a number of seconds above 0, got {bound!r}")
        return cls(**bounds)

    def scaled(self, factor: float) -> SLO:
        """Every bound times ``factor``, for attainment against SLO scale."""
        return SLO(**{f.name: None if (v := getattr(self, f.name)) is None else v * factor for f in fields(self)})

    def is_met_by(self, record: RequestRecord) -> bool:
        """False for a failed request. A metric the record cannot have (TPOT of one token) does not break its bound."""
        if not record.is_ok:
            return False
        if self.itl_s is not None and any(gap > self.itl_s for gap in latency.itl_s(record)):
            return False
        for name in ("ttft_s", "tpot_s", "e2e_s", "first_gap_s"):
            bound, value = getattr(self, name), latency.PER_REQUEST[name](record)
            if bound is not None and value is not None and value > bound:
                return False
        return True


@dataclass(frozen=True)
class Distribution:
    """Of one metric over requests (or, for itl, over gaps). Seconds; nan throughout when ``count`` is 0."""

    count: int
    mean: float
    std: float  # population, as in vllm bench
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @property
    def median(self) -> float:
        return self.p50

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        array = np.fromiter(values, dtype=float)
        if not array.size:
            return cls(0, *[math.nan] * 7)
        p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99))
        return cls(array.size, *(float(x) for x in (array.mean(), array.std(), p50, p90, p95, p99, array.max())))


@dataclass(frozen=True)
class Summary:
    """Of one run. Throughputs are per second of ``duration_s``; goodput and attainment are None without an SLO."""

    num_requests: int
    num_completed: int
    num_failed: int
    num_cancelled: int
    duration_s: float
    num_prompt_tokens: int  # of completed requests
    num_output_tokens: int
    request_throughput_rps: float
    output_throughput_tps: float
    total_throughput_tps: float
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    slo: SLO | None = None
    goodput_rps: float | None = None
    slo_attainment: float | None = None


def duration_s(records: Sequence[RequestRecord]) -> float:
    """First sending to last end, over all records, failed ones too: what the benchmark's wall clock would show."""
    starts = [r.sent_s for r in records if r.sent_s is not None]
    ends = [end for r in records if (end := r.finished_s if r.finished_s is not None else _last(r)) is not None]
    return max(ends) - min(starts) if starts and ends else 0.0


def summarize(records: Sequence[RequestRecord], *, slo: SLO | None = None, duration: float | None = None) -> Summary:
    """``duration`` in seconds replaces the records' own (say, a fixed window)."""
    cancelled = [r for r in records if is_cancelled(r)]
    completed = [r for r in records if r.is_ok]
    seconds = duration_s(records) if duration is None else duration
    num_prompt, num_output = sum(r.num_prompt_tokens for r in completed), sum(r.num_output_tokens for r in completed)
    per_second = 1.0 / seconds if seconds > 0 else math.nan
    return Summary(
        num_requests=len(records),
        num_completed=len(completed),
        num_failed=len(records) - len(completed) - len(cancelled),
        num_cancelled=len(cancelled),
        duration_s=seconds,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        request_throughput_rps=len(completed) * per_second,
        output_throughput_tps=num_output * per_second,
        total_throughput_tps=(num_prompt + num_output) * per_second,
        ttft_s=distribution(completed, "ttft_s"),
        tpot_s=distribution(completed, "tpot_s"),
        itl_s=Distribution.of(gap for r in completed for gap in latency.itl_s(r)),
        e2e_s=distribution(completed, "e2e_s"),
        slo=slo,
        goodput_rps=None if slo is None else num_met(records, slo) * per_second,
        slo_attainment=None if slo is None else slo_attainment(records, slo),
    )


def is_cancelled(record: RequestRecord) -> bool:
    return record.finish_reason == CANCELLED


def distribution(records: Iterable[RequestRecord], metric: str) -> Distribution:
    """Of ``metric`` (a key of ``latency.PER_REQUEST``) over the completed requests that have it."""
    function = latency.PER_REQUEST[metric]
    return Distribution.of(value for r in records if r.is_ok and (value := function(r)) is not None)


def num_met(records: Iterable[RequestRecord], slo: SLO) -> int:
    return sum(slo.is_met_by(r) for r in records)


def slo_attainment(records: Sequence[RequestRecord], slo: SLO) -> float:
    """Share of requests that meet every bound. Failures are in the denominator, requests the client cancelled are not; nan of none."""
    counted = [r for r in records if not is_cancelled(r)]
    return num_met(counted, slo) / len(counted) if counted else math.nan


def goodput_rps_per_gpu(rates_rps: Sequence[float], attainments: Sequence[float], num_gpus: int, *, target: float = 0.9) -> float:
    """DistServe's goodput: the highest offered rate whose attainment is at least ``target``, per GPU.

    Points may come in any order. The curve is read as DistServe's figures are: up to its first crossing of the target, which is
    interpolated linearly. 0.0 when the lowest rate already misses it; the highest rate tried when none misses (a lower bound)."""
    points = sorted(zip(rates_rps, attainments, strict=True))
    best = 0.0
    for i, (rate, attainment) in enumerate(points):
        if attainment < target:
            if i:
                before_rate, before = points[i - 1]
                best = before_rate + (rate - before_rate) * (before - target) / (before - attainment)
            break
        best = rate
    return best / num_gpus


@dataclass(frozen=True)
class Interval:
    """Mean over repeats and the half-width of its 95% confidence interval (Student's t); nan half-width of a single repeat."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def confidence_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of independent repeats (different seeds), not of the requests inside one run: those are correlated."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, 1)
    return Interval(mean, _t95(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n), n)


def _t95(degrees: int) -> float:
    """Beyond the table the series around the normal's quantile (Abramowitz and Stegun 26.7.5), there good to 0.01%."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    first = (Z95**3 + Z95) / 4
    second = (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / 96
    return Z95 + first / degrees + second / degrees**2


def _last(record: RequestRecord) -> float | None:
    return record.token_times_s[-1] if record.token_times_s else record.sent_s
