"""Tells when a layer of a step is done: that is, when its KV may be sent. Knows steps and layers; nothing of sequences.

On the CPU a layer is done when the model says so. On CUDA the model only *enqueued* its kernels: an event is recorded on the compute
stream, and a thread of the tracker waits for the events. The forward pass never waits, and since every (step, layer) has an event of its
own, several steps may be in flight. The thread is woken only for layers that somebody waits for, and for the last: each time it runs, it
takes the interpreter's lock away from the model's thread, which a short prompt feels (docs/LOG.md). The device's clock tells afterwards
when the layers between were done."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ksana_lab.errors import TransferError

log = logging.getLogger(__name__)


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self) -> Any: ...

    def synchronize(self) -> Any: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to the other; both are over."""
        ...


class LayerTracker:
    """``begin_step`` and ``layer_done`` are called by the model's thread; ``on_layers(step, ready_ns)``, the monotonic times at which the
    next layers of a step were done, on that thread (CPU) or on the tracker's (CUDA, where ``make_event`` makes one event)."""

    def __init__(
        self,
        num_layers: int,
        on_layers: Callable[[int, list[int]], None],
        make_event: Callable[[], Event] | None = None,
        on_posted: Callable[[int, int, Event], None] | None = None,
        is_awaited: Callable[[int], bool] = lambda layer: True,
    ) -> None:
        """``on_posted(step, layer, event)``: on the model's thread, when the device was given the layer's kernels; it may keep the event,
        which is then not used again. ``is_awaited(layer)``: whether ``on_layers`` should come as soon as this layer is done; it comes
        with a later layer otherwise."""
        self._num_layers, self._on_layers, self._make_event, self._on_posted = num_layers, on_layers, make_event, on_posted
        self._is_awaited = is_awaited
        self._step: int | None = None
        self._next_layer = 0
        self._free: list[Event] = []  # used by the model's thread; appended to by the waiting one (atomic)
        self._recorded: list[Event] = []  # of this step, not handed to the thread yet
        self._pending: queue.SimpleQueue[tuple[int, list[Event]] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if make_event is not None:
            self._thread = threading.Thread(target=self._wait_in_order, name="layer-tracker", daemon=True)
            self._thread.start()

    def begin_step(self, step: int | None) -> None:
        """The next ``layer_done`` calls are of ``step``; None = nobody wants to know. Raises TransferError when the model did not report
        every layer of the step before, or when waiting for an event failed."""
        missing = self._step if self._step is not None and self._next_layer < self._num_layers else None
        seen, self._step, self._next_layer, self._recorded = self._next_layer, step, 0, []
        if self._error is not None:
            raise TransferError(f"waiting for a layer failed: {self._error}") from self._error
        if missing is not None:
            raise TransferError(f"the model reported {seen} of {self._num_layers} layers of a step whose KV must be sent")

    def layer_done(self, layer: int) -> None:
        """Layers come in order, each once. Does not block."""
        if self._step is None:
            return
        assert layer == self._next_layer, (layer, self._next_layer)
        self._next_layer += 1
        if self._make_event is None:
            self._on_layers(self._step, [time.monotonic_ns()])
            return
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        self._recorded.append(event)
        if self._on_posted is not None:
            self._on_posted(self._step, layer, event)
        if layer + 1 == self._num_layers or self._is_awaited(layer):
            self._pending.put((self._step, self._recorded))
            self._recorded = []

    def _wait_in_order(self) -> None:
        try:
            while (item := self._pending.get()) is not None:
                step, events = item
                events[-1].synchronize()
                now_ns = time.monotonic_ns()
                ready_ns = [now_ns - int(event.elapsed_time(events[-1]) * 1e6) for event in events[:-1]]
                if self._on_posted is None:
                    self._free += events
                self._on_layers(step, [*ready_ns, now_ns])
        except Exception as error:  # shown to the engine by the next begin_step
            log.exception("the layer tracker stopped")
            self._error = error

    def close(self) -> None:
        """What is still in flight is reported first. May be called twice."""
        self._step = None
        self._pending.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
