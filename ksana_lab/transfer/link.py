"""An emulated link in virtual time: when a piece may start, and when it would arrive. Pure arithmetic; whoever sends does the waiting.

A link of B Gb/s and L µs carries one piece after the other: piece i starts at s_i = max(ready_i, free_{i-1}), occupies the link until
free_i = s_i + bytes/B, and arrives at free_i + L. Latency delays arrivals and not the next piece, as on a real wire. A real backend under
it that is slower than B shows as itself: its own end is then the later one."""

from __future__ import annotations

import threading

from ksana_lab.config.engine import LinkOptions


class Pacer:
    """One link. Thread-safe. Times are monotonic ns, given by the caller."""

    def __init__(self, bandwidth_gbps: float | None = None, latency_us: float = 0.0) -> None:
        self._ns_per_byte = 0.0 if bandwidth_gbps is None else 8.0 / bandwidth_gbps
        self._latency_ns = round(latency_us * 1000)
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait_ns(self, now_ns: int) -> int:
        """How long until the link is free for the next piece."""
        with self._lock:
            return max(0, round(self._free_at - now_ns))

    def book(self, nbytes: int, now_ns: int, ready_ns: int | None = None) -> int:
        """Send ``nbytes`` from ``now_ns`` on, or as soon as the link is free. Returns when they arrive. ``ready_ns``: since when they could
        have gone; what waited for the link follows what went before without a gap, however late its sender woke, as on a real wire, where
        it lies in the socket's buffer."""
        with self._lock:
            has_waited = ready_ns is not None and ready_ns <= self._free_at
            start = self._free_at if has_waited else max(self._free_at, now_ns)
            self._free_at = start + nbytes * self._ns_per_byte
            return round(self._free_at) + self._latency_ns


class Pacers:
    """The links of one rank: one for all peers if ``shared``, else one per session. A node's bandwidth is divided evenly among its ranks;
    what an idle rank does not use is not lent to the others."""

    def __init__(self, options: LinkOptions, tp_size: int) -> None:
        bandwidth = None if options.bandwidth_gbps is None else options.bandwidth_gbps / tp_size
        self._bandwidth, self._latency_us = bandwidth, options.latency_us
        self._shared = Pacer(bandwidth, options.latency_us) if options.shared else None

    def make(self) -> Pacer:
        """For a new session."""
        return self._shared or Pacer(self._bandwidth, self._latency_us)
