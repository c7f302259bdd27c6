"""Router, prefill and decode on three hosts of their own: network namespaces behind a bridge, each with its own hostname, process ids, /run
and /dev/shm. They share a kernel and so its boot id, as containers do. Needs root and iproute2; skipped elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ksana_lab.config.environment import child_environment
from ksana_lab.engine.llm import LLM
from ksana_lab.models.synth import synthesize
from ksana_lab.types import SamplingParams

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.integration
PROMPTS = [list(range(20, 20 + length)) for length in (5, 40, 300)]
SUBNET = "10.77.0"
ASK = """import sys, urllib.request as http
opener = http.build_opener(http.ProxyHandler({}))
sys.stdout.buffer.write(opener.open(sys.argv[1], sys.stdin.buffer.read() or None, 30).read())"""


class Hosts:
    """``names`` get the addresses 10.77.0.1, .2, … All of them go with their first process, which ``close`` ends."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.directory, self._switch = directory, f"kl{os.getpid()}sw"
        self.address = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
        self._namespaces: list[str] = []
        self._first: dict[str, int] = {}  # the process that holds a host's namespaces
        self._started: list[subprocess.Popen] = []

    def open(self) -> None:
        """Raises OSError or CalledProcessError where this cannot be done."""
        self._add_namespace(self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "up", "type", "bridge")
        for name, address in self.address.items():
            namespace = f"kl{os.getpid()}{name}"
            self._add_namespace(namespace)
            _ip("-n", self._switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", self._switch, "link", "set", name, "master", "br0", "up")
            for what in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):
                _ip("-n", namespace, *what)
            self._start_first_process(name, namespace)

    def _add_namespace(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)

    def _start_first_process(self, name: str, namespace: str) -> None:
        keeps = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && echo up && exec sleep 600"
        holder = subprocess.Popen(["ip", "netns", "exec", namespace, *keeps, "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        self._started.append(holder)
        if holder.stdout is None or holder.stdout.readline() != "up\n":
            raise OSError(f"no mount namespace for {name}")
        self._first[name] = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])

    def command(self, name: str, *words: object) -> list[str]:
        return ["nsenter", "-t", str(self._first[name]), "-m", "-u", "-n", "-p", sys.executable, *map(str, words)]

    def start(self, name: str, *arguments: object) -> None:
        env = child_environment(os.environ, {"TMPDIR": "/run", "PYTHONPATH": str(CONFIGS.parent)})  # a /run of its own
        with self.log(name).open("wb") as log:
            command = self.command(name, "-m", "ksana_lab.launch", *arguments)
            self._started.append(subprocess.Popen(command, env=env, stderr=log))

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def ask(self, path: str, body: object = None) -> dict:
        """As a client on the router's own host."""
        url, data = f"http://{self.address['router']}:9080{path}", b"" if body is None else json.dumps(body).encode()
        answer = subprocess.run(self.command("router", "-c", ASK, url), input=data, capture_output=True, timeout=60, check=True)
        return json.loads(answer.stdout)

    def close(self) -> None:
        for pid in self._first.values():
            os.kill(pid, 9)  # the first of a process namespace takes all of it along
        for process in self._started:
            process.kill()
            process.wait(10)
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path):
    lacking = [tool for tool in ("ip", "unshare", "nsenter", "hostname") if shutil.which(tool) is None]
    if os.geteuid() or lacking:
        pytest.skip(f"hosts are made of namespaces: needs root{f' and {lacking}' if lacking else ''}")
    opened = Hosts(tmp_path, "router", "prefill", "decode")
    try:
        try:
            opened.open()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no network namespaces: {getattr(error, 'stderr', None) or error}")
        yield opened
    finally:
        opened.close()


def start_node(hosts: Hosts, role: str, model: Path, http: int, coordinator: int, *more: str) -> None:
    own = hosts.address[role]
    addresses = {
        "router_addr": f"{hosts.address['router']}:9080",
        "inference_addr": f"{own}:{http}",
        "coordinator_addr": f"{own}:{coordinator}",
        "heartbeat_interval_ms": 200,
    }
    settings = [word for key, value in addresses.items() for word in ("--set", f"{key}={value}")]
    hosts.start(role, role, "--config_file", CONFIGS / f"{role}_cpu.yaml", "--model-dir", model, *settings, *more)


def is_routable(hosts: Hosts) -> bool:
    try:
        return any(pair["is_routable"] for pair in hosts.ask("/nodes")["pairs"])
    except subprocess.CalledProcessError:
        return False


def test_a_pair_on_hosts_of_their_own_gives_one_nodes_tokens_and_goes_by_tcp(hosts, tmp_path):
    model = synthesize(tmp_path / "tiny")
    start_node(hosts, "decode", model, 6890, 13571)
    start_node(hosts, "prefill", model, 8067, 13569)
    hosts.start("router", "router", "--host", hosts.address["router"], "--database-url", f"sqlite:///{tmp_path / 'router.db'}")
    with LLM(model, device="cpu") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    deadline = time.monotonic() + 60
    while not is_routable(hosts):
        assert time.monotonic() < deadline, "\n".join(hosts.log(name).read_text() for name in hosts.address)
        time.sleep(0.1)
    sampling = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = hosts.ask("/generate", {"input_tokens": prompt, "stream": False, "sampling_config": sampling})
        assert answer["output_token_ids"][0] == output.outputs[0].token_ids
    assert f"rank 0 reaches rank 0 of {hosts.address['decode']}:6890 by tcp" in hosts.log("prefill").read_text()
