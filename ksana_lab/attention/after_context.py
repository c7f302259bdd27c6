"""Prefill attention of a long chunk after long earlier context, as problems that a dense kernel solves apart; their results are merged.

A chunk of n tokens after C earlier ones is cut at C0, C rounded down to a multiple of 2,048, leaving a rest of r = C - C0:

- keys before C0: every query sees all of them. They are taken in pieces of 2,048 times a power of two, without any mask.
- keys from C0 on, the rest and the chunk: causal and square, once r queries of zeros stand before the chunk's. Nobody reads their results.

Queries and keys behind the last token are zeros: causality hides those keys, and nobody reads those results. So a kernel that must plan
for every length (cuDNN, 40 ms each) meets only few lengths, and no key is ever shown that must be taken out of a sum again: which lengths
are chosen can change the time, not the result. Log-sum-exps weigh the parts (as in FlashAttention and Flash-Decoding, Dao et al.).

Knows no kernel: it is handed them, and uses them only after they have agreed with the paged one for every planned length."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ksana_lab.attention.cache_dtype import to_cache

log = logging.getLogger(__name__)

MIN_NEW = 2048  # tokens of a chunk: at 512 the parts take twice the time of the paged kernel, at 2,048 they win (docs/LOG.md)
MIN_CONTEXT = 4096
PIECES = (32768, 16384, 8192, 4096, 2048)
_STEP = PIECES[-1]
_SQUARE_STEP = 512
_MAX_PADDING = 1.1  # times the work without padding
_MIN_GAIN = 1.1  # times faster than the paged kernel where nothing is padded; then padding never makes a chunk slower
_MAX_ERROR = 0.01  # of a token: norm of the difference to the paged kernel over the norm. Roundings to bfloat16 make 0.004
_TIMED_CONTEXT = 8192


class Dense(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
        """q [n, heads, head_dim], k, v [m, kv_heads, head_dim] -> [n, heads, head_dim], log-sum-exp (natural) [heads, n] float32."""


class Gather(Protocol):
    def __call__(
        self, kv_layer: Tensor, block_table: Tensor, first: int, num_tokens: int, padded: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens first .. first + num_tokens, then zeros, [padded, kv_heads, head_dim] each."""


class Merge(Protocol):
    def __call__(self, a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor, lse_out: Tensor) -> object:
        """``out``, ``lse_out``: attention over both key sets; they may be ``a``, ``lse_a``."""


class Paged(Protocol):
    def __call__(self, q: Tensor, kv_layer: Tensor, block_table: Tensor, num_keys: int, scale: float) -> Tensor:
        """The kernel that has to be equalled: q [n, heads, head_dim] are the last n of ``num_keys`` tokens."""


@dataclass(frozen=True)
class Kernels:
    dense: Dense
    gather: Gather
    merge: Merge
    paged: Paged
    time_us: Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Shape:
    """Of one rank's heads, and of its cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype


@dataclass(frozen=True)
class Cut:
    pieces: tuple[int, ...]  # keys of each, from the first key on
    rest: int  # keys between the pieces and the chunk
    num_queries: int  # with padding, for the pieces
    num_square: int  # rest, chunk and padding

    @property
    def num_pairs(self) -> float:
        """Of queries and keys, with padding."""
        return self.num_queries * sum(self.pieces) + self.num_square**2 / 2


def cut(num_new: int, context: int, max_new: int) -> Cut:
    left = context // _STEP * _STEP
    pieces = []
    for piece in PIECES:
        pieces += [piece] * (left // piece)
        left %= piece
    rest = context % _STEP
    return Cut(tuple(pieces), rest, padded_queries(num_new, max_new), _up(rest + num_new, _SQUARE_STEP))


def padded_queries(num_new: int, max_new: int) -> int:
    """Few lengths, as each is planned with each piece: eighths of a power of two, but multiples of 512 and little more than ``max_new``."""
    step = max(_SQUARE_STEP, (1 << (num_new - 1).bit_length()) // 8)
    return min(_up(num_new, step), _up(max_new, _SQUARE_STEP))


def _up(length: int, step: int) -> int:
    return -(-length // step) * step


class AfterContext:
    """Takes nothing before ``prove`` has found the parts right and fast."""

    def __init__(self, kernels: Kernels, max_new: int, max_seq_len: int) -> None:
        """``max_new``: tokens of a chunk; ``max_seq_len``: of a sequence."""
        self._kernels = kernels
        self._max_new = max_new
        self._max_context = max_seq_len - MIN_NEW
        self._chosen: frozenset[int] = frozenset()  # padded numbers of queries

    def takes(self, num_new: int, num_keys: int) -> bool:
        """Whether a chunk of ``num_new`` tokens that are the last of ``num_keys`` is for ``attend``."""
        context = num_keys - num_new
        if num_new < MIN_NEW or num_new > self._max_new or context < MIN_CONTEXT or context > self._max_context:
            return False
        planned = cut(num_new, context, self._max_new)
        pairs = num_new * (context + num_new / 2)
        return planned.num_queries in self._chosen and planned.num_pairs <= _MAX_PADDING * pairs

    def peak(self) -> tuple[int, int] | None:
        """New tokens and earlier context of the chunk that needs the most memory; None if none is taken."""
        largest = max(self._pieces(), default=0)
        rests = (*range(_STEP - 1, 0, -_SQUARE_STEP), 0)
        for num_new in (self._max_new, *range(self._max_new // _SQUARE_STEP * _SQUARE_STEP, MIN_NEW - 1, -_SQUARE_STEP)):
            for rest in rests:
                if self.takes(num_new, num_new + largest + rest):
                    return num_new, largest + rest
        return None

    def attend(self, q: Tensor, kv_layer: Tensor, block_table: Tensor, num_keys: int, scale: float, out: Tensor) -> None:
        """q, out [n, heads, head_dim]: the last n of ``num_keys`` tokens, whose keys and values are in the blocks of ``block_table``."""
        n = q.shape[0]
        planned = cut(n, num_keys - n, self._max_new)
        rest, first = planned.rest, 0
        queries = _between_zeros(q, rest, max(planned.num_square, rest + planned.num_queries))

        def part(first: int, num_tokens: int, padded: int, rows: slice, skip: int, is_causal: bool) -> tuple[Tensor, Tensor]:
            k, v = self._kernels.gather(kv_layer, block_table, first, num_tokens, padded, q.dtype)
            x, lse = self._kernels.dense(queries[rows], k, v, scale, is_causal)
            return x[skip : skip + n], lse[:, skip : skip + n]

        square = slice(planned.num_square)
        total, lse = part(num_keys - n - rest, rest + n, planned.num_square, square, rest, True)
        behind_rest = slice(rest, rest + planned.num_queries)
        for piece in planned.pieces:  # nothing of a piece is kept while the next is gathered
            self._kernels.merge(total, lse, *part(first, piece, piece, behind_rest, 0, False), out, lse)
            total = out
            first += piece
        assert total is out, f"{n} tokens after {num_keys - n} have one part only"

    def prove(self, shape: Shape, device: torch.device) -> None:
        """Have the kernels plan for every length and compare them with the paged one; then take the numbers of queries that are faster.

        Whatever fails leaves all chunks to the paged kernel, with one line in the log."""
        if not self._pieces() or not self._lengths():
            return
        try:
            begin = time.perf_counter()
            chunk = _RandomChunk(shape, self._max_new, max(n + context for n, context in self._cases()), device)
            worst = 0.0
            for num_new, context in self._cases():
                error = chunk.error(self._apart, self._kernels.paged, num_new, context)
                if not error < _MAX_ERROR:  # NaN, too
                    log.warning("prefill after context: by pages, as cuDNN's parts are WRONG by %.1f%% for %d tokens after %d",
                                100 * error, num_new, context)  # fmt: skip
                    return
                worst = max(worst, error)
            planned_s = time.perf_counter() - begin
            times = {length: self._race(chunk, length) for length in self._lengths()}
        except Exception as error:  # what does not run here must not keep the node from starting
            log.warning("prefill after context: by pages, as cuDNN's parts do not run here: %s: %s", type(error).__name__, error)
            return
        self._chosen = frozenset(length for length, (apart, paged) in times.items() if _MIN_GAIN * apart <= paged)
        figures = ", ".join(
            f"{length} → {'cuDNN' if length in self._chosen else 'pages'} ({apart:.0f} µs, by pages {paged:.0f})"
            for length, (apart, paged) in times.items()
        )
        log.info("prefill after context, in parts by cuDNN where clearly faster: %s; error %.2f%%, lengths planned in %.1f s",
                 figures, 100 * worst, planned_s)  # fmt: skip

    def _pieces(self) -> list[int]:
        """What a context can be cut into."""
        return [piece for piece in PIECES if piece <= self._max_context] if self._max_context >= MIN_CONTEXT else []

    def _lengths(self) -> list[int]:
        """Padded numbers of queries."""
        return sorted({padded_queries(n, self._max_new) for n in range(MIN_NEW, self._max_new + 1)})

    def _cases(self) -> list[tuple[int, int]]:
        """(new tokens, context): every planned length occurs, with padding before and behind."""
        cases = [(min(length - 3, self._max_new), piece) for length in self._lengths() for piece in self._pieces()]
        for length in range(_up(MIN_NEW, _SQUARE_STEP), _up(self._max_new + _STEP - 1, _SQUARE_STEP) + 1, _SQUARE_STEP):
            num_new = min(length - 3, self._max_new)
            cases.append((num_new, MIN_CONTEXT + min(length - num_new, _STEP - 1)))
        return cases

    def _apart(self, q: Tensor, kv_layer: Tensor, block_table: Tensor, num_keys: int, scale: float) -> Tensor:
        out = torch.full_like(q, float("nan"))
        self.attend(q, kv_layer, block_table, num_keys, scale, out)
        return out

    def _race(self, chunk: _RandomChunk, length: int) -> tuple[float, float]:
        """Microseconds in parts, and by the paged kernel."""
        num_new = min(length, self._max_new)
        context = max(piece for piece in self._pieces() if piece <= _TIMED_CONTEXT)
        out = torch.empty_like(chunk.q[:num_new])
        apart = self._kernels.time_us(lambda: self.attend(*chunk.arguments(num_new, context), out))
        return apart, self._kernels.time_us(lambda: self._kernels.paged(*chunk.arguments(num_new, context)))


def _between_zeros(q: Tensor, before: int, length: int) -> Tensor:
    padded = q.new_empty(length, *q.shape[1:])
    padded[:before] = 0
    padded[before : before + q.shape[0]] = q
    padded[before + q.shape[0] :] = 0
    return padded


class _RandomChunk:
    """Random queries and a cache of random keys and values in mixed order; a block that nobody may read is NaN."""

    def __init__(self, shape: Shape, max_new: int, num_keys: int, device: torch.device) -> None:
        num_blocks = -(-num_keys // shape.block_size) + 1
        generator = torch.Generator(device).manual_seed(0)
        size = (num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        kv = torch.randn(size, generator=generator, dtype=shape.dtype, device=device)
        kv[0] = float("nan")
        self.kv_layer = to_cache(kv, shape.cache_dtype)
        # 0, the block that ends a table, is the poisoned one
        order = torch.randperm(num_blocks - 1, generator=generator, device=device) + 1
        self.block_table = torch.cat((order, order.new_zeros(1))).to(torch.int32)
        # Large queries make some keys matter more than the rest, so that a wrong weight of a part shows.
        self.q = 2 * torch.randn(max_new, shape.num_heads, shape.head_dim, generator=generator, dtype=shape.dtype, device=device)
        self.scale = shape.head_dim**-0.5

    def arguments(self, num_new: int, context: int) -> tuple[Tensor, Tensor, Tensor, int, float]:
        return self.q[:num_new], self.kv_layer, self.block_table, context + num_new, self.scale

    def error(self, ours: Paged, reference: Paged, num_new: int, context: int) -> float:
        """Of the token that is worst off."""
        wanted = reference(*self.arguments(num_new, context)).flatten(1).float()
        got = ours(*self.arguments(num_new, context)).flatten(1).float()
        return ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()  # NaN if one is
