"""Process of a tensor-parallel rank other than 0: hears commands from rank 0's process and carries them out. It speaks only to say that it
is ready or failed; tokens are rank 0's to report, and its connector talks to the coordinator by itself.

    python -m ksana_lab.engine.worker_main --rank 1 --ipc-dir DIR        (started by executor.py; not by hand)

Ends with its parent, whatever ends that."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec
import torch
import zmq

from ksana_lab import log as log_format
from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.commands import FromRank, RankFailed, RankReady, RankSized, SetCache, StepCommand, Stop, ToRank
from ksana_lab.engine.wakeup import Wakeup
from ksana_lab.engine.worker import Worker
from ksana_lab.process import die_with_parent
from ksana_lab.tracing.recorder import open_recorder

log = logging.getLogger(__name__)

CONFIG_FILE = "engine.json"


def rank_address(ipc_dir: str, rank: int) -> str:
    return f"ipc://{ipc_dir}/rank{rank}.sock"


def rendezvous(ipc_dir: str) -> str:
    return f"file://{ipc_dir}/tp-store"


class RankLoop:
    def __init__(self, config: EngineConfig, rank: int, ipc_dir: str) -> None:
        self.rank = rank
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._wakeup = Wakeup()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(rank_address(ipc_dir, rank))
        self._recorder = open_recorder(config.runtime.trace_dir, f"{config.connector.role.value}.tp{rank}")
        self._worker: Worker | None = None
        self._config, self._ipc_dir = config, ipc_dir

    def run(self) -> int:
        try:
            self._serve()
            return 0
        except Exception as error:
            log.exception("rank %d cannot go on", self.rank)
            self._send(RankFailed(self.rank, f"{type(error).__name__}: {error}"))
            return 1
        finally:
            self._close()

    def _serve(self) -> None:
        worker = self._worker = Worker(
            self._config,
            self.rank,
            init_method=rendezvous(self._ipc_dir),
            ipc_dir=self._ipc_dir,
            recorder=self._recorder,
            wake=self._wakeup.ring,
        )
        self._send(RankSized(self.rank, worker.max_num_blocks()))
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        while True:
            poller.poll()  # for ever: the parent's end is ours
            self._wakeup.clear()
            while self._socket.poll(0):
                command = self._decoder.decode(self._socket.recv())
                if isinstance(command, Stop):
                    return
                if isinstance(command, SetCache):
                    worker.set_cache(command.num_blocks, command.num_host_blocks)
                    device = worker.device
                    self._send(RankReady(self.rank, device.index or 0, worker.device_name, worker.endpoint()))
                elif isinstance(command, StepCommand):
                    worker.execute(command)
            worker.check()

    def _send(self, message: FromRank) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._recorder.close()
        self._wakeup.close()
        self._socket.close()
        self._context.term()


def main(argv: list[str] | None = None) -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.engine.worker_main", description="A rank of a tensor-parallel engine.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ipc-dir", required=True)
    parser.add_argument("--num-threads", type=int, default=0)
    args = parser.parse_args(argv)
    config = EngineConfig.model_validate_json(Path(args.ipc_dir, CONFIG_FILE).read_text(encoding="utf-8"))
    log_format.setup(f"{config.connector.role.value}.tp{args.rank}")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    return RankLoop(config, args.rank, args.ipc_dir).run()


if __name__ == "__main__":
    sys.exit(main())
