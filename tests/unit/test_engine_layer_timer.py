"""Layers are timed without waiting for the device; a device's events stand in for themselves here."""

import time
from typing import ClassVar

import pytest
import torch

from ksana_lab.engine import layer_timer
from ksana_lab.engine.layer_timer import LayerTimer
from ksana_lab.tracing.recorder import NullRecorder


class Notes(NullRecorder):
    enabled = True

    def __init__(self, annotates=False):
        self.spans, self.stack, self.seen, self.annotates = [], [], [], annotates

    def span(self, name, cat, start_ns, end_ns, **args):
        self.spans.append((name, start_ns, end_ns, args))

    def push(self, name, cat, **args):
        self.stack.append(args["layer"])
        self.seen.append(args["layer"])

    def pop(self):
        self.stack.pop()


class Event:
    """Recorded at ``at`` ms; over when the device's clock has passed it."""

    device_ms = 0.0
    made: ClassVar[list["Event"]] = []

    def __init__(self):
        self.at = 10.0 * len(Event.made)
        Event.made.append(self)

    def query(self):
        return self.at <= Event.device_ms

    def synchronize(self):
        Event.device_ms = max(Event.device_ms, self.at)

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def device(monkeypatch):
    Event.device_ms, Event.made, Event.is_idle = 0.0, [], True
    monkeypatch.setattr(layer_timer, "_recorded_event", Event)
    monkeypatch.setattr(layer_timer, "_is_stream_idle", lambda: Event.is_idle)
    return torch.device("cuda")


def run_step(timer, step, num_layers):
    timer.begin(step)
    for layer in range(num_layers):
        timer.layer_done(layer)


def test_on_the_cpu_each_step_is_one_span():
    notes = Notes()
    begin = time.monotonic_ns()
    run_step(LayerTimer(notes, torch.device("cpu"), 1, 3), 7, 3)
    ((name, start, end, args),) = notes.spans
    assert name == "layers" and args["step"] == 7 and args["rank"] == 1
    assert begin <= start and args["ends_ns"] == sorted(args["ends_ns"]) and args["ends_ns"][-1] == end - start


def test_on_a_device_nothing_is_written_before_it_is_over(device):
    notes = Notes()
    timer = LayerTimer(notes, device, 0, 2)
    run_step(timer, 0, 2)  # events at 0, 10, 20 ms
    run_step(timer, 1, 2)  # 30, 40, 50 ms
    assert notes.spans == []
    Event.device_ms = 20.0
    timer.close()
    assert [args["step"] for *_, args in notes.spans] == [0] and notes.spans[0][3]["ends_ns"] == [10_000_000, 20_000_000]
    Event.device_ms = 50.0
    timer.close()
    assert notes.spans[1][1] - notes.spans[0][1] == 30_000_000


@pytest.mark.parametrize(("is_idle", "is_renewed"), [(True, True), (False, False)])
def test_the_anchor_is_renewed_on_an_idle_stream_alone(device, monkeypatch, is_idle, is_renewed):
    """A decode step that is a graph may still run when the next prefill begins: its end would be taken for now."""
    monkeypatch.setattr(layer_timer, "_ANCHOR_AGE_NS", 0)
    timer = LayerTimer(Notes(), device, 0, 1)
    run_step(timer, 0, 1)
    Event.device_ms = 10.0
    first, Event.is_idle = timer._anchor, is_idle
    run_step(timer, 1, 1)
    assert (timer._anchor is not first) == is_renewed


def test_ranges_of_layers_nest_evenly():
    notes = Notes(annotates=True)
    run_step(LayerTimer(notes, torch.device("cpu"), 0, 3), 0, 3)
    assert notes.seen == [0, 1, 2] and notes.stack == []
