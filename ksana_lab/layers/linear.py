"""Matrix products of a tensor-parallel decoder. Weights are [out, in] as in checkpoints; a fused layer is one GEMM over stacked rows.

A column layer owns some of the outputs and needs no communication; a row layer owns some of the inputs, and the norm behind it sums
over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksana_lab.layers.activation import SiluAndMul
from ksana_lab.layers.few_rows import SILU_MUL, Chosen
from ksana_lab.layers.piece import Piece
from ksana_lab.layers.tp import TPGroup

# A CPU's BLAS multiplies one to three rows with other kernels, which sum in another order, than four and more. With rows of zeros a
# token's result is bitwise the same whatever the batch, and a disaggregated node gives the tokens of a mixed one even at a near tie.
# (Measured: MKL with AVX-512, for tiny models on AMD and Intel, for larger ones on AMD; on Intel some large products depend on the rows.)
_MIN_CPU_ROWS = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, own: Chosen | None = None) -> Tensor:
    """x [T, in] -> [T, out]. ``own``: what start_up.py has chosen for this weight, which then has no bias."""
    if own is not None and (y := own.run(x, weight)) is not None:
        return y
    num_rows = x.shape[0]
    if num_rows >= _MIN_CPU_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, _MIN_CPU_ROWS - num_rows)), weight, bias)[:num_rows]


def new_weight(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter that no autograd will ever follow."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class QKVLinear(nn.Module):
    """x [T, hidden] -> [T, (local_heads + 2 * local_kv_heads) * head_dim]: this rank's queries, keys, values, in that order."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        has_bias: bool,
        tp: TPGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.total_rows = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        kv_heads = max(1, num_kv_heads // tp.size)
        self.rows = (num_heads // tp.size * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        first_kv_row = tp.rank * num_kv_heads // tp.size * head_dim
        self.starts = (tp.rank * self.rows[0], first_kv_row, first_kv_row)
        self.weight = new_weight(sum(self.rows), hidden_size, dtype=dtype, device=device)
        self.bias = new_weight(sum(self.rows), dtype=dtype, device=device) if has_bias else None
        self.own: Chosen | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.own)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """``prefix`` is the attention's; the checkpoint keeps q_proj, k_proj and v_proj apart."""
        hidden_size = self.weight.shape[1]
        row = 0
        for name, rows, total, start in zip(("q_proj", "k_proj", "v_proj"), self.rows, self.total_rows, self.starts, strict=True):
            yield Piece(f"{prefix}.{name}.weight", self.weight[row : row + rows], (total, hidden_size), 0, start)
            if self.bias is not None:
                yield Piece(f"{prefix}.{name}.bias", self.bias[row : row + rows], (total,), 0, start)
            row += rows


class GateUpLinear(nn.Module):
    """x [T, hidden] -> [T, 2 * local_width]: gate, then up."""

    def __init__(self, hidden_size: int, width: int, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self.start = tp.rank * (width // tp.size)
        self.weight = new_weight(2 * (width // tp.size), hidden_size, dtype=dtype, device=device)
        self.activation = SiluAndMul()
        self.own: Chosen | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def activated(self, x: Tensor) -> Tensor:
        """silu(gate) * up, [T, local_width]; of few rows in one kernel."""
        if self.own is not None and (y := self.own.run(x, self.weight, SILU_MUL)) is not None:
            return y
        return self.activation(self(x))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        gate, up = self.weight.chunk(2)
        for name, dest in (("gate_proj", gate), ("up_proj", up)):
            yield Piece(f"{prefix}.{name}.weight", dest, (self.width, self.weight.shape[1]), 0, self.start)


class RowLinear(nn.Module):
    """x [T, local_in] -> [T, out], this rank's term of a sum over ranks, which is the next layer's to make (RMSNorm)."""

    def __init__(self, in_size: int, out_size: int, has_bias: bool, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.tp = tp
        self.in_size = in_size
        self.weight = new_weight(out_size, in_size // tp.size, dtype=dtype, device=device)
        self.bias = new_weight(out_size, dtype=dtype, device=device) if has_bias else None
        self.own: Chosen | None = None

    def forward(self, x: Tensor) -> Tensor:
        # The bias joins on one rank only, so that the sum holds it once.
        return linear(x, self.weight, self.bias if self.tp.rank == 0 else None, self.own)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        out_size, share = self.weight.shape
        yield Piece(f"{prefix}.weight", self.weight, (out_size, self.in_size), 1, self.tp.rank * share)
        if self.bias is not None:
            yield Piece(f"{prefix}.bias", self.bias, (out_size,))
