"""The Cluster object over stub programs: starts, serves, survives faults, leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers_checkpoint import write_hollow

from ksana_lab.cluster.local import Cluster
from ksana_lab.cluster.ports import is_free
from ksana_lab.config.environment import missing_variables
from ksana_lab.errors import ConfigError, KsanaLabError, ProcessDied

STUB = Path(__file__).with_name("stub_program.py")
FILE = """
router: {port: auto}
start_timeout_s: 30
ksana_lab: {device: cpu}
nodes:
  prefill: {role: prefill}
  decode: {role: decode}
"""
pytestmark = pytest.mark.integration


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    return write_hollow(directory)


@pytest.fixture
def make(tmp_path, checkpoint):
    (tmp_path / "c.yaml").write_text(FILE)
    made = []

    def cluster(**options):
        made.append(Cluster.from_yaml(tmp_path / "c.yaml", **{"model_dir": checkpoint, "program": (sys.executable, str(STUB)), **options}))
        return made[-1]

    yield cluster
    for each in made:
        each.close()


def family(cluster):
    """Every process of a cluster, engines too."""
    pids = [process["pid"] for process in cluster.status()["processes"]]
    return [p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]


def all_gone(processes, timeout_s=10.0):
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def ports_of(cluster):
    return [port for process in cluster.plan.processes for port in process.ports.values()]


def test_it_starts_serves_and_closes_without_a_trace(make):
    with make() as cluster:
        processes = family(cluster)
        assert len(processes) == 5 and repr(cluster) == f"<Cluster {cluster.url}: 1 prefill, 1 decode, running>"
        assert [p["state"] for p in cluster.status()["processes"]] == ["running"] * 3
        assert "router is up" in cluster.logs("router")
        run_dir = Path(processes[0].environ()["KSANA_LAB_RUN_DIR"])
    assert all_gone(processes, 0.1) and not run_dir.exists() and "closed" in repr(cluster)
    assert all(is_free("127.0.0.1", port) for port in ports_of(cluster))
    cluster.close()


def test_twice_in_one_process_and_two_at_once(make):
    with make() as first, make() as second:
        assert not set(ports_of(first)) & set(ports_of(second))
    with make() as again:
        assert again.status()["nodes"]
    with pytest.raises(KsanaLabError, match="closed; make another"):
        again.start()


def test_generate_speaks_ksanallms_api(make):
    with make() as cluster:
        reply = cluster.generate([5, 6], max_tokens=3, temperature=0.5, seed=1, stop="x")
        sent = json.loads(reply.text)
        with pytest.raises(KsanaLabError, match="answered 503"):
            cluster.generate("fail")
    assert (reply.token_ids, reply.prompt_token_ids) == ([1, 2], [5, 6])
    assert sent["stream"] is False and sent["input_tokens"] == [5, 6]
    config = {"max_new_tokens": 3, "temperature": 0.5, "seed": 1, "stop_strings": ["x"], "topk": 1024, "do_sample": True}
    assert sent["sampling_config"] == config


def test_children_have_the_required_variables_and_no_proxy(make, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    with make() as cluster:
        environments = [process.environ() for process in family(cluster)]
    for env in environments:
        assert missing_variables(env) == [] and "http_proxy" not in env and "HTTPS_PROXY" not in env and env["NCCL_NVLS_ENABLE"] == "0"


def test_a_node_that_dies_while_starting_is_reported_with_its_last_lines(make, monkeypatch):
    monkeypatch.setenv("KSANA_STUB_FAULT", "decode dies")
    cluster = make()
    with pytest.raises(ProcessDied, match="decode0 ended with exit code 1") as caught:
        cluster.start()
    assert "decode0 | decode cannot find its weights" in str(caught.value)
    assert all(is_free("127.0.0.1", port) for port in ports_of(cluster))


def test_a_node_that_never_registers_is_named_within_the_bound(make, monkeypatch):
    monkeypatch.setenv("KSANA_STUB_FAULT", "prefill is silent")
    with pytest.raises(ProcessDied, match="prefill0 is not online at the router; prefill0 and decode0 are not connected"):
        make(overrides=["start_timeout_s=2"]).start()


def test_kill_and_restart_of_a_node(make):
    with make() as cluster:
        engine = psutil.Process(int(re.search(r"engine (\d+)", cluster.logs("decode0"))[1]))
        cluster.kill("decode0")
        assert all_gone([engine], 5) and cluster.wait(10) == ["decode0"]
        assert cluster.status()["processes"][2]["state"] == "decode0 was ended by SIGKILL"
        with pytest.raises(ProcessDied, match="decode0 was ended by SIGKILL"):
            cluster.check()
        cluster.restart("decode0")
        assert [p["state"] for p in cluster.status()["processes"]] == ["running"] * 3
        (node,) = [n for n in cluster.status()["nodes"] if n["role"] == "decode"]
        assert int(node["incarnation"]) == cluster.status()["processes"][2]["pid"]


def test_a_restarted_router_keeps_its_port(make):
    with make() as cluster:
        url = cluster.url
        cluster.restart("router")
        assert cluster.url == url and len(cluster.status()["nodes"]) == 2


def test_what_can_be_known_beforehand_stops_the_start(make, tmp_path):
    with pytest.raises(ConfigError, match=r"prefill0, decode0: .* is no checkpoint: it lacks config\.json"):
        make(model_dir=tmp_path).start()


def test_logs_are_kept_where_they_are_asked_for(make, tmp_path):
    with make(log_dir=tmp_path / "logs"):
        pass
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["decode0.log", "prefill0.log", "router.log"]


def test_only_some_of_the_processes(make):
    nodes = make(only=["prefill0", "decode0"], overrides=["router.port=1", "start_timeout_s=1"])
    with pytest.raises(ProcessDied, match="the router does not answer"):
        nodes.start()


SCRIPT = """
import sys, time
from ksana_lab.cluster.local import Cluster
with Cluster.from_yaml(sys.argv[1], model_dir=sys.argv[2], program=(sys.executable, sys.argv[3])) as cluster:
    print(*(p["pid"] for p in cluster.status()["processes"]), *(p for s in cluster.plan.processes for p in s.ports.values()), flush=True)
    time.sleep(600)
"""


def test_the_folder_of_a_killed_cluster_is_removed_by_the_next_one(make, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(10)
    abandoned, living = tmp_path / f"ksana_lab-{dead.pid}-x", tmp_path / f"ksana_lab-{os.getpid()}-x"
    abandoned.mkdir()
    living.mkdir()
    with make():
        assert not abandoned.exists() and living.exists()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_orphan_and_no_held_port_whatever_ends_the_parent(make, tmp_path, checkpoint, sig):
    make()  # writes the file
    script = [sys.executable, "-c", SCRIPT, str(tmp_path / "c.yaml"), str(checkpoint), str(STUB)]
    parent = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    numbers = [int(word) for word in parent.stdout.readline().split()]
    processes = [p for pid in numbers[:3] for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    assert len(processes) == 5
    parent.send_signal(sig)
    parent.wait(20)
    assert all_gone(processes)
    deadline = time.monotonic() + 5
    while not all(is_free("127.0.0.1", port) for port in numbers[3:]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cluster_that_nobody_closed_ends_with_its_interpreter(make, tmp_path, checkpoint):
    make()
    script = (
        SCRIPT.replace("with ", "cluster = ")
        .replace(" as cluster:", ".start()")
        .replace("    print", "print")
        .replace("    time.sleep(600)", "")
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c.yaml"), str(checkpoint), str(STUB)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    assert all(not psutil.pid_exists(int(pid)) for pid in done.stdout.split()[:3])
    assert os.environ.get("KSANA_LAB_RUN_DIR") is None
