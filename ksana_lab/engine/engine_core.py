"""The engine process: messages in, steps, messages out. Owns the link to the API process and the signals; the work is ``Engine``'s.

With work it looks at the link between steps without waiting; without, it blocks on the link, on news of transfers and on the other ranks.
It always ends with a reason: EngineFailed and status 1, or status 0 after Shutdown, SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import zmq

from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.engine import Engine
from ksana_lab.errors import KsanaLabError
from ksana_lab.protocol.channel import EngineChannel
from ksana_lab.protocol.engine import (
    AbortRequest,
    AddRequest,
    DeclineRequest,
    EngineFailed,
    GetStatus,
    PeerUpdate,
    Profile,
    SequenceUpdate,
    Shutdown,
    StepUpdates,
    ToEngine,
)
from ksana_lab.tracing.recorder import open_recorder

log = logging.getLogger(__name__)

_STATUS_INTERVAL_NS = 1_000_000_000
SWITCH_S = 0.0002  # instead of 5 ms: for how long a transfer's or the log's thread may keep the interpreter from the model's


def run(config: EngineConfig, api_address: str) -> int:
    """Serve one node until told to stop; the exit status. Signals are handled while it runs, so call it on the main thread."""
    sys.setswitchinterval(SWITCH_S)
    channel = EngineChannel(api_address)
    recorder = open_recorder(config.runtime.trace_dir, f"{config.connector.role.value}.tp0")
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
    engine = None
    try:
        with _Signals() as signals:
            engine = Engine(config, recorder=recorder, private_dir=Path(api_address.removeprefix("ipc://")).parent)
            signals.ring = engine.wakeup.ring
            _Loop(engine, channel, signals).run()
        return 0
    except _Stopped:
        return 0
    except Exception as error:
        log.error("the engine cannot go on: %s", error)
        is_ours = isinstance(error, KsanaLabError)
        channel.send(EngineFailed(f"{type(error).__name__}: {error}" if is_ours else traceback.format_exc()))
        return 1
    finally:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ending already: a second one must not cut that short
        if engine is not None:
            engine.close()
        recorder.close()
        channel.close()
        signal.signal(signal.SIGTERM, before)


class _Stopped(BaseException):
    """A signal while the engine was still being built."""


class _Signals:
    """SIGTERM and SIGINT ask for an orderly end; before there is anything to end in order, they end at once."""

    def __init__(self) -> None:
        self.is_set = False
        self.ring: Callable[[], None] | None = None

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        if self.ring is None:
            raise _Stopped
        self.ring()


class _Loop:
    def __init__(self, engine: Engine, channel: EngineChannel, signals: _Signals) -> None:
        self._engine, self._channel, self._signals = engine, channel, signals
        self._is_stopping = False
        self._refused: list[SequenceUpdate] = []
        self._next_status_ns = 0
        self._was_idle = True
        self._poller = zmq.Poller()
        self._poller.register(channel.socket, zmq.POLLIN)
        for pollable in engine.pollables:
            self._poller.register(pollable, zmq.POLLIN)

    def run(self) -> None:
        self._channel.send(self._engine.ready())
        while not self._is_stopping:
            self._emit(self._engine.step())
            self._engine.flush()
            self._send_status()
            if not self._engine.is_busy and not self._signals.is_set:
                self._poller.poll(self._wait_ms())
            self._receive()
        self._emit(self._engine.fail_all("the engine is shutting down"))

    def _receive(self) -> None:
        for message in self._channel.drain():
            self._handle(message)
        if self._refused:  # not a step later: the peer of a pair would be heard first, and blamed
            self._emit([])
        self._is_stopping = self._is_stopping or self._signals.is_set

    def _handle(self, message: ToEngine) -> None:
        engine = self._engine
        if isinstance(message, AddRequest):
            if (refusal := engine.add(message)) is not None:
                self._refused.append(refusal)
        elif isinstance(message, AbortRequest):
            engine.abort(message.request_id, message.reason)
        elif isinstance(message, DeclineRequest):
            engine.decline(message.transfer, message.reason)
        elif isinstance(message, PeerUpdate):
            engine.update_peers(message)
        elif isinstance(message, GetStatus):
            self._channel.send(engine.status(message.token))
        elif isinstance(message, Profile):
            engine.profile(message.start)
        elif isinstance(message, Shutdown):
            self._is_stopping = True

    def _emit(self, updates: list[SequenceUpdate]) -> None:
        if self._refused:
            updates, self._refused = self._refused + updates, []
        if updates:
            scheduler = self._engine.scheduler
            self._channel.send(StepUpdates(updates, scheduler.num_waiting, scheduler.num_running))

    def _send_status(self) -> None:
        """Once a second while there is work, and once when it has run out: with the outcome of the self-check."""
        now_ns, is_idle = time.monotonic_ns(), self._engine.is_idle
        if (now_ns >= self._next_status_ns and not is_idle) or (is_idle and not self._was_idle):
            self._next_status_ns = now_ns + _STATUS_INTERVAL_NS
            self._channel.send(self._engine.status())
        self._was_idle = is_idle

    def _wait_ms(self) -> int:
        """Rounded up, so that a deadline is past when the wait is over."""
        return int(self._engine.wait_bound_s(time.monotonic_ns()) * 1000) + 1
