"""KV of random numbers goes from a prefill node's caches to a decode node's, and is compared there byte for byte."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from transfer_nodes import COMM_KEY, LAYERS, Node, connect, make_pair, random_kv, send_after_preemption, wait_for

from ksana_lab.errors import ConfigError, TransferError
from ksana_lab.transfer import registry
from ksana_lab.types import Role


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


def send(p: Node, d: Node, number=7, num_tokens=37, *, chunk=10, num_cached=0, is_late=False):
    kv = random_kv(num_tokens, seed=number)
    on_d, on_p = d.sequence(number, num_tokens, num_cached=num_cached), p.sequence(number, num_tokens)
    if not is_late:
        d.connector.on_allocated(on_d)
    p.prefill(on_p, kv, chunk)
    if is_late:
        d.connector.on_allocated(on_d)
    p.wait(lambda news: on_p.seq_id in news.sent, "sent")
    d.wait(lambda news: on_d.seq_id in news.received, "received")
    return kv, on_d


@pytest.mark.parametrize("mode", ["bulk", "chunk", "layer"])
@pytest.mark.parametrize(("p_tp", "d_tp"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("backend", ["tcp", "shm", "staged_shm", "gloo"])
def test_every_byte_arrives(backend, p_tp, d_tp, mode):
    with make_pair(p_tp, d_tp, backend=backend, transfer_mode=mode, checksum=True) as (p, d):
        kv, seq = send(p, d)
        assert np.array_equal(d.read(seq, 37), kv)
        assert d.news.received[seq.seq_id].token_id == 42
        assert not p.connector.has_pending and not d.connector.has_pending


@pytest.mark.parametrize(("p_tp", "d_tp"), [(8, 1), (1, 8), (8, 2), (4, 8)])
def test_replicated_heads_arrive_on_every_rank(p_tp, d_tp):
    with make_pair(p_tp, d_tp, backend="shm") as (p, d):
        kv, seq = send(p, d)
        assert np.array_equal(d.read(seq, 37), kv)


def test_auto_takes_shared_memory_on_one_host():
    with make_pair(backend="auto") as (p, d):
        send(p, d)
        links = [link for peer in p.workers[0]._sender._peers.values() for link in peer.links.values()]
        assert [type(link.link).__name__ for link in links] == ["ShmLink"]


def test_a_way_that_both_name_but_do_not_share_is_left_for_the_next(monkeypatch):
    """shm of a node on a GPU and shm of one on a CPU: the first answers, and is not what was looked for."""
    d = Node(Role.DECODE, backend="auto")
    try:
        with monkeypatch.context() as patch:
            patch.setitem(registry._BACKENDS, "shm", registry._ON_GPU["shm"])
            p = Node(Role.PREFILL, backend="auto")
        try:
            connect(p, d)
            kv, seq = send(p, d)
            links = [link for peer in p.workers[0]._sender._peers.values() for link in peer.links.values()]
            assert [type(link.link).__name__ for link in links] == ["TcpLink"] and np.array_equal(d.read(seq, 37), kv)
        finally:
            p.close()
    finally:
        d.close()


def test_a_late_announcement_is_caught_up_without_another_step():
    with make_pair() as (p, d):
        kv, seq = send(p, d, is_late=True)
        assert np.array_equal(d.read(seq, 37), kv)


def test_what_d_has_cached_is_not_sent():
    with make_pair() as (p, d):
        kv, seq = send(p, d, num_cached=16)
        assert np.array_equal(d.read(seq, 37, start=16), kv[:, :, :, 16:])
        assert not d.read(seq, 16).any()
        assert d.connector.stats()["bytes_received"] == kv[:, :, :, 16:].nbytes


def test_a_prompt_that_d_has_whole_needs_only_its_first_token():
    with make_pair() as (p, d):
        _, seq = send(p, d, num_tokens=32, num_cached=32)
        assert d.news.received[seq.seq_id].token_id == 42
        assert p.connector.stats()["bytes_sent"] == 0


def test_layers_arrive_while_later_ones_are_computed():
    with make_pair(transfer_mode="layer") as (p, d):
        kv = random_kv(16)
        on_d, on_p = d.sequence(1, 16), p.sequence(1, 16)
        d.connector.on_allocated(on_d)
        p.connector.on_allocated(on_p)
        wait_for(lambda: p.connector.stats()["state_sending"] == 1, "announcement")
        p.compute(on_p, kv, 0, 16, layers=2)
        wait_for(lambda: d.workers[0].stats()["bytes_received"] == kv[:2].nbytes, "two layers")
        assert np.array_equal(d.read(on_d, 16)[:2], kv[:2])
        for layer in (2, 3):
            p.write(0, on_p, kv, layer, 0, 16)
            p.workers[0].layer_done(layer)
        p.finish(on_p)
        d.wait(lambda news: on_d.seq_id in news.received, "received")
        assert sum(s["layers"] for s in d.recorder.spans) == LAYERS and len(d.recorder.spans) >= 2
        assert np.array_equal(d.read(on_d, 16), kv)


def test_both_sides_record_when_each_layer_was_ready_sent_and_received():
    with make_pair(transfer_mode="layer") as (p, d):
        send(p, d)
        sent = p.recorder.spans
        assert sum(s["bytes"] for s in sent) == sum(s["bytes"] for s in d.recorder.spans) == random_kv(37).nbytes
        assert all(s["ready_ns"] <= s["start_ns"] <= s["end_ns"] and s["request"] == "7.0" for s in sent)
        assert {s["name"] for s in d.recorder.spans} == {"recv"}


def test_many_requests_at_once_do_not_mix():
    with make_pair(2, 1, backend="shm") as (p, d):
        numbers = range(1, 9)
        kvs = {n: random_kv(20, seed=n) for n in numbers}
        on_d = {n: d.sequence(n, 20, blocks=list(range((n - 1) * 5, n * 5))) for n in numbers}
        on_p = {n: p.sequence(n, 20, blocks=list(range((n - 1) * 5, n * 5))) for n in numbers}
        for n in numbers:
            d.connector.on_allocated(on_d[n])
        for n in reversed(numbers):
            p.prefill(on_p[n], kvs[n], chunk=8, token=n)
        d.wait(lambda news: len(news.received) == 8, "all")
        p.wait(lambda news: len(news.sent) == 8, "all sent")
        for n in numbers:
            assert np.array_equal(d.read(on_d[n], 20), kvs[n])
            assert d.news.received[on_d[n].seq_id].token_id == n


def test_a_prompt_that_was_preempted_is_sent_anew():
    with make_pair() as (p, d):
        kv, on_d = send_after_preemption(p, d)
        assert np.array_equal(d.read(on_d, 16), kv)


def test_an_emulated_link_takes_its_time():
    with make_pair(transfer_mode="bulk", p={"link": {"bandwidth_gbps": 0.01, "latency_us": 5000}}) as (p, d):
        kv, _ = send(p, d, num_tokens=128, chunk=128)
        (span,) = p.recorder.spans
        expected_s = kv.nbytes * 8 / 0.01e9 + 0.005
        assert expected_s <= (span["end_ns"] - span["start_ns"]) / 1e9 < expected_s + 1  # exactly: test_transfer_link


def test_a_slow_peer_does_not_hold_up_the_forward_pass():
    with make_pair(transfer_mode="layer", p={"link": {"bandwidth_gbps": 0.001}}) as (p, d):
        on_d, on_p = d.sequence(1, 128), p.sequence(1, 128)
        d.connector.on_allocated(on_d)
        p.connector.on_allocated(on_p)
        wait_for(lambda: p.connector.stats()["state_sending"] == 1, "announcement")
        p.compute(on_p, random_kv(128), 0, 128)  # 128 KiB take a second on this link
        assert p.workers[0].stats()["transfers"] < LAYERS


def test_the_prefill_node_needs_the_layer_tracker(monkeypatch, tmp_path):
    monkeypatch.delenv("ENABLE_LAYER_TRACKER")
    with pytest.raises(ConfigError, match="export ENABLE_LAYER_TRACKER=1"):
        Node(Role.PREFILL)


@pytest.mark.parametrize("backend", ["cuda_ipc", "nccl"])
def test_gpu_backends_say_that_they_need_a_gpu(backend):
    with pytest.raises(TransferError, match="needs CUDA"):
        Node(Role.DECODE, backend=backend)


def test_a_second_pair_of_nodes_lives_in_the_same_process():
    with make_pair() as (p, d), make_pair(backend="shm") as (p2, d2):
        first, seq = send(p, d, number=1)
        second, seq2 = send(p2, d2, number=1, num_tokens=21)
        assert np.array_equal(d.read(seq, 37), first) and np.array_equal(d2.read(seq2, 21), second)


def test_a_request_may_come_before_its_pair_is_connected():
    p, d = Node(Role.PREFILL), Node(Role.DECODE)
    try:
        on_d, on_p = d.sequence(1, 9), p.sequence(1, 9)
        d.connector.on_allocated(on_d)
        kv = random_kv(9)
        p.prefill(on_p, kv)
        connect(p, d)
        d.wait(lambda news: on_d.seq_id in news.received, "received")
        assert np.array_equal(d.read(on_d, 9), kv)
    finally:
        d.close()
        p.close()


@pytest.mark.parametrize("backend", ["tcp", "shm", "staged_shm", "gloo"])
def test_a_closed_connector_lets_go_of_the_cache(backend):
    gc.disable()
    try:
        with make_pair(backend=backend) as (p, d):
            send(p, d)
            memories = [weakref.ref(node.memories.pop()) for node in (p, d)]
        assert [memory() for memory in memories] == [None, None]
    finally:
        gc.enable()


def test_closing_twice_is_harmless():
    with make_pair() as (p, d):
        d.close()
        wait_for(lambda: p.connector.connected() == [], "the end of the session")
        assert COMM_KEY not in d.connector.connected()
