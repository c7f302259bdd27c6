"""Makes checkpoints without downloading any: Hugging Face directories of published and tiny shapes, with seeded random weights.

    python -m ksana_lab.models.synth --arch qwen3 --shape tiny --out DIR

The random-weight trap: with the usual initialisation (std 0.02, tied) a model repeats its last token for ever, and every KV-cache bug
hides behind that. Here a matrix has std 1.6 / sqrt(inputs), so that what attention read decides the next token."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksana_lab.errors import CheckpointError, KsanaLabError
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ARCHITECTURES, SYNTH_SPEC_FILE, Llama3RopeScaling, ModelConfig
from ksana_lab.models.synth_tokenizer import special_tokens, write_tokenizer

_SPEC_VERSION = 1  # raise it when the same arguments make other files
_MAX_SHARD_BYTES = 4 << 30
_GAIN = 1.6


def _llama(
    vocab: int, hidden: int, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, factor: float, tied: bool
) -> ModelConfig:
    original, theta = 8192, 500000.0
    return ModelConfig(
        "LlamaForCausalLM", vocab, hidden, width, layers, heads, kv_heads, head_dim,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=theta, rope_scaling=Llama3RopeScaling(factor, 1.0, 4.0, original),
        tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip


def _qwen2(vocab: int, hidden: int, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        "Qwen2ForCausalLM", vocab, hidden, width, layers, heads, kv_heads, head_dim,
        max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=tied, has_qkv_bias=True, dtype="bfloat16",
    )  # fmt: skip


def _qwen3(vocab: int, hidden: int, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        "Qwen3ForCausalLM", vocab, hidden, width, layers, heads, kv_heads, head_dim,
        max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=tied, has_qk_norm=True, dtype="bfloat16",
    )  # fmt: skip


def _toy(config: ModelConfig) -> ModelConfig:
    """The same family at a size for laptops and tests: short tables, and rope scaling that shows within them."""
    scaling = replace(config.rope_scaling, original_max_position_embeddings=1024) if config.rope_scaling else None
    return replace(config, max_position_embeddings=8192, rope_scaling=scaling)


def _with_special_ids(config: ModelConfig) -> ModelConfig:
    special = special_tokens(ARCHITECTURES[config.architecture].model_type, config.vocab_size)
    return replace(config, bos_token_id=special.bos_id, eos_token_ids=special.eos_ids)


# "<arch>-<shape>"; columns: vocabulary, hidden, MLP width, layers, heads, KV heads, head_dim, (rope factor,) tied head.
SHAPES: dict[str, ModelConfig] = {
    name: _with_special_ids(config)
    for name, config in {
        "llama-tiny": _toy(_llama(1024, 64, 160, 4, 8, 4, 16, 8.0, True)),
        "llama-small": _toy(_llama(4096, 256, 768, 8, 8, 4, 32, 8.0, True)),
        "llama-1b": _llama(128256, 2048, 8192, 16, 32, 8, 64, 32.0, True),  # Llama-3.2-1B
        "llama-3b": _llama(128256, 3072, 8192, 28, 24, 8, 128, 32.0, True),  # Llama-3.2-3B
        "llama-8b": _llama(128256, 4096, 14336, 32, 32, 8, 128, 8.0, False),  # Llama-3.1-8B
        "llama-70b": _llama(128256, 8192, 28672, 80, 64, 8, 128, 8.0, False),  # Llama-3.1-70B
        "qwen2-tiny": _toy(_qwen2(1024, 64, 160, 4, 8, 4, 16, True)),
        "qwen2-small": _toy(_qwen2(4096, 256, 768, 8, 8, 4, 32, True)),
        "qwen2-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2, 64, True),  # Qwen2.5-0.5B
        "qwen2-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, 128, True),  # Qwen2.5-1.5B
        "qwen2-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, 128, False),  # Qwen2.5-7B
        "qwen3-tiny": _toy(_qwen3(1024, 64, 160, 4, 8, 4, 16, True)),
        "qwen3-small": _toy(_qwen3(4096, 256, 768, 8, 8, 4, 32, True)),
        "qwen3-0.6b": _qwen3(151936, 1024, 3072, 28, 16, 8, 128, True),
        "qwen3-1.7b": _qwen3(151936, 2048, 6144, 28, 16, 8, 128, True),
        "qwen3-4b": _qwen3(151936, 2560, 9728, 36, 32, 8, 128, True),
        "qwen3-8b": _qwen3(151936, 4096, 12288, 36, 32, 8, 128, False),
        "qwen3-14b": _qwen3(151936, 5120, 17408, 40, 40, 8, 128, False),
        "qwen3-32b": _qwen3(151936, 5120, 25600, 64, 64, 8, 128, False),
    }.items()
}


def shape(arch: str, name: str) -> ModelConfig:
    """Raises CheckpointError that lists what there is."""
    if f"{arch}-{name}" in SHAPES:
        return SHAPES[f"{arch}-{name}"]
    known = [key.partition("-")[2] for key in SHAPES if key.startswith(f"{arch}-")]
    if not known:
        raise CheckpointError(f"unknown architecture {arch!r}; known are {', '.join(a.model_type for a in ARCHITECTURES.values())}")
    raise CheckpointError(f"unknown shape {name!r} of {arch}; known are {', '.join(known)}")


def random_weight(name: str, full_shape: tuple[int, ...], *, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The checkpoint tensor ``name``: depends on name, shape, seed and dtype only (and on the kind of device).

    Uniform rather than normal: random bits times a constant, so that every CPU and every torch makes the same bytes."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    uniform = torch.rand(full_shape, generator=generator, dtype=torch.float32, device=device).mul_(2).sub_(1)  # in [-1, 1)
    if name.endswith("norm.weight"):
        # Queries and keys that are normalised need a larger gain, or every softmax comes out flat and context does not matter.
        centre = _GAIN if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
        return uniform.mul_(0.2).add_(centre).to(dtype)
    if name.endswith(".bias"):
        return uniform.mul_(0.3).to(dtype)
    return uniform.mul_(_GAIN * (3.0 / full_shape[-1]) ** 0.5).to(dtype)


def synthesize(
    out_dir: str | os.PathLike[str],
    arch: str = "qwen3",
    shape_name: str = "tiny",
    seed: int = 0,
    dtype: str | None = None,
    *,
    has_weights: bool = True,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint directory and return it. ``dtype``: None = the shape's own (bfloat16). ``has_weights=False``: configuration and
    tokenizer only; ``load_model`` then makes the weights on the device.

    The directory appears complete or not at all. One that the same arguments made before is left as it is; anything else in the
    way is a CheckpointError."""
    out = Path(out_dir)
    config = shape(arch, shape_name)
    config = replace(config, dtype=dtype) if dtype else config
    if not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise CheckpointError(f"{config.dtype!r} is no dtype; use float32, bfloat16 or float16")
    spec = {"version": _SPEC_VERSION, "arch": arch, "shape": shape_name, "seed": seed, "dtype": config.dtype, "has_weights": has_weights}
    if _is_done(out, spec):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = out.parent / f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}"
    workspace.mkdir()
    try:
        _write_configs(workspace, config)
        write_tokenizer(workspace, arch, config.vocab_size, config.max_position_embeddings)
        if has_weights:
            _write_weights(workspace, config, seed, max_shard_bytes)
        _write_json(workspace / SYNTH_SPEC_FILE, spec)
        _move_into_place(workspace, out, spec)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return out


def _is_done(out: Path, spec: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SYNTH_SPEC_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{out} exists and was not made by ksana_lab.models.synth; choose another directory") from None
    if found != spec:
        raise CheckpointError(f"{out} holds another synthetic checkpoint ({found}); remove it or choose another directory")
    return True


def _move_into_place(workspace: Path, out: Path, spec: dict[str, Any]) -> None:
    try:
        os.rename(workspace, out)  # replaces an empty directory, fails on a full one
    except OSError:
        if not _is_done(out, spec):  # another process was faster, with the same result
            raise


def _write_configs(out: Path, config: ModelConfig) -> None:
    arch = ARCHITECTURES[config.architecture]
    eos: Any = list(config.eos_token_ids) if len(config.eos_token_ids) > 1 else config.eos_token_ids[0]
    content: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": arch.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **asdict(config.rope_scaling)} if config.rope_scaling else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": _GAIN / config.hidden_size**0.5,
        "use_cache": True,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
    }
    if config.has_qkv_bias:  # implied by the architecture; the key means something else there
        del content["attention_bias"]
    _write_json(out / "config.json", content)
    _write_json(out / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "do_sample": False})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(out: Path, config: ModelConfig, seed: int, max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    dtype, cpu = getattr(torch, config.dtype), torch.device("cpu")
    shards = _shards(config, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_weight(name, full_shape, seed=seed, dtype=dtype, device=cpu) for name, full_shape in shard}
        save_file(tensors, out / file, metadata={"format": "pt"})
        shutil.copymode(out / "config.json", out / file)  # save_file writes for the owner alone
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = config.num_parameters * dtype.itemsize
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(config: ModelConfig, max_shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of all tensors, cut into files. The model itself, without memory, says what a checkpoint holds."""
    from ksana_lab.models.decoder import Decoder

    dtype = getattr(torch, config.dtype)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled_bytes = 0
    for piece in Decoder(config, dtype=dtype, device=torch.device("meta"), tp=TPGroup.single()).pieces():
        nbytes = torch.Size(piece.full_shape).numel() * dtype.itemsize
        if shards[-1] and filled_bytes + nbytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append((piece.name, piece.full_shape))
        filled_bytes += nbytes
    return shards


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.models.synth", description="Write a synthetic Hugging Face checkpoint.")
    parser.add_argument("--arch", required=True, choices=[arch.model_type for arch in ARCHITECTURES.values()])
    parser.add_argument("--shape", required=True, help="; ".join(SHAPES))
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16, as published")
    parser.add_argument("--no-weights", action="store_true", help="configuration and tokenizer only; loading makes the weights")
    args = parser.parse_args(argv)
    try:
        out = synthesize(args.out, args.arch, args.shape, args.seed, args.dtype, has_weights=not args.no_weights)
    except (KsanaLabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {args.arch} {args.shape}, {shape(args.arch, args.shape).num_parameters:,} parameters, {size / 1e6:,.1f} MB on disk")
    return 0


if __name__ == "__main__":
    sys.exit(main())
