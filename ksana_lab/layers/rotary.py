"""Rotary position embedding (Su et al., 2021) in the half-split form of Llama and Qwen, with Llama 3.1's frequency scaling.

Frequencies and tables are float32 whatever the model's dtype, computed as transformers computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta ** (-2i / head_dim) for i < head_dim / 2; [head_dim / 2] float32, radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def llama3_frequencies(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_position: int
) -> Tensor:
    """Llama 3.1's scaling: wavelengths longer than ``original_max_position / low_freq_factor`` are stretched by ``factor``, those shorter
    than ``original_max_position / high_freq_factor`` are kept, and between them the two are blended linearly."""
    wavelengths = 2 * math.pi / frequencies
    weight = (original_max_position / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - weight) * frequencies / factor + weight * frequencies
    is_long = wavelengths > original_max_position / low_freq_factor
    is_short = wavelengths < original_max_position / high_freq_factor
    return torch.where(is_long, frequencies / factor, torch.where(is_short, frequencies, blended))


class RotaryTable:
    """cos and sin of every position. ``cos_sin``: [max_position, head_dim] float32, a row's first half cosines, its second half sines."""

    def __init__(self, frequencies: Tensor, max_position: int, device: torch.device) -> None:
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)

    def at(self, positions: Tensor) -> Tensor:
        """Rows for ``positions`` [T] int64, once per step: [T, head_dim]."""
        return self.cos_sin.index_select(0, positions)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, head_dim] turned by its position's angles; ``cos_sin`` [T, head_dim] from ``RotaryTable.at``."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)  # float32 against the table's float32, or promoted to it
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
