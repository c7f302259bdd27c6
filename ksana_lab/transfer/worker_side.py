"""One rank's connector: between the model's thread, the engine's coordinator and the data plane (``Sender`` on P, ``Receiver`` on D).

The control thread here only passes messages on: nothing it calls waits."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import zmq

from ksana_lab.config.engine import ConnectorOptions, EngineConfig
from ksana_lab.config.environment import explain_missing
from ksana_lab.core.connector import TransferMeta
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import ConfigError, TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer import packing
from ksana_lab.transfer.base import TransferBackend
from ksana_lab.transfer.coordinator import control_address
from ksana_lab.transfer.mailbox import Mailbox
from ksana_lab.transfer.receiver import Receiver
from ksana_lab.transfer.registry import host_id, make_backends, registers_source
from ksana_lab.transfer.sender import Sender
from ksana_lab.types import Role

log = logging.getLogger(__name__)

TRACKER_VARIABLE = "ENABLE_LAYER_TRACKER"
_STATS_INTERVAL_S = 1
_MILESTONES = (wire.RankSent, wire.RankReceived, wire.RankFailed, wire.Dropped)


class KVWorkerConnector:
    """``transfer.base.WorkerConnector``."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        tp_size: int,
        backends: list[TransferBackend],
        recorder: NullRecorder,
        wake: Callable[[], None],
        ipc_dir: str,
    ) -> None:
        self._options, self._rank, self._tp_size = config.connector, rank, tp_size
        self._backends, self._recorder, self._wake = backends, recorder, wake
        self._address = control_address(ipc_dir)
        self._is_prefill = config.connector.role is Role.PREFILL
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._fatal: BaseException | None = None
        self._mailbox: Mailbox[msgspec.Struct | None] = Mailbox()
        self._decoder = wire.Decoder(wire.ToRank)
        self._thread: threading.Thread | None = None
        self.on_first_layer: Callable[[], None] | None = None

    # ---- start-up ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if self._is_prefill and not registers_source(self._backends[0].name):  # only the decode node's cache is reached from outside
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
        while True:
            try:
                return self._backends[0].allocate(nbytes, device)
            except TransferError as error:
                if len(self._backends) == 1:
                    raise
                log.warning("not offering %s: %s", self._backends[0].name, error)
                self._backends.pop(0).close()

    def register(self, kv_cache: torch.Tensor, layout: KVLayout) -> None:
        """Raises TransferError when a backend cannot serve this memory, or KV of this layout cannot travel in the dtype asked for."""
        assert kv_cache.numel() == layout.total_bytes and kv_cache.dtype == torch.uint8, (kv_cache.shape, layout)
        kernels = packing.choose(layout, kv_cache.device) if self._options.wire_dtype != "auto" else None
        if self._is_prefill:
            self._sender = Sender(
                rank=self._rank, tp_size=self._tp_size, layout=layout, cache=kv_cache, backends=self._backends,
                options=self._options, recorder=self._recorder, report=self._mailbox.put, on_fatal=self._die,
                kernels=kernels,
            )  # fmt: skip
        else:
            self._receiver = Receiver(
                rank=self._rank, tp_size=self._tp_size, layout=layout, cache=kv_cache, backends=self._backends,
                recorder=self._recorder, report=self._mailbox.put, kernels=kernels,
            )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="kv-rank", daemon=True)
        self._thread.start()

    def endpoint(self) -> dict[str, Any]:
        backends = self._receiver.endpoints if self._receiver is not None else {}
        return {"rank": self._rank, "host_id": host_id(), "backends": backends}

    # ---- the model's thread ------------------------------------------------------------------------------------------

    def begin_step(self, meta: TransferMeta | None) -> None:
        """Raises TransferError when the step before was not reported whole."""
        if self._sender is not None:
            self._sender.begin_step(meta.sends if meta is not None else ())

    def layer_done(self, layer: int) -> None:
        if self._sender is not None:
            self._sender.layer_done(layer)
        if layer == 0 and self.on_first_layer is not None:
            self.on_first_layer()

    def poll(self) -> None:
        if self._fatal is not None:
            raise TransferError(f"KV transfer on rank {self._rank} died: {self._fatal!r}") from self._fatal

    @property
    def options(self) -> ConnectorOptions:
        return self._options

    def reconfigure(self, options: ConnectorOptions) -> None:
        """P, between requests: another mode, grouping or emulated link from the next announcement on. Measuring tools compare settings
        on one running node with it."""
        self._options = options
        if self._sender is not None:
            self._sender.reconfigure(options)

    def stats(self) -> dict[str, float]:
        if self._sender is not None:
            return self._sender.stats()
        return self._receiver.stats() if self._receiver is not None else {}

    def close(self) -> None:
        """Ends the transfers and lets go of the cache. May be called twice."""
        if self._sender is not None:
            self._sender.close()
        for backend in self._backends:
            backend.close()
        if self._receiver is not None:
            self._receiver.close()
        if self._thread is not None:
            self._mailbox.put(None)
            self._thread.join(timeout=10)
            self._thread = None

    # ---- the control thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.IDENTITY, f"rank-{self._rank}".encode())
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 10)  # the coordinator may bind later
            socket.connect(self._address)
            socket.send(wire.encode(wire.RankStats(self._rank, {})))
            self._serve(socket)
        except BaseException as error:
            log.exception("the control thread of rank %d died", self._rank)
            self._die(error)
        finally:
            socket.close()
            context.term()
            self._mailbox.close()

    def _serve(self, socket: zmq.Socket) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._mailbox.fileno(), zmq.POLLIN)
        said: dict[str, float] = {}
        say_at = 0.0
        while True:
            poller.poll(_STATS_INTERVAL_S * 1000)
            reports = self._mailbox.take_all()
            is_milestone = any(isinstance(report, _MILESTONES) for report in reports)
            if (is_milestone or time.monotonic() >= say_at) and (counters := self.stats()) != said:
                said, say_at = counters, time.monotonic() + _STATS_INTERVAL_S
                socket.send(wire.encode(wire.RankStats(self._rank, counters)))
            for report in reports:
                if report is None:
                    return
                socket.send(wire.encode(report))
            while socket.poll(0):
                self._hear(self._decoder.decode(socket.recv()))

    def _hear(self, message: msgspec.Struct) -> None:
        handlers = _SENDER if self._sender is not None else _RECEIVER
        getattr(self._sender or self._receiver, handlers[type(message)])(message)

    def _die(self, error: BaseException) -> None:
        self._fatal = error
        self._wake()


_SENDER = {wire.ConnectPeer: "connect_peer", wire.ClosePeer: "close_peer", wire.Target: "target", wire.Drop: "drop"}
_RECEIVER = {wire.Expect: "expect", wire.ClosePeer: "close_peer", wire.Drop: "drop"}


def make_worker_connector(
    config: EngineConfig, rank: int, tp_size: int, recorder: NullRecorder, wake: Callable[[], None], ipc_dir: str
) -> KVWorkerConnector:
    """The connector of one rank of a prefill or decode node. Call ``allocate``, ``register``, then ``endpoint``; then make the scheduler's
    side with every rank's endpoint and the same ``ipc_dir``. ``wake`` is called from another thread when ``poll`` would raise.

    Raises ConfigError on a prefill node without ENABLE_LAYER_TRACKER=1, TransferError for a backend this machine does not have."""
    options = config.connector
    if not options.role.is_disaggregated:
        raise TransferError("a mixed node has no KV transfer")
    if options.role is Role.PREFILL and os.environ.get(TRACKER_VARIABLE) != "1":
        raise ConfigError(explain_missing(TRACKER_VARIABLE, os.environ))
    host = options.coordinator_addr.host if options.coordinator_addr is not None else "127.0.0.1"
    wanted = config.runtime.device
    on_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    backends = make_backends(options.backend, host, on_gpu=on_gpu, is_packed=options.wire_dtype != "auto")
    return KVWorkerConnector(config, rank, tp_size, backends, recorder, wake, ipc_dir)
