"""One client request from token ids to text deltas: admission, expansion into sequences, detokenising, stop strings, and what a prefill
or a decode node leaves out. Knows neither HTTP nor the shape of any answer; both APIs stand on it.

The deltas of a sequence depend on its token ids alone. A prefill node emits the delta of token 1 and never the flush behind it; a decode
node that was told so drops exactly that delta and emits all the rest. Joined, they are what one mixed node emits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

from ksana_lab.config.engine import EngineConfig
from ksana_lab.core.scheduler import STOPPED_BY_CALLER
from ksana_lab.errors import InvalidRequest, PromptTooLong, RequestAborted, RequestError, request_error
from ksana_lab.protocol.engine import AddRequest, EngineReady, SequenceUpdate
from ksana_lab.server.context import Leg, RequestContext
from ksana_lab.server.engine_client import EngineClient, RequestStream
from ksana_lab.server.metrics import ServerMetrics
from ksana_lab.server.tokenizing import TextStream, Tokenizer
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.types import FinishReason, SamplingParams, TokenLogprob, seed_of

MAX_SEQUENCES = 1024  # prompts x n of one request
MAX_STOP_TOKEN_IDS = 1024  # looked through at every token
_SEED_BITS = 63

MakeSampling = Callable[[int], SamplingParams]  # from the number of tokens that fit behind a prompt


@dataclass(frozen=True)
class TextOptions:
    skip_special_tokens: bool = True
    include_stop: bool = False  # keep the stop string, or the stop token's text


@dataclass
class Delta:
    """What one sequence adds to its answer. ``finish_reason`` set: its last one."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None  # one per token, None where the engine did not know; None altogether if not asked for
    start: int  # where in the output its first token stands
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def is_first(self) -> bool:
        return self.start == 0


@dataclass
class SequenceState:
    """All of one sequence so far."""

    index: int
    request_id: str  # in the engine
    prompt_token_ids: list[int]
    sampling: SamplingParams
    text_stream: TextStream
    eos_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    text_parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.text_parts)

    def advance(self, update: SequenceUpdate, ctx: RequestContext, options: TextOptions) -> Delta | None:
        """Take in one update. None when there is nothing to tell: the sequence is over, or this node leaves token 1 to its peer."""
        if self.finish_reason is not None:
            return None
        delta = Delta(self.index, "", [], None if self.sampling.logprobs is None else [], start=len(self.token_ids))
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        ends_in_stop_token = update.finish is FinishReason.STOP and not options.include_stop
        for i, token_id in enumerate(update.new_token_ids):
            is_hidden_text = ends_in_stop_token and i == len(update.new_token_ids) - 1
            text = "" if is_hidden_text else self.text_stream.push(token_id)
            self._append(delta, token_id, text, update.logprobs[i] if update.logprobs else None, ctx)
            if self.text_stream.stopped_by is not None:
                break
        self._finish(delta, update, ctx)
        if not delta.token_ids and delta.finish_reason is None and not delta.text:
            return None
        return delta

    def _append(self, delta: Delta, token_id: int, text: str, logprob: TokenLogprob | None, ctx: RequestContext) -> None:
        self.token_ids.append(token_id)
        self.text_parts.append(text)
        if delta.logprobs is not None:
            self.logprobs.append(logprob)
        if ctx.hides_first_token and len(self.token_ids) == 1:
            delta.start = 1
            return
        delta.text += text
        delta.token_ids.append(token_id)
        if delta.logprobs is not None:
            delta.logprobs.append(logprob)

    def _finish(self, delta: Delta, update: SequenceUpdate, ctx: RequestContext) -> None:
        if self.text_stream.stopped_by is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self.text_stream.stopped_by
        elif update.finish is not None:
            self.finish_reason = update.finish
            self.stop_reason = update.stop_reason if update.stop_reason in self.sampling.stop_token_ids else None
            if not ctx.is_prefill:  # there, more text follows from the decode node
                rest = self.text_stream.finish()
                self.text_parts.append(rest)
                delta.text += rest
                if self.text_stream.stopped_by is not None:
                    self.finish_reason, self.stop_reason = FinishReason.STOP, self.text_stream.stopped_by
        delta.finish_reason, delta.stop_reason = self.finish_reason, self.stop_reason


class Generation:
    """One request in the engine. ``with`` it: leaving aborts whatever still runs.

    ``next`` until it returns []; a RequestError from it is the request's end."""

    def __init__(
        self,
        ctx: RequestContext,
        sequences: list[SequenceState],
        num_prompt_tokens: int,
        options: TextOptions,
        engine: EngineClient,
        metrics: ServerMetrics,
        recorder: NullRecorder,
    ) -> None:
        self.ctx, self.sequences = ctx, sequences
        self.num_prompt_tokens = num_prompt_tokens  # each prompt counted once, however many samples it has
        self._options, self._engine, self._metrics, self._recorder = options, engine, metrics, recorder
        self._stream: RequestStream | None = None
        self._num_open = len(sequences)

    def start(self, requests: Sequence[AddRequest]) -> None:
        if self._recorder.enabled:  # before, lest the engine's own mark come first
            self._record("QUEUED", num_prompt_tokens=self.num_prompt_tokens, num_sequences=len(requests))
        self._stream = self._engine.submit(requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    @property
    def num_cached_tokens(self) -> int:
        return sum(s.num_cached_tokens for s in self.sequences)

    async def next(self) -> list[Delta]:
        """The deltas that are new, in the order of their arrival; [] when every sequence is over."""
        assert self._stream is not None
        deltas: list[Delta] = []
        while self._num_open and not deltas:
            for index, update in await self._stream.next():
                delta = self._take(self.sequences[index], update)
                if delta is not None:
                    deltas.append(delta)
        return deltas

    def _take(self, sequence: SequenceState, update: SequenceUpdate) -> Delta | None:
        if update.finish in (FinishReason.ABORT, FinishReason.ERROR):
            type_ = update.error_type or (RequestAborted.type if update.finish is FinishReason.ABORT else RequestError.type)
            raise request_error(type_, update.error or "the engine ended the request without saying why")
        was_open, had_tokens = sequence.finish_reason is None, bool(sequence.token_ids)
        delta = sequence.advance(update, self.ctx, self._options)
        if not was_open:
            return None
        self._note_times(sequence, update, had_tokens)
        if sequence.finish_reason is not None:
            self._num_open -= 1
            if update.finish is None:  # a stop string, which the engine does not know of
                assert self._stream is not None
                self._stream.abort(sequence.request_id, STOPPED_BY_CALLER)
            self._on_sequence_finished(sequence, update)
        return delta

    def _note_times(self, sequence: SequenceState, update: SequenceUpdate, had_tokens: bool) -> None:
        if not update.new_token_ids:
            return
        sequence.last_token_s = time.monotonic()
        if not had_tokens:
            sequence.first_token_s = sequence.last_token_s
            self._metrics.on_first_token(sequence.first_token_s - self.ctx.arrival_ns / 1e9)
            if self._recorder.enabled:
                self._record("FIRST_TOKEN", index=sequence.index)

    def _on_sequence_finished(self, sequence: SequenceState, update: SequenceUpdate) -> None:
        arrival_s = self.ctx.arrival_ns / 1e9
        self._metrics.on_sequence_finished(
            e2e_s=time.monotonic() - arrival_s,
            decode_s=sequence.last_token_s - sequence.first_token_s,
            num_tokens=len(sequence.token_ids),
            update=update,
            arrival_ns=self.ctx.arrival_ns,
        )
        if self._recorder.enabled:
            self._record(
                "FINISHED",
                index=sequence.index,
                finish_reason=sequence.finish_reason.value if sequence.finish_reason else None,
                num_output_tokens=len(sequence.token_ids),
                num_preemptions=update.num_preemptions,
                scheduled_ns=update.scheduled_ns,
                prefill_end_ns=update.prefill_end_ns,
                first_token_ns=update.first_token_ns,
                transfer_start_ns=update.transfer_start_ns,
                transfer_end_ns=update.transfer_end_ns,
            )

    def abort(self, reason: str) -> None:
        """End it now: ``next`` raises RequestAborted, the engine frees what it holds. From any callback of the loop."""
        if self._stream is not None and self._num_open:
            self._stream.fail(RequestAborted(reason))
            self._stream.close(reason)

    def _record(self, name: str, **args: object) -> None:
        self._recorder.instant(name, "request", request_id=self.ctx.request_id, comm_request_id=self.ctx.comm_request_id, **args)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None:
            self._engine.release(self._stream, str(error) if error is not None else "the request is over")


class GenerationService:
    """What both APIs ask: turn prompts into a running Generation."""

    def __init__(
        self,
        config: EngineConfig,
        engine: EngineClient,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        recorder: NullRecorder,
    ) -> None:
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.metrics, self.recorder = metrics, recorder

    def begin(
        self, ctx: RequestContext, prompts: Sequence[list[int]], num_samples: int, make_sampling: MakeSampling, options: TextOptions
    ) -> Generation:
        """Check, expand ``n`` (sample i of a prompt has seed + i) and submit. ``num_samples``: the ``n`` that was asked for.

        Raises InvalidRequest, PromptTooLong, QueueFull, ServiceUnavailable; the peer of a pair is told of all but the first."""
        try:
            return self._begin(ctx, prompts, make_sampling, options)
        except RequestError as error:
            self.decline(ctx, len(prompts) * num_samples, error)
            raise

    def decline(self, ctx: RequestContext, num_sequences: int, error: RequestError) -> None:
        """Tell the other node of a pair that this one does not take its part, lest it keep blocks for it until the lease ends.

        What is wrong with the request itself the other node sees too."""
        if ctx.leg is Leg.WHOLE or type(error) is InvalidRequest:
            return
        keys = (ctx.transfer_key(i) for i in range(max(1, min(num_sequences, MAX_SEQUENCES))))
        self.engine.decline([key for key in keys if key is not None], str(error))

    def _begin(self, ctx: RequestContext, prompts: Sequence[list[int]], make_sampling: MakeSampling, options: TextOptions) -> Generation:
        ready = self.engine.check_admission()
        samplings = [make_sampling(self._room(ready, ctx, prompt)) for prompt in prompts]
        for sampling in samplings:
            _check_stop_token_ids(sampling, ready.vocab_size)
        check_num_sequences(sum(s.n for s in samplings))
        base = self.engine.free_id(ctx.request_id)
        sequences: list[SequenceState] = []
        requests: list[AddRequest] = []
        for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            seed = self._seed(ctx, number) if sampling.seed is None else sampling.seed
            for i in range(sampling.n):
                index = len(sequences)
                one = replace(sampling, n=1, seed=(seed + i) % (1 << _SEED_BITS))
                sequence = self._sequence(index, f"{base}:{index}", prompt, sampling, options)
                sequences.append(sequence)
                requests.append(
                    AddRequest(sequence.request_id, prompt, one, ctx.arrival_ns, sequence.eos_token_ids, ctx.transfer_key(index))
                )
        generation = Generation(ctx, sequences, sum(map(len, prompts)), options, self.engine, self.metrics, self.recorder)
        generation.start(requests)
        return generation

    def _sequence(self, index: int, request_id: str, prompt: list[int], sampling: SamplingParams, options: TextOptions) -> SequenceState:
        detokenizer = self.tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens, prompt_token_ids=prompt)
        stream = TextStream(detokenizer, sampling.stop, min_tokens=sampling.min_tokens, include_stop=options.include_stop)
        return SequenceState(index, request_id, prompt, sampling, stream, self.tokenizer.eos_token_ids)

    def _room(self, ready: EngineReady, ctx: RequestContext, prompt: list[int]) -> int:
        """Tokens that fit behind ``prompt`` here. A prefill node's cache only has to hold the prompt and one token."""
        if not prompt:
            raise InvalidRequest("the prompt is empty: it must have at least one token", "prompt")
        if min(prompt) < 0 or max(prompt) >= ready.vocab_size:
            raise InvalidRequest(f"the prompt has token ids outside 0..{ready.vocab_size - 1}", "prompt")
        num_cache_tokens = ready.num_blocks * ready.block_size
        limit = ready.max_model_len if ctx.is_prefill else min(ready.max_model_len, num_cache_tokens)
        if len(prompt) >= limit or len(prompt) >= num_cache_tokens:
            which = "this model takes" if ready.max_model_len <= num_cache_tokens else "this node's KV cache holds"
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens; {which} {min(limit, num_cache_tokens)}, prompt and output together", "prompt"
            )
        return limit - len(prompt)

    def _seed(self, ctx: RequestContext, number: int) -> int:
        """For a request that brings none: from the node's own seed and the request's id, so that P and D of a pair draw the same."""
        return seed_of(self.config.runtime.seed, ctx.request_id, number)


def check_num_sequences(count: int) -> None:
    """``count``: prompts x n of one request. Raises InvalidRequest."""
    if count > MAX_SEQUENCES:
        raise InvalidRequest(f"prompts x n is {count}; at most {MAX_SEQUENCES} are allowed in one request", "n")


def _check_stop_token_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """An id that no token has would stop nothing, and in the engine it would have to fit a tensor. Raises InvalidRequest."""
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed", "stop_token_ids"
        )
    strange = next((i for i in sampling.stop_token_ids if not 0 <= i < vocab_size), None)
    if strange is not None:
        raise InvalidRequest(f"stop_token_ids must be in 0..{vocab_size - 1}, this model's vocabulary, got {strange}", "stop_token_ids")
