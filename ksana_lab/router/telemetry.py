"""What the router tells of itself: Prometheus metrics and the event log. One object per router, nothing process-wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ksana_lab.router.comm_groups import CommGroups, Route
from ksana_lab.router.registry import Registry
from ksana_lab.tracing.recorder import NullRecorder

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_OVERHEAD_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_KNOWN_PATHS = {"/generate", "/v1/completions", "/v1/chat/completions"}  # the rest share a label: paths are the client's to choose


class Telemetry:
    """``close`` writes the rest of the event log."""

    def __init__(self, recorder: NullRecorder, registry: Registry, groups: CommGroups) -> None:
        self.recorder = recorder
        self._prometheus = CollectorRegistry()
        name = "ksana_lab_router"
        self._requests = Counter(
            f"{name}_requests", "Requests by route and how they ended", ["route", "outcome"], registry=self._prometheus
        )
        self._retries = Counter(f"{name}_retries", "Requests sent to another pair after a refused connection", registry=self._prometheus)
        self._ttft = Histogram(
            f"{name}_ttft_seconds",
            "From a request's arrival at the router to the first byte of its reply sent",
            ["route"],
            buckets=_TTFT_BUCKETS,
            registry=self._prometheus,
        )
        self._overhead = Histogram(
            f"{name}_overhead_seconds",
            "The router's own share of it: from the arrival to both nodes being asked, and from a node's first bytes to the client",
            buckets=_OVERHEAD_BUCKETS,
            registry=self._prometheus,
        )
        self._prometheus.register(_Cluster(registry, groups))

    def arrived(self, request_id: str, path: str, num_bytes: int) -> None:
        if self.recorder.enabled:
            self.recorder.instant("ARRIVED", "request", request_id=request_id, path=path, bytes=num_bytes)

    def routed(self, request_id: str, route: Route, comm_request_id: int | None) -> None:
        if self.recorder.enabled:
            self.recorder.instant(
                "ROUTED",
                "request",
                request_id=request_id,
                comm_key=route.comm_key,
                comm_request_id=comm_request_id,
                prefill=route.prefill.inference_addr if route.prefill else None,
                decode=route.decode.inference_addr,
            )

    def retried(self) -> None:
        self._retries.inc()

    def first_byte(self, request_id: str, path: str, ttft_s: float, overhead_s: float) -> None:
        self._ttft.labels(_label(path)).observe(ttft_s)
        self._overhead.observe(overhead_s)
        if self.recorder.enabled:
            # Written when the request is over: ``ttft_us`` after its ARRIVED is when it was.
            self.recorder.instant("FIRST_TOKEN", "request", request_id=request_id, ttft_us=round(ttft_s * 1e6))

    def ended(self, request_id: str, path: str, outcome: str, message: str | None = None) -> None:
        self._requests.labels(_label(path), outcome).inc()
        if self.recorder.enabled:
            name = {"ok": "FINISHED", "client_gone": "ABORTED"}.get(outcome, "FAILED")
            self.recorder.instant(name, "request", request_id=request_id, outcome=outcome, error=message)

    def exposition(self) -> bytes:
        return generate_latest(self._prometheus)

    def close(self) -> None:
        self.recorder.close()


class _Cluster(Collector):
    """Gauges read from the cluster's state when somebody scrapes."""

    def __init__(self, registry: Registry, groups: CommGroups) -> None:
        self._registry, self._groups = registry, groups

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        labels = ["node", "role"]
        online = GaugeMetricFamily("ksana_lab_router_node_online", "1 while its heartbeats come", labels=labels)
        requests = GaugeMetricFamily("ksana_lab_router_in_flight_requests", "Requests in flight through this router", labels=labels)
        tokens = GaugeMetricFamily("ksana_lab_router_in_flight_tokens", "Their prompt tokens, estimated", labels=labels)
        for node in self._registry:
            if node.node_rank == 0:
                at = [node.inference_addr, node.role.value]
                online.add_metric(at, float(self._registry.is_online(node)))
                requests.add_metric(at, node.num_requests)
                tokens.add_metric(at, node.num_tokens)
        pairs = GaugeMetricFamily("ksana_lab_router_pair_routable", "1 while the pair can serve", labels=["comm_key"])
        for state in self._groups.states():
            pairs.add_metric([state.comm_key], float(state.why_not is None))
        yield from (online, requests, tokens, pairs)


def _label(path: str) -> str:
    if path in _KNOWN_PATHS:
        return path
    return path[:4] + "other"
