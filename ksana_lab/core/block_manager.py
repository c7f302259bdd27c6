"""Which blocks a sequence owns. Knows nothing about tensors: a block is a number here.

Invariant: every block is free, or owned by >= 1 sequence, or cached with ref count 0 (evictable). ``check`` verifies it from the
sequences' side: a block that no living sequence owns and that is not free has leaked."""

from __future__ import annotations

from collections.abc import Iterable

from ksana_lab.core.block_pool import BlockPool
from ksana_lab.core.prefix_cache import PrefixCache, block_hash
from ksana_lab.core.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = False) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._cache = PrefixCache() if enable_prefix_caching else None

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that an allocation can have, cached ones without an owner included."""
        return self.pool.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, seq: Sequence, num_tokens: int, *, reserve: int = 0) -> bool:
        """Give a sequence without blocks the blocks for its first ``num_tokens`` tokens, sharing those of a cached prefix, and set
        ``num_computed_tokens`` to what they hold. At least one token is always left to compute: its logits are needed.
        False, and nothing changed, when fewer than ``reserve`` free blocks would remain."""
        assert not seq.block_table, seq
        hits = self._find_prefix(seq)
        num_new = self.num_blocks_for(num_tokens) - len(hits)
        num_idle_hits = sum(self.pool.ref_count(block) == 0 for block in hits)
        if num_new + num_idle_hits + reserve > self.pool.num_free:
            return False
        for block in hits:
            self.pool.share(block)
        seq.block_table.extend(hits)
        seq.block_table.extend(self._take() for _ in range(num_new))
        seq.num_committed_blocks = len(hits)
        seq.num_computed_tokens = len(hits) * self.block_size
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold ``num_tokens`` tokens. False, and nothing changed, when the pool cannot."""
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if num_new > self.pool.num_free:
            return False
        for _ in range(num_new):
            seq.block_table.append(self._take())
        return True

    def commit(self, seq: Sequence) -> None:
        """Let others find the full blocks whose KV is computed (or will be by a step already scheduled, which runs before any step
        that could use them) and whose tokens are known."""
        if self._cache is None:
            return
        num_full = min(seq.num_computed_tokens, seq.num_tokens) // self.block_size
        if num_full <= seq.num_committed_blocks:
            return
        hashes = self._hash_blocks(seq, num_full)
        for i in range(seq.num_committed_blocks, num_full):
            self._cache.insert(hashes[i], seq.block_table[i])
        seq.num_committed_blocks = num_full

    def free(self, seq: Sequence) -> None:
        """Take all blocks back. The tail goes first, so that of a cached prefix the end is evicted before the beginning."""
        for block in reversed(seq.block_table):
            self.pool.release(block, keep=self._cache is not None and block in self._cache)
        seq.block_table.clear()
        seq.num_computed_tokens = seq.num_committed_blocks = 0

    def check(self, living: Iterable[Sequence]) -> int:
        """Leaked blocks: total - free - owned by ``living``. Anything but 0 is a bug (negative: a block has two fates)."""
        owned = {block for seq in living for block in seq.block_table}
        return self.num_blocks - self.num_free - len(owned)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache of everything no sequence owns (a benchmark wants a cold one)."""
        for block in self.pool.drop_evictable():
            if self._cache is not None:
                self._cache.forget(block)

    def _take(self) -> int:
        block = self.pool.take()
        if self._cache is not None:
            self._cache.forget(block)
        return block

    def _find_prefix(self, seq: Sequence) -> list[int]:
        if self._cache is None:
            return []
        return self._cache.find(self._hash_blocks(seq, (seq.num_tokens - 1) // self.block_size))

    def _hash_blocks(self, seq: Sequence, num_full: int) -> list[bytes]:
        """Hashes of the first ``num_full`` blocks; computed once and kept on the sequence."""
        hashes = seq.block_hashes
        for i in range(len(hashes), num_full):
            tokens = seq.tokens(i * self.block_size, (i + 1) * self.block_size)
            hashes.append(block_hash(hashes[-1] if hashes else None, tokens))
        return hashes[:num_full]
