"""A node's Prometheus metrics: what the API process saw of its requests, and the engine's own counters at the time of the scrape.

One registry per server, so that two live in one process. Every series carries ``role``: a prefill node's time to first token ends when it
has sampled it; a decode node's also holds the wait for its KV. A client's is neither; the load generator measures that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UntypedMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ksana_lab.protocol.engine import EngineStatus, SequenceUpdate

_WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class ServerMetrics:
    """Counts as it goes; ``render`` adds the engine's state."""

    def __init__(self, role: str) -> None:
        self._role = role
        self.registry = CollectorRegistry()
        self._requests = Counter("ksana_lab_requests", "Requests by how they ended", ("role", "outcome"), registry=self.registry)
        self._ttft = self._histogram("ksana_lab_ttft_seconds", "Arrival at this node to a sequence's first token", _WAIT_BUCKETS)
        self._tpot = self._histogram("ksana_lab_tpot_seconds", "(last token - first token) / (tokens - 1), per sequence", _TOKEN_BUCKETS)
        self._e2e = self._histogram("ksana_lab_e2e_seconds", "Arrival at this node to a sequence's end", _WAIT_BUCKETS)
        self._queue = self._histogram("ksana_lab_queue_seconds", "Arrival to the first step that ran a sequence", _WAIT_BUCKETS)
        self._prefill = self._histogram("ksana_lab_prefill_seconds", "First step to the end of the prompt", _WAIT_BUCKETS)
        self._transfer = self._histogram("ksana_lab_kv_transfer_seconds", "First to last byte of a sequence's KV", _WAIT_BUCKETS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("role",), buckets=buckets, registry=self.registry).labels(self._role)

    def on_request_done(self, outcome: str) -> None:
        """``outcome``: completed, or the type of the error (errors.py)."""
        self._requests.labels(self._role, outcome).inc()

    def on_first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def on_sequence_finished(self, *, e2e_s: float, decode_s: float, num_tokens: int, update: SequenceUpdate, arrival_ns: int) -> None:
        self._e2e.observe(e2e_s)
        if num_tokens > 1:
            self._tpot.observe(decode_s / (num_tokens - 1))
        for histogram, start_ns, end_ns in (
            (self._queue, arrival_ns, update.scheduled_ns),
            (self._prefill, update.scheduled_ns, update.prefill_end_ns),
            (self._transfer, update.transfer_start_ns, update.transfer_end_ns),
        ):
            if start_ns and end_ns >= start_ns:
                histogram.observe((end_ns - start_ns) / 1e9)

    def watch(self, sample: Callable[[], dict[str, float]], status: Callable[[], EngineStatus | None]) -> None:
        """At each scrape, ``sample`` gives the server's own gauges by name and ``status`` the engine's latest state."""
        self.registry.register(_StateCollector(self._role, sample, status))

    def render(self) -> bytes:
        return generate_latest(self.registry)


_GAUGES = {
    "ksana_lab_sequences_waiting": ("num_waiting", "Sequences queued in the engine"),
    "ksana_lab_sequences_running": ("num_running", "Sequences the scheduler runs"),
    "ksana_lab_sequences_waiting_kv": ("num_waiting_kv", "Decode: sequences whose KV is on its way"),
    "ksana_lab_sequences_held": ("num_held", "Prefill: finished sequences whose blocks wait for the decode node"),
    "ksana_lab_kv_blocks": ("num_blocks", "KV blocks in all"),
    "ksana_lab_kv_blocks_free": ("num_free_blocks", "KV blocks free, cached ones included"),
    "ksana_lab_kv_blocks_leaked": ("num_leaked_blocks", "Self-check of free + used + held = total: anything but 0 is a bug"),
    "ksana_lab_sequences_swapped": ("num_swapped", "Of those queued: sequences whose KV is in host blocks"),
    "ksana_lab_host_blocks": ("num_host_blocks", "Blocks of host memory to swap to"),
    "ksana_lab_host_blocks_free": ("num_free_host_blocks", "Host blocks free"),
}
_COUNTERS = {
    "ksana_lab_preemptions": ("num_preemptions", "Sequences put back for lack of blocks"),
    "ksana_lab_swap_outs": ("num_swap_outs", "Of the preemptions: sequences whose KV went to host blocks; the others are recomputed"),
    "ksana_lab_swap_ins": ("num_swap_ins", "Sequences whose KV came back from host blocks"),
    "ksana_lab_prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "ksana_lab_prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache"),
    "ksana_lab_prompt_tokens": ("prompt_tokens", "Prompt tokens taken in"),
    "ksana_lab_generated_tokens": ("generated_tokens", "Tokens sampled"),
    "ksana_lab_engine_steps": ("steps", "Engine steps"),
}


class _StateCollector(Collector):
    def __init__(self, role: str, sample: Callable[[], dict[str, float]], status: Callable[[], EngineStatus | None]) -> None:
        self._role, self._sample, self._status = role, sample, status

    def describe(self) -> list[Metric]:
        return []  # what is collected depends on the engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self._sample().items():
            yield self._gauge(name, "State of the API process", value)
        status = self._status()
        if status is None:
            return
        for name, (attribute, text) in _GAUGES.items():
            yield self._gauge(name, text, getattr(status, attribute))
        for name, (attribute, text) in _COUNTERS.items():
            yield self._counter(name, text, getattr(status, attribute))
        yield self._gauge("ksana_lab_pairs_connected", "Pairs whose two sides are connected", len(status.connected))
        for key, value in status.transfer.items():
            name = metric_name(key)
            if name.endswith("_total"):
                yield self._counter(name.removesuffix("_total"), "Counter of the KV transfer", value)
            else:  # the connector does not say whether it only grows
                family = UntypedMetricFamily(name, "State of the KV transfer", labels=("role",))
                family.add_metric((self._role,), value)
                yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("role",))
        family.add_metric((self._role,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("role",))
        family.add_metric((self._role,), value)
        return family


def metric_name(key: str) -> str:
    """A connector's counter as a Prometheus name: ``bytes_sent_total`` -> ``ksana_lab_transfer_bytes_sent_total``."""
    name = re.sub(r"[^a-zA-Z0-9_]", "_", key)
    if name.startswith("ksana_lab_"):
        return name
    return f"ksana_lab_{name}" if name.startswith("transfer_") else f"ksana_lab_transfer_{name}"
