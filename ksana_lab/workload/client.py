"""One request over HTTP, timed: sends it, stamps each piece of the answer as it comes in, and writes a RequestRecord.

While an answer streams, only clock and bytes are kept: JSON is parsed when the answer is over (or when it outgrows a bound), so that
reading one answer does not delay the stamps of another. Speaks KsanaLLM's /generate and the OpenAI streams, so a peer can be measured
with the same client. Knows nothing of when to send: see loadgen.py. Proxy variables of the environment are never used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import orjson

from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import CANCELLED
from ksana_lab.workload.spec import Endpoint, Sampling, WorkloadRequest
from ksana_lab.workload.wire import Answer, ConnectionLost, HttpClient

_PATHS: dict[Endpoint, str] = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MAX_KEPT_BYTES = 1 << 18  # of one answer before it is parsed in passing
_PIECES_AT_A_TIME = 8  # parsed before other answers get their turn: about 0.1 ms
_INFO_TIMEOUT_S = 10.0
_NETWORK_ERRORS = (OSError, asyncio.TimeoutError, ConnectionLost)
_GENERATE_MAX_TOPK = 1024  # /generate knows no "off": its widest is this
_WORDS = ("time", "year", "day", "man", "world", "life", "hand", "part", "child", "eye", "place", "work", "week", "case", "point", "fact")


class Client:
    """A pooled connection to one server. ``async with Client(url, "generate") as client: record = await client.send(request)``."""

    def __init__(
        self,
        base_url: str,
        endpoint: Endpoint = "generate",
        *,
        model: str | None = None,
        sampling: Sampling | None = None,
        extra_body: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Raises ConfigError for a URL that is none."""
        self.endpoint, self.model = endpoint, model
        self.sampling = sampling or Sampling()
        self._extra_body = dict(extra_body or {})
        self._http = HttpClient(base_url, connect_timeout_s=connect_timeout_s)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._timeout_s, self._connect_timeout_s = timeout_s, connect_timeout_s

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    async def node_info(self) -> dict[str, Any]:
        """The first entry of /v1/models (id, and on our nodes max_model_len and vocab_size); {} where the server has none to show."""
        try:
            answer = await asyncio.wait_for(self._http.request("GET", "/v1/models", headers=self._headers), _INFO_TIMEOUT_S)
        except _NETWORK_ERRORS:
            return {}
        data = _json_object(b"".join(piece for _, piece in answer.pieces)).get("data")
        return data[0] if answer.status == 200 and isinstance(data, list) and data and isinstance(data[0], dict) else {}

    def encode(self, request: WorkloadRequest) -> bytes:
        """The request's body. Made before the clock starts: a long prompt takes longer to encode than to send."""
        body = _generate_body(request, self.sampling) if self.endpoint == "generate" else self._openai_body(request)
        body = {name: value for name, value in (body | self._extra_body).items() if value is not None}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    async def send(
        self, request: WorkloadRequest, body: bytes | None = None, *, request_id: str, scheduled_s: float | None = None
    ) -> RequestRecord:
        """Sends and reads to the end. Never raises for what a server or a network does: ``record.error`` says it. Cancelling this task
        closes the connection and raises CancelledError."""
        body = self.encode(request) if body is None else body
        record = RequestRecord(request_id, request.num_prompt_tokens, scheduled_s=scheduled_s, labels={"index": request.index})
        reader = _AnswerReader(self.endpoint, record, request, expects_all=self.sampling.ignore_eos)
        headers = {**self._headers, "x-request-id": request_id}
        record.sent_s = time.monotonic()  # before a connection is made: a server too busy to accept one is slow, not unmeasured
        try:
            await asyncio.wait_for(self._exchange(body, headers, reader), self._timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            record.error = f"timeout: no end after {self._timeout_s:g} s"
        except _NETWORK_ERRORS as error:
            record.error = f"connection: {type(error).__name__}: {error}"
        record.finished_s = time.monotonic()
        await reader.finish()
        return record

    async def _exchange(self, body: bytes, headers: dict[str, str], reader: _AnswerReader) -> None:
        """Raises what ``HttpClient.request`` raises, and ConnectionLost for a connection that takes too long: that is no answer without
        an end."""
        try:
            await self._http.request("POST", _PATHS[self.endpoint], body, headers, on_start=reader.on_start, on_piece=reader.on_piece)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ConnectionLost(str(error) or f"none was made within {self._connect_timeout_s:g} s") from error

    def _openai_body(self, request: WorkloadRequest) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.model or "",
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "ignore_eos": sampling.ignore_eos,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if self.endpoint == "chat":
            words = (_WORDS[i % len(_WORDS)] for i in request.prompt_token_ids)
            return body | {"messages": [{"role": "user", "content": " ".join(words)}]}
        return body | {"prompt": request.prompt_token_ids}


def _generate_body(request: WorkloadRequest, sampling: Sampling) -> dict[str, Any]:
    is_greedy = sampling.temperature == 0
    config = {
        "topk": 1 if is_greedy else sampling.top_k or _GENERATE_MAX_TOPK,
        "topp": sampling.top_p,
        "temperature": sampling.temperature,
        "max_new_tokens": request.max_tokens,
        "ignore_eos": sampling.ignore_eos,
    }
    if not is_greedy:
        config |= {"do_sample": True, "seed": request.seed}
    return {"input_tokens": request.prompt_token_ids, "stream": True, "sampling_config": config}


class _AnswerReader:
    """Reads one streamed answer into its record. ``expects_all``: fewer tokens than asked for are a failure, not an early stop."""

    def __init__(self, endpoint: Endpoint, record: RequestRecord, request: WorkloadRequest, *, expects_all: bool) -> None:
        self._is_generate = endpoint == "generate"
        self._end = b"\0" if self._is_generate else b"\n"  # of a message; an SSE event of an OpenAI stream is one line of data
        self._marker = b"\0" if self._is_generate else b"data:"  # counts messages without parsing them
        self._record, self._request, self._expects_all = record, request, expects_all
        self.answer: Answer | None = None
        self._kept_bytes = 0
        self._num_messages = 0
        self._rest = b""  # bytes of a message whose end has not come
        self._texts: list[str] = []
        self._usage: dict[str, Any] = {}

    def on_start(self, answer: Answer) -> None:
        self.answer = answer
        if self._request.cancel_after_messages == 0:
            answer.cut_off()

    def on_piece(self, answer: Answer) -> None:
        """Called for every piece as it comes in: keep it short."""
        piece = answer.pieces[-1][1]
        self._kept_bytes += len(piece)
        if self._kept_bytes > _MAX_KEPT_BYTES:
            if answer.status == 200:
                self._parse(answer.pieces)
            answer.pieces = []
            self._kept_bytes = 0
        if (limit := self._request.cancel_after_messages) is not None:
            self._num_messages += piece.count(self._marker)
            if self._num_messages >= limit:
                answer.cut_off()

    async def finish(self) -> None:
        """Parses what is left, a little at a time so that other answers are stamped in between, and decides whether it completed."""
        answer, record = self.answer, self._record
        if answer is not None and answer.status != 200:
            body = b"".join(piece for _, piece in answer.pieces)
            record.error = record.error or f"{answer.status}: {_error_message(body.decode('utf-8', 'replace'))}"
            return
        pieces = answer.pieces if answer is not None else []
        for start in range(0, len(pieces), _PIECES_AT_A_TIME):
            self._parse(pieces[start : start + _PIECES_AT_A_TIME])
            await asyncio.sleep(0)
        if not self._is_generate:
            record.text = "".join(self._texts)
            record.num_prompt_tokens = self._usage.get("prompt_tokens", record.num_prompt_tokens)
            record.num_output_tokens = self._usage.get("completion_tokens", record.num_output_tokens)
        if answer is not None and answer.is_cut_off and record.error is None:
            record.error, record.finish_reason = "cancelled by the client", CANCELLED
        elif record.error is None:
            record.error = self._what_is_missing()
            if record.error is None and record.finish_reason is None:
                record.finish_reason = "length" if record.num_output_tokens >= self._request.max_tokens else "stop"

    def _what_is_missing(self) -> str | None:
        """KsanaLLM's nodes, and proxies whose upstream died, just end the stream: count before calling it complete."""
        num_tokens, asked = self._record.num_output_tokens, self._request.max_tokens
        if not self._record.token_times_s:
            return "the answer ended without a token"
        if self._expects_all and num_tokens < asked:
            return f"the answer ended after {num_tokens} of {asked} tokens"
        if not self._is_generate and self._record.finish_reason is None:
            return f"the answer ended after {num_tokens} tokens without a finish_reason"
        return None

    def _parse(self, pieces: list[tuple[float, bytes]]) -> None:
        take = self._generate_message if self._is_generate else self._openai_line
        for at_s, piece in pieces:
            *messages, self._rest = (self._rest + piece).split(self._end)
            for message in messages:
                take(at_s, message.strip())

    def _generate_message(self, at_s: float, message: bytes) -> None:
        """Cumulative: each message holds the whole output so far."""
        if not message or message == b"[DONE]":
            return
        body = _json_object(message)
        if "output_token_ids" not in body:
            self._record.error = self._record.error or f"in the stream: {_error_message(message.decode('utf-8', 'replace'))}"
            return
        ids = body["output_token_ids"][0] if body["output_token_ids"] else []
        self._stamp(at_s, len(ids) - self._record.num_output_tokens)
        self._record.num_output_tokens = len(ids)
        self._record.output_token_ids = ids
        self._record.text = (body.get("texts") or [None])[0]

    def _openai_line(self, at_s: float, line: bytes) -> None:
        data = line[5:].strip() if line.startswith(b"data:") else b""
        if not data or data == b"[DONE]":
            return
        body = _json_object(data)
        if "choices" not in body:
            self._record.error = self._record.error or f"in the stream: {_error_message(data.decode('utf-8', 'replace'))}"
            return
        usage = body.get("usage") or {}
        counted = usage.get("completion_tokens", 0) - self._usage.get("completion_tokens", 0)
        self._usage = usage or self._usage
        for choice in body["choices"]:
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            self._record.finish_reason = choice.get("finish_reason") or self._record.finish_reason
            token_ids = choice.get("token_ids") or []  # where extra_body asked for them: {"return_token_ids": true}
            if text or token_ids or (usage and counted > 0):
                self._texts.append(text)
                if token_ids:
                    self._record.output_token_ids = (self._record.output_token_ids or []) + token_ids
                # A server that does not count along: one token a message.
                num_tokens = len(token_ids) or (counted if usage and counted > 0 else 1)
                self._stamp(at_s, num_tokens)
                self._record.num_output_tokens += num_tokens

    def _stamp(self, at_s: float, num_tokens: int) -> None:
        if num_tokens > 0:
            self._record.token_times_s.append(at_s)
            self._record.token_counts.append(num_tokens)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _error_message(text: str) -> str:
    """The message inside OpenAI's ``{"error": {"message"}}`` or FastAPI's ``{"detail"}``, else the text itself."""
    body = _json_object(text.encode())
    error = body.get("error") or body.get("detail") or body.get("message") or text
    if isinstance(error, dict):
        error = f"{error.get('type', 'error')}: {error.get('message', error)}"
    return str(error)[:500].strip() or "empty body"
