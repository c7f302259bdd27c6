"""The gate of a SwiGLU MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ksana_lab.layers import fused


class SiluAndMul(nn.Module):
    pdl = False  # start_up.py sets it

    def forward(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * width] (gate, then up) -> silu(gate) * up, [T, width]."""
        if gate_up.is_cuda:
            return fused.silu_mul(gate_up, fused.is_dependent(self.pdl, gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
