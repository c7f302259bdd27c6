"""The small kernels between the matrix products, each one pass over its data, each with the same mathematics in plain torch beside it.

Every function takes the Triton path for CUDA tensors and the torch path otherwise, so a model calls one name. ``pdl=True`` lets a kernel
be scheduled while its predecessor drains (programmatic dependent launch, Hopper and later); it waits on the device before it reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ksana_lab.attention.cache_dtype import to_cache
from ksana_lab.layers.race import race

_MAX_DEPENDENT_ROWS = 512

# ---- plain torch: what runs on a CPU, and what the kernels are tested against ----------------------------------------------------


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rope_torch(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate halves (as in GPT-NeoX): x [T, heads, head_dim], cos_sin [T, head_dim] float32 = cos | sin of each token's position."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def store_kv_torch(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    kept = slot_mapping >= 0
    block, offset = slot_mapping[kept] // kv_layer.shape[3], slot_mapping[kept] % kv_layer.shape[3]
    kv_layer[block, 0, :, offset] = to_cache(k[kept], kv_layer.dtype)
    kv_layer[block, 1, :, offset] = to_cache(v[kept], kv_layer.dtype)


def is_dependent(pdl: bool, x: Tensor) -> bool:
    """Dependent launch pays where kernels are short: in steps of decodes."""
    return pdl and x.shape[0] <= _MAX_DEPENDENT_ROWS


# ---- the functions models call ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:
    """x [..., hidden] -> the same, x / rms(x) * weight; computed in float32, rounded once."""
    if x.is_cuda:
        from ksana_lab.layers import fused_triton

        return fused_triton.rms_norm(x, weight, eps, pdl)
    return rms_norm_torch(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:
    """residual += x, in place; returns rms_norm(residual). x, residual [T, hidden]."""
    if x.is_cuda:
        from ksana_lab.layers import fused_triton

        return fused_triton.add_rms_norm(x, residual, weight, eps, pdl)
    residual += x
    return rms_norm_torch(residual, weight, eps)


def silu_mul(gate_up: Tensor, pdl: bool = False) -> Tensor:
    """gate_up [T, 2 * ffn] = gate | up -> silu(gate) * up, [T, ffn]."""
    if gate_up.is_cuda:
        from ksana_lab.layers import fused_triton

        return fused_triton.silu_mul(gate_up, pdl)
    return silu_mul_torch(gate_up)


def qk_norm_rope_store(
    qkv: Tensor,
    num_heads: int,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step's queries, keys and values out of the fused projection, ready for attention, and stored.

    qkv [T, (heads + 2 * kv_heads) * head_dim] is changed in place: q and k are normalised per head (weights [head_dim]; None: not) and
    rotated by cos_sin [T, head_dim] float32 = cos | sin of each token's position. k and v are written to kv_layer
    [num_blocks, 2, kv_heads, block_size, head_dim] at slot_mapping [T] int64 (-1: not stored).
    Returns q [T, heads, head_dim], k, v [T, kv_heads, head_dim], views of qkv."""
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = kv_layer.shape[2], kv_layer.shape[4]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if qkv.is_cuda:
        from ksana_lab.layers import fused_triton

        fused_triton.qk_norm_rope_store(qkv, num_heads, kv_layer, slot_mapping, cos_sin, q_weight, k_weight, eps, pdl)
        return q, k, v
    for x, weight in ((q, q_weight), (k, k_weight)):
        # float32 between the norm and the rotation, as in the kernel: rounded once
        y = x.float() if weight is None else rms_norm_torch(x.float(), weight, eps)
        x.copy_(rope_torch(y, cos_sin))
    store_kv_torch(k, v, kv_layer, slot_mapping)
    return q, k, v


def argmax(logits: Tensor, pdl: bool = False) -> Tensor:
    """logits [B, vocab] -> [B] int64, the first of equal maxima."""
    if logits.is_cuda:
        from ksana_lab.layers import fused_triton

        return fused_triton.sample(logits, None, None, pdl)
    return logits.argmax(-1)


def sample(logits: Tensor, temperature: Tensor, keys: Tensor, pdl: bool = False) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), as race.race does.

    logits [B, vocab]; temperature [B, 1] float32, 0 takes the maximum; keys [B, 2] int64, 32 bits each. Returns [B] int64."""
    if logits.is_cuda:
        from ksana_lab.layers import fused_triton

        return fused_triton.sample(logits, temperature, keys, pdl)
    return race(logits, temperature, keys)
