"""Whose clock says what: brings the monotonic clocks of several hosts onto one. Knows nothing of requests but their order.

Processes of one host (one boot of one kernel) share CLOCK_MONOTONIC. Between hosts the offset is estimated as NTP does (RFC 5905): a ping
sent at a and answered at b comes back at c; if both ways took equally long the other clock was ahead by b - (a + c) / 2, and it cannot be
further off than (c - a) / 2. The exchange with the shortest round trip is the best. Where nobody pinged, what must come before what bounds
the offset: a request is not received before it was sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ksana_lab.tracing.events import ProcessLog

CLOCK_CATEGORY = "clock"
_REPORT_AFTER = 30  # exchanges after which a fresh estimate is reported even if it is no better: clocks drift
_WALL_CLOCK_ERROR_NS = 50_000_000  # what NTP-kept wall clocks may differ by; used where nothing better is known


@dataclass(frozen=True)
class Offset:
    """Another clock minus this one, ns, and how far off that may be."""

    offset_ns: int
    error_ns: int
    source: str = "ping"  # ping, order, wall clock, same host


SAME = Offset(0, 0, "same host")


class OffsetEstimator:
    """The offset to one peer from its pongs. ``add`` returns an estimate when there is news worth writing down."""

    def __init__(self) -> None:
        self._best: Offset | None = None
        self._count = 0

    def add(self, sent_ns: int, peer_ns: int, received_ns: int) -> Offset | None:
        """Own time of the ping, peer's time of the answer, own time of its arrival."""
        if received_ns < sent_ns:
            return None
        found = Offset(peer_ns - (sent_ns + received_ns) // 2, (received_ns - sent_ns + 1) // 2)
        self._count += 1
        if self._best is None or found.error_ns < self._best.error_ns or self._count >= _REPORT_AFTER:
            self._best, self._count = found, 0
            return found
        return None


@dataclass
class Alignment:
    """``to_reference(log, ts)``: a time of a log on the reference's clock."""

    reference: str
    offsets: dict[str, Offset]  # clock domain -> that clock minus the reference's

    def to_reference(self, domain: str, ts_ns: int) -> int:
        return ts_ns - self.offsets[domain].offset_ns

    def error_ns(self, a: str, b: str) -> int:
        """How far a difference between times of two domains may be off."""
        return 0 if a == b else self.offsets[a].error_ns + self.offsets[b].error_ns


def align(logs: Sequence[ProcessLog], reference: str | None = None) -> Alignment:
    """``reference``: the clock domain that everything is brought to; that of the router if there is one."""
    domains = list(dict.fromkeys(log.clock_domain for log in logs))
    if reference is None:
        reference = next((log.clock_domain for log in logs if log.kind == "router"), domains[0])
    edges = _measured(logs)
    offsets = {reference: SAME}
    _spread(offsets, edges)
    for domain in domains:
        if domain not in offsets:
            offsets[domain] = _by_order(logs, reference, domain) or _by_wall_clock(logs, reference, domain)
            _spread(offsets, edges)
    return Alignment(reference, offsets)


def _measured(logs: Iterable[ProcessLog]) -> dict[str, dict[str, Offset]]:
    """a -> b -> clock of b minus clock of a, as the control channel measured it."""
    found: dict[tuple[str, str], list[Offset]] = defaultdict(list)
    for log in logs:
        for event in log.named("offset", CLOCK_CATEGORY):
            args = event["args"]
            if args["domain"] != log.clock_domain:
                found[log.clock_domain, args["domain"]].append(Offset(args["offset_ns"], args["error_ns"]))
    edges: dict[str, dict[str, Offset]] = defaultdict(dict)
    for (a, b), estimates in found.items():
        best = _best(estimates)
        edges[a][b] = best
        edges[b].setdefault(a, Offset(-best.offset_ns, best.error_ns))
    return edges


def _best(estimates: Sequence[Offset]) -> Offset:
    """The one with the least error, which grows by what others contradict it: the clocks drifted while they were compared."""
    best = min(estimates, key=lambda e: e.error_ns)
    drift = max(abs(e.offset_ns - best.offset_ns) - e.error_ns - best.error_ns for e in estimates)
    return Offset(best.offset_ns, best.error_ns + max(0, drift))


def _spread(offsets: dict[str, Offset], edges: dict[str, dict[str, Offset]]) -> None:
    """Reach every domain that measurements connect with a known one."""
    queue = list(offsets)
    while queue:
        a = queue.pop(0)
        for b, edge in edges.get(a, {}).items():
            if b not in offsets:
                offsets[b] = Offset(offsets[a].offset_ns + edge.offset_ns, offsets[a].error_ns + edge.error_ns)
                queue.append(b)


def _by_order(logs: Sequence[ProcessLog], reference: str, domain: str) -> Offset | None:
    """A router and a node on different hosts: ROUTED comes before the node's ARRIVED, the node's FIRST_TOKEN before the router's."""
    router: dict[tuple[str, str], int] = {}
    for log in logs:
        if log.kind == "router" and log.clock_domain == reference:
            router.update({(e["name"], e["args"]["request_id"]): e["ts"] for e in log.events if e.get("cat") == "request"})
    least: list[int] = []  # the node's clock is ahead by at least
    most: list[int] = []
    for log in logs:
        if log.clock_domain != domain or log.is_engine:
            continue
        for event in log.events:
            key = event.get("args", {}).get("request_id", "")
            if event["name"] == "ARRIVED" and ("ROUTED", key) in router:
                most.append(event["ts"] - router["ROUTED", key])
            elif event["name"] == "FIRST_TOKEN" and ("FINISHED", key) in router:
                least.append(event["ts"] - router["FINISHED", key])
    if not least or not most or max(least) > min(most):
        return None
    low, high = max(least), min(most)
    return Offset((low + high) // 2, (high - low + 1) // 2, "order")


def _by_wall_clock(logs: Sequence[ProcessLog], reference: str, domain: str) -> Offset:
    anchor = {log.clock_domain: log.unix_ns - log.monotonic_ns for log in logs}
    return Offset(anchor.get(reference, 0) - anchor[domain], _WALL_CLOCK_ERROR_NS, "wall clock")
