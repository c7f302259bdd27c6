"""Preflight and doctor: each trouble has its finding and its advice."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from helpers_checkpoint import write_hollow

from ksana_lab.cluster import checks
from ksana_lab.config.engine import EngineConfig
from ksana_lab.config.environment import REQUIRED_VARIABLES
from ksana_lab.errors import ConfigError
from ksana_lab.tracing import nsight
from ksana_lab.types import NodeAddr, Role


def config(*, device="cpu", size=1, device_ids=(), **connector):
    return EngineConfig.model_validate(
        {
            "model": {"model_dir": "/m"},
            "parallel": {"tensor_parallel_size": size},
            "runtime": {"device": device, "device_ids": device_ids},
            "connector": connector,
        }
    )


@pytest.fixture
def checkpoint(tmp_path):
    return write_hollow(tmp_path, num_attention_heads=6, head_dim=8)


def test_a_directory_is_written_to_and_left_as_it_was(tmp_path):
    assert checks.directory_is_writable(tmp_path, "trace").level == "ok"
    assert checks.directory_is_writable(tmp_path / "a" / "b", "trace").level == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["/proc/x", "/proc", "file", "file/below"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, where):
    (tmp_path / "file").touch()
    finding = checks.directory_is_writable(tmp_path / where, "--log-dir")
    assert finding.level == "error" and "--log-dir" in finding.text and "cannot be written" in finding.text


@pytest.mark.parametrize(("host", "is_good"), [("127.0.0.1", False), ("0.0.0.0", False), ("127.0.0.2", True)])
def test_the_coordinator_has_a_port_of_its_own(host, is_good):
    asked = config(role="prefill", coordinator_addr=NodeAddr("127.0.0.1", 7000), inference_addr=None)
    assert (checks.ports_differ(host, 7000, asked).level == "ok") == is_good
    assert checks.ports_differ(host, 7001, asked).level == "ok"


@pytest.mark.parametrize(
    ("router", "inference", "coordinator", "level", "key"),
    [
        ("192.0.2.1", "0.0.0.0", "127.0.0.2", "error", "inference_addr"),
        ("127.0.0.1", "127.0.0.1", "0.0.0.0", "error", "coordinator_addr"),
        ("192.0.2.1", "127.0.0.1", "192.0.2.2", "warn", "inference_addr"),
        ("192.0.2.1", "192.0.2.2", "127.0.0.1", "warn", "coordinator_addr"),
        ("127.0.0.1", "192.0.2.2", "127.0.0.1", "warn", "coordinator_addr"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", "ok", "others can call"),
        ("192.0.2.1", "192.0.2.2", "192.0.2.2", "ok", "others can call"),
    ],
)
def test_an_address_that_others_cannot_call_is_named(router, inference, coordinator, level, key):
    hosts = {"router_addr": (router, 9080), "inference_addr": (inference, 8067), "coordinator_addr": (coordinator, 13569)}
    finding = checks.addresses_reach(config(role="prefill", **hosts))[0]
    assert finding.level == level and key in finding.text and (level == "ok" or f"--set connector.{key}=" in finding.advice)


@pytest.fixture
def router_of():
    """A stub router that knows the given nodes; yields a function that starts one."""
    servers = []

    def start(nodes, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = json.dumps({"nodes": nodes}).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return NodeAddr("127.0.0.1", server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_required_variables_each_have_a_finding():
    findings = checks.required_variables({**REQUIRED_VARIABLES, "ENABLE_LAYER_TRACKER": "0"})
    assert [f.level for f in findings] == ["error", "ok", "ok"] and "export ENABLE_LAYER_TRACKER=1" in findings[0].text


def test_proxies_are_named():
    assert checks.proxies({"HTTPS_PROXY": "x", "PATH": "y"}).level == "warn"
    assert "HTTPS_PROXY" in checks.proxies({"HTTPS_PROXY": "x"}).text and checks.proxies({}).level == "ok"


def test_a_port_that_the_router_would_not_call():
    finding = checks.port_agrees(8068, config(inference_addr=("127.0.0.1", 8067)))
    assert finding.level == "error" and "--port 8068 differs" in finding.text
    assert "--port 8067" in finding.advice and "inference_addr=127.0.0.1:8068" in finding.advice


@pytest.mark.parametrize(("host", "level"), [("0.0.0.0", "ok"), ("10.0.0.5", "ok"), ("127.0.0.1", "warn")])
def test_a_host_where_the_router_would_find_nobody(host, level):
    assert checks.host_covers(host, config(inference_addr=("10.0.0.5", 1))).level == level


def test_a_taken_port_names_port_and_process():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        finding = checks.port_is_free("127.0.0.1", sock.getsockname()[1], "HTTP port")
    assert finding.level == "error" and "is taken by" in finding.text and "pid" in finding.text


def test_a_coordinator_of_another_host_is_an_error_with_advice():
    finding = checks.coordinator_is_bindable(config(coordinator_addr=("192.0.2.1", 13571)))
    assert finding.level == "error" and "192.0.2.1 is not an address of this host" in finding.text
    assert "--set connector.coordinator_addr=" in finding.advice and ":13571" in finding.advice


def test_a_coordinator_port_that_is_taken():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        finding = checks.coordinator_is_bindable(config(coordinator_addr=sock.getsockname()))
    assert finding.level == "error" and "coordinator port" in finding.text


def test_a_good_checkpoint(checkpoint):
    assert checks.model_dir(str(checkpoint)).level == "ok"


def test_a_synthetic_checkpoint_may_make_its_weights_on_the_device(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "ksana_lab_synth.json").write_text('{"has_weights": false, "seed": 0}')
    assert checks.model_dir(str(checkpoint)).level == "ok"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "lacks config.json"),
        (lambda d: (d / "config.json").write_text("{"), "lacks config.json"),
        (lambda d: (d / "model.safetensors").unlink(), r"lacks \*\.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
            "lacks model-00001-of-00002.safetensors",
        ),
    ],
)
def test_a_directory_that_is_no_checkpoint_names_what_it_lacks(checkpoint, break_it, message):
    break_it(checkpoint)
    with pytest.raises(ConfigError, match=message):
        checks.refuse([checks.model_dir(str(checkpoint))])


def test_a_model_that_is_missing_no_directory_or_unreadable(checkpoint, monkeypatch):
    assert "does not exist" in checks.model_dir(str(checkpoint / "absent")).text
    assert "is not a directory" in checks.model_dir(str(checkpoint / "config.json")).text
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    assert "cannot be read" in checks.model_dir(str(checkpoint)).text


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"vocab_size": "128"}, {"quantization_config": {"bits": 4}}])
def test_a_model_that_the_engine_has_not_is_found_before_anything_starts(tmp_path, change):
    finding = checks.model_dir(str(write_hollow(tmp_path, **change)))
    assert finding.level == "error" and next(iter(change)) in finding.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "6 attention heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, "6 KV heads"),
        ({"intermediate_size": 90}, "width 90"),
    ],
)
def test_ranks_must_divide_the_heads_and_the_mlp(tmp_path, change, message):
    directory = write_hollow(tmp_path, **{"num_attention_heads": 6, "head_dim": 8} | change)
    four = config(size=4).model_copy(update={"model": config().model.model_copy(update={"model_dir": str(directory)})})
    finding = checks.heads_divide(four)
    assert finding.level == "error" and message in finding.text and "global.tensor_para_size" in finding.text


@pytest.mark.parametrize(
    ("device", "size", "ids", "visible", "level"),
    [
        ("cpu", 8, (), 0, "ok"),
        ("auto", 1, (), 0, "ok"),
        ("auto", 8, (), 0, "error"),  # KsanaLLM's file asks for eight GPUs
        ("cuda", 1, (), 0, "error"),
        ("cuda", 2, (), 1, "error"),
        ("auto", 2, (2, 3), 4, "ok"),
        ("auto", 2, (2, 4), 4, "error"),
        ("cuda", 2, (1,), 4, "error"),
    ],
)
def test_gpus_asked_for_and_absent(device, size, ids, visible, level):
    assert checks.gpus(config(device=device, size=size, device_ids=ids), visible).level == level


def test_an_absent_gpu_is_named_with_what_is_there():
    finding = checks.gpus(config(device="cuda", size=4), 2)
    assert "GPU 2, 3 asked for" in finding.text and "2 visible" in finding.text and "ksana_lab.device=cpu" in finding.advice


def test_no_router_is_a_warning_because_order_does_not_matter():
    finding = checks.router_reachable(NodeAddr("127.0.0.1", 1))
    assert finding.level == "warn" and "no router answers at 127.0.0.1:1" in finding.text


def test_the_references_router_has_no_health_route_and_still_answers(router_of):
    assert checks.router_reachable(router_of([], status=404)).level == "ok"


def test_registration_and_peers(router_of):
    with socket.socket() as peer:
        peer.bind(("127.0.0.1", 0))
        peer.listen()
        address = f"127.0.0.1:{peer.getsockname()[1]}"
        nodes = [
            {"inference_addr": "127.0.0.1:8067", "role": "prefill", "is_online": True, "coordinator_addr": "127.0.0.1:2"},
            {"inference_addr": "127.0.0.1:6890", "role": "decode", "is_online": True, "coordinator_addr": address},
            {"inference_addr": "127.0.0.1:6891", "role": "decode", "is_online": True, "coordinator_addr": "127.0.0.1:1"},
        ]
        router = router_of(nodes)
        node = config(role=Role.PREFILL, router_addr=router, inference_addr=("127.0.0.1", 8067), coordinator_addr=("127.0.0.1", 2))
        findings = checks.registration(node)
    assert [f.level for f in findings] == ["ok", "ok", "ok", "error"]
    assert "127.0.0.1:8067 is online" in findings[1].text and "127.0.0.1:1 cannot be reached" in findings[3].text


def test_a_node_that_the_router_does_not_know(router_of):
    node = config(role=Role.DECODE, router_addr=router_of([]), inference_addr=("127.0.0.1", 5), coordinator_addr=("127.0.0.1", 6))
    assert "not registered" in checks.registration(node)[1].text


def test_advice_on_nccl_is_for_machines_with_two_gpus():
    assert checks.nccl_variables({"NCCL_P2P_DISABLE": "1"}, 1) == []
    assert [f.level for f in checks.nccl_variables({"NCCL_P2P_DISABLE": "1"}, 2)] == ["warn", "ok"]


def test_a_missing_nsys_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_PLACES", ())
    finding = checks.nsys()
    assert finding.level == "warn" and "apt-get install nsight-systems" in finding.text


def test_an_nsys_that_is_not_on_the_path_is_found_all_the_same(monkeypatch, tmp_path):
    nsys = tmp_path / "opt" / "nsys"
    (nsys.parent / "host-linux-x64").mkdir(parents=True)
    nsys.write_text("#!/bin/sh\necho NVIDIA Nsight Systems version 1.2.3\n")
    for path in (nsys, nsys.parent / "host-linux-x64" / "QdstrmImporter"):
        path.touch()
        path.chmod(0o755)
    monkeypatch.setattr(nsight, "_PLACES", (str(tmp_path / "*" / "nsys"),))
    monkeypatch.setattr(nsight.shutil, "which", lambda name, path=None: None)
    assert checks.nsys().level == "ok"


def test_an_nsys_without_its_importer_says_so(monkeypatch, tmp_path):
    nsys = tmp_path / "nsys"
    nsys.write_text("#!/bin/sh\necho NVIDIA Nsight Systems version 1.2.3\n")
    nsys.chmod(0o755)
    monkeypatch.setattr(nsight, "_installed_beside", lambda folder: [])
    monkeypatch.setenv("KSANA_LAB_NSYS", str(nsys))
    finding = checks.nsys()
    assert finding.level == "warn" and "has no importer (QdstrmImporter)" in finding.text
    (tmp_path / "host-linux-x64").mkdir()
    (tmp_path / "host-linux-x64" / "QdstrmImporter").touch()
    assert checks.nsys().level == "ok" and "version 1.2.3, with its importer" in checks.nsys().text


@pytest.mark.parametrize(("lack", "level"), [(None, "ok"), ("holds no ranges of ksana_lab", "warn")])
def test_the_doctor_says_what_a_trial_recording_lacks(monkeypatch, lack, level):
    monkeypatch.setattr(nsight, "find_nsys", lambda: SimpleNamespace(path="nsys", version="nsys 1.2.3"))
    monkeypatch.setattr(nsight, "try_recording", lambda found, has_gpu: lack)
    monkeypatch.setenv("KSANA_LAB_NSYS", "/any/nsys")
    finding = checks.nsys(trial=True)
    assert finding.level == level and (lack or "a trial recording is whole") in finding.text


def test_refuse_lists_every_error_and_passes_warnings():
    checks.refuse([checks.ok("a"), checks.warn("b")])
    with pytest.raises(ConfigError, match="c; do this\nd"):
        checks.refuse([checks.error("c", "do this"), checks.warn("b"), checks.error("d")])


# ---- the optional transfer backend -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "level"), [(Role.DECODE, "error"), (Role.MIXED, "ok")])
def test_nixl_asked_for_and_not_installed_stops_a_node_that_transfers(monkeypatch, role, level):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    finding = checks.transfer_package(config(backend="nixl", role=role))
    assert finding.level == level
    assert level == "ok" or finding.advice == "pip install 'nixl>=1.5'"
    assert checks.transfer_package(config(backend="tcp", role=role)).level == "ok"


def test_the_doctor_says_whether_nixl_can_be_loaded(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert checks.nixl().level == "ok" and "only communication_type nixl needs it" in checks.nixl().text
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(checks.sys, "executable", "/bin/false")
    assert checks.nixl().level == "warn" and "exit code 1" in checks.nixl().text
