"""How many KV blocks fit, their memory, and the per-layer views attention reads. Knows nothing of sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ksana_lab.config.engine import CacheOptions
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import ConfigError

# device -> uint8 [nbytes], zeroed; a transfer backend may supply memory that its peers can reach.
Allocator = Callable[[int, torch.device], Tensor]

_MAX_DEFAULT_CPU_BYTES = 512 << 20


def allocate_plain(nbytes: int, device: torch.device) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def cpu_num_blocks(options: CacheOptions, block_bytes: int, max_num_seqs: int, max_model_len: int) -> int:
    """The configured number, or enough for ``max_num_seqs`` sequences of full length, but at most 512 MiB."""
    if options.num_blocks is not None:
        return options.num_blocks
    blocks_per_seq = -(-max_model_len // options.block_size)
    affordable = max(_MAX_DEFAULT_CPU_BYTES // block_bytes, 2)
    return max(2, min(max_num_seqs * blocks_per_seq, affordable))


def cuda_num_blocks(options: CacheOptions, block_bytes: int, device: torch.device, workspace_bytes: int) -> int:
    """The configured number, or what the device has left once ``workspace_bytes`` (activations at their peak, graphs) and the reserved
    share are set aside. Call after the weights are loaded and the caching allocator is emptied. Raises ConfigError when nothing is left."""
    if options.num_blocks is not None:
        return options.num_blocks
    free, total = torch.cuda.mem_get_info(device)
    left = free - workspace_bytes - int(total * options.reserved_memory_ratio)
    if options.device_memory_ratio >= 0:
        left = min(left, int(total * options.device_memory_ratio))
    if left < 2 * block_bytes:
        raise ConfigError(
            f"no room for a KV cache on {device}: {free >> 20} of {total >> 20} MiB are free, {workspace_bytes >> 20} of these workspace, "
            f"and {options.reserved_memory_ratio:.0%} of the device stay reserved (reserved_device_memory_ratio); "
            "use a smaller model, more GPUs (tensor_para_size), or end what else runs there"
        )
    return left // block_bytes


def make_layer_views(memory: Tensor, layout: KVLayout) -> list[Tensor]:
    """memory: uint8 [layout.total_bytes] -> per layer [num_blocks, 2, kv_heads, block_size, head_dim], strided views of it."""
    cache = memory.view(getattr(torch, layout.dtype)).view(layout.shape)
    layer_axis = 1 if layout.order == "block_major" else 0
    return list(cache.unbind(layer_axis))
