"""A checkpoint that holds, widened, the numbers that FP8 weights stand for: what an engine with FP8 weights must agree with."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ksana_lab.layers.linear_fp8 import dequantize_rows, quantize_rows
from ksana_lab.layers.tp import TPGroup


class _Nobody:
    def name(self) -> str:
        return "gloo"


def lone_rank(rank: int, size: int) -> TPGroup:
    """A rank that never meets the others: it can load its share, and not compute."""
    return TPGroup(rank, size, _Nobody())


def is_product(name: str) -> bool:
    return name.endswith("_proj.weight")


def widened_checkpoint(path: str | Path, out: str | Path) -> Path:
    """A copy of ``path`` in float32 whose products' weights have been through FP8."""
    shutil.copytree(path, out)
    (Path(out) / "ksana_lab_synth.json").unlink(missing_ok=True)
    tensors = {name: tensor.float() for name, tensor in load_file(Path(path) / "model.safetensors").items()}
    for name in filter(is_product, tensors):
        tensors[name] = dequantize_rows(*quantize_rows(tensors[name]), torch.float32)
    save_file(tensors, Path(out) / "model.safetensors", metadata={"format": "pt"})
    return Path(out)
