"""Supervised children: started, stopped, killed, never left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from cluster_children import HAS_A_CHILD, IGNORES_SIGTERM, SLEEPS, eventually, is_gone, python

from ksana_lab.cluster.process import ChildProcess, Spawner, wait_for_end, wait_until
from ksana_lab.errors import ProcessDied
from ksana_lab.process import is_alive, parent_variables


@pytest.fixture
def start(tmp_path):
    children = []

    def make(code, name="child", log=True, **options):
        child = ChildProcess(name, python(code), env=os.environ, log_path=tmp_path / f"{name}.log" if log else None, **options)
        child.start()
        children.append(child)
        return child

    yield make
    for child in children:
        child.stop(0.1)


def line_of(child, word):
    """Wait until the child has written a line that begins with ``word``."""
    return eventually(lambda: next((line for line in child.tail().splitlines() if line.startswith(word)), None))


def test_a_child_is_stopped_in_order(start):
    child = start("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)")
    line_of(child, "up")
    child.stop(10)
    assert child.exit_code == 7 and not child.is_alive
    child.stop()  # twice is once


def test_a_child_that_does_not_listen_is_killed(start):
    child = start(IGNORES_SIGTERM)
    line_of(child, "up")
    child.stop(0.1)
    assert child.exit_code == -signal.SIGKILL and child.describe_end() == "child was ended by SIGKILL"


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_grandchildren_go_with_the_child(start, how):
    child = start(HAS_A_CHILD)
    grandchild = int(line_of(child, "child").split()[1])
    getattr(child, how)()
    assert is_gone(grandchild)


def test_no_orphan_after_sigkill_of_the_parent(tmp_path):
    parent = subprocess.Popen(python(HAS_A_CHILD), stdout=subprocess.PIPE, text=True)
    grandchild = int(parent.stdout.readline().split()[1])
    parent.kill()
    parent.wait(10)
    eventually(lambda: is_gone(grandchild))


def test_a_child_whose_parent_is_already_dead_ends_at_once():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(10)
    env = {**os.environ, **parent_variables(), "KSANA_LAB_PARENT_PID": str(dead.pid)}
    code = "from ksana_lab.process import die_with_parent; die_with_parent(); print('went on')"
    done = subprocess.run(python(code), env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and done.stdout == ""


def test_a_process_started_by_hand_may_outlive_its_shell():
    env = {name: value for name, value in os.environ.items() if name != "KSANA_LAB_PARENT_PID"}
    code = "from ksana_lab.process import die_with_parent; die_with_parent(); print('went on')"
    assert subprocess.run(python(code), env=env, capture_output=True, text=True, timeout=30, check=False).stdout == "went on\n"


def test_a_zombie_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid)
    child.wait()


def test_a_child_outlives_the_thread_that_asked_for_it(start):
    spawner = Spawner()
    made = []
    code = "from ksana_lab.process import die_with_parent; die_with_parent(); print('up', flush=True); import time; time.sleep(60)"
    thread = threading.Thread(target=lambda: made.append(start(code, spawner=spawner)))
    thread.start()
    thread.join()
    line_of(made[0], "up")  # it has asked the kernel to end with the thread that started it
    assert wait_for_end(made, 0.2) == []
    spawner.close()
    assert wait_for_end(made, 10) == made  # and with the spawner it ends


def test_output_without_a_log_file_passes_through_and_is_kept(start, capfd):
    child = start("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)", log=False)
    assert wait_for_end([child], 20) == [child]
    assert sorted(child.tail().splitlines()) == ["one", "two"]
    assert "two" in capfd.readouterr().err and child.exit_code == 3


def test_a_dead_child_is_reported_with_its_last_lines(start):
    child = start("import sys; print('loading'); sys.exit('no such weights')", name="prefill0")
    with pytest.raises(ProcessDied, match="prefill0 ended with exit code 1 while waiting for answer") as caught:
        wait_until(lambda: False, 20, "answer", [child])
    assert "  prefill0 | no such weights" in str(caught.value)


def test_waiting_is_bounded_and_says_what_is_missing(start):
    child = start(SLEEPS)
    with pytest.raises(ProcessDied, match="no route within 0 s; p0 is not online") as caught:
        wait_until(lambda: None, 0.05, "route", [child], lambda: ["p0 is not online"])
    assert child.is_alive and isinstance(caught.value, ProcessDied)


def test_only_the_end_of_a_long_log_is_read(start):
    child = start("for i in range(100_000): print('line', i)")
    wait_for_end([child], 20)
    assert child.tail(2).splitlines() == ["line 99998", "line 99999"]


def test_a_ctrl_c_in_the_terminal_does_not_reach_the_child(start):
    child = start(SLEEPS)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


def test_a_child_can_be_started_again(start):
    child = start("print('once')")
    wait_for_end([child], 20)
    child.start()
    wait_for_end([child], 20)
    assert child.tail().splitlines() == ["once", "once"]
