"""The ranks that share one model's layers. Knows tensors and ranks, nothing of models; never touches torch's default process group,
so that two engines, each with its own group, live in one process.

Every wait is bounded by the ``timeout_s`` given at connection."""

from __future__ import annotations

import datetime
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksana_lab.errors import KsanaLabError
from ksana_lab.layers.all_reduce import AllReduceBySize, connect

log = logging.getLogger(__name__)

_ABORT_TIMEOUT_S = 5.0
_LOOK_S = 0.02  # between two looks for ranks that are not there yet


class TPGroup:
    """One rank's view of a tensor-parallel group. ``single()`` is a group of one, for which every operation is free."""

    def __init__(self, rank: int, size: int, process_group: Any = None) -> None:
        assert 0 <= rank < size and (size == 1) == (process_group is None), (rank, size)
        self.rank = rank
        self.size = size
        self.process_group = process_group  # a ProcessGroupGloo or ProcessGroupNCCL; None when size is 1
        is_nccl = process_group is not None and process_group.name() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
        self.by_size: AllReduceBySize | None = None
        self._aborting: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"TPGroup(rank={self.rank}, size={self.size})"

    @classmethod
    def single(cls) -> TPGroup:
        return cls(0, 1)

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        init_method: str,
        *,
        backend: str = "gloo",
        timeout_s: float = 120.0,
        host: str = "127.0.0.1",
        while_waiting: Callable[[], None] = lambda: None,
    ) -> TPGroup:
        """Meet the other ranks; blocks at most ``timeout_s``, which also bounds every later operation.

        ``init_method``: ``file:///path`` (a path in a private directory, that no earlier group used; needs no port) or
        ``tcp://host:port`` (rank 0 listens there, on that address alone). ``backend``: ``gloo`` for CPU tensors, ``nccl`` for CUDA
        (call ``torch.cuda.set_device`` before). ``host``: the address gloo's own connections use. ``while_waiting``: called again and again
        until all are there; what it raises ends the wait. Raises KsanaLabError."""
        if size == 1:
            return cls.single()
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store = _open_store(init_method, rank, size, timeout)
            _await_ranks(store, rank, size, timeout_s, while_waiting)
            group = _make_process_group(store, rank, size, backend, timeout, host)
        except (RuntimeError, OSError) as error:
            raise KsanaLabError(
                f"tensor-parallel rank {rank} of {size} did not meet the others at {init_method} within {timeout_s:g} s: {error}"
            ) from error
        return cls(rank, size, group)

    def choose_all_reduce_by_size(self, max_bytes: int, dtype: torch.dtype, hidden_size: int = 0) -> None:
        """Have messages of ``dtype`` take the algorithm that is fastest at their size, as measured now; all ranks together. ``max_bytes``:
        the largest. ``hidden_size``: the width of rows for ``all_reduce_norm``. Where there is nothing to choose from (CPUs, no NVLink, …)
        all stays as it is, and the log says why."""
        if self.size > 1:
            self.by_size = connect(self, max_bytes, dtype, hidden_size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; returns ``x``. Bitwise the same on every rank."""
        if self.size > 1 and (self.by_size is None or not self.by_size.reduce(x)):
            self.all_reduce_nccl(x)
        return x

    def all_reduce_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        """Sum ``x`` [T, hidden] over ranks, add it to ``residual`` in place, and return the RMS norm of that, in one kernel and to the bit
        as one after the other. None, on all ranks alike: it was not done, neither of them has changed."""
        return None if self.by_size is None else self.by_size.reduce_norm(x, residual, weight, eps)

    def all_reduce_nccl(self, x: Tensor) -> None:
        """The same by the process group (on CPUs: gloo), whatever the size."""
        self.process_group.allreduce([x]).wait()

    def check(self) -> None:
        """Raises KsanaLabError when a rank did not come to an all-reduce in time: what was computed since is worthless. Never blocks."""
        if self.by_size is not None:
            self.by_size.check()

    def gather(self, x: Tensor) -> Tensor:
        """[…] -> [size, …], in rank order."""
        if self.size == 1:
            return x[None]
        gathered = x.new_empty(self.size * x.numel())
        self.process_group._allgather_base(gathered, x.contiguous().view(-1)).wait()
        return gathered.view(self.size, *x.shape)

    def exchange(self, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order, on every rank. For start-up: blocks."""
        length = torch.tensor([len(message)], device=self.device)
        lengths = self.gather(length).flatten().tolist()
        row = torch.zeros(max(1, max(lengths)), dtype=torch.uint8)
        row[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else row[:0]
        rows = self.gather(row.to(self.device)).cpu()
        return [bytes(rows[rank, :length].tolist()) for rank, length in enumerate(lengths)]

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate along the last dimension in rank order: [..., d] -> [..., size * d]."""
        if self.size == 1:
            return x
        by_row = self.gather(x.reshape(-1, x.shape[-1])).transpose(0, 1)
        return by_row.reshape(*x.shape[:-1], -1)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        if self.size > 1:
            self.process_group.barrier().wait()

    def abort(self) -> None:
        """Leave, from any thread; does not wait. Operations under way, here and on other ranks, fail at once instead of waiting for their
        time-out."""
        if self.by_size is not None:
            self.by_size.memory.abort()
        group, self.process_group = self.process_group, None
        if group is not None and group.name() == "nccl":
            # NCCL first lets its kernels go and then waits until no captured graph holds the communicator any more.
            self._aborting = threading.Thread(target=group.abort, name="nccl-abort", daemon=True)
            self._aborting.start()

    def close(self) -> None:
        """``abort``, and let go of the other ranks' memory. Graphs that captured this group's operations are gone before. Own memory goes
        with this object, after the other ranks have ended."""
        self.abort()
        if self._aborting is not None:
            self._aborting.join(_ABORT_TIMEOUT_S)
            if self._aborting.is_alive():
                log.warning("rank %d: NCCL did not let go of its communicator within %g s", self.rank, _ABORT_TIMEOUT_S)
        if self.by_size is not None:
            self.by_size.memory.close()


def _open_store(init_method: str, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    scheme, _, rest = init_method.partition("://")
    if scheme == "file":
        store: Any = dist.FileStore(rest, size)
        store.set_timeout(timeout)
        return store
    if scheme != "tcp":
        raise ValueError(f"init_method {init_method!r} is neither file:// nor tcp://")
    host, _, port = rest.rpartition(":")
    if rank:
        return dist.TCPStore(host, int(port), size, False, timeout)
    # TCPStore by itself would listen on every interface; give it a socket bound to this address only.
    listener = socket.create_server((host, int(port)))
    return dist.TCPStore(host, int(port), size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def _await_ranks(store: Any, rank: int, size: int, timeout_s: float, while_waiting: Callable[[], None]) -> None:
    """Before the group is made, whose making cannot be interrupted."""
    store.set(f"here/{rank}", b"1")
    deadline = time.monotonic() + timeout_s
    while not store.check([f"here/{other}" for other in range(size)]):
        while_waiting()
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {size} ranks not all are there")
        time.sleep(_LOOK_S)


def _make_process_group(store: Any, rank: int, size: int, backend: str, timeout: datetime.timedelta, host: str) -> Any:
    if backend == "gloo":
        options = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009 (torch's stubs lack it)
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return dist.ProcessGroupGloo(store, rank, size, options)
    if backend == "nccl":
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, size, nccl_options)
        group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
        return group
    raise ValueError(f"tensor-parallel backend {backend!r} is neither gloo nor nccl")
