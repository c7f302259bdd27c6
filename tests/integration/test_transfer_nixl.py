"""NIXL and UCX for real, on the CPU: the tokens of one node over shared memory and over TCP, every byte, deaths on either side."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_checkpoint import oracle_greedy, prompts
from helpers_pair import EnginePair
from test_transfer_end_to_end import send
from test_transfer_failures import assert_clean, peer_process
from test_transfer_soak import Side, play
from transfer_nodes import Node, freeze, make_pair, random_kv, wait_for

from ksana_lab.config.environment import INSTALL_NIXL
from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import nixl
from ksana_lab.types import Role, SamplingParams

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason=f"nixl is not installed: {INSTALL_NIXL}")

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
WHOLE = 64 << 20
# NIXL refuses to start without it where there is an NVIDIA GPU, for caches in host memory too.
AND_CUDA = ",cuda_copy" if torch.cuda.is_available() else ""


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


@pytest.fixture(params=["tcp", "shm,tcp"])  # UCX always wants a transport that can carry its own messages
def transports(request, monkeypatch):
    monkeypatch.setenv("UCX_TLS", request.param + AND_CUDA)


# ---- tokens and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bulk", "chunk", "layer"])
def test_a_pair_says_what_one_node_says(mode, transports):
    batch = prompts(4, seed=11, longest=40)
    connector = {"backend": "nixl", "transfer_mode": mode, "checksum": True}
    with EnginePair(connector=connector, scheduler={"prefill_chunk_tokens": 13}) as pair:
        assert pair.generate(batch, GREEDY) == [oracle_greedy("qwen3", tuple(prompt), GREEDY.max_tokens) for prompt in batch]
        assert pair.leaks() == {"prefill": 0, "decode": 0}
        sent, received = (pair.engines[role].status().transfer for role in ("prefill", "decode"))
        assert sent["send_failures"] == received["checksum_failures"] == 0 and 0 < sent["post_s"] < sent["wire_s"]


@pytest.mark.parametrize(("p_tp", "d_tp"), [(1, 2), (2, 1)])
def test_every_byte_arrives_at_ranks_of_another_number(p_tp, d_tp):
    with make_pair(p_tp, d_tp, backend="nixl", transfer_mode="layer", checksum=True) as (p, d):
        kv, seq = send(p, d)
        assert np.array_equal(d.read(seq, 37), kv)


def test_cancels_at_any_moment_leave_nothing_behind(transports):
    with make_pair(backend="nixl", transfer_mode="layer", checksum=True, lease_s=5.0) as (p, d):
        num_received, num_failed = play(Side(p), Side(d), 60, seed=1)
        assert num_received + num_failed == 60 and num_received > 30 and num_failed > 2
        assert_clean(p, d)


def test_on_a_loopback_address_ucx_listens_nowhere_else():
    with make_pair(backend="nixl"):
        own = {os.readlink(f"/proc/self/fd/{fd}")[8:-1] for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
        listening = [row[1] for row in rows if row[3] == "0A" and row[9] in own]
        assert listening and all(address.startswith("0100007F:") for address in listening)


# ---- deaths -----------------------------------------------------------------------------------------------------------


def test_p_is_killed_in_the_middle_of_a_transfer_and_comes_back():
    d = Node(Role.DECODE, backend="nixl")
    try:
        with peer_process(Role.PREFILL, "nixl") as (process, address):
            d.name(d, address=address)
            seq = d.sequence(1, 64)
            d.connector.on_allocated(seq)
            d.wait(lambda _: d.workers[0].stats()["bytes_received"] > 0, "the first layer")
            process.kill()
            d.wait(lambda news: seq.seq_id in news.failed, "failure")
        assert_clean(d)
        with peer_process(Role.PREFILL, "nixl", int(address.rpartition(":")[2])):
            again = d.sequence(1, 64)
            d.connector.on_allocated(again)
            d.wait(lambda news: again.seq_id in news.received, "received after the restart")
    finally:
        d.close()


class Watch:
    def __init__(self) -> None:
        self.gone: list[int] = []
        self.lost: list[str] = []

    def on_notice(self, session, window, notice, first_ns) -> None: ...

    def on_ack(self, token, error) -> None: ...

    def on_lost(self, reason) -> None:
        self.lost.append(reason)

    def on_writer_gone(self, session, reason) -> None:
        self.gone.append(session)


@contextmanager
def process(*command: str):
    child = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_nothing_of_a_killed_p_arrives_once_it_no_longer_counts_as_a_writer(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp" + AND_CUDA)  # bytes wait in D's own socket
    watch, backend = Watch(), nixl.NixlBackend("127.0.0.1")
    try:
        cache = backend.allocate(WHOLE, torch.device("cpu"))
        endpoint = backend.serve(cache, watch)
        with process(str(Path(__file__).with_name("transfer_writer.py")), "nixl", str(WHOLE)) as writer:
            writer.stdin.write(json.dumps(endpoint) + "\n")
            writer.stdin.flush()
            for _ in range(2):
                assert writer.stdout.readline() == "writing\n"
            writer.kill()
            wait_for(lambda: len(watch.gone) == 1, "its end")
            assert backend.num_writers(1) == 1
            wait_for(lambda: len(watch.gone) == 2, "the end of what it left behind")
        assert backend.num_writers(1) == 0 and cache.any()
        before = cache.clone()
        time.sleep(0.2)  # for what must not come
        assert torch.equal(cache, before)
    finally:
        backend.close()


def test_a_decode_node_that_hangs_and_then_dies(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp" + AND_CUDA)  # the one that needs D's help
    monkeypatch.setattr(nixl, "_CLOSE_S", 0.1)
    whole, source = np.array([[0, 0, WHOLE]], np.int64), torch.ones(WHOLE, dtype=torch.uint8)
    backend = nixl.NixlBackend("127.0.0.1")
    with process("-m", "ksana_lab.bench._transfer_peer", "nixl", str(WHOLE), "cpu") as child:
        try:
            endpoint = json.loads(child.stdout.readline())
            link = backend.connect(endpoint, source, 1, Watch(), 10)
            assert link.examine(10).bandwidth > 1e6
            freeze(child.pid)
            with monkeypatch.context() as patch, pytest.raises(TransferError, match=r"not finished a write within 0.3 s"):
                patch.setattr(nixl, "_STALL_S", 0.3)
                link.write(whole, 1).wait(10)
            link.close()
            assert not link._is_over, "D would take the end of the stream for the end of the write"
            child.send_signal(signal.SIGCONT)
            wait_for(lambda: link._is_over, "the end of the write")

            link = backend.connect(endpoint, source, 2, Watch(), 10)
            link.examine(10)
            child.kill()
            child.wait()
            with pytest.raises(TransferError, match="NIXL cannot"):
                link.write(whole, 1).wait(10)
            link.close()
            assert link._is_over
        finally:
            backend.close()
            backend.close()


def test_a_second_write_sees_the_caches_it_was_planned_for():
    with make_pair(backend="nixl", transfer_mode="layer", transfer_batch=8) as (p, d):
        for number in range(1, 4):
            kv, seq = send(p, d, number=number, num_tokens=50)
            assert np.array_equal(d.read(seq, 50), kv)
            assert d.connector.on_finished(seq) is False
        assert p.workers[0].stats()["bytes_sent"] == 3 * random_kv(50).nbytes
