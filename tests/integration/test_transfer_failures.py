"""Cancels, deaths, restarts, lies and leases: bounded errors, nothing left behind, and service afterwards."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from test_transfer_end_to_end import send
from transfer_nodes import COMM_KEY, LAYERS, Node, connect, make_pair, random_kv, wait_for

from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import PeerUpdate
from ksana_lab.transfer import sender, sessions
from ksana_lab.transfer.backends.shm import ShmLink
from ksana_lab.types import Role

SLOW = {"link": {"bandwidth_gbps": 0.001}}  # 128 tokens of 1 KiB take a second


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


def begin(p: Node, d: Node, number=1, num_tokens=128):
    """A request that is being sent."""
    on_d, on_p = d.sequence(number, num_tokens), p.sequence(number, num_tokens)
    d.connector.on_allocated(on_d)
    p.connector.on_allocated(on_p)
    p.wait(lambda _: p.connector.stats()["state_sending"] == 1, "announcement")
    p.compute(on_p, random_kv(num_tokens), 0, num_tokens)
    return on_p, on_d


def assert_clean(*nodes: Node) -> None:
    for node in nodes:
        wait_for(lambda node=node: (node.poll(), not node.connector.has_pending)[1], "nothing pending")
        stats = node.connector.stats()
        assert not any(value for name, value in stats.items() if name.startswith("state_")), stats
        for worker in node.workers:
            if worker._sender is not None:
                assert not worker._sender._outgoing and not worker._sender._dropping
            if worker._receiver is not None:
                wait_for(lambda r=worker._receiver: not r._incoming and not r._quarantined, "no windows")


# ---- connecting -------------------------------------------------------------------------------------------------------


def test_a_pair_meets_over_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    with make_pair(backend="tcp", host="::1") as (p, d):
        send(p, d)


def test_why_a_pair_does_not_connect_is_said_once_on_each_side(caplog):
    caplog.set_level("INFO")
    p, d = Node(Role.PREFILL, backend="tcp"), Node(Role.DECODE, backend="shm")
    try:
        for node in (p, d):
            node.name(p, d)
        wait_for(lambda: d.connector.stats()["connect_retries"] >= 3, "a third attempt")
        assert sum("no way to rank 0" in message for message in caplog.messages) == 2
        assert "no way to rank 0" in p.connector.pairs()[COMM_KEY] and "no way to rank 0" in d.connector.pairs()[COMM_KEY]
    finally:
        d.close()
        p.close()


def test_a_control_address_on_the_peers_own_loopback_is_named_as_such(caplog):
    caplog.set_level("INFO")
    d = Node(Role.DECODE)
    try:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{closed.getsockname()[1]}"
        key = "10.0.0.2:8067__10.0.0.3:6890"
        d.connector.handle_peer_update(PeerUpdate([PeerUpdate.Pair(key, "c1", [(0, 0, address), (0, 0, d.connector.address)])]))
        wait_for(lambda: "give the prefill node a coordinator_addr" in d.connector.pairs().get(key, ""), "advice")
    finally:
        d.close()


# ---- corruption, mismatch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tcp", "shm", "staged_shm", "gloo"])
def test_the_checksum_catches_a_flipped_bit(backend, monkeypatch):
    with make_pair(backend=backend, checksum=True) as (p, d):
        crc_of = sender.crc_of

        def corrupt_after(cache, spans):
            crc = crc_of(cache, spans)
            cache[int(spans[0][0])] ^= 1
            return crc

        monkeypatch.setattr(sender, "crc_of", corrupt_after)
        on_p, on_d = begin(p, d, num_tokens=8)
        for node, seq in ((p, on_p), (d, on_d)):
            node.wait(lambda news, seq=seq: seq.seq_id in news.failed, "failure")
            assert "checksum of layers" in node.news.failed[seq.seq_id]
        p.abort(on_p)
        assert_clean(p, d)


def test_either_side_may_ask_for_checksums():
    with make_pair(d={"checksum": True}) as (p, d):
        spans = []
        verify = d.workers[0]._receiver._verify
        d.workers[0]._receiver._verify = lambda notice: (spans.append(notice.crc), verify(notice))[1]
        send(p, d)
        assert spans and None not in spans


def test_caches_that_differ_are_refused_on_both_sides_with_both_values():
    p, d = Node(Role.PREFILL), Node(Role.DECODE, block=8)
    try:
        for node in (p, d):
            node.name(p, d)
        expected = "block_size is 4 on the prefill node and 8 on the decode node"
        for node in (p, d):
            wait_for(lambda node=node: expected in node.connector.pairs().get(COMM_KEY, ""), "a refusal")
            assert node.connector.connected() == []
    finally:
        d.close()
        p.close()


def test_backends_that_differ_are_refused_with_both_names():
    p, d = Node(Role.PREFILL, backend="shm"), Node(Role.DECODE, backend="tcp")
    try:
        for node in (p, d):
            node.name(p, d)
        wait_for(lambda: "this node has ['shm'], the decode node ['tcp']" in d.connector.pairs().get(COMM_KEY, ""), "a refusal")
    finally:
        d.close()
        p.close()


def test_prompts_of_different_length_fail_at_once():
    with make_pair() as (p, d):
        on_d, on_p = d.sequence(1, 9), p.sequence(1, 10)
        d.connector.on_allocated(on_d)
        p.connector.on_allocated(on_p)
        for node in (p, d):
            node.wait(lambda news: 0 in news.failed, "failure")
            assert "10 tokens on the prefill node and 9 on the decode node" in node.news.failed[0]
        assert_clean(p, d)


@pytest.mark.parametrize("first", ["p", "d"])
def test_other_prompts_of_the_same_length_fail_at_once(first):
    """Two tokenizers may well agree in the number of tokens; D must not answer P's prompt."""
    with make_pair() as (p, d):
        on_d, on_p = d.sequence(1, 16), p.sequence(1, 16)
        on_d.prompt_token_ids[7] = 2
        for node, seq in ((p, on_p), (d, on_d)) if first == "p" else ((d, on_d), (p, on_p)):
            node.connector.on_allocated(seq)
        d.wait(lambda news: on_d.seq_id in news.failed, "failure")
        assert "tokenizers or chat templates differ" in d.news.failed[on_d.seq_id]
        p.wait(lambda news: on_p.seq_id in news.failed, "failure")
        assert_clean(p, d)


@pytest.mark.parametrize("decliner", [Role.PREFILL, Role.DECODE])
def test_a_part_that_is_declined_fails_the_other_with_the_reason(decliner):
    with make_pair() as (p, d):
        here, there = (p, d) if decliner is Role.PREFILL else (d, p)
        waiting = there.sequence(1, 9)
        there.connector.on_allocated(waiting)
        here.connector.decline(waiting.transfer, "6 sequences are waiting")
        there.wait(lambda news: waiting.seq_id in news.failed, "failure")
        assert f"the {decliner.value} node declined request 1.0: 6 sequences are waiting" in there.news.failed[waiting.seq_id]
        assert_clean(p, d)


def test_declining_a_request_that_runs_here_changes_nothing():
    with make_pair() as (p, d):
        on_d, on_p = d.sequence(1, 9), p.sequence(1, 9)
        d.connector.on_allocated(on_d)
        d.connector.decline(on_d.transfer, "no reason")
        p.prefill(on_p, random_kv(9))
        d.wait(lambda news: on_d.seq_id in news.received, "received")


# ---- cancel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tcp", "shm", "staged_shm", "gloo"])
def test_d_cancels_in_the_middle_of_a_transfer(backend):
    with make_pair(backend=backend, p=SLOW) as (p, d):
        on_p, on_d = begin(p, d)
        assert d.abort(on_d)
        d.wait(lambda news: on_d.seq_id in news.failed, "d's blocks")
        p.wait(lambda news: on_p.seq_id in news.failed, "p's blocks")
        assert "gave request 1.0 up (abort)" in p.news.failed[on_p.seq_id]
        assert on_d.seq_id not in d.news.doomed and on_p.seq_id in p.news.doomed
        assert_clean(p, d)
        kv, seq = send(p, d, number=2, num_tokens=8)
        assert np.array_equal(d.read(seq, 8), kv)


@pytest.mark.parametrize("backend", ["tcp", "shm"])
def test_p_gives_up_in_the_middle_of_a_prompt(backend):
    with make_pair(2, 2, backend=backend) as (p, d):
        on_d, on_p = d.sequence(1, 64), p.sequence(1, 64)
        d.connector.on_allocated(on_d)
        p.connector.on_allocated(on_p)
        p.compute(on_p, random_kv(64), 0, 32)
        assert p.abort(on_p)
        p.wait(lambda news: on_p.seq_id in news.failed, "p's blocks")
        d.wait(lambda news: on_d.seq_id in news.failed, "d's blocks")
        assert "the prefill node gave request 1.0 up" in d.news.doomed[on_d.seq_id]
        assert_clean(p, d)


def test_d_hears_of_a_request_that_p_never_began():
    with make_pair() as (p, d):
        on_d, on_p = d.sequence(1, 9), p.sequence(1, 9)
        d.connector.on_allocated(on_d)
        assert p.abort(on_p) is False
        d.wait(lambda news: on_d.seq_id in news.failed, "failure")
        assert_clean(p, d)


def test_p_hears_of_a_request_that_d_never_began():
    with make_pair() as (p, d):
        on_d, on_p = d.sequence(1, 9), p.sequence(1, 9)
        p.connector.on_allocated(on_p)
        assert d.abort(on_d) is False
        p.wait(lambda news: on_p.seq_id in news.failed, "failure")
        assert_clean(p, d)


def test_blocks_in_shared_memory_are_not_safe_before_the_writer_has_stopped(monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    write = ShmLink.write

    def stuck(self, copies, window, after=None, shift=(0, 0)):
        started.set()
        assert go_on.wait(20)
        return write(self, copies, window, after, shift)

    monkeypatch.setattr(ShmLink, "write", stuck)
    with make_pair(backend="shm") as (p, d):
        on_p, on_d = begin(p, d, num_tokens=8)
        assert started.wait(10)
        d.abort(on_d)
        wait_for(lambda: d.workers[0].stats()["quarantined"] == 1, "quarantine")
        p.wait(lambda news: on_p.seq_id in news.doomed, "the cancel")
        assert on_d.seq_id not in d.poll().failed and on_p.seq_id not in p.poll().failed
        go_on.set()
        d.wait(lambda news: on_d.seq_id in news.failed, "d's blocks")
        assert_clean(p, d)


def test_over_tcp_d_frees_its_blocks_without_waiting_for_p(monkeypatch):
    with make_pair(p=SLOW) as (p, d):
        _, on_d = begin(p, d)
        monkeypatch.setattr(p.connector._coordinator._sessions, "_handle", lambda *a: None)  # P is deaf
        d.abort(on_d)
        d.wait(lambda news: on_d.seq_id in news.failed, "d's blocks", timeout_s=2)


def test_a_write_into_a_closed_window_is_thrown_away():
    with make_pair(p=SLOW) as (p, d):
        on_p, on_d = begin(p, d, num_tokens=64)
        link = next(iter(p.workers[0]._sender._peers.values())).links[0].link
        out = p.workers[0]._sender._outgoing[on_p.transfer]
        window = out.target.window
        d.abort(on_d)
        d.wait(lambda news: on_d.seq_id in news.failed, "d's blocks")
        before = d.memories[0].clone()
        link.write(np.array([[0, 0, 4096]], np.int64), window)
        assert torch.equal(d.memories[0], before)
        send(p, d, number=2, num_tokens=8)  # the stream is still in step


# ---- identity ---------------------------------------------------------------------------------------------------------


def test_a_request_id_in_use_is_refused_and_the_first_one_lives():
    with make_pair() as (p, d):
        first, second = d.sequence(1, 9), d.sequence(1, 9)
        d.connector.on_allocated(first)
        d.connector.on_allocated(second)
        d.wait(lambda news: second.seq_id in news.failed, "refusal")
        assert "in use" in d.news.failed[second.seq_id]
        on_p = p.sequence(1, 9)
        p.prefill(on_p, random_kv(9))
        d.wait(lambda news: first.seq_id in news.received, "received")


def test_a_request_id_may_come_again_later():
    with make_pair() as (p, d):
        for _ in range(3):
            kv, seq = send(p, d, number=1)
            assert np.array_equal(d.read(seq, 37), kv)
            assert d.connector.on_finished(seq) is False


# ---- death and restart ------------------------------------------------------------------------------------------------


@contextmanager
def peer_process(role: Role, backend: str, port: int = 0, peer: str = "-"):
    command = [sys.executable, str(Path(__file__).with_name("transfer_peer.py")), role.value, backend, str(port), peer]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("backend", ["tcp", "shm", "staged_shm", "gloo"])
def test_p_is_killed_in_the_middle_of_a_transfer(backend):
    d = Node(Role.DECODE, backend=backend)
    try:
        with peer_process(Role.PREFILL, backend) as (process, address):
            d.name(d, address=address)
            seq = d.sequence(1, 64)
            d.connector.on_allocated(seq)
            d.wait(lambda _: d.workers[0].stats()["bytes_received"] > 0, "the first layer")
            process.kill()
            d.wait(lambda news: seq.seq_id in news.failed, "failure", timeout_s=3)
        assert_clean(d)
        assert d.connector.connected() == []
        with peer_process(Role.PREFILL, backend, int(address.rpartition(":")[2])):  # restarted at the same address
            again = d.sequence(1, 64)
            d.connector.on_allocated(again)
            d.wait(lambda news: again.seq_id in news.received, "received after the restart")
    finally:
        d.close()


@pytest.mark.parametrize("backend", ["tcp", "shm", "staged_shm", "gloo"])
def test_d_is_killed_in_the_middle_of_a_transfer(backend):
    p = Node(Role.PREFILL, backend=backend, **SLOW)
    try:
        p.name(p)
        with peer_process(Role.DECODE, backend, 0, p.connector.address) as (process, _):
            seq, kv = p.sequence(1, 64), random_kv(64)
            p.connector.on_allocated(seq)
            p.wait(lambda _: p.connector.stats()["state_sending"] == 1, "announcement")
            p.compute(seq, kv, 0, 16)
            p.wait(lambda _: p.workers[0].stats()["transfers"] > 0, "the first piece")
            p.compute(seq, kv, 16, 64)
            p.finish(seq)
            process.kill()
            p.wait(lambda news: seq.seq_id in news.failed, "failure", timeout_s=3)
        assert_clean(p)
    finally:
        p.close()


def test_a_restarted_d_takes_part_again():
    with make_pair() as (p, d):
        send(p, d)
        d.close()
        fresh = Node(Role.DECODE)
        try:
            connect(p, fresh)
            kv, seq = send(p, fresh, number=8)
            assert np.array_equal(fresh.read(seq, 37), kv)
        finally:
            fresh.close()


def test_p_at_another_address_is_found():
    with make_pair() as (p, d):
        p.close()
        fresh = Node(Role.PREFILL)
        try:
            connect(fresh, d, comm_id="c2")
            send(fresh, d, number=8)
        finally:
            fresh.close()


def test_comm_ids_must_agree():
    p, d = Node(Role.PREFILL), Node(Role.DECODE)
    try:
        p.name(p, d, comm_id="new")
        d.name(p, d, comm_id="old")
        wait_for(lambda: "'new' on the prefill node and 'old'" in d.connector.pairs().get(COMM_KEY, ""), "a refusal")
        d.name(p, d, comm_id="new")
        wait_for(lambda: d.connector.connected() == [COMM_KEY], "connection")
    finally:
        d.close()
        p.close()


def test_a_peer_that_says_nothing_is_gone(monkeypatch):
    monkeypatch.setattr(sessions, "PEER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(sessions, "PING_INTERVAL_S", 0.1)
    with make_pair(p=SLOW) as (p, d):
        on_p, on_d = begin(p, d)
        monkeypatch.setattr(d.connector._coordinator._sessions, "tick", lambda now_ns: None)  # D neither pings nor times out
        p.wait(lambda news: on_p.seq_id in news.failed, "failure")
        assert "said nothing for 0.3 s" in p.news.failed[on_p.seq_id]
        d.wait(lambda news: on_d.seq_id in news.failed, "failure")


# ---- leases -----------------------------------------------------------------------------------------------------------


def test_p_does_not_hold_blocks_for_ever():
    with make_pair(lease_s=0.3) as (p, _):
        seq = p.sequence(1, 9)
        p.prefill(seq, random_kv(9))
        p.wait(lambda news: seq.seq_id in news.failed, "failure")
        assert "never announced" in p.news.failed[seq.seq_id]
        assert p.connector.stats()["lease_expiries"] == 1
        assert_clean(p)


def test_d_does_not_wait_for_ever_for_its_pair():
    d = Node(Role.DECODE, lease_s=0.3)
    try:
        seq = d.sequence(1, 9)
        d.connector.on_allocated(seq)
        d.wait(lambda news: seq.seq_id in news.failed, "failure")
        assert COMM_KEY in d.news.failed[seq.seq_id] and "the router has not named this pair" in d.news.failed[seq.seq_id]
        assert_clean(d)
    finally:
        d.close()


# ---- strangers --------------------------------------------------------------------------------------------------------


def test_malformed_and_oversized_control_frames_are_rejected():
    with make_pair() as (p, d):
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://{p.connector.address}")
        good = wire.encode(wire.Ping(12345))
        bad = [b"", b"\x01", b"\x02" + good[1:], b"\x01\xff\xff", good[:-1], b"\x80\x04pickle"]
        for frame in bad:
            stranger.send(frame)
        stranger.send_multipart([b"a", b"b", b"c"])
        answers = []
        while len(answers) < len(bad) + 1 and stranger.poll(5000):
            answers.append(wire.Decoder(wire.ToDecode).decode(stranger.recv()))
        assert all(isinstance(a, wire.Refuse) and "rejected" in a.reason for a in answers)
        assert p.connector.stats()["bad_messages"] == len(answers) == len(bad) + 1
        stranger.send(b"\x01" + bytes(wire.MAX_MESSAGE_BYTES + 1))
        stranger.send(good)  # on a new connection: zmq has ended the one that was too long
        assert stranger.poll(5000)
        assert "over" in wire.Decoder(wire.ToDecode).decode(stranger.recv()).reason
        stranger.close()
        context.term()
        send(p, d)


def test_a_stranger_on_the_data_port_is_turned_away():
    with make_pair() as (p, d):
        endpoint = d.workers[0].endpoint()["backends"]["tcp"]
        header = struct.Struct("<IBBHIQQQ")
        greetings = [b"GET / HTTP/1.1\r\n\r\n" + bytes(40), header.pack(0x4B4C5456, 1, 1, 0, 0, 9, 0, 32) + b"x" * 32]
        for greeting in greetings:
            with socket.create_connection((endpoint["host"], endpoint["port"]), timeout=5) as stranger:
                stranger.sendall(greeting)
                stranger.settimeout(5)
                try:
                    assert stranger.recv(1) == b""
                except ConnectionResetError:
                    pass  # what it had still to say was not read
        send(p, d)


def test_an_announcement_outside_the_cache_is_rejected():
    with make_pair() as (p, d):
        session = next(iter(p.connector._coordinator._sessions._sessions))
        message = wire.Announce(session, d.sequence(1, 8).transfer, 77, [0, 64], 8, 0)
        d.connector._coordinator.post(lambda now_ns: d.connector._coordinator.to_peer(session, message))
        wait_for(lambda: p.connector.stats()["bad_messages"] == 1, "rejection")


def test_a_decode_node_says_that_it_is_not_called():
    d = Node(Role.DECODE)
    context = zmq.Context()
    caller = context.socket(zmq.DEALER)
    try:
        caller.connect(f"tcp://{d.connector.address}")
        caller.send(b"hello")
        assert caller.poll(5000)
        assert "is a decode node" in wire.Decoder(wire.ToDecode).decode(caller.recv()).reason
    finally:
        caller.close(linger=0)
        context.term()
        d.close()


def test_an_address_in_use_is_a_clear_error():
    d = Node(Role.DECODE)
    try:
        with pytest.raises(TransferError, match="is another node running there"):
            Node(Role.DECODE, port=int(d.connector.address.rpartition(":")[2]))
    finally:
        d.close()


def test_layers_that_the_model_does_not_report_are_an_error():
    with make_pair() as (p, _):
        seq = p.sequence(1, 8)
        p.connector.on_allocated(seq)
        p.compute(seq, random_kv(8), 0, 4, layers=LAYERS - 1)
        with pytest.raises(TransferError, match="3 of 4 layers"):
            p.compute(seq, random_kv(8), 4, 8)
