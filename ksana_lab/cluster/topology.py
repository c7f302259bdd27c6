"""Which process runs on which host, port and GPU, worked out before anything starts. Pure: opens no socket, starts nothing.

Refuses a port or a GPU that two processes would share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ksana_lab.cluster.ports import is_wildcard
from ksana_lab.config import ksana_yaml, yaml_file
from ksana_lab.config.cluster import ClusterConfig, NodeGroup
from ksana_lab.config.engine import EngineConfig
from ksana_lab.config.overrides import leaves, merge, put
from ksana_lab.config.router import RouterConfig
from ksana_lab.errors import ConfigError
from ksana_lab.types import NodeAddr, Role

PortChooser = Callable[[str], int]  # host -> a free port there


@dataclass(frozen=True)
class RouterSpec:
    """The router's process."""

    config: RouterConfig
    advertised: NodeAddr  # where nodes and clients find it
    name: str = "router"

    @property
    def host(self) -> str:
        return self.config.host

    @property
    def ports(self) -> dict[str, int]:
        return {"http": self.config.port}

    @property
    def url(self) -> str:
        return f"http://{self.advertised}"

    def arguments(self, config_path: Path) -> list[str]:
        """What follows ``python -m ksana_lab.launch``."""
        return ["router", "--config", str(config_path)]

    def config_text(self) -> str:
        return yaml_file.dump({key: value for key, value in self.config.model_dump().items() if value is not None})


@dataclass(frozen=True)
class NodeSpec:
    """One node's process; engine and ranks are its own children. ``tree`` is its file in KsanaLLM's spelling, ``config`` its meaning."""

    name: str
    host: str
    tree: dict[str, Any] = field(repr=False)
    config: EngineConfig = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def role(self) -> Role:
        return self.config.connector.role

    @property
    def inference_addr(self) -> NodeAddr:
        assert self.config.connector.inference_addr is not None
        return self.config.connector.inference_addr

    @property
    def coordinator_addr(self) -> NodeAddr | None:
        return self.config.connector.coordinator_addr

    @property
    def ports(self) -> dict[str, int]:
        ports = {"http": self.inference_addr.port}
        return ports if self.coordinator_addr is None else {**ports, "coordinator": self.coordinator_addr.port}

    @property
    def device_ids(self) -> tuple[int, ...]:
        return self.config.runtime.device_ids

    @property
    def url(self) -> str:
        return f"http://{self.inference_addr}"

    def arguments(self, config_path: Path) -> list[str]:
        """What follows ``python -m ksana_lab.launch``."""
        return [self.role.value, "--config_file", str(config_path), "--host", self.host, "--port", str(self.inference_addr.port)]

    def config_text(self) -> str:
        return yaml_file.dump(self.tree)


@dataclass(frozen=True)
class Plan:
    router: RouterSpec
    nodes: tuple[NodeSpec, ...]

    @property
    def processes(self) -> tuple[RouterSpec | NodeSpec, ...]:
        return (self.router, *self.nodes)

    @property
    def warnings(self) -> list[str]:
        """Each sentence once, however many nodes it concerns."""
        return list(dict.fromkeys(warning for node in self.nodes for warning in node.warnings))

    def pairs(self) -> list[tuple[NodeSpec, NodeSpec]]:
        """Every (prefill, decode)."""
        prefills = [node for node in self.nodes if node.role is Role.PREFILL]
        return [(p, d) for p in prefills for d in self.nodes if d.role is Role.DECODE]

    def table(self) -> str:
        """The process, port and GPU plan, as text."""
        rows: list[tuple[str, ...]] = [("process", "role", "host", "ports", "ranks", "devices")]
        rows += [_row(process) for process in self.processes]
        return "\n".join(_aligned(rows))


def plan(
    cluster: ClusterConfig,
    *,
    choose_port: PortChooser,
    num_gpus: int = 0,
    num_cores: int = 1,
    trace_dir: str | None = None,
    source: str = "cluster",
) -> Plan:
    """Lay a cluster out. ``choose_port(host)`` gives a port where the file says auto; ``num_gpus`` and ``num_cores`` are those of a host.

    Raises ConfigError for a port or GPU given twice, and for anything wrong in a node's own settings (named with its group)."""
    return _Planner(cluster, _Ports(choose_port), num_gpus, trace_dir, source).plan(num_cores)


def refuse_contradictions(cluster: ClusterConfig, source: str) -> None:
    """A size or GPUs given in the words of a group and, otherwise, in KsanaLLM's: the group's would win without a word. Over a
    ``config_file`` they may. Raises ConfigError."""
    for name, group in cluster.nodes.items():
        size, said = group.tensor_parallel_size, _get(_settings(cluster, group), _TP_SIZE)
        where = f"{source}: nodes.{name}"
        if size is not None and said not in (None, size):
            advice = f"leave one of them out, or --set nodes.{name}.tensor_parallel_size={said}"
            raise ConfigError(f"{where}: tensor_parallel_size is {size} but global.tensor_para_size is {said}; {advice}")
        if group.device_ids and (gpus := _get(_settings(cluster, group), ("ksana_lab", "device_ids"))):
            raise ConfigError(f"{where}: its device_ids are given, and ksana_lab.device_ids {list(gpus)}; leave one of them out")


class _Planner:
    """What is decided while a cluster is laid out: explicit ports and GPUs first, then the chosen ones around them."""

    def __init__(self, cluster: ClusterConfig, ports: _Ports, num_gpus: int, trace_dir: str | None, source: str) -> None:
        self._cluster, self._ports, self._gpus = cluster, ports, _Gpus(allow_shared=cluster.allow_shared_gpus)
        self._num_gpus, self._source = num_gpus, source
        self._trace_dir = os.path.abspath(trace_dir) if trace_dir else None

    def plan(self, num_cores: int) -> Plan:
        router = self._router()
        for name, group in self._cluster.nodes.items():
            self._claim_given(name, group)
            self._refuse_own_keys(name, group)
        nodes: list[NodeSpec] = []
        for name, group in self._cluster.nodes.items():
            base = self._group_tree(group)
            nodes += [self._node(name, group, index, base, router) for index in range(group.count)]
        return Plan(router, tuple(_with_threads(node, nodes, num_cores) for node in nodes))

    def _router(self) -> RouterSpec:
        config = self._cluster.router
        if "host" not in config.model_fields_set:
            config = config.model_copy(update={"host": self._cluster.host})
        port = self._ports.claim(config.host, config.port, "router")
        config = config.model_copy(update={"port": port, "trace_dir": self._trace_dir or config.trace_dir})
        return RouterSpec(config, NodeAddr(self._cluster.host if is_wildcard(config.host) else config.host, port))

    def _claim_given(self, name: str, group: NodeGroup) -> None:
        for index in range(group.count):
            node, host = f"{name}{index}", self._host(group, index)
            for use, ports in (("HTTP", group.ports), ("coordinator", group.coordinator_ports)):
                if ports and ports[index]:
                    self._ports.claim(host, ports[index], f"{node} ({use})")
            if group.device_ids:
                self._gpus.claim(host, node, group.device_ids[index])

    def _refuse_own_keys(self, name: str, group: NodeGroup) -> None:
        """What the cluster works out itself may stand in a ``config_file``, which was made for one node, but not be asked for."""
        asked = dict(leaves(_settings(self._cluster, group)))
        for key, instead in _OWN_KEYS.items():
            if asked.get(("setting", "connector", key)) is not None:
                advice = instead.format(group=f"nodes.{name}")
                raise ConfigError(f"{self._source}: nodes.{name}: connector.{key} is worked out for every node; give {advice} instead")

    def _host(self, group: NodeGroup, index: int) -> str:
        if not group.hosts:
            return self._cluster.host
        return group.hosts[index if len(group.hosts) > 1 else 0]

    def _group_tree(self, group: NodeGroup) -> dict[str, Any]:
        """config_file, then the cluster's settings, then the group's, each over the one before."""
        tree: dict[str, Any] = {}
        if group.config_file is not None:
            tree = yaml_file.read(Path(self._cluster.base_dir) / group.config_file)
        tree = merge(tree, _settings(self._cluster, group))
        model_dir = group.model_dir or self._cluster.model_dir
        if model_dir is not None:
            put(tree, tuple(ksana_yaml.MODEL_DIR.split(".")), os.path.abspath(os.path.expanduser(model_dir)))
        if group.tensor_parallel_size is not None:
            put(tree, _TP_SIZE, group.tensor_parallel_size)
        elif not _get(tree, _TP_SIZE):
            put(tree, _TP_SIZE, 1)  # a cluster shares its GPUs out: none takes them all
        if self._trace_dir is not None:
            put(tree, ("ksana_lab", "trace_dir"), self._trace_dir)
        return tree

    def _node(self, group_name: str, group: NodeGroup, index: int, base: dict[str, Any], router: RouterSpec) -> NodeSpec:
        name, host = f"{group_name}{index}", self._host(group, index)
        port = (group.ports and group.ports[index]) or self._ports.claim(host, 0, f"{name} (HTTP)")
        coordinator = (group.coordinator_ports and group.coordinator_ports[index]) or self._ports.claim(host, 0, f"{name} (coordinator)")
        connector = {
            "group_role": "none" if group.role is Role.MIXED else group.role.value,
            "router_addr": str(router.advertised),
            "inference_addr": str(NodeAddr(host, port)),
            "coordinator_addr": str(NodeAddr(host, coordinator)),
            "cluster_name": self._cluster.router.cluster_name,
        }
        tree = merge(base, {"setting": {"connector": connector}})
        where = f"{self._source}: nodes.{group_name}"
        loaded = ksana_yaml.translate(ksana_yaml.substitute(tree, {}, where), where, num_gpus=self._num_gpus)
        node = NodeSpec(name, host, tree, loaded.config, tuple(loaded.warnings))
        return node if self._is_on_cpu(loaded.config) else _with_runtime(node, {"device_ids": self._devices(node, group, index)})

    def _is_on_cpu(self, config: EngineConfig) -> bool:
        return config.runtime.device == "cpu" or (config.runtime.device == "auto" and self._num_gpus == 0)

    def _devices(self, node: NodeSpec, group: NodeGroup, index: int) -> tuple[int, ...]:
        size = node.config.parallel.tensor_parallel_size
        given = group.device_ids[index] if group.device_ids else node.device_ids
        if given and len(given) != size:
            raise ConfigError(f"{self._source}: nodes.{node.name}: device_ids {list(given)} for a tensor parallel size of {size}")
        return self._gpus.claim(node.host, node.name, given or self._gpus.next(node.host, size))


_TP_SIZE = ("setting", "global", "tensor_para_size")
_OWN_KEYS = {  # of setting.connector: where to say it instead
    "group_role": "{group}.role",
    "router_addr": "router.host and router.port",
    "inference_addr": "{group}.hosts and {group}.ports",
    "coordinator_addr": "{group}.hosts and {group}.coordinator_ports",
    "cluster_name": "router.cluster_name",
}


def _settings(cluster: ClusterConfig, group: NodeGroup) -> dict[str, Any]:
    """The cluster's, and the group's over them."""
    return merge({"setting": cluster.setting, "ksana_lab": cluster.ksana_lab}, {"setting": group.setting, "ksana_lab": group.ksana_lab})


def _get(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    return dict(leaves(tree)).get(path)


def _with_threads(node: NodeSpec, nodes: list[NodeSpec], num_cores: int) -> NodeSpec:
    """Ranks on CPUs of one host share its cores; each alone would take them all."""
    if node.config.runtime.num_threads or node.device_ids:
        return node
    ranks = sum(other.config.parallel.tensor_parallel_size for other in nodes if other.host == node.host and not other.device_ids)
    return _with_runtime(node, {"num_threads": max(1, num_cores // ranks)})


def _with_runtime(node: NodeSpec, changes: dict[str, Any]) -> NodeSpec:
    """The node with some of RuntimeOptions settled, in its file too."""
    runtime = node.config.runtime.model_copy(update=changes)
    return replace(node, tree=merge(node.tree, {"ksana_lab": changes}), config=node.config.model_copy(update={"runtime": runtime}))


class _Ports:
    """Who has which port of which host."""

    def __init__(self, choose: PortChooser) -> None:
        self._choose = choose
        self._taken: dict[int, list[tuple[str, str]]] = {}  # port -> (host, owner)

    def claim(self, host: str, port: int, owner: str) -> int:
        port = port or self._choose(host)
        for other_host, other in self._taken.get(port, []):
            if host == other_host or is_wildcard(host) or is_wildcard(other_host):
                raise ConfigError(f"port {port} of {host} is given to both {other} and {owner}; give one of them another, or auto")
        self._taken.setdefault(port, []).append((host, owner))
        return port


class _Gpus:
    """Who has which GPU of which host."""

    def __init__(self, *, allow_shared: bool) -> None:
        self._allow_shared = allow_shared
        self._owner: dict[tuple[str, int], str] = {}

    def claim(self, host: str, name: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        for gpu in ids:
            other = self._owner.setdefault((host, gpu), name)
            if other != name and not self._allow_shared:
                advice = "give one of them another, or set allow_shared_gpus: true"
                raise ConfigError(f"GPU {gpu} of {host} is given to both {other} and {name}; {advice}")
        return ids

    def next(self, host: str, size: int) -> tuple[int, ...]:
        taken = {gpu for owner_host, gpu in self._owner if owner_host == host}
        free = (gpu for gpu in range(len(taken) + size) if gpu not in taken)
        return tuple(next(free) for _ in range(size))


def _row(process: RouterSpec | NodeSpec) -> tuple[str, ...]:
    ports = ", ".join(f"{use} {port}" for use, port in process.ports.items())
    if isinstance(process, RouterSpec):
        return process.name, "router", process.host, ports, "-", "-"
    config = process.config
    devices = ", ".join(f"GPU {gpu}" for gpu in process.device_ids) or f"CPU, threads per rank: {config.runtime.num_threads or 'all'}"
    return process.name, process.role.value, process.host, ports, str(config.parallel.tensor_parallel_size), devices


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
