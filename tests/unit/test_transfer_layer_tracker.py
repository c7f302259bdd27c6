"""Layers are reported in order, per step, and on a device only when they are really done."""

from __future__ import annotations

import threading

import pytest

from ksana_lab.errors import TransferError
from ksana_lab.transfer.layer_tracker import LayerTracker


class FakeEvent:
    """A device event that is done when the test says so."""

    made: list[FakeEvent]

    def __init__(self) -> None:
        self.is_done = threading.Event()
        self.num_records = 0
        FakeEvent.made.append(self)

    def record(self) -> None:
        self.num_records += 1
        self.is_done.clear()

    def synchronize(self) -> None:
        assert self.is_done.wait(10)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.is_done.is_set() and end.is_done.is_set()
        return float(FakeEvent.made.index(end) - FakeEvent.made.index(self))


@pytest.fixture
def on_device():
    FakeEvent.made = []
    seen: list[tuple[int, int]] = []
    arrived = threading.Semaphore(0)
    tracker = LayerTracker(2, lambda step, ready_ns: (seen.append((step, len(ready_ns))), arrived.release()), FakeEvent)
    yield tracker, seen, arrived
    for event in FakeEvent.made:
        event.is_done.set()
    tracker.close()


def test_on_the_cpu_a_layer_is_done_when_the_model_says_so():
    seen = []
    tracker = LayerTracker(2, lambda step, ready_ns: seen.append((step, len(ready_ns))))
    tracker.begin_step(7)
    tracker.layer_done(0)
    assert seen == [(7, 1)]


def test_steps_nobody_wants_to_know_of_are_not_reported():
    tracker = LayerTracker(2, lambda step, ready_ns: pytest.fail("reported"))
    tracker.begin_step(None)
    tracker.layer_done(0)


def test_a_model_that_forgets_a_layer_is_told():
    tracker = LayerTracker(2, lambda step, ready_ns: None)
    tracker.begin_step(0)
    tracker.layer_done(0)
    with pytest.raises(TransferError, match="1 of 2 layers"):
        tracker.begin_step(1)


def test_the_forward_pass_never_waits_for_the_device(on_device):
    tracker, seen, _ = on_device
    for step in (0, 1, 2):  # three steps in flight, nothing done
        tracker.begin_step(step)
        for layer in (0, 1):
            tracker.layer_done(layer)
    assert seen == [] and len(FakeEvent.made) == 6


def test_layers_of_several_steps_come_in_order_each_when_it_is_done(on_device):
    tracker, seen, arrived = on_device
    for step in (0, 1):
        tracker.begin_step(step)
        for layer in (0, 1):
            tracker.layer_done(layer)
    FakeEvent.made[0].is_done.set()
    FakeEvent.made[2].is_done.set()  # later ones may be done; they wait their turn
    assert arrived.acquire(timeout=10) and seen == [(0, 1)]
    FakeEvent.made[1].is_done.set()
    assert arrived.acquire(timeout=10) and arrived.acquire(timeout=10)
    assert seen == [(0, 1), (0, 1), (1, 1)]


def test_layers_nobody_waits_for_come_with_the_next_that_somebody_does():
    FakeEvent.made, seen, arrived = [], [], threading.Event()
    tracker = LayerTracker(4, lambda step, ready_ns: (seen.append(ready_ns), arrived.set()), FakeEvent, is_awaited=lambda layer: layer == 2)
    tracker.begin_step(0)
    for layer in range(3):
        tracker.layer_done(layer)
    assert not seen
    for event in FakeEvent.made:
        event.is_done.set()
    assert arrived.wait(10)
    assert [seen[0][2] - at for at in seen[0]] == [2_000_000, 1_000_000, 0]  # as the device's clock has it
    arrived.clear()
    tracker.layer_done(3)  # the last, awaited or not
    FakeEvent.made[-1].is_done.set()
    assert arrived.wait(10) and len(seen[1]) == 1
    tracker.close()


def test_events_are_used_again(on_device):
    tracker, _, arrived = on_device
    for step in range(5):
        tracker.begin_step(step)
        for layer in (0, 1):
            tracker.layer_done(layer)
            FakeEvent.made[-1].is_done.set()
            for event in FakeEvent.made:
                event.is_done.set()
            assert arrived.acquire(timeout=10)
    assert len(FakeEvent.made) <= 2


def test_an_error_while_waiting_reaches_the_engine(on_device):
    tracker, _, _ = on_device
    failed = threading.Event()
    broken = FakeEvent()
    broken.synchronize = lambda: (failed.set(), 1 / 0)
    tracker._free.append(broken)
    tracker.begin_step(0)
    tracker.layer_done(0)
    tracker.layer_done(1)
    assert failed.wait(10)
    tracker._thread.join(timeout=10)
    with pytest.raises(TransferError, match="division"):
        tracker.begin_step(1)
