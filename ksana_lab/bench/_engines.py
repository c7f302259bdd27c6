"""A prefill and a decode engine joined by the real connectors, each in a process of its own or the prefill engine in this one; no HTTP, no
router. What measuring tools and GPU tests drive."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ksana_lab.cluster.ports import PortPool
from ksana_lab.cluster.process import ChildProcess
from ksana_lab.config.engine import EngineConfig
from ksana_lab.config.environment import engine_environment, has_cuda_graphs
from ksana_lab.engine.engine import Engine
from ksana_lab.engine.engine_core import SWITCH_S
from ksana_lab.errors import EngineDead
from ksana_lab.protocol.engine import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStatus,
    FromEngine,
    GetStatus,
    PeerUpdate,
    SequenceUpdate,
    StepUpdates,
    TransferKey,
)
from ksana_lab.types import NodeAddr, SamplingParams

START_TIMEOUT_S = 180.0
COMM_KEY = "127.0.0.1:1__127.0.0.1:2"


class ProcessEngine:
    """``python -m ksana_lab.launch engine`` and this end of its channel."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        role = config.connector.role.value
        address = f"ipc://{folder}/{role}-{time.monotonic_ns()}"
        self._socket.bind(address)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)
        self._news: list[SequenceUpdate] = []
        self._status: EngineStatus | None = None
        self._is_ready = False
        path = folder / f"{role}.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "ksana_lab.launch", "engine", "--config-json", str(path), "--api", address]
        environment = engine_environment(os.environ, has_cuda_graphs=has_cuda_graphs(config.runtime))
        self.process = ChildProcess(role, command, env=environment)
        self.process.start()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready:
            self._read(100)
            if not self.process.is_alive:
                raise EngineDead("the engine did not start", self.process.tail())
            if time.monotonic() > deadline:
                raise EngineDead(f"the engine did not start within {START_TIMEOUT_S:g} s", self.process.tail())

    def add(self, request: AddRequest) -> None:
        self._send(request)

    def abort(self, request_id: str, reason: str) -> None:
        self._send(AbortRequest(request_id, reason))

    def update_peers(self, update: PeerUpdate) -> None:
        self._send(update)

    def step(self) -> list[SequenceUpdate]:
        """What has come; waits a moment for it."""
        self._read(1)
        news, self._news = self._news, []
        return news

    def status(self) -> EngineStatus:
        """Fresh. Raises EngineDead when the process is gone."""
        self._status, deadline = None, time.monotonic() + 30
        self._send(GetStatus(1))
        while self._status is None:
            self._read(100)
            if not self.process.is_alive or time.monotonic() > deadline:
                raise EngineDead("the engine does not answer", self.process.tail())
        return self._status

    def kill(self) -> None:
        self.process.kill(signal.SIGKILL)

    def close(self) -> None:
        """May be called twice."""
        self.process.stop(20.0)
        if not self._socket.closed:
            self._socket.close()
            self._context.term()

    def _send(self, message: msgspec.Struct) -> None:
        self._socket.send_multipart((b"engine", msgspec.msgpack.encode(message)))

    def _read(self, wait_ms: int) -> None:
        while self._socket.poll(wait_ms):
            wait_ms = 0
            message = self._decoder.decode(self._socket.recv_multipart()[1])
            if isinstance(message, StepUpdates):
                self._news += message.updates
            elif isinstance(message, EngineStatus):
                self._status = message if message.token >= 0 else self._status  # others come unasked
            elif isinstance(message, EngineReady):
                self._is_ready = True
            elif isinstance(message, EngineFailed):
                raise EngineDead(message.error, self.process.tail())


class LocalEngine:
    """The same interface over an engine of this process."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config)
        self._poller = zmq.Poller()
        for pollable in self.engine.pollables:
            self._poller.register(pollable, zmq.POLLIN)
        self.add, self.abort = self._add, self.engine.abort
        self.update_peers, self.status, self.close = self.engine.update_peers, self.engine.status, self.engine.close

    def step(self) -> list[SequenceUpdate]:
        """One turn; waits a moment for news when there is nothing to run, so that the connector's threads get their turn, too."""
        updates = self.engine.step()
        self.engine.flush()
        if not updates and not self.engine.is_busy:
            self._poller.poll(1)
        return updates

    def _add(self, request: AddRequest) -> None:
        refusal = self.engine.add(request)
        assert refusal is None, refusal


class Pair:
    """One prefill and one decode engine. ``sections``: fields of EngineConfig's sections for both, e.g. ``cache={"num_blocks": 99}``;
    ``devices``: GPUs of P's and of D's ranks; on a CPU their number counts alone. ``is_prefill_here``: P runs in this process, turned by
    ``drive``."""

    def __init__(
        self,
        model_dir: str,
        *,
        device: str,
        devices: tuple[Sequence[int], Sequence[int]] = ((0,), (1,)),
        is_prefill_here: bool = False,
        **sections: Any,
    ) -> None:
        os.environ.setdefault("ENABLE_LAYER_TRACKER", "1")
        self._stack = ExitStack()
        self._ports = PortPool()
        self._stack.callback(self._ports.close)
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ksana-lab-")))
        self._model_dir, self._device, self._devices, self._sections = model_dir, device, devices, sections
        self._addresses = {role: NodeAddr("127.0.0.1", self._ports("127.0.0.1")) for role in ("prefill", "decode")}
        self._numbers, self._comm_ids = itertools.count(1), itertools.count(1)
        self.engines: dict[str, Any] = {}
        try:
            self.engines["decode"] = self._start("decode")
            if is_prefill_here:
                sys.setswitchinterval(SWITCH_S)  # as in an engine's own process
                self.engines["prefill"] = LocalEngine(self.config("prefill"))
            else:
                self.engines["prefill"] = self._start("prefill")
                self.engines["prefill"].wait_ready()
            self.engines["decode"].wait_ready()
            self.join()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def config(self, role: str) -> EngineConfig:
        address, sections = self._addresses[role], self._sections
        connector = {"role": role, "coordinator_addr": address, "router_addr": NodeAddr("127.0.0.1", 1), "inference_addr": address}
        runtime = {"device": self._device, **sections.get("runtime", {})}
        devices = self._devices[role == "decode"]
        if self._device == "cuda":
            runtime["device_ids"] = tuple(devices)
        return EngineConfig.model_validate(
            {
                "model": {"model_dir": self._model_dir, **sections.get("model", {})},
                "parallel": {"tensor_parallel_size": len(devices)},
                "cache": sections.get("cache", {}),
                "scheduler": {"waiting_timeout_s": 60.0, **sections.get("scheduler", {})},
                "connector": {**connector, "connect_timeout_s": 60.0, "lease_s": 20.0, **sections.get("connector", {})},
                "runtime": runtime,
            }
        )

    def _start(self, role: str) -> ProcessEngine:
        return ProcessEngine(self.config(role), self._folder)

    def restart(self, role: str) -> None:
        """A new process in the place of one that was killed, and the pair joined again."""
        self.engines[role].close()
        self.engines[role] = self._start(role)
        self.engines[role].wait_ready()
        self.join()

    def join(self) -> None:
        """As a router's heartbeat answers do; returns when both sides are connected."""
        ranks = zip(self._addresses.values(), self._devices, strict=True)
        tuples = [(0, rank, str(address)) for address, devices in ranks for rank in range(len(devices))]
        update = PeerUpdate([PeerUpdate.Pair(COMM_KEY, f"comm-{next(self._comm_ids)}", tuples)])
        for engine in self.engines.values():
            engine.update_peers(update)
        self.drive(lambda: all(engine.status().connected for engine in self.engines.values()), 60.0)

    def add(self, role: str, number: int, prompt: list[int], sampling: SamplingParams, *, is_alone: bool = False) -> str:
        """``is_alone``: computed by this node as by a mixed one, nothing is transferred."""
        key = None if is_alone else TransferKey(COMM_KEY, number)
        request = AddRequest(f"r{number}", prompt, sampling, time.monotonic_ns(), transfer=key)
        self.engines[role].add(request)
        return request.request_id

    def next_number(self) -> int:
        return next(self._numbers)

    def drive(
        self,
        is_done: Callable[[], bool],
        timeout_s: float = 120.0,
        on_updates: Callable[[str, list[SequenceUpdate]], None] = lambda role, updates: None,
    ) -> None:
        """Turn and read both until ``is_done()``. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the pair is not done after {timeout_s:g} s: {self.statuses()}")
            for role, engine in self.engines.items():
                on_updates(role, engine.step())

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, timeout_s: float = 120.0) -> list[list[int]]:
        """The decode node's tokens of each prompt. Raises RuntimeError for a request that fails."""
        names: list[str] = []
        tokens: dict[str, list[int]] = {}
        finished: dict[str, set[str]] = {"prefill": set(), "decode": set()}
        for prompt in prompts:
            number = self.next_number()
            for role in ("prefill", "decode"):
                name = self.add(role, number, prompt, sampling)
            names.append(name)
            tokens[name] = []

        def collect(role: str, updates: list[SequenceUpdate]) -> None:
            for update in updates:
                if update.error is not None:
                    raise RuntimeError(f"{role}: {update.error}")
                if role == "decode":
                    tokens[update.request_id] += update.new_token_ids
                if update.finish is not None:
                    finished[role].add(update.request_id)

        self.drive(lambda: all(len(done) == len(names) for done in finished.values()), timeout_s, collect)
        return [tokens[name] for name in names]

    def statuses(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for role, engine in self.engines.items():
            try:
                found[role] = engine.status()
            except EngineDead as error:
                found[role] = str(error)
        return found

    def wait_clean(self, timeout_s: float = 30.0) -> None:
        """Until no block is held and nothing is on its way. Raises TimeoutError that shows what is left."""

        def is_clean() -> bool:
            return not any(left_of(engine.status()) for engine in self.engines.values())

        self.drive(is_clean, timeout_s)

    def close(self) -> None:
        """May be called twice."""
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()
        self._stack.close()


def left_of(status: EngineStatus) -> int:
    """Blocks and sequences that a node without work must not have."""
    used = status.num_blocks - status.num_free_blocks + status.num_leaked_blocks
    states = sum(value for name, value in status.transfer.items() if name.startswith("state_") or name == "quarantined")
    return used + status.num_waiting + status.num_running + status.num_waiting_kv + status.num_held + int(states)
