"""The matrix products of linear.py over weights of 8 bits: float8_e4m3fn with one float32 scale for each row (output channel).

Quantised while they are loaded, from whole rows of the checkpoint, so that a weight is the same number whatever the tensor parallel size.
On a GPU few rows of x, where reading weights is the whole cost, multiply the 8-bit weights as they are (linear_fp8_triton.py); many rows
are quantised too, a scale for each token, and take the tensor cores' own FP8. On a CPU the weights are widened for each product: right,
and slow. Biases, embeddings, head and norms are not touched."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksana_lab.errors import ConfigError
from ksana_lab.layers import linear as plain
from ksana_lab.layers.few_rows import PLAIN, SILU_MUL, choose_fp8, new_counters
from ksana_lab.layers.piece import Piece
from ksana_lab.layers.tp import TPGroup

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FEW_ROWS = 16  # of x: up to here activations keep their 16 bits; for more, widening weights costs more than reading them (docs/LOG.md)
_ROWS_AT_ONCE = 1024  # of a weight, while it is quantised in float32

log = logging.getLogger(__name__)


def quantize_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """wide [rows, n] -> float8_e4m3fn [rows, n] and float32 scales [rows]: wide ≈ narrow * scale, the row's largest value exact.

    Off by at most a sixteenth of a value, and by scale / 1024 where that is more (below 1 / 28672 of the row's largest)."""
    wide = wide.float()
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def dequantize_rows(narrow: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return narrow.to(torch.float32).mul_(scale[:, None]).to(dtype)


@dataclass(frozen=True)
class Fp8Piece(Piece):
    scale: Tensor = field(kw_only=True)  # [dest rows] float32

    def fill(self, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
        """A rank that owns some columns reads whole rows all the same: their scale is not its own."""
        rows, columns = self.index
        wide = read((rows, slice(None)))
        for start in range(0, len(wide), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            narrow, scale = quantize_rows(wide[part].to(self.dest.device))
            self.dest[part].copy_(narrow[:, columns])
            self.scale[part].copy_(scale)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    few_rows: int = FEW_ROWS,
    counters: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """x [T, in], weight [out, in] float8_e4m3fn, scale [out] float32 -> [T, out] in x's dtype. counters: as few_rows_linear."""
    if x.device.type == "cpu":
        return plain.linear(x, dequantize_rows(weight, scale, x.dtype), bias)
    if x.shape[0] <= few_rows:
        y = few_rows_linear(x, weight, scale, counters, PLAIN, pdl)
    else:
        from ksana_lab.layers import linear_fp8_triton

        narrow, token_scale = linear_fp8_triton.quantize_tokens(x)
        # Scales of rows and columns together are offered for bfloat16 results only.
        y = torch._scaled_mm(
            narrow, weight.t(), scale_a=token_scale[:, None], scale_b=scale[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(x.dtype)
    return y if bias is None else y.add_(bias)


def few_rows_linear(
    x: Tensor, weight: Tensor, scale: Tensor, counters: Tensor | None = None, epilogue: int = PLAIN, pdl: bool = False
) -> Tensor:
    """At most FEW_ROWS rows of x, on a GPU; with SILU_MUL weight is gate | up. counters: few_rows.new_counters of the result's columns,
    for launches that follow one another (None: new ones)."""
    from ksana_lab.layers import linear_fp8_triton

    n = weight.shape[0] // (1 + epilogue)
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    config = choose_fp8(x.shape[0], n, weight.shape[1], epilogue, num_sms)
    counters = new_counters(n, x.device) if counters is None else counters
    return linear_fp8_triton.few_rows_linear(x, weight, scale, config, counters, epilogue, pdl)


class _Fp8(nn.Module):
    """What the three layers below add to those of linear.py: 8-bit storage, and the scales. The bias stays as it was."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    few_rows = FEW_ROWS
    pdl = False  # start_up.py sets it

    def _set_up(self, dtype: torch.dtype, device: torch.device) -> None:
        out_size, in_size = self.weight.shape
        if torch.device(device).type == "cuda" and (out_size % 16 or in_size % 16):
            raise ConfigError(
                f"FP8 weights need sizes in multiples of 16, this rank's share is {out_size} x {in_size}; "
                "leave quantization_config.weight.quant_method auto, or choose another tensor_para_size"
            )
        self.scale = plain.new_weight(out_size, dtype=torch.float32, device=device)
        self._counters = new_counters(out_size, device)
        if getattr(self, "bias", None) is not None:
            self.bias = plain.new_weight(out_size, dtype=dtype, device=device)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return fp8_linear(x, self.weight, self.scale, bias, self.few_rows, self._counters, self.pdl)

    def _narrowed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.dest.dtype != FP8:
                yield piece
                continue
            first = piece.dest.storage_offset() // piece.dest.stride(0)
            scale = self.scale[first : first + len(piece.dest)]
            yield Fp8Piece(piece.name, piece.dest, piece.full_shape, piece.dim, piece.start, scale=scale)


class Fp8QKVLinear(_Fp8, plain.QKVLinear):
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
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, has_bias, tp, FP8, device)
        self._set_up(dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self._narrowed(super().pieces(prefix))


class Fp8GateUpLinear(_Fp8, plain.GateUpLinear):
    def __init__(self, hidden_size: int, width: int, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(hidden_size, width, tp, FP8, device)
        self._set_up(dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, None)

    def activated(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.shape[0] <= self.few_rows:
            return few_rows_linear(x, self.weight, self.scale, self._counters, SILU_MUL, self.pdl)
        return super().activated(x)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self._narrowed(super().pieces(prefix))


class Fp8RowLinear(_Fp8, plain.RowLinear):
    def __init__(self, in_size: int, out_size: int, has_bias: bool, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(in_size, out_size, has_bias, tp, FP8, device)
        self._set_up(dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        # The bias joins on one rank only, so that the sum holds it once.
        return self._multiply(x, self.bias if self.tp.rank == 0 else None)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self._narrowed(super().pieces(prefix))


@dataclass(frozen=True)
class Linears:
    """The classes a decoder is made of."""

    qkv: type[plain.QKVLinear]
    gate_up: type[plain.GateUpLinear]
    row: type[plain.RowLinear]


LINEARS = {
    "auto": Linears(plain.QKVLinear, plain.GateUpLinear, plain.RowLinear),
    "fp8_e4m3": Linears(Fp8QKVLinear, Fp8GateUpLinear, Fp8RowLinear),
}


def prove(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Compare this GPU's FP8 products with widened weights, once, at start-up. The kernel for few rows gives way, with a warning, when it
    fails; raises ConfigError when the product of many rows does."""
    layers = [module for module in model.modules() if isinstance(module, _Fp8)]
    if torch.device(device).type != "cuda" or not layers:
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"FP8 weights need a GPU of compute capability 8.9 or more, {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; leave quantization_config.weight.quant_method auto"
        )
    fault = _fault(200, dtype, device, few_rows=0)
    if fault:
        raise ConfigError(f"FP8 products do not work on this GPU ({fault}); leave quantization_config.weight.quant_method auto")
    cases = itertools.product((1, FEW_ROWS), (PLAIN, SILU_MUL))  # each kernel once
    faults = [fault for rows, epilogue in cases if (fault := _fault(rows, dtype, device, few_rows=FEW_ROWS, epilogue=epilogue))]
    if faults:
        log.warning("the FP8 kernel for few rows does not work on this GPU and is not used: %s", faults[0])
        for layer in layers:
            layer.few_rows = 0


def _fault(num_rows: int, dtype: torch.dtype, device: torch.device, few_rows: int, epilogue: int = PLAIN) -> str:
    """What is wrong with one product of random numbers; empty when it is as near as its rounding allows."""
    generator = torch.Generator(device).manual_seed(0)
    x, wide = (torch.randn(n, 768, generator=generator, device=device) for n in (num_rows, 400))
    weight, scale = quantize_rows(wide)
    x = x.to(dtype)
    try:
        got = few_rows_linear(x, weight, scale, None, epilogue) if epilogue else fp8_linear(x, weight, scale, None, few_rows)
    except Exception as error:  # whatever a compiler or a library raises: it is named, and the user told what to do
        return f"{type(error).__name__}: {str(error)[:200]}"
    expected = x.double() @ dequantize_rows(weight, scale, torch.float64).t()
    if epilogue:
        gate, up = expected.chunk(2, 1)
        expected = F.silu(gate) * up
    difference = ((got.double() - expected).norm() / expected.norm()).item()
    # Rounding to 3 bits of mantissa: 0.026 in the mean square, of x alone; widened weights are exact.
    return "" if difference < (0.01 if num_rows <= few_rows else 0.05) else f"{num_rows} rows are off by {difference:.3g}"


def quantized_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of all parameters, bytes of those in 8 bits and their scales)."""
    parameters: dict[int, Any] = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    narrow = sum(m.weight.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, _Fp8))
    return sum(p.nbytes for p in parameters.values()), narrow
