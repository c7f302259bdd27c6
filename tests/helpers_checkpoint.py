"""Tiny checkpoints, made once per test process, and what transformers says about them."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from ksana_lab.models.synth import synthesize

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="ksana-lab-checkpoints-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def checkpoint(arch: str = "qwen3", shape: str = "tiny") -> str:
    return str(synthesize(_root() / f"{arch}-{shape}", arch, shape))


def write_hollow(path: Path, **changes: object) -> Path:
    """A checkpoint for who only looks at it: a model's shape, no numbers in the weights."""
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | shape | changes))
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    return path


@functools.cache
def _oracle(arch: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint(arch), dtype="float32").eval()


@functools.cache
def oracle_greedy(arch: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """``num_tokens`` greedy tokens of transformers in float32, ends of text ignored."""
    import torch

    ids, cache, output = torch.tensor([prompt]), None, []
    with torch.inference_mode():
        for _ in range(num_tokens):
            step = _oracle(arch)(ids, past_key_values=cache, use_cache=True)
            cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
            output.append(int(ids))
    return output


def prompts(num: int, *, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Random token ids of a tiny vocabulary, of lengths 1..longest."""
    import random

    dice = random.Random(seed)
    return [[dice.randrange(3, 1000) for _ in range(dice.randint(1, longest))] for _ in range(num)]
