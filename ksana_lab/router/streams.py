"""Cuts upstream byte streams into whole objects, and knows how each kind of stream shows an error and its end. Pure; no sockets.

KsanaLLM's ``/generate`` sends JSON objects, each ended by a NUL byte; the OpenAI routes send server-sent events, ended by an empty line.
A stream's pieces, joined, are the stream byte for byte, save that empty NUL-objects are dropped as the reference drops them."""

from __future__ import annotations

from typing import Any

import orjson

MAX_OBJECT_BYTES = 64 << 20


class ObjectTooLarge(ValueError):
    """A node sent this much without ending an object."""


class Framing:
    """One stream's framing. ``feed`` gives the pieces that became whole; ``rest`` what an ending stream left unfinished."""

    done = b""  # what the client is sent after the last object

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        raise NotImplementedError

    def rest(self) -> bytes:
        return bytes(self._held)

    def error_event(self, error: dict[str, Any]) -> bytes | None:
        """The bytes that tell a client inside the stream; None: this kind of stream cannot say it, so it must be cut off."""
        raise NotImplementedError

    def _hold(self, data: bytes) -> None:
        if len(self._held) + len(data) > MAX_OBJECT_BYTES:
            raise ObjectTooLarge(f"an object of more than {MAX_OBJECT_BYTES >> 20} MiB")
        self._held += data


class NulFraming(Framing):
    """``/generate``: one piece per object, with its NUL."""

    done = b"[DONE]\0"

    def feed(self, data: bytes) -> list[bytes]:
        if not self._held and data.find(b"\0") == len(data) - 1 > 0:  # exactly one whole object: the usual case
            return [data]
        whole, nul, tail = data.rpartition(b"\0")
        if nul:
            whole = bytes(self._held) + whole
            self._held.clear()
        self._hold(tail)
        return [part + b"\0" for part in whole.split(b"\0") if part] if nul else []

    def error_event(self, error: dict[str, Any]) -> bytes | None:
        return orjson.dumps(error) + b"\0"


class SseFraming(Framing):
    """Server-sent events: a piece is one or more whole events."""

    def feed(self, data: bytes) -> list[bytes]:
        if not self._held and data.endswith(b"\n\n"):
            return [data]
        searched = max(0, len(self._held) - 3)  # an empty line may lie across the seam
        self._hold(data)
        lf, crlf = self._held.rfind(b"\n\n", searched), self._held.rfind(b"\r\n\r\n", searched)
        end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if not end:
            return []
        piece = bytes(self._held[:end])
        del self._held[:end]
        return [piece]

    def error_event(self, error: dict[str, Any]) -> bytes | None:
        return b"data: " + orjson.dumps(error) + b"\n\n"


class RawFraming(Framing):
    """A chunked body of a kind we do not know: passed on as it comes."""

    def feed(self, data: bytes) -> list[bytes]:
        return [data]

    def error_event(self, error: dict[str, Any]) -> bytes | None:
        return None


def framing_of(path: str, content_type: str, is_chunked: bool) -> type[Framing] | None:
    """How a node's reply is framed, from its headers; None: it is no stream. KsanaLLM's ``/generate`` streams carry no content type."""
    if content_type.startswith("text/event-stream"):
        return SseFraming
    if not is_chunked or content_type.startswith("application/json"):
        return None
    return NulFraming if path == "/generate" else RawFraming


def error_in(piece: bytes) -> dict[str, Any] | None:
    """The error that a piece carries, as ``{"message": …, "type"?, "code"?}``; None for a piece that is no error."""
    if b'"error"' not in piece and b'"detail"' not in piece:
        return None
    is_object = piece.lstrip().startswith(b"{")
    for text in [piece.strip(b"\0")] if is_object else piece.splitlines():
        try:
            fields = orjson.loads(text.removeprefix(b"data:").strip())
        except orjson.JSONDecodeError:
            continue
        if not isinstance(fields, dict) or "choices" in fields or "texts" in fields:
            continue
        error = fields.get("error") or fields.get("detail")
        if error:
            return error if isinstance(error, dict) else {"message": str(error)}
    return None
