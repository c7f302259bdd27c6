"""Send and receive through communicators of two, over gloo: the tokens of one node, halves that fail or never come, new ones after it."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_checkpoint import oracle_greedy, prompts
from helpers_pair import EnginePair
from test_transfer_end_to_end import send
from test_transfer_failures import SLOW, assert_clean, begin, peer_process
from transfer_nodes import COMM_KEY, Node, freeze, make_pair, random_kv, wait_for

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import nccl
from ksana_lab.transfer.registry import make_backend
from ksana_lab.types import Role, SamplingParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


@pytest.mark.parametrize(("tp", "mode"), [((1, 1), "layer"), ((2, 1), "chunk")])
def test_a_pair_says_what_one_node_says(tp, mode):
    batch = prompts(5, seed=11)
    with EnginePair(tp=tp, connector={"backend": "gloo", "transfer_mode": mode, "checksum": True}) as pair:
        assert pair.generate(batch, GREEDY) == [oracle_greedy("qwen3", tuple(prompt), GREEDY.max_tokens) for prompt in batch]
        assert set(pair.leaks().values()) == {0}


def test_a_batch_larger_than_a_stage_goes_in_parts(monkeypatch):
    monkeypatch.setattr(nccl, "STAGE_BYTES", 640)
    monkeypatch.setattr(nccl, "_PROBE_BYTES", 640)
    with make_pair(backend="gloo", transfer_mode="bulk") as (p, d):
        kv, seq = send(p, d)
        assert np.array_equal(d.read(seq, 37), kv)


def test_eight_bits_travel_through_a_communicator():
    with make_pair(2, 1, backend="gloo", checksum=True, wire_dtype="fp8_e4m3") as (p, d):
        kv, seq = send(p, d)
        assert np.abs(d.read(seq, 37) - kv).max() < np.abs(kv).max() / 14
        assert p.connector.stats()["bytes_sent"] < 0.36 * kv.nbytes


def connected_anew(p: Node, d: Node, old: int) -> None:
    wait_for(lambda: p.connector.connected() == d.connector.connected() == [COMM_KEY], "the pair again")
    assert old not in p.workers[0]._sender._peers


def serves_again(p: Node, d: Node, number: int) -> None:
    kv, seq = send(p, d, number=number)
    assert np.array_equal(d.read(seq, 37), kv)
    assert_clean(p, d)


@pytest.mark.parametrize("silent", ["sender", "receiver"])
def test_a_half_that_never_comes_ends_the_session_and_a_new_one_serves(silent, monkeypatch):
    with make_pair(backend="gloo") as (p, d):
        old = next(iter(p.workers[0]._sender._peers))
        monkeypatch.setattr(nccl, "STALL_S", 0.3)
        release = threading.Event()
        with monkeypatch.context() as patch:
            if silent == "sender":
                patch.setattr(nccl.PairLink, "_send", lambda *args: None)
            else:
                patch.setattr(nccl._Joined, "receive", lambda *args: release.wait(20))
            on_p, on_d = begin(p, d)
            for node, seq in ((p, on_p), (d, on_d)):
                node.wait(lambda news, seq=seq: seq.seq_id in news.failed or seq.seq_id in news.doomed, "the failure")
        release.set()
        p.abort(on_p)
        assert_clean(p, d)
        monkeypatch.setattr(nccl, "STALL_S", 30.0)
        connected_anew(p, d, old)
        serves_again(p, d, 5)


def test_a_frozen_decode_node_holds_nothing_of_p_for_long(monkeypatch):
    monkeypatch.setattr(nccl, "STALL_S", 0.5)
    p = Node(Role.PREFILL, backend="gloo", **SLOW)
    try:
        p.name(p)
        with peer_process(Role.DECODE, "gloo", 0, p.connector.address) as (process, _):
            seq, kv = p.sequence(1, 64), random_kv(64)
            p.connector.on_allocated(seq)
            p.wait(lambda _: p.connector.stats()["state_sending"] == 1, "announcement")
            p.compute(seq, kv, 0, 16)
            p.wait(lambda _: p.workers[0].stats()["transfers"] > 0, "the first piece")
            freeze(process.pid)
            p.compute(seq, kv, 16, 64)
            p.finish(seq)
            p.wait(lambda news: seq.seq_id in news.failed, "failure", timeout_s=5)
            wait_for(lambda: not p.connector.connected(), "the end of the session")
            process.kill()
        assert_clean(p)
    finally:
        p.close()


def test_a_decode_rank_that_cannot_make_its_half_says_why(monkeypatch):
    make = nccl.make_channel

    def fail(store, name, rank, *more):
        if rank == 1:
            raise TransferError("no such device today")
        return make(store, name, rank, *more)

    p, d = Node(Role.PREFILL, backend="gloo"), Node(Role.DECODE, backend="gloo")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(nccl, "make_channel", fail)
            for node in (p, d):
                node.name(p, d)
            wait_for(lambda: "no such device today" in str(d.connector.pairs()), "the reason")
        wait_for(lambda: p.connector.connected() == d.connector.connected() == [COMM_KEY], "the pair after all")
        serves_again(p, d, 1)
    finally:
        d.close()
        p.close()


def test_what_damages_bytes_is_found_before_it_carries_any(monkeypatch):
    p, d = Node(Role.PREFILL, backend="gloo"), Node(Role.DECODE, backend="gloo")
    receive = nccl._Joined.receive

    def flip(self, nbytes):
        memory = receive(self, nbytes)
        memory[nbytes // 2] ^= 1
        return memory

    monkeypatch.setattr(nccl._Joined, "receive", flip)
    try:
        for node in (p, d):
            node.name(p, d)
        wait_for(lambda: "damages what it carries" in str(d.connector.pairs()), "the finding")
        assert not p.connector.connected()
    finally:
        d.close()
        p.close()


def test_making_a_half_is_bounded_and_a_late_one_is_given_up():
    go_on, aborted = threading.Event(), threading.Event()

    class Late:
        abort = staticmethod(aborted.set)

    with pytest.raises(TransferError, match=r"not made within 0.05 s.*NCCL_DEBUG=INFO"):
        nccl.bounded(lambda: go_on.wait(10) and Late(), 0.05, lambda: False)
    begin_s = time.monotonic()
    with pytest.raises(TransferError, match="the connection ended"):
        nccl.bounded(lambda: go_on.wait(10) and Late(), 10, lambda: True)
    assert time.monotonic() - begin_s < 5
    go_on.set()
    assert aborted.wait(5)


def test_the_store_and_the_stream_listen_where_they_are_told(monkeypatch):
    backend = make_backend("gloo", "127.0.0.1")
    try:
        endpoint = backend.serve(backend.allocate(1024, torch.device("cpu")), None)
        with open("/proc/net/tcp") as file, open("/proc/net/tcp6") as file6:
            lines = [line.split() for line in (*file, *file6)]
        listening = {address for _, address, _, state, *_ in lines if state == "0A"}
        for port in (endpoint["port"], endpoint["store_port"]):
            assert {address for address in listening if address.endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}
    finally:
        backend.close()


# ---- NCCL's half, with a group made of nothing ------------------------------------------------------------------------


class Work:
    def __init__(self, polls, error=None):
        self.polls, self.error = polls, error

    def is_completed(self):
        self.polls -= 1
        return self.polls < 0

    def wait(self):
        if self.error:
            raise RuntimeError(self.error)


class Group:
    Options = type("Options", (), {})
    seen = None

    def __init__(self, store, rank, size, options):
        Group.seen = (rank, size, os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"))
        self.aborted = threading.Event()

    def name(self):
        return "nccl"

    def recv(self, tensors, source, tag):
        raise RuntimeError("NCCL error in init.cc: unhandled cuda error")

    def abort(self):
        self.aborted.set()


@pytest.fixture
def channel(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    return nccl.NcclChannel(None, 1, torch.device("cuda", 0))


def test_a_failing_communicator_does_not_end_the_process(channel):
    assert Group.seen == (1, 2, "0") and "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_a_transfer_that_hangs_is_given_up_in_time_or_with_its_connection(channel, monkeypatch):
    channel.wait(Work(5), lambda: False)
    with pytest.raises(TransferError, match="the connection ended"):
        channel.wait(Work(1 << 30), lambda: True)
    monkeypatch.setattr(nccl, "STALL_S", 0.05)
    with pytest.raises(TransferError, match=r"more than 0.05 s.*NCCL_P2P_DISABLE=1"):
        channel.wait(Work(1 << 30), lambda: False)
    with pytest.raises(TransferError, match=r"unhandled system error.*NCCL_DEBUG=INFO"):
        channel.wait(Work(1, "unhandled system error\nmore"), lambda: False)


def test_what_cannot_be_posted_fails_the_transfer_and_not_the_rank(channel):
    with pytest.raises(TransferError, match="nccl: NCCL error in init"):
        channel.receive(torch.zeros(1))


def test_a_communicator_is_aborted_once_and_not_used_again(channel):
    group = channel._group
    channel.abort()
    channel.abort()
    assert group.aborted.wait(5)
    with pytest.raises(TransferError, match="aborted"):
        channel.send(torch.zeros(1))


def test_nccl_needs_a_gpu_and_gloo_a_cpu():
    with pytest.raises(TransferError, match="needs CUDA"):
        make_backend("nccl", "127.0.0.1")
    with pytest.raises(TransferError, match="host memory"):
        make_backend("gloo", "127.0.0.1", on_gpu=True)
