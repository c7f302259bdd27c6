"""Runs steps on all ranks: rank 0 here, the others in processes of their own that are told each step over zmq. Starts them, and notices
when one ends.

Every wait is bounded: start-up by a time-out and by the children's lives, a step by the time-out of the tensor-parallel group."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from ksana_lab.config.engine import EngineConfig
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.core.step import SchedulerOutput, StepTokens
from ksana_lab.engine.commands import CommandBuilder, FromRank, RankFailed, RankReady, RankSized, SetCache, Stop, ToRank
from ksana_lab.engine.host_blocks import num_host_blocks
from ksana_lab.engine.model_runner import PendingTokens
from ksana_lab.engine.worker import Worker
from ksana_lab.engine.worker_main import CONFIG_FILE, rank_address, rendezvous
from ksana_lab.errors import EngineDead
from ksana_lab.models.config import ModelConfig
from ksana_lab.process import parent_variables
from ksana_lab.tracing.recorder import NullRecorder

log = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0  # a large checkpoint from a slow disk
_STOP_TIMEOUT_S = 5.0
_DEATH_NOTICE_S = 3.0  # after an error of rank 0: how long to look whether another rank's end explains it
_LOG_TAIL_LINES = 30


class RankProcess:
    """One child. Its log goes to ours, and its last lines are kept."""

    def __init__(self, rank: int, ipc_dir: str, num_threads: int, on_exit: Callable[[], None]) -> None:
        self.rank = rank
        self._tail: deque[str] = deque(maxlen=_LOG_TAIL_LINES)
        self._on_exit = on_exit
        command = [sys.executable, "-m", "ksana_lab.engine.worker_main", "--rank", str(rank), "--ipc-dir", ipc_dir]
        self._process = subprocess.Popen(
            [*command, "--num-threads", str(num_threads)],
            env={**os.environ, **parent_variables()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name=f"rank{rank}-log", daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def describe_end(self) -> EngineDead:
        self._reader.join(timeout=1)
        return EngineDead(f"tensor-parallel rank {self.rank} ended with status {self._process.returncode}", "\n".join(self._tail))

    def stop(self, deadline: float) -> None:
        """Wait for it to end, kill it at ``deadline`` (time.monotonic)."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.info("killing rank %d", self.rank)
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=1)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._tail.append(line.rstrip("\n"))
                sys.stderr.write(line)
        self._process.wait()
        self._on_exit()


class Executor:
    """``submit`` and ``check`` belong to one thread. ``wake`` is rung, from any thread, when ``check`` would raise."""

    def __init__(self, config: EngineConfig, *, ipc_dir: str, recorder: NullRecorder, wake: Callable[[], None]) -> None:
        self._size = size = config.parallel.tensor_parallel_size
        self._wake = wake
        self._is_closing = False
        self._is_ready = False
        self._builder = CommandBuilder(config.runtime.seed)
        self._context = zmq.Context() if size > 1 else None
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self._children: list[RankProcess] = []
        self.sockets: list[zmq.Socket] = []  # of ranks 1..; poll them for reading
        self.worker: Worker | None = None
        try:
            ModelConfig.from_dir(config.model.model_dir).check_tensor_parallel(size)  # before anything is started
            self._start_children(config, ipc_dir)
            self.worker = Worker(
                config,
                0,
                init_method=rendezvous(ipc_dir),
                ipc_dir=ipc_dir,
                recorder=recorder,
                wake=wake,
                while_waiting=self._check_children,
            )
            num_blocks = self._agree_on_blocks()
            self.layout: KVLayout = self.worker.layout(num_blocks)
            self.num_host_blocks = num_host_blocks(config, self.layout)
            self.endpoints, self.devices = self._make_caches(num_blocks, self.num_host_blocks)
            self._is_ready = True
        except BaseException as error:
            explained = self._explain(error)
            self.close()
            if explained is error:
                raise
            raise explained from error

    def submit(self, out: SchedulerOutput) -> PendingTokens:
        """Start one step on every rank. Raises EngineDead when a rank is gone."""
        assert self.worker is not None
        command = self._builder.build(out)
        try:
            self._tell(command)
            return self.worker.execute(command)
        except Exception as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error

    def result(self, pending: PendingTokens) -> StepTokens:
        """Wait for a step's tokens. Raises EngineDead when they are worthless because a rank is gone."""
        try:
            return pending.result()
        except Exception as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error

    def skip(self, out: SchedulerOutput) -> None:
        """``out`` is empty and is not executed."""
        self._builder.note_gone(out.gone)

    def check(self) -> None:
        """Raises EngineDead, with its last log lines, when a rank has ended, TransferError when a connector has. Never blocks."""
        for socket in self.sockets:
            while socket.poll(0):
                message = self._decoder.decode(socket.recv())
                assert isinstance(message, RankFailed), message
                raise EngineDead(f"tensor-parallel rank {message.rank}: {message.error}")
        self._check_children()
        if self.worker is not None:  # last: another rank's end explains what this one says
            self.worker.check()

    def close(self) -> None:
        """End the other ranks and let go of memory. May be called twice."""
        self._is_closing = True
        for socket in self.sockets:
            try:
                socket.send(msgspec.msgpack.encode(Stop()), zmq.NOBLOCK)
            except zmq.Again:  # nobody at the other end
                pass
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.close()
        deadline = time.monotonic() + (_STOP_TIMEOUT_S if self._is_ready else 0)  # one that is loading would not hear
        for child in self._children:
            child.stop(deadline)
        del worker  # not before: the children may have its memory mapped
        for socket in self.sockets:
            socket.close(linger=0)
        self._children, self.sockets = [], []
        if self._context is not None:
            self._context.term()
            self._context = None

    # ---- start-up ----------------------------------------------------------------------------------------------------

    def _start_children(self, config: EngineConfig, ipc_dir: str) -> None:
        if self._size == 1:
            return
        assert self._context is not None
        num_threads = config.runtime.num_threads or max(1, torch.get_num_threads() // self._size)
        torch.set_num_threads(num_threads)
        Path(ipc_dir, CONFIG_FILE).write_text(config.model_dump_json(), encoding="utf-8")
        for rank in range(1, self._size):
            socket = self._context.socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.bind(rank_address(ipc_dir, rank))
            self.sockets.append(socket)
        self._children = [RankProcess(rank, ipc_dir, num_threads, self._on_child_exit) for rank in range(1, self._size)]

    def _agree_on_blocks(self) -> int:
        assert self.worker is not None
        counts = [self.worker.max_num_blocks()]
        for message in self._await_all(RankSized):
            counts.append(message.num_blocks)
        return min(counts)

    def _make_caches(self, num_blocks: int, num_host_blocks: int) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
        assert self.worker is not None
        self._tell(SetCache(num_blocks, num_host_blocks))
        self.worker.set_cache(num_blocks, num_host_blocks)
        endpoints = [self.worker.endpoint()]
        devices = [(self.worker.device.index or 0, self.worker.device_name)]
        for message in self._await_all(RankReady):
            endpoints.append(message.endpoint)
            devices.append((message.device_id, message.device_type))
        return endpoints, devices

    def _await_all(self, kind: type) -> list[Any]:
        """One message of ``kind`` from each other rank, in rank order."""
        deadline = time.monotonic() + START_TIMEOUT_S
        messages = []
        for socket in self.sockets:
            while not socket.poll(200):
                self._check_children()
                if time.monotonic() > deadline:
                    raise EngineDead(f"a tensor-parallel rank did not start within {START_TIMEOUT_S:g} s")
            message = self._decoder.decode(socket.recv())
            if isinstance(message, RankFailed):
                raise EngineDead(f"tensor-parallel rank {message.rank}: {message.error}")
            assert isinstance(message, kind), message
            messages.append(message)
        return messages

    # ---- the other ranks ---------------------------------------------------------------------------------------------

    def _tell(self, message: ToRank) -> None:
        """Never blocks: there is no high-water mark, and a rank that is gone is an error."""
        if not self.sockets:
            return
        data = msgspec.msgpack.encode(message)
        for rank, socket in enumerate(self.sockets, start=1):
            try:
                socket.send(data, zmq.NOBLOCK)
            except zmq.Again:
                raise EngineDead(f"tensor-parallel rank {rank} is not connected any more") from None

    def _check_children(self) -> None:
        for child in self._children:
            if not child.is_alive:
                raise child.describe_end()

    def _on_child_exit(self) -> None:
        """On a log thread. Rank 0 may be waiting for the dead one inside a kernel: leaving the group ends that wait."""
        if self._is_closing:
            return
        worker = self.worker
        if worker is not None and worker.device.type == "cuda":
            worker.tp.abort()
        self._wake()

    def _explain(self, error: BaseException) -> BaseException:
        """EngineDead when another rank's end is the cause of ``error``."""
        if not isinstance(error, Exception) or (isinstance(error, EngineDead) and error.log_tail):
            return error
        deadline = time.monotonic() + _DEATH_NOTICE_S
        while self._children:
            dead = next((child for child in self._children if not child.is_alive), None)
            if dead is not None:
                return dead.describe_end()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)  # an error path; there is nothing to wait on
        return error
