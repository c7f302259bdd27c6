"""KV over NVIDIA NIXL (https://github.com/ai-dynamo/nixl) and UCX beneath it: one-sided writes by whatever UCX finds between the two
caches, RDMA, CUDA IPC, shared memory or TCP. An optional extra: ``pip install 'ksana_lab[nixl]'``.

Bytes go by NIXL, notices over a stream of our own, as for shm and cuda_ipc. A NIXL write is done when UCX has flushed the connection, that
is, when the bytes lie in D's memory; a notice sent after that is behind them. NIXL's own notifications were not taken for it: one that is
ordered belongs to a single transfer and cannot wait for an emulated link, one that stands alone has no order at all, either must be polled
for, and none says that a peer has died or stopped. The end of the stream does.

P reaches D's memory by itself, so D cannot fence: it waits until P says that it has stopped, or until P's end of the stream is closed. P
closes it only when no write is under way, or by dying; what a dying P left in UCX's own buffers is in place shortly after (``_LINGER_S``).

What a peer's endpoint carries is parsed by NIXL, nothing of it is unpickled. UCX does not know who speaks to it: on a loopback address it
is confined to the loopback device, elsewhere the network must be one that is trusted."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksana_lab import cuda_driver
from ksana_lab.config.environment import INSTALL_NIXL
from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends.cuda_ipc import describe_path, gpu_uuid
from ksana_lab.transfer.backends.stream import DONE, ServedByStream, StreamLink, StreamServer, dial, listen
from ksana_lab.transfer.base import Link, LinkEvents, LinkReport, ServerEvents, Ticket
from ksana_lab.transfer.plan import Copies
from ksana_lab.transfer.registry import host_id
from ksana_lab.types import family_of, is_loopback

log = logging.getLogger(__name__)

_SCRATCH_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}  # behind the cache in the same memory: where a new link is measured
# A new link is measured by the host's clock, so a burst is several writes at once: one alone is over before its end can be seen. The best
# of some bursts counts (a link that has slept is slow at first), but a slow link is not kept busy for longer than the bound.
_NUM_BURSTS, _WRITES_AT_ONCE, _BURSTS_S = 8, 8, 0.5
_MAX_METADATA_BYTES = 1 << 20
_STALL_S = 30.0  # a write that NIXL has not finished by then fails its link
_CLOSE_S = 5.0
_LINGER_S = 1.0
_MAX_PAUSE_S = 100e-6  # between two looks at writes that are under way
# NIXL's progress thread sleeps on UCX's events and wakes by itself this often. Its Python API leaves the sleep at 0, which is one core that
# spins in every process, for ever (docs/LOG.md).
_PROGRESS_US = 5000
_ONE_HOST_BYTES_PER_S = 1e9  # what any host of today gives within its memory, by UCX's slowest way


@contextlib.contextmanager
def _nixl(what: str) -> Iterator[None]:
    """NIXL's exceptions have no common base below Exception; nothing but calls of it belongs inside."""
    try:
        yield
    except Exception as error:
        raise TransferError(f"NIXL cannot {what}: {error}") from error


def load() -> Any:
    """NIXL's module. Raises TransferError with the command that installs it."""
    if not any(_entries("/sys/class/infiniband")):
        # Without a device UCX's InfiniBand module does nothing, and the libraries it brings crash the process at its end.
        os.environ.setdefault("UCX_MODULES", "^ib")
    try:
        module = importlib.import_module("nixl")
    except ImportError as error:
        raise TransferError(f"transfer backend nixl is not installed ({error}): {INSTALL_NIXL}") from error
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it prints to standard output
    return module


def _entries(directory: str) -> Iterator[Path]:
    return Path(directory).iterdir() if Path(directory).is_dir() else iter(())


def make_agent(name: str, host: str) -> Any:
    """A ``nixl_agent`` with UCX, for calls from any thread."""
    nixl = load()
    with _nixl("start an agent"):
        agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
        options = nixl._bindings.nixlAgentConfig()
        options.useProgThread, options.pthrDelay = True, _PROGRESS_US
        options.syncMode = nixl._bindings.NIXL_THREAD_SYNC_STRICT
        agent.agent = nixl._bindings.nixlAgent(name, options)  # the wrapper has no argument for the delay
        agent.create_backend("UCX", {"engine_config": "NET_DEVICES=lo"} if is_loopback(host) else {})
    return agent


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """CUDA calls of UCX on this thread find their device's context. (``torch.cuda.device`` makes none current on a thread that has not
    used CUDA yet, when the device is the first.)"""
    return cuda_driver.driver().on(device.index or 0) if device.type == "cuda" else contextlib.nullcontext()


class NixlTicket:
    """One write under way. Lives until NIXL is done with it, which may be after it was given up (``error``)."""

    def __init__(self, handle: Any, link: NixlLink) -> None:
        self.handle, self.link = handle, link
        self.give_up_at = time.monotonic() + _STALL_S
        self._error: str | None = None
        self._settled = threading.Event()

    def done(self) -> bool:
        if self._settled.is_set() and self._error is not None:
            raise TransferError(self._error)
        return self._settled.is_set()

    def wait(self, timeout_s: float) -> bool:
        self._settled.wait(timeout_s)
        return self.done()

    def settle(self, error: str | None = None) -> None:
        if not self._settled.is_set():
            self._error = error
            self._settled.set()


class Mover:
    """The agent of one rank and the writes it has under way. ``memory`` is all that this rank's side of a write can touch."""

    def __init__(self, agent: Any, memory: torch.Tensor) -> None:
        self.agent = agent
        self.device = memory.device
        self.kind = "VRAM" if memory.is_cuda else "DRAM"
        self.device_id = (memory.device.index or 0) if memory.is_cuda else 0
        self._memory: torch.Tensor | None = memory
        self.address, self.num_bytes = memory.data_ptr(), memory.numel()
        self._calls = threading.Lock()
        with self._nixl(f"register {self.num_bytes >> 20} MiB of {self.kind}"):
            self._registered = agent.register_memory([(self.address, self.num_bytes, self.device_id, "")], self.kind)
        self._lock = threading.Lock()
        self._remotes: dict[bytes, tuple[Any, int]] = {}  # by metadata: NIXL's name, links that use it
        self._changed = threading.Condition()
        self._tickets: list[NixlTicket] = []
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def _nixl(self, what: str) -> Iterator[None]:
        """One call at a time. NIXL would see to that itself, but some of its calls wait for their turn with the interpreter's lock held."""
        with self._calls, _nixl(what), _on(self.device):
            yield

    # ---- peers -------------------------------------------------------------------------------------------------------

    def metadata(self) -> bytes:
        """How a peer's NIXL reaches this agent and its memory."""
        with self._nixl("describe the cache to peers"):
            return bytes(self.agent.get_agent_metadata())

    def add_remote(self, metadata: bytes) -> Any:
        """NIXL's name for the agent that ``metadata`` describes. Raises TransferError."""
        with self._lock:
            name, users = self._remotes.get(metadata, (None, 0))
            if not users:
                with self._nixl("load the decode rank's metadata"):
                    name = self.agent.add_remote_agent(metadata)
                    self.agent.make_connection(name)
            self._remotes[metadata] = (name, users + 1)
            return name

    def drop_remote(self, metadata: bytes) -> None:
        with self._lock:
            name, users = self._remotes.get(metadata, (None, 0))
            if users > 1:
                self._remotes[metadata] = (name, users - 1)
            elif users:
                del self._remotes[metadata]
                try:
                    with self._nixl("disconnect from the decode rank"):
                        self.agent.remove_remote_agent(name)
                except TransferError as error:
                    log.warning("%s", error)  # it is gone

    # ---- writes ------------------------------------------------------------------------------------------------------

    def write(self, link: NixlLink, peer: Any, here: np.ndarray, there: np.ndarray, there_kind: str) -> Ticket:
        """``here``, ``there``: uint64 [n, 3] of address, bytes, device. Raises TransferError."""
        with self._nixl("start a write"):
            local, remote = self.agent.get_xfer_descs(here, self.kind), self.agent.get_xfer_descs(there, there_kind)
            handle = self.agent.initialize_xfer("WRITE", local, remote, peer, b"", ["UCX"])
        ticket = NixlTicket(handle, link)
        with self._changed:  # before it begins: from then on somebody waits for its end
            if self._is_closed:
                raise TransferError("the backend is closed")
            link.num_writing += 1
        try:
            with self._nixl("start a write"):
                state = self.agent.transfer(handle)
        except TransferError as error:
            ticket.settle(str(error))
            self._end(ticket)
            raise
        if state == "PROC":
            self._watch(ticket)
            return ticket
        self._end(ticket)
        if state != "DONE":
            raise TransferError(f"NIXL could not start a write: {state}")
        return DONE

    def _watch(self, ticket: NixlTicket) -> None:
        with self._changed:
            self._tickets.append(ticket)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                while not self._tickets:
                    if self._is_closed:
                        return
                    self._changed.wait()
                tickets, is_closed = list(self._tickets), self._is_closed
            over = [ticket for ticket in tickets if self._is_over(ticket, is_closed)]
            if over:
                with self._changed:
                    self._tickets = [ticket for ticket in self._tickets if ticket not in over]
                for ticket in over:
                    self._end(ticket)
            else:
                time.sleep(pause_s)
            pause_s = 5e-6 if over else min(2 * pause_s + 1e-6, _MAX_PAUSE_S)

    def _is_over(self, ticket: NixlTicket, is_closed: bool) -> bool:
        """Whether NIXL is done with it. The ticket's owner does not wait for that longer than ``give_up_at``."""
        try:
            with self._nixl("finish a write"):
                state = self.agent.check_xfer_state(ticket.handle)
        except TransferError as error:
            ticket.settle(str(error))
            return True
        if state == "PROC":
            if time.monotonic() > ticket.give_up_at:
                ticket.settle(f"NIXL has not finished a write within {_STALL_S:g} s")
            return is_closed
        ticket.settle(None if state == "DONE" else f"NIXL failed in a write: {state}")
        return True

    def _end(self, ticket: NixlTicket) -> None:
        try:
            with self._nixl("let go of a write"):
                ticket.handle.release()
        except TransferError as error:
            log.warning("%s", error)
        ticket.settle("the backend was closed")
        with self._changed:
            ticket.link.num_writing -= 1
            self._changed.notify_all()
        ticket.link.on_quiet()

    def wait_quiet(self, link: NixlLink, timeout_s: float) -> bool:
        """Whether no write of ``link`` is under way any more."""
        with self._changed:
            return self._changed.wait_for(lambda: not link.num_writing, timeout_s)

    def close(self) -> None:
        """Once. The links are closed before; what NIXL still does for them ends with the agent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_S)
        try:
            with self._nixl("let go of the cache"):
                self.agent.deregister_memory(self._registered)
        except TransferError as error:
            log.warning("%s", error)
        self._registered = self.agent = self._memory = None


class NixlLink:
    is_device_ordered = False

    def __init__(self, stream: StreamLink, mover: Mover, peer: Any, endpoint: _Endpoint, source_bytes: int) -> None:
        self._stream, self._mover, self._peer, self._endpoint = stream, mover, peer, endpoint
        self._source_bytes = source_bytes
        self._lock, self._end_lock = threading.Lock(), threading.Lock()
        self._is_closing = self._is_over = False
        self.num_writing = 0  # the mover's, under its lock

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        """On a GPU ``after`` must be over: the caller waits for it."""
        assert source is None, "nixl sends out of the cache"
        if not len(copies):
            return DONE
        first, last = int(copies[:, 1].min()) + shift[1], int((copies[:, 1] + copies[:, 2]).max()) + shift[1]
        if first < 0 or last > self._stream.peer_bytes:
            raise TransferError(f"a write outside the peer's cache of {self._stream.peer_bytes} bytes")
        return self._post(copies, shift)

    def _post(self, copies: Copies, shift: tuple[int, int]) -> Ticket:
        mover, endpoint = self._mover, self._endpoint
        here, there = np.empty((2, len(copies), 3), np.uint64)
        here[:, 0] = copies[:, 0] + (mover.address + shift[0])
        there[:, 0] = copies[:, 1] + np.int64(shift[1]) + endpoint.address
        here[:, 1] = there[:, 1] = copies[:, 2]
        here[:, 2], there[:, 2] = mover.device_id, endpoint.device_id
        with self._lock:
            if self._is_closing:
                raise TransferError("the link is closed")
            try:
                return mover.write(self, self._peer, here, there, endpoint.kind)
            except TransferError:
                # Who is told of it takes the source for free and the window for safe.
                mover.wait_quiet(self, _STALL_S)
                raise

    def examine(self, timeout_s: float) -> LinkReport:
        """Bursts into the scratch behind D's cache; a write before them makes UCX connect."""
        peer_bytes = self._stream.peer_bytes
        nbytes = min(self._endpoint.num_bytes - peer_bytes, self._source_bytes)
        write = np.array([[0, peer_bytes, nbytes]], np.int64)
        seconds: list[float] = []
        self._write_often(write, 1, timeout_s)
        while len(seconds) < _NUM_BURSTS and sum(seconds) < _BURSTS_S:
            seconds.append(self._write_often(write, _WRITES_AT_ONCE, timeout_s))
        tls, (between, expected) = os.environ.get("UCX_TLS"), self._describe()
        path = f"NIXL, UCX {f'by UCX_TLS={tls}' if tls else 'by its own choice'}, {between}"
        return LinkReport(path, _WRITES_AT_ONCE * nbytes / min(seconds), self._stream.round_trip_s(timeout_s), expected)

    def _write_often(self, write: Copies, times: int, timeout_s: float) -> float:
        """Seconds for ``times`` writes at once. Raises TransferError when one is not over in time."""
        begin = time.perf_counter()
        for ticket in [self._post(write, (0, 0)) for _ in range(times)]:
            if not ticket.wait(timeout_s):
                raise TransferError(f"{times} writes of {write[0, 2] >> 20} MiB to the decode rank were not over after {timeout_s:g} s")
        return max(1e-9, time.perf_counter() - begin)

    def _describe(self) -> tuple[str, float | None]:
        """What lies between the caches, whatever UCX makes of it, and bytes/s that it should give."""
        mover, endpoint = self._mover, self._endpoint
        between = f"{mover.kind} to {endpoint.kind}"
        if endpoint.host_id != host_id():
            return f"{between} of another host", None
        if endpoint.kind == mover.kind == "VRAM":
            try:
                path, expected = describe_path(mover.device_id, endpoint.gpu)
            except TransferError:  # no peer access: UCX goes through host memory
                return between, None
            return f"{between}, {path}", expected
        return between, _ONE_HOST_BYTES_PER_S

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        """When a write does not end, the stream stays open until it has: to the peer, its end means that nobody writes."""
        with self._lock:
            self._is_closing = True
        if not self._mover.wait_quiet(self, _CLOSE_S):
            log.warning("a write to the decode rank is still under way; its connection stays until that is over")
            return
        self.on_quiet()

    def on_quiet(self) -> None:
        """A write of this link is over, or it is being closed: whoever comes last ends it."""
        with self._end_lock:
            if not self._is_closing or self.num_writing or self._is_over:
                return
            self._is_over = True
        self._stream.close()
        self._mover.drop_remote(self._endpoint.metadata)


@dataclass(frozen=True)
class _Endpoint:
    """What a decode rank says of itself. ``num_bytes``: the cache and the scratch behind it."""

    host: str
    port: int
    secret: str
    metadata: bytes
    kind: str
    address: int
    num_bytes: int
    device_id: int
    gpu: str
    host_id: str

    @classmethod
    def parse(cls, said: dict[str, Any]) -> _Endpoint:
        """Raises TransferError for what no endpoint can be."""
        try:
            if len(said["metadata"]) > 2 * _MAX_METADATA_BYTES:
                raise ValueError(f"{len(said['metadata']) // 2} bytes of metadata")
            endpoint = cls(
                host=str(said["host"]), port=int(said["port"]), secret=str(said["secret"]), metadata=bytes.fromhex(said["metadata"]),
                kind=str(said["kind"]), address=int(said["address"]), num_bytes=int(said["num_bytes"]), device_id=int(said["device_id"]),
                gpu=str(said["gpu"]), host_id=str(said["host_id"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"the decode rank's nixl endpoint is malformed: {error!r}") from error
        end = endpoint.address + endpoint.num_bytes
        if endpoint.kind not in ("DRAM", "VRAM") or not 0 < endpoint.address < end < 2**63 or not 0 <= endpoint.device_id < 2**16:
            raise TransferError(
                f"the decode rank's nixl endpoint is malformed: {endpoint.kind} at {endpoint.address:#x} of {endpoint.device_id}"
            )
        return endpoint


class NixlBackend(ServedByStream):
    name = "nixl"

    def __init__(self, host: str, agent: Any = None) -> None:
        """``host``: the address of this machine that peers reach. ``agent``: what ``make_agent`` gives, for tests."""
        if agent is None:
            load()
        self._host, self._given = host, agent
        self._memory: torch.Tensor | None = None  # the cache with the scratch behind it
        self._mover: Mover | None = None
        self._lock = threading.Lock()

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        total = nbytes + _SCRATCH_BYTES[device.type]
        if device.type == "cuda":  # UCX exports it as cuda_ipc does; the framework's own may be of a pool
            self._memory = cuda_driver.alloc_tensor(total, device)
        else:
            self._memory = torch.zeros(total, dtype=torch.uint8, device=device)
        return self._memory[:nbytes]

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        memory = self._memory
        if memory is None or cache.data_ptr() != memory.data_ptr():
            raise TransferError("backend nixl can serve only the memory it allocated")
        mover = self._mover_of(memory)
        metadata = mover.metadata()
        listener = listen(self._host)
        self._server = StreamServer(listener, events, cache_bytes=cache.numel(), linger_s=_LINGER_S)
        return {
            "host": self._host, "port": listener.getsockname()[1], "secret": self._server.secret, "metadata": metadata.hex(),
            "kind": mover.kind, "address": mover.address, "num_bytes": mover.num_bytes, "device_id": mover.device_id,
            "gpu": gpu_uuid(mover.device_id) if cache.is_cuda else "", "host_id": host_id(),
        }  # fmt: skip

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        peer = _Endpoint.parse(endpoint)
        mover = self._mover_of(cache)
        sock = dial(family_of(peer.host), (peer.host, peer.port), timeout_s)
        stream = StreamLink(sock, peer.secret, session, events, timeout_s, is_kept=True)
        try:
            if not 0 < stream.peer_bytes <= peer.num_bytes:
                raise TransferError(f"the decode rank serves {stream.peer_bytes} bytes and describes {peer.num_bytes}")
            remote = mover.add_remote(peer.metadata)
        except TransferError:
            stream.close()
            raise
        stream.start()
        return NixlLink(stream, mover, remote, peer, cache.numel())

    def _mover_of(self, memory: torch.Tensor) -> Mover:
        with self._lock:
            if self._mover is None:
                agent = self._given or make_agent(f"ksana_lab-{os.getpid()}-{secrets.token_hex(8)}", self._host)
                self._mover = Mover(agent, memory)
            return self._mover

    def close(self) -> None:
        super().close()
        with self._lock:
            mover, self._mover = self._mover, None
        if mover is not None:
            mover.close()
        self._memory = None
