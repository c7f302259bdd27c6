"""What a checkpoint directory says of its model, in one spelling. Imports no torch: a launcher checks directories before loading any.

Reads Hugging Face's ``config.json`` and ``generation_config.json`` as transformers 4 and 5 write them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksana_lab.errors import CheckpointError, ConfigError

# Written by models/synth.py beside config.json: how the weights came about, or how to make them when there are none on disk.
SYNTH_SPEC_FILE = "ksana_lab_synth.json"

DTYPES = ("float32", "bfloat16", "float16")  # that the engine computes in

_NO_DIRECTORY_HINT = "give a Hugging Face checkpoint, or make one: python -m ksana_lab.models.synth --arch qwen3 --shape tiny --out DIR"


@dataclass(frozen=True)
class Architecture:
    """How one family differs from a Llama decoder, and what its config.json leaves out when it means the default."""

    model_type: str
    has_qkv_bias: bool = False  # always; Llama and Qwen3 have biases only when the config says attention_bias
    has_qk_norm: bool = False  # RMSNorm over head_dim of every query and key head, before rotary
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "Qwen2ForCausalLM": Architecture("qwen2", has_qkv_bias=True),
    "Qwen3ForCausalLM": Architecture("qwen3", has_qk_norm=True, default_head_dim=128),
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's change of the rotary frequencies: slow ones are divided by ``factor``, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one decoder. Whole-model figures; what a tensor-parallel rank holds is asked of the methods."""

    architecture: str  # a key of ARCHITECTURES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_qk_norm: bool = False
    dtype: str = "float32"  # the checkpoint's; what the engine computes in is its own choice
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, embeddings and head counted once when tied."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        small = 2 * self.hidden_size + (2 * self.head_dim if self.has_qk_norm else 0)
        small += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.has_qkv_bias else 0
        small += self.hidden_size if self.has_output_bias else 0
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + small) + vocabulary + self.hidden_size

    def check_tensor_parallel(self, size: int) -> None:
        """Raises ConfigError unless ``size`` ranks can share this model's heads and MLP evenly."""
        kv_fits = self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0
        if self.num_heads % size or self.intermediate_size % size or not kv_fits:
            raise ConfigError(
                f"tensor_parallel_size {size} does not divide this model: {self.num_heads} attention heads, {self.num_kv_heads} KV heads, "
                f"MLP width {self.intermediate_size}"
            )

    def num_local_heads(self, tp_size: int) -> int:
        return self.num_heads // tp_size

    def num_local_kv_heads(self, tp_size: int) -> int:
        """KV heads one rank holds; with more ranks than KV heads each head lives on several ranks."""
        return max(1, self.num_kv_heads // tp_size)

    def first_kv_head(self, tp_rank: int, tp_size: int) -> int:
        """The model's number of this rank's first KV head."""
        return tp_rank * self.num_kv_heads // tp_size

    @classmethod
    def from_dir(cls, model_dir: str | os.PathLike[str]) -> ModelConfig:
        """Read a checkpoint directory. Raises CheckpointError that names the directory and what it lacks."""
        path = Path(model_dir)
        raw = _read_json(path, "config.json")
        weight_files(path)
        beside = path / "generation_config.json"
        generation = _read_json(path, beside.name) if beside.exists() else {}
        return _parse(_Reader(path / "config.json", raw), _Reader(beside, generation))


def weight_files(model_dir: str | os.PathLike[str]) -> list[Path]:
    """The directory's safetensors files; [] when it is a synthetic one whose weights are made at load time. Raises CheckpointError."""
    path = Path(model_dir)
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(path, index.name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{path}: {index.name} has no weight_map of file names")
        files = [path / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            some = ", ".join(missing[:4])
            raise CheckpointError(f"{path} lacks {len(missing)} of the {len(files)} weight files that {index.name} names: {some}")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if files or generated_seed(path) is not None:
        return files
    has_pickles = any(path.glob("*.bin")) or any(path.glob("*.pth"))
    hint = "only pickled weights; convert them to safetensors" if has_pickles else "no *.safetensors file"
    raise CheckpointError(f"{path} holds {hint}")


def generated_seed(model_dir: str | os.PathLike[str]) -> int | None:
    """The seed from which a synthetic directory without weights (``synth --no-weights``) wants its weights made; None for any other."""
    path = Path(model_dir)
    if not (path / SYNTH_SPEC_FILE).is_file():
        return None
    spec = _read_json(path, SYNTH_SPEC_FILE)
    if spec.get("has_weights", True):
        return None
    if type(seed := spec.get("seed")) is not int:
        raise _Reader(path / SYNTH_SPEC_FILE, spec).fault("seed", "an integer")
    return seed


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"model_dir {str(path)!r} does not exist; {_NO_DIRECTORY_HINT}")
    if not path.is_dir():
        raise CheckpointError(f"model_dir {str(path)!r} is not a directory; {_NO_DIRECTORY_HINT}")
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no {name}; {_NO_DIRECTORY_HINT}") from None
    except OSError as error:
        raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / name} does not hold a JSON object")
    return content


@dataclass(frozen=True)
class _Reader:
    """Values of one JSON file, checked: whatever is wrong is a CheckpointError that names file, key and value.

    ``section``: what a nested mapping's keys are called behind. A default is for an absent key; null is a value, and no number."""

    file: Path
    values: Mapping[str, Any]
    section: str = ""

    def integer(self, key: str, default: int | None = None) -> int:
        """1 or more."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:
            raise self.fault(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Above 0 and finite."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.fault(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """False when absent or null."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.fault(key, "true or false")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """() when absent or null. One id stands for a list of one."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token_id) is int for token_id in ids):
            raise self.fault(key, "a token id or a list of them")
        return tuple(ids)

    def mapping(self, key: str) -> _Reader:
        """An empty one when absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fault(key, "a mapping")
        return _Reader(self.file, value or {}, f"{self.section}{key}.")

    def fault(self, key: str, wanted: str) -> CheckpointError:
        found = repr(self.values[key]) if key in self.values else "none"
        return CheckpointError(f"{self.file.parent}: {self.file.name} must give {self.section}{key} as {wanted}, found {found}")


def _parse(config: _Reader, generation: _Reader) -> ModelConfig:
    raw, path = config.values, config.file.parent
    name = _architecture_name(raw, path)
    arch = ARCHITECTURES[name]
    _refuse_unsupported(raw, path)
    has_bias = config.flag("attention_bias")
    num_heads, num_kv_heads, head_dim = _heads(config, arch)
    theta, scaling = _rope(config)
    return ModelConfig(
        architecture=name,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.integer("max_position_embeddings", 2048),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        has_qkv_bias=arch.has_qkv_bias or has_bias,
        has_output_bias=not arch.has_qkv_bias and has_bias,
        has_qk_norm=arch.has_qk_norm,
        dtype=_dtype(config),
        bos_token_id=next(iter(generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")), None),
        eos_token_ids=generation.token_ids("eos_token_id") or config.token_ids("eos_token_id"),
    )


def _architecture_name(raw: Mapping[str, Any], path: Path) -> str:
    given = raw.get("architectures") or [n for n, arch in ARCHITECTURES.items() if arch.model_type == raw.get("model_type")]
    names = given if isinstance(given, list) else [given]
    for name in names:
        if isinstance(name, str) and name in ARCHITECTURES:
            return name
    found = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    raise CheckpointError(f"{path} is a {found} checkpoint; supported are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    """Settings that would change the arithmetic and are not implemented: wrong tokens are worse than a refusal."""
    faults = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "quantization_config": bool(raw.get("quantization_config")),
        "use_sliding_window": bool(raw.get("use_sliding_window", False)) and raw.get("sliding_window") is not None,
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for key, is_fault in faults.items():
        if is_fault:
            raise CheckpointError(f"{path}: config.json sets {key}={raw[key]!r}, which is not supported")


def _heads(config: _Reader, arch: Architecture) -> tuple[int, int, int]:
    """(attention heads, KV heads, head_dim); a null of the last two is their default, as in transformers."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = num_heads if config.values.get("num_key_value_heads") is None else config.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise config.fault("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}")
    if config.values.get("head_dim") is not None:
        head_dim = config.integer("head_dim")
    else:
        head_dim = arch.default_head_dim or config.integer("hidden_size") // num_heads
    if head_dim < 2 or head_dim % 2:  # rotary embeddings turn pairs
        raise config.fault("head_dim", f"an even number (hidden_size / num_attention_heads where it is absent), it is {head_dim}")
    return num_heads, num_kv_heads, head_dim


def _dtype(config: _Reader) -> str:
    key = "dtype" if config.values.get("dtype") else "torch_dtype"
    dtype = str(config.values.get(key) or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise config.fault(key, f"one of {', '.join(DTYPES)}")
    return dtype


def _rope(config: _Reader) -> tuple[float, Llama3RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` beside ``rope_scaling`` (4)."""
    rope = config.mapping("rope_parameters" if config.values.get("rope_parameters") else "rope_scaling")
    theta = (rope if "rope_theta" in rope.values else config).number("rope_theta", 10000.0)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{config.file.parent}: rope scaling {kind!r} is not supported; supported are default, llama3")
    original = "original_max_position_embeddings"
    length = rope.integer(original) if original in rope.values else config.integer("max_position_embeddings")
    return theta, Llama3RopeScaling(rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor"), length)
