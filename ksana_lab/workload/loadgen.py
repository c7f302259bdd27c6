"""Plays a WorkloadSpec against a server and says whether its own clockwork kept up.

Open loop: every request is sent at its time, however slow the answers are. Closed loop: each of N users sends its next request when the
last one ended. Warm-up requests are sent first and finished before the clock starts. A client that is busy measures itself, so each run
reports its send lag (actual minus scheduled) and its loop lag (how late a timer of its own fired), and is marked where either is large."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from ksana_lab.metrics.latency import send_lag_s
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import is_cancelled
from ksana_lab.workload.client import Client
from ksana_lab.workload.event_loop import new_event_loop
from ksana_lab.workload.spec import LengthReport, Workload, WorkloadRequest, WorkloadSpec

log = logging.getLogger(__name__)

MAX_LAG_S = 0.010  # p99 of send lag and of loop lag up to which a run is trusted: a tenth of a TTFT worth reporting
_LAG_PERIOD_S = 0.010
_WARMUP_USERS = 4
_GC_THRESHOLD = 200_000  # containers made and not freed between two collections; Python's own is 700
T = TypeVar("T")


@dataclass
class LoadReport:
    """A run: its records, in the order of the workload, and what is to be said about them."""

    records: list[RequestRecord]
    lengths: LengthReport
    started_s: float  # monotonic
    duration_s: float  # start of the clock to the last end
    send_lag_p99_s: float
    send_lag_max_s: float
    loop_lag_p99_s: float  # over time, not over samples: see _stamp_lags
    num_warmup_failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_trustworthy(self) -> bool:
        """False: the client was the bottleneck, the latencies are at least partly its own."""
        return self.send_lag_p99_s <= MAX_LAG_S and self.loop_lag_p99_s <= MAX_LAG_S

    @property
    def num_cancelled(self) -> int:
        """Cut off by this client, as asked for; neither completed nor failed."""
        return sum(map(is_cancelled, self.records))

    @property
    def num_failed(self) -> int:
        return sum(not r.is_ok for r in self.records) - self.num_cancelled

    def __str__(self) -> str:
        lines = [
            str(self.lengths),
            f"{len(self.records)} sent in {self.duration_s:.1f} s, {self.num_failed} failed, {self.num_cancelled} cancelled; send lag p99 "
            f"{1e3 * self.send_lag_p99_s:.1f} ms, client loop lag p99 {1e3 * self.loop_lag_p99_s:.1f} ms",
            *self.notes,
        ]
        if not self.is_trustworthy:
            lines.append(
                f"NOT TRUSTWORTHY: the client lagged by more than {1e3 * MAX_LAG_S:g} ms; send less, or from a machine with more cores"
            )
        return "\n".join(lines)


async def run(
    base_url: str,
    spec: WorkloadSpec,
    *,
    vocab_size: int | None = None,
    timeout_s: float = 600.0,
    progress: bool | None = None,
    headers: dict[str, str] | None = None,
    labels: dict[str, str | float | int] | None = None,
    on_record: Callable[[RequestRecord], None] | None = None,
) -> LoadReport:
    """Sends the workload to ``base_url`` and returns when every request has ended, failed or timed out (``timeout_s`` each).

    ``vocab_size`` bounds the prompts' token ids where the spec does not; None asks the server (/v1/models). ``progress`` None shows a
    bar on a terminal or in a notebook. ``labels`` go into every record. ``on_record`` is called with each record as it is finished.
    Raises ConfigError for a workload that cannot be built; never for what the server does."""
    async with Client(
        base_url,
        spec.endpoint,
        model=spec.model,
        sampling=spec.sampling,
        extra_body=spec.extra_body,
        timeout_s=timeout_s,
        headers=headers,
    ) as client:
        info = await _info(client, spec, vocab_size)
        workload = spec.build(vocab_size or info.get("vocab_size"))
        client.model = client.model or info.get("id")
        bar = tqdm(total=len(workload.requests), unit="req", disable=not _shows_progress(progress), leave=False, file=sys.stderr)
        try:
            with _rare_garbage_collections():
                return await _Run(client, workload, bar, labels or {}, on_record).play()
        finally:
            bar.close()


def measure(base_url: str, spec: WorkloadSpec, **options: Any) -> LoadReport:
    """``run`` for code that is not async; works where a loop already runs (a notebook), since it has a thread and a loop of its own."""
    return _in_thread(lambda: run(base_url, spec, **options))


def play(base_url: str, spec: WorkloadSpec, **options: Any) -> list[RequestRecord]:
    """``measure(...).records``, with a warning where the client lagged; each record of such a run carries the label ``client_lagged``."""
    return measure(base_url, spec, **options).records


# ---- one run ---------------------------------------------------------------------------------------------------------


class _Run:
    def __init__(
        self, client: Client, workload: Workload, bar: tqdm, labels: dict[str, Any], on_record: Callable[[RequestRecord], None] | None
    ) -> None:
        self._client, self._workload, self._bar = client, workload, bar
        self._labels, self._on_record = labels, on_record
        self._prefix = uuid.uuid4().hex[:8]  # request ids never repeat, also between two plays of one spec
        self._bodies = [client.encode(request) for request in workload.requests]
        self._records: list[RequestRecord | None] = [None] * len(workload.requests)

    async def play(self) -> LoadReport:
        num_warmup_failed = await self._warm_up()
        lags: list[float] = []
        watch = asyncio.create_task(_watch_loop(lags))
        started_s = time.monotonic()
        try:
            await (self._closed_loop() if self._workload.spec.is_closed_loop else self._open_loop(started_s))
        finally:
            watch.cancel()
        return self._report(started_s, lags, num_warmup_failed)

    async def _warm_up(self) -> int:
        """Number of warm-up requests that failed."""
        waiting = list(reversed(self._workload.warmup))
        failed = 0

        async def user() -> None:
            nonlocal failed
            while waiting:
                request = waiting.pop()
                record = await self._client.send(request, request_id=f"{self._prefix}-warmup-{request.index}")
                failed += not record.is_ok

        await _gather([user() for _ in range(min(_WARMUP_USERS, len(waiting)))])
        return failed

    async def _open_loop(self, started_s: float) -> None:
        tasks: list[asyncio.Task] = []
        try:
            for request in self._workload.requests:
                assert request.at_s is not None
                scheduled_s = started_s + request.at_s
                if (wait_s := scheduled_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                tasks.append(asyncio.create_task(self._send(request, scheduled_s)))
            await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)

    async def _closed_loop(self) -> None:
        spec, waiting = self._workload.spec, list(reversed(self._workload.requests))
        assert spec.users is not None

        async def user() -> None:
            scheduled_s = time.monotonic()
            while waiting:
                await self._send(waiting.pop(), scheduled_s)
                scheduled_s = time.monotonic() + spec.think_time_s
                if spec.think_time_s:
                    await asyncio.sleep(spec.think_time_s)

        await _gather([user() for _ in range(min(spec.users, len(waiting)))])

    async def _send(self, request: WorkloadRequest, scheduled_s: float) -> None:
        index = request.index
        record = await self._client.send(request, self._bodies[index], request_id=f"{self._prefix}-{index}", scheduled_s=scheduled_s)
        record.labels.update(self._labels)
        self._records[index] = record
        self._bar.update()
        if self._on_record is not None:
            self._on_record(record)

    def _report(self, started_s: float, lags: list[float], num_warmup_failed: int) -> LoadReport:
        records = [record for record in self._records if record is not None]
        send_lags = [lag for record in records if (lag := send_lag_s(record)) is not None]
        report = LoadReport(
            records=records,
            lengths=self._workload.lengths,
            started_s=started_s,
            duration_s=time.monotonic() - started_s,
            send_lag_p99_s=_p99(send_lags),
            send_lag_max_s=max(send_lags, default=0.0),
            loop_lag_p99_s=_p99(_stamp_lags(lags)),
            num_warmup_failed=num_warmup_failed,
        )
        if num_warmup_failed:
            report.notes.append(f"{num_warmup_failed} of {len(self._workload.warmup)} warm-up requests failed")
        if self._workload.trace_rows_dropped:
            report.notes.append(f"{self._workload.trace_rows_dropped} rows of the trace were no usable requests and left out")
        if self._workload.lengths.is_changed:
            log.info("lengths: %s", self._workload.lengths)
        if not report.is_trustworthy:
            log.warning("%s", str(report).splitlines()[-1])
            for record in records:
                record.labels["client_lagged"] = 1
        return report


async def _info(client: Client, spec: WorkloadSpec, vocab_size: int | None) -> dict[str, Any]:
    needs_model = spec.endpoint != "generate" and spec.model is None
    return await client.node_info() if needs_model or (vocab_size is None and spec.vocab_size is None) else {}


async def _watch_loop(lags: list[float]) -> None:
    """How late this loop's own timers fire: what an answer's stamp may be late by."""
    while True:
        due = time.monotonic() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        lags.append(max(0.0, time.monotonic() - due))


def _stamp_lags(lags: list[float]) -> list[float]:
    """What stamps due at any moment would have been late by, from timers that each waited for the last one: a loop that stands still for
    L gives one sample of L and should have given L / period, L - period and so on down (as HdrHistogram corrects for what its own wait
    left out). Else a client that stands still for 100 ms every second has a p99 without a word of it."""
    return [lag - i * _LAG_PERIOD_S for lag in lags for i in range(1 + int(lag / _LAG_PERIOD_S))]


async def _gather(coroutines: list[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: list[asyncio.Task]) -> None:
    """Ends those that still run (the caller was interrupted) and waits for their connections to close."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@contextmanager
def _rare_garbage_collections() -> Iterator[None]:
    """Python's collector stops everything for milliseconds, at any moment, and finds nothing here (a request leaves no cycles): let it
    come seldom, and leave out what existed before the run."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0


def _shows_progress(progress: bool | None) -> bool:
    return progress if progress is not None else sys.stderr.isatty() or "ipykernel" in sys.modules


def _in_thread(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs the coroutine to its end on a loop in a new thread. Ctrl-C in the calling thread cancels it and waits for it to clean up."""
    result: list[T] = []
    errors: list[BaseException] = []
    loop = new_event_loop()
    task: list[asyncio.Task[T]] = []

    async def main() -> T:
        task.append(asyncio.ensure_future(make()))
        return await task[0]

    def body() -> None:
        try:
            result.append(loop.run_until_complete(main()))
        except BaseException as error:
            errors.append(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=body, name="loadgen", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        if task and thread.is_alive():
            loop.call_soon_threadsafe(task[0].cancel)
        thread.join(timeout=10)
        raise
    if errors:
        raise errors[0]
    return result[0]
