"""What a checkpoint directory says of its model, in one spelling. Imports no torch: a launcher checks directories before loading any.

Reads Hugging Face's ``config.json`` and ``generation_config.json`` as transformers 4 and 5 write them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksana_lab.errors import CheckpointError, ConfigError

# Written by models/synth.py beside config.json: how the weights came about, or how to make them when there are none on disk.
SYNTH_SPEC_FILE = "ksana_lab_synth.json"

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
        generation = _read_json(path, "generation_config.json") if (path / "generation_config.json").exists() else {}
        return _parse(raw, generation, path)


def weight_files(model_dir: str | os.PathLike[str]) -> list[Path]:
    """The directory's safetensors files; [] when it is a synthetic one whose weights are made at load time. Raises CheckpointError."""
    path = Path(model_dir)
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(path, index.name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: {index.name} has no weight_map")
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
    return None if spec.get("has_weights", True) else int(spec["seed"])


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


def _parse(raw: dict[str, Any], generation: dict[str, Any], path: Path) -> ModelConfig:
    name = _architecture_name(raw, path)
    arch = ARCHITECTURES[name]
    _refuse_unsupported(raw, path)
    has_bias = bool(raw.get("attention_bias", False))
    num_heads = _positive_int(raw, "num_attention_heads", path)
    hidden_size = _positive_int(raw, "hidden_size", path)
    theta, scaling = _rope(raw, path)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    return ModelConfig(
        architecture=name,
        vocab_size=_positive_int(raw, "vocab_size", path),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(raw, "intermediate_size", path),
        num_layers=_positive_int(raw, "num_hidden_layers", path),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or arch.default_head_dim or hidden_size // num_heads,
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        has_qkv_bias=arch.has_qkv_bias or has_bias,
        has_output_bias=not arch.has_qkv_bias and has_bias,
        has_qk_norm=arch.has_qk_norm,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        bos_token_id=generation.get("bos_token_id", raw.get("bos_token_id")),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _architecture_name(raw: dict[str, Any], path: Path) -> str:
    names = raw.get("architectures") or [n for n, arch in ARCHITECTURES.items() if arch.model_type == raw.get("model_type")]
    for name in names:
        if name in ARCHITECTURES:
            return name
    found = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    raise CheckpointError(f"{path} is a {found} checkpoint; supported are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
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


def _positive_int(raw: dict[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: config.json must give {key} as a positive integer, found {value!r}")
    return value


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, Llama3RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` beside ``rope_scaling`` (4)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{path}: rope scaling {kind!r} is not supported; supported are default, llama3")
    try:
        original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
        scaling = Llama3RopeScaling(float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(original))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: llama3 rope scaling is incomplete: {error}") from None
    return theta, scaling
