"""Framed streams between a P rank and a D rank: the way of notices for every backend, and of the bytes themselves for tcp.

A frame is a fixed header and what the header announces; every length is checked before anything is allocated or written. A writer must
present the endpoint's secret first. The server (D) has one thread per connection, so no slow peer holds up another; the client (P) sends
from its caller's thread and reads acknowledgements on one of its own. Knows windows, offsets and bytes; no requests, no layers.

Frames, little-endian header ``<IBBHIQQQ`` = magic, version, kind, status, runs, window, token, nbytes:
    HELLO   P→D  window = session, payload = secret         READY  D→P  window = bytes of the cache (may carry a file descriptor)
    WRITE   P→D  runs × (offset, bytes), then the bytes    NOTICE P→D  payload; answered by    ACK  D→P  status, payload = error text"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ksana_lab.errors import TransferError
from ksana_lab.transfer.base import LinkEvents, ServerEvents
from ksana_lab.transfer.plan import Copies
from ksana_lab.types import family_of

log = logging.getLogger(__name__)

MAGIC, VERSION = 0x4B4C5456, 1  # "KLTV"
HELLO, READY, WRITE, NOTICE, ACK = range(1, 6)
OK, REFUSED = 0, 1
HEADER = struct.Struct("<IBBHIQQQ")
MAX_COPIES = 1 << 22
MAX_NOTICE_BYTES = MAX_COPIES * 16 + 4096
MAX_CONNECTIONS = 1024
STALL_S = 30.0  # a peer that stops in the middle of a frame for this long is given up
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # s, s, probes: a host that vanished is noticed within 25 s
_IOV_MAX = 1024  # buffers per system call
_SCRATCH_BYTES = 1 << 18
_PROBE = 1 << 63  # tokens from here on are a link's own: round trips for window 0, which nobody ever opens
_NUM_PINGS = 5


class Frame(NamedTuple):
    kind: int
    status: int
    num_runs: int
    window: int
    token: int
    nbytes: int

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, VERSION, *self)


class Wire:
    """A connected, non-blocking socket with bounded waits. Reads and writes may happen on two threads; ``shutdown`` on any."""

    def __init__(self, sock: socket.socket, stall_s: float = STALL_S) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                if hasattr(socket, option):  # Linux
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.sock = sock
        self.stall_s = stall_s
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    def wait_readable(self, timeout_s: float | None) -> None:
        """Raises TransferError when nothing comes for ``timeout_s`` (None = wait for ever, until ``shutdown``)."""
        if not self._readable.poll(None if timeout_s is None else timeout_s * 1000):
            raise TransferError(f"the peer sent nothing for {timeout_s:g} s")

    def receive(self, nbytes: int, *, idle_s: float | None) -> bytearray:
        """Exactly ``nbytes``; the first may take ``idle_s`` (None = for ever). Raises TransferError at end of stream."""
        buffer = bytearray(nbytes)
        view, timeout_s = memoryview(buffer), idle_s
        while view:
            try:
                got = self.sock.recv_into(view)
            except BlockingIOError:
                self.wait_readable(timeout_s)
                continue
            if not got:
                raise TransferError("the peer closed the connection")
            view, timeout_s = view[got:], self.stall_s
        return buffer

    def receive_frame(self, *, idle_s: float | None) -> Frame:
        """Raises TransferError for anything but a frame of this version."""
        magic, version, *rest = HEADER.unpack(self.receive(HEADER.size, idle_s=idle_s))
        if (magic, version) != (MAGIC, VERSION):
            raise TransferError(f"not a frame of version {VERSION}: magic {magic:#x}, version {version}")
        return Frame(*rest)

    def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """All of ``buffers``. Raises TransferError when the peer takes nothing for ``stall_s``."""
        views = [memoryview(b) for b in buffers]
        first = 0
        while first < len(views):
            try:
                sent = self.sock.sendmsg(views[first : first + _IOV_MAX])
            except BlockingIOError:
                if not self._writable.poll(self.stall_s * 1000):
                    raise TransferError(f"the peer took nothing for {self.stall_s:g} s") from None
                continue
            first = _advance(views, first, sent)

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        try:
            self.sock.shutdown(how)
        except OSError:
            pass  # it is not connected any more, which is what was asked for

    def close(self) -> None:
        self.sock.close()


def _advance(views: list[memoryview], first: int, nbytes: int) -> int:
    """Cut ``nbytes`` off the front of ``views[first:]``; returns the new first one that is not empty."""
    while first < len(views) and nbytes >= len(views[first]):
        nbytes -= len(views[first])
        first += 1
    if nbytes:
        views[first] = views[first][nbytes:]
    return first


def run_table(copies: Copies) -> bytes:
    """runs × (offset there, bytes), as a frame carries them."""
    return copies[:, 1:].astype("<i8").tobytes()


def staged(copies: Copies, room: int) -> list[Copies]:
    """``copies`` in batches of at most ``room`` bytes each; a run that does not fit is cut."""
    counts = -(-copies[:, 2] // room)
    if (counts > 1).any():
        row = np.repeat(np.arange(len(copies)), counts)
        shift = (np.arange(len(row)) - (np.cumsum(counts) - counts)[row]) * room
        copies = np.column_stack((copies[row, 0] + shift, copies[row, 1] + shift, np.minimum(copies[row, 2] - shift, room)))
    batches, first, total = [], 0, 0
    for i, nbytes in enumerate(copies[:, 2].tolist()):
        if total + nbytes > room:
            batches.append(copies[first:i].copy())
            first, total = i, 0
        total += nbytes
    return [*batches, copies[first:].copy()]


# ---- the server: a decode rank ------------------------------------------------------------------------------------------


@dataclass
class _Window:
    is_open: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while bytes of it move from the kernel into the cache


class Stage(Protocol):
    """Host memory that bytes of a device pass through on their way in."""

    host: memoryview

    def scatter(self, copies: Copies) -> None:
        """``copies`` (offset in ``host``, offset in the cache, bytes) are in the cache when this returns."""


@dataclass(eq=False)
class _Writer:
    wire: Wire
    stage: Stage | None = None
    session: int = 0
    first_ns: int = 0  # when the first byte behind the next notice was seen
    thread: threading.Thread | None = None


class StreamServer:
    """Accepts writers of one cache. With ``cache`` it takes WRITE frames, and closing a window fences them; so it does with ``make_stage``,
    through which the bytes reach a device. A kind of server that puts bytes into the cache by frames of its own says so with
    ``is_fence``. Without any of these the writers have another way to the memory, and only notices pass here; then a writer counts for
    ``linger_s`` after its connection ended, for what it wrote may still be on that other way. ``on_writer_gone`` is called both times."""

    def __init__(
        self,
        listener: socket.socket,
        events: ServerEvents,
        *,
        cache_bytes: int,
        cache: memoryview | None = None,
        make_stage: Callable[[], Stage] | None = None,
        is_fence: bool = False,
        fds: Sequence[int] = (),
        stall_s: float = STALL_S,
        linger_s: float = 0.0,
    ) -> None:
        self.secret = secrets.token_hex(16)
        self._listener, self._events = listener, events
        self._cache, self._cache_bytes, self._fds = cache, cache_bytes, tuple(fds)
        self._stall_s, self._make_stage, self._linger_s = stall_s, make_stage, linger_s
        self._takes_writes = cache is not None or make_stage is not None
        self._is_fence = is_fence or self._takes_writes
        self._lock = threading.Lock()
        self._windows: dict[int, _Window] = {}
        self._writers: set[_Writer] = set()
        self._forgotten: dict[int, None] = {}
        self._is_closed = False
        self._closing = threading.Event()
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._thread = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._thread.start()

    def open_window(self, window: int) -> None:
        with self._lock:
            self._windows[window] = _Window()

    def close_window(self, window: int) -> bool:
        with self._lock:
            found = self._windows.pop(window, None)
        if found is not None:
            with found.lock:  # at most one copy out of the kernel's buffer is waited for
                found.is_open = False
        return self._is_fence

    def num_writers(self, session: int) -> int:
        with self._lock:
            return sum(w.session == session for w in self._writers)

    def forget(self, session: int) -> None:
        with self._lock:
            self._forgotten[session] = None
            while len(self._forgotten) > 4096:
                del self._forgotten[next(iter(self._forgotten))]
            writers = [w for w in self._writers if w.session == session]
        for writer in writers:
            # Who reaches the memory by itself must go of its own accord: its end of the connection says that it has stopped.
            writer.wire.shutdown(socket.SHUT_RDWR if self._is_fence else socket.SHUT_WR)

    def close(self) -> None:
        """Ends every connection. May be called twice."""
        with self._lock:
            self._is_closed = True
            writers = list(self._writers)
        self._closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes ``accept``
        except OSError:
            pass  # closed before
        self._listener.close()
        for writer in writers:
            writer.wire.shutdown()
        for thread in (self._thread, *(w.thread for w in writers)):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout=5)
        if self._cache is not None:
            self._cache = memoryview(b"")  # lets go of the memory, and stays what tells a fence

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                log.exception("accepting a KV connection failed")
                time.sleep(0.1)  # out of file descriptors, most likely: the backlog would spin
                continue
            writer = _Writer(Wire(sock, self._stall_s))
            with self._lock:
                is_welcome = not self._is_closed and len(self._writers) < MAX_CONNECTIONS
                if is_welcome:
                    self._writers.add(writer)
            if not is_welcome:
                sock.close()
                continue
            writer.thread = threading.Thread(target=self._serve, args=(writer,), name="kv-receive", daemon=True)
            writer.thread.start()

    def _serve(self, writer: _Writer) -> None:
        reason = "the connection ended"
        try:
            self._greet(writer)
            while True:
                self._take(writer, writer.wire.receive_frame(idle_s=None))
        except (TransferError, OSError) as error:
            reason = str(error)
        except Exception:
            log.exception("receiving KV failed")
            reason = "internal error of the receiver"
        writer.wire.close()
        self._part_with(writer)
        if writer.session and self._linger_s and not self._is_closed:
            self._events.on_writer_gone(writer.session, reason)
            self._closing.wait(self._linger_s)
        with self._lock:
            self._writers.discard(writer)
        if writer.session and not self._is_closed:
            self._events.on_writer_gone(writer.session, reason)
        elif not writer.session:
            log.warning("turned a KV connection away: %s", reason)

    @contextlib.contextmanager
    def _files_for(self, writer: _Writer) -> Iterator[Sequence[int]]:
        """What READY hands to a writer that knows the secret."""
        yield self._fds

    def _part_with(self, writer: _Writer) -> None:
        """For a kind of server that keeps more of a writer than its connection, which is over."""

    def _greet(self, writer: _Writer) -> None:
        hello = writer.wire.receive_frame(idle_s=5.0)
        if hello.kind != HELLO or hello.nbytes != len(self.secret) or not hello.window:
            raise TransferError("the peer did not say hello")
        offered = writer.wire.receive(hello.nbytes, idle_s=5.0)
        if not hmac.compare_digest(bytes(offered), self.secret.encode()):
            raise TransferError("the peer does not know this endpoint's secret")
        ready = Frame(READY, OK, 0, self._cache_bytes, 0, 0).pack()
        with self._files_for(writer) as fds:
            with self._lock:
                if hello.window in self._forgotten:
                    raise TransferError(f"session {hello.window} is over")
                writer.session = hello.window
            if fds:
                socket.send_fds(writer.wire.sock, [ready], fds)
            else:
                writer.wire.send([ready])

    def _take(self, writer: _Writer, frame: Frame) -> None:
        writer.first_ns = writer.first_ns or time.monotonic_ns()
        if frame.kind == WRITE and self._takes_writes:
            self._take_write(writer, frame)
        elif frame.kind == NOTICE and frame.nbytes <= MAX_NOTICE_BYTES:
            notice = bytes(writer.wire.receive(frame.nbytes, idle_s=self._stall_s))
            self._answer(writer, frame, notice)
        else:
            raise TransferError(f"unexpected frame of kind {frame.kind}, {frame.nbytes} bytes")

    def _take_write(self, writer: _Writer, frame: Frame) -> None:
        wire = writer.wire
        table, window = self._receive_table(wire, frame), self._window(frame)
        if self._cache is not None:
            self._fill(wire, [self._cache[offset : offset + size] for offset, size in table.tolist()], window)
        else:
            self._fill_device(writer, table, window)

    def _window(self, frame: Frame) -> _Window | None:
        with self._lock:
            return self._windows.get(frame.window)

    def _receive_table(self, wire: Wire, frame: Frame) -> np.ndarray:
        """int64 [n, 2] (offset, bytes) of a write. Raises TransferError when it is not inside the cache."""
        if not 0 < frame.num_runs <= MAX_COPIES:
            raise TransferError(f"a write of {frame.num_runs} runs")
        table = np.frombuffer(wire.receive(frame.num_runs * 16, idle_s=self._stall_s), "<i8").reshape(-1, 2)
        offsets, sizes = table[:, 0], table[:, 1]
        fits = (offsets >= 0) & (sizes > 0) & (sizes <= self._cache_bytes) & (offsets <= self._cache_bytes - sizes)
        if not fits.all() or int(sizes.sum()) != frame.nbytes:
            raise TransferError(f"a write outside the cache of {self._cache_bytes} bytes, or of another size than announced")
        return table

    def _fill_device(self, writer: _Writer, table: np.ndarray, window: _Window | None) -> None:
        """As ``_fill``, through a stage: host memory is filled freely, the step from it into the cache is what a window guards."""
        assert self._make_stage is not None
        stage = writer.stage = writer.stage or self._make_stage()
        for batch in staged(np.column_stack((table[:, 0], table)), len(stage.host)):
            nbytes = int(batch[:, 2].sum())
            self._fill(writer.wire, [stage.host[:nbytes]], _Window())
            self._scatter(stage, batch[:, 1:], window)

    def _scatter(self, stage: Stage, table: np.ndarray, window: _Window | None) -> None:
        """``table`` (offset in the cache, bytes): what lies in that order in ``stage``, as long as the window is open."""
        if window is not None:
            with window.lock:
                if window.is_open:
                    stage.scatter(np.column_stack((np.cumsum(table[:, 1]) - table[:, 1], table)))

    def _fill(self, wire: Wire, views: list[memoryview], window: _Window | None) -> None:
        """Receive into ``views`` for as long as the window is open; what comes later is read and thrown away."""
        first, left = 0, sum(map(len, views))
        while left:
            try:
                if window is not None:
                    with window.lock:
                        if window.is_open:
                            got = wire.sock.recvmsg_into(views[first : first + _IOV_MAX])[0]
                            first = _advance(views, first, got)
                        else:
                            window = None
                            continue
                else:
                    got = wire.sock.recv_into(self._scratch[:left])
            except BlockingIOError:
                wire.wait_readable(wire.stall_s)
                continue
            if not got:
                raise TransferError("the peer closed the connection in the middle of a write")
            left -= got

    def _answer(self, writer: _Writer, frame: Frame, notice: bytes) -> None:
        with self._lock:
            is_open = frame.window in self._windows
        first_ns, writer.first_ns = writer.first_ns, 0
        error: str | None = "the decode node does not expect this request any more"
        if is_open:
            error = self._events.on_notice(writer.session, frame.window, notice, first_ns)
        self._say(writer, frame, error or "", REFUSED if error else OK)

    def _say(self, writer: _Writer, frame: Frame, text: str = "", status: int = OK) -> None:
        """The answer to ``frame``."""
        data = text.encode()[:4096]
        writer.wire.send([Frame(ACK, status, 0, frame.window, frame.token, len(data)).pack(), data])


class ServedByStream:
    """The decode side of a backend (``transfer.base.TransferBackend``) whose notices pass through a StreamServer, made by its ``serve``."""

    _server: StreamServer | None = None

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
        """May be called twice."""
        if self._server is not None:
            self._server.close()


# ---- the client: a prefill rank -----------------------------------------------------------------------------------------


class Done:
    """The ticket of a write that needs no waiting."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> bool:
        return True


DONE = Done()


class StreamLink:
    """A writer's end. ``max_fds``: how many file descriptors READY carries (``fds``)."""

    def __init__(
        self,
        sock: socket.socket,
        secret: str,
        session: int,
        events: LinkEvents,
        timeout_s: float,
        *,
        source: memoryview | None = None,
        max_fds: int = 0,
        stall_s: float = STALL_S,
        is_kept: bool = False,
    ) -> None:
        """``sock`` is connected. ``is_kept``: the writes go another way, and to the peer the end of this connection means that they are
        over; so nothing but ``close`` ends it. Raises TransferError when the server does not accept; the socket is closed then."""
        self._wire = Wire(sock, stall_s)
        self._events, self._source = events, source
        self.fds: list[int] = []
        self.peer_bytes = 0
        self._is_kept = is_kept
        self._is_closed = False
        self._send_lock = threading.Lock()
        self._answered = threading.Condition()
        self._probe_token = self._last_probe = _PROBE
        self._last_answer = (OK, "")
        self._is_over = False
        try:
            self._wire.send([Frame(HELLO, OK, 0, session, 0, len(secret)).pack(), secret.encode()])
            self._await_ready(timeout_s, max_fds)
        except (TransferError, OSError) as error:
            self._drop_fds()
            self._wire.close()
            raise TransferError(f"the decode rank did not accept the connection: {error}") from error
        self._thread = threading.Thread(target=self._read, name="kv-acks", daemon=True)

    def start(self) -> None:
        """From now on events are delivered."""
        self._thread.start()

    def _await_ready(self, timeout_s: float, max_fds: int) -> None:
        if max_fds:
            self._wire.wait_readable(timeout_s)
            data, self.fds, _, _ = socket.recv_fds(self._wire.sock, HEADER.size, max_fds)
            if not data:
                raise TransferError("the peer closed the connection")
            rest = self._wire.receive(HEADER.size - len(data), idle_s=timeout_s)
            magic, version, *fields = HEADER.unpack(data + bytes(rest))
            if (magic, version) != (MAGIC, VERSION):
                raise TransferError("the peer speaks another protocol")
            ready = Frame(*fields)
        else:
            ready = self._wire.receive_frame(idle_s=timeout_s)
        if ready.kind != READY:
            raise TransferError(f"the peer answered with a frame of kind {ready.kind}")
        self.peer_bytes = ready.window

    def write(self, copies: Copies, window: int, source: memoryview | None = None) -> Done:
        """Send the bytes themselves, out of ``source`` or else out of the cache."""
        source = self._source if source is None else source
        if source is None:
            raise TransferError("the link is closed")
        runs = copies.tolist()
        header = Frame(WRITE, OK, len(runs), window, 0, int(copies[:, 2].sum())).pack()
        table = run_table(copies)
        self._send([header, table, *(source[a : a + n] for a, _, n in runs)])
        return DONE

    def notify(self, window: int, token: int, notice: bytes) -> None:
        self._send([Frame(NOTICE, OK, 0, window, token, len(notice)).pack(), notice])

    def ping(self, timeout_s: float) -> None:
        """One round trip: a notice that the peer refuses. Everything sent before it has been received when it returns."""
        self.answer_to(self.ask(NOTICE, 0), timeout_s)

    def ask(self, kind: int, num_runs: int, *, window: int = 0, nbytes: int = 0, payload: bytes = b"") -> int:
        """Send a frame that is the link's own affair; returns its token for ``answer_to``."""
        token = self._probe_token = self._probe_token + 1
        self._send([Frame(kind, OK, num_runs, window, token, nbytes or len(payload)).pack(), payload])
        return token

    def answer_to(self, token: int, timeout_s: float) -> str:
        """The text. Raises TransferError when none comes, or the connection ends."""
        with self._answered:
            if not self._answered.wait_for(lambda: self._last_probe >= token or self._is_over, timeout_s):
                raise TransferError(f"the peer did not answer within {timeout_s:g} s")
            if self._last_probe < token:
                raise TransferError("the connection was lost before the peer answered")
            return self._last_answer[1]

    def refusal(self, token: int) -> str | None:
        """Why the peer refused what was asked with ``token``, the last question; None = it did not, or not yet."""
        status, text = self._last_answer
        return text if self._last_probe >= token and status != OK else None

    @property
    def is_over(self) -> bool:
        return self._is_over

    def lose(self) -> None:
        """End the connection for a failure that it cannot see by itself; the owner is told."""
        self._wire.shutdown()

    def round_trip_s(self, timeout_s: float) -> float:
        """The shortest of a few."""
        times = []
        for _ in range(_NUM_PINGS):
            begin = time.perf_counter()
            self.ping(timeout_s)
            times.append(time.perf_counter() - begin)
        return min(times)

    def _send(self, buffers: Sequence[bytes | memoryview]) -> None:
        with self._send_lock:
            if self._is_closed:
                raise TransferError("the link is closed")
            try:
                self._wire.send(buffers)
            except (OSError, TransferError) as error:
                # Half a frame may be out; the reader tells the owner.
                self._wire.shutdown(socket.SHUT_RD if self._is_kept else socket.SHUT_RDWR)
                raise TransferError(f"sending KV failed: {error}") from error

    def _read(self) -> None:
        reason = ""
        try:
            while True:
                ack = self._wire.receive_frame(idle_s=None)
                if ack.kind != ACK or ack.nbytes > 4096:
                    raise TransferError(f"unexpected frame of kind {ack.kind}")
                text = self._wire.receive(ack.nbytes, idle_s=STALL_S).decode(errors="replace")
                if ack.token >= _PROBE:
                    with self._answered:
                        self._last_answer, self._last_probe = (ack.status, text), ack.token
                        self._answered.notify_all()
                else:
                    self._events.on_ack(ack.token, text if ack.status != OK else None)
        except (TransferError, OSError) as error:
            reason = str(error)
        except Exception:
            log.exception("an acknowledgement could not be handled")
            reason = "internal error of the sender"
        if not self._is_kept:
            self._wire.shutdown()
        with self._answered:
            self._is_over = True
            self._answered.notify_all()
        if not self._is_closed:
            self._events.on_lost(reason)

    def close(self) -> None:
        self._is_closed = True
        self._wire.shutdown()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        with self._send_lock:
            self._wire.close()
            self._source = None
            self._drop_fds()

    def _drop_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def listen(host: str) -> socket.socket:
    """A listening socket at ``host``, on a port that the system chooses. Raises TransferError."""
    try:
        return socket.create_server((host, 0), family=family_of(host), backlog=128)
    except OSError as error:
        raise TransferError(f"cannot listen for KV on {host}: {error}; is it an address of this host?") from error


def listen_on_host() -> tuple[socket.socket, str]:
    """A listening socket for processes of this host, and its name for ``dial``, behind a NUL: no file, gone with the process."""
    name = f"ksana_lab-kv-{os.getpid()}-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(128)
    return listener, name


def dial(family: int, address: tuple[str, int] | str, timeout_s: float) -> socket.socket:
    """A connected socket. Raises TransferError that names the address."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(address)
    except OSError as error:
        sock.close()
        where = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else repr(address)
        raise TransferError(f"cannot reach the decode rank at {where}: {error}") from error
    return sock
