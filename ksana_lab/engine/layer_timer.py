"""When each layer of a step was computed, for the event log. Exists only while something records; knows nothing of sequences.

One event per step and rank: span ``layers`` (cat ``step``) with args step, rank, ends_ns: ends of the layers, ns after the start.
On the CPU the model's calls tell. On CUDA events on the compute stream do; they are read when they are over, nobody waits for them. Their
times are brought to the monotonic clock by an anchor, an event recorded while the device was idle, renewed whenever it is idle again:
until then the clocks of device and host may drift by a few microseconds per second."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from ksana_lab.tracing.recorder import NullRecorder

_ANCHOR_AGE_NS = 1_000_000_000  # renew one that is older, when the device is idle
_MAX_PENDING = 64  # steps whose events are not over; more would mean that nobody reads them


@dataclass
class _Step:
    step_id: int
    events: list[Any] = field(default_factory=list)


class LayerTimer:
    """``begin`` before a step's forward pass, ``layer_done`` for each layer in order; all on the model's thread, none of it waits."""

    def __init__(self, recorder: NullRecorder, device: torch.device, rank: int, num_layers: int) -> None:
        self._recorder, self._rank, self._num_layers = recorder, rank, num_layers
        self._is_cuda = device.type == "cuda"
        self._step_id = -1
        self._start_ns = 0
        self._ends_ns: list[int] = []
        self._pending: deque[_Step] = deque()
        self._anchor: Any = None
        self._anchor_ns = 0

    def begin(self, step_id: int) -> None:
        self._step_id = step_id
        if self._is_cuda:
            self._begin_cuda()
        else:
            self._start_ns, self._ends_ns = time.monotonic_ns(), []
        if self._recorder.annotates:
            self._recorder.push("layer", "layer", layer=0, step=step_id)

    def layer_done(self, layer: int) -> None:
        if self._recorder.annotates:
            self._recorder.pop()
            if layer + 1 < self._num_layers:
                self._recorder.push("layer", "layer", layer=layer + 1, step=self._step_id)
        if self._is_cuda:
            self._pending[-1].events.append(_recorded_event())
            return
        now_ns = time.monotonic_ns()
        self._ends_ns.append(now_ns - self._start_ns)
        if layer + 1 == self._num_layers:
            self._recorder.span(
                "layers", "step", self._start_ns, now_ns, step=self._step_id, rank=self._rank, ends_ns=self._ends_ns
            )  # fmt: skip

    def _begin_cuda(self) -> None:
        self._read()
        is_idle = not self._pending and _is_stream_idle()  # decode steps that are graphs leave nothing pending here
        first = _recorded_event()
        now_ns = time.monotonic_ns()
        if self._anchor is None or (is_idle and now_ns - self._anchor_ns > _ANCHOR_AGE_NS):
            if self._anchor is None:
                first.synchronize()  # once, at the first step
                now_ns = time.monotonic_ns()
            self._anchor, self._anchor_ns = first, now_ns
        if len(self._pending) == _MAX_PENDING:
            self._pending.popleft()
        self._pending.append(_Step(self._step_id, [first]))

    def _read(self) -> None:
        """Write down the steps that are over."""
        while self._pending and (step := self._pending[0]).events[-1].query():
            self._pending.popleft()
            if len(step.events) != self._num_layers + 1:
                continue  # a step that failed half-way
            times = [self._anchor_ns + round(1e6 * self._anchor.elapsed_time(event)) for event in step.events]
            self._recorder.span(
                "layers", "step", times[0], times[-1],
                step=step.step_id, rank=self._rank, ends_ns=[at - times[0] for at in times[1:]],
            )  # fmt: skip

    def close(self) -> None:
        """The device has finished: the last steps are written, too."""
        if self._is_cuda:
            self._read()


def _is_stream_idle() -> bool:
    return torch.cuda.current_stream().query()


def _recorded_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
