"""KV between the GPUs of one host: D's cache is exported with CUDA IPC, P's GPU writes into it over NVLink (or PCIe peer access) with one
kernel per batch of copies; notices go over a local stream.

The cache is plain device memory, because the framework's allocator under ``backend:cudaMallocAsync`` cannot export its own. P and D may
also share one GPU. As with shm, P reaches D's memory by itself, so D cannot fence: it waits until P says that it has stopped, or until P's
end of the stream is closed, which P does only when its copies are over, or by dying."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from typing import Any

import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer import cuda_driver
from ksana_lab.transfer.backends.stream import DONE, StreamLink, StreamServer, dial
from ksana_lab.transfer.base import Link, LinkEvents, ServerEvents, Ticket
from ksana_lab.transfer.plan import Copies

# SM programs a copy may occupy. 16 reach 75% of the wire, 64 reach 90%, 132 reach 93% (docs/LOG.md, 2026-11-22); the copies' cost to a
# prefill beside them did not depend on the number.
NUM_PROGRAMS = 64
_ALIGNMENT = 16  # bytes; the kernel moves 16 at a time
_TABLE_ROWS = 1 << 17
_NUM_TABLES = 4


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
    def wire_ms(self) -> float:
        return self._begin.elapsed_time(self._end)


class _Table:
    """Room for one launch's list of pieces: pinned on the host, its copy on the GPU, and the end of the last launch that read it."""

    def __init__(self, device: torch.device) -> None:
        self.host = torch.empty((_TABLE_ROWS, 3), dtype=torch.int64, pin_memory=True)
        self.device = torch.empty((_TABLE_ROWS, 3), dtype=torch.int64, device=device)
        self.ticket: CudaTicket | None = None


class Copier:
    """The transfer stream of one P rank, shared by its links; calls are serialised."""

    def __init__(self, cache: torch.Tensor) -> None:
        from ksana_lab.transfer import gather_copy

        self._kernel = gather_copy
        self.device, self._source = cache.device, cache.data_ptr()
        with torch.cuda.device(self.device):
            # Before ordinary streams: when a layer is ready its copy should start, not queue behind the next layers' kernels.
            self._stream = torch.cuda.Stream(priority=-1)
            self._tables = [_Table(self.device) for _ in range(_NUM_TABLES)]
        self._next = 0
        self._lock = threading.Lock()

    def copy(self, target: int, copies: Copies, after: Any, timeout_s: float) -> CudaTicket:
        """Enqueue all of ``copies`` from the cache to the address space at ``target``. Raises TransferError."""
        if len(copies) and (copies % _ALIGNMENT).any():
            raise TransferError(
                f"a copy that is not aligned to {_ALIGNMENT} bytes: head_dim times the KV dtype's size must be a multiple of it"
            )
        pieces = self._kernel.pieces(copies)
        with self._lock, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
            for start in range(0, len(pieces), _TABLE_ROWS):
                self._launch(target, pieces[start : start + _TABLE_ROWS], begin, timeout_s)
            end = torch.cuda.Event(enable_timing=True)
            end.record()
        return CudaTicket(begin, end)

    def _launch(self, target: int, pieces: Any, begin: torch.cuda.Event, timeout_s: float) -> None:
        table = self._tables[self._next % _NUM_TABLES]
        self._next += 1
        if table.ticket is not None and not table.ticket.wait(timeout_s):
            raise TransferError(f"the GPU did not finish an earlier copy within {timeout_s:g} s")
        rows = len(pieces)
        table.host[:rows].copy_(torch.from_numpy(pieces))
        table.device[:rows].copy_(table.host[:rows], non_blocking=True)
        self._kernel.launch(self._source, target, table.device, rows, NUM_PROGRAMS)
        end = torch.cuda.Event()
        end.record()
        table.ticket = CudaTicket(begin, end)

    def drain(self) -> None:
        """Returns when no copy is under way."""
        self._stream.synchronize()


class CudaIpcLink:
    def __init__(self, stream: StreamLink, copier: Copier, target: int, timeout_s: float) -> None:
        self._stream, self._copier, self._timeout_s = stream, copier, timeout_s
        self._target: int | None = target  # None = closed
        self._lock = threading.Lock()

    def write(self, copies: Copies, window: int, after: Any = None) -> Ticket:
        if not len(copies):
            return DONE
        with self._lock:
            if self._target is None:
                raise TransferError("the link is closed")
            if int(copies[:, 1].min()) < 0 or int((copies[:, 1] + copies[:, 2]).max()) > self._stream.peer_bytes:
                raise TransferError(f"a write outside the peer's cache of {self._stream.peer_bytes} bytes")
            return self._copier.copy(self._target, copies, after, self._timeout_s)

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        with self._lock:  # to the peer, the end of the stream means that nobody writes
            target, self._target = self._target, None
            if target is not None:
                self._copier.drain()
                cuda_driver.driver().close(target, self._copier.device.index or 0)
        self._stream.close()


class CudaIpcBackend:
    name = "cuda_ipc"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise TransferError("transfer backend cuda_ipc needs a GPU; use tcp or shm")
        cuda_driver.driver()
        self._server: StreamServer | None = None
        self._memory: torch.Tensor | None = None
        self._copier: Copier | None = None
        self._lock = threading.Lock()

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            raise TransferError(f"backend cuda_ipc keeps the KV cache on a GPU, not on {device}")
        self._memory = cuda_driver.alloc_tensor(nbytes, device)
        return self._memory

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        if self._memory is None or cache.data_ptr() != self._memory.data_ptr():
            raise TransferError("backend cuda_ipc can serve only the memory it allocated")
        name = f"ksana_lab-kv-{os.getpid()}-{secrets.token_hex(8)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{name}")  # abstract: no file, gone with the process
        listener.listen(128)
        self._server = StreamServer(listener, events, cache_bytes=cache.numel())
        device = cache.device.index or 0
        handle = cuda_driver.driver().export(cache.data_ptr(), device)
        return {"name": name, "secret": self._server.secret, "handle": handle.hex(), "device": _uuid(device), "pid": os.getpid()}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            name, secret = str(endpoint["name"]), str(endpoint["secret"])
            handle, peer_device, peer_pid = bytes.fromhex(endpoint["handle"]), str(endpoint["device"]), int(endpoint["pid"])
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"the decode rank's cuda_ipc endpoint is malformed: {error!r}") from error
        if peer_pid == os.getpid():
            raise TransferError("cuda_ipc joins two processes; P and D are threads of one here")
        device = cache.device.index or 0
        _require_peer_access(device, peer_device)
        with self._lock:
            if self._copier is None:
                self._copier = Copier(cache)
        stream = StreamLink(dial(socket.AF_UNIX, f"\0{name}", timeout_s), secret, session, events, timeout_s)
        try:
            target = cuda_driver.driver().open(handle, device)
        except TransferError:
            stream.close()
            raise
        stream.start()
        return CudaIpcLink(stream, self._copier, target, timeout_s)

    def open_window(self, window: int) -> None:
        assert self._server is not None
        self._server.open_window(window)

    def close_window(self, window: int) -> bool:
        return self._server is None or self._server.close_window(window)

    def num_writers(self, session: int) -> int:
        return 0 if self._server is None else self._server.num_writers(session)

    def forget(self, session: int) -> None:
        if self._server is not None:
            self._server.forget(session)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _require_peer_access(device: int, peer_uuid: str) -> None:
    """Raises TransferError when the two GPUs cannot reach each other. A peer GPU that this process does not see is left to the driver."""
    for other in range(torch.cuda.device_count()):
        if other != device and _uuid(other) == peer_uuid and not torch.cuda.can_device_access_peer(device, other):
            raise TransferError(f"GPU {device} has no peer access to GPU {other} ({peer_uuid}): use communication_type shm or tcp")
