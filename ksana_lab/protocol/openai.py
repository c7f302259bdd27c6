"""The OpenAI API's completions and chat completions, with the extra fields that vLLM's clients send: requests, and their sampling.

Answers are built in ``server.openai_api``. What is known and not implemented is refused by name (``UNSUPPORTED``)."""

from __future__ import annotations

from typing import Any

import msgspec

from ksana_lab.errors import InvalidRequest, PromptTooLong
from ksana_lab.protocol.body import BodyReader, Unsupported, checked_stop, refused
from ksana_lab.types import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions; chat fills what fits


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both routes share. ``null`` always means the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # wins over max_tokens
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1: off
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _sampling(self, max_tokens: int, room: int, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest naming the field, PromptTooLong when ``max_tokens`` do not fit behind the prompt."""
        if max_tokens > room:
            raise PromptTooLong(f"max_tokens is {max_tokens}, but only {room} tokens fit behind this prompt; ask for fewer", "max_tokens")
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=0 if self.top_k in (None, -1) else self.top_k,
                top_p=1.0 if self.top_p is None else self.top_p,
                min_p=self.min_p or 0.0,
                seed=self.seed,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                stop=checked_stop("stop", self.stop),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                min_tokens=self.min_tokens or 0,
                logprobs=logprobs,
                n=1 if self.n is None else self.n,
            )
        except ValueError as error:
            raise refused(error) from error


class CompletionBody(_Body, kw_only=True):
    """POST /v1/completions."""

    prompt: Any = None  # str, [str], [int] or [[int]]; read ``prompts``
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, all text or all token ids. Raises InvalidRequest for anything else."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if _is_ids(prompt):
                return [prompt]
            if all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) and _is_ids(p) for p in prompt):
                return prompt
        raise InvalidRequest("prompt must be a string, a list of token ids, or a non-empty list of either", "prompt")

    def sampling(self, room: int) -> SamplingParams:
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("logprobs of an echoed prompt are not computed; drop echo or logprobs", "echo")
        asked = self.asked_tokens
        return self._sampling(min(DEFAULT_COMPLETION_TOKENS, room) if asked is None else asked, room, self.logprobs)


def _is_ids(value: list[Any]) -> bool:
    return set(map(type, value)) == {int}


class ChatBody(_Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def sampling(self, room: int) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        asked = self.asked_tokens
        return self._sampling(room if asked is None else asked, room, (self.top_logprobs or 0) if self.logprobs else None)


_ROLES = ("system", "developer", "user", "assistant")


def flatten_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them: each content a string, parts of text joined by newlines.

    Raises InvalidRequest that names the message: an unknown role, a part that is not text, tool calls."""
    if not messages:
        raise InvalidRequest("messages must hold at least one message", "messages")
    return [_flatten(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _flatten(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object with role and content", "messages")
    role = message.get("role")
    if role == "tool" or message.get("tool_calls"):
        raise InvalidRequest(f"{where} uses tools, which are not supported here", "messages")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r}", "messages")
    return {**message, "content": _text_of(message.get("content"), where)}


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content must be a string or a list of text parts", "messages")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequest(f"{where}.content has a part of type {kind!r}; only text is supported", "messages")
        texts.append(text)
    return "\n".join(texts)


_STRUCTURED = Unsupported("there is no structured output here; leave it out", ({"type": "text"}, {}, ""))
_TOOLS = Unsupported("tool calls are not parsed here; leave tools out", ([], "none", "auto"))
_TEMPLATE = Unsupported("the chat template is the checkpoint's own", ("",))

UNSUPPORTED = {
    "best_of": Unsupported("use n", (1,)),
    "logit_bias": Unsupported("there is no logit bias here; leave it out", ({},)),
    "response_format": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "structured_outputs": _STRUCTURED,
    "use_beam_search": Unsupported("there is no beam search; use n", (False,)),
    "length_penalty": Unsupported("it belongs to beam search", (1, 1.0)),
    "early_stopping": Unsupported("it belongs to beam search", (False,)),
    "prompt_logprobs": Unsupported("logprobs of the prompt are not computed"),
    "truncate_prompt_tokens": Unsupported("shorten the prompt before sending it"),
    "allowed_token_ids": Unsupported("there are no logit masks here"),
    "bad_words": Unsupported("there are no logit masks here", ([],)),
    "prompt_embeds": Unsupported("this server takes no embeddings, only tokens"),
    "spaces_between_special_tokens": Unsupported("special tokens are spelled as the tokenizer decodes them", (True,)),
    "return_tokens_as_token_ids": Unsupported("use return_token_ids", (False,)),
    "priority": Unsupported("requests run in the order of their arrival", (0,)),
    "logits_processors": Unsupported("there are no plugins here", ([],)),
}
UNSUPPORTED_COMPLETION = UNSUPPORTED | {"suffix": Unsupported("the model does not fill in the middle", ("",))}
UNSUPPORTED_CHAT = UNSUPPORTED | {
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "chat_template": _TEMPLATE,
    "documents": Unsupported("put them into a message", ([],)),
    "continue_final_message": Unsupported("use /v1/completions to continue a text", (False,)),
    "echo": Unsupported("use /v1/completions", (False,)),
    "modalities": Unsupported("only text is supported", (["text"], [])),
    "audio": Unsupported("only text is supported"),
    "prediction": Unsupported("there is no predicted output here"),
    "reasoning_effort": Unsupported("use chat_template_kwargs"),
    "web_search_options": Unsupported("there are no tools here"),
}
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "parallel_tool_calls", "request_id", "safety_identifier"})


def completion_reader() -> BodyReader[CompletionBody]:
    return BodyReader(CompletionBody, UNSUPPORTED_COMPLETION, WITHOUT_EFFECT)


def chat_reader() -> BodyReader[ChatBody]:
    return BodyReader(ChatBody, UNSUPPORTED_CHAT, WITHOUT_EFFECT)
