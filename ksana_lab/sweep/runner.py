"""Runs a sweep: starts each cluster once, plays every point on it, keeps what came out, goes on after a failure, resumes after anything.

    runs = await Sweep.from_yaml("configs/sweeps/pd_ratio_cpu.yaml").run()     # in a cell; a DataFrame, one row per run
    runs = Sweep.from_yaml(path).run_sync()                                    # in a script

All work happens in one thread of its own, the load generator on an event loop of its own: a notebook's loop stays free, and its
callbacks do not delay the stamps of a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from tqdm.auto import tqdm

from ksana_lab.cluster import checks
from ksana_lab.cluster.local import Cluster
from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.errors import ConfigError, KsanaLabError
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.sweep import report as reports
from ksana_lab.sweep import search
from ksana_lab.sweep.environment import capture, code_version, differences
from ksana_lab.sweep.events import EventTap
from ksana_lab.sweep.space import Schedule, Setup, Space, SweepConfig, SweepPoint, schedule_of
from ksana_lab.sweep.store import Manifest, Store, other_runs, read_environment, read_failures, read_point
from ksana_lab.tracing.phases import add_phases
from ksana_lab.workload import loadgen
from ksana_lab.workload.event_loop import new_event_loop
from ksana_lab.workload.spec import WorkloadSpec

log = logging.getLogger(__name__)

_DRAIN_S = 2.0  # after the last sending, in an estimate
_START_S = {"cpu": 8.0, "gpu": 60.0}  # of a cluster, where none has been timed yet


class RunningCluster(Protocol):
    """What a sweep needs of ``cluster.local.Cluster``."""

    plan: Any  # .nodes: each with .name and .config_text()

    @property
    def url(self) -> str: ...

    def preflight(self) -> list[checks.Finding]: ...

    def start(self) -> Any: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class Player(Protocol):
    """Sends a workload and reports; ``cancel`` may be called from another thread and makes ``play`` raise."""

    def play(self, url: str, spec: WorkloadSpec, *, timeout_s: float, labels: dict[str, Any]) -> loadgen.LoadReport: ...

    def cancel(self) -> None: ...


MakeCluster = Callable[[ClusterConfig, Path | None, Path], RunningCluster]  # config, trace_dir, log_dir


def local_cluster(config: ClusterConfig, trace_dir: Path | None, log_dir: Path) -> Cluster:
    return Cluster(config, trace_dir=trace_dir, log_dir=log_dir, source="sweep")


class LoadPlayer:
    """workload.loadgen on a loop of the calling thread."""

    def __init__(self) -> None:
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task] | None = None

    def play(self, url: str, spec: WorkloadSpec, *, timeout_s: float, labels: dict[str, Any]) -> loadgen.LoadReport:
        loop = new_event_loop()
        try:
            task = loop.create_task(loadgen.run(url, spec, timeout_s=timeout_s, labels=labels, progress=False))
            self._running = (loop, task)
            return loop.run_until_complete(task)
        finally:
            self._running = None
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def cancel(self) -> None:
        if (running := self._running) is not None:
            with contextlib.suppress(RuntimeError):  # it ended and closed its loop meanwhile
                running[0].call_soon_threadsafe(running[1].cancel)


@dataclass(frozen=True)
class Progress:
    """One step of a sweep. ``state``: ``kept`` (it was there), ``starting`` (a cluster), ``measuring``, ``done`` or ``failed``.

    ``row``: the new row of results, for a plot that grows. ``total`` of a search is its upper bound."""

    state: str
    point: str
    num_done: int
    num_failed: int
    total: int
    row: dict[str, Any] | None = None
    error: str | None = None


class Stopped(KsanaLabError):
    """The sweep was told to stop; run it again to go on."""


class Sweep:
    """One sweep and its folder. Making one checks everything that can be known; nothing is started or written."""

    def __init__(
        self,
        config: SweepConfig,
        *,
        out: str | Path | None = None,
        model_dir: str | Path | None = None,
        source: str = "sweep",
        make_cluster: MakeCluster = local_cluster,
        player: Player | None = None,
    ) -> None:
        """``out``: where results go and are found again, default ``runs/<name>``. Raises ConfigError."""
        self.config = config
        self.space = Space(config, model_dir=None if model_dir is None else str(model_dir), source=source)
        self.folder = Path(out) if out is not None else Path("runs") / (config.name or "sweep")
        self._make_cluster, self._player = make_cluster, player or LoadPlayer()
        self._code_version = code_version()
        self._schedules: dict[str, Schedule] = {}
        for setup in self.space.setups:
            self._schedule(setup)
        self._store = Store(self.folder, self._manifest())
        self._stop = threading.Event()

    @classmethod
    def from_yaml(cls, path: str | Path, *, overrides: Sequence[str] = (), **options: Any) -> Sweep:
        """``overrides`` as in SweepConfig.from_yaml, ``options`` as in Sweep. Raises ConfigError."""
        return cls(SweepConfig.from_yaml(path, overrides=overrides), source=str(path), **options)

    def _manifest(self) -> Manifest:
        return Manifest(
            name=self.config.name or "sweep",
            code_version=self._code_version,
            axes=[axis.name for axis in self.space.axes],
            slo=dict(self.config.slo),
            target=self.config.target,
            runs={} if self.config.search else {point.run_id(self._code_version): self.columns(point) for point in self.space.points()},
        )

    # ---- running

    async def run(self, *, progress: bool | None = None, on_progress: Callable[[Progress], None] | None = None) -> pd.DataFrame:
        """Runs what is missing; returns ``load_results(self.folder)``. To be awaited in the cell that makes it.

        ``progress`` None shows a bar on a terminal or in a notebook; ``on_progress`` is called in this thread, so it may draw. Cancelling
        it (a notebook's stop button) ends the measurement and the cluster, and what is finished stays.

        Raises ConfigError before anything starts. A point that fails does not raise: see ``failures``."""
        loop = asyncio.get_running_loop()
        with self._bar(progress) as bar:

            def tell(step: Progress) -> None:
                loop.call_soon_threadsafe(self._tell, step, bar, on_progress)

            self._stop.clear()
            work = loop.run_in_executor(None, self._work, tell)
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                while not work.done():  # a measurement that was just about to start is asked again
                    self.stop()
                    await asyncio.wait([work], timeout=1.0)
                with contextlib.suppress(Stopped):
                    work.result()
                raise
            await asyncio.sleep(0)  # callbacks of the last steps
        return reports.write_report(self.folder)

    def run_sync(self, *, progress: bool | None = None, on_progress: Callable[[Progress], None] | None = None) -> pd.DataFrame:
        """``run`` for a script, or for a cell that does not await. ``on_progress`` is called in another thread."""
        errors: list[BaseException] = []
        with self._bar(progress) as bar:

            def work() -> None:
                try:
                    self._work(lambda step: self._tell(step, bar, on_progress))
                except BaseException as error:  # raised below, in the caller's thread
                    errors.append(error)

            self._stop.clear()
            thread = threading.Thread(target=work, name="sweep", daemon=True)
            thread.start()
            try:
                while thread.is_alive():
                    thread.join(1.0)  # bounded, so that a signal is seen
            except BaseException:  # Ctrl-C, SIGTERM
                for _ in range(60):
                    self.stop()  # again: a measurement may just have been about to start
                    thread.join(timeout=1.0)
                    if not thread.is_alive():
                        break
                raise
        if errors:
            raise errors[0]
        return reports.write_report(self.folder)

    def stop(self) -> None:
        """Ends a running sweep as soon as its processes allow; may be called from any thread."""
        self._stop.set()
        self._player.cancel()

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The last failed attempt of every point that has not succeeded since."""
        return [failure for failure in read_failures(self.folder) if failure["run_id"] in self._store.manifest.run_ids]

    @property
    def results(self) -> pd.DataFrame:
        """What is finished, also while it runs."""
        return reports.load_results(self.folder)

    def _bar(self, progress: bool | None) -> tqdm:
        shown = progress if progress is not None else sys.stderr.isatty() or "ipykernel" in sys.modules
        return tqdm(total=self.num_points, unit="run", desc=self.config.name, disable=not shown, file=sys.stderr)

    @staticmethod
    def _tell(step: Progress, bar: tqdm, on_progress: Callable[[Progress], None] | None) -> None:
        bar.set_postfix_str(f"{step.state}: {step.point}"[:60], refresh=False)
        bar.update(step.num_done + step.num_failed - bar.n)
        bar.refresh()
        if on_progress is not None:
            on_progress(step)

    def _work(self, tell: Callable[[Progress], None]) -> None:
        with self._store as store:
            self._preflight()
            with contextlib.closing(_Runs(self, store, tell)) as runs:
                if self.config.search is None:
                    for point in self.space.points():
                        runs.row(point)
                else:
                    for setup in self.space.setups:
                        self._search(setup, runs)

    def _preflight(self) -> None:
        """What would keep a cluster from starting, for each that is needed, before the first starts."""
        for setup in {setup.cluster_key: setup for setup in self.space.setups}.values():
            with contextlib.closing(self._make_cluster(setup.cluster, None, self._store.logs(setup.cluster_key))) as cluster:
                checks.refuse(cluster.preflight())

    def _search(self, setup: Setup, runs: _Runs) -> None:
        options = self.config.search
        assert options is not None

        def attainment(rate: float) -> float | None:
            at_rate = self.space.at_rate(setup, rate)
            rows = [runs.row(self.space.point(at_rate, repeat)) for repeat in range(self.config.repeats)]
            values = [row["slo_attainment"] for row in rows if row is not None]
            return sum(values) / len(values) if len(values) == len(rows) and None not in values else None

        found = search.highest_rate(
            attainment, options.low, options.high, target=self.config.target, tolerance=options.tolerance, max_rates=options.max_rates
        )
        runs.skip_rest_of(options.max_rates * self.config.repeats, 0 if found is None else len(found.outcomes) * self.config.repeats)

    # ---- looking ahead

    @property
    def num_points(self) -> int:
        """Of a search, at most so many."""
        per_setup = self.config.repeats * (self.config.search.max_rates if self.config.search else 1)
        return len(self.space.setups) * per_setup

    def _schedule(self, setup: Setup) -> Schedule:
        if setup.workload_key not in self._schedules:
            self._schedules[setup.workload_key] = schedule_of(setup.workload)
        return self._schedules[setup.workload_key]

    def columns(self, point: SweepPoint) -> dict[str, Any]:
        """What the row of this point says besides its measurements."""
        labels = point.setup.labels
        return {
            "rate": labels["rate"] if "rate" in labels else self._schedule(point.setup).rate,
            **self.space.columns(point.setup),
            "repeat": point.repeat,
            "seed": point.workload.seed,
        }

    def describe(self) -> str:
        """What would run, what is there already, and how long the rest takes: ``--dry-run``."""
        search_options = self.config.search
        points = self.space.points()
        kept = [self._store.has(point.run_id(self._code_version)) for point in points]
        names = [name for name in self._label_names() if name != "split"]
        rows: list[tuple[str, ...]] = [("run", "cluster", "system", "split", *names, "repeat", "requests", "state")]
        for point, is_kept in zip(points, kept, strict=True):
            columns = self.columns(point)
            labels = tuple(str(point.setup.labels.get(name, "-")) for name in names)
            state = "finished" if is_kept else "searched from here" if search_options else "to do"
            count = str(self._schedule(point.setup).num_requests)
            ids = (point.run_id(self._code_version), point.cluster_key[:6])
            rows.append((*ids, columns["system"], columns["split"], *labels, str(point.repeat), count, state))
        todo = [point for point, is_kept in zip(points, kept, strict=True) if not is_kept]
        starts = len(list(itertools.groupby(todo, key=lambda point: point.cluster_key)))
        most = f"at most {self.num_points} runs" if search_options else f"{len(points)} runs"
        before = f"{sum(kept)} finished before{self._others()}"
        lines = [f"sweep {self.config.name}: {most}, {starts} cluster starts, {before}; results in {self.folder}"]
        lines += _aligned(rows)
        lines.append(self._estimate(todo, starts))
        if self.config.slo:
            bounds = ", ".join(f"{name} <= {bound:g} s" for name, bound in self.config.slo.items())
            lines.append(f"slo: {bounds}, for {self.config.target:.0%} of the requests")
        lines += [f"lengths: {text}" for text in dict.fromkeys(schedule.lengths for schedule in self._schedules.values())]
        return "\n".join(lines)

    def _others(self) -> str:
        """Of a search nothing: which runs are its own shows as it goes."""
        count = len(other_runs(self.folder, self._store.manifest))
        return f" (and {count} other runs, which these results leave out)" if count and not self.config.search else ""

    def _label_names(self) -> list[str]:
        return list(dict.fromkeys(name for setup in self.space.setups for name in setup.labels))

    def _estimate(self, todo: Sequence[SweepPoint], starts: int) -> str:
        timed = [read_point(self.folder, run_id)["timing"] for run_id in self._store.manifest.run_ids if self._store.has(run_id)]
        start_s = _mean([t["cluster_start_s"] for t in timed if t.get("cluster_start_s")])
        if start_s is None:
            is_gpu = any(node.device_ids for setup in self.space.setups for node in self.space.layout(setup).nodes)
            start_s = _START_S["gpu" if is_gpu else "cpu"]
        run_s = _mean([t["run_s"] for t in timed])
        spans = [self._schedule(point.setup).span_s for point in todo]
        known = sum((_DRAIN_S + span) if span is not None else (run_s or 0.0) for span in spans)
        unknown = sum(span is None for span in spans) if run_s is None else 0
        factor = self.config.search.max_rates if self.config.search else 1
        total = starts * start_s + known * factor
        note = f", and {unknown} closed-loop runs, whose length is not known yet" if unknown else ""
        most = "at most about" if self.config.search else "about"
        return f"estimate: {most} {_duration(total)} ({starts} starts of {start_s:.0f} s, {len(todo) * factor} runs{note})"


class _Runs:
    """The points of one call of ``run``, with the cluster that is up."""

    def __init__(self, sweep: Sweep, store: Store, tell: Callable[[Progress], None]) -> None:
        self._sweep, self._store, self._tell = sweep, store, tell
        self._num_done = self._num_failed = 0
        self._up: _Up | None = None
        self._broken: dict[str, str] = {}  # cluster key -> why it does not start
        self._environment: dict[str, Any] | None = None  # of this process, once it is needed
        self._warned: set[tuple[str, ...]] = set()

    def row(self, point: SweepPoint) -> dict[str, Any] | None:
        """The summary of one point, measured unless it is there; None when it failed, which is then on record.

        Raises Stopped."""
        run_id = point.run_id(self._sweep._code_version)
        self._store.add_run(run_id, self._sweep.columns(point))
        if self._store.has(run_id):
            self._warn_of_another_environment(run_id)
            self._num_done += 1
            return self._told("kept", point, row=self._read(run_id))
        self._check_stop()
        try:
            if point.cluster_key in self._broken:
                raise KsanaLabError(f"its cluster did not start: {self._broken[point.cluster_key]}")
            run_id = self._measure(point, run_id)
        except asyncio.CancelledError:
            raise Stopped(f"stopped; run it again to go on from {self._store.folder}") from None
        except Exception as error:
            self._check_stop()
            self._drop_cluster()  # in what state it is nobody knows
            text = f"{type(error).__name__}: {error}"
            details = "" if isinstance(error, KsanaLabError) else traceback.format_exc()
            self._store.fail(run_id, point, text, details)
            log.error("%s failed: %s", point, text.splitlines()[0])
            self._num_failed += 1
            self._told("failed", point, error=text)
            return None
        self._num_done += 1
        return self._told("done", point, row=self._read(run_id))

    def skip_rest_of(self, most: int, made: int) -> None:
        """A search needed fewer runs than it might have."""
        self._num_done += most - made

    def close(self) -> None:
        self._drop_cluster()

    def _measure(self, point: SweepPoint, run_id: str) -> str:
        """The run's id: another than foreseen where the source was edited before the cluster started."""
        sweep, store = self._sweep, self._store
        up = self._cluster(point)
        if up.code_version != sweep._code_version:
            log.warning("the source was edited since the sweep began; %s is kept as a run of %s", point, up.code_version)
            run_id = point.run_id(up.code_version)
            store.add_run(run_id, sweep.columns(point))
            if store.has(run_id):
                return run_id
        self._check_stop()
        self._told("measuring", point)
        columns = sweep.columns(point)
        folder = store.partial(run_id)
        if up.tap is not None:
            up.tap.mark()
        started_s = time.monotonic()
        labels = {name: value for name, value in columns.items() if isinstance(value, (str, int, float))}
        report = sweep._player.play(up.cluster.url, point.workload, timeout_s=sweep.config.request_timeout_s, labels=labels)
        up.cluster.check()
        if not any(record.is_ok for record in report.records):
            error = next((record.error for record in report.records if record.error), "there was none")
            raise KsanaLabError(f"no request completed; the first said: {error}")
        run_s = time.monotonic() - started_s
        if up.tap is not None:
            report.notes += _join_events(up.tap, folder / "events", report.records)
        timing = {"run_s": run_s, "cluster_start_s": up.start_s, "unix_s": time.time()}
        nodes = {node.name: node.config_text() for node in up.cluster.plan.nodes}
        facts = {
            "is_trustworthy": report.is_trustworthy,
            "send_lag_p99_s": report.send_lag_p99_s,
            "loop_lag_p99_s": report.loop_lag_p99_s,
            "code_version": up.code_version,
        }
        store.save(run_id, point, report, {**columns, **facts}, slo=sweep.config.slo_or_none, nodes=nodes, timing=timing, folder=folder)
        return run_id

    def _cluster(self, point: SweepPoint) -> _Up:
        """The cluster of this point, kept from the last one where it is the same."""
        if self._up is not None and self._up.key == point.cluster_key:
            return self._up
        self._drop_cluster()
        self._told("starting", point)
        key, stack, started_s, version = point.cluster_key, contextlib.ExitStack(), time.monotonic(), code_version()
        try:
            raw = stack.enter_context(self._store.raw_events(key)) if self._sweep.config.events else None
            cluster = self._sweep._make_cluster(point.setup.cluster, raw, self._store.logs(key))
            stack.callback(cluster.close)
            cluster.start()
        except Exception as error:
            stack.close()
            self._broken[key] = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise
        except BaseException:
            stack.close()
            raise
        self._up = _Up(key, cluster, EventTap(raw) if raw else None, time.monotonic() - started_s, version, stack)
        return self._up

    def _drop_cluster(self) -> None:
        if self._up is not None:
            up, self._up = self._up, None
            up.stack.close()

    def _check_stop(self) -> None:
        if self._sweep._stop.is_set():
            raise Stopped(f"stopped; run it again to go on from {self._store.folder}")

    def _read(self, run_id: str) -> dict[str, Any]:
        point = read_point(self._store.folder, run_id)
        slo, summary = self._sweep.config.slo_or_none, point["summary"]
        if point["slo"] != (slo and vars(slo)):  # the bounds were changed since; the records were not
            summary = reports.load_results(self._store.folder).set_index("run_id").loc[run_id].to_dict()
        return {"run_id": run_id, **summary, **self._store.manifest.columns(point)}

    def _warn_of_another_environment(self, run_id: str) -> None:
        """Once for each way in which kept runs differ from what would be measured now."""
        if self._environment is None:
            self._environment = {**capture(), "code_version": self._sweep._code_version}
        kept = read_environment(self._store.folder, run_id)
        changes = tuple(f"{name}: {then}, now {now}" for name, (then, now) in differences([kept, self._environment]).items())
        if changes and changes not in self._warned:
            self._warned.add(changes)
            said = "; ".join(changes)
            log.warning("runs are kept that were measured in another environment: %s; to measure all in one, choose another --out", said)

    def _told(self, state: str, point: SweepPoint, *, row: dict[str, Any] | None = None, error: str | None = None) -> dict[str, Any] | None:
        self._tell(Progress(state, str(point), self._num_done, self._num_failed, self._sweep.num_points, row, error))
        return row


@dataclass
class _Up:
    """A cluster that runs."""

    key: str
    cluster: RunningCluster
    tap: EventTap | None
    start_s: float
    code_version: str  # when it started: its processes have read the source then
    stack: contextlib.ExitStack = field(repr=False)


def _join_events(tap: EventTap, folder: Path, records: Sequence[RequestRecord]) -> list[str]:
    """Copy the event logs of a run there and give its records their phases; what falls short, in words."""
    done = [record for record in records if record.is_ok]
    notes = [] if tap.copy_to(folder, (r.request_id for r in done)) else ["the event logs do not show the end of every request"]
    try:
        count = add_phases(done, folder)
    except (ConfigError, LookupError, TypeError, ValueError) as error:  # a log of another version; the measurement stands without phases
        return [*notes, f"the event logs cannot be joined: {type(error).__name__}: {error}"]
    return notes if count == len(done) else [*notes, f"the event logs tell the phases of {count} of {len(done)} requests"]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
