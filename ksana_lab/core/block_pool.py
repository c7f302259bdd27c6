"""Blocks as numbers: who is free, who is owned how often, who may be evicted. Knows nothing of sequences, hashes or tensors.

Invariant: every block is either free, or owned (ref count >= 1), or evictable (ref count 0, content worth keeping). All operations O(1)."""

from __future__ import annotations

from collections import OrderedDict, deque


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that ``take`` can give, evictable ones included."""
        return len(self._free) + len(self._evictable)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def take(self) -> int:
        """A block for one new owner. An evictable one is given only when no free one is left: its old content is lost then.
        The caller has made sure that ``num_free`` > 0."""
        block = self._free.popleft() if self._free else self._evictable.popitem(last=False)[0]
        assert self._ref_counts[block] == 0, block
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner for a block whose content is known (owned or evictable)."""
        if self._ref_counts[block] == 0:
            del self._evictable[block]
        self._ref_counts[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """One owner less. After the last one: evictable when ``keep``, else free."""
        assert self._ref_counts[block] > 0, block
        self._ref_counts[block] -= 1
        if self._ref_counts[block]:
            return
        if keep:
            self._evictable[block] = None
        else:
            self._free.append(block)

    def drop_evictable(self) -> list[int]:
        """Make every evictable block free; returns them."""
        blocks = list(self._evictable)
        self._evictable.clear()
        self._free.extend(blocks)
        return blocks
