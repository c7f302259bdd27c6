"""Text to token ids and back: a checkpoint's tokenizer, its chat template, the incremental detokeniser and stop strings.

Knows no HTTP and no engine. Built on ``tokenizers`` and ``jinja2`` rather than on ``transformers``, which would load torch into the API
process; a directory without ``tokenizer.json`` is converted through ``transformers`` once, at start.

Incremental detokenising is deterministic token by token: the deltas of the same ids are the same on every node, so a decode node can leave
out exactly what the prefill node has sent."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ksana_lab.errors import CheckpointError, InvalidRequest

log = logging.getLogger(__name__)

INLINE_CHARS = 1024  # below this, tokenising costs less than the way to a thread and back
_CONTEXT_TOKENS = 6  # of the prompt, shown to decoders whose text depends on what came before
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of vocabularies that fall back to bytes


class Tokenizer:
    """What one checkpoint's directory says of text. Safe to use from several threads; ``close`` ends its own."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None, eos_token_ids: Iterable[int]
    ) -> None:
        backend.no_truncation()  # a saved tokenizer may carry its training script's settings
        backend.no_padding()
        self._backend = backend
        # The fast one leaves the offsets out; the oldest versions do not have it.
        self._encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._bytes_of = _ByteTable(backend) if isinstance(backend.decoder, tokenizers.decoders.ByteLevel) else None
        self._template = compile_template(chat_template) if chat_template else None
        self._template_tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a Hugging Face directory. Raises CheckpointError that says what is missing or unreadable."""
        path = Path(directory)
        config = _read_json(path / "tokenizer_config.json")
        backend = _load_backend(path)
        return cls(backend, config, _read_template(path, config), _eos_token_ids(path, config, backend))

    # ---- text to ids -------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """``encode``, in a thread when ``text`` is long enough to hold up other requests' tokens."""
        return (await self.encode_all_async([text], add_special_tokens=add_special_tokens))[0]

    async def encode_all_async(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Several at once, in a thread when they are long together."""
        if sum(map(len, texts)) <= INLINE_CHARS:
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: self._encode_long(texts, add_special_tokens))

    def _encode_long(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of ``encode``, which keeps the interpreter to itself from start to end: 0.7 s for 1 MB, thread or not. A batch lets go
        of it."""
        return [encoding.ids for encoding in self._encode_batch(texts, add_special_tokens=add_special_tokens)]

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        created_s: int,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``, the template writes its own.

        ``variables``: what else the template may read. ``created_s``: what the template takes for now, unix time, shown in UTC: the nodes
        of a pair must come to the same text, whatever their clocks and time zones. Raises InvalidRequest when there is no template, a
        variable has a name of ours, or the template refuses the messages."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions with a ready prompt", "messages")
        own = {"messages": messages, "add_generation_prompt": add_generation_prompt, "strftime_now": _clock_at(created_s)}
        if taken := {*own, "self"} & (variables or {}).keys():
            raise InvalidRequest(f"chat_template_kwargs cannot set {', '.join(sorted(taken))}", "chat_template_kwargs")
        try:
            return self._template.render({**self._template_tokens, **(variables or {}), **own})
        except Exception as error:  # whatever a template's own arithmetic may come to
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error

    # ---- ids to text -------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for by itself, special tokens included; b"" for an id without a token."""
        if self._bytes_of is not None:
            return self._bytes_of(token_id)
        text = self.decode([token_id], skip_special_tokens=False)
        if text == _REPLACEMENT and (byte := _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "")):
            return bytes.fromhex(byte[1])
        return text.encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """For one sequence. ``prompt_token_ids`` matter to decoders that drop a leading space of what they are given first."""
        if self._bytes_of is not None:
            return ByteLevelDetokenizer(self._bytes_of, self._special_ids if skip_special_tokens else frozenset())
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), list(prompt_token_ids[-_CONTEXT_TOKENS:])
        )

    def close(self) -> None:
        """May be called twice."""
        self._pool.shutdown(wait=False, cancel_futures=True)


# ---- incremental detokenising ----------------------------------------------------------------------------------------


class Detokenizer(Protocol):
    """All deltas and the flush, joined, are the text of all ids. A delta never holds half a character."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What waited for more bytes that will not come."""


class ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): a token is bytes, so one UTF-8 decoder carries over what is incomplete."""

    def __init__(self, bytes_of: Callable[[int], bytes], skipped_ids: frozenset[int]) -> None:
        self._bytes_of, self._skipped = bytes_of, skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decode a short window with and without its newest tokens; the difference is the delta.

    The window starts where text was last whole, so its length does not grow with the output."""

    def __init__(self, decode: Callable[[list[int]], str], context: list[int]) -> None:
        self._decode = decode
        self._ids = context
        self._num_read = len(context)  # of _ids: their text is out

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_read])) :]

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        del self._ids[: self._num_read]
        self._num_read = len(self._ids)
        return text

    def flush(self) -> str:
        text = self._pending()
        self._num_read = len(self._ids)
        return text


class _ByteTable:
    """Token id -> bytes of a byte-level vocabulary, filled as tokens appear."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        text = self._backend.id_to_token(token_id)
        if text is None:  # a model's vocabulary may be padded beyond the tokenizer's
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in text)
        except KeyError:  # an added token, spelled as it is
            return text.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other 68 for the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()


# ---- stop strings ----------------------------------------------------------------------------------------------------


class TextStream:
    """The text of one sequence as a client may see it: detokenised, cut at the first stop string, and holding back a tail that may yet
    become one. Deltas depend on the ids alone, not on how they were batched."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0, include_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(s for s in stop if s)
        self._max_held = max((len(s) for s in self._stop), default=1) - 1
        self._min_tokens, self._include_stop = min_tokens, include_stop
        self._num_tokens = 0
        self._held = ""
        self.stopped_by: str | None = None  # set: nothing more comes out

    def push(self, token_id: int) -> str:
        """The delta this token releases."""
        self._num_tokens += 1
        return self._release(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The last delta: what waited for more bytes, and what was held back for a stop string that did not come."""
        if self.stopped_by is not None:
            return ""
        delta = self._release(self._detokenizer.flush())
        held, self._held = self._held, ""
        return delta if self.stopped_by is not None else delta + held

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._stop or self._num_tokens <= self._min_tokens:
            return text
        text = self._held + text
        found = min(((text.find(s), s) for s in self._stop if s in text), default=None)
        if found is not None:
            at, self.stopped_by = found
            self._held = ""
            return text[: at + len(self.stopped_by)] if self._include_stop else text[:at]
        self._held = self._possible_stop(text)
        return text[: len(text) - len(self._held)]

    def _possible_stop(self, text: str) -> str:
        """The longest end of ``text`` that begins a stop string."""
        for start in range(max(0, len(text) - self._max_held), len(text)):
            if any(s.startswith(text[start:]) for s in self._stop):
                return text[start:]
        return ""


# ---- reading a checkpoint's directory --------------------------------------------------------------------------------


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory (a tokenizer is read from model_dir or tokenizer_dir)")
    file = path / "tokenizer.json"
    if not file.exists():
        return _convert_backend(path)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file} is no tokenizer that `tokenizers` {tokenizers.__version__} can read: {error}") from error


def _convert_backend(path: Path) -> tokenizers.Tokenizer:
    log.info("%s has no tokenizer.json; converting its tokenizer with transformers", path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True).backend_tokenizer
    except Exception as error:
        raise CheckpointError(f"{path} holds no tokenizer.json, and transformers finds no tokenizer to convert: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _read_template(path: Path, config: dict[str, Any]) -> str | None:
    """Newer checkpoints carry ``chat_template.jinja``; older ones a string, or a list of named templates, in the tokenizer's config."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _eos_token_ids(path: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> set[int]:
    """The tokenizer's own and those of the generation config, or without one of the model's config (an id or a list of ids)."""
    generation = _read_json(path / "generation_config.json").get("eos_token_id")
    declared = generation if generation is not None else _read_json(path / "config.json").get("eos_token_id")
    ids = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    own = backend.token_to_id(_token_text(config.get("eos_token")))
    return ids | ({own} if own is not None else set())


def _token_text(token: Any) -> str:
    """A special token in a tokenizer's config is a string, a dict with ``content``, or absent."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


# ---- chat templates --------------------------------------------------------------------------------------------------


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks what a model wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # unlike jinja2's own, no HTML escapes


def _clock_at(created_s: int) -> Callable[[str], str]:
    """``strftime_now`` of a request."""
    return lambda form: datetime.fromtimestamp(created_s, timezone.utc).strftime(form)


def compile_template(source: str) -> jinja2.Template:
    """A chat template with what Hugging Face's give it: sandboxed, blocks trimmed, ``raise_exception``, plain ``tojson``. Each
    request brings its ``strftime_now``.

    Raises CheckpointError for a template that does not parse."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
