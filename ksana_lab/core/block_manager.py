"""Which blocks a sequence owns. Knows nothing about tensors: a block is a number here.

Two pools: device blocks, which steps read and write, and host blocks, which hold the KV of sequences that are swapped out. A host block
has one owner at most; nothing is shared there.

Invariant: every block is free, or owned by >= 1 sequence, or cached with ref count 0 (evictable). ``check`` verifies it from the
sequences' side: a block that no living sequence owns and that is not free has leaked."""

from __future__ import annotations

from collections.abc import Iterable

from ksana_lab.core.block_pool import BlockPool
from ksana_lab.core.prefix_cache import PrefixCache, block_hash
from ksana_lab.core.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = False, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks)
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

    def num_cached_tokens(self, seq: Sequence) -> int:
        """How many of its first tokens ``allocate`` would find in the prefix cache now."""
        return len(self._find_prefix(seq)) * self.block_size

    def allocate(self, seq: Sequence, num_tokens: int, *, reserve: int = 0) -> bool:
        """Give a sequence without blocks the blocks for its first ``num_tokens`` tokens, sharing those of a cached prefix, and set
        ``num_computed_tokens`` to what they hold. At least one token is always left to compute: its logits are needed. One that is
        swapped out keeps what it has computed: ``swap_in`` must follow.
        False, and nothing changed, when fewer than ``reserve`` free blocks would remain."""
        assert not seq.block_table and (seq.host_block_table or not seq.num_computed_tokens), seq
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
        seq.num_computed_tokens = max(seq.num_computed_tokens, len(hits) * self.block_size)
        return True

    def swap_out(self, seq: Sequence) -> list[tuple[int, int]] | None:
        """Move what ``seq`` has computed to host blocks: the copies to make, (device block, host block), or None, and nothing changed,
        when too few host blocks are free. The device blocks are free at once: whoever makes the copies makes them before a later write."""
        num_blocks = self.num_blocks_for(seq.num_computed_tokens)
        if num_blocks > self.host_pool.num_free:
            return None
        seq.host_block_table.extend(self.host_pool.take() for _ in range(num_blocks))
        copies = list(zip(seq.block_table, seq.host_block_table, strict=False))  # blocks behind are reserved, nothing is in them
        self._release_device_blocks(seq)
        return copies

    def swap_in(self, seq: Sequence) -> list[tuple[int, int]]:
        """After ``allocate``: the copies to make, (host block, device block). What was found in the prefix cache needs none. The host
        blocks are free at once: whoever makes the copies makes them before a later write."""
        host = seq.host_block_table
        copies = [(host[i], seq.block_table[i]) for i in range(seq.num_committed_blocks, len(host))]
        self._release_host_blocks(seq)
        return copies

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
        if self._cache is None or seq.is_swapped_out:
            return
        num_full = min(seq.num_computed_tokens, seq.num_tokens) // self.block_size
        if num_full <= seq.num_committed_blocks:
            return
        hashes = self._hash_blocks(seq, num_full)
        for i in range(seq.num_committed_blocks, num_full):
            self._cache.insert(hashes[i], seq.block_table[i])
        seq.num_committed_blocks = num_full

    def free(self, seq: Sequence) -> None:
        """Take all blocks back, host blocks too."""
        self._release_device_blocks(seq)
        self._release_host_blocks(seq)
        seq.num_computed_tokens = 0

    def check(self, living: Iterable[Sequence]) -> int:
        """Leaked blocks: total - free - owned by ``living``; host blocks are looked at when no device block has leaked. Anything but 0 is
        a bug (negative: a block has two fates)."""
        owned: set[int] = set()
        owned_on_host: list[int] = []
        for seq in living:
            owned.update(seq.block_table)
            owned_on_host += seq.host_block_table
        return (self.num_blocks - self.num_free - len(owned)) or (self.host_pool.num_blocks - self.host_pool.num_free - len(owned_on_host))

    def forget_prefixes(self) -> None:
        """Empty the prefix cache of everything no sequence owns (a benchmark wants a cold one)."""
        for block in self.pool.drop_evictable():
            if self._cache is not None:
                self._cache.forget(block)

    def _release_device_blocks(self, seq: Sequence) -> None:
        """The tail goes first, so that of a cached prefix the end is evicted before the beginning."""
        for block in reversed(seq.block_table):
            self.pool.release(block, keep=self._cache is not None and block in self._cache)
        seq.block_table.clear()
        seq.num_committed_blocks = 0

    def _release_host_blocks(self, seq: Sequence) -> None:
        for block in seq.host_block_table:
            self.host_pool.release(block, keep=False)
        seq.host_block_table.clear()

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
