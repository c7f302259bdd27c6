"""Staged writes into a device's cache, here a CPU tensor in its place; what the doctor finds of real links."""

import socket

import numpy as np
import pytest
import torch

from ksana_lab.transfer.backends.stream import StreamLink, StreamServer, dial, staged
from ksana_lab.transfer.registry import make_backend, make_backends
from ksana_lab.transfer.staging import SLOT_BYTES, Slot

CACHE_BYTES = SLOT_BYTES + 4096


class Events:
    def __init__(self):
        self.acks = []

    def on_ack(self, token, error):
        self.acks.append((token, error))

    def on_lost(self, reason): ...

    def on_notice(self, session, window, notice, first_ns):
        return None

    def on_writer_gone(self, session, reason): ...


@pytest.fixture
def staged_link():
    """(link, server, the cache behind its stage)"""
    cache, events = torch.zeros(CACHE_BYTES, dtype=torch.uint8), Events()
    server = StreamServer(socket.create_server(("127.0.0.1", 0)), events, cache_bytes=CACHE_BYTES, make_stage=lambda: Slot(cache))
    link = StreamLink(dial(socket.AF_INET, server._listener.getsockname(), 5), server.secret, 1, events, 5)
    link.start()
    yield link, server, cache
    link.close()
    server.close()


def test_batches_fit_and_runs_that_do_not_are_cut():
    batches = staged(np.array([[0, 100, 30], [50, 200, 250], [400, 600, 60]], np.int64), 100)
    assert all(batch[:, 2].sum() <= 100 for batch in batches)
    where = {source + i: target + i for batch in batches for source, target, n in batch.tolist() for i in range(n)}
    expected = {a + i: b + i for a, b, n in ((0, 100, 30), (50, 200, 250), (400, 600, 60)) for i in range(n)}
    assert where == expected


def test_a_write_larger_than_a_slot_lands_through_the_stage(staged_link):
    link, server, cache = staged_link
    server.open_window(7)
    data = torch.randint(0, 256, (CACHE_BYTES,), dtype=torch.uint8)
    link.write(np.array([[0, 16, CACHE_BYTES - 16], [CACHE_BYTES - 16, 0, 16]], np.int64), 7, memoryview(data.numpy()))
    link.ping(10)
    assert torch.equal(cache[16:], data[:-16]) and torch.equal(cache[:16], data[-16:])


def test_a_closed_window_fences_a_staged_write(staged_link):
    link, server, cache = staged_link
    server.open_window(7)
    assert server.close_window(7) is True
    link.write(np.array([[0, 0, 4096]], np.int64), 7, memoryview(bytes(b"\x01" * 4096)))
    link.ping(10)
    assert not cache.any()


def test_a_slot_gathers_and_scatters():
    cache = torch.arange(256, dtype=torch.uint8)
    slot = Slot(cache)
    slot.start_gather(np.array([[128, 0, 16], [16, 16, 32]], np.int64))
    slot.wait()
    assert bytes(slot.host[:48]) == bytes(range(128, 144)) + bytes(range(16, 48))
    slot.scatter(np.array([[16, 200, 16]], np.int64))
    assert cache[200:216].tolist() == list(range(16, 32))


@pytest.mark.parametrize("name", ["tcp", "shm"])
def test_the_doctor_measures_a_link_and_leaves_the_cache_alone(name):
    server, client, events = make_backend(name, "127.0.0.1"), make_backend(name, "127.0.0.1"), Events()
    cache = server.allocate(1 << 16, torch.device("cpu"))
    endpoint = server.serve(cache, events)
    link = client.connect(endpoint, torch.full((1 << 16,), 7, dtype=torch.uint8), 1, events, 5)
    try:
        report = link.examine(5)
        assert report.bandwidth > 1e6 and 0 < report.round_trip_s < 1 and report.expected
        assert not cache.any() and not events.acks
    finally:
        link.close()
        client.close()
        server.close()


def test_auto_offers_what_the_cache_s_memory_allows():
    assert [backend.name for backend in make_backends("auto", "127.0.0.1")] == ["shm", "tcp"]
    assert "tcp" in [backend.name for backend in make_backends("auto", "127.0.0.1", on_gpu=True)]
