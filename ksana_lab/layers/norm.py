"""RMSNorm with what always precedes it, the residual addition and the sum over ranks, so that one kernel can do all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksana_lab.layers import fused
from ksana_lab.layers.linear import new_weight
from ksana_lab.layers.piece import Piece
from ksana_lab.layers.tp import TPGroup


class RMSNorm(nn.Module):
    pdl = False  # start_up.py sets it

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device, tp: TPGroup | None = None) -> None:
        """``tp``: the ranks of which each has a term of what is added to a residual; None: it is whole."""
        super().__init__()
        self.eps = eps
        self.tp = tp or TPGroup.single()
        self.weight = new_weight(size, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), both [T, size]; without a residual the sum is x itself. With one, ``x`` is this rank's term
        and is summed over the ranks first. On a GPU one kernel adds and normalises, and the sum takes the residual's place in memory."""
        if residual is not None:
            if (y := self.tp.all_reduce_norm(x, residual, self.weight, self.eps)) is not None:
                return y, residual
            x = self.tp.all_reduce(x)
        if x.is_cuda:
            pdl = fused.is_dependent(self.pdl, x)
            if residual is None:
                return fused.rms_norm(x, self.weight, self.eps, pdl), x
            return fused.add_rms_norm(x, residual, self.weight, self.eps, pdl), residual
        total = x if residual is None else x + residual
        return self.normalize(total), total

    def normalize(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield Piece(f"{prefix}.weight", self.weight, tuple(self.weight.shape))
