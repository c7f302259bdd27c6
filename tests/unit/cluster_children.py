"""Small programs that tests start as children, and how to watch processes that are not ours to wait for."""

import sys
import time

import psutil

IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
SLEEPS = "import time; print('up', flush=True); time.sleep(60)"
# Starts a grandchild of its own, as a node starts its engine; both end with their parent.
HAS_A_CHILD = """
import os, subprocess, sys, time
from ksana_lab.process import die_with_parent, parent_variables
die_with_parent()
code = "from ksana_lab.process import die_with_parent; die_with_parent(); import time; print('up', flush=True); time.sleep(60)"
env = {**os.environ, **parent_variables()}
child = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print("child", child.pid, flush=True)
time.sleep(60)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def eventually(condition, timeout_s: float = 10.0):
    """For what happens in a process that is not our child: nothing to wait on but the condition itself."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return value


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
