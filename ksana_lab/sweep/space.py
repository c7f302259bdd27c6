"""Which runs a sweep consists of, worked out before anything starts: axes, combinations, repeats, and the aggregated baseline of each.

An axis names any key of the workload or of the cluster (nodes, router, KsanaLLM's keys). Knows nothing of processes, files or results."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ksana_lab.cluster import topology
from ksana_lab.config import yaml_file
from ksana_lab.config.cluster import ClusterConfig, NodeGroup
from ksana_lab.config.engine import Frozen
from ksana_lab.config.environment import visible_gpus
from ksana_lab.config.overrides import leaves, merge, parse_override, put
from ksana_lab.config.router import without_password
from ksana_lab.config.validate import build, nearest
from ksana_lab.errors import ConfigError
from ksana_lab.metrics.summary import SLO
from ksana_lab.types import Role
from ksana_lab.workload import traces
from ksana_lab.workload.spec import WorkloadSpec

DISAGGREGATED, AGGREGATED = "disaggregated", "aggregated"
# Columns of every result: an axis of the same name would hide one.
RESERVED = ("run_id", "system", "repeat", "seed", "num_gpus", "folder", "is_baseline", "is_trustworthy", "code_version")
UNSET = "unset"  # the label of a null value: the key is as if absent
# Of how a WorkloadSpec becomes requests. Raise it whenever one spec with one seed comes to stand for other requests (times, lengths,
# tokens): seeds and run ids change with it, so that old runs do not count as finished, and equal seeds in two tables mean equal requests.
WORKLOAD_VERSION = 2

# What only a pair of nodes reads. A mixed node's configuration without them is the same at every point that differs in nothing else, so
# its run is made once.
_TRANSFER_KEYS = frozenset(
    {
        ("setting", "connector", "communication_type"),
        ("setting", "connector", "transfer_batch"),
        ("setting", "connector", "send_thread_num"),
        ("setting", "batch_scheduler", "transfer_layer_chunk_size"),
        ("setting", "batch_scheduler", "max_pretransfer_batch_size"),
        ("ksana_lab", "transfer_mode"),
        ("ksana_lab", "checksum"),
        ("ksana_lab", "wire_dtype"),
        ("ksana_lab", "lease_s"),
        ("ksana_lab", "link", "bandwidth_gbps"),
        ("ksana_lab", "link", "latency_us"),
        ("ksana_lab", "link", "shared"),
    }
)

Label = str | int | float | bool


# ---- the file --------------------------------------------------------------------------------------------------------


class BaselineOptions(Frozen):
    """How the mixed nodes of the baseline differ from what is derived (see ``aggregated``)."""

    tensor_parallel_size: int | None = Field(None, ge=1)
    config_file: str | None = None  # needed where prefill and decode groups have different ones
    set: dict[str, Any] = Field(default_factory=dict)  # keys of the cluster, over what is derived


class SearchOptions(Frozen):
    """Find the highest rate that meets the SLO instead of trying given ones."""

    low: float = Field(gt=0)  # requests per second, believed to be met
    high: float = Field(gt=0)  # believed to be missed
    tolerance: float = Field(0.1, gt=0, le=1)  # stop when missed / met rate is below 1 + this
    max_rates: int = Field(10, ge=2)


class SweepConfig(Frozen):
    """A file of ``configs/sweeps/``. Paths in it are relative to it; ``model_dir`` is as in a cluster's file."""

    name: str | None = None  # None: the file's
    cluster: str  # a cluster file
    model_dir: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)  # keys of the cluster, for every point
    workload: str | dict[str, Any]  # a workload file, or its content
    duration_s: float | None = Field(None, gt=0)  # every point sends rate * duration_s requests
    axes: dict[str, Any] = Field(default_factory=dict)
    combine: Literal["product", "zip"] | list[list[str]] = "product"  # lists: these axes advance together, all else is a product
    repeats: int = Field(1, ge=1)  # of every point, with seeds of their own
    interleave: bool = False  # a repeat of every point before the next, instead of all repeats of a cluster at one start of it
    baseline: bool | BaselineOptions = True
    slo: dict[str, Any] = Field(default_factory=dict)
    target: float = Field(0.9, gt=0, le=1)  # SLO attainment that counts as met
    search: SearchOptions | None = None
    events: bool = True  # keep every process's event log of each run
    request_timeout_s: float = Field(600.0, gt=0)

    @classmethod
    def from_yaml(cls, path: str | Path, *, overrides: Sequence[str] = ()) -> SweepConfig:
        """An override names a key of this file (``repeats=1``, ``workload.num_requests=20``, ``axes.rate=[1, 2]``) or, with or without
        ``cluster.`` in front, one of the cluster's. Raises ConfigError."""
        path = Path(path)
        tree = yaml_file.read(path)
        for text in overrides:
            override = parse_override(text)
            first, *rest = override.path
            if first in cls.model_fields and not (first == "cluster" and rest):
                put(tree, (first, ".".join(rest)) if first in ("axes", "set") and rest else override.path, override.value)
            else:
                put(tree, ("set", ".".join(rest if first == "cluster" else override.path)), override.value)
        tree.setdefault("name", path.stem)
        for name in ("cluster", "workload"):
            if isinstance(tree.get(name), str):
                tree[name] = str(path.parent / tree[name])
        config = build(cls, {key: value for key, value in tree.items() if value is not None}, str(path))
        config._check(str(path))
        return config

    def _check(self, source: str) -> None:
        slo = SLO.from_dict(self.slo)
        if self.search is not None:
            if self.interleave:
                raise ConfigError(f"{source}: interleave does not go with search, whose next rate hangs on all repeats of the last one")
            if slo == SLO():
                raise ConfigError(f"{source}: search needs slo, the bounds that the rate is to meet")
            if self.search.low >= self.search.high:
                raise ConfigError(f"{source}: search.low {self.search.low:g} must be below search.high {self.search.high:g}")

    @property
    def slo_or_none(self) -> SLO | None:
        return SLO.from_dict(self.slo) if self.slo else None


# ---- axes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AxisValue:
    """One position on an axis: what it is called, and what it sets."""

    label: Label
    settings: Mapping[str, Any]  # key -> value


@dataclass(frozen=True)
class Axis:
    """``name`` is a column of every result."""

    name: str
    values: tuple[AxisValue, ...]


def parse_axes(raw: Mapping[str, Any], linked: Collection[str] = ()) -> list[Axis]:
    """Three forms: ``rate: [1, 2]`` · ``link: {key: ksana_lab.link.bandwidth_gbps, values: [1, 10]}`` ·
    ``split: {1P2D: {nodes.prefill.count: 1, nodes.decode.count: 2}, …}`` (linked: a label sets several keys). Axes that advance
    with others (``linked``) may say a value twice. Raises ConfigError."""
    axes = [_parse_axis(name, values, name in linked) for name, values in raw.items()]
    owner: dict[str, str] = {}
    for axis in axes:
        if axis.name in RESERVED:
            raise ConfigError(
                f"axes.{axis.name}: every result has a column of this name; call the axis otherwise ({{key: …, values: […]}})"
            )
        for key in {key for value in axis.values for key in value.settings}:
            if (other := owner.setdefault(key, axis.name)) != axis.name:
                raise ConfigError(f"axes.{other} and axes.{axis.name} both set {key}; link them in one axis")
    return axes


def _linked(config: SweepConfig) -> list[list[str]]:
    """Groups of axes that advance together."""
    if config.combine == "product":
        return []
    return [list(config.axes)] if config.combine == "zip" else list(config.combine)


def _parse_axis(name: str, raw: Any, is_linked: bool) -> Axis:
    column = name.removeprefix("workload.").removeprefix("cluster.")
    if isinstance(raw, list):
        values = [AxisValue(_label(value), {name: value}) for value in raw]
    elif isinstance(raw, dict) and set(raw) == {"key", "values"} and isinstance(raw["values"], list):
        values = [AxisValue(_label(value), {str(raw["key"]): value}) for value in raw["values"]]
    elif isinstance(raw, dict) and all(isinstance(settings, dict) for settings in raw.values()):
        values = [AxisValue(str(label), _flat(settings)) for label, settings in raw.items()]
    else:
        raise ConfigError(
            f"axes.{name}: expected a list of values, {{key: KEY, values: [...]}}, or labels with the keys that each sets, got {raw!r}"
        )
    if not values:
        raise ConfigError(f"axes.{name} has no values")
    labels = [value.label for value in values]
    if len(set(map(str, labels))) < len(labels) and not is_linked:
        raise ConfigError(f"axes.{name}: a value occurs twice in {labels}")
    return Axis(column, tuple(values))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value; a mapping that is a workload's value (a distribution of lengths) stays one."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value and _workload_key(key) is None:
            flat |= {".".join((key, *path)): leaf for path, leaf in leaves(value)}
        else:
            flat[key] = value
    return flat


def _label(value: Any) -> Label:
    if value is None:
        return UNSET
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)


# ---- points ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """One combination of the axes: a cluster, a workload (with its base seed), and what the results call it."""

    labels: Mapping[str, Label]
    cluster: ClusterConfig
    workload: WorkloadSpec
    is_baseline: bool = False

    @functools.cached_property
    def cluster_key(self) -> str:
        return digest(_cluster_identity(self.cluster))

    @functools.cached_property
    def workload_key(self) -> str:
        return digest(_workload_identity(self.workload))

    @property
    def system(self) -> str:
        return DISAGGREGATED if any(group.role.is_disaggregated for group in self.cluster.nodes.values()) else AGGREGATED


@dataclass(frozen=True)
class SweepPoint:
    """One run: a setup with the seed of one repeat, and how it is measured."""

    setup: Setup
    repeat: int
    workload: WorkloadSpec  # seeded
    request_timeout_s: float
    events: bool  # the processes write event logs

    @property
    def cluster_key(self) -> str:
        return self.setup.cluster_key

    def run_id(self, code_version: str) -> str:
        """Hash of the resolved configuration, the workload with its seed and trace, how it is measured, and the code that would do it.

        Bounds are not in it: they judge records, whatever the bounds were when those were made."""
        measurement = {"request_timeout_s": self.request_timeout_s, "events": self.events}
        return digest([self.cluster_key, _workload_identity(self.workload), measurement, code_version])

    def __str__(self) -> str:
        words = [self.setup.system, *(f"{name}={label}" for name, label in self.setup.labels.items())]
        return " ".join([*words, f"repeat {self.repeat}"] if self.repeat else words)


class Space:
    """Everything that a SweepConfig stands for. Raises ConfigError for what can be known to be wrong."""

    def __init__(self, config: SweepConfig, *, model_dir: str | None = None, source: str = "sweep") -> None:
        self.config, self._source = config, source
        self._model_dir = model_dir or config.model_dir
        self._base = Path(source).parent
        self._base_workload = _read_workload(config.workload, self._base)
        self.axes = parse_axes(config.axes, {name for group in _linked(config) for name in group})
        if config.search is not None and any("rate" in _workload_keys(value.settings) for axis in self.axes for value in axis.values):
            raise ConfigError(f"{source}: search tries rates of its own; take the axis over rate out")
        self._clusters: dict[tuple[tuple[str, str], ...], ClusterConfig] = {}
        self._layouts: dict[str, topology.Plan] = {}
        self._num_gpus = visible_gpus()
        self.setups = self._setups()
        for setup in self.setups:
            self.layout(setup)

    def points(self) -> list[SweepPoint]:
        """Of a grid: ordered so that each cluster starts once; interleaved, forwards and backwards in turn, so that what drifts with time
        falls on all systems alike, and a cluster that ends one repeat begins the next. A search makes its own (``at_rate``)."""
        repeats = range(self.config.repeats)
        if not self.config.interleave:
            return [self.point(setup, repeat) for setup in self.setups for repeat in repeats]
        clusters = [list(setups) for _, setups in itertools.groupby(self.setups, key=lambda setup: setup.cluster_key)]
        return [self.point(setup, i) for i in repeats for setups in (clusters[::-1] if i % 2 else clusters) for setup in setups]

    def point(self, setup: Setup, repeat: int) -> SweepPoint:
        """Seeds come from the whole workload and the repeat: every system gets the same requests, and no run finds another's prompts in a
        prefix cache of a cluster that both share."""
        seed = int(digest([setup.workload_key, repeat])[:8], 16) % (1 << 31)
        workload = setup.workload.model_copy(update={"seed": seed})
        return SweepPoint(setup, repeat, workload, self.config.request_timeout_s, self.config.events)

    def at_rate(self, setup: Setup, rate: float) -> Setup:
        """The same with another rate; ``rate`` becomes a label."""
        workload = _with_duration(setup.workload.to_dict() | {"rate": rate}, self.config.duration_s)
        return replace(setup, labels={**setup.labels, "rate": rate}, workload=WorkloadSpec.from_dict(workload))

    def layout(self, setup: Setup) -> topology.Plan:
        """Who would run where; ports are invented. Cached: a sweep has few clusters."""
        if setup.cluster_key not in self._layouts:
            self._layouts[setup.cluster_key] = self._lay_out(setup.cluster)
        return self._layouts[setup.cluster_key]

    def columns(self, setup: Setup) -> dict[str, Any]:
        """What every row about this setup says besides its measurements."""
        nodes = self.layout(setup).nodes
        connector = next((node.config.connector for node in nodes if node.role is Role.PREFILL), None)
        return {
            "system": setup.system,
            "split": split_name(nodes),
            "is_baseline": setup.is_baseline,
            "num_gpus": sum(node.config.parallel.tensor_parallel_size for node in nodes),  # on a CPU: processes that compute
            "transfer_mode": connector.transfer_mode if connector else "none",
            **setup.labels,
        }

    # ---- building

    def _setups(self) -> list[Setup]:
        setups = [self._setup(combination) for combination in self._combinations()]
        if self.config.search is not None:
            setups = [self.at_rate(setup, self.config.search.low) for setup in setups]
        if self.config.baseline:
            setups += self._baselines([setup for setup in setups if setup.system == DISAGGREGATED])
        unique = {(setup.cluster_key, setup.workload_key): setup for setup in reversed(setups)}
        first = {key: i for i, key in reversed(list(enumerate(setup.cluster_key for setup in setups)))}
        return sorted(reversed(unique.values()), key=lambda setup: first[setup.cluster_key])

    def _combinations(self) -> list[tuple[AxisValue, ...]]:
        """Each holds a value of every axis, in the order of the axes."""
        groups = [group for group in _linked(self.config) if group]
        names = [name for group in groups for name in group]
        if unknown := sorted(set(names) - set(self.config.axes)):
            raise ConfigError(f"{self._source}: combine names {unknown[0]}, which is no axis{nearest(unknown[0], self.config.axes)}")
        if len(set(names)) < len(names):
            raise ConfigError(f"{self._source}: combine names an axis twice: {names}")
        values = dict(zip(self.config.axes, (axis.values for axis in self.axes), strict=True))
        rows: list[list[dict[str, AxisValue]]] = [[{name: value} for value in own] for name, own in values.items() if name not in names]
        for group in groups:
            lengths = {name: len(values[name]) for name in group}
            if len(set(lengths.values())) > 1:
                raise ConfigError(f"{self._source}: combine: zip needs axes of one length, they have {lengths}")
            rows.append([dict(zip(group, row, strict=True)) for row in zip(*(values[name] for name in group), strict=True)])
        merged = [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*rows)]
        return [tuple(row[name] for name in self.config.axes) for row in merged]

    def _setup(self, combination: tuple[AxisValue, ...]) -> Setup:
        workload, cluster = dict(self._base_workload), _flat(self.config.set)
        for axis, value in zip(self.axes, combination, strict=True):
            for key, setting in value.settings.items():
                if (field_name := _workload_key(key)) is not None:
                    if field_name == "seed":
                        raise ConfigError(f"axes.{axis.name}: seeds are the repeats'; say repeats: N")
                    workload = merge(workload, {})
                    put(workload, tuple(field_name.split(".")), setting)
                else:
                    cluster[key.removeprefix("cluster.")] = setting
        workload = _found_beside(self._base, {name: value for name, value in workload.items() if value is not None})
        if self.config.search is not None:
            workload = _with_duration(workload | {"rate": self.config.search.low}, self.config.duration_s)
        else:
            workload = _with_duration(workload, self.config.duration_s)
        labels = {axis.name: value.label for axis, value in zip(self.axes, combination, strict=True)}
        return Setup(labels, self._cluster(cluster), WorkloadSpec.from_dict(workload, source=f"{self._source}: workload"))

    def _cluster(self, settings: Mapping[str, Any]) -> ClusterConfig:
        texts = tuple((key, _yaml_value(value)) for key, value in settings.items())
        if texts not in self._clusters:
            overrides = [f"{key}={value}" for key, value in texts]
            try:
                config = ClusterConfig.from_yaml(self.config.cluster, overrides=overrides, model_dir=self._model_dir)
                topology.refuse_contradictions(config, str(self.config.cluster))
            except ConfigError as error:
                raise ConfigError(f"{self._source}: {_in_words_of_a_sweep(str(error), settings)}") from None
            self._clusters[texts] = config
        return self._clusters[texts]

    def _lay_out(self, cluster: ClusterConfig) -> topology.Plan:
        ports = itertools.count(20000)
        return topology.plan(cluster, choose_port=lambda _: next(ports), num_gpus=self._num_gpus, source=self._source)

    def _baselines(self, setups: Iterable[Setup]) -> list[Setup]:
        """One for each different (mixed cluster, workload); a label on which its originals differ says nothing about it and is left out."""
        options = self.config.baseline if isinstance(self.config.baseline, BaselineOptions) else BaselineOptions()
        made: dict[tuple[str, str], list[Setup]] = {}
        for setup in setups:
            cluster = aggregated(setup.cluster, self.layout(setup), options, self._source)
            mixed = replace(setup, cluster=cluster, is_baseline=True)
            made.setdefault((mixed.cluster_key, mixed.workload_key), []).append(mixed)
        return [replace(group[0], labels=_common_labels([setup.labels for setup in group])) for group in made.values()]


def _common_labels(all_labels: Sequence[Mapping[str, Label]]) -> dict[str, Label]:
    first = all_labels[0]
    return {name: label for name, label in first.items() if name != "split" and all(labels[name] == label for labels in all_labels)}


def _read_workload(raw: str | Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Relative paths are looked for beside the file that names them: the workload's own, where it has one."""
    if isinstance(raw, str):
        base = Path(raw).parent
        raw = yaml_file.read(raw)
    return _found_beside(base, merge(raw, {}))


def _found_beside(base: Path, workload: dict[str, Any]) -> dict[str, Any]:
    """With the trace and its tokenizer as absolute paths where ``base`` has them; a bundled trace's name is no path."""
    trace = workload.get("trace")
    if not isinstance(trace, dict):
        return workload
    trace = dict(trace)
    for name, inside in (("path", ""), ("tokenizer_dir", "tokenizer.json")):
        given = trace.get(name)
        if isinstance(given, str) and given not in traces.BUNDLED and (base / given / inside).is_file():
            trace[name] = str((base / given).resolve())
    return {**workload, "trace": trace}


def _with_duration(workload: dict[str, Any], duration_s: float | None) -> dict[str, Any]:
    if duration_s is None:
        return workload
    rate = workload.get("rate")
    if not isinstance(rate, (int, float)) or math.isinf(rate) or rate <= 0:
        raise ConfigError(f"duration_s needs a finite workload.rate at every point, got {rate!r}")
    return {**workload, "num_requests": max(1, math.ceil(rate * duration_s))}


def _workload_key(key: str) -> str | None:
    """The field of a workload that ``key`` means; None for a key of the cluster. Where both have it: the workload's."""
    name = key.removeprefix("workload.")
    return name if name != key or name.split(".")[0] in WorkloadSpec.model_fields else None


def _workload_keys(settings: Iterable[str]) -> list[str]:
    return [name for key in settings if (name := _workload_key(key)) is not None]


def _yaml_value(value: Any) -> str:
    """As the right side of an override."""
    if value is None:
        return ""
    if isinstance(value, float):
        return yaml_file.dump({"x": value})[3:].strip()
    return json.dumps(value)


def _in_words_of_a_sweep(text: str, settings: Mapping[str, Any]) -> str:
    """``--set`` was not what the user wrote. A key that is nearly the sweep's or a workload's was perhaps meant to be one."""
    text = text.replace("--set ", "")
    wrong = next((key for key in settings if text.startswith((key, key.removeprefix("cluster.")))), None)
    known = [*SweepConfig.model_fields, *WorkloadSpec.model_fields]
    if wrong is not None and "did you mean" not in text and (near := nearest(wrong, known)):
        return text + near
    return text


# ---- the baseline ----------------------------------------------------------------------------------------------------


def aggregated(cluster: ClusterConfig, plan: topology.Plan, options: BaselineOptions, source: str) -> ClusterConfig:
    """The same GPUs (or CPU processes), model and router with mixed nodes only.

    Tensor parallel size: that of the nodes, or where they differ the largest that divides the number of GPUs. Where prefill and decode
    groups have settings of their own, mixed nodes take them all, and of two numbers the larger. Raises ConfigError."""
    nodes, groups = plan.nodes, list(cluster.nodes.values())
    sizes = {node.config.parallel.tensor_parallel_size for node in nodes}
    total = sum(node.config.parallel.tensor_parallel_size for node in nodes)
    size = options.tensor_parallel_size or max((s for s in sizes if total % s == 0), default=1)
    if total % size:
        raise ConfigError(f"{source}: baseline.tensor_parallel_size {size} does not divide the {total} GPUs of {split_name(nodes)}")
    hosts = [node.host for node in nodes]
    if len(set(hosts)) > 1 and sizes != {size}:
        raise ConfigError(f"{source}: baseline: nodes of different sizes on several hosts cannot be regrouped; say baseline: false")
    group = NodeGroup(
        role=Role.MIXED,
        count=total // size,
        tensor_parallel_size=size,
        config_file=options.config_file or _one([g.config_file for g in groups], "config_file", source),
        model_dir=_one([g.model_dir for g in groups], "model_dir", source),
        hosts=tuple(hosts) if len(set(hosts)) > 1 else tuple(set(hosts) - {cluster.host}),
        device_ids=_regrouped([gpu for node in nodes for gpu in node.device_ids], size) if all(g.device_ids for g in groups) else (),
        **_mixed_settings([{"setting": g.setting, "ksana_lab": g.ksana_lab} for g in groups]),
    )
    shared = _without_transfer({"setting": cluster.setting, "ksana_lab": cluster.ksana_lab})
    mixed = cluster.model_copy(update={**shared, "nodes": {"mixed": group}})
    return _overridden(mixed, options.set, source)


def _one(values: Sequence[str | None], name: str, source: str) -> str | None:
    if len(set(values)) > 1:
        hint = "; give baseline: {config_file: …}" if name == "config_file" else "; say baseline: false"
        raise ConfigError(f"{source}: baseline: the groups have different {name}s{hint}")
    return values[0]


def _regrouped(device_ids: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(device_ids[i : i + size]) for i in range(0, len(device_ids), size))


def _mixed_settings(trees: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    merged: dict[tuple[str, ...], Any] = {}
    for tree in map(_without_transfer, trees):
        for path, value in leaves(tree):
            before = merged.get(path)
            both_numbers = type(before) in (int, float) and type(value) in (int, float)
            merged[path] = max(before, value) if both_numbers else value if before is None or before == {} else before
    return _tree(merged)


def _without_transfer(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return _tree({path: value for path, value in leaves(tree) if path not in _TRANSFER_KEYS})


def _tree(flat: Mapping[tuple[str, ...], Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, Any] = {"setting": {}, "ksana_lab": {}}
    for path, value in flat.items():
        if value != {}:
            put(tree, path, value)
    return tree


def _overridden(cluster: ClusterConfig, settings: Mapping[str, Any], source: str) -> ClusterConfig:
    if not settings:
        return cluster
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "baseline.yaml"
        path.write_text(cluster_text(cluster, hide_password=False), encoding="utf-8")
        try:
            return ClusterConfig.from_yaml(path, overrides=[f"{key}={_yaml_value(value)}" for key, value in _flat(settings).items()])
        except ConfigError as error:
            raise ConfigError(f"{source}: baseline.set: {str(error).replace('--set ', '')}") from None


# ---- names and identities --------------------------------------------------------------------------------------------


def split_name(nodes: Sequence[topology.NodeSpec]) -> str:
    """``1P3D``, ``2P2D TP2``, ``2P(TP1) 1D(TP2)``, ``4 mixed``."""
    sizes: dict[Role, list[int]] = {}
    for node in nodes:
        sizes.setdefault(node.role, []).append(node.config.parallel.tensor_parallel_size)
    distinct = {size for of_role in sizes.values() for size in of_role}
    letters = {Role.PREFILL: "P", Role.DECODE: "D", Role.MIXED: " mixed"}
    if len(distinct) == 1:
        name = "".join(f"{len(sizes[role])}{letters[role]}" for role in letters if role in sizes)
        return name if distinct == {1} else f"{name} TP{distinct.pop()}"
    return " ".join(
        f"{len(sizes[role])}{letters[role]}(TP{','.join(map(str, sorted(set(sizes[role]))))})" for role in letters if role in sizes
    )


def cluster_text(cluster: ClusterConfig, *, hide_password: bool = True) -> str:
    """A cluster file that ``ClusterConfig.from_yaml`` reads back."""
    tree = cluster.model_dump(mode="json")
    if hide_password and cluster.router.database_url:
        tree["router"]["database_url"] = without_password(cluster.router.database_url)
    return yaml_file.dump(_without_none(tree))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_none(value) if isinstance(value, dict) else value for key, value in tree.items() if value is not None}


def _cluster_identity(cluster: ClusterConfig) -> Any:
    """What makes two clusters the same one: all but how long to wait for it and where files lay; files count by content."""
    tree = cluster.model_dump(mode="json")
    del tree["start_timeout_s"], tree["base_dir"]
    for section in (tree, *tree["nodes"].values()):
        section["model_dir"] = _model_identity(section["model_dir"])
    files = [Path(cluster.base_dir) / group.config_file for group in cluster.nodes.values() if group.config_file]
    return [tree, [_content(file) for file in files]]


def _model_identity(folder: str | None) -> Any:
    """A checkpoint by its files; one that only other hosts have by its path."""
    if folder is None or not (Path(folder) / "config.json").is_file():
        return folder
    files = sorted(file for file in Path(folder).iterdir() if file.suffix in (".json", ".safetensors"))
    return [[file.name, _sampled(file)] for file in files]


def _workload_identity(workload: WorkloadSpec) -> Any:
    """The spec, with the content of what it reads in place of the path."""
    identity = workload.to_dict()
    if workload.trace is not None:
        folder = workload.trace.tokenizer_dir
        contents = {
            "path": _content(traces.resolve(workload.trace.path)),
            "tokenizer_dir": folder and _content(Path(folder).expanduser() / "tokenizer.json"),
        }
        identity["trace"] = identity["trace"] | contents
    return [WORKLOAD_VERSION, identity]


def _content(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _sampled(file: Path, *, num_slices: int = 16, slice_bytes: int = 1 << 16) -> str:
    """A hash of a file's length and, of a large one, of slices spread over it: weights take minutes to read in whole."""
    size = file.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= num_slices * slice_bytes:
            content.update(stream.read())
        else:
            for i in range(num_slices):
                stream.seek(i * (size - slice_bytes) // (num_slices - 1))
                content.update(stream.read(slice_bytes))
    return content.hexdigest()


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---- what a workload amounts to --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """``span_s``: from the first sending to the last; None in a closed loop. ``rate``: requests per second offered, likewise."""

    num_requests: int
    span_s: float | None
    rate: float | None
    lengths: str = field(repr=False)


def schedule_of(workload: WorkloadSpec) -> Schedule:
    """Builds the requests and drops them. Raises ConfigError for a trace that cannot be used."""
    built = workload.build()
    times = [request.at_s for request in built.requests if request.at_s is not None]
    span = times[-1] - times[0] if times else None
    rate = workload.rate if workload.rate is not None else (len(times) - 1) / span if span else None
    when = f"; over {span:.3g} s, {rate:.3g} requests/s" if span and rate else ""
    return Schedule(len(built.requests), span, rate, f"{built.lengths}{when}")
