"""A child process ends with its parent, however the parent ends. Floor 0: every process of ours calls it first. Knows nothing of what runs.

On Linux the kernel delivers SIGKILL when the *thread* that started the child ends (prctl PR_SET_PDEATHSIG), so start children from a
thread that lives as long as they should: the main thread, or ``cluster.process.Spawner``."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_PID_VARIABLE = "KSANA_LAB_PARENT_PID"  # set by whoever starts a child, so that a parent that died before we looked is noticed

_PR_SET_PDEATHSIG = 1


def parent_variables() -> dict[str, str]:
    """To be added to the environment of a child that will call ``die_with_parent``."""
    return {PARENT_PID_VARIABLE: str(os.getpid())}


def die_with_parent(parent_pid: int | None = None) -> None:
    """End this process (SIGKILL) as soon as its parent is gone, even one that was killed with SIGKILL. Call it first in a child's main.

    ``parent_pid``: who started it; by default what ``parent_variables`` says. A process started by hand, without either, is left alone: it
    may outlive its shell."""
    if parent_pid is None:
        said = os.environ.get(PARENT_PID_VARIABLE, "")
        if not said.isdecimal():
            return
        parent_pid = int(said)
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch, args=(os.getppid(),), name="parent-watch", daemon=True).start()
    if not is_alive(parent_pid):  # it ended between our start and the line above
        os._exit(1)


def is_alive(pid: int) -> bool:
    """Whether a process with this pid runs. A zombie, dead but not yet reaped, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:  # no /proc here, or gone meanwhile
        return not os.path.isdir("/proc/self")


def _watch(parent: int) -> None:
    """Where the kernel has no parent-death signal there is nothing to wait on but the clock."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
