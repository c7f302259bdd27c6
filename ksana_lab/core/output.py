"""When a sequence is over. Stop *strings* are not known here: the API process has the text, and ends a sequence by AbortRequest("stop")."""

from __future__ import annotations

from typing import NamedTuple

from ksana_lab.core.sequence import Sequence
from ksana_lab.types import FinishReason


class Finish(NamedTuple):
    reason: FinishReason
    stop_token_id: int | None = None  # the member of ``stop_token_ids`` that ended it


def finish_of(seq: Sequence, max_model_len: int) -> Finish | None:
    """Whether the newest output token ends ``seq``: EOS (unless ignored) and stop tokens count from ``min_tokens`` on, then
    ``max_tokens`` and the model's length (prompt + output)."""
    sampling, num_outputs, token = seq.sampling, len(seq.output_token_ids), seq.output_token_ids[-1]
    if num_outputs >= sampling.min_tokens:
        if not sampling.ignore_eos and token in seq.eos_token_ids:
            return Finish(FinishReason.STOP)
        if token in sampling.stop_token_ids:
            return Finish(FinishReason.STOP, token)
    if num_outputs >= sampling.max_tokens or seq.num_tokens >= max_model_len:
        return Finish(FinishReason.LENGTH)
    return None


def output_limit(seq: Sequence, max_model_len: int) -> int:
    """Most output tokens ``seq`` can have here."""
    return min(seq.sampling.max_tokens, max_model_len - seq.num_prompt_tokens)


def masked_token_ids(seq: Sequence) -> frozenset[int]:
    """Tokens that must not be sampled before ``min_tokens`` are reached: those that would end the sequence."""
    eos = frozenset() if seq.sampling.ignore_eos else seq.eos_token_ids
    return eos | frozenset(seq.sampling.stop_token_ids)
