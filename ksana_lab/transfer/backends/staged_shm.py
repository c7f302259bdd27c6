"""KV between GPUs of one host that cannot reach each other's memory: through host memory that both processes map and pin.

P's GPU gathers a batch into a slot of the stage, D's GPU scatters it from there; no processor copies, and while D reads one slot P fills
the next, so that both directions of the host link work at once. What is in which slot goes over the stream beside it, whose frames are in
the order of the slots:
    MOVE  P→D  runs × (offset, bytes); their bytes lie in the next slot. ACK: the slot is P's again
    PROBE P→D  nbytes lie in the next slot, for nobody. ACK the same, with the CRC-32 of what D's device read (``runs`` 1) or without

D makes the stage, one for each connection: a memory file without a name, which P gets as a descriptor and the kernel frees with the last
process that maps it. D puts the bytes into its cache itself, so closing a window is a fence, as with tcp. Caches on CPUs work, too: what
this file does can be tried without a GPU. Linux only."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ksana_lab import cuda_driver
from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import stream
from ksana_lab.transfer.backends.shm import is_supported, make_file, map_file
from ksana_lab.transfer.backends.stream import DONE, Frame, ServedByStream, StreamLink, StreamServer, dial, run_table, staged
from ksana_lab.transfer.base import Link, LinkEvents, LinkReport, ServerEvents, Ticket
from ksana_lab.transfer.checksum import crc_text
from ksana_lab.transfer.plan import Copies, shifted
from ksana_lab.transfer.staging import SLOT_BYTES, Slot, packed

MOVE, PROBE = 24, 25
_NUM_SLOTS = 4
_STAGE_BYTES = _NUM_SLOTS * SLOT_BYTES
_NUM_BURSTS = 3


class Stage:
    """A memory file, mapped here and pinned for the GPU that ``cache`` lies on; its slots are used in turn. Raises TransferError."""

    def __init__(self, cache: torch.Tensor, fd: int) -> None:
        memory = torch.frombuffer(map_file(fd, _STAGE_BYTES), dtype=torch.uint8)
        self._slots = [Slot(cache, memory=part) for part in memory.split(SLOT_BYTES)]
        self._turn = 0
        self._pinned: tuple[int, int] | None = None  # address, device
        if cache.is_cuda:
            address, device = memory.data_ptr(), cache.device.index or 0
            cuda_driver.driver().pin(address, _STAGE_BYTES, device)
            self._pinned = address, device

    def next(self) -> tuple[int, Slot]:
        """(its number, the slot whose turn it is)"""
        number, self._turn = self._turn, (self._turn + 1) % _NUM_SLOTS
        return number, self._slots[number]

    def close(self) -> None:
        """What is enqueued is waited for. May be called twice."""
        for slot in self._slots:
            slot.wait()
        if self._pinned is not None:
            cuda_driver.driver().unpin(*self._pinned)  # while it is mapped, which it is as long as a slot is there
            self._pinned = None
        self._slots = []


# ---- D ----------------------------------------------------------------------------------------------------------------


class StagedServer(StreamServer):
    def __init__(self, listener: socket.socket, events: ServerEvents, cache: torch.Tensor) -> None:
        self._memory = cache
        self._stages: dict[Any, Stage] = {}
        super().__init__(listener, events, cache_bytes=cache.numel(), is_fence=True)

    @contextlib.contextmanager
    def _files_for(self, writer: Any) -> Iterator[Sequence[int]]:
        fd = make_file("ksana_lab-stage", _STAGE_BYTES)
        try:
            self._stages[writer] = Stage(self._memory, fd)
            yield (fd,)
        finally:
            os.close(fd)

    def _part_with(self, writer: Any) -> None:
        stage = self._stages.pop(writer, None)
        if stage is not None:
            stage.close()

    def _take(self, writer: Any, frame: Frame) -> None:
        if frame.kind not in (MOVE, PROBE):
            super()._take(writer, frame)
            return
        if not 0 < frame.nbytes <= SLOT_BYTES:
            raise TransferError(f"{frame.nbytes} bytes in a slot of {SLOT_BYTES}")
        writer.first_ns = writer.first_ns or time.monotonic_ns()
        _, slot = self._stages[writer].next()
        if frame.kind == MOVE:
            self._scatter(slot, self._receive_table(writer.wire, frame), self._window(frame))
            self._say(writer, frame)
        else:
            writer.first_ns = 0
            with slot.on_stream():
                arrived = torch.empty(frame.nbytes, dtype=torch.uint8, device=self._memory.device)
                slot.scatter(np.array([[0, 0, frame.nbytes]], np.int64), arrived)
                text = crc_text(arrived) if frame.num_runs else ""
            self._say(writer, frame, text)

    def close(self) -> None:
        super().close()
        self._memory = torch.empty(0, dtype=torch.uint8)


# ---- P ----------------------------------------------------------------------------------------------------------------


class StagedShmLink:
    is_device_ordered = False

    def __init__(self, control: StreamLink, stage: Stage, device: torch.device) -> None:
        self._stream, self._device = control, device
        self._stage: Stage | None = stage  # None = closed
        self._tokens = [0] * _NUM_SLOTS  # of what D was last told of each slot
        self._handed_over = 0
        self._lock = threading.Lock()

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        """Done when it returns. On a GPU ``after`` must be over, unless there is a ``source``: the caller waits for a layer."""
        if not len(copies):
            return DONE
        if source is not None and after is not None:
            after.synchronize()
        with self._failing() as stage:
            batches = staged(shifted(copies, shift), SLOT_BYTES)
            coming = self._fill(stage, packed(batches[0]), source)
            for batch, later in zip(batches, [*batches[1:], None], strict=True):
                slot = coming
                if later is not None:
                    coming = self._fill(stage, packed(later), source)
                slot.wait()
                self._hand_over(MOVE, len(batch), int(batch[:, 2].sum()), window, run_table(batch))
        return DONE

    @contextlib.contextmanager
    def _failing(self) -> Iterator[Stage]:
        """After a failure the two sides no longer agree on whose turn it is: the connection ends with it."""
        with self._lock:
            if self._stage is None:
                raise TransferError("the link is closed")
            try:
                yield self._stage
            except TransferError:
                self._stream.lose()
                raise

    def _fill(self, stage: Stage, copies: Copies, source: torch.Tensor | None) -> Slot:
        """Begin to gather into the next slot, once D has read what was in it."""
        number, slot = stage.next()
        if self._tokens[number]:
            self._stream.answer_to(self._tokens[number], stream.STALL_S)
        slot.start_gather(copies, source)
        return slot

    def _hand_over(self, kind: int, num_runs: int, nbytes: int, window: int = 0, payload: bytes = b"") -> int:
        """The oldest slot that was filled; returns the token of D's answer."""
        number, self._handed_over = self._handed_over, (self._handed_over + 1) % _NUM_SLOTS
        self._tokens[number] = token = self._stream.ask(kind, num_runs, window=window, nbytes=nbytes, payload=payload)
        return token

    def examine(self, timeout_s: float) -> LinkReport:
        """Random bytes to a place on D's device that nobody reads: the first time to compare their sums, then against the clock. They
        should be as fast as this side alone gets them into the stage."""
        round_trip_s, whole = self._stream.round_trip_s(timeout_s), np.array([[0, 0, SLOT_BYTES]], np.int64)
        numbers = torch.randint(0, 256, (SLOT_BYTES,), dtype=torch.uint8).to(self._device)  # there when this returns, for every stream
        seconds, own = [], []
        with self._failing() as stage:
            self._fill(stage, whole, numbers).wait()
            arrived, sent = self._stream.answer_to(self._hand_over(PROBE, 1, SLOT_BYTES), timeout_s), crc_text(numbers)
            if arrived != sent:
                raise TransferError(f"the stage damages what it carries: CRC {arrived} there, {sent} here")
            for _ in range(_NUM_BURSTS):
                begin = time.perf_counter()
                for _ in range(_NUM_SLOTS):
                    filling = time.perf_counter()
                    self._fill(stage, whole, numbers).wait()
                    own.append(time.perf_counter() - filling)
                    token = self._hand_over(PROBE, 0, SLOT_BYTES)
                self._stream.answer_to(token, timeout_s)
                seconds.append(max(1e-9, time.perf_counter() - begin - round_trip_s))
        path = "pinned host memory" if self._device.type == "cuda" else "shared memory, staged"
        return LinkReport(path, _STAGE_BYTES / min(seconds), round_trip_s, SLOT_BYTES / max(1e-9, min(own)))

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        """D puts nothing of what is under way into a closed window, so it is not waited for; what P's device still writes, is."""
        self._stream.close()  # ends a write that waits for D
        with self._lock:
            stage, self._stage = self._stage, None
            if stage is not None:
                stage.close()


class StagedShmBackend(ServedByStream):
    name = "shm"

    def __init__(self) -> None:
        if not is_supported():
            raise TransferError("backend shm needs Linux (memfd_create); use tcp")

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        listener, name = stream.listen_on_host()
        self._server = StagedServer(listener, events, cache)
        return {"name": name, "secret": self._server.secret}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            name, secret = str(endpoint["name"]), str(endpoint["secret"])
        except (KeyError, TypeError) as error:
            raise TransferError(f"the decode rank's shm endpoint is malformed: {error!r}") from error
        control = StreamLink(dial(socket.AF_UNIX, f"\0{name}", timeout_s), secret, session, events, timeout_s, max_fds=1)
        try:
            if len(control.fds) != 1:
                raise TransferError("the decode rank sent no memory")
            stage = Stage(cache, control.fds[0])
        except TransferError:
            control.close()
            raise
        control.start()
        return StagedShmLink(control, stage, cache.device)
