"""Random numbers by counting, and the race that samples with them. What a token draws depends on two 32-bit keys and its own number alone:
never on the batch, the rank or the node.

Sampling is a race (Gumbel-max in exponential form): entry v draws E_v = -log(1 - x_v), x_v uniform, and the smallest E_v / p_v wins, which
happens with probability p_v. x_v comes from two rounds of MurmurHash3's 32-bit finaliser (Appleby, public domain) over v and the keys, so
it is integer arithmetic that a kernel repeats bit by bit (fused_triton.py)."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def race(logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """logits [S, vocab], temperature [S, 1] float32 (0 = take the largest), keys [S, 2] int64 of 32 bits each -> [S] int64."""
    wide = logits.float()
    is_greedy = temperature == 0
    # argmin E_v / p_v = argmax (logit_v / temperature - log E_v)
    raced = wide / torch.where(is_greedy, 1.0, temperature) - exponentials(keys, logits.shape[-1]).log()
    return torch.where(is_greedy, wide, raced).argmax(dim=-1)


def exponentials(keys: Tensor, vocab_size: int) -> Tensor:
    """keys [S, 2] -> [S, vocab] float32, exponentially distributed with mean 1; fine-grained near 0, where races are decided."""
    entry = torch.arange(vocab_size, device=keys.device, dtype=torch.int64)
    bits = _mix32(_mix32(entry ^ keys[:, :1]) ^ keys[:, 1:])
    x = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log1p(-x)


def _mix32(h: Tensor) -> Tensor:
    """MurmurHash3's fmix32 on int64 tensors that hold 32-bit values."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK32
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)
