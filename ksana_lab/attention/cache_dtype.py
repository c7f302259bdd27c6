"""Keys and values on their way into a cache of another dtype. Plain torch; store_kv.py has the same for Triton."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0  # of float8_e4m3fn, which has no infinity: what is larger becomes this


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the cache's dtype, saturated where that is float8_e4m3fn; NaN stays NaN."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
