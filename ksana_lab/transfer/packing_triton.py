"""transfer/packing.py's arithmetic as kernels: one program for each group, K or V of one head, and nothing in memory in between.

The sizes of a unit are plain arguments, not compiled in: the ends of prompts make many of them, and nobody should wait for a compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_LARGEST = tl.constexpr(448.0)
_SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
_SIZES = ["num_groups", "group_size", "header_bytes", "wire_bytes", "head_bytes"]
_COPY_WORDS = 1024


@triton.jit(do_not_specialize=_SIZES)
def _quantise(
    cache, stage, sources, num_groups, group_size, header_bytes, wire_bytes, head_bytes, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    unit, group = program // num_groups, program % num_groups
    lanes = tl.arange(0, BLOCK)
    mask = lanes < group_size // 8 * 8  # it is a multiple of 8 (packing.check): said so that the compiler sees it
    source = (cache + tl.multiple_of(tl.load(sources + unit) + group * head_bytes, 16)).to(tl.pointer_type(DTYPE))
    x = tl.load(source + lanes, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), _LARGEST), _SMALLEST_SCALE)
    is_number = tl.min((x == x).to(tl.int32), 0) == 1
    place = stage + tl.multiple_of(unit * wire_bytes, 16)
    packed = tl.clamp(tl.div_rn(x, scale + tl.zeros_like(x)), -_LARGEST, _LARGEST).to(tl.float8e4nv)
    tl.store(place.to(tl.pointer_type(tl.float32)) + group, tl.where(is_number, scale, float("nan")))
    target = (place + tl.multiple_of(header_bytes + group * group_size, 8)).to(tl.pointer_type(tl.float8e4nv))
    tl.store(target + lanes, packed, mask=mask)


@triton.jit(do_not_specialize=["wire_bytes"])
def _take_out(cache, scratch, targets, wire_bytes, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64)
    source = (cache + tl.multiple_of(tl.load(targets + unit), 16)).to(tl.pointer_type(tl.int32))
    target = (scratch + tl.multiple_of(unit * wire_bytes, 16)).to(tl.pointer_type(tl.int32))
    words = tl.multiple_of(wire_bytes // 4, 4)
    for start in range(0, words, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        tl.store(target + lanes, tl.load(source + lanes, mask=lanes < words, other=0), mask=lanes < words)


@triton.jit(do_not_specialize=_SIZES)
def _expand(
    cache, scratch, targets, num_groups, group_size, header_bytes, wire_bytes, head_bytes, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    unit, group = program // num_groups, program % num_groups
    lanes = tl.arange(0, BLOCK)
    mask = lanes < group_size // 8 * 8
    place = scratch + tl.multiple_of(unit * wire_bytes, 16)
    scale = tl.load(place.to(tl.pointer_type(tl.float32)) + group)
    packed = (place + tl.multiple_of(header_bytes + group * group_size, 8)).to(tl.pointer_type(tl.float8e4nv))
    x = tl.load(packed + lanes, mask=mask, other=0.0).to(tl.float32) * scale
    target = (cache + tl.multiple_of(tl.load(targets + unit) + group * head_bytes, 16)).to(tl.pointer_type(DTYPE))
    tl.store(target + lanes, x.to(DTYPE), mask=mask)


def quantise(cache: torch.Tensor, form: Any, sources: np.ndarray, target: torch.Tensor) -> None:
    """As ``packing.quantise``, on the current stream; the filling of a unit is left as it is."""
    places = torch.from_numpy(sources).to(cache.device)
    _quantise[(len(sources) * form.num_groups,)](cache, target, places, *_sizes(form), **_options(form))


def expand(cache: torch.Tensor, form: Any, targets: np.ndarray) -> None:
    """As ``packing.expand``, on the current stream. What is expanded lies where it is expanded to, so it is taken out first."""
    places = torch.from_numpy(targets).to(cache.device)
    scratch = torch.empty(len(targets) * form.wire_bytes, dtype=torch.uint8, device=cache.device)
    _take_out[(len(targets),)](cache, scratch, places, form.wire_bytes, BLOCK=_COPY_WORDS)
    _expand[(len(targets) * form.num_groups,)](cache, scratch, places, *_sizes(form), **_options(form))


def _sizes(form: Any) -> tuple[int, ...]:
    return form.num_groups, form.group_size, form.header_bytes, form.wire_bytes, form.layout.head_bytes


def _options(form: Any) -> dict[str, Any]:
    layout = form.layout
    dtype = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}[layout.dtype]
    return {"DTYPE": dtype, "BLOCK": triton.next_power_of_2(layout.block_size * layout.head_dim), "num_warps": 8}
