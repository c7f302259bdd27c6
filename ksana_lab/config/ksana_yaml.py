"""The only reader of KsanaLLM's YAML: its spelling ends here, behind this module everything uses the field's words (config/engine.py).

Every key of the reference's prefill/decode examples is in ``KEYS``: it becomes a field, or it is known and not implemented, and then one
warning says what happens instead as soon as the file asks for more than the default. What KsanaLLM has no key for stands in a top-level
section ``ksana_lab:``. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ksana_lab.config import yaml_file
from ksana_lab.config.engine import UNPACKED, CacheOptions, ConnectorOptions, EngineConfig
from ksana_lab.config.environment import visible_gpus
from ksana_lab.config.overrides import Override, leaves, parse_override, put
from ksana_lab.config.validate import nearest
from ksana_lab.errors import ConfigError
from ksana_lab.types import NodeAddr, Role

ROOTS = ("setting", "model_spec", "ksana_lab")
# {NAME} in a file -> the option that fills it.
PLACEHOLDERS = {
    "ROUTER_IP": "--router-ip",
    "PREFILL_IP": "--prefill-ip",
    "DECODE_IP": "--decode-ip",
    "MODEL_DIR": "--model-dir",
}
MODEL_DIR = "model_spec.base_model.model_dir"


@dataclass(frozen=True)
class LoadedConfig:
    """``warnings``: one sentence for each key that asks for something that is not implemented, or has no effect beside another key."""

    config: EngineConfig
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Key:
    """One key of the file. ``field``: the dotted field it becomes, after ``convert`` (which raises ValueError for a bad value).

    Without a field: known, not implemented; ``off`` lists the values that ask for nothing, for any other ``instead`` says what happens."""

    kind: type
    field: str | None = None
    convert: Callable[[Any], Any] | None = None
    off: tuple[Any, ...] = ()
    instead: str = ""


def _seconds(milliseconds: float) -> float:
    return milliseconds / 1000.0


def _zero_is_none(value: int) -> int | None:
    return value or None


def _role(word: str) -> Role:
    role = {"none": Role.MIXED, "mixed": Role.MIXED, "prefill": Role.PREFILL, "decode": Role.DECODE}.get(word.lower())
    if role is None:
        raise ValueError("must be prefill, decode or none (a mixed node)")
    return role


def _address(text: str) -> NodeAddr | None:
    return NodeAddr.parse(text) if text else None


def _backend(word: str) -> str:
    backend = {"": "auto", "zmq": "tcp"}.get(word.lower(), word.lower())
    known = ("auto", "tcp", "shm", "nccl", "gloo", "cuda_ipc", "nixl")
    if backend not in known:
        raise ValueError(f"must be nccl or zmq, or one of ours: {', '.join(known)}")
    return backend


def _one_of(*words: str) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return word

    return check


def _preemption_mode(value: int) -> str:
    if value not in (0, 1):
        raise ValueError("must be 0 (swap) or 1 (recompute)")
    return ("swap", "recompute")[value]


def _not_negative(value: int) -> int:
    if value < 0:
        raise ValueError("must be 0 (all visible GPUs) or more")
    return value


def _to(field: str, kind: type, convert: Callable[[Any], Any] | None = None) -> Key:
    return Key(kind, field=field, convert=convert)


def _not_implemented(kind: type, *off: Any, instead: str) -> Key:
    return Key(kind, off=off, instead=instead)


_TRANSFER_QUEUES = "each pair has a queue of its own and send_thread_num threads"
_LORA = "LoRA adapters are not loaded"
_NO_DRAFTS = "every step yields one token per sequence"
_METRICS = "metrics are served at /metrics in Prometheus text, for a collector to scrape"

KEYS: dict[str, Key] = {
    # ---- setting.global
    "setting.global.tensor_para_size": _to("parallel.tensor_parallel_size", int, _not_negative),
    "setting.global.pipeline_para_size": _not_implemented(
        int, 0, 1, instead="a node is one host; the model runs on its tensor_para_size ranks"
    ),
    "setting.global.attn_data_para_size": _not_implemented(
        int, 0, 1, instead="attention is split over all tensor_para_size ranks, as the other layers are"
    ),
    "setting.global.expert_world_size": _not_implemented(int, 0, 1, instead="all experts live inside the node"),
    "setting.global.expert_para_size": _not_implemented(int, 0, 1, instead="each expert is split over all tensor_para_size ranks"),
    "setting.global.enable_lora_adapter": _not_implemented(bool, False, instead=_LORA),
    "setting.global.embed_tokens_use_cpu": _not_implemented(bool, False, instead="embeddings live with the model"),
    "setting.global.enable_cuda_graph": _to("runtime.enable_cuda_graph", bool),
    "setting.global.enable_full_shared_expert": _not_implemented(bool, False, instead="shared experts are split like other layers"),
    "setting.global.pipeline_para_comm_type": _not_implemented(str, "", "default", instead="there is no pipeline to pass data through"),
    # ---- setting.connector
    "setting.connector.group_role": _to("connector.role", str, _role),
    "setting.connector.router_addr": _to("connector.router_addr", str, _address),
    "setting.connector.inference_addr": _to("connector.inference_addr", str, _address),
    "setting.connector.coordinator_addr": _to("connector.coordinator_addr", str, _address),
    "setting.connector.cluster_name": _to("connector.cluster_name", str),
    "setting.connector.communication_type": _to("connector.backend", str, _backend),
    "setting.connector.heartbeat_interval_ms": _to("connector.heartbeat_interval_s", int, _seconds),
    "setting.connector.connector_waiting_sec": _to("connector.connect_timeout_s", int, float),
    "setting.connector.transfer_batch": _to("connector.transfer_batch", int),
    "setting.connector.send_thread_num": _to("connector.num_send_threads", int),
    "setting.connector.circular_bucket_num": _not_implemented(int, 4, instead=_TRANSFER_QUEUES),
    "setting.connector.circular_thread_num": _not_implemented(int, 4, instead=_TRANSFER_QUEUES),
    "setting.connector.circular_bucket_size": _not_implemented(int, 8192, instead=_TRANSFER_QUEUES),
    "setting.connector.task_expire_sec": _not_implemented(
        int, 300, instead="a cancelled transfer is dropped as soon as both sides agree; ksana_lab.lease_s bounds a silent peer"
    ),
    # ---- setting.batch_scheduler
    "setting.batch_scheduler.schedule_strategy": _not_implemented(int, 0, instead="batching is continuous"),
    "setting.batch_scheduler.waiting_timeout_in_ms": _to("scheduler.waiting_timeout_s", int, _seconds),
    "setting.batch_scheduler.max_waiting_queue_len": _to("scheduler.max_num_waiting", int),
    "setting.batch_scheduler.max_step_tokens": _to("scheduler.max_num_batched_tokens", int),
    "setting.batch_scheduler.max_batch_size": _to("scheduler.max_num_seqs", int),
    "setting.batch_scheduler.max_pretransfer_batch_size": _to("scheduler.max_num_pretransfer_seqs", int),
    "setting.batch_scheduler.transfer_layer_chunk_size": _to("connector.layers_per_chunk", int),
    "setting.batch_scheduler.max_token_len": _to("model.max_model_len", int, _zero_is_none),
    "setting.batch_scheduler.swapout_block_threshold": _not_implemented(
        float, 1.0, instead="the newest sequence is preempted in the very step that lacks a block, none before"
    ),
    "setting.batch_scheduler.swapin_block_threshold": _to("scheduler.swap_in_spare_blocks", float),
    "setting.batch_scheduler.launch_block_threshold": _to("scheduler.admission_spare_blocks", float),
    "setting.batch_scheduler.enable_auto_prefix_cache": _to("cache.enable_prefix_caching", bool),
    "setting.batch_scheduler.split_fuse_token_num": _to("scheduler.prefill_chunk_tokens", int),
    "setting.batch_scheduler.swap_threadpool_size": _not_implemented(
        int, 2, instead="blocks are swapped on the stream that computes, without threads"
    ),
    "setting.batch_scheduler.preempt_mode": _to("scheduler.preemption_mode", int, _preemption_mode),  # see also _swap_space
    "setting.batch_scheduler.min_flexible_cache_num": _not_implemented(int, 0, instead="only prefixes are found in the cache"),
    "setting.batch_scheduler.enable_speculative_decoding": _not_implemented(bool, False, instead=_NO_DRAFTS),
    "setting.batch_scheduler.mtp_step_num": _not_implemented(int, 0, instead=f"MTP layers are not run, {_NO_DRAFTS}"),
    "setting.batch_scheduler.enable_mtp_module": _not_implemented(bool, False, instead=f"MTP layers are not run, {_NO_DRAFTS}"),
    "setting.batch_scheduler.enable_xgrammar": _not_implemented(bool, False, instead="a request for structured output is refused"),
    # ---- setting.block_manager
    "setting.block_manager.block_token_num": _to("cache.block_size", int),
    "setting.block_manager.reserved_device_memory_ratio": _to("cache.reserved_memory_ratio", float),
    "setting.block_manager.block_device_memory_ratio": _to("cache.device_memory_ratio", float),
    "setting.block_manager.block_host_memory_factor": _to("cache.host_memory_factor", float),
    "setting.block_manager.dynamic_reusable_memory_ratio": _not_implemented(
        float, 1.0, instead="what a step needs besides weights and blocks is measured when the node starts"
    ),
    "setting.block_manager.lora_deivce_memory_ratio": _not_implemented(float, 0.0, instead=_LORA),  # the reference's spelling
    "setting.block_manager.lora_host_memory_factor": _not_implemented(float, 0.0, instead=_LORA),
    # ---- setting.attn_backend, quantization_config, endpoint_type, tokenization, profiler
    "setting.attn_backend.enable_blocked_multi_token_forwarding_kv": _not_implemented(
        bool, True, instead="prefill always reads earlier tokens through the block table"
    ),
    "setting.attn_backend.flash_attn_impl": _not_implemented(
        str, "", "auto", instead="the fastest attention that runs on the device is chosen"
    ),
    "setting.quantization_config.gptq_backend": _not_implemented(str, "", "cutlass", instead="GPTQ and AWQ checkpoints are not read"),
    "setting.quantization_config.kv_cache.dtype": Key(str, convert=_one_of("auto", "fp8_e4m3", "fp8_e5m2")),  # see _kv_dtype
    "setting.quantization_config.weight.quant_method": _to("model.quant_method", str, _one_of("auto", "fp8_e4m3")),
    "setting.endpoint_type": _not_implemented(str, "", "python", instead="the node serves HTTP"),
    "setting.tokenization.add_special_tokens": _to("tokenizer.add_special_tokens", bool),
    "setting.tokenization.skip_special_tokens": _to("tokenizer.skip_special_tokens", bool),
    "setting.profiler.metrics_export_url": _not_implemented(str, "", instead=_METRICS),
    "setting.profiler.export_interval_millis": _not_implemented(int, 60000, instead=_METRICS),
    "setting.profiler.export_timeout_millis": _not_implemented(int, 1000, instead=_METRICS),
    "setting.profiler.attributes": _not_implemented(dict, {}, instead=_METRICS),
    # ---- model_spec
    MODEL_DIR: _to("model.model_dir", str),
    "model_spec.plugin_model.enable_tensorrt": _not_implemented(bool, True, instead="plugin (vision) models are not run"),
    "model_spec.plugin_model.plugin_thread_pool_size": _not_implemented(int, 1, instead="plugin (vision) models are not run"),
    "model_spec.plugin_model.thread_pool_size": _not_implemented(int, 1, instead="plugin (vision) models are not run"),
    # ---- ours
    "ksana_lab.device": _to("runtime.device", str),
    "ksana_lab.device_ids": _to("runtime.device_ids", tuple),
    "ksana_lab.all_reduce": _to("runtime.all_reduce", str),
    "ksana_lab.few_rows_linear": _to("runtime.few_rows_linear", bool),
    "ksana_lab.prefill_graph_tokens": _to("runtime.prefill_graph_tokens", int),
    "ksana_lab.prefill_step_tokens": _to("scheduler.prefill_step_tokens", int),
    "ksana_lab.num_threads": _to("runtime.num_threads", int),
    "ksana_lab.seed": _to("runtime.seed", int),
    "ksana_lab.trace_dir": _to("runtime.trace_dir", str),
    "ksana_lab.dtype": _to("model.dtype", str),
    "ksana_lab.num_blocks": _to("cache.num_blocks", int),
    "ksana_lab.tokenizer_dir": _to("tokenizer.tokenizer_dir", str),
    "ksana_lab.transfer_mode": _to("connector.transfer_mode", str),
    "ksana_lab.bulk_below_tokens": _to("connector.bulk_below_tokens", int),
    "ksana_lab.checksum": _to("connector.checksum", bool),
    "ksana_lab.wire_dtype": _to("connector.wire_dtype", str),
    "ksana_lab.lease_s": _to("connector.lease_s", float),
    "ksana_lab.link.bandwidth_gbps": _to("connector.link.bandwidth_gbps", float),
    "ksana_lab.link.latency_us": _to("connector.link.latency_us", float),
    "ksana_lab.link.shared": _to("connector.link.shared", bool),
}

_SECTIONS = {key.rsplit(".", depth)[0] for key in KEYS for depth in range(1, key.count(".") + 1)}


def load(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    substitutions: Mapping[str, str] | None = None,
    num_gpus: int | None = None,
) -> LoadedConfig:
    """Read a node's file. ``overrides``: ``"batch_scheduler.max_batch_size=8"``, KsanaLLM's spelling; ``setting.`` may be left out, and so
    may everything before a last name that is unique. ``substitutions``: values for ``{ROUTER_IP}`` and the like, applied after the
    overrides. ``num_gpus``: visible GPUs, asked of the host when None.

    Raises ConfigError naming the key, what is wrong, what to do, and the file."""
    tree = apply_overrides(yaml_file.read(path), overrides)
    return translate(substitute(tree, substitutions or {}, str(path)), str(path), num_gpus=num_gpus)


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``tree`` with each ``key=value`` put where the key belongs."""
    changed = copy.deepcopy(dict(tree))
    for text in overrides:
        override = parse_override(text)
        put(changed, locate(override), override.value)
    return changed


def locate(override: Override) -> tuple[str, ...]:
    """The full path of an override: as given, with ``setting.`` in front, or completed from a unique last part."""
    given = ".".join(override.path)
    for key in (given, f"setting.{given}"):
        if key in KEYS or key.startswith("setting.profiler.attributes."):
            return tuple(key.split("."))
    matches = [key for key in KEYS if key.endswith(f".{given}")]
    if len(matches) == 1:
        return tuple(matches[0].split("."))
    if matches:
        raise ConfigError(f"--set {given}: ambiguous, say one of {', '.join(_shown(key) for key in matches)}")
    raise ConfigError(f"--set {_unknown(tuple(given.split('.')))}")


def substitute(tree: Mapping[str, Any], values: Mapping[str, str], source: str) -> dict[str, Any]:
    """Fill every ``{NAME}`` in a string. Raises ConfigError for one without a value, naming the option that gives it."""
    filled: dict[str, Any] = copy.deepcopy(dict(tree))
    for path, value in leaves(tree):
        if isinstance(value, str) and "{" in value:
            put(filled, path, _fill(value, values, _shown(".".join(path)), source))
    return filled


def _fill(text: str, values: Mapping[str, str], key: str, source: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if values.get(name):
            return values[name]
        option = PLACEHOLDERS.get(name)
        how = f"give {option}" if option else f"the placeholders are {', '.join(PLACEHOLDERS)}"
        raise ConfigError(f"{key}: {{{name}}} in {text!r} is not filled; {how}, or --set {key}=… ({source})")

    return re.sub(r"\{([A-Za-z][A-Za-z0-9_]*)\}", value_of, text)


def translate(tree: Mapping[str, Any], source: str, *, num_gpus: int | None = None) -> LoadedConfig:
    """A file's content, placeholders filled, as EngineConfig. ``source`` is named in errors and warnings."""
    fields: dict[str, Any] = {}
    origin: dict[str, tuple[str, Any]] = {}  # field -> (key, value) in the user's words, for errors
    warnings: list[str] = []
    given = _given(tree, source)
    for name, value in given.items():
        key = KEYS[name]
        value = _typed(name, key, value, source)
        if key.field is not None:
            fields[key.field] = value
            origin[key.field] = (name, given[name])
        elif key.instead and value not in key.off:
            warnings.append(_warning(name, given[name], key.instead, source))
    fields.update(_swap_space(fields, given, source, warnings))
    fields.update(_kv_dtype(given, source, warnings))
    gpus = visible_gpus() if num_gpus is None and fields.get("runtime.device") != "cpu" else num_gpus or 0
    fields.update(_settled_devices(fields, gpus))
    fields.update(_settled_backend(fields, gpus, given, source, warnings))
    warnings += _without_effect(fields, given, source)
    config = _build(fields, origin, source)
    _check_connector(config.connector, source)
    return LoadedConfig(config, warnings)


def _given(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Full key -> value for every key that is set (a null value is not). Raises ConfigError for an unknown key."""
    given: dict[str, Any] = {}
    for path, value in leaves(tree):
        attributes = path[:3] == ("setting", "profiler", "attributes")
        name = ".".join(path[:3] if attributes else path)
        if name in KEYS:
            if attributes and len(path) > 3:
                given.setdefault(name, {})[".".join(path[3:])] = value
            elif value is not None:
                given[name] = value
        elif name in _SECTIONS and (value is None or value == {}):
            continue
        elif name in _SECTIONS:
            raise ConfigError(f"{_shown(name)} must hold keys, got {value!r} ({source})")
        elif (value_at := ".".join(path[:-1])) in KEYS:
            raise ConfigError(f"{_shown(value_at)} must be a value, got a mapping; quote a text that begins with a brace ({source})")
        elif path[0] not in ROOTS:
            near = nearest(path[0], ROOTS) or f"; the sections are {', '.join(ROOTS)}"
            raise ConfigError(f"{path[0]} is not a known section{near} ({source})")
        else:
            raise ConfigError(f"{_unknown(path)} ({source})")
    return given


def _unknown(path: tuple[str, ...]) -> str:
    """``x.y is not a known key; did you mean z?``: the same name in another section first, then the nearest name in this one."""
    last, section = path[-1], ".".join(path[:-1])
    by_section = {key: key.rpartition(".")[0] for key in KEYS}
    elsewhere = [_shown(key) for key in KEYS if key.endswith(f".{last}")]
    if elsewhere:
        near = f"; did you mean {elsewhere[0]}?"
    else:
        siblings = [key.rpartition(".")[2] for key, parent in by_section.items() if parent in (section, f"setting.{section}")]
        near = nearest(last, siblings) or nearest(_shown(".".join(path)), map(_shown, KEYS))
    return f"{_shown('.'.join(path))} is not a known key{near}"


def _shown(name: str) -> str:
    """A key as KsanaLLM's documentation writes it."""
    return name.removeprefix("setting.")


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a mapping", tuple: "a list of integers"}
_UNITS = {"_gbps": " of Gb/s (1 GB/s is 8)", "_us": " of microseconds", "_ms": " of milliseconds", "_s": " of seconds"}
_BOOL_WORDS = {"true": True, "yes": True, "on": True, "y": True, "false": False, "no": False, "off": False, "n": False}


def _typed(name: str, key: Key, value: Any, source: str) -> Any:
    """``value`` as the key's kind, converted. Strict: "8" is no integer, 1 is no boolean."""
    try:
        kind_value = _of_kind(key.kind, value)
    except TypeError:
        got = f"{value!r}" if not isinstance(value, str) else f"the string {value!r}"
        unit = next((said for ending, said in _UNITS.items() if name.endswith(ending)), "")
        raise ConfigError(f"{_shown(name)} must be {_KIND_NAMES[key.kind]}{unit}, got {got} ({source})") from None
    try:
        return key.convert(kind_value) if key.convert else kind_value
    except ValueError as error:
        raise ConfigError(f"{_shown(name)}: {error}, got {value!r} ({source})") from None


def _of_kind(kind: type, value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, str) and value.lower() in _BOOL_WORDS:
        return _BOOL_WORDS[value.lower()]  # yaml-cpp, which KsanaLLM reads with, takes on/off/yes/no
    if kind is float and is_number:
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        return tuple(value)
    if kind in (bool, int, str, dict) and type(value) is kind:
        return value
    raise TypeError


def _warning(name: str, value: Any, instead: str, source: str) -> str:
    return f"{_shown(name)}: {value!r} is not implemented: {instead} ({source})"


def _swap_space(fields: Mapping[str, Any], given: Mapping[str, Any], source: str, warnings: list[str]) -> dict[str, Any]:
    """``preempt_mode`` and ``block_host_memory_factor`` where one is absent: 0 (swap) and 2.0 in the reference. A file with neither asks
    for no host memory here, and its preempted sequences are recomputed."""
    mode, factor = fields.get("scheduler.preemption_mode"), fields.get("cache.host_memory_factor")
    if mode == "swap" and factor is None:
        return {"cache.host_memory_factor": 2.0}
    if mode is None and factor:
        return {"scheduler.preemption_mode": "swap"}
    if mode == "recompute" and factor:
        why = "preempt_mode is 1, so nothing is swapped"
        warnings.append(_no_effect("setting.block_manager.block_host_memory_factor", given, why, source))
    if mode == "swap" and factor == 0:
        why = "block_host_memory_factor is 0, so there is no room to swap to and preempted sequences are computed again"
        warnings.append(_no_effect("setting.batch_scheduler.preempt_mode", given, why, source))
    return {}


def _without_effect(fields: Mapping[str, Any], given: Mapping[str, Any], source: str) -> list[str]:
    """One warning for each key that another one makes idle. Of the device only where the file itself says cpu: with auto it may be meant
    for another machine."""
    idle = []
    mode = fields.get("connector.transfer_mode")
    if mode in ("bulk", "chunk") and fields.get("connector.layers_per_chunk", 1) != 1:
        why = f"ksana_lab.transfer_mode is {mode}, so all layers are sent together"
        idle.append(("setting.batch_scheduler.transfer_layer_chunk_size", why))
    if fields.get("runtime.device") == "cpu":
        if fields.get("runtime.device_ids"):
            idle.append(("ksana_lab.device_ids", "ksana_lab.device is cpu"))
        why = "ksana_lab.device is cpu, where ksana_lab.num_blocks sizes the KV cache"
        if fields.get("cache.device_memory_ratio", -1.0) >= 0:
            idle.append(("setting.block_manager.block_device_memory_ratio", why))
        reserved = CacheOptions().reserved_memory_ratio
        if fields.get("cache.reserved_memory_ratio", reserved) != reserved:
            idle.append(("setting.block_manager.reserved_device_memory_ratio", why))
    return [_no_effect(name, given, why, source) for name, why in idle]


def _no_effect(name: str, given: Mapping[str, Any], why: str, source: str) -> str:
    return f"{_shown(name)}: {given[name]!r} has no effect: {why} ({source})"


def _kv_dtype(given: Mapping[str, Any], source: str, warnings: list[str]) -> dict[str, Any]:
    """Of the reference's two FP8 formats there is the one that keeps more digits."""
    name = "setting.quantization_config.kv_cache.dtype"
    dtype = given.get(name, "auto")
    if dtype == "fp8_e5m2":
        warnings.append(_warning(name, dtype, "the KV cache has the model's dtype; fp8_e4m3 is implemented", source))
        dtype = "auto"
    return {"cache.dtype": dtype}


def _settled_devices(fields: Mapping[str, Any], num_gpus: int) -> dict[str, Any]:
    """0 or absent ``tensor_para_size`` means every GPU that is visible, as in the reference; a CPU is one rank."""
    if fields.get("parallel.tensor_parallel_size"):
        return {}
    on_gpus = fields.get("runtime.device", "auto") != "cpu"
    chosen = len(fields.get("runtime.device_ids", ()))
    return {"parallel.tensor_parallel_size": (chosen or num_gpus or 1) if on_gpus else 1}


def _settled_backend(
    fields: Mapping[str, Any], num_gpus: int, given: Mapping[str, Any], source: str, warnings: list[str]
) -> dict[str, Any]:
    """Backends that move GPU memory cannot serve a node on a CPU: ``auto`` then, with a warning."""
    on_cpu = fields.get("runtime.device", "auto") == "cpu" or (fields.get("runtime.device", "auto") == "auto" and num_gpus == 0)
    if not on_cpu or fields.get("connector.backend") not in ("nccl", "cuda_ipc"):
        return {}
    name = "setting.connector.communication_type"
    instead = "auto is used: shm on one host, tcp between hosts"
    warnings.append(f"{_shown(name)}: {given[name]!r} moves GPU memory but this node runs on a CPU; {instead} ({source})")
    return {"connector.backend": "auto"}


def _build(fields: Mapping[str, Any], origin: Mapping[str, tuple[str, Any]], source: str) -> EngineConfig:
    if not fields.get("model.model_dir"):
        raise ConfigError(f"{MODEL_DIR} is missing; set it in the file or give --model-dir ({source})")
    tree: dict[str, Any] = {}
    for dotted, value in fields.items():
        put(tree, tuple(dotted.split(".")), value)
    try:
        return EngineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_in_user_words(fault, origin) for fault in error.errors()) + f" ({source})") from None


def _in_user_words(fault: Any, origin: Mapping[str, tuple[str, Any]]) -> str:
    dotted = ".".join(str(part) for part in fault["loc"])
    name, value = origin.get(dotted, (dotted, fault["input"]))
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{_shown(name)}: {message}, got {value!r}"


def _check_connector(connector: ConnectorOptions, source: str) -> None:
    """A prefill or decode node needs a backend that can do what is asked of it, and its three addresses; the reference would silently run
    it as a mixed one."""
    if connector.role.is_disaggregated and connector.wire_dtype != "auto" and connector.backend in UNPACKED:
        raise ConfigError(
            f"ksana_lab.wire_dtype: {connector.wire_dtype} does not go over communication_type {connector.backend}; choose auto, cuda_ipc, "
            f"shm, tcp or nccl, or leave wire_dtype out ({source})"
        )
    if connector.role.is_disaggregated:
        for name in ("router_addr", "inference_addr", "coordinator_addr"):
            if getattr(connector, name) is None:
                raise ConfigError(
                    f"connector.{name} is empty but group_role is {connector.role.value}; set it to host:port, "
                    f"or group_role to none for a mixed node ({source})"
                )
    if connector.router_addr is not None and connector.inference_addr is None:
        raise ConfigError(
            f"connector.inference_addr is empty but router_addr is set: the router must know how to reach this node ({source})"
        )
    coordinator = connector.coordinator_addr
    if coordinator is not None and not coordinator.is_ip_literal:
        raise ConfigError(
            f"connector.coordinator_addr must begin with an IP address of this host, not a name, got {str(coordinator)!r} ({source})"
        )
