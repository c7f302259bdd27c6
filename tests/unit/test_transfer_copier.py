"""The cuda_ipc backend's bookkeeping of copies, without a GPU: a kernel made of memory moves, and events that are over at once or not."""

import contextlib
import ctypes
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import cuda_ipc

WORDS = 8


class FakeEvent:
    def __init__(self, **options): ...

    def record(self): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


class FakeStream:
    waited: ClassVar[list] = []
    cuda_stream = 7

    def __init__(self, **options): ...

    def wait_event(self, event):
        self.waited.append(event)

    def synchronize(self): ...


def pieces(runs):
    return np.column_stack((runs[:, 0], runs[:, 1], runs[:, 2] // WORDS))


def launch(source, target, table, rows, programs):
    for a, b, words in table[:rows].tolist():
        ctypes.memmove(target + b, source + a, words * WORDS)


class FakeDriver:
    """Of CUDA 13 or an older one."""

    def __init__(self, has_batch):
        self.has_batch, self.batches = has_batch, []

    def copy_batch_async(self, dsts, srcs, sizes, stream, device):
        assert (stream, device) == (7, 0)
        self.batches.append(len(sizes))
        for dst, src, nbytes in zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(dst, src, nbytes)


@pytest.fixture
def driver(request):
    return FakeDriver(getattr(request, "param", True))


@pytest.fixture
def copier(monkeypatch, driver):
    monkeypatch.setattr(cuda_ipc.cuda_driver, "driver", lambda: driver)
    kernel = types.ModuleType("gather_copy")
    kernel.pieces, kernel.launch = pieces, launch
    import ksana_lab.transfer as package

    monkeypatch.setitem(sys.modules, "ksana_lab.transfer.gather_copy", kernel)
    monkeypatch.setattr(package, "gather_copy", kernel, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda_ipc, "_RING_ROWS", 64)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: empty(*shape, **more))
    FakeStream.waited = []
    cache = torch.randint(0, 256, (1 << 14,), dtype=torch.uint8)
    return cuda_ipc.Copier(cache), cache


def scattered(num, seed):
    dice = np.random.default_rng(seed)
    return np.column_stack((dice.permutation(100)[:num] * 64, dice.permutation(100)[:num] * 64, np.full(num, 64))).astype(np.int64)


def test_the_same_runs_serve_every_layer_by_their_shift(copier):
    copier, cache = copier
    target, runs = torch.zeros(1 << 14, dtype=torch.uint8), scattered(20, 1)
    for shift in ((0, 0), (6400, 8000)):
        copier.copy(target.data_ptr(), runs, None, shift)
        for a, b, n in runs.tolist():
            assert torch.equal(target[b + shift[1] : b + shift[1] + n], cache[a + shift[0] : a + shift[0] + n])
    assert len(copier._known) == 1


def test_lists_longer_than_the_ring_and_many_of_them_arrive_whole(copier):
    copier, cache = copier
    for seed in range(30):
        target, runs = torch.zeros(1 << 14, dtype=torch.uint8), scattered(3 * seed + 7, seed)
        copier.copy(target.data_ptr(), runs, None)
        expected = torch.zeros(1 << 14, dtype=torch.uint8)
        for a, b, n in runs.tolist():
            expected[b : b + n] = cache[a : a + n]
        assert torch.equal(target, expected)


def test_a_copy_waits_for_its_layer_on_the_stream(copier):
    copier, _ = copier
    target = torch.zeros(1 << 14, dtype=torch.uint8)
    copier.copy(target.data_ptr(), scattered(3, 1), "the layer's event")
    assert FakeStream.waited == ["the layer's event"]


@pytest.mark.parametrize(("driver", "num_batches"), [(True, 2), (False, 0)], indirect=["driver"])
def test_beside_a_prefill_the_copy_engines_copy_where_they_take_batches(copier, driver, num_batches):
    copier, cache = copier
    target, runs = torch.zeros(1 << 14, dtype=torch.uint8), scattered(20, 1)
    for shift in ((0, 0), (6400, 8000)):
        copier.copy(target.data_ptr(), runs, "the layer's event", shift)
        for a, b, n in runs.tolist():
            assert torch.equal(target[b + shift[1] : b + shift[1] + n], cache[a + shift[0] : a + shift[0] + n])
    assert driver.batches == [20] * num_batches
    copier.copy(target.data_ptr(), runs, None)
    assert driver.batches == [20] * num_batches, "nothing is computed meanwhile: the kernel is faster"


def test_what_the_kernel_cannot_move_is_refused(copier):
    copier, _ = copier
    with pytest.raises(TransferError, match="not aligned"):
        copier.copy(0, np.array([[0, 8, 64]], np.int64), None)
    with pytest.raises(TransferError, match="not aligned"):
        copier.copy(0, scattered(1, 1), None, (8, 0))
