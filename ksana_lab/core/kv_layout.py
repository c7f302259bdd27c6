"""The shape of one rank's KV cache, and every byte offset in it. Plain arithmetic; no tensors.

The cache is one allocation. ``order`` says which axis is outermost:
    block_major  [num_blocks][num_layers][2][kv_heads][block_size][head_dim]     a block is contiguous over all layers (as in KsanaLLM)
    layer_major  [num_layers][num_blocks][2][kv_heads][block_size][head_dim]     a layer is contiguous over all blocks
Either way the layer view handed to attention is [num_blocks, 2, kv_heads, block_size, head_dim] (strided), and
one (block, layer) *cell* of 2 * kv_heads * block_size * head_dim elements is contiguous. Heads stand outside tokens so that a rank
that owns half of the heads owns contiguous bytes: re-sharding never gathers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class KVLayout:
    num_blocks: int
    num_layers: int
    num_kv_heads: int  # on this rank
    block_size: int  # tokens
    head_dim: int
    dtype: str  # a key of DTYPE_BYTES
    order: Literal["block_major", "layer_major"] = "block_major"

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """K (or V) of one head in one block and layer: [block_size][head_dim]."""
        return self.block_size * self.head_dim * self.itemsize

    @property
    def cell_bytes(self) -> int:
        """K and V of one block in one layer."""
        return 2 * self.num_kv_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers, on this rank."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.cell_bytes

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        outer = (self.num_blocks, self.num_layers) if self.order == "block_major" else (self.num_layers, self.num_blocks)
        return (*outer, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def cell_offset(self, block: int, layer: int) -> int:
        """Byte offset of the cell (block, layer)."""
        assert 0 <= block < self.num_blocks and 0 <= layer < self.num_layers, (block, layer)
        index = block * self.num_layers + layer if self.order == "block_major" else layer * self.num_blocks + block
        return index * self.cell_bytes

    def head_offset(self, block: int, layer: int, kv: int, head: int) -> int:
        """Byte offset of K (kv=0) or V (kv=1) of one head: head_bytes contiguous bytes follow, token after token."""
        return self.cell_offset(block, layer) + (kv * self.num_kv_heads + head) * self.head_bytes
