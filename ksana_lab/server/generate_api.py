"""``POST /generate`` as KsanaLLM's nodes answer it: cumulative objects, each ended by NUL, or one JSON object.

An error before the answer began has a status; in a stream it is an object with ``error``. Next to OpenAI's words it carries KsanaLLM's
number (``ksana_code``) and, for its clients, ``detail``."""

from __future__ import annotations

import logging

import orjson

from ksana_lab.errors import InvalidRequest, RequestError
from ksana_lab.protocol.generate import DELIMITER, GenerateAnswer, GenerateBody, body_reader
from ksana_lab.protocol.openai import flatten_messages
from ksana_lab.server.context import RequestContext
from ksana_lab.server.endpoint import OCTET_STREAM, DisconnectWatch, Response, error_object
from ksana_lab.server.generation import Delta, Generation, GenerationService, TextOptions

log = logging.getLogger(__name__)


class GenerateEndpoint:
    def __init__(self, service: GenerationService) -> None:
        self._service = service
        self._reader = body_reader()

    async def handle(self, ctx: RequestContext, body: bytes, response: Response, watch: DisconnectWatch) -> None:
        request = self._reader.read(body)
        prompt = await self._prompt(ctx, request)
        if request.debug_mode:
            log.info("request %s: %d prompt tokens, %s", ctx.request_id, len(prompt), request.config)
        options = TextOptions(skip_special_tokens=self._service.config.tokenizer.skip_special_tokens)
        num_samples = request.config.num_return_sequences or 1
        with self._service.begin(ctx, [prompt], num_samples, request.config.sampling, options) as generation:
            watch.watch(generation)
            answer = _Cumulative(generation, GenerateAnswer(len(generation.sequences), prompt), request.config.logprobs or 0)
            if request.is_stream:
                await _stream(generation, answer, response)
            else:
                await _complete(generation, answer, response)

    async def _prompt(self, ctx: RequestContext, request: GenerateBody) -> list[int]:
        if request.input_tokens is not None:
            return request.input_tokens
        if request.prompt is None:
            raise InvalidRequest("either prompt or input_tokens must be given", "prompt")
        tokenizer = self._service.tokenizer
        if not request.use_chat_template:
            return await tokenizer.encode_async(request.prompt, add_special_tokens=self._service.config.tokenizer.add_special_tokens)
        thinking = {} if request.config.enable_thinking is None else {"enable_thinking": request.config.enable_thinking}
        text = tokenizer.render_chat(flatten_messages(request.messages()), thinking, created_s=ctx.created)
        return await tokenizer.encode_async(text, add_special_tokens=False)

    def error_body(self, error: RequestError) -> bytes:
        return orjson.dumps({"error": {**error_object(error), "ksana_code": error.ksana_code}, "detail": str(error)})

    def error_event(self, error: RequestError) -> bytes:
        return self.error_body(error) + DELIMITER


class _Cumulative:
    """The answer so far, from the sequences themselves: on a decode node it also holds the token that the deltas leave out."""

    def __init__(self, generation: Generation, answer: GenerateAnswer, num_logprobs: int) -> None:
        self._generation, self._answer, self._num_logprobs = generation, answer, num_logprobs
        self._num_told = [(0, 0)] * len(generation.sequences)  # (tokens, pieces of text)

    def to_bytes(self) -> bytes:
        for sequence in self._generation.sequences:
            tokens, parts = self._num_told[sequence.index]
            if len(sequence.text_parts) > parts:
                text = "".join(sequence.text_parts[parts:])
                self._answer.append(sequence.index, text, sequence.token_ids[tokens:], sequence.logprobs[tokens:], self._num_logprobs)
                self._num_told[sequence.index] = (len(sequence.token_ids), len(sequence.text_parts))
        return self._answer.to_bytes()


async def _stream(generation: Generation, answer: _Cumulative, response: Response) -> None:
    await response.start_stream(OCTET_STREAM)
    while deltas := await generation.next():
        if _has_news(generation, deltas):
            await response.write(answer.to_bytes() + DELIMITER)
    await response.end_stream()


def _has_news(generation: Generation, deltas: list[Delta]) -> bool:
    """Behind P's object with every first token, a cumulative one that lacks some would take text back; one without news is noise."""
    if not any(d.token_ids or d.text for d in deltas):
        return False
    return not generation.ctx.hides_first_token or all(s.token_ids for s in generation.sequences)


async def _complete(generation: Generation, answer: _Cumulative, response: Response) -> None:
    while await generation.next():
        pass
    await response.json(answer.to_bytes())
