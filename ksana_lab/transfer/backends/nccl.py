"""KV by send and receive: a communicator of two for each P rank and the D rank it feeds, NCCL between GPUs, gloo between CPUs.

P gathers a batch into one of two stages and sends it; D receives it into its own stage and scatters it into its cache. What comes next is
agreed by the stream beside it, whose frames are in the order of the sends:
    JOIN  P→D  payload = the communicator's name; both make their half of it now; answered by ACK
    PROBE P→D  nbytes come, to be thrown away; answered by ACK with their CRC-32 (status of ``runs`` 1) or without
    MOVE  P→D  runs × (offset, bytes); their bytes come next through the communicator
Notices and pings are the stream's own. D puts the bytes into its cache itself, so closing a window is a fence, as with tcp.

A communicator lives with its connection, and so with one session of two incarnations that agreed on the router's comm id: it is made when
the pair connects, on threads that nothing else waits for, and never mended. Whatever fails or takes too long ends the connection; both
sides then abort their half, and the next session makes a new one. The groups are made directly on a store at the decode rank; the default
group of torch.distributed is not touched."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import stream
from ksana_lab.transfer.backends.stream import DONE, REFUSED, Frame, ServedByStream, StreamLink, StreamServer, dial, run_table, staged
from ksana_lab.transfer.base import Link, LinkEvents, LinkReport, ServerEvents, Ticket
from ksana_lab.transfer.checksum import crc_text
from ksana_lab.transfer.plan import Copies, shifted
from ksana_lab.transfer.staging import Slot, packed
from ksana_lab.types import family_of

log = logging.getLogger(__name__)

JOIN, PROBE, MOVE = 16, 17, 18
STAGE_BYTES = 16 << 20  # of each of P's two stages and of D's one, per link
STALL_S = 30.0  # what a send or receive under way may take
JOIN_S = 30.0
_MAX_NAME = 64
_POLL_S = 50e-6
_PROBE_BYTES = 8 << 20
_NUM_PROBES = 2
_HINTS = (
    "; NCCL_DEBUG=INFO in both nodes' environments shows why, NCCL_P2P_DISABLE=1 goes around broken peer access, NCCL_SOCKET_IFNAME names "
    "the interface between hosts"
)
_environment_lock = threading.Lock()
# A communicator that fails is this link's affair. By default torch's watchdog ends the process for it.
_NO_TEARDOWN = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
T = TypeVar("T")


class Channel(Protocol):
    """One half of a communicator of two. ``send`` and ``receive`` return what ``wait`` takes."""

    def send(self, memory: torch.Tensor) -> Any: ...

    def receive(self, memory: torch.Tensor) -> Any: ...

    def wait(self, work: Any, is_over: Callable[[], bool]) -> None:
        """``work`` is done: the bytes are there, or read. ``is_over``: the connection has ended. Raises TransferError."""

    def abort(self) -> None:
        """From any thread, more than once."""


class GlooChannel:
    def __init__(self, store: Any, rank: int, host: str, timeout_s: float) -> None:
        options = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009 (torch's stubs lack it)
        options._timeout = datetime.timedelta(seconds=timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        self._peer = 1 - rank
        self._group: Any = dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, memory: torch.Tensor) -> Any:
        return _post(self, "send", memory)

    def receive(self, memory: torch.Tensor) -> Any:
        return _post(self, "recv", memory)

    def wait(self, work: Any, is_over: Callable[[], bool]) -> None:
        try:
            work.wait(datetime.timedelta(seconds=STALL_S))
        except RuntimeError as error:
            raise TransferError(f"gloo: {_first_line(error)}") from error

    def abort(self) -> None:
        self._group = None  # closes its connections, which ends what the other half waits for


class NcclChannel:
    def __init__(self, store: Any, rank: int, device: torch.device) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(days=1)  # time is kept here, see ``wait``
        self._peer = 1 - rank
        with torch.cuda.device(device), _environment(_NO_TEARDOWN):
            self._group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)

    def send(self, memory: torch.Tensor) -> Any:
        return _post(self, "send", memory)

    def receive(self, memory: torch.Tensor) -> Any:
        return _post(self, "recv", memory)

    def wait(self, work: Any, is_over: Callable[[], bool]) -> None:
        """Polls: a kernel of NCCL that waits for a peer which is gone ends by ``abort`` only."""
        deadline, look = time.monotonic() + STALL_S, 0
        try:
            while not work.is_completed():
                look += 1
                if look % 256 == 0:
                    if is_over():
                        raise TransferError("NCCL: the connection ended in the middle of a transfer")
                    if time.monotonic() > deadline:
                        raise TransferError(f"NCCL: a transfer took more than {STALL_S:g} s{_HINTS}")
                time.sleep(_POLL_S)
            work.wait()  # it is over: orders the current stream behind it, and raises what went wrong
        except RuntimeError as error:
            raise TransferError(f"NCCL: {_first_line(error)}{_HINTS}") from error

    def abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # In the background: aborting waits for kernels to notice.
            threading.Thread(target=_abort, args=(group,), name="kv-abort", daemon=True).start()


def _post(channel: GlooChannel | NcclChannel, what: str, memory: torch.Tensor) -> Any:
    group = channel._group
    if group is None:
        raise TransferError("the communicator was aborted")
    try:
        return getattr(group, what)([memory], channel._peer, 0)
    except RuntimeError as error:
        raise TransferError(f"{group.name()}: {_first_line(error)}{_HINTS if memory.is_cuda else ''}") from error


def _abort(group: Any) -> None:
    try:
        group.abort()
    except RuntimeError as error:
        log.warning("aborting a communicator failed: %s", _first_line(error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """For as long as a group is made, which is when it reads them; what the user has set stays."""
    with _environment_lock:
        added = [name for name in wanted if name not in os.environ]
        os.environ.update({name: wanted[name] for name in added})
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def make_channel(store_address: tuple[str, int], name: str, rank: int, device: torch.device, host: str, timeout_s: float) -> Channel:
    """Half ``rank`` (P's 0, D's 1) of the communicator ``name``. Blocks for the other half, bounded. Raises TransferError."""
    timeout, channel = datetime.timedelta(seconds=timeout_s), None
    try:
        client = dist.TCPStore(*store_address, None, False, timeout, wait_for_workers=False)
        store = dist.PrefixStore(name, client)
        channel = NcclChannel(store, rank, device) if device.type == "cuda" else GlooChannel(store, rank, host, timeout_s)
        # NCCL connects with the first byte.
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        channel.wait(channel.receive(byte) if rank else channel.send(byte), lambda: False)
        return channel
    except (RuntimeError, ValueError, TransferError) as error:  # what torch.distributed raises is the first or the second
        if channel is not None:
            channel.abort()
        hints = _HINTS if device.type == "cuda" and not isinstance(error, TransferError) else ""
        raise TransferError(f"the communicator was not made: {_first_line(error)}{hints}") from error


def bounded(make: Callable[[], Channel], timeout_s: float, is_over: Callable[[], bool]) -> Channel:
    """``make()`` on a thread of its own, which is left alone when it takes longer than ``timeout_s`` or the connection ends."""
    found: list[Channel] = []
    failed: list[BaseException] = []
    lock, ended = threading.Lock(), threading.Event()
    is_abandoned = False

    def run() -> None:
        try:
            channel = make()
        except BaseException as error:
            failed.append(error)
        else:
            with lock:
                found.append(channel)
                if is_abandoned:
                    channel.abort()
        ended.set()

    threading.Thread(target=run, name="kv-join", daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while not ended.wait(0.02):
        if is_over() or time.monotonic() > deadline:
            break
    with lock:
        is_abandoned = not found
    if found:
        return found[0]
    if failed:
        raise failed[0]
    if is_over():
        raise TransferError("the connection ended while the communicator was made")
    raise TransferError(f"the communicator was not made within {timeout_s:g} s{_HINTS}")


# ---- D ----------------------------------------------------------------------------------------------------------------


class _Joined:
    """D's half of one connection."""

    def __init__(self, channel: Channel, stage: Slot, is_over: Callable[[], bool]) -> None:
        self.channel, self.stage, self._is_over = channel, stage, is_over

    def receive(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes``, in the stage."""
        memory = self.stage.memory[:nbytes]
        with self.stage.on_stream():
            self.channel.wait(self.channel.receive(memory), self._is_over)
        return memory


class PairServer(StreamServer):
    """A stream's server whose bytes come through communicators."""

    def __init__(self, listener: socket.socket, events: ServerEvents, cache: torch.Tensor, store: tuple[str, int], host: str) -> None:
        self._memory, self._store, self._host = cache, store, host
        self._joined: dict[Any, _Joined] = {}
        super().__init__(listener, events, cache_bytes=cache.numel(), is_fence=True)

    def _part_with(self, writer: Any) -> None:
        joined = self._joined.pop(writer, None)
        if joined is not None:
            joined.channel.abort()

    def _take(self, writer: Any, frame: Frame) -> None:
        if frame.kind == JOIN:
            self._join(writer, frame)
        elif frame.kind in (PROBE, MOVE):
            joined = self._joined.get(writer)
            if joined is None or not 0 < frame.nbytes <= STAGE_BYTES:
                raise TransferError(f"unexpected frame of kind {frame.kind}, {frame.nbytes} bytes")
            writer.first_ns = writer.first_ns or time.monotonic_ns()
            self._probe(writer, frame, joined) if frame.kind == PROBE else self._move(writer, frame, joined)
        else:
            super()._take(writer, frame)

    def _join(self, writer: Any, frame: Frame) -> None:
        if writer in self._joined or not 0 < frame.nbytes <= _MAX_NAME:
            raise TransferError("the peer asked for a second communicator, or for one without a name")
        name = bytes(writer.wire.receive(frame.nbytes, idle_s=self._stall_s)).decode("ascii", "replace")
        device, is_over = self._memory.device, lambda: _has_hung_up(writer.wire.sock) or self._is_closed
        try:
            make = lambda: make_channel(self._store, name, 1, device, self._host, JOIN_S)  # noqa: E731
            channel = bounded(make, JOIN_S, is_over)
        except TransferError as error:
            log.warning("no communicator with a prefill rank: %s", error)
            self._say(writer, frame, str(error), REFUSED)
            return  # it is for P to end the connection: it would not hear the reason behind the end
        self._joined[writer] = _Joined(channel, Slot(self._memory, STAGE_BYTES, on_device=True), is_over)
        self._say(writer, frame)

    def _probe(self, writer: Any, frame: Frame, joined: _Joined) -> None:
        memory = joined.receive(frame.nbytes)
        writer.first_ns = 0
        self._say(writer, frame, crc_text(memory) if frame.num_runs else "")

    def _move(self, writer: Any, frame: Frame, joined: _Joined) -> None:
        table = self._receive_table(writer.wire, frame)
        joined.receive(frame.nbytes)
        self._scatter(joined.stage, table, self._window(frame))

    def close(self) -> None:
        super().close()
        self._memory = torch.empty(0, dtype=torch.uint8)


def _has_hung_up(sock: socket.socket) -> bool:
    """Whether the other side has ended the connection, though there may be something left to read; or this side has closed it."""
    poller = select.poll()
    try:
        poller.register(sock, getattr(select, "POLLRDHUP", 0))
    except (ValueError, OSError):
        return True
    return bool(poller.poll(0))


# ---- P ----------------------------------------------------------------------------------------------------------------


class PairLink:
    is_device_ordered = False

    def __init__(self, control: StreamLink, channel: Channel, cache: torch.Tensor, path: str) -> None:
        self._stream, self._channel, self._path = control, channel, path
        self._cache: torch.Tensor | None = cache  # None = closed
        self._stages = tuple(Slot(cache, STAGE_BYTES, on_device=True) for _ in range(2))  # none when closed
        self._works: list[Any] = [None, None]
        self._lock = threading.Lock()

    def write(
        self, copies: Copies, window: int, after: Any = None, shift: tuple[int, int] = (0, 0), source: torch.Tensor | None = None
    ) -> Ticket:
        """Done when it returns. On a GPU ``after`` must be over, unless there is a ``source``: the caller waits for a layer."""
        if not len(copies):
            return DONE
        with self._failing():
            if source is not None and after is not None:
                after.synchronize()
            for i, batch in enumerate(staged(shifted(copies, shift), STAGE_BYTES)):
                nbytes = int(batch[:, 2].sum())
                stage = self._settled(i % 2)
                stage.start_gather(packed(batch), source)
                self._stream.ask(MOVE, len(batch), window=window, nbytes=nbytes, payload=run_table(batch))
                self._send(i % 2, nbytes)
            for i in (0, 1):
                self._settled(i)
        return DONE

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A transfer that fails leaves the two halves in disagreement: the connection ends with it."""
        with self._lock:
            if self._cache is None:
                raise TransferError("the link is closed")
            try:
                yield
            except TransferError:
                self._works = [None, None]
                self._channel.abort()
                self._stream.lose()
                raise

    def _send(self, index: int, nbytes: int) -> None:
        stage = self._stage(index)
        with stage.on_stream():
            self._works[index] = self._channel.send(stage.memory[:nbytes])

    def _settled(self, index: int) -> Slot:
        """A stage that nobody reads any more."""
        stage, work, self._works[index] = self._stage(index), self._works[index], None
        if work is not None:
            with stage.on_stream():
                self._channel.wait(work, lambda: self._stream.is_over)
        return stage

    def _stage(self, index: int) -> Slot:
        stages = self._stages
        if not stages:
            raise TransferError("the link is closed")
        return stages[index]

    def examine(self, timeout_s: float) -> LinkReport:
        """Random bytes that D throws away: the first time to compare their sums, then against the clock."""
        round_trip_s, nbytes, seconds = self._stream.round_trip_s(timeout_s), _PROBE_BYTES, []
        with self._failing():
            stage = self._settled(0)
            memory = stage.memory[:nbytes]
            with stage.on_stream():
                memory.random_(0, 256)
                expected = crc_text(memory)
            for i in range(_NUM_PROBES + 1):
                begin = time.perf_counter()
                token = self._stream.ask(PROBE, int(i == 0), nbytes=nbytes)
                self._send(0, nbytes)
                text = self._stream.answer_to(token, timeout_s)
                self._settled(0)
                seconds.append(max(1e-9, time.perf_counter() - begin - round_trip_s))
                if i == 0 and text != expected:
                    raise TransferError(f"{self._path} damages what it carries: CRC {text} there, {expected} here{_HINTS}")
        return LinkReport(self._path, nbytes / min(seconds[1:]), round_trip_s)

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._stream.notify(window, token, notice)

    def close(self) -> None:
        """D puts nothing of what is under way into a closed window, so it is not waited for."""
        self._cache = None
        self._stages = ()
        self._stream.close()
        self._channel.abort()


class PairBackend(ServedByStream):
    """``name``: nccl for caches on GPUs, gloo for caches on CPUs."""

    name = "nccl"

    def __init__(self, host: str) -> None:
        """``host``: the address of this machine that peers reach. Raises TransferError where torch cannot do it."""
        if self.name == "nccl" and not (dist.is_available() and dist.is_nccl_available()):
            raise TransferError("this torch has no NCCL: use a CUDA build of it, or communication_type cuda_ipc or tcp")
        self._host = host
        self._store: Any = None

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def serve(self, cache: torch.Tensor, events: ServerEvents) -> dict[str, Any]:
        listener, store_listener = stream.listen(self._host), stream.listen(self._host)
        store = (self._host, store_listener.getsockname()[1])
        # By itself TCPStore would listen on every interface.
        self._store = dist.TCPStore(*store, None, True, datetime.timedelta(seconds=JOIN_S), False, False, store_listener.detach())
        self._server = PairServer(listener, events, cache, store, self._host)
        return {"host": self._host, "port": listener.getsockname()[1], "secret": self._server.secret, "store_port": store[1]}

    def connect(self, endpoint: dict[str, Any], cache: torch.Tensor, session: int, events: LinkEvents, timeout_s: float) -> Link:
        try:
            host, port, store_port = str(endpoint["host"]), int(endpoint["port"]), int(endpoint["store_port"])
            secret = str(endpoint["secret"])
        except (KeyError, ValueError, TypeError) as error:
            raise TransferError(f"the decode rank's {self.name} endpoint is malformed: {error!r}") from error
        control = StreamLink(dial(family_of(host), (host, port), timeout_s), secret, session, events, timeout_s)
        control.start()
        try:
            channel = self._join(control, (host, store_port), cache.device, min(timeout_s, JOIN_S))
        except BaseException:
            control.close()
            raise
        path = "NCCL" if cache.is_cuda else "gloo"
        return PairLink(control, channel, cache, f"{path} send and receive")

    def _join(self, control: StreamLink, store: tuple[str, int], device: torch.device, timeout_s: float) -> Channel:
        name = secrets.token_hex(16)
        token = control.ask(JOIN, 0, payload=name.encode())
        channel: Channel | None = None

        def is_over() -> bool:
            return control.is_over or control.refusal(token) is not None

        try:
            channel = bounded(lambda: make_channel(store, name, 0, device, self._host, timeout_s), timeout_s, is_over)
            control.answer_to(token, timeout_s)
            if is_over():
                raise TransferError("the connection ended while the communicator was made")
        except TransferError as error:
            if channel is not None:
                channel.abort()
            refusal = control.refusal(token)
            raise (error if refusal is None else TransferError(f"the decode rank: {refusal}")) from error
        return channel

    def close(self) -> None:
        super().close()
        self._store = None


class NcclBackend(PairBackend):
    name = "nccl"


class GlooBackend(PairBackend):
    name = "gloo"
