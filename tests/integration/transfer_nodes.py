"""Two real ends of KV transfer without a model: random numbers written into a cache stand for prefill, the rest is the real thing."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from ksana_lab.config.engine import ConnectorOptions, EngineConfig, ModelOptions, RuntimeOptions, SchedulerOptions
from ksana_lab.core.connector import FirstToken, TransferNews
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.core.sequence import Sequence
from ksana_lab.core.step import ScheduledSeq, SchedulerOutput
from ksana_lab.protocol.engine import PeerUpdate, TransferKey
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer import registry
from ksana_lab.transfer.plan import heads_of
from ksana_lab.transfer.scheduler_side import KVSchedulerConnector, make_scheduler_connector
from ksana_lab.transfer.worker_side import KVWorkerConnector, make_worker_connector
from ksana_lab.types import FinishReason, NodeAddr, Role, SamplingParams

LAYERS, HEADS, HEAD_DIM, BLOCK, BLOCKS = 4, 4, 8, 4, 64
COMM_KEY = "127.0.0.1:8067__127.0.0.1:6890"


class Spans(NullRecorder):
    """Keeps what would be written."""

    enabled = True

    def __init__(self) -> None:
        self.spans: list[dict] = []

    def span(self, name, cat, start_ns, end_ns, **args) -> None:
        self.spans.append({"name": name, "cat": cat, "start_ns": start_ns, "end_ns": end_ns, **args})


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.001)


def freeze(pid: int) -> None:
    """Stop a process, and wait until it is: on a busy machine its threads go on for a while after the signal."""
    os.kill(pid, signal.SIGSTOP)
    stats = [*Path(f"/proc/{pid}/task").glob("*/stat")]
    wait_for(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats), f"process {pid} to stand still")


class Node:
    """All ranks of one node in this process, its scheduler's side, and the news so far. ``device`` "cuda": their caches share one GPU.
    ``backend`` "staged_shm": on a CPU, what shm is on a GPU."""

    def __init__(
        self,
        role: Role,
        tp: int = 1,
        *,
        backend="tcp",
        host="127.0.0.1",
        port=0,
        block=BLOCK,
        layers=LAYERS,
        waiting_timeout_s=60.0,
        device="cpu",
        **options,
    ):
        self.role, self.tp = role, tp
        self.ipc_dir = tempfile.mkdtemp(prefix="kv-")
        classes = registry._ON_GPU if backend == "staged_shm" else {}
        backend = backend.removeprefix("staged_")
        connector = ConnectorOptions(role=role, coordinator_addr=NodeAddr(host, port), backend=backend, **options)
        scheduler = SchedulerOptions(waiting_timeout_s=waiting_timeout_s)
        runtime = RuntimeOptions(device=device)
        self.config = EngineConfig(model=ModelOptions(model_dir="none"), connector=connector, scheduler=scheduler, runtime=runtime)
        heads = len(heads_of(0, tp, HEADS))
        self.layout = KVLayout(BLOCKS, layers, heads, block, HEAD_DIM, "float32")
        self.recorder = Spans()
        self._wake = threading.Event()
        self.workers: list[KVWorkerConnector] = []
        self.memories: list[torch.Tensor] = []
        for rank in range(tp):
            with mock.patch.dict(registry._BACKENDS, classes):
                worker = make_worker_connector(self.config, rank, tp, self.recorder, self._wake.set, self.ipc_dir)
            cache = worker.allocate(self.layout.total_bytes, torch.device("cuda:0" if device == "cuda" else device))
            worker.register(cache, self.layout)
            self.workers.append(worker)
            self.memories.append(cache)
        del cache
        endpoints = [worker.endpoint() for worker in self.workers]
        self.connector: KVSchedulerConnector = make_scheduler_connector(
            self.config, self.layout, tp, HEADS, endpoints, self.recorder, self._wake.set, self.ipc_dir
        )
        self.news = TransferNews()
        self.next_seq_id = 0

    def name(self, *peers: Node, comm_id: str = "c1", address: str | None = None) -> None:
        """What the router would say: ``peers[0]`` is the prefill node of the one pair."""
        addresses = [(0, 0, address or peer.connector.address) for peer in peers]
        self.connector.handle_peer_update(PeerUpdate([PeerUpdate.Pair(COMM_KEY, comm_id, addresses)]))

    def sequence(self, number: int, num_tokens: int, blocks: list[int] | None = None, num_cached: int = 0) -> Sequence:
        seq = Sequence(self.next_seq_id, f"r{number}", [1] * num_tokens, SamplingParams(), 0, transfer=TransferKey(COMM_KEY, number))
        self.next_seq_id += 1
        rng = np.random.default_rng(number + 1000 * (self.role is Role.DECODE))
        num_blocks = -(-num_tokens // self.layout.block_size)
        seq.block_table = blocks or rng.permutation(BLOCKS)[:num_blocks].tolist()
        seq.num_cached_tokens = num_cached
        return seq

    def poll(self) -> TransferNews:
        for worker in self.workers:
            worker.poll()
        news = self.connector.poll()
        self.news.sent += news.sent
        self.news.received |= news.received
        self.news.failed |= news.failed
        self.news.doomed |= news.doomed
        return self.news

    def wait(self, condition: Callable[[TransferNews], bool], what: str, timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.poll()):
            assert time.monotonic() < deadline, f"timed out waiting for {what}: {self.news}, {self.connector.stats()}"
            self._wake.wait(0.05)
            self._wake.clear()

    # ---- prefill -----------------------------------------------------------------------------------------------------

    def compute(self, seq: Sequence, kv: np.ndarray, start: int, end: int, *, layers: int | None = None) -> None:
        """One step: write tokens [start, end) of ``kv`` [layers, 2, HEADS, tokens, HEAD_DIM] layer by layer, telling the connectors."""
        out = SchedulerOutput(0, [ScheduledSeq(seq, start, end - start, end == seq.num_prompt_tokens, start == 0)])
        meta = self.connector.step_meta(out)
        for worker in self.workers:
            worker.begin_step(meta)
        for layer in range(self.layout.num_layers if layers is None else layers):
            for rank, worker in enumerate(self.workers):
                self.write(rank, seq, kv, layer, start, end)
                worker.layer_done(layer)

    def write(self, rank: int, seq: Sequence, kv: np.ndarray, layer: int, start: int, end: int) -> None:
        heads, tokens = heads_of(rank, self.tp, HEADS), torch.arange(start, end)
        cache = self.memories[rank].view(torch.float32).view(self.layout.shape)
        mine = torch.from_numpy(kv[layer][:, heads.start : heads.stop, start:end]).permute(2, 0, 1, 3).to(cache.device)
        blocks, within = (at.to(cache.device) for at in self._places(seq, tokens))
        cache[blocks, layer, :, :, within] = mine

    def prefill(self, seq: Sequence, kv: np.ndarray, chunk: int | None = None, token: int = 42) -> None:
        """The whole of P's part: all chunks, the first token, and the scheduler's farewell."""
        self.connector.on_allocated(seq)
        num_tokens = seq.num_prompt_tokens
        for start in range(0, num_tokens, chunk or num_tokens):
            self.compute(seq, kv, start, min(num_tokens, start + (chunk or num_tokens)))
        self.finish(seq, token)

    def finish(self, seq: Sequence, token: int = 42) -> None:
        self.connector.on_first_token(seq, FirstToken(token))
        seq.finish_reason = FinishReason.LENGTH
        assert self.connector.on_finished(seq)

    def abort(self, seq: Sequence) -> bool:
        seq.finish_reason = FinishReason.ABORT
        return self.connector.on_finished(seq)

    # ---- decode ------------------------------------------------------------------------------------------------------

    def read(self, seq: Sequence, num_tokens: int, start: int = 0) -> np.ndarray:
        """[layers, 2, HEADS, tokens, HEAD_DIM] as it lies in the ranks' caches (replicas must agree)."""
        kv = np.full((self.layout.num_layers, 2, HEADS, num_tokens - start, HEAD_DIM), np.nan, np.float32)
        blocks, within = self._places(seq, torch.arange(start, num_tokens))
        for rank, memory in enumerate(self.memories):
            heads, cache = heads_of(rank, self.tp, HEADS), memory.cpu().view(torch.float32).view(self.layout.shape)
            seen = kv[:, :, heads.start : heads.stop]
            mine = cache[blocks, :, :, :, within].permute(1, 2, 3, 0, 4).numpy()
            assert np.isnan(seen).all() or np.array_equal(seen, mine), f"rank {rank} has another replica"
            seen[:] = mine
        return kv

    def _places(self, seq: Sequence, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and place in the block of each token."""
        size = self.layout.block_size
        return torch.tensor(seq.block_table)[tokens // size], tokens % size

    def close(self) -> None:
        self.connector.close()
        for worker in self.workers:
            worker.close()
        shutil.rmtree(self.ipc_dir, ignore_errors=True)


def random_kv(num_tokens: int, seed: int = 0, layers: int = LAYERS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((layers, 2, HEADS, num_tokens, HEAD_DIM)).astype(np.float32)


def connect(p: Node, d: Node, comm_id: str = "c1") -> None:
    for node in (p, d):
        node.name(p, d, comm_id=comm_id)
    wait_for(lambda: p.connector.connected() == d.connector.connected() == [COMM_KEY], f"{p.connector.pairs()} {d.connector.pairs()}")


@contextmanager
def make_pair(p_tp: int = 1, d_tp: int = 1, *, p: dict | None = None, d: dict | None = None, **both) -> Iterator[tuple[Node, Node]]:
    prefill = Node(Role.PREFILL, p_tp, **both, **(p or {}))
    try:
        decode = Node(Role.DECODE, d_tp, **both, **(d or {}))
    except BaseException:
        prefill.close()
        raise
    try:
        connect(prefill, decode)
        yield prefill, decode
    finally:
        decode.close()
        prefill.close()


def send_after_preemption(p: Node, d: Node) -> tuple[np.ndarray, Sequence]:
    """P loses a prompt of 16 tokens when 12 are computed, and computes it again into other blocks. Returns what D must hold, and where."""
    kv, garbage = random_kv(16), random_kv(16, seed=99)
    on_d, on_p = d.sequence(1, 16), p.sequence(1, 16)
    d.connector.on_allocated(on_d)
    p.connector.on_allocated(on_p)
    p.compute(on_p, garbage, 0, 12)
    on_p.num_preemptions += 1
    on_p.block_table = [40, 41, 42, 43]
    p.connector.on_allocated(on_p)
    p.compute(on_p, kv, 0, 16)
    p.finish(on_p)
    d.wait(lambda news: on_d.seq_id in news.received, "received")
    return kv, on_d
