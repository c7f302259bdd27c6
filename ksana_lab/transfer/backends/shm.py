"""KV over shared memory: D's cache is an anonymous memory file, P maps it and copies into it; notices go over a local stream.

The file (memfd) has no name: P gets it as a descriptor over the stream, and the kernel frees it with the last process that maps it, so
nothing can be left behind. It counts against the memory limit of the process, not against the size of /dev/shm. Linux only.

P writes into D's memory by itself, so D cannot fence: it waits until P says that it has stopped, or until P's end of the stream is closed,
which P does only when no copy is under way, or by dying."""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
import time
from typing import Any

import numpy as np
import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends.stream import DONE, ServedByStream, StreamLink, StreamServer, dial, listen_on_host
from ksana_lab.transfer.backends.tcp import host_view
from ksana_lab.transfer.base import Link, LinkEvents, LinkReport, ServerEvents, Ticket
from ksana_lab.transfer.plan import Copies, shifted

log = logging.getLogger(__name__)


def is_supported() -> bool:
    return hasattr(os, "memfd_create") and hasattr(socket, "send_fds")


def make_file(name: str, nbytes: int) -> int:
    """Descriptor of zeroed memory that has a size, and no name in any file system. Raises TransferError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, nbytes)  # now, instead of a bus error at the first touch
    except OSError as error:
        os.close(fd)
        raise TransferError(f"cannot get {nbytes / 2**20:.0f} MiB of shared memory for KV: {error}") from error
    return fd


def map_file(fd: int, nbytes: int) -> mmap.mmap:
    """Memory that processes share. Raises TransferError, also for a file of another size."""
    try:
        if (found := os.fstat(fd).st_size) != nbytes:
            raise TransferError(f"the memory has {found} bytes instead of {nbytes}: is the peer on a GPU as this node, and of its version?")
        # Page tables are filled now, not by the first request.
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    except (OSError, ValueError) as error:
        raise TransferError(f"cannot map the decode rank's memory: {error}") from error


_SCRATCH_BYTES = 4 << 20  # behind the cache in the same file: where a new link is measured


class ShmLink:
    is_device_ordered = False

    def __init__(self, stream: StreamLink, source: np.ndarray, target: np.ndarray) -> None:
        self._stream = stream
        self._source: np.ndarray | None = source  # None = closed
        self._target: np.ndarray | None = target
        self._lock = threading.Lock()  # held while a write copies

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        copies = shifted(copies, shift)
        with self._lock:
            origin, target = self._source, self._target
            if origin is None or target is None:
                raise TransferError("the link is closed")
            if source is not None:
                origin = source.numpy()
            if len(copies) and (int(copies[:, 1].min()) < 0 or int((copies[:, 1] + copies[:, 2]).max()) > self._stream.peer_bytes):
                raise TransferError(f"a write outside the peer's cache of {self._stream.peer_bytes} bytes")
            for a, b, n in copies.tolist():
                target[b : b + n] = origin[a : a + n]
        return DONE

    def examine(self, timeout_s: float) -> LinkReport:
        """A copy into the scratch behind D's cache, held against the same copy within this process."""
        whole, target = self._source, self._target
        if whole is None or target is None:
            raise TransferError("the link is closed")
        nbytes = min(len(target) - self._stream.peer_bytes, len(whole))
        source, own = whole[:nbytes], np.empty(nbytes, np.uint8)
        seconds = _copy_s(target[self._stream.peer_bytes : self._stream.peer_bytes + nbytes], source)
        return LinkReport("shared memory", nbytes / seconds, self._stream.round_trip_s(timeout_s), nbytes / _copy_s(own, source))

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        with self._lock:  # a copy under way ends first: to the peer, the end of the stream means that nobody writes
            self._source = self._target = None
        self._stream.close()


def _copy_s(target: np.ndarray, source: np.ndarray) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - begin)
    return max(1e-9, min(times))


class ShmBackend(ServedByStream):
    name = "shm"

    def __init__(self) -> None:
        if not is_supported():
            raise TransferError("backend shm needs Linux (memfd_create); use tcp")
        self._fd = -1
        self._memory: torch.Tensor | None = None

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            raise TransferError(f"backend shm keeps the KV cache in host memory, not on {device}")
        self._fd = make_file("ksana_lab-kv", nbytes + _SCRATCH_BYTES)
        self._memory = torch.frombuffer(map_file(self._fd, nbytes + _SCRATCH_BYTES), dtype=torch.uint8)[:nbytes]
        return self._memory

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        if self._memory is None or cache.data_ptr() != self._memory.data_ptr():
            raise TransferError("backend shm can serve only the memory it allocated")
        listener, name = listen_on_host()
        self._server = StreamServer(listener, events, cache_bytes=cache.numel(), fds=(self._fd,))
        return {"name": name, "secret": self._server.secret}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            name, secret = str(endpoint["name"]), str(endpoint["secret"])
        except (KeyError, TypeError) as error:
            raise TransferError(f"the decode rank's shm endpoint is malformed: {error!r}") from error
        source = np.frombuffer(host_view(cache, self.name), np.uint8)
        sock = dial(socket.AF_UNIX, f"\0{name}", timeout_s)
        stream = StreamLink(sock, secret, session, events, timeout_s, max_fds=1, is_kept=True)
        try:
            if len(stream.fds) != 1:
                raise TransferError("the decode rank sent no memory")
            memory = map_file(stream.fds[0], stream.peer_bytes + _SCRATCH_BYTES)
        except TransferError:
            stream.close()
            raise
        stream.start()
        return ShmLink(stream, source, np.frombuffer(memory, np.uint8))

    def close(self) -> None:
        super().close()
        self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
