"""The command line: every way to be refused ends with a clear line, exit code 2, and nothing started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers_checkpoint import write_hollow

from ksana_lab import launch
from ksana_lab.config.environment import REQUIRED_VARIABLES

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = Path(__file__).parents[1] / "data" / "ksana_examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """main(), with the required variables set, nothing startable, and this process's log left alone."""
    monkeypatch.setattr(launch.log_format, "setup", lambda *args, **kwargs: None)
    monkeypatch.setattr(launch, "ChildProcess", None)
    for name, value in REQUIRED_VARIABLES.items():
        monkeypatch.setenv(name, value)

    def call(*arguments):
        try:
            code = launch.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def node(tmp_path):
    """A node's options that nothing stands in the way of, on free ports; no router answers at its router's."""
    write_hollow(tmp_path)
    addresses = zip(("inference_addr", "coordinator_addr", "router_addr"), free_ports(3), strict=True)
    sets = [*(f"{name}=127.0.0.1:{port}" for name, port in addresses), "device=cpu"]
    options = [part for text in sets for part in ("--set", text)]
    return ["--config_file", CONFIGS / "prefill_cpu.yaml", "--model-dir", tmp_path, *options]


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    for sock in held:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


@pytest.mark.parametrize("name", list(REQUIRED_VARIABLES))
def test_a_node_without_a_required_variable_stops_with_one_line(run, node, monkeypatch, name):
    monkeypatch.delenv(name)
    code, _, err = run("prefill", *node)
    assert code == 2 and err.count("\n") == 1
    assert f"environment variable {name} is not set; run: export {name}={REQUIRED_VARIABLES[name]}" in err


def test_the_role_of_the_command_must_be_that_of_the_file(run, node):
    code, _, err = run("decode", *node)
    assert code == 2 and "the command is decode but" in err and "group_role prefill; run `prefill` instead" in err
    assert run("mixed", *node)[0] == 2


def test_a_port_that_is_not_inference_addrs(run, node):
    code, _, err = run("prefill", *node, "--port", 1234)
    assert code == 2 and "--port 1234 differs from the port of connector.inference_addr" in err


def test_a_taken_port_names_the_process(run, node):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        code, _, err = run("prefill", *node, "--set", f"inference_addr=127.0.0.1:{port}")
    assert code == 2 and f"HTTP port 127.0.0.1:{port} is taken by" in err and f"pid {os.getpid()}" in err


def test_a_coordinator_of_another_host(run, node):
    code, _, err = run("prefill", *node, "--set", "coordinator_addr=192.0.2.1:13571")
    assert code == 2 and "cannot be bound" in err and "--set connector.coordinator_addr=" in err


def test_a_model_dir_that_is_missing_and_gpus_that_are_absent_are_both_named(run, node):
    code, _, err = run("prefill", *node, "--model-dir", "/no/such/model", "--set", "device=cuda", "--set", "device_ids=[77]")
    assert code == 2 and "/no/such/model does not exist" in err and "GPU 77 asked for" in err


def test_a_trace_directory_that_cannot_be_written(run, node):
    code, _, err = run("prefill", *node, "--set", "ksana_lab.trace_dir=/proc/x")
    assert code == 2 and "ksana_lab.trace_dir (--trace) /proc/x cannot be written" in err and "Traceback" not in err
    assert "trace_dir" in run("doctor", *node, "--trace", "/proc/x")[1]


def test_a_coordinator_at_the_http_port(run, node):
    (port,) = free_ports(1)
    both = ("--set", f"inference_addr=127.0.0.1:{port}", "--set", f"coordinator_addr=127.0.0.1:{port}")
    code, _, err = run("prefill", *node, *both)
    assert code == 2 and f"coordinator_addr 127.0.0.1:{port} has the port of the HTTP server" in err


@pytest.mark.parametrize("option", ["--model-dir", "--tokenizer_path", "--trace"])
@pytest.mark.parametrize("name", ["a #b", "{x}", "k: v", "1e3"])
def test_a_directory_is_taken_as_it_is_written(run, node, tmp_path, monkeypatch, option, name):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("prefill", *node, option, name, "--dry-run")
    key = {"--model-dir": "model_dir", "--tokenizer_path": "tokenizer_dir", "--trace": "trace_dir"}[option]
    sections = yaml.safe_load(out.partition("# ---- processes")[0])
    (shown,) = [section[key] for section in sections.values() if key in section]
    assert code == 0 and shown in (name, str(tmp_path / name))


def test_a_home_directory_is_filled_in(run, node, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = ("--model-dir", "~/m", "--trace", "~/t", "--set", "ksana_lab.tokenizer_dir=~/k")
    _, out, _ = run("prefill", *node, *said, "--dry-run")
    assert all(f"dir: {tmp_path}/{name}\n" in out for name in "mtk")
    assert f"trace_dir: {tmp_path}/t\n" in run("cluster", CONFIGS / "pd_1p1d_cpu.yaml", "--trace", "~/t", "--dry-run")[1]
    assert f"trace_dir: {tmp_path}/t\n" in run("router", "--trace", "~/t", "--dry-run")[1]


def test_an_option_needs_no_placeholder_of_the_file(run, node, tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text((CONFIGS / "prefill_cpu.yaml").read_text().replace(".cache/tiny", '"{SOME_DIR}"'))
    code, out, _ = run("prefill", *node, "--config_file", file, "--dry-run")
    assert code == 0 and f"model_dir: {tmp_path}" in out and "SOME_DIR" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill"], "--config_file"),
        (["prefill", "--config_file", "absent.yaml"], "cannot read absent.yaml"),
        (["prefill", "--config_file", EXAMPLES / "ksana_llm_disaggregating_prefill.yaml"], "give --router-ip"),
        (
            ["prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", "--set", "max_batchsize=1"],
            "did you mean batch_scheduler.max_batch_size",
        ),
        (["prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", "--endpoint", "rpc"], "--endpoint rpc"),
        (["prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", "--ssl_keyfile", "k"], "--ssl_keyfile is not supported: TLS"),
        (["prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", "--enable-auto-tool-choice"], "tool calls are not parsed"),
        (["prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", "--prot", "1"], "unrecognized arguments: --prot"),
        (["cluster", "absent.yaml"], "cannot read absent.yaml"),
        (
            ["cluster", CONFIGS / "pd_1p1d_cpu.yaml", "--model-dir", "/no/such/model"],
            "prefill0, decode0: model_spec.base_model.model_dir /no/such",
        ),
        (["cluster", CONFIGS / "pd_1p1d_cpu.yaml", "--only", "decode7", "--dry-run"], "the processes are router, prefill0, decode0"),
        (["cluster", CONFIGS / "pd_1p1d_cpu.yaml", "--trace", "/proc/x"], "trace_dir (--trace) /proc/x cannot be written"),
        (["cluster", CONFIGS / "pd_1p1d_cpu.yaml", "--log-dir", "/proc/x"], "log_dir (--log-dir) /proc/x cannot be written"),
        (["router", "--port", "0", "--trace", "/proc/x"], "trace_dir (--trace) /proc/x cannot be written"),
        (["router", "--workers", "6"], "one asyncio process"),
        (["router", "--config", "absent.ini"], "cannot read absent.ini"),
        (["router", "--policy", "best"], "invalid choice: 'best'"),
        (["router", "--port", "70000"], "port: input should be less than or equal to 65535, got 70000"),
        (["rooter"], "invalid choice: 'rooter'"),
    ],
)
def test_a_mistake_on_the_command_line(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err


def test_a_taken_router_port(run):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        code, _, err = run("router", "--port", sock.getsockname()[1])
    assert code == 2 and "router port" in err and "is taken by" in err


def test_dry_run_of_a_node_prints_configuration_and_plan_and_starts_nothing(run, node):
    code, out, err = run("prefill", *node, "--set", "global.tensor_para_size=2", "--set", "mtp_step_num=2", "--dry-run")
    assert code == 0 and "tensor_parallel_size: 2" in out and "role: prefill" in out
    assert "rank 1      CPU" in out and "coordinator   tcp://127.0.0.1:" in out and "router        http://127.0.0.1:" in out
    assert "warning: batch_scheduler.mtp_step_num: 2 is not implemented" in err and "would refuse" not in err


def test_dry_run_shows_what_would_be_refused(run):
    code, out, err = run("prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", "--model-dir", "/no/such/model", "--dry-run")
    assert code == 0 and "api server    http://127.0.0.1:8067" in out
    assert "would refuse to start: model_spec.base_model.model_dir /no/such/model does not exist" in err


def test_dry_run_of_a_cluster_prints_the_process_port_and_gpu_plan(run):
    code, out, _ = run("cluster", CONFIGS / "pd_1p1d_h200.yaml", "--dry-run", "--set", "nodes.decode.device_ids=[3]")
    assert code == 0 and "# ---- decode0" in out
    plan = out[out.index("process ") :].splitlines()
    assert plan[2].split()[:3] == ["prefill0", "prefill", "127.0.0.1"] and plan[2].endswith("GPU 0") and plan[3].endswith("GPU 3")
    assert "6890" in plan[3] and "13571" in plan[3]


def test_dry_run_of_the_router_hides_the_password(run):
    code, out, _ = run("router", "--dry-run", "--database-url", "mysql+pymysql://u:secret@db/x", "--policy", "random")
    assert code == 0 and "secret" not in out and "policy: random" in out


def test_options_reach_the_configuration(run, node, tmp_path):
    code, out, _ = run("prefill", *node, "--tokenizer_path", "/tok", "--trace", tmp_path / "t", "--host", "0.0.0.0", "--dry-run")
    assert code == 0 and "tokenizer_dir: /tok" in out and f"trace_dir: {tmp_path / 't'}" in out and "http://0.0.0.0:" in out


def test_addresses_that_a_file_writes_out_get_the_hosts_of_the_options(run, tmp_path):
    path = write_hollow(tmp_path)
    options = ("--model-dir", path, "--router-ip", "10.0.0.1", "--prefill-ip", "[fd00::2]", "--decode-ip", "10.0.0.3")
    _, out, _ = run("prefill", "--config_file", CONFIGS / "prefill_cpu.yaml", *options, "--set", "coordinator_addr=10.9.9.9:7", "--dry-run")
    assert "http://10.0.0.1:9080" in out and "inference_addr: '[fd00::2]:8067'" in out and "coordinator_addr: 10.9.9.9:7" in out


def test_the_references_files_run_dry_unmodified(run):
    ips = ("--router-ip", "127.0.0.1", "--prefill-ip", "127.0.0.1", "--decode-ip", "127.0.0.1")
    for role in ("prefill", "decode"):
        code, out, _ = run(role, "--config_file", EXAMPLES / f"ksana_llm_disaggregating_{role}.yaml", *ips, "--dry-run")
        assert code == 0 and f"role: {role}" in out


def test_doctor_fails_on_what_would_stop_a_node_and_names_the_remedy(run, node, monkeypatch):
    monkeypatch.delenv("ENABLE_LAYER_TRACKER")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setattr(launch.checks, "torch_runtime", lambda: [])  # seconds; tested below
    code, out, _ = run("doctor", *node, "--model-dir", "/no/such/model")
    lines = out.splitlines()
    assert code == 1 and any(line.startswith("error") and "export ENABLE_LAYER_TRACKER=1" in line for line in lines)
    assert any(line.startswith("warn") and "http_proxy" in line for line in lines)
    assert any(line.startswith("error") and "/no/such/model" in line for line in lines)
    assert any(line.startswith("warn") and "no router answers" in line for line in lines)


def test_doctor_is_content_with_a_machine_that_is_in_order(run, node):
    code, out, _ = run("doctor", *node)
    assert code == 0 and "error" not in out and "torch 2" in out and "nsys" in out


def test_doctor_reports_a_file_it_cannot_read(run, monkeypatch):
    monkeypatch.setattr(launch.checks, "torch_runtime", lambda: [])
    code, out, _ = run("doctor", "--config_file", "absent.yaml")
    assert code == 1 and "cannot read absent.yaml" in out


def test_help_names_every_command_but_the_engines():
    shown = subprocess.run(
        [sys.executable, "-m", "ksana_lab.launch", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert all(word in shown for word in ("router", "prefill", "decode", "mixed", "cluster", "doctor")) and "engine" not in shown
