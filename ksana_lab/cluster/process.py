"""One supervised child process: started, watched, stopped, never left behind. Knows nothing of what it runs.

A child ends with this process (ksana_lab/process.py) and is stopped with everything it started itself."""

from __future__ import annotations

import collections
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TypeVar

import psutil

from ksana_lab.errors import ProcessDied
from ksana_lab.process import parent_variables

log = logging.getLogger(__name__)
T = TypeVar("T")

TAIL_LINES = 20
_MAX_POLL_S = 0.05


class Spawner:
    """A thread that starts children and lives until ``close``, or as long as this process.

    The kernel ends a child when the thread that started it ends; a notebook's cell or a pool's worker may be such a short-lived thread."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen], Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spawner", daemon=True)
        self._thread.start()

    def start(self, popen: Callable[[], subprocess.Popen]) -> subprocess.Popen:
        done: Future[subprocess.Popen] = Future()
        self._work.put((popen, done))
        return done.result(timeout=60)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            popen, done = item
            try:
                done.set_result(popen())
            except BaseException as error:  # handed to the caller, who raises it
                done.set_exception(error)

    def close(self) -> None:
        """Ends the thread, and with it every child that still runs. May be called twice."""
        self._work.put(None)
        self._thread.join(timeout=5)


class ChildProcess:
    """A child in a session of its own, so that a Ctrl-C in the terminal reaches its parent alone.

    Output goes to ``log_path``, or through this process to its stderr; the last lines are kept either way."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path | None = None,
        spawner: Spawner | None = None,
    ) -> None:
        self.name, self.command, self.log_path = name, list(command), log_path
        self._env = {**env, **parent_variables()}
        self._spawner = spawner
        self._popen: subprocess.Popen | None = None
        self._ring: collections.deque[str] = collections.deque(maxlen=500)
        self._pump: threading.Thread | None = None
        self._family: list[psutil.Process] = []  # its descendants, from SIGTERM until they are known to be gone

    def start(self) -> None:
        """Raises OSError when the command cannot be run at all."""
        assert not self.is_alive, self.name
        self._popen = self._spawner.start(self._open) if self._spawner else self._open()
        if self.log_path is None:
            self._pump = threading.Thread(target=self._forward, args=(self._popen.stdout,), name=f"log-{self.name}", daemon=True)
            self._pump.start()
        log.debug("%s: pid %d: %s", self.name, self._popen.pid, " ".join(self.command))

    def _open(self) -> subprocess.Popen:
        if self.log_path is None:
            return self._popen_to(subprocess.PIPE)
        with self.log_path.open("ab") as sink:
            return self._popen_to(sink)

    def _popen_to(self, sink: int | IO[bytes]) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, env=self._env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _forward(self, pipe: IO[bytes]) -> None:
        for raw in pipe:
            line = raw.decode("utf-8", "replace")
            self._ring.append(line.rstrip("\n"))
            try:
                sys.stderr.write(line)
                sys.stderr.flush()
            except (OSError, ValueError):
                continue  # nobody reads us any more; the child must not block on a full pipe for that

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before it was started; negative: the signal that ended it."""
        return self._popen.poll() if self._popen else None

    @property
    def is_alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines it wrote."""
        if self.log_path is not None:
            return _tail_of(self.log_path, lines)
        if self._pump is not None and not self.is_alive:
            self._pump.join(timeout=2)  # the pipe of a dead child ends; what it still held comes first
        return "\n".join(list(self._ring)[-lines:])

    def describe_end(self) -> str:
        """``prefill0 ended with exit code 1``."""
        code = self.exit_code
        if code is None:
            return f"{self.name} is running"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self.name} {how}"

    def died(self, message: str | None = None) -> ProcessDied:
        return ProcessDied(message or self.describe_end(), _indented(self.name, self.tail()))

    def ask_to_stop(self) -> None:
        """SIGTERM, without waiting; ``stop`` must follow."""
        if self.is_alive and self._popen is not None:
            self._family = _descendants(self._popen.pid)
            self._popen.terminate()

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, up to ``grace_s`` to end in order, then SIGKILL, to it and to whatever it started. Returns when all are gone."""
        if self._popen is None:
            return
        if not self._family:
            self.ask_to_stop()
        try:
            self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %.0f s of SIGTERM: killing it", self.name, grace_s)
        family, self._family = self._family, []
        self._kill_family(family)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send one signal to the process alone, as an out-of-memory killer would; after SIGKILL wait until its children are gone too."""
        if not self.is_alive or self._popen is None:
            return
        family = _descendants(self._popen.pid)
        self._popen.send_signal(sig)
        if sig == signal.SIGKILL:
            self._popen.wait(10)
            self._kill_family(_wait_for_all(family, 5.0))  # they die with their parent

    def _kill_family(self, family: list[psutil.Process]) -> None:
        assert self._popen is not None
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # the whole group is gone already, which is what was wanted
        survivors = _wait_for_all(family, 0.0)
        for process in survivors:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self._popen.wait(10)
        if survivors := _wait_for_all(survivors, 10.0):
            log.error("%s left processes behind that cannot be killed: %s", self.name, [p.pid for p in survivors])

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.is_alive else "not started" if self._popen is None else self.describe_end()
        return f"<{self.name}: {state}>"


def wait_until(
    probe: Callable[[], T | None],
    timeout_s: float,
    what: str,
    children: Sequence[ChildProcess] = (),
    explain: Callable[[], Sequence[str]] = tuple,
) -> T:
    """Ask ``probe`` until it answers something other than None or False: for what another process does and offers no event for.

    Raises ProcessDied as soon as one of ``children`` has ended, or after ``timeout_s``; ``explain`` then says what is still lacking."""
    deadline, pause = time.monotonic() + timeout_s, 0.005
    while True:
        for child in children:
            if not child.is_alive:
                raise child.died(f"{child.describe_end()} while waiting for {what}")
        answer = probe()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            tails = "\n".join(_indented(child.name, child.tail(5)) for child in children)
            raise ProcessDied("; ".join([f"no {what} within {timeout_s:.0f} s", *explain()]), tails)
        wait_for_end(children, pause)
        pause = min(pause * 1.5, _MAX_POLL_S)


def wait_for_end(children: Sequence[ChildProcess], timeout_s: float | None = None) -> list[ChildProcess]:
    """Block until one of ``children`` ends, or the time is up; returns those that have ended."""
    ended = [child for child in children if child.pid is not None and not child.is_alive]
    if ended or not children:
        if not ended and timeout_s is not None:
            time.sleep(timeout_s)  # nothing to wait on but the clock
        return ended
    if hasattr(os, "pidfd_open"):
        _wait_on_pidfds([child.pid for child in children if child.pid is not None], timeout_s)
    else:
        _poll_for_end(children, timeout_s)
    return [child for child in children if child.pid is not None and not child.is_alive]


def _wait_on_pidfds(pids: Sequence[int], timeout_s: float | None) -> None:
    poller, handles = select.poll(), []
    try:
        for pid in pids:
            try:
                handles.append(os.pidfd_open(pid))
            except ProcessLookupError:
                return  # ended and reaped meanwhile
            poller.register(handles[-1], select.POLLIN)
        poller.poll(None if timeout_s is None else max(1, int(timeout_s * 1000)))
    finally:
        for handle in handles:
            os.close(handle)


def _poll_for_end(children: Sequence[ChildProcess], timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while all(child.is_alive for child in children) and (deadline is None or time.monotonic() < deadline):
        time.sleep(_MAX_POLL_S if deadline is None else min(_MAX_POLL_S, max(0.0, deadline - time.monotonic())))


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait_for_all(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after ``timeout_s``. A zombie does not; who is not our child is reaped when the first process of all likes."""
    deadline, pause = time.monotonic() + timeout_s, 0.001
    while (running := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 1.5, _MAX_POLL_S)
    return running


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _tail_of(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 512 * max(lines, 1)))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _indented(name: str, text: str) -> str:
    return "\n".join(f"  {name} | {line}" for line in text.splitlines())
