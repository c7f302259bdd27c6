"""What shm is between GPUs, with CPU tensors in their place: slots that go round, whose turn it is, and what ends a link."""

import contextlib
import ctypes
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from ksana_lab.cuda_driver import Driver
from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import shm, staged_shm, stream
from ksana_lab.transfer.staging import Slot

SLOT, CACHE = 4096, 16 * 4096
WINDOW = 7


class Events:
    def __init__(self):
        self.lost = threading.Event()

    def on_ack(self, token, error): ...

    def on_lost(self, reason):
        self.lost.set()

    def on_notice(self, session, window, notice, first_ns): ...

    def on_writer_gone(self, session, reason): ...


class Ends:
    def __init__(self):
        self.cache, self.source, self.events = (
            torch.zeros(CACHE, dtype=torch.uint8),
            torch.randint(0, 256, (CACHE,), dtype=torch.uint8),
            Events(),
        )
        self.decode, self.prefill = staged_shm.StagedShmBackend(), staged_shm.StagedShmBackend()
        self.endpoint = self.decode.serve(self.cache, Events())
        self.decode.open_window(WINDOW)
        self.link = self.prefill.connect(self.endpoint, self.source, 1, self.events, 5)

    def write(self, window=WINDOW, nbytes=CACHE):
        """In runs of odd places that are longer than a slot, and of two that share one."""
        self.link.write(np.array([[0, 32, nbytes - 32], [nbytes - 32, 0, 32]], np.int64), window)
        self.link._stream.ping(5)

    @property
    def has_arrived(self):
        return torch.equal(self.cache[32:], self.source[:-32]) and torch.equal(self.cache[:32], self.source[-32:])

    def close(self):
        self.link.close()
        self.prefill.close()
        self.decode.close()


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setattr(staged_shm, "SLOT_BYTES", SLOT)
    monkeypatch.setattr(staged_shm, "_STAGE_BYTES", staged_shm._NUM_SLOTS * SLOT)
    ends = Ends()
    yield ends
    ends.close()


def test_more_than_the_stage_holds_goes_round_its_slots(ends):
    ends.write()
    assert ends.has_arrived


def test_a_slot_is_not_filled_before_d_has_read_it(ends, monkeypatch):
    is_waiting, may_read, gathered = threading.Event(), threading.Event(), []
    scatter, gather, answer_to = Slot.scatter, Slot.start_gather, stream.StreamLink.answer_to
    monkeypatch.setattr(Slot, "scatter", lambda slot, *what: (may_read.wait(10), scatter(slot, *what)))
    monkeypatch.setattr(Slot, "start_gather", lambda slot, *what: (gathered.append(slot), gather(slot, *what)))
    monkeypatch.setattr(stream.StreamLink, "answer_to", lambda link, *what: (is_waiting.set(), answer_to(link, *what))[1])
    writing = threading.Thread(target=ends.write)
    writing.start()
    assert is_waiting.wait(5) and len(set(gathered)) == len(gathered) == staged_shm._NUM_SLOTS
    may_read.set()
    writing.join(10)
    assert ends.has_arrived


def test_a_closed_window_is_a_fence_and_both_sides_stay_in_step(ends):
    assert ends.decode.close_window(WINDOW)
    ends.write(nbytes=3 * SLOT)
    assert not ends.cache.any()
    ends.decode.open_window(8)
    ends.write(8)
    assert ends.has_arrived


def test_packed_numbers_come_from_where_they_were_packed(ends):
    numbers = torch.arange(64, dtype=torch.uint8)
    ends.link.write(np.array([[16, 128, 32]], np.int64), WINDOW, source=numbers)
    ends.link._stream.ping(5)
    assert torch.equal(ends.cache[128:160], numbers[16:48])


def test_a_d_that_does_not_read_ends_the_link_in_bounded_time(ends, monkeypatch):
    may_read = threading.Event()
    monkeypatch.setattr(stream, "STALL_S", 0.1)
    monkeypatch.setattr(Slot, "scatter", lambda slot, *what: may_read.wait(10))
    with pytest.raises(TransferError, match="did not answer"):
        ends.write()
    assert ends.events.lost.wait(5)
    may_read.set()


def test_the_doctor_measures_without_touching_the_cache(ends):
    report = ends.link.examine(5)
    assert report.bandwidth > 0 and report.expected > 0 and report.round_trip_s > 0 and "shared memory" in report.path
    assert not ends.cache.any()
    ends.write()
    assert ends.has_arrived


def test_a_stage_that_damages_bytes_is_found_by_the_doctor(ends, monkeypatch):
    scatter = Slot.scatter

    def damage(slot, *what):
        slot.memory[5] ^= 1
        scatter(slot, *what)

    monkeypatch.setattr(Slot, "scatter", damage)
    with pytest.raises(TransferError, match="damages what it carries"):
        ends.link.examine(5)
    assert ends.events.lost.wait(5)


def test_a_stranger_gets_no_memory(ends):
    with pytest.raises(TransferError, match="did not accept"):
        ends.prefill.connect(ends.endpoint | {"secret": "0" * 32}, ends.source, 2, Events(), 5)
    assert len(ends.decode._server._stages) == 1


def test_more_than_a_slot_at_once_is_refused(ends):
    ends.link._stream.ask(staged_shm.MOVE, 1, window=WINDOW, nbytes=SLOT + 16, payload=np.array([[0, SLOT + 16]], "<i8").tobytes())
    assert ends.events.lost.wait(5) and not ends.cache.any()


def test_nothing_is_left_of_a_connection_that_is_over(ends):
    ends.write()
    files = len(os.listdir("/proc/self/fd"))
    for session in range(2, 5):
        ends.prefill.connect(ends.endpoint, ends.source, session, Events(), 5).close()
    ends.close()
    assert "ksana_lab-stage" not in Path("/proc/self/maps").read_text() and len(os.listdir("/proc/self/fd")) < files


def test_a_stage_is_pinned_for_its_gpu_as_long_as_it_is_mapped(monkeypatch):
    maps = lambda: "ksana_lab-stage" in Path("/proc/self/maps").read_text()  # noqa: E731
    driver, event = mock.Mock(), mock.Mock()
    driver.pin.side_effect = driver.unpin.side_effect = lambda *what: None if maps() else pytest.fail("it is not mapped")
    monkeypatch.setattr("ksana_lab.cuda_driver.driver", lambda: driver)
    for name, fake in (("device", contextlib.nullcontext), ("Stream", mock.Mock), ("Event", lambda **options: event)):
        monkeypatch.setattr(torch.cuda, name, fake)
    fd = shm.make_file("ksana_lab-stage", staged_shm._STAGE_BYTES)
    stage = staged_shm.Stage(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)), fd)
    os.close(fd)
    (address, nbytes, device), _ = driver.pin.call_args
    assert (address, nbytes, device) == (stage.next()[1].memory.data_ptr(), staged_shm._STAGE_BYTES, 1)
    stage.close()
    stage.close()
    driver.unpin.assert_called_once_with(address, 1)
    assert event.synchronize.call_count == staged_shm._NUM_SLOTS and not maps()


class FakeLibrary:
    """Every call succeeds; pinned memory is seen ``apart`` bytes away."""

    def __init__(self, apart):
        self.apart, self.calls = apart, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            if name == "cuMemHostGetDevicePointer_v2":
                args[0]._obj.value = args[1].value + self.apart
            return 0

        return call


@pytest.mark.parametrize("apart", [0, 4096])
def test_host_memory_is_pinned_where_the_gpu_sees_it_at_one_address(apart):
    library, memory = FakeLibrary(apart), ctypes.create_string_buffer(64)
    driver, address = Driver(library), ctypes.addressof(memory)
    if apart:
        with pytest.raises(TransferError, match="another address"):
            driver.pin(address, 64, 0)
    else:
        driver.pin(address, 64, 0)
    assert library.calls.count("cuMemHostRegister_v2") == 1 and library.calls.count("cuMemHostUnregister") == bool(apart)
