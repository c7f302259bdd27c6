"""Router, prefill and decode started by hand as in the startup guide: any order, and whatever ends one leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from ksana_lab.cluster.ports import is_free
from ksana_lab.config.environment import child_environment
from ksana_lab.models.synth import synthesize

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.integration
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    for sock in held:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


class Terminals:
    """Three terminals: each ``start`` is a command typed into one of them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.model = directory, synthesize(directory / "tiny")
        names = ("router", "prefill", "decode", "prefill.coordinator", "decode.coordinator")
        self.ports = dict(zip(names, free_ports(5), strict=True))
        self.running: dict[str, subprocess.Popen] = {}

    def start(self, name):
        arguments = ["--port", str(self.ports[name])]
        if name == "router":
            arguments += ["--database-url", f"sqlite:///{self.directory / 'router.db'}"]
        else:
            addresses = {"router_addr": "router", "inference_addr": name, "coordinator_addr": f"{name}.coordinator"}
            arguments += ["--config_file", str(CONFIGS / f"{name}_cpu.yaml"), "--model-dir", str(self.model)]
            arguments += [word for key, port in addresses.items() for word in ("--set", f"{key}=127.0.0.1:{self.ports[port]}")]
            arguments += ["--set", "heartbeat_interval_ms=200"]
        command = [sys.executable, "-m", "ksana_lab.launch", name, *arguments]
        log = (self.directory / f"{name}.log").open("wb")
        with log:
            process = subprocess.Popen(command, env=child_environment(os.environ), stderr=log, start_new_session=True)
        self.running[name] = process
        return process

    def log(self, name):
        return (self.directory / f"{name}.log").read_text()

    def get(self, path):
        with OPENER.open(f"http://127.0.0.1:{self.ports['router']}{path}", timeout=10) as answer:
            return json.load(answer)

    def is_routable(self):
        try:
            return any(pair["is_routable"] for pair in self.get("/nodes")["pairs"])
        except OSError:
            return False

    def generate(self):
        body = {"input_tokens": [5, 6, 7, 8], "stream": False, "sampling_config": {"max_new_tokens": 6, "ignore_eos": True}}
        url = f"http://127.0.0.1:{self.ports['router']}/generate"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        with OPENER.open(request, timeout=60) as answer:
            return json.load(answer)["output_token_ids"][0]

    def family(self, name):
        process = psutil.Process(self.running[name].pid)
        return [process, *process.children(recursive=True)]

    def close(self):
        for process in self.running.values():
            process.kill()
            process.wait(10)


@pytest.fixture(scope="module")
def terminals(tmp_path_factory):
    opened = Terminals(tmp_path_factory.mktemp("terminals"))
    yield opened
    opened.close()


def eventually(condition, timeout_s=60.0):
    """Other programs' processes: nothing to wait on but what they do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


# The tests below share the three processes and run in this order.


def test_start_up_order_does_not_matter(terminals):
    for name in ("decode", "prefill"):
        terminals.start(name)
    eventually(lambda: "registrar: " in terminals.log("prefill"))  # it has tried, and found no router
    terminals.start("router")
    eventually(terminals.is_routable)
    assert len(terminals.generate()) == 6


def test_doctor_finds_the_running_cluster_in_order(terminals):
    options = ["--config_file", str(CONFIGS / "decode_cpu.yaml"), "--model-dir", str(terminals.model)]
    options += [
        "--set",
        f"router_addr=127.0.0.1:{terminals.ports['router']}",
        "--set",
        f"inference_addr=127.0.0.1:{terminals.ports['decode']}",
    ]
    command = [sys.executable, "-m", "ksana_lab.launch", "doctor", *options]
    done = subprocess.run(command, env=child_environment(os.environ), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert (
        "is online at the router" in done.stdout
        and f"coordinator 127.0.0.1:{terminals.ports['prefill.coordinator']} reachable" in done.stdout
    )


def test_a_killed_node_leaves_no_orphan_and_takes_part_again_when_restarted(terminals):
    expected, processes = terminals.generate(), terminals.family("prefill")
    assert len(processes) >= 2
    os.kill(processes[0].pid, signal.SIGKILL)
    terminals.running["prefill"].wait(10)
    assert gone(processes[1:])
    eventually(lambda: is_free("127.0.0.1", terminals.ports["prefill"]) and is_free("127.0.0.1", terminals.ports["prefill.coordinator"]), 5)
    eventually(lambda: not terminals.is_routable())
    terminals.start("prefill")
    eventually(terminals.is_routable)
    assert terminals.generate() == expected


def test_a_dead_engine_ends_its_node_with_its_last_lines(terminals):
    node, engine, *_ = terminals.family("decode")
    os.kill(engine.pid, signal.SIGKILL)
    assert terminals.running["decode"].wait(20) == 1
    assert "error: engine was ended by SIGKILL" in terminals.log("decode") and "  engine | " in terminals.log("decode")
    assert gone([node, engine])


def test_ctrl_c_ends_each_in_order(terminals):
    for name in ("prefill", "router"):
        processes = terminals.family(name)
        os.kill(processes[0].pid, signal.SIGINT)
        assert terminals.running[name].wait(20) in (0, 130), terminals.log(name)
        assert gone(processes[1:])
        assert "Traceback" not in terminals.log(name)
    assert all(is_free("127.0.0.1", port) for port in terminals.ports.values())


@pytest.fixture
def foreground(tmp_path, terminals):
    """``launch cluster`` on a mixed node, ready; yields (process, the cluster's processes, its stderr so far)."""
    log = tmp_path / "cluster.log"
    command = [sys.executable, "-m", "ksana_lab.launch", "cluster", str(CONFIGS / "mixed_cpu.yaml"), "--model-dir", str(terminals.model)]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=dict(os.environ), stderr=sink, start_new_session=True)
    try:
        eventually(lambda: "ready: http://127.0.0.1:" in log.read_text() or process.poll() is not None)
        yield process, psutil.Process(process.pid).children(recursive=True), log
    finally:
        process.kill()
        process.wait(10)


def test_a_cluster_in_the_foreground_ends_with_a_dead_child_and_shows_its_last_lines(foreground):
    cluster, processes, log = foreground
    (engine,) = [p for p in processes if "engine" in p.cmdline()]
    engine.kill()
    assert cluster.wait(30) == 1 and gone(processes)
    shown = log.read_text()
    assert "error: mixed0 ended with exit code 1" in shown and "engine was ended by SIGKILL" in shown


def test_sigterm_ends_a_cluster_in_the_foreground_in_order(foreground):
    cluster, processes, log = foreground
    cluster.terminate()
    assert cluster.wait(30) == 143 and gone(processes) and "Traceback" not in log.read_text()
