"""Which block holds the KV of which prefix: a chain of hashes over full blocks of tokens. Knows nothing of owners (block_pool.py).

A block's key is a 128-bit BLAKE2b digest of (the parent block's key, its token ids): equal keys mean equal tokens from the very
first one, up to a collision chance of about n²/2**129 for n blocks ever hashed, so the tokens themselves are not kept."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from hashlib import blake2b

_ROOT = b"ksana_lab prefix"


def block_hash(parent: bytes | None, token_ids: Seq[int]) -> bytes:
    """16 bytes; ``parent`` is the previous block's hash, None for the first block."""
    digest = blake2b(parent or _ROOT, digest_size=16)
    digest.update(array("i", token_ids).tobytes())
    return digest.digest()


class PrefixCache:
    """Hash -> block and back. One block per hash, one hash per block."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._hashes

    def find(self, hashes: Seq[bytes]) -> list[int]:
        """Blocks of the longest leading run of ``hashes`` that is here."""
        blocks = []
        for key in hashes:
            if (block := self._blocks.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, key: bytes, block: int) -> None:
        """``block`` holds the KV of prefix ``key`` from now on. A second block with the same content is not remembered."""
        if key not in self._blocks:
            self._blocks[key] = block
            self._hashes[block] = key

    def forget(self, block: int) -> None:
        """The block's content is about to change."""
        if (key := self._hashes.pop(block, None)) is not None:
            del self._blocks[key]
