"""From logits to tokens. The random numbers of output position k of a sequence depend on (seed, k) and the vocabulary entry alone, never
on the batch, the rank or the node: a sequence gives the same tokens wherever it runs.

The draw itself is layers/race.py's, with two keys made of (seed, k). No value leaves the device here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ksana_lab.layers import fused
from ksana_lab.types import SamplingParams

Upload = Callable[[np.ndarray], Tensor]

_MASK32 = 0xFFFFFFFF


@dataclass
class Logprobs:
    """Natural logs of raw probabilities, before penalties and temperature."""

    chosen: Tensor  # [S] float32
    top_ids: Tensor  # [S, k] int64, likeliest first
    top: Tensor  # [S, k] float32


@dataclass
class Sampled:
    token_ids: Tensor  # [S] int64
    logprobs: Logprobs | None = None


@dataclass
class Filters:
    """top-k, top-p, min-p for the rows that use any."""

    rows: Tensor  # [R] int64 into the batch
    top_k: Tensor  # [R, 1] int64; the vocabulary's size = off
    top_p: Tensor  # [R, 1] float32
    min_p: Tensor  # [R, 1] float32


@dataclass
class Penalties:
    rows: Tensor  # [R] int64 into the batch
    table_rows: Tensor  # [R] int64 into the table's token counts
    repetition: Tensor  # [R, 1] float32
    presence: Tensor  # [R, 1] float32
    frequency: Tensor  # [R, 1] float32


@dataclass
class SamplingBatch:
    """What the S sampling sequences of one step ask for. All None: plain greedy."""

    temperature: Tensor | None = None  # [S, 1] float32, 0 = greedy; None: all greedy
    keys: Tensor | None = None  # [S, 2] int64, 32 bits each; with ``temperature``
    filters: Filters | None = None
    penalties: Penalties | None = None
    masked: tuple[Tensor, Tensor] | None = None  # (rows, token ids) int64: entries that must not win
    num_top_logprobs: int | None = None  # None: no logprobs wanted

    @property
    def is_plain_draw(self) -> bool:
        """Temperature and nothing else."""
        return self.filters is None and self.penalties is None and self.masked is None and self.num_top_logprobs is None


PLAIN_GREEDY = SamplingBatch()


class SamplingTable:
    """Sampling parameters by table row (one per running sequence), and token counts of the rows that have penalties."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._penalty = np.zeros((num_rows, 3), np.float32)
        self._seed = np.zeros(num_rows, np.uint64)
        self._num_logprobs = np.full(num_rows, -1, np.int64)
        self._num_prompt = np.zeros(num_rows, np.int64)
        self._min_tokens = np.zeros(num_rows, np.int64)
        self._masked: list[np.ndarray] = [np.empty(0, np.int64)] * num_rows
        # Derived, so that a step asks one question per feature.
        self._is_filtered = np.zeros(num_rows, bool)
        self._is_penalized = np.zeros(num_rows, bool)
        self._is_special = np.zeros(num_rows, bool)  # anything but plain greedy
        # [num_rows, vocab]; allocated when the first sequence with penalties comes.
        self._prompt_seen: Tensor | None = None  # bool
        self._output_counts: Tensor | None = None  # int32

    def set_row(
        self, row: int, params: SamplingParams, seed: int, token_ids: list[int], num_prompt_tokens: int, masked_token_ids: list[int]
    ) -> None:
        """``token_ids``: prompt and the outputs known so far."""
        is_greedy = params.is_greedy
        self._temperature[row] = 0.0 if is_greedy else params.temperature
        self._top_k[row] = min(params.top_k, self.vocab_size) or self.vocab_size
        self._top_p[row], self._min_p[row] = params.top_p, params.min_p
        self._seed[row] = seed & 0xFFFFFFFFFFFFFFFF
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._num_prompt[row] = num_prompt_tokens
        # Before numpy sees them: an id beyond int64, of a checkpoint's configuration, would end every request of this engine.
        self._masked[row] = masked = np.array([i for i in masked_token_ids if 0 <= i < self.vocab_size], np.int64)
        self._min_tokens[row] = params.min_tokens if masked.size else 0
        self._penalty[row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._is_filtered[row] = not is_greedy and (0 < params.top_k < self.vocab_size or params.top_p < 1.0 or params.min_p > 0.0)
        self._is_penalized[row] = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._is_special[row] = not is_greedy or self._is_penalized[row] or params.logprobs is not None or self._min_tokens[row] > 0
        if self._is_penalized[row]:
            self._count_tokens(row, token_ids, num_prompt_tokens)

    def select(self, rows: np.ndarray, ends: np.ndarray, upload: Upload) -> SamplingBatch:
        """The batch of table rows ``rows`` [S]; ``ends`` [S]: tokens each sequence has, the one to be sampled being the next."""
        if not self._is_special[rows].any():
            return PLAIN_GREEDY
        num_outputs = ends - self._num_prompt[rows]
        batch = SamplingBatch()
        temperature = self._temperature[rows]
        if temperature.any():
            batch.temperature = upload(temperature[:, None])
            batch.keys = upload(random_keys(self._seed[rows], num_outputs))
        if (used := self._is_filtered[rows].nonzero()[0]).size:
            of = rows[used]
            batch.filters = Filters(
                upload(used), upload(self._top_k[of, None]), upload(self._top_p[of, None]), upload(self._min_p[of, None])
            )
        if (used := self._is_penalized[rows].nonzero()[0]).size:
            of = rows[used]
            repetition, presence, frequency = (upload(np.ascontiguousarray(self._penalty[of, i, None])) for i in range(3))
            batch.penalties = Penalties(upload(used), upload(of), repetition, presence, frequency)
        if (used := (num_outputs < self._min_tokens[rows]).nonzero()[0]).size:
            masked = [self._masked[row] for row in rows[used]]
            batch.masked = (upload(np.repeat(used, [len(ids) for ids in masked])), upload(np.concatenate(masked)))
        if (most := int(self._num_logprobs[rows].max())) >= 0:
            batch.num_top_logprobs = most
        return batch

    def num_logprobs(self, row: int) -> int:
        """-1: none wanted."""
        return int(self._num_logprobs[row])

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """logits [S, vocab] of any float type -> tokens. Tokens of penalised rows are counted."""
        if batch is PLAIN_GREEDY:
            return Sampled(fused.argmax(logits))
        if not batch.is_plain_draw:
            logits = logits.to(torch.float32, copy=True)
        raw_logprobs = logits.log_softmax(dim=-1) if batch.num_top_logprobs is not None else None
        if batch.penalties is not None:
            logits = self._penalize(logits, batch.penalties)
        if batch.masked is not None:
            logits.index_put_(batch.masked, logits.new_tensor(float("-inf")))
        tokens = logits.argmax(dim=-1) if batch.temperature is None else draw(logits, batch)
        if batch.penalties is not None:
            self._count_outputs(batch.penalties, tokens)
        return Sampled(tokens, None if raw_logprobs is None else _pick_logprobs(raw_logprobs, tokens, batch.num_top_logprobs or 0))

    # ---- penalties ---------------------------------------------------------------------------------------------------

    def _count_tokens(self, row: int, token_ids: list[int], num_prompt_tokens: int) -> None:
        if self._prompt_seen is None or self._output_counts is None:
            shape = (len(self._seed), self.vocab_size)
            self._prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        ids = torch.tensor(token_ids, dtype=torch.int64).to(self._device)
        self._prompt_seen[row] = False
        self._prompt_seen[row, ids[:num_prompt_tokens]] = True
        self._output_counts[row] = torch.bincount(ids[num_prompt_tokens:], minlength=self.vocab_size)[: self.vocab_size]

    def _penalize(self, logits: Tensor, use: Penalties) -> Tensor:
        """Repetition as in transformers (over prompt and output), presence and frequency as in the OpenAI API (over output)."""
        assert self._prompt_seen is not None and self._output_counts is not None
        chosen = logits[use.rows]
        counts = self._output_counts[use.table_rows]
        seen = self._prompt_seen[use.table_rows] | (counts > 0)
        repeated = torch.where(chosen > 0, chosen / use.repetition, chosen * use.repetition)
        chosen = torch.where(seen, repeated, chosen)
        chosen = chosen - use.presence * (counts > 0) - use.frequency * counts
        return logits.index_copy(0, use.rows, chosen)

    def _count_outputs(self, use: Penalties, tokens: Tensor) -> None:
        assert self._output_counts is not None
        one = torch.ones((), dtype=torch.int32, device=tokens.device)
        self._output_counts.index_put_((use.table_rows, tokens[use.rows]), one, accumulate=True)


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """One token per row of ``logits`` [S, vocab]; rows of temperature 0 take the largest."""
    assert batch.temperature is not None and batch.keys is not None
    if batch.filters is not None:
        use = batch.filters  # of rows with a temperature
        chosen = logits[use.rows]
        kept = filter_logits(chosen / batch.temperature[use.rows], use.top_k, use.top_p, use.min_p) > float("-inf")
        logits = logits.index_copy(0, use.rows, chosen.masked_fill(~kept, float("-inf")))
    return fused.sample(logits, batch.temperature, batch.keys)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[R, vocab] -> the same with losers at -inf, in the order of transformers: the ``top_k`` largest; of these, renormalised, the
    smallest set of largest whose mass reaches ``top_p``; of these, what has at least ``min_p`` of the likeliest one's probability."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probs = ordered.softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    is_out = (mass_before >= top_p) | (probs < min_p * probs[:, :1])
    is_out[:, 0] = False
    ordered = ordered.masked_fill(is_out, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def random_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """seeds [S] uint64, positions [S] -> [S, 2] int64 of 32 bits each: SplitMix64 (Steele et al., 2014) of both."""
    with np.errstate(over="ignore"):
        z = _splitmix64(_splitmix64(seeds.astype(np.uint64)) + positions.astype(np.uint64))
    return np.stack([z >> np.uint64(32), z & np.uint64(_MASK32)], axis=1).astype(np.int64)


def _splitmix64(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _pick_logprobs(logprobs: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    top, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return Logprobs(chosen, ids, top)
