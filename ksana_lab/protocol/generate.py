"""KsanaLLM's ``POST /generate``: its request, as the reference reads it, and the bytes of its cumulative answer.

What the reference does not have and this does: ``seed``, ``min_p``, ``min_tokens``, ``presence_penalty``, ``frequency_penalty`` in
``sampling_config``. What it has and this does not is refused by name (``UNSUPPORTED``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ksana_lab.errors import InvalidRequest
from ksana_lab.protocol.body import BodyReader, Unsupported, checked_stop, refused
from ksana_lab.types import SamplingParams, TokenLogprob

DELIMITER = b"\0"  # ends every object of a stream
MAX_TOPK = 1024
_NAMES = {"max_tokens": "max_new_tokens", "top_k": "topk", "top_p": "topp", "n": "num_return_sequences"}  # of SamplingParams


class SamplingConfig(msgspec.Struct, kw_only=True):
    """The reference's names and defaults; ``null`` means the default."""

    topk: int | None = None  # 1
    topp: float | None = None  # 1.0; 0 means 1
    temperature: float | None = None  # 1.0; 0 means 1 (greedy is topk 1)
    do_sample: bool | None = None
    max_new_tokens: int | None = None  # -1: as many as fit
    logprobs: int | None = None  # 0: none
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    stop_token_ids: list[int] | None = None
    stop_strings: list[str] | None = None
    ignore_eos: bool | None = None
    enable_thinking: bool | None = None  # shown to the chat template
    seed: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def is_greedy(self) -> bool:
        return self.topk in (None, 1) or self.do_sample is False

    def sampling(self, room: int) -> SamplingParams:
        """``room``: tokens that fit behind the prompt; ``max_new_tokens`` is capped to it, as the reference stops at its ``max_token_len``.

        Raises InvalidRequest naming the field."""
        topk = 1 if self.topk is None else self.topk
        if not 1 <= topk <= MAX_TOPK:
            raise InvalidRequest(f"topk must be in 1..{MAX_TOPK}, got {topk}", "topk")
        max_new_tokens = -1 if self.max_new_tokens is None else self.max_new_tokens
        if max_new_tokens < 1 and max_new_tokens != -1:
            raise InvalidRequest(f"max_new_tokens must be -1 (as many as fit) or at least 1, got {max_new_tokens}", "max_new_tokens")
        try:
            return SamplingParams(
                max_tokens=room if max_new_tokens == -1 else min(max_new_tokens, room),
                temperature=0.0 if self.is_greedy else self.temperature or 1.0,
                top_k=0 if self.is_greedy else topk,
                top_p=1.0 if self.is_greedy else self.topp or 1.0,
                min_p=self.min_p or 0.0,
                seed=self.seed,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                stop=checked_stop("stop_strings", self.stop_strings),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                min_tokens=self.min_tokens or 0,
                logprobs=self.logprobs or None,
                n=1 if self.num_return_sequences is None else self.num_return_sequences,
            )
        except ValueError as error:
            raise refused(error, _NAMES) from error


class GenerateBody(msgspec.Struct, kw_only=True):
    prompt: str | None = None
    input_tokens: list[int] | None = None  # wins over prompt
    use_chat_template: bool | None = None  # prompt is then a JSON list of messages
    stream: bool | None = None  # default: true
    sampling_config: SamplingConfig | None = None
    model_name: str | None = None
    debug_mode: bool | None = None  # logs the request

    @property
    def is_stream(self) -> bool:
        return self.stream is not False

    @property
    def config(self) -> SamplingConfig:
        return self.sampling_config or SamplingConfig()

    def messages(self) -> list[Any]:
        """The conversation inside ``prompt`` under ``use_chat_template``. Raises InvalidRequest when it is none."""
        try:
            messages = orjson.loads(self.prompt or "")
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"with use_chat_template, prompt must be a JSON list of messages: {error}", "prompt") from error
        if not isinstance(messages, list):
            raise InvalidRequest("with use_chat_template, prompt must be a JSON list of messages", "prompt")
        return messages


_EMBEDDINGS = Unsupported("this server takes no embeddings, only tokens", ({}, [], {"pos": [], "embeddings": []}))
_STRUCTURED = Unsupported("there is no structured output here; leave it out", ("", False))

UNSUPPORTED = {
    "messages": Unsupported("there is no multimodal plugin; use prompt with use_chat_template, or /v1/chat/completions", ([],)),
    "model_type": Unsupported("prompts are not wrapped by model family; use use_chat_template", ("", "empty")),
    "structured_output_regex": _STRUCTURED,
    "input_refit_embedding": _EMBEDDINGS,
    "pos": _EMBEDDINGS,
    "embeddings": _EMBEDDINGS,
    "additional_params": Unsupported("there are no plugins to hand them to", ({}, "")),
}
UNSUPPORTED_SAMPLING = {
    "num_beams": Unsupported("there is no beam search; use num_return_sequences to get several samples", (1, 0)),
    "length_penalty": Unsupported("it belongs to beam search", (1, 1.0)),
    "no_repeat_ngram_size": Unsupported("use repetition_penalty", (0,)),
    "encoder_no_repeat_ngram_size": Unsupported("use repetition_penalty", (0,)),
    "decoder_no_repeat_ngram_size": Unsupported("use repetition_penalty", (0,)),
    "enable_structured_output": _STRUCTURED,
    "json_schema": _STRUCTURED,
}


def body_reader() -> BodyReader[GenerateBody]:
    sampling = BodyReader(SamplingConfig, UNSUPPORTED_SAMPLING)
    return BodyReader(GenerateBody, UNSUPPORTED, nested={"sampling_config": sampling})


class GenerateAnswer:
    """The cumulative answer, kept serialised: an object costs one copy of its bytes, not a new encoding of all ids and text so far.

    Shape: ``{"texts": [str], "output_token_ids": [[int]], "logprobs": [[[[token, logprob], …], …]], "input_token_ids": [int]}``."""

    def __init__(self, num_sequences: int, input_token_ids: Sequence[int]) -> None:
        self._texts = [bytearray() for _ in range(num_sequences)]  # JSON-escaped, without quotes
        self._ids = [bytearray() for _ in range(num_sequences)]
        self._logprobs = [bytearray() for _ in range(num_sequences)]
        self._tail = b'],"input_token_ids":' + orjson.dumps(list(input_token_ids)) + b"}"

    def append(self, index: int, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None, k: int) -> None:
        """``k``: how many of the likeliest tokens to show at each position; the chosen one follows when it is not among them."""
        self._texts[index] += orjson.dumps(text)[1:-1]
        if token_ids:
            self._ids[index] += (b"," if self._ids[index] else b"") + orjson.dumps(list(token_ids))[1:-1]
        for position in logprobs or ():
            self._logprobs[index] += (b"," if self._logprobs[index] else b"") + orjson.dumps(_pairs(position, k))

    def to_bytes(self) -> bytes:
        return b"".join(
            (
                b'{"texts":["',
                b'","'.join(self._texts),
                b'"],"output_token_ids":[[',
                b"],[".join(self._ids),
                b']],"logprobs":[[',
                b"],[".join(self._logprobs),
                b"]",
                self._tail,
            )
        )


def _pairs(position: TokenLogprob | None, k: int) -> list[tuple[int, float]]:
    if position is None:
        return []
    top = list(position.top[:k])
    if all(token_id != position.token_id for token_id, _ in top):
        top.append((position.token_id, position.logprob))
    return [(token_id, finite(logprob)) for token_id, logprob in top]


def finite(logprob: float) -> float:
    """JSON has no infinity; a token that cannot occur gets what OpenAI-style servers write."""
    return max(logprob, -9999.0)
