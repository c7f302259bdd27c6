"""What can be wrong on a machine before anything starts: one small function for each trouble, each with its advice.

``node_preflight`` and ``process_preflight`` stop a start; ``doctor`` prints everything. GPUs and NCCL are asked of the driver or of a
subprocess: this package never loads torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import psutil

from ksana_lab.cluster import ports
from ksana_lab.cluster.topology import NodeSpec, RouterSpec
from ksana_lab.config.engine import ConnectorOptions, EngineConfig
from ksana_lab.config.environment import (
    INSTALL_NIXL,
    REQUIRED_VARIABLES,
    explain_missing,
    is_proxy,
    missing_variables,
    visible_gpus,
)
from ksana_lab.config.router import RouterConfig
from ksana_lab.errors import CheckpointError, ConfigError
from ksana_lab.models.config import ModelConfig
from ksana_lab.tracing import nsight
from ksana_lab.types import NodeAddr, Role, family_of, is_loopback

Level = Literal["ok", "warn", "error"]
_HTTP_TIMEOUT_S = 3.0


class Finding(NamedTuple):
    level: Level
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5} {self.text}{f'; {self.advice}' if self.advice else ''}"


def ok(text: str) -> Finding:
    return Finding("ok", text)


def warn(text: str, advice: str = "") -> Finding:
    return Finding("warn", text, advice)


def error(text: str, advice: str = "") -> Finding:
    return Finding("error", text, advice)


def errors_of(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def refuse(findings: Sequence[Finding]) -> None:
    """Raises ConfigError with every error among ``findings``, one to a line."""
    wrong = errors_of(findings)
    if wrong:
        raise ConfigError("\n".join(f"{finding.text}{f'; {finding.advice}' if finding.advice else ''}" for finding in wrong))


# ---- environment -----------------------------------------------------------------------------------------------------


def required_variables(env: Mapping[str, str]) -> list[Finding]:
    missing = missing_variables(env)
    findings = [error(explain_missing(name, env)) for name in missing]
    return findings + [ok(f"environment variable {name}={env[name]}") for name in REQUIRED_VARIABLES if name not in missing]


def proxies(env: Mapping[str, str]) -> Finding:
    found = sorted(name for name in env if is_proxy(name))
    if not found:
        return ok("no proxy variables")
    advice = "ksana_lab's own processes ignore them; a client such as curl does not: unset them there, or use curl --noproxy '*'"
    return warn(f"proxy variables are set: {', '.join(found)}", advice)


# ---- addresses -------------------------------------------------------------------------------------------------------


def port_agrees(port: int, config: EngineConfig) -> Finding:
    """The router calls a node at its ``inference_addr``: the server must listen on that port."""
    address = config.connector.inference_addr
    if address is None or address.port == port:
        return ok(f"HTTP port {port}")
    advice = f"give --port {address.port}, or --set connector.inference_addr={address._replace(port=port)}"
    return error(f"--port {port} differs from the port of connector.inference_addr {address}, where the router calls this node", advice)


def host_covers(host: str, config: EngineConfig) -> Finding:
    """The server must listen on the address under which the router calls it."""
    address = config.connector.inference_addr
    if address is None or ports.is_wildcard(host) or host == address.host:
        return ok(f"HTTP host {host}")
    if is_loopback(host) and is_loopback(address.host):
        return ok(f"HTTP host {host}")
    return warn(f"the server listens on {host} but the router calls {address}", f"give --host {address.host} or --host 0.0.0.0")


def addresses_reach(config: EngineConfig) -> list[Finding]:
    """The addresses by which others call this node: no wildcard, and no loopback when they are on other hosts."""
    connector = config.connector
    told = {"inference_addr": connector.inference_addr, "coordinator_addr": connector.coordinator_addr}
    findings = []
    for key, address in told.items():
        found = None if address is None else _reaches_nobody(f"connector.{key} {address}", address, connector)
        if found is not None and address is not None:
            own = _address_towards(connector.router_addr, address.port)
            findings.append(found._replace(advice=f"give the address by which other hosts reach this one: --set connector.{key}={own}"))
    return findings or [ok("others can call the node's addresses")]


def _reaches_nobody(name: str, address: NodeAddr, connector: ConnectorOptions) -> Finding | None:
    router, inference = connector.router_addr, connector.inference_addr
    if ports.is_wildcard(address.host):
        return error(f"{name} is no address that others can call")
    if is_loopback(address.host) and router is not None and not _is_here(router.host):
        return warn(f"{name} means whichever host calls it, and the router {router} is on another")
    if is_loopback(address.host) and inference is not None and not is_loopback(inference.host):
        return warn(f"{name} cannot be reached by nodes of other hosts")
    return None


def _address_towards(router: NodeAddr | None, port: int) -> NodeAddr:
    """This host's own, of the interface that leads to the router. Sends nothing."""
    host = _own_address()
    if router is not None and not _is_here(router.host):
        with contextlib.suppress(OSError), socket.socket(family_of(router.host), socket.SOCK_DGRAM) as probe:
            probe.connect((router.host, router.port))
            host = probe.getsockname()[0]
    return NodeAddr(host, port)


def port_is_free(host: str, port: int, what: str) -> Finding:
    """``what``: which port this is, for the message."""
    try:
        if ports.is_free(host, port):
            return ok(f"{what} {NodeAddr(host, port)} is free")
    except OSError as fault:
        if not _is_here(host):
            return error(f"{what}: {host} is not an address of this host", f"its addresses are {', '.join(addresses())}")
        return error(f"{what} {NodeAddr(host, port)} cannot be bound: {fault.strerror}")
    return error(f"{what} {NodeAddr(host, port)} is taken by {ports.holder(port)}", "end that process, or choose another port")


def coordinator_is_bindable(config: EngineConfig) -> Finding:
    """The control socket binds ``coordinator_addr`` itself: it must be an address of this very host."""
    address = config.connector.coordinator_addr
    if address is None:
        return ok("no coordinator_addr (a mixed node needs none)")
    if not _is_here(address.host):
        own = ", ".join(addresses())
        advice = f"use one of {own}: --set connector.coordinator_addr={_own_address()}:{address.port}"
        return error(f"connector.coordinator_addr {address} cannot be bound: {address.host} is not an address of this host", advice)
    return port_is_free(address.host, address.port, "coordinator port")


def ports_differ(host: str, port: int, config: EngineConfig) -> Finding:
    """Two servers of one node cannot have one port; while neither listens, each finds it free."""
    address = config.connector.coordinator_addr
    if address is None or address.port != port or not (host == address.host or ports.is_wildcard(host) or ports.is_wildcard(address.host)):
        return ok("HTTP and coordinator have ports of their own")
    return error(f"connector.coordinator_addr {address} has the port of the HTTP server", "give one of them another port")


def _is_here(host: str) -> bool:
    try:
        return ports.is_this_host(host)
    except OSError:
        return False


def addresses() -> list[str]:
    """This host's IPv4 addresses, those that others can reach first."""
    found = {a.address for nics in psutil.net_if_addrs().values() for a in nics if a.family == socket.AF_INET}
    return sorted(found, key=lambda ip: (is_loopback(ip), ip))


def _own_address() -> str:
    return addresses()[0]


# ---- directories -----------------------------------------------------------------------------------------------------


def directory_is_writable(path: str | Path, what: str) -> Finding:
    """Tried, for permissions do not tell: a file in it, or where it is absent a directory in the nearest one above. Leaves nothing behind.

    ``what``: the key or option that names it."""
    directory = Path(path).absolute()
    above = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=above) if above == directory else tempfile.TemporaryDirectory(dir=above):
            return ok(f"{what} {path} can be written")
    except OSError as fault:
        return error(f"{what} {path} cannot be written: {fault.strerror or fault}", "name a directory that this user may write")


def trace_dir(path: str | None) -> list[Finding]:
    """Nothing to say of a process that does not trace."""
    return [] if path is None else [directory_is_writable(path, "ksana_lab.trace_dir (--trace)")]


# ---- model -----------------------------------------------------------------------------------------------------------


def model_dir(path: str) -> Finding:
    """A checkpoint in Hugging Face format, of a model that the engine has: config.json, complete safetensors, a tokenizer."""
    directory, key = Path(path), "model_spec.base_model.model_dir"
    advice = "give --model-dir, or make a small one: python -m ksana_lab.models.synth --arch qwen3 --shape tiny --out DIR"
    if not directory.exists():
        return error(f"{key} {path} does not exist", advice)
    if not directory.is_dir():
        return error(f"{key} {path} is not a directory", advice)
    if not os.access(directory, os.R_OK | os.X_OK):
        return error(f"{key} {path} cannot be read by this user", "change its permissions")
    lacking = _what_a_checkpoint_lacks(directory)
    if lacking:
        return error(f"{key} {path} is no checkpoint: it lacks {', '.join(lacking)}", advice)
    try:
        ModelConfig.from_dir(directory)
    except CheckpointError as fault:
        return error(f"{key}: {fault}", advice)
    return ok(f"{key} {path}")


def _what_a_checkpoint_lacks(directory: Path) -> list[str]:
    lacking = [] if _json(directory / "config.json") is not None else ["config.json (readable JSON)"]
    index = _json(directory / "model.safetensors.index.json")
    if index is not None:
        shards = sorted(set(index.get("weight_map", {}).values()))
        lacking += [shard for shard in shards if not (directory / shard).is_file()]
    elif not any(directory.glob("*.safetensors")) and not _makes_its_own_weights(directory):
        lacking.append("*.safetensors (weights)")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        lacking.append("tokenizer.json")
    return lacking


def _makes_its_own_weights(directory: Path) -> bool:
    """``ksana_lab.models.synth`` can write configuration and tokenizer only; random weights are then made on the device."""
    return (_json(directory / "ksana_lab_synth.json") or {}).get("has_weights") is False


def _json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def heads_divide(config: EngineConfig) -> Finding:
    """Heads and MLP are shared out evenly among the ranks. Of a directory that ``model_dir`` refuses there is nothing to say."""
    size = config.parallel.tensor_parallel_size
    try:
        ModelConfig.from_dir(config.model.model_dir).check_tensor_parallel(size)
    except CheckpointError:
        pass
    except ConfigError as fault:
        return error(f"global.tensor_para_size: {fault}", "choose a divisor")
    return ok(f"{size} rank{'s' if size > 1 else ''}")


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def gpus(config: EngineConfig, visible: int) -> Finding:
    """``visible``: how many this process can use."""
    runtime, size = config.runtime, config.parallel.tensor_parallel_size
    if runtime.device == "cpu":
        return ok(f"device cpu, {size} rank{'s' if size > 1 else ''}")
    if runtime.device == "auto" and visible == 0 and size == 1 and not runtime.device_ids:
        return ok("device cpu: no GPU is visible")  # more ranks than one would be GPUs that are absent
    wanted = runtime.device_ids or tuple(range(size))
    absent = [gpu for gpu in wanted if gpu >= visible]
    if absent:
        have = f"{visible} visible" if visible else "none visible"
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        have += f" (CUDA_VISIBLE_DEVICES={chosen})" if chosen is not None else ""
        names = ", ".join(map(str, absent))
        advice = "lower global.tensor_para_size, change ksana_lab.device_ids, or run on the CPU: --set ksana_lab.device=cpu"
        return error(f"GPU {names} asked for (global.tensor_para_size {size}), {have}", advice)
    if len(wanted) != size:
        return error(
            f"ksana_lab.device_ids {list(wanted)} names {len(wanted)} GPUs but global.tensor_para_size is {size}", "make them agree"
        )
    return ok(f"GPUs {', '.join(map(str, wanted))} of {visible} visible")


def torch_runtime(timeout_s: float = 90.0) -> list[Finding]:
    """torch's version, whether it sees GPUs, and NCCL's version, asked in a process of its own."""
    script = (
        "import json, torch; cuda = torch.cuda.is_available(); "
        "print(json.dumps([torch.__version__, torch.version.cuda, cuda, torch.cuda.nccl.version() if cuda else None]))"
    )
    try:
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout_s, check=False)
        version, cuda, has_gpu, nccl = json.loads(run.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return [error("torch cannot be imported", f"{sys.executable} -c 'import torch' shows why")]
    findings = [ok(f"torch {version}{f', CUDA {cuda}' if cuda else ', CPU build'}")]
    if visible_gpus() and not has_gpu:
        findings.append(error("the driver shows GPUs but torch cannot use them", "install a CUDA build of torch that fits the driver"))
    if nccl:
        findings.append(ok(f"NCCL {'.'.join(map(str, nccl))}"))
    return findings


def nccl_variables(env: Mapping[str, str], visible: int) -> list[Finding]:
    """What the environment tells NCCL; the reference's guide sets NCCL_P2P_DISABLE=1 for P and D on one host."""
    if visible < 2:
        return []
    findings = []
    if env.get("NCCL_P2P_DISABLE") == "1":
        advice = "unset it unless GPU peer access hangs on this host"
        findings.append(warn("NCCL_P2P_DISABLE=1: GPUs of this host talk through host memory, many times slower than NVLink", advice))
    if not env.get("NCCL_DEBUG"):
        findings.append(ok("NCCL_DEBUG is not set (export NCCL_DEBUG=INFO when a pair does not connect)"))
    return findings


# ---- transfer --------------------------------------------------------------------------------------------------------


def transfer_package(config: EngineConfig) -> Finding:
    """A backend that is an optional extra must be installed where it is asked for."""
    backend = config.connector.backend
    if backend == "nixl" and config.connector.role.is_disaggregated and importlib.util.find_spec("nixl") is None:
        return error("communication_type nixl: NIXL is not installed", INSTALL_NIXL)
    return ok(f"transfer backend {backend}")


def nixl(timeout_s: float = 60.0) -> Finding:
    """Whether the optional transfer backend can be loaded, tried in a process of its own."""
    if importlib.util.find_spec("nixl") is None:
        return ok(f"NIXL is not installed; only communication_type nixl needs it ({INSTALL_NIXL})")
    script = "import importlib.metadata as m; from ksana_lab.transfer.backends.nixl import load; print(load().__name__, m.version('nixl'))"
    try:
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return warn(f"NIXL could not be loaded within {timeout_s:g} s")
    if run.returncode:
        why = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit code {run.returncode}"
        return warn(f"NIXL is installed and cannot be loaded ({why})", INSTALL_NIXL)
    return ok(f"NIXL {run.stdout.split()[-1]}")


# ---- the others ------------------------------------------------------------------------------------------------------


def _client() -> httpx.Client:
    return httpx.Client(timeout=_HTTP_TIMEOUT_S, trust_env=False)


def router_reachable(address: NodeAddr) -> Finding:
    """Any HTTP answer will do: the reference's router has no GET routes and says 404."""
    try:
        with _client() as client:
            status = client.get(f"http://{address}/health").status_code
    except httpx.HTTPError as fault:
        advice = f"start it: python -m ksana_lab.launch router --host {address.host} --port {address.port}"
        return warn(f"no router answers at {address} ({type(fault).__name__})", f"{advice} (start-up order does not matter)")
    return ok(f"router at {address} answers ({status})")


def registration(config: EngineConfig) -> list[Finding]:
    """Whether the router knows this node, and whether this node's host reaches the peers the router knows."""
    router, own = config.connector.router_addr, config.connector.inference_addr
    if router is None:
        return [ok("no router_addr: this node serves alone")]
    answer = router_reachable(router)
    nodes = _nodes(router) if answer.level == "ok" else None
    if nodes is None:
        return [answer]
    known = [node for node in nodes if node.get("inference_addr") == str(own)]
    state = "online" if any(node.get("is_online") for node in known) else "offline" if known else "not registered"
    advice = "" if state == "online" else "it registers itself within a heartbeat of its start"
    found = ok(f"{own} is {state} at the router") if state == "online" else warn(f"{own} is {state} at the router", advice)
    return [answer, found, *peers_reachable(config, nodes)]


def _nodes(router: NodeAddr) -> list[dict[str, Any]] | None:
    try:
        with _client() as client:
            answer = client.get(f"http://{router}/nodes")
            nodes = answer.json().get("nodes") if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError, AttributeError):
        return None
    return [node for node in nodes if isinstance(node, dict)] if isinstance(nodes, list) else None


def peers_reachable(config: EngineConfig, nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A TCP connection to the coordinator of every node of the opposite role."""
    opposite = {Role.PREFILL: "decode", Role.DECODE: "prefill"}.get(config.connector.role)
    peers = [node for node in nodes if node.get("role") == opposite and node.get("is_online") and node.get("coordinator_addr")]
    return [_reach(str(node["coordinator_addr"]), f"{opposite} node {node.get('inference_addr')}") for node in peers]


def _reach(address: str, what: str) -> Finding:
    try:
        host, port = NodeAddr.parse(address)
        socket.create_connection((host, port), timeout=_HTTP_TIMEOUT_S).close()
    except (OSError, ValueError) as fault:
        advice = "open the port in the firewall between the hosts"
        if is_loopback(address.rpartition(":")[0].strip("[]")):
            advice = "start that node with a coordinator_addr that other hosts reach"
        return error(f"{what}: its coordinator {address} cannot be reached ({fault})", advice)
    return ok(f"{what}: coordinator {address} reachable")


# ---- tools -----------------------------------------------------------------------------------------------------------


def nsys(*, trial: bool = False, has_gpu: bool = False) -> Finding:
    """Nsight Systems is optional: the event log makes every figure without it; it adds GPU rows. ``trial``: also record something."""
    try:
        found = nsight.find_nsys()
        version = found.version.splitlines()[-1] if found.version else ""
        if not version:
            return warn(f"{found.path} --version says nothing", "reinstall Nsight Systems")
        if not trial:
            return ok(f"nsys: {version}, with its importer (doctor --nsys tries a recording)")
        lack = nsight.try_recording(found, has_gpu=has_gpu)
    except (ConfigError, OSError) as fault:
        return warn(str(fault))
    return warn(f"nsys: {version}: the report of a trial {lack}") if lack else ok(f"nsys: {version}: a trial recording is whole")


# ---- together --------------------------------------------------------------------------------------------------------


def node_preflight(config: EngineConfig, host: str, port: int, visible: int) -> list[Finding]:
    """Everything that would stop this node, before it starts."""
    sockets = [port_is_free(host, port, "HTTP port"), coordinator_is_bindable(config), ports_differ(host, port, config)]
    called = [port_agrees(port, config), host_covers(host, config), *addresses_reach(config)]
    return [*called, *sockets, *_resources(config, visible)]


def _resources(config: EngineConfig, visible: int) -> list[Finding]:
    files = [model_dir(config.model.model_dir), *trace_dir(config.runtime.trace_dir)]
    return [*files, heads_divide(config), gpus(config, visible), transfer_package(config)]


def router_preflight(config: RouterConfig) -> list[Finding]:
    """Everything that would stop the router, before it starts."""
    return [port_is_free(config.host, config.port, "router port"), *trace_dir(config.trace_dir)]


def process_preflight(spec: RouterSpec | NodeSpec, visible: int) -> list[Finding]:
    """Everything that would stop one process of a plan on this host."""
    if isinstance(spec, RouterSpec):
        return router_preflight(spec.config)
    return node_preflight(spec.config, spec.host, spec.inference_addr.port, visible)


def doctor(config: EngineConfig | None, env: Mapping[str, str], host: str | None = None, try_nsys: bool = False) -> list[Finding]:
    """Every check, in the order in which one would look. Without a node's configuration: the machine alone, with the guide's ports."""
    visible = visible_gpus(env)
    findings = [*required_variables(env), proxies(env)]
    findings += _machine(visible) if config is None else _node(config, visible, host)
    return [*findings, *torch_runtime(), *nccl_variables(env, visible), nixl(), nsys(trial=try_nsys, has_gpu=visible > 0)]


def _machine(visible: int) -> list[Finding]:
    findings = [
        port_is_free("127.0.0.1", port, what) for port, what in ((9080, "router port"), (8067, "prefill port"), (6890, "decode port"))
    ]
    may_be_ours = [finding._replace(level="warn") if finding.level == "error" else finding for finding in findings]
    return [*may_be_ours, ok(f"{visible} GPU{'' if visible == 1 else 's'} visible")]


def _node(config: EngineConfig, visible: int, host: str | None) -> list[Finding]:
    """A node that the router calls online holds its own ports; then they are not asked for."""
    registered = registration(config)
    address = config.connector.inference_addr or NodeAddr("127.0.0.1", 8080)
    if any("is online at the router" in finding.text for finding in registered):
        return [*_resources(config, visible), *registered]
    return [*node_preflight(config, host or address.host, address.port, visible), *registered]
