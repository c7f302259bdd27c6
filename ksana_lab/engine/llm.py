"""Offline generation in this process: prompts in, text out, no server. Several may live in one process; ``close`` (or ``with``) ends it."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ksana_lab.config.engine import EngineConfig, ModelOptions
from ksana_lab.config.validate import build
from ksana_lab.core.scheduler import STOPPED_BY_CALLER
from ksana_lab.engine.engine import Engine
from ksana_lab.errors import ConfigError, InvalidRequest, request_error
from ksana_lab.protocol.engine import AddRequest, SequenceUpdate
from ksana_lab.server.tokenizing import TextStream, Tokenizer
from ksana_lab.tracing.recorder import open_recorder
from ksana_lab.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams, seed_of

Prompt = str | Sequence[int]

_NO_LIMIT = 1 << 40  # nobody else waits here: no queue limit, no time-out (seconds)


class LLM:
    """``LLM(model_dir, enable_prefix_caching=True).generate(["Hello"], SamplingParams(max_tokens=8))``.

    ``model``: a checkpoint directory or a whole EngineConfig. ``options``: fields of EngineConfig's sections by their bare names."""

    def __init__(self, model: str | EngineConfig, **options: Any) -> None:
        self.config = _offline(_with_options(model, options))
        self.tokenizer = Tokenizer.load(self.config.tokenizer.tokenizer_dir or self.config.model.model_dir)
        self._recorder = open_recorder(self.config.runtime.trace_dir, "llm")
        self._engine: Engine | None = None
        if self.config.runtime.num_threads:
            torch.set_num_threads(self.config.runtime.num_threads)
        try:
            self._engine = Engine(self.config, recorder=self._recorder)
        except BaseException:
            self.close()
            raise
        self._num_requests = 0

    @property
    def engine(self) -> Engine:
        """Raises RuntimeError after ``close``."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete ``prompts`` (texts or lists of token ids; or a single text), all at once; results in the same order. Prompts
        without a seed get one each, made of ``runtime.seed`` and how many prompts came before: the same calls give the same samples.

        Raises InvalidRequest or PromptTooLong for a prompt that cannot be served; nothing runs on then."""
        texts: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts  # type: ignore[assignment]
        if texts and isinstance(texts[0], int):
            raise InvalidRequest("generate takes a list of prompts; wrap a single list of token ids in another list")
        params = [sampling or SamplingParams()] * len(texts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(params) != len(texts):
            raise InvalidRequest(f"{len(texts)} prompts but {len(params)} SamplingParams")
        run = _Run(self.engine, self.tokenizer, self.config.tokenizer.skip_special_tokens)
        try:
            for prompt, param in zip(texts, params, strict=True):
                ids = self._encode(prompt)
                run.add(f"llm-{self._num_requests}", ids, param, seed=seed_of(self.config.runtime.seed, self._num_requests))
                self._num_requests += 1
            return run.finish()
        finally:
            self.engine.fail_all("generate was interrupted")

    def close(self) -> None:
        """May be called twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._recorder.close()
        self.tokenizer.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"{self.engine.scheduler.blocks.num_blocks} blocks"
        return f"LLM({self.config.model.model_dir!r}, {state})"

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=self.config.tokenizer.add_special_tokens)
        return list(prompt)


class _Run:
    """One call of ``generate``."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._engine, self._tokenizer, self._skip_special_tokens = engine, tokenizer, skip_special_tokens
        self._results: list[RequestOutput] = []
        self._open: dict[str, tuple[CompletionOutput, TextStream]] = {}

    def add(self, request_id: str, ids: list[int], params: SamplingParams, *, seed: int) -> None:
        result = RequestOutput(request_id, ids)
        self._results.append(result)
        for index in range(params.n):
            own = replace(params, n=1, seed=((seed if params.seed is None else params.seed) + index) % 2**63)
            output = CompletionOutput(index, "", [], None, logprobs=None if params.logprobs is None else [])
            result.outputs.append(output)
            detokenizer = self._tokenizer.detokenizer(skip_special_tokens=self._skip_special_tokens, prompt_token_ids=ids)
            name = f"{request_id}:{index}"
            self._open[name] = output, TextStream(detokenizer, params.stop, min_tokens=params.min_tokens)
            request = AddRequest(name, ids, own, time.monotonic_ns(), self._tokenizer.eos_token_ids)
            if (refusal := self._engine.add(request)) is not None:
                self._note(refusal)

    def finish(self) -> list[RequestOutput]:
        while self._open:
            for update in self._engine.step():
                self._note(update)
            assert self._engine.is_busy or not self._open, "the scheduler has requests and runs none"
        return self._results

    def _note(self, update: SequenceUpdate) -> None:
        if update.request_id not in self._open:
            return
        output, text = self._open[update.request_id]
        if update.error_type is not None:
            raise request_error(update.error_type, update.error or "")
        output.num_cached_tokens = update.num_cached_tokens or output.num_cached_tokens
        output.token_ids += update.new_token_ids
        if output.logprobs is not None and update.logprobs:
            output.logprobs += update.logprobs
        for token_id in update.new_token_ids:
            output.text += text.push(token_id)
        if update.finish is not None:
            output.text += text.finish()
            output.finish_reason = update.finish
        if text.stopped_by is not None:
            output.finish_reason = FinishReason.STOP
            self._engine.abort(update.request_id, STOPPED_BY_CALLER)
        if output.finish_reason is not None:
            del self._open[update.request_id]


def _with_options(model: str | EngineConfig, options: dict[str, Any]) -> EngineConfig:
    """``options`` put into the first section that has a field of that name. Raises ConfigError for a name that none has, or
    a bad value."""
    config = model if isinstance(model, EngineConfig) else EngineConfig(model=ModelOptions(model_dir=str(model)))
    sections = {name: type(getattr(config, name)).model_fields for name in type(config).model_fields}
    changes: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        section = next((name for name, fields in sections.items() if key in fields), None)
        if section is None:
            known = [field for fields in sections.values() for field in fields]
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"LLM has no option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        changes.setdefault(section, {})[key] = value
    merged = {name: {**getattr(config, name).model_dump(), **fields} for name, fields in changes.items()}
    return build(EngineConfig, {**config.model_dump(), **merged}, "LLM")


def _offline(config: EngineConfig) -> EngineConfig:
    if config.connector.role.is_disaggregated:
        raise ConfigError(f"LLM runs alone; a {config.connector.role.value} node needs its peer: use Cluster, or role mixed")
    scheduler = config.scheduler.model_copy(update={"max_num_waiting": _NO_LIMIT, "waiting_timeout_s": float(_NO_LIMIT)})
    return config.model_copy(update={"scheduler": scheduler})
