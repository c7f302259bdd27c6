"""The gate of a SwiGLU MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SiluAndMul(nn.Module):
    def forward(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * width] (gate, then up) -> silu(gate) * up, [T, width]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
