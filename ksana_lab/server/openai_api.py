"""``POST /v1/completions`` and ``/v1/chat/completions``: requests into token ids, deltas into OpenAI's chunks and answers.

One event per delta, also when its text is empty (half a character, a held-back stop string): a client that times tokens sees each one.
On a prefill node the stream ends after the first token of every sequence, without finish, usage or ``[DONE]``: those are D's to send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ksana_lab.errors import InvalidRequest, RequestError
from ksana_lab.protocol.generate import finite
from ksana_lab.protocol.openai import ChatBody, CompletionBody, chat_reader, completion_reader, flatten_messages
from ksana_lab.server.context import RequestContext
from ksana_lab.server.endpoint import EVENT_STREAM, DisconnectWatch, Response, error_json
from ksana_lab.server.generation import Delta, Generation, GenerationService, SequenceState, TextOptions, check_num_sequences
from ksana_lab.server.tokenizing import Tokenizer
from ksana_lab.types import TokenLogprob

DONE = b"data: [DONE]\n\n"

Json = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    echo: str = ""  # shown before the output


@dataclass(frozen=True)
class Shape:
    """What tells the two routes' answers apart."""

    id_prefix: str
    object: str
    chunk_object: str
    delta_choice: Callable[[Delta], Json]
    whole_choice: Callable[[SequenceState, str], Json]
    logprobs: Callable[[LogprobWriter, SequenceState, int, Sequence[TokenLogprob | None]], Json]
    prompt_ids_in_choice: bool


class _OpenAIEndpoint:
    """What the two routes share: begin, answer, errors."""

    def __init__(self, service: GenerationService, model_name: str) -> None:
        self._service, self._model_name = service, model_name

    async def _answer(
        self,
        ctx: RequestContext,
        request: CompletionBody | ChatBody,
        prompts: list[Prompt],
        shape: Shape,
        response: Response,
        watch: DisconnectWatch,
    ) -> None:
        service, ids = self._service, [p.token_ids for p in prompts]
        with service.begin(ctx, ids, request.n or 1, request.sampling, _text_options(request, service)) as generation:
            watch.watch(generation)
            writer = _AnswerWriter(generation, request, prompts, shape, request.model or self._model_name, service.tokenizer)
            await (_stream if request.stream else _complete)(generation, writer, response)

    def error_body(self, error: RequestError) -> bytes:
        return error_json(error)

    def error_event(self, error: RequestError) -> bytes:
        return b"data: " + error_json(error) + b"\n\n"


class CompletionEndpoint(_OpenAIEndpoint):
    """POST /v1/completions."""

    def __init__(self, service: GenerationService, model_name: str) -> None:
        super().__init__(service, model_name)
        self._reader = completion_reader()

    async def handle(self, ctx: RequestContext, body: bytes, response: Response, watch: DisconnectWatch) -> None:
        request = self._reader.read(body)
        prompts = request.prompts()
        check_num_sequences(len(prompts) * (request.n or 1))  # before the work of tokenising them
        await self._answer(ctx, request, await self._tokenized(request, prompts), COMPLETION, response, watch)

    async def _tokenized(self, request: CompletionBody, prompts: list[str] | list[list[int]]) -> list[Prompt]:
        tokenizer = self._service.tokenizer
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [Prompt(ids, _echo_of(ids, tokenizer) if request.echo else "") for ids in prompts if isinstance(ids, list)]
        default = self._service.config.tokenizer.add_special_tokens
        special = default if request.add_special_tokens is None else request.add_special_tokens
        encoded = await tokenizer.encode_all_async(texts, add_special_tokens=special)
        return [Prompt(ids, text if request.echo else "") for ids, text in zip(encoded, texts, strict=True)]


class ChatEndpoint(_OpenAIEndpoint):
    """POST /v1/chat/completions."""

    def __init__(self, service: GenerationService, model_name: str) -> None:
        super().__init__(service, model_name)
        self._reader = chat_reader()

    async def handle(self, ctx: RequestContext, body: bytes, response: Response, watch: DisconnectWatch) -> None:
        request = self._reader.read(body)
        await self._answer(ctx, request, [await self._prompt(ctx, request)], CHAT, response, watch)

    async def _prompt(self, ctx: RequestContext, request: ChatBody) -> Prompt:
        text = self._service.tokenizer.render_chat(
            flatten_messages(request.messages),
            request.chat_template_kwargs,
            created_s=ctx.created,
            add_generation_prompt=request.add_generation_prompt is not False,
        )
        return Prompt(await self._service.tokenizer.encode_async(text, add_special_tokens=bool(request.add_special_tokens)))


def _echo_of(prompt: list[int], tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.decode(prompt)
    except OverflowError as error:
        raise InvalidRequest("the prompt has token ids that no vocabulary holds", "prompt") from error


def _text_options(request: CompletionBody | ChatBody, service: GenerationService) -> TextOptions:
    skip = request.skip_special_tokens
    return TextOptions(
        skip_special_tokens=service.config.tokenizer.skip_special_tokens if skip is None else skip,
        include_stop=bool(request.include_stop_str_in_output),
    )


async def _complete(generation: Generation, writer: _AnswerWriter, response: Response) -> None:
    while await generation.next():
        pass
    await response.json(writer.whole())


async def _stream(generation: Generation, writer: _AnswerWriter, response: Response) -> None:
    await response.start_stream(EVENT_STREAM)
    while deltas := await generation.next():
        await response.write(b"".join([writer.event(delta) for delta in deltas]))
    await response.end_stream(b"" if writer.leaves_the_end_to_decode else writer.end())


class _AnswerWriter:
    """Deltas and sequences of one request as OpenAI's JSON."""

    def __init__(
        self,
        generation: Generation,
        request: CompletionBody | ChatBody,
        prompts: Sequence[Prompt],
        shape: Shape,
        model: str,
        tokenizer: Tokenizer,
    ) -> None:
        self._generation, self._request, self._prompts, self._shape = generation, request, prompts, shape
        ctx = generation.ctx
        self._identity = {"id": f"{shape.id_prefix}-{ctx.request_id}", "created": ctx.created, "model": model}
        self._head = b"data: " + orjson.dumps({**self._identity, "object": shape.chunk_object})[:-1] + b',"choices":'
        self._logprobs = [LogprobWriter(tokenizer, s.sampling.logprobs) for s in generation.sequences]
        self._num_told = [0] * len(generation.sequences)  # tokens, by event; of several that are ready at once the first does not count all
        self.leaves_the_end_to_decode = ctx.is_prefill and ctx.splits_first_token

    def event(self, delta: Delta) -> bytes:
        sequence = self._generation.sequences[delta.index]
        if self.leaves_the_end_to_decode:
            delta.finish_reason = delta.stop_reason = None
        if delta.is_first:
            delta.text = self._prompt_of(sequence).echo + delta.text
        self._num_told[delta.index] = delta.start + len(delta.token_ids)
        choice = self._shape.delta_choice(delta)
        if delta.logprobs is not None:
            choice["logprobs"] = self._shape.logprobs(self._logprobs[delta.index], sequence, delta.start, delta.logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if delta.is_first and self._shape.prompt_ids_in_choice:
                choice["prompt_token_ids"] = sequence.prompt_token_ids
        tail: Json = {"usage": self._usage(sum(self._num_told))} if self._request.has_continuous_usage else {}
        if self._request.return_token_ids and delta.is_first and not self._shape.prompt_ids_in_choice:
            tail["prompt_token_ids"] = sequence.prompt_token_ids
        return self._chunk([choice], tail)

    def end(self) -> bytes:
        usage = self._chunk([], {"usage": self._usage(self._generation.num_output_tokens)}) if self._request.include_usage else b""
        return usage + DONE

    def whole(self) -> bytes:
        body: Json = {**self._identity, "object": self._shape.object}
        body["choices"] = [self._whole_choice(sequence) for sequence in self._generation.sequences]
        body["usage"] = self._usage(self._generation.num_output_tokens)
        if self._request.return_token_ids and not self._shape.prompt_ids_in_choice:
            body["prompt_token_ids"] = self._prompts[0].token_ids
        return orjson.dumps(body)

    def _whole_choice(self, sequence: SequenceState) -> Json:
        choice = self._shape.whole_choice(sequence, self._prompt_of(sequence).echo)
        choice["logprobs"] = None
        if sequence.sampling.logprobs is not None:
            choice["logprobs"] = self._shape.logprobs(self._logprobs[sequence.index], sequence, 0, sequence.logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = sequence.token_ids
            if self._shape.prompt_ids_in_choice:
                choice["prompt_token_ids"] = sequence.prompt_token_ids
        return choice

    def _chunk(self, choices: list[Json], tail: Json) -> bytes:
        more = b"," + orjson.dumps(tail)[1:] if tail else b"}"
        return self._head + orjson.dumps(choices) + more + b"\n\n"

    def _prompt_of(self, sequence: SequenceState) -> Prompt:
        return self._prompts[sequence.index // sequence.sampling.n]

    def _usage(self, output: int) -> Json:
        prompt = self._generation.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self._generation.num_cached_tokens},
        }


class LogprobWriter:
    """Both styles of logprobs for one sequence: ``logprobs`` belong to its tokens from ``start`` on."""

    def __init__(self, tokenizer: Tokenizer, num_top: int | None) -> None:
        self._tokenizer, self._num_top = tokenizer, num_top or 0
        self._num_passed, self._offset = 0, 0  # tokens, and the characters they are spelled with

    def completion(self, sequence: SequenceState, start: int, logprobs: Sequence[TokenLogprob | None]) -> Json:
        """Four parallel lists, one entry per token. Offsets count each token's own text."""
        self._pass(sequence.token_ids[self._num_passed : start])  # a decode node does not write token 1, but counts it
        token_ids = sequence.token_ids[start : start + len(logprobs)]
        return {
            "tokens": [_spelling(self._tokenizer.token_bytes(i)) for i in token_ids],
            "token_logprobs": [None if p is None else finite(p.logprob) for p in logprobs],
            "top_logprobs": [None if p is None else self._top_by_text(p) for p in logprobs],
            "text_offset": self._pass(token_ids),
        }

    def chat(self, sequence: SequenceState, start: int, logprobs: Sequence[TokenLogprob | None]) -> Json:
        """``content``: one object per token, with its likeliest rivals."""
        token_ids = sequence.token_ids[start : start + len(logprobs)]
        return {"content": [self._chat_token(i, p) for i, p in zip(token_ids, logprobs, strict=True)]}

    def _pass(self, token_ids: Sequence[int]) -> list[int]:
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._tokenizer.token_text(token_id))
        self._num_passed += len(token_ids)
        return offsets

    def _top_by_text(self, position: TokenLogprob) -> dict[str, float]:
        """Of tokens that are spelled alike the chosen one counts, then the likeliest."""
        shown: dict[str, float] = {}
        for token_id, logprob in ((position.token_id, position.logprob), *position.top[: self._num_top]):
            shown.setdefault(_spelling(self._tokenizer.token_bytes(token_id)), finite(logprob))
        return shown

    def _chat_token(self, token_id: int, position: TokenLogprob | None) -> Json:
        top = [] if position is None else [self._entry(i, logprob) for i, logprob in position.top[: self._num_top]]
        return {**self._entry(token_id, None if position is None else position.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        spelled = self._tokenizer.token_bytes(token_id)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": None if logprob is None else finite(logprob),
            "bytes": list(spelled),
        }


def _spelling(token: bytes) -> str:
    """Part of a character as OpenAI spells it, ``bytes:\\xe6\\x9d``; its replacement character would be that of any other part, too."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


# ---- the two shapes --------------------------------------------------------------------------------------------------


def _reason(part: Delta | SequenceState) -> str | None:
    return None if part.finish_reason is None else part.finish_reason.value


def _completion_delta(delta: Delta) -> Json:
    return {
        "index": delta.index,
        "text": delta.text,
        "logprobs": None,
        "finish_reason": _reason(delta),
        "stop_reason": delta.stop_reason,
    }


def _completion_whole(sequence: SequenceState, echo: str) -> Json:
    return {
        "index": sequence.index,
        "text": echo + sequence.text,
        "finish_reason": _reason(sequence),
        "stop_reason": sequence.stop_reason,
    }


def _chat_delta(delta: Delta) -> Json:
    content: Json = {"role": "assistant", "content": delta.text} if delta.is_first else {"content": delta.text}
    return {
        "index": delta.index,
        "delta": content,
        "logprobs": None,
        "finish_reason": _reason(delta),
        "stop_reason": delta.stop_reason,
    }


def _chat_whole(sequence: SequenceState, echo: str) -> Json:
    return {
        "index": sequence.index,
        "message": {"role": "assistant", "content": sequence.text},
        "finish_reason": _reason(sequence),
        "stop_reason": sequence.stop_reason,
    }


COMPLETION = Shape(
    id_prefix="cmpl",
    object="text_completion",
    chunk_object="text_completion",
    delta_choice=_completion_delta,
    whole_choice=_completion_whole,
    logprobs=LogprobWriter.completion,
    prompt_ids_in_choice=True,
)
CHAT = Shape(
    id_prefix="chatcmpl",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    delta_choice=_chat_delta,
    whole_choice=_chat_whole,
    logprobs=LogprobWriter.chat,
    prompt_ids_in_choice=False,
)
