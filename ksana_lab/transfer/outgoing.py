"""What a prefill rank owes for one prompt, and what of it may go now: computed, announced, and enough of it to be worth a piece.

Pure bookkeeping, driven by a sender that holds its lock. One rule serves all modes: a piece is a rectangle of tokens × layers that is
completely computed. ``layer`` lets groups of layers of the running chunk go, ``chunk`` waits for all layers of it, ``bulk`` for the whole
prompt; whatever lies ready because the announcement or the link was late goes in one piece, in every mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from ksana_lab.core.connector import SendStep
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.protocol.transfer import Target

Mode = Literal["bulk", "chunk", "layer"]
L = TypeVar("L")

# ``auto``: below this many tokens the handling of pieces costs more than it hides (the crossovers reported for layer-wise transfer
# lie between 256 and 512 tokens); above it a piece should be large enough to be carried at the wire's speed.
AUTO_BULK_TOKENS = 512
AUTO_PIECE_BYTES = 1 << 20


def choose_mode(option: str, layers_per_chunk: int, num_tokens: int, layer_bytes: int) -> tuple[Mode, int]:
    """(mode, layers per piece) for a prompt of which ``num_tokens`` are to be sent, ``layer_bytes`` per layer."""
    if option != "auto":
        return option, layers_per_chunk  # type: ignore[return-value]
    if num_tokens < AUTO_BULK_TOKENS:
        return "bulk", layers_per_chunk
    return "layer", max(layers_per_chunk, -(-AUTO_PIECE_BYTES // max(1, layer_bytes)))


@dataclass(eq=False)
class Step:
    """One forward pass: how many of its layers are done, and when each was (monotonic ns)."""

    num_layers: int
    ready_ns: list[int] = field(default_factory=list)

    @property
    def num_ready(self) -> int:
        return len(self.ready_ns)

    @property
    def is_done(self) -> bool:
        return len(self.ready_ns) == self.num_layers


@dataclass(frozen=True)
class Piece:
    start: int  # tokens [start, end)
    end: int
    layers: range
    chunk: int  # the first prefill chunk it is of
    ready_ns: int  # when the last of it was computed


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
    routes: list[Route[L]] = field(default_factory=list)
    mode: Mode = "layer"
    group: int = 1
    num_writing: int = 0  # pieces whose bytes a backend is reading now
    is_dropped: bool = False

    def add(self, send: SendStep, step: Step) -> None:
        """The step that computes tokens [send.start, send.end). A new attempt starts from nothing."""
        if send.attempt != self.attempt or not self.chunks:
            self.attempt, self.chunks, self.is_complete = send.attempt, [], False
            for route in self.routes:
                route.chunk = route.layer = route.num_unacked = 0
        # A block that the next chunk goes on filling travels with that chunk: whole blocks are few large copies.
        end = send.end if send.is_last else send.end - send.end % self.block_size
        start = self.chunks[-1].end if self.chunks else 0
        self.block_table, self.is_complete = send.block_table, send.is_last
        self.chunks.append(_Chunk(start, end, step))

    def take(self, route: Route[L]) -> Piece | None:
        """The next piece for this route, and count it as handed out; None when there is nothing to send now."""
        if self.target is None or self.is_dropped or (self.mode == "bulk" and not self.is_computed):
            return None
        while route.chunk < len(self.chunks):
            chunk, number = self.chunks[route.chunk], route.chunk
            start = max(chunk.start, self.target.num_cached_tokens)
            if route.layer == 0 and chunk.step.is_done:
                end, ready_ns = self._take_done_chunks(route)
                layers = range(self.num_layers)
            else:
                ready = self._num_layers_to_flush(chunk.step)
                if ready <= route.layer:
                    return None
                end, layers, ready_ns = chunk.end, range(route.layer, ready), chunk.step.ready_ns[ready - 1]
                route.chunk, route.layer = (route.chunk + 1, 0) if ready == self.num_layers else (route.chunk, ready)
            if start < end:
                route.num_unacked += 1
                return Piece(start, end, layers, number, ready_ns)
        return None

    def _take_done_chunks(self, route: Route[L]) -> tuple[int, int]:
        """Hand out every completely computed chunk from here on; returns (end token, when the last became ready)."""
        while route.chunk < len(self.chunks) and (chunk := self.chunks[route.chunk]).step.is_done:
            route.chunk += 1
            end, ready_ns = chunk.end, chunk.step.ready_ns[-1]
        return end, ready_ns

    def _num_layers_to_flush(self, step: Step) -> int:
        if step.is_done:
            return self.num_layers
        return step.num_ready - step.num_ready % self.group if self.mode == "layer" else 0

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
