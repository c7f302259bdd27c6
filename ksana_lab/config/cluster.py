"""One file that names every process of a cluster: a router and groups of prefill, decode or mixed nodes (xPyD).

What a node is told stands in KsanaLLM's spelling under ``setting:`` and ``ksana_lab:``, for all nodes or for one group, over an optional
``config_file``. Who runs where with which port and GPU is worked out by cluster/topology.py."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ksana_lab.config import ksana_yaml, yaml_file
from ksana_lab.config.engine import Frozen
from ksana_lab.config.overrides import Override, parse_override, put
from ksana_lab.config.router import Port, RouterConfig
from ksana_lab.config.validate import build, nearest
from ksana_lab.errors import ConfigError
from ksana_lab.types import Role


def _as_tuple(value: Any) -> Any:
    """A single value stands for a list of one; ``auto`` for an empty list."""
    if value is None or value == "auto":
        return ()
    return value if isinstance(value, (list, tuple)) else (value,)


def _as_device_lists(value: Any) -> Any:
    """``[0, 1]`` for a group of one node, ``[[0, 1], [2, 3]]`` for two; ``auto`` for the next free ones."""
    value = _as_tuple(value)
    return (tuple(value),) if value and all(type(item) is int for item in value) else value


Ports = Annotated[tuple[Port, ...], BeforeValidator(_as_tuple)]


class NodeGroup(Frozen):
    """``count`` nodes of one role and one configuration."""

    role: Role
    count: int = Field(1, ge=1, le=256)
    tensor_parallel_size: int | None = Field(None, ge=1)  # None: what config_file or setting says, else 1
    config_file: str | None = None  # KsanaLLM's YAML, the base of this group; relative to the cluster file
    model_dir: str | None = None  # None: the cluster's, else config_file's
    hosts: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()  # IPs: one per node, or one for all; () = the cluster's host
    ports: Ports = ()  # HTTP, one per node; () or auto = free ones
    coordinator_ports: Ports = ()  # as ports
    device_ids: Annotated[tuple[tuple[int, ...], ...], BeforeValidator(_as_device_lists)] = ()  # GPUs of each node; () = the next free ones
    setting: dict[str, Any] = Field(default_factory=dict)
    ksana_lab: dict[str, Any] = Field(default_factory=dict)

    @field_validator("role", mode="before")
    @classmethod
    def _read_role(cls, word: Any) -> Any:
        return Role.MIXED if word == "none" else word

    @field_validator("hosts")
    @classmethod
    def _hosts_are_ips(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            check_ip(host)
        return hosts

    @model_validator(mode="after")
    def _one_per_node(self) -> NodeGroup:
        for name in ("ports", "coordinator_ports", "device_ids"):
            given = len(getattr(self, name))
            if given not in (0, self.count):
                raise ValueError(f"{name}: {given} given for {self.count} nodes; give one per node, or auto")
        if len(self.hosts) not in (0, 1, self.count):
            raise ValueError(f"hosts: {len(self.hosts)} given for {self.count} nodes; give one per node, or one for all")
        return self


class ClusterConfig(Frozen):
    """Every process of a cluster. ``router.cluster_name`` names it."""

    host: str = "127.0.0.1"  # an IP: where everything runs that names no host of its own
    model_dir: str | None = None  # of every node
    router: RouterConfig = RouterConfig()
    nodes: dict[str, NodeGroup]  # by group name; nodes are called <group><index>
    setting: dict[str, Any] = Field(default_factory=dict)  # for every node, over its config_file
    ksana_lab: dict[str, Any] = Field(default_factory=dict)
    allow_shared_gpus: bool = False  # two nodes may name one GPU (each then needs block_device_memory_ratio)
    start_timeout_s: float = Field(600.0, gt=0)  # until every node is ready and every pair routable
    base_dir: str = "."  # what config_file is relative to; set by from_yaml

    @field_validator("host")
    @classmethod
    def _host_is_ip(cls, host: str) -> str:
        return check_ip(host)

    @field_validator("nodes")
    @classmethod
    def _can_serve(cls, nodes: dict[str, NodeGroup]) -> dict[str, NodeGroup]:
        roles = {group.role for group in nodes.values()}
        if not roles:
            raise ValueError("there is no node; name at least one group")
        if (Role.PREFILL in roles) != (Role.DECODE in roles):
            lacking = "decode" if Role.PREFILL in roles else "prefill"
            raise ValueError(f"there is no {lacking} node; prefill and decode need each other")
        for name in nodes:
            if not name.isidentifier() or name == "router" or name[-1].isdecimal():
                raise ValueError(f"{name!r} cannot name a group: use a word that does not end in a digit and is not 'router'")
        return nodes

    @classmethod
    def from_yaml(cls, path: str | Path, *, overrides: Sequence[str] = (), model_dir: str | None = None) -> ClusterConfig:
        """Read a cluster file. An override names a key of this file (``nodes.prefill.count=2``, ``router.policy=random``), or one of
        KsanaLLM's, for all nodes (``batch_scheduler.max_batch_size=8``) or for one group (``nodes.decode.max_batch_size=8``).

        Raises ConfigError."""
        tree = yaml_file.read(path)
        if not isinstance(nodes := tree.get("nodes") or {}, dict):
            raise ConfigError(f"{path}: nodes must hold groups by their names, got {nodes!r}")
        for text in overrides:
            override = parse_override(text)
            put(tree, _locate(override, tree), override.value)
        tree.setdefault("base_dir", str(Path(path).resolve().parent))
        if model_dir is not None:
            tree["model_dir"] = model_dir
            for group in (tree.get("nodes") or {}).values():
                if isinstance(group, dict):
                    group.pop("model_dir", None)
        return build(cls, _without_empty(tree), str(path))


def check_ip(host: str) -> str:
    """Raises ValueError unless ``host`` is an IP literal: the router's protocol takes no names as coordinator addresses."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address") from None
    return host


def _locate(override: Override, tree: Mapping[str, Any]) -> tuple[str, ...]:
    path = override.path
    if path[0] != "nodes":
        return _in_section(path, ClusterConfig, ())
    groups = [str(name) for name in tree.get("nodes") or {}]
    if len(path) < 3 or path[1] not in groups:
        given = ".".join(path)
        near = nearest(path[1], groups) if len(path) > 1 else ""
        raise ConfigError(f"--set {given}: name a group and a key of it, the groups are {', '.join(groups)}{near}")
    return _in_section(path[2:], NodeGroup, path[:2])


def _in_section(path: tuple[str, ...], model: type[Frozen], prefix: tuple[str, ...]) -> tuple[str, ...]:
    """A key of ``model`` itself, or one of KsanaLLM's, which goes under the section's ``setting`` or ``ksana_lab``."""
    if path[0] in ("setting", "ksana_lab") or path[0] not in model.model_fields:
        try:
            full = ksana_yaml.locate(Override(path, None))
        except ConfigError:
            if path[0] in ksana_yaml.ROOTS:
                raise
            near = nearest(path[0], model.model_fields)
            if near:
                raise ConfigError(f"--set {'.'.join((*prefix, *path))} is not a known key{near}") from None
            raise
        return (*prefix, "model_dir") if ".".join(full) == ksana_yaml.MODEL_DIR else (*prefix, *full)
    return (*prefix, *path)


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    """An empty section (``router:``) or an unset key counts as absent."""
    return {key: _without_empty(value) if isinstance(value, dict) else value for key, value in tree.items() if value is not None}
