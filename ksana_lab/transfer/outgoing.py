"""What a prefill rank owes for one prompt, and what of it may go now: computed, announced, and enough of it to be worth a piece.

Pure bookkeeping, driven by a sender that holds its lock. One rule serves all modes: a piece is a rectangle of tokens × layers that is
completely computed. ``layer`` lets layers of the running chunk go as its schedule says, ``chunk`` waits for all layers of it, ``bulk``
for the whole prompt; whatever lies ready because the announcement or the link was late goes in one piece, in every mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ksana_lab.core.connector import SendStep
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.protocol.transfer import Target
from ksana_lab.transfer.schedule import Mode, Schedule

L = TypeVar("L")


@dataclass(eq=False)
class Step:
    """One forward pass: how many of its layers are done, and when each was (monotonic ns). ``events``: of the layers whose kernels a
    device was given, done or not."""

    num_layers: int
    ready_ns: list[int] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    num_tokens: int = 0  # of prompts that are sent

    @property
    def num_ready(self) -> int:
        return len(self.ready_ns)

    @property
    def is_done(self) -> bool:
        return len(self.ready_ns) == self.num_layers

    @property
    def is_posted(self) -> bool:
        return self.is_done or len(self.events) == self.num_layers


@dataclass(frozen=True)
class Piece:
    start: int  # tokens [start, end)
    end: int
    layers: range
    chunk: int  # the first prefill chunk it is of
    step: Step  # the pass that computes the last of it

    @property
    def is_ready(self) -> bool:
        return self.step.num_ready >= self.layers.stop

    @property
    def ready_ns(self) -> int:
        """When the last of it was computed; 0 = not yet."""
        return self.step.ready_ns[self.layers.stop - 1] if self.is_ready else 0

    @property
    def after(self) -> Any:
        """The event that its copy must wait for; None when it is computed."""
        return None if self.is_ready else self.step.events[self.layers.stop - 1]


@dataclass(eq=False)
class Route(Generic[L]):
    """The way to one decode rank: what was handed out, what was acknowledged."""

    link: L
    chunk: int = 0  # chunks before this one were handed out
    layer: int = 0  # of this one, layers before this
    num_unacked: int = 0


@dataclass
class _Chunk:
    start: int
    end: int
    step: Step


@dataclass(eq=False)
class Outgoing(Generic[L]):
    """One prompt on one rank. ``target`` and ``routes`` come with the announcement."""

    key: TransferKey
    serial: int
    num_layers: int
    block_size: int
    attempt: int = 0
    block_table: tuple[int, ...] = ()
    chunks: list[_Chunk] = field(default_factory=list)
    is_complete: bool = False  # the last chunk is known
    target: Target | None = None
    announced_ns: int = 0  # when ``target`` came
    routes: list[Route[L]] = field(default_factory=list)
    mode: Mode = "layer"
    schedule: Schedule = ()  # of mode ``layer``
    num_writing: int = 0  # pieces whose bytes a backend is reading now
    is_dropped: bool = False
    is_early: bool = False  # pieces may be taken as soon as the device was given their kernels: the copy waits for them there
    plans: dict[tuple[int, ...], Any] = field(default_factory=dict)  # the sender's, of copies worked out before

    def add(self, send: SendStep, step: Step) -> None:
        """The step that computes tokens [send.start, send.end). A new attempt starts from nothing."""
        if send.attempt != self.attempt or not self.chunks:
            self.attempt, self.chunks, self.is_complete = send.attempt, [], False
            self.plans.clear()
            for route in self.routes:
                route.chunk = route.layer = route.num_unacked = 0
        # A block that the next chunk goes on filling travels with that chunk: whole blocks are few large copies.
        end = send.end if send.is_last else send.end - send.end % self.block_size
        start = self.chunks[-1].end if self.chunks else 0
        self.block_table, self.is_complete = send.block_table, send.is_last
        self.chunks.append(_Chunk(start, end, step))

    def take(self, route: Route[L]) -> Piece | None:
        """The next piece for this route, and count it as handed out; None when there is nothing to send now."""
        if self.target is None or self.is_dropped or (self.mode == "bulk" and not self._is_bulk_due):
            return None
        while route.chunk < len(self.chunks):
            chunk, number = self.chunks[route.chunk], route.chunk
            start = max(chunk.start, self.target.num_cached_tokens)
            if route.layer == 0 and (chunk.step.is_done or self.mode == "bulk"):
                end, step = self._take_whole_chunks(route)
                layers = range(self.num_layers)
            else:
                ready = self._num_layers_to_flush(chunk.step, route.layer)
                if ready <= route.layer:
                    return None
                end, layers, step = chunk.end, range(route.layer, ready), chunk.step
                route.chunk, route.layer = (route.chunk + 1, 0) if ready == self.num_layers else (route.chunk, ready)
            if start < end:
                route.num_unacked += 1
                return Piece(start, end, layers, number, step)
        return None

    def _take_whole_chunks(self, route: Route[L]) -> tuple[int, Step]:
        """Hand out every completely computed chunk from here on, in bulk mode every chunk; returns (end token, the last's step)."""
        while route.chunk < len(self.chunks) and ((chunk := self.chunks[route.chunk]).step.is_done or self.mode == "bulk"):
            route.chunk += 1
            end, step = chunk.end, chunk.step
        return end, step

    def _num_layers_to_flush(self, step: Step, first: int) -> int:
        if step.is_done:
            return self.num_layers
        if self.mode != "layer":
            return self.num_layers if self.is_early and step.is_posted else 0
        ready = max((end for end in self.schedule if end <= step.num_ready), default=0)
        if ready <= first and self.is_early:  # one at a time: the copy of each begins when its layers are computed
            posted = min(end for end in self.schedule if end > first)
            return posted if len(step.events) >= posted else 0
        return ready

    @property
    def _is_bulk_due(self) -> bool:
        return self.is_complete and (self.chunks[-1].step.is_posted if self.is_early else self.chunks[-1].step.is_done)

    @property
    def last_step(self) -> Step | None:
        return self.chunks[-1].step if self.is_complete else None

    @property
    def is_computed(self) -> bool:
        return self.is_complete and self.chunks[-1].step.is_done

    @property
    def is_sent(self) -> bool:
        """Nothing is owed any more."""
        return self.target is not None and self.is_computed and not any(route.num_unacked or self._owes(route) for route in self.routes)

    def _owes(self, route: Route[L]) -> bool:
        assert self.target is not None
        return any(chunk.end > max(chunk.start, self.target.num_cached_tokens) for chunk in self.chunks[route.chunk :])
