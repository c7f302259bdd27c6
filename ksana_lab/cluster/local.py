"""A cluster on this host as one object: starts router and nodes, waits until they serve, closes without leaving anything behind.

    with Cluster.from_yaml("configs/pd_1p1d_cpu.yaml", model_dir=".cache/tiny") as cluster:
        cluster.generate("Hello", max_tokens=8).text

Two clusters may live in one process, and one may be made again and again. Nodes that the file places on other hosts are waited for, not
started: run ``python -m ksana_lab.launch cluster FILE --only NAME`` there."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from ksana_lab.cluster import checks
from ksana_lab.cluster.ports import PortPool, is_this_host
from ksana_lab.cluster.process import ChildProcess, Spawner, wait_for_end, wait_until
from ksana_lab.cluster.topology import NodeSpec, Plan, RouterSpec, plan, refuse_contradictions
from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.config.environment import child_environment, visible_gpus
from ksana_lab.errors import ConfigError, KsanaLabError, ProcessDied
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.process import is_alive
from ksana_lab.protocol.node import comm_key
from ksana_lab.tracing.nsight import NsysSessions
from ksana_lab.types import Role, SamplingParams
from ksana_lab.workload.spec import WorkloadSpec

log = logging.getLogger(__name__)

RUN_DIR_VARIABLE = "KSANA_LAB_RUN_DIR"  # where a node makes its private folder; the cluster removes it with its own
_STOP_GRACE_S = 10.0
_NSYS_ATTEMPTS = 5
_NSYS_LAUNCH_TIMEOUT_S = 30.0
_NSYS_POLL_S = 0.05  # nsys offers nothing to wait on


@dataclass(frozen=True)
class Generation:
    """One completion of ``Cluster.generate``."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]


class Cluster:
    """The processes of one ClusterConfig. ``start`` and ``close`` may be left to ``with``."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        trace_dir: str | Path | None = None,
        log_dir: str | Path | None = None,
        only: Sequence[str] = (),
        source: str = "cluster",
        program: Sequence[str] = (sys.executable, "-m", "ksana_lab.launch"),
        nsys: bool = False,
    ) -> None:
        """Lays the cluster out; starts nothing. ``log_dir``: keep the processes' logs there (default: a private folder, removed by close).
        ``only``: start just these processes. ``program``: what a process's arguments are given to.
        ``nsys``: run the nodes under Nsight Systems, with reports in ``trace_dir``. Raises ConfigError."""
        self.config = config
        trace_dir = None if trace_dir is None else Path(trace_dir).expanduser()
        self._program = tuple(program)
        self._nsys = _nsys_sessions(trace_dir) if nsys else None
        self._ports = PortPool()
        try:
            self.plan = self._lay_out(trace_dir, source)
        except BaseException:
            self._ports.close()
            raise
        self._only = self._checked_only(only)
        self._log_dir = Path(log_dir).expanduser() if log_dir is not None else None
        self._run_dir: Path | None = None
        self._spawner: Spawner | None = None
        self._children: dict[str, ChildProcess] = {}
        self._client = httpx.Client(timeout=httpx.Timeout(10.0), trust_env=False)
        self._is_closed = False

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        model_dir: str | Path | None = None,
        **options: Any,
    ) -> Cluster:
        """Read a cluster file; ``overrides`` as in ``ClusterConfig.from_yaml``, ``options`` as in ``Cluster``. Starts nothing.

        Raises ConfigError."""
        config = ClusterConfig.from_yaml(path, overrides=overrides, model_dir=None if model_dir is None else str(model_dir))
        refuse_contradictions(config, str(path))
        return cls(config, source=str(path), **options)

    def _lay_out(self, trace_dir: str | Path | None, source: str) -> Plan:
        def choose_port(host: str) -> int:
            try:
                return self._ports(host)
            except OSError:
                raise ConfigError(
                    f"{source}: no port can be chosen for {host}, which is not this host; give its ports in the file"
                ) from None

        return plan(
            self.config,
            choose_port=choose_port,
            num_gpus=visible_gpus(),
            num_cores=_num_cores(),
            trace_dir=None if trace_dir is None else str(trace_dir),
            source=source,
        )

    def _checked_only(self, only: Sequence[str]) -> frozenset[str]:
        names = [process.name for process in self.plan.processes]
        for name in only:
            if name not in names:
                raise ConfigError(f"there is no process {name!r}; the processes are {', '.join(names)}")
        return frozenset(only)

    # ---- opening and closing

    def start(self) -> Cluster:
        """Start everything and wait until each node is ready and each pair can be routed to.

        Raises ConfigError for what can be known beforehand, ProcessDied with the last log lines for the rest; nothing runs afterwards."""
        if self._is_closed:
            raise KsanaLabError("this cluster is closed; make another with Cluster.from_yaml")
        if self._children:
            return self
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        mine = self._mine()
        for process in self.plan.processes:
            if process not in mine:
                log.info("%s runs on %s: start it there with --only %s", process.name, process.host, process.name)
        checks.refuse(self.preflight())
        for warning in self.plan.warnings:
            log.warning("%s", warning)
        _remove_abandoned_run_dirs()
        self._run_dir = Path(tempfile.mkdtemp(prefix=f"ksana_lab-{os.getpid()}-"))
        self._spawner = Spawner()
        atexit.register(self.close)
        for process in mine:  # the router first; a node that comes before it would only retry
            self._start_process(process)
        self._wait_ready(list(self._children.values()))
        if self._nsys is not None:
            self._nsys.start()

    def preflight(self) -> list[checks.Finding]:
        """What would keep the processes of this host from starting, as far as it can be known now."""
        visible, found = visible_gpus(), defaultdict[checks.Finding, list[str]](list)
        for process in self._mine():
            for finding in checks.process_preflight(process, visible):
                found[finding].append(process.name)
        if self._log_dir is not None:
            found[checks.directory_is_writable(self._log_dir, "log_dir (--log-dir)")].append("cluster")
        return [finding._replace(text=f"{', '.join(names)}: {finding.text}") for finding, names in found.items()]

    def _mine(self) -> list[RouterSpec | NodeSpec]:
        """What this host starts."""
        mine: list[RouterSpec | NodeSpec] = []
        for process in self.plan.processes:
            if (process.name in self._only) if self._only else is_this_host(process.host):
                mine.append(process)
        return mine

    def _start_process(self, spec: RouterSpec | NodeSpec) -> None:
        assert self._run_dir is not None and self._spawner is not None
        if isinstance(spec, RouterSpec) and spec.config.database_url is None:
            spec = RouterSpec(spec.config.model_copy(update={"database_url": f"sqlite:///{self._run_dir / 'router.db'}"}), spec.advertised)
        config_path = self._run_dir / f"{spec.name}.yaml"
        config_path.write_text(spec.config_text(), encoding="utf-8")
        log_dir = self._log_dir or self._run_dir
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"log_dir {log_dir} cannot be made: {error.strerror or error}") from None
        variables = {RUN_DIR_VARIABLE: str(self._run_dir)}
        nsys = self._nsys if isinstance(spec, NodeSpec) else None
        for _attempt in range(_NSYS_ATTEMPTS if nsys else 1):
            child = self._children[spec.name] = ChildProcess(
                spec.name,
                [*(nsys.prefix(spec.name) if nsys else ()), *self._program, *spec.arguments(config_path)],
                env=child_environment(os.environ, {**variables, **(nsys.environment if nsys else {})}),
                log_path=log_dir / f"{spec.name}.log",
                spawner=self._spawner,
            )
            child.start()
            if nsys is None or self._is_launched(child, config_path):
                return
            log.info("nsys gave %s up before it ran; starting it again", spec.name)
            self._end_profiled({str(config_path)})
            nsys.give_up(spec.name)

    def _is_launched(self, child: ChildProcess, config_path: Path) -> bool:
        """Whether nsys got as far as running the node. It launches one at a time: two that come up at once get into each other's way, and
        even one alone ends now and then with an error of its own semaphores on a busy machine (2022.4: a launch in ten)."""
        deadline = time.monotonic() + _NSYS_LAUNCH_TIMEOUT_S
        while not _profiled({str(config_path)}) and time.monotonic() < deadline:
            if wait_for_end([child], _NSYS_POLL_S):
                return False
        return True

    def _wait_ready(self, started: Sequence[ChildProcess], predecessor: str | None = None) -> None:
        """Until the router routes to all that runs here or elsewhere. ``predecessor``: an incarnation that must be forgotten by then.

        Nodes are not asked: one registers when its engine is ready, and a pair is routable when both sides have said so. Those that were
        killed before are not missed."""
        killed = {name for name, child in self._children.items() if child not in started and not child.is_alive}

        def missing() -> list[str]:
            if predecessor and predecessor in self._incarnations().values():
                return ["the router still knows the old process"]
            return self._unrouted(killed)

        wait_until(lambda: not missing(), self.config.start_timeout_s, "complete cluster", started, missing)

    def _incarnations(self) -> dict[str, str]:
        """inference_addr -> which start of the node the router knows."""
        nodes = (self._router_view() or {}).get("nodes", [])
        return {str(node.get("inference_addr")): str(node.get("incarnation") or "") for node in nodes}

    def _unrouted(self, without: set[str]) -> list[str]:
        """What the router does not route to yet, in words; empty when the cluster serves. ``without``: nodes that are not missed."""
        view = self._router_view()
        if view is None:
            return ["the router does not answer /nodes"]
        online = {node.get("inference_addr") for node in view.get("nodes", []) if node.get("is_online")}
        routable = {pair.get("comm_key") for pair in view.get("pairs", []) if pair.get("is_routable")}
        missing = []
        for node in self.plan.nodes:
            if node.name not in without and str(node.inference_addr) not in online:
                missing.append(f"{node.name} is not online at the router")
        for p, d in self.plan.pairs():
            if not without & {p.name, d.name} and comm_key(p.inference_addr, d.inference_addr) not in routable:
                missing.append(f"{p.name} and {d.name} are not connected")
        return missing

    def _router_view(self) -> dict[str, Any] | None:
        try:
            answer = self._client.get(f"{self.url}/nodes")
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    def close(self) -> None:
        """Stop everything: SIGTERM, then SIGKILL; returns when no process and no port is left. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        if self._nsys is not None:
            self._nsys.stop()
            self._end_profiled({str(self._run_dir / f"{node.name}.yaml") for node in self.plan.nodes} if self._run_dir else set())
        nodes = [child for name, child in self._children.items() if name != self.plan.router.name]
        router = [child for name, child in self._children.items() if name == self.plan.router.name]
        for group in (nodes, router):  # nodes sign off at a router that still listens
            for child in group:
                if child.is_alive:
                    child.ask_to_stop()
            for child in group:
                child.stop(_STOP_GRACE_S)
        if self._spawner is not None:
            self._spawner.close()
        self._client.close()
        self._ports.close()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def _end_profiled(self, config_paths: set[str]) -> None:
        """nsys starts a process as a child of its own agent and would kill it: ask the nodes themselves, so that they end in order."""
        nodes = _profiled(config_paths)
        for process in nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(nodes, timeout=_STOP_GRACE_S)

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- using it

    @property
    def url(self) -> str:
        """The router's address, where clients send their requests."""
        return self.plan.router.url

    @property
    def is_running(self) -> bool:
        return bool(self._children) and not self._is_closed

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Generation:
        """One completion through the router, waiting for all of it. ``prompt``: text or token ids. ``sampling``: fields of SamplingParams
        without ``n`` (greedy unless a temperature is given), and ``timeout_s``.

        Raises ProcessDied when a process of the cluster has ended, else KsanaLabError with the server's message."""
        timeout_s = sampling.pop("timeout_s", 600.0)
        body: dict[str, Any] = {"stream": False, "sampling_config": _sampling_config(sampling)}
        body.update({"prompt": prompt} if isinstance(prompt, str) else {"input_tokens": list(prompt)})
        try:
            answer = self._client.post(f"{self.url}/generate", json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            self.check()
            raise KsanaLabError(f"{self.url}/generate: {type(error).__name__}: {error}") from None
        if answer.status_code != 200:
            raise KsanaLabError(f"{self.url}/generate answered {answer.status_code}: {answer.text[:500]}")
        reply = answer.json()
        return Generation(reply["texts"][0], list(reply["output_token_ids"][0]), list(reply.get("input_token_ids") or []))

    def play(self, spec: WorkloadSpec, **options: Any) -> list[RequestRecord]:
        """Play a workload through the router; ``options`` as in ``workload.loadgen.play``. Works inside a notebook's running loop."""
        from ksana_lab.workload.loadgen import play  # the load generator's dependencies are not needed to start a cluster

        return play(self.url, spec, **options)

    def status(self) -> dict[str, Any]:
        """``url``, this object's ``processes`` (name, role, pid, state, url, devices), and the router's ``nodes`` and ``pairs``."""
        view = (self._router_view() if self.is_running else None) or {}
        processes = [self._process_status(process) for process in self.plan.processes]
        return {"url": self.url, "processes": processes, "nodes": view.get("nodes", []), "pairs": view.get("pairs", [])}

    def _process_status(self, spec: RouterSpec | NodeSpec) -> dict[str, Any]:
        child = self._children.get(spec.name)
        state = "not started" if child is None else "running" if child.is_alive else child.describe_end()
        return {
            "name": spec.name,
            "role": spec.role.value if isinstance(spec, NodeSpec) else "router",
            "pid": child.pid if child is not None and child.is_alive else None,
            "state": state,
            "url": spec.url,
            "devices": list(spec.device_ids) if isinstance(spec, NodeSpec) else [],
        }

    def logs(self, name: str, lines: int = 50) -> str:
        """The last lines of one process."""
        return self._child(name).tail(lines)

    def kill(self, name: str, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one process, SIGKILL by default: fault injection. Its own children die with it."""
        self._child(name).kill(sig)

    def restart(self, name: str) -> None:
        """Stop one process if it still runs, start it anew on the same ports, and wait until the cluster serves again."""
        spec = next((process for process in self.plan.processes if process.name == name), None)
        self._child(name).stop(_STOP_GRACE_S)
        assert spec is not None  # _child knows the names
        predecessor = self._incarnations().get(str(spec.inference_addr)) if isinstance(spec, NodeSpec) else None
        self._start_process(spec)
        self._wait_ready([self._child(name)], predecessor)

    def wait(self, timeout_s: float | None = None) -> list[str]:
        """Block until a process ends, or the time is up; the names of those that have ended."""
        return [child.name for child in wait_for_end(list(self._children.values()), timeout_s)]

    def check(self) -> None:
        """Raises ProcessDied, with its last log lines, when a process has ended."""
        for child in self._children.values():
            if not child.is_alive:
                raise child.died()

    def died(self, name: str) -> ProcessDied:
        """What to tell the user of a process that has ended."""
        return self._child(name).died()

    def _child(self, name: str) -> ChildProcess:
        if name not in self._children:
            raise KsanaLabError(f"{name!r} is not running here; the processes are {', '.join(self._children) or 'not started'}")
        return self._children[name]

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "running" if self._children else "not started"
        counts = {role: sum(node.role is role for node in self.plan.nodes) for role in Role}
        nodes = ", ".join(f"{count} {role.value}" for role, count in counts.items() if count)
        return f"<Cluster {self.url}: {nodes}, {state}>"


# SamplingParams' names -> /generate's; the others are spelled alike.
_SAMPLING_NAMES = {"max_tokens": "max_new_tokens", "top_k": "topk", "top_p": "topp", "stop": "stop_strings"}


def _sampling_config(sampling: dict[str, Any]) -> dict[str, Any]:
    """KsanaLLM's ``sampling_config``: greedy is topk 1, and a temperature without top_k draws from all it can name (1024)."""
    config: dict[str, Any] = {"max_new_tokens": SamplingParams.max_tokens}
    config |= {_SAMPLING_NAMES.get(name, name): value for name, value in sampling.items()}
    if isinstance(config.get("stop_strings"), str):
        config["stop_strings"] = [config["stop_strings"]]
    if not config.get("temperature"):
        return {**config, "topk": 1, "temperature": 1.0}
    return {**config, "topk": config.get("topk") or 1024, "do_sample": True}


def _nsys_sessions(trace_dir: str | Path | None) -> NsysSessions:
    if trace_dir is None:
        raise ConfigError("nsys needs a trace_dir (--trace DIR): its reports are read together with the event logs there")
    return NsysSessions(trace_dir, has_gpus=visible_gpus() > 0)


def _profiled(config_paths: set[str]) -> list[psutil.Process]:
    """The nodes of these files that run, whoever started them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if config_paths & set(command) and "python" in os.path.basename(command[0]):
            found.append(process)
    return found


def _remove_abandoned_run_dirs() -> None:
    """Private folders of clusters whose process was killed: nobody could remove them then."""
    for path in Path(tempfile.gettempdir()).glob("ksana_lab-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
