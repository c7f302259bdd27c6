"""Makes room for keys in a cache of 8 bits, whose largest number is 448.

Dividing keys and multiplying queries by the same power of two changes no score and no digit. Where the weights alone say that keys can
leave the range, they are divided so: exact, and computed from tensors that every rank and both nodes of a pair hold alike, so that no
scale has to travel with the cache. Small keys pay nothing: down to 1/64 a float8 is as precise as it is near 448."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ksana_lab.attention.cache_dtype import FP8_MAX
from ksana_lab.layers.linear import QKVLinear
from ksana_lab.models.decoder import Attention, Decoder, DecoderLayer

log = logging.getLogger(__name__)


@torch.no_grad()
def fit_keys(model: Decoder) -> int:
    """Rebalance queries and keys in place, once, after the weights are loaded; returns the largest divisor.

    With a norm on keys, a key is at most sqrt(head_dim) times its largest weight, rotated or not. Without one, a bias is all that is known
    beforehand; it may take half of the range. Without either nothing is known, and what is too large will be saturated."""
    largest = 1
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        largest = max(largest, _fit_norm(layer.attention), _fit_bias(layer.attention))
    if largest > 1:
        log.info("keys are kept divided by up to %d, and queries multiplied, to stay within FP8", largest)
    return largest


def _fit_norm(attention: Attention) -> int:
    core = attention.core
    if core.q_norm is None or core.k_norm is None:
        return 1
    divisor = _divisor(math.sqrt(core.head_dim) * _largest(core.k_norm.weight), FP8_MAX)
    core.k_norm.weight.div_(divisor)
    core.q_norm.weight.mul_(divisor)
    return divisor


def _fit_bias(attention: Attention) -> int:
    """Each KV head for itself, with the query heads that share it."""
    core, qkv = attention.core, attention.qkv
    if qkv.bias is None or core.k_norm is not None:
        return 1
    group = core.num_heads // core.num_kv_heads
    first_key = core.num_heads * core.head_dim
    divisors = []
    for head in range(core.num_kv_heads):
        keys = slice(first_key + head * core.head_dim, first_key + (head + 1) * core.head_dim)
        # The rotation turns two numbers of a head into two of the same length.
        divisor = _divisor(math.sqrt(2) * _largest(qkv.bias[keys]), FP8_MAX / 2)
        _multiply_rows(qkv, keys, 1 / divisor)
        _multiply_rows(qkv, slice(head * group * core.head_dim, (head + 1) * group * core.head_dim), divisor)
        divisors.append(divisor)
    return max(divisors)


def _multiply_rows(qkv: QKVLinear, rows: slice, factor: float) -> None:
    weight: Tensor = getattr(qkv, "scale", qkv.weight)  # of weights in FP8 the scales
    weight[rows].mul_(factor)
    if qkv.bias is not None:
        qkv.bias[rows].mul_(factor)


def _largest(x: Tensor) -> float:
    """Rounded to bfloat16: the same whichever dtype a node has loaded the tensor in."""
    return float(x.to(torch.bfloat16).abs().max())


def _divisor(bound: float, limit: float) -> int:
    """The smallest power of two that brings ``bound`` down to ``limit``."""
    return 1 if bound <= limit else 1 << math.ceil(math.log2(bound / limit))
