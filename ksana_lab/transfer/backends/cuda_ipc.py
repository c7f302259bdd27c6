"""KV between the GPUs of one host: D's cache is exported with CUDA IPC, P's GPU writes into it over NVLink (or PCIe peer access); notices
go over a local stream. A batch of copies is one kernel where the SMs have nothing else to do, and one call to the copy engines beside a
prefill, whose kernels want the SMs.

The cache is plain device memory, because the framework's allocator under ``backend:cudaMallocAsync`` cannot export its own. P and D may
also share one GPU. As with shm, P reaches D's memory by itself, so D cannot fence: it waits until P says that it has stopped, or until P's
end of the stream is closed, which P does only when its copies are over, or by dying."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from ksana_lab import cuda_driver
from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends.stream import DONE, ServedByStream, StreamLink, StreamServer, dial, listen_on_host
from ksana_lab.transfer.base import Link, LinkEvents, LinkReport, ServerEvents, Ticket
from ksana_lab.transfer.plan import Copies
from ksana_lab.transfer.staging import check_alignment

# SM programs a copy may occupy (docs/LOG.md, 2026-11-22): all of them reach 92% of the wire. Beside computing, where the copy engines do
# not take batches (before CUDA 13), fewer.
PROGRAMS_ALONE, PROGRAMS_BESIDE = 132, 64
_RING_ROWS = 1 << 19  # pieces of all copies under way
_MAX_TABLES = 8  # prompts whose lists are kept
_STALL_S = 30.0
_SCRATCH_BYTES = 32 << 20  # behind the cache in the same allocation: where a new link is measured
_NUM_BURSTS = 8  # three found 148 GB/s in one start of five, where the link gives 340: the first ones wake it
_PCIE_BYTES_PER_S = 20e9  # generation 4, 16 lanes
_SAME_GPU_BYTES_PER_S = 500e9
# What a burst of _SCRATCH_BYTES reaches between two GPUs of one kind over NVLink, by compute capability; measured on H200 (340 GB/s), a
# cautious share of the data sheet's figure for the others.
_NVLINK_BYTES_PER_S = {9: 340e9, 8: 180e9}
_NVLINK_OTHER = 80e9


class CudaTicket:
    """A copy under way on the transfer stream. ``wire_ms`` is the GPU's own measure, once done."""

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._begin, self._end = begin, end

    def done(self) -> bool:
        return self._end.query()

    def wait(self, timeout_s: float) -> bool:
        """Polls with a growing pause of at most 50 µs: the driver's own blocking wait has no bound."""
        deadline, pause_s = time.monotonic() + timeout_s, 2e-6
        while not self._end.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 50e-6)
        return True

    @property
    def wire_s(self) -> float:
        """The GPU's own measure of the copy, once done."""
        return self._begin.elapsed_time(self._end) / 1e3

    def since(self, event: torch.cuda.Event) -> float:
        """Seconds from ``event`` to the end of the copy on the GPU's clock; both are over."""
        return event.elapsed_time(self._end) / 1e3


class Copier:
    """The transfer stream of one P rank, shared by its links; calls are serialised."""

    def __init__(self, cache: torch.Tensor) -> None:
        from ksana_lab.transfer import gather_copy

        self._kernel = gather_copy
        self.device, self._source, self.source_bytes = cache.device, cache.data_ptr(), cache.numel()
        with torch.cuda.device(self.device):
            # Before ordinary streams: when a layer is ready its copy should start, not queue behind the next layers' kernels.
            self._stream = torch.cuda.Stream(priority=-1)
            self._host = torch.empty((_RING_ROWS, 3), dtype=torch.int64, pin_memory=True)
            self._rows = torch.empty((_RING_ROWS, 3), dtype=torch.int64, device=self.device)
        self.has_batches = cuda_driver.driver().has_batch
        self._head = 0
        self._known: deque[tuple[Copies, list[torch.Tensor]]] = deque(maxlen=_MAX_TABLES)
        self._used: deque[tuple[int, int, CudaTicket]] = deque()  # rows that the GPU still reads, oldest first
        self._lock = threading.Lock()

    def copy(self, target: int, copies: Copies, after: Any, shift: tuple[int, int] = (0, 0), origin: int | None = None) -> CudaTicket:
        """Enqueue all of ``copies``, moved by ``shift``, from the cache, or from the memory at ``origin``, to the address space at
        ``target``. Who has to wait for ``after`` is beside computing. Raises TransferError."""
        check_alignment(np.array([[*shift, 0]], np.int64))
        source, target = (self._source if origin is None else origin) + shift[0], target + shift[1]
        with self._lock, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            # The tables first: their way to the GPU is over when ``after`` is.
            is_by_engine = after is not None and self.has_batches
            tables = [] if is_by_engine else self._tables_of(copies)
            if after is not None:
                self._stream.wait_event(after)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            if is_by_engine:
                self._copy_by_engine(source, target, copies)
            for table in tables:
                self._kernel.launch(source, target, table, len(table), PROGRAMS_ALONE if after is None else PROGRAMS_BESIDE)
            end.record()
        return CudaTicket(begin, end)

    def _copy_by_engine(self, source: int, target: int, copies: Copies) -> None:
        srcs, dsts, sizes = (np.ascontiguousarray(column) for column in (copies + np.array([source, target, 0])).astype(np.uint64).T)
        cuda_driver.driver().copy_batch_async(dsts, srcs, sizes, self._stream.cuda_stream, self.device.index or 0)

    def _tables_of(self, copies: Copies) -> list[torch.Tensor]:
        """The kernel's lists on the GPU. Kept for a while: the layers of a prompt differ in their shift only. Memory of this stream is
        reused in this stream's order, so a list that is forgotten while a launch still reads it stays whole."""
        for known, tables in self._known:
            if known is copies:
                return tables
        check_alignment(copies)
        pieces = self._kernel.pieces(copies)
        tables = []
        for first in range(0, len(pieces), _RING_ROWS // 2):
            start, rows = self._upload(pieces[first : first + _RING_ROWS // 2])
            tables.append(self._rows[start : start + rows].clone())
            read = torch.cuda.Event()
            read.record()
            self._used.append((start, start + rows, CudaTicket(read, read)))
        self._known.append((copies, tables))
        return tables

    def _upload(self, pieces: Any) -> tuple[int, int]:
        """(first row, rows) of the ring that will hold ``pieces``; at most half of it. Waits until nobody reads those rows any more."""
        rows = len(pieces)
        start = self._head if self._head + rows <= _RING_ROWS else 0
        end = start + rows + rows % 2  # an even start keeps the table aligned to 16 bytes
        while self._used and ((self._used[0][0] < end and start < self._used[0][1]) or self._used[0][2].done()):
            if not self._used[0][2].wait(_STALL_S):
                raise TransferError(f"the GPU did not finish an earlier copy within {_STALL_S:g} s")
            self._used.popleft()
        if any(first < end and start < last for first, last, _ in self._used):  # not in order: only after the ring has wrapped
            self._stream.synchronize()
            self._used.clear()
        self._head = end
        self._host[start : start + rows].copy_(torch.from_numpy(pieces))
        self._rows[start : start + rows].copy_(self._host[start : start + rows], non_blocking=True)
        return start, rows

    def contiguous_copy_s(self, target: int, nbytes: int) -> float:
        times = []
        with self._lock, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            for _ in range(_NUM_BURSTS + 2):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                cuda_driver.driver().copy_async(target, self._source, nbytes, self._stream.cuda_stream, self.device.index or 0)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[len(times) // 2]

    def drain(self) -> None:
        """Returns when no copy is under way."""
        self._stream.synchronize()


class CudaIpcLink:
    is_device_ordered = True

    def __init__(self, stream: StreamLink, copier: Copier, target: int, path: str, expected: float) -> None:
        self._stream, self._copier, self._path, self._expected = stream, copier, path, expected
        self._target: int | None = target  # None = closed
        self._lock = threading.Lock()

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        if not len(copies):
            return DONE
        with self._lock:
            if self._target is None:
                raise TransferError("the link is closed")
            first, last = int(copies[:, 1].min()) + shift[1], int((copies[:, 1] + copies[:, 2]).max()) + shift[1]
            if first < 0 or last > self._stream.peer_bytes:
                raise TransferError(f"a write outside the peer's cache of {self._stream.peer_bytes} bytes")
            return self._copier.copy(self._target, copies, after, shift, None if source is None else source.data_ptr())

    def examine(self, timeout_s: float) -> LinkReport:
        """Bursts into the scratch behind D's cache; they compile and load the kernel, too."""
        nbytes = min(_SCRATCH_BYTES, self._copier.source_bytes)
        burst = np.array([[0, self._stream.peer_bytes, nbytes - nbytes % 16]], np.int64)
        seconds = []
        for _ in range(_NUM_BURSTS):
            with self._lock:
                if self._target is None:
                    raise TransferError("the link is closed")
                ticket = self._copier.copy(self._target, burst, None)
            if not ticket.wait(timeout_s):
                raise TransferError(f"a copy of {nbytes >> 20} MiB to the decode rank's GPU was not over after {timeout_s:g} s")
            seconds.append(ticket.wire_s)
        expected = self._expected * min(1.0, nbytes / _SCRATCH_BYTES)  # short bursts never reach the wire's speed
        return LinkReport(self._path, nbytes / min(seconds), self._stream.round_trip_s(timeout_s), expected)

    def contiguous_copy_s(self, nbytes: int) -> float:
        """What the copy engine takes for ``nbytes`` in one piece, over what the cache on D holds: the bar for scattered copies. Measuring
        tools only."""
        with self._lock:
            if self._target is None:
                raise TransferError("the link is closed")
            return self._copier.contiguous_copy_s(self._target, nbytes)

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        with self._lock:  # to the peer, the end of the stream means that nobody writes
            target, self._target = self._target, None
            if target is not None:
                self._copier.drain()
                cuda_driver.driver().close(target, self._copier.device.index or 0)
        self._stream.close()


class CudaIpcBackend(ServedByStream):
    name = "cuda_ipc"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise TransferError("transfer backend cuda_ipc needs a GPU; use tcp or shm")
        cuda_driver.driver()
        self._memory: torch.Tensor | None = None
        self._copier: Copier | None = None
        self._lock = threading.Lock()

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            raise TransferError(f"backend cuda_ipc keeps the KV cache on a GPU, not on {device}")
        self._memory = cuda_driver.alloc_tensor(nbytes + _SCRATCH_BYTES, device)[:nbytes]
        return self._memory

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        if self._memory is None or cache.data_ptr() != self._memory.data_ptr():
            raise TransferError("backend cuda_ipc can serve only the memory it allocated")
        listener, name = listen_on_host()
        self._server = StreamServer(listener, events, cache_bytes=cache.numel())
        device = cache.device.index or 0
        handle = cuda_driver.driver().export(cache.data_ptr(), device)
        return {"name": name, "secret": self._server.secret, "handle": handle.hex(), "device": gpu_uuid(device), "pid": os.getpid()}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            name, secret = str(endpoint["name"]), str(endpoint["secret"])
            handle, peer_device, peer_pid = bytes.fromhex(endpoint["handle"]), str(endpoint["device"]), int(endpoint["pid"])
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"the decode rank's cuda_ipc endpoint is malformed: {error!r}") from error
        if peer_pid == os.getpid():
            raise TransferError("cuda_ipc joins two processes; P and D are threads of one here")
        device = cache.device.index or 0
        path, expected = describe_path(device, peer_device)
        with self._lock:
            if self._copier is None:
                self._copier = Copier(cache)
        stream = StreamLink(dial(socket.AF_UNIX, f"\0{name}", timeout_s), secret, session, events, timeout_s, is_kept=True)
        try:
            target = cuda_driver.driver().open(handle, device)
        except TransferError:
            stream.close()
            raise
        stream.start()
        return CudaIpcLink(stream, self._copier, target, path, expected)

    def close(self) -> None:
        super().close()
        self._memory = self._copier = None


def gpu_uuid(device: int) -> str:
    """Names GPU ``device`` of this process to every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def describe_path(device: int, peer_uuid: str) -> tuple[str, float]:
    """How two GPUs reach each other, and bytes/s to be expected. Raises TransferError when they cannot. A peer GPU that this process does
    not see is left to the driver."""
    major = torch.cuda.get_device_capability(device)[0]
    nvlink = _NVLINK_BYTES_PER_S.get(major, _NVLINK_OTHER)
    if gpu_uuid(device) == peer_uuid:
        return "one GPU's own memory", _SAME_GPU_BYTES_PER_S
    for other in range(torch.cuda.device_count()):
        if gpu_uuid(other) == peer_uuid:
            if not torch.cuda.can_device_access_peer(device, other):
                raise TransferError(
                    f"GPU {device} has no peer access to GPU {other} ({peer_uuid}): use communication_type shm, tcp or auto"
                )
            if cuda_driver.driver().has_peer_atomics(device, other):  # NVLink has them, PCIe has not
                return f"NVLink from GPU {device} to GPU {other}", nvlink
            return f"PCIe peer access from GPU {device} to GPU {other}", _PCIE_BYTES_PER_S
    return "CUDA peer access to a GPU that this process does not see", _PCIE_BYTES_PER_S
