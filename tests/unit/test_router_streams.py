"""Whole objects come out, wherever the network cut the bytes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksana_lab.router import streams
from ksana_lab.router.streams import NulFraming, ObjectTooLarge, RawFraming, SseFraming, error_in, framing_of


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({i % (len(data) + 1) for i in at}), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


def fed(framing: streams.Framing, chunks: list[bytes]) -> list[bytes]:
    return [piece for chunk in chunks for piece in framing.feed(chunk)]


OBJECTS = st.lists(st.binary(min_size=1, max_size=12).filter(lambda b: b"\0" not in b), max_size=6)
CUTS = st.lists(st.integers(0, 200), max_size=12)
LINES = st.text(alphabet='ab: {}"', min_size=1, max_size=8).map(str.encode)
EVENTS = st.lists(st.tuples(st.lists(LINES, min_size=1, max_size=3), st.sampled_from([b"\n", b"\r\n"])), max_size=6)


@given(OBJECTS, CUTS)
def test_nul_objects_come_whole_and_single_however_they_were_cut(objects, at):
    data = b"".join(o + b"\0" for o in objects)
    assert fed(NulFraming(), cut(data, at)) == [o + b"\0" for o in objects]


@given(EVENTS, CUTS)
def test_sse_pieces_are_whole_events_and_lose_no_byte(events, at):
    data = b"".join(end.join(lines) + end + end for lines, end in events)
    framing = SseFraming()
    pieces = fed(framing, cut(data, at))
    assert b"".join(pieces) == data and framing.rest() == b""
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n")) for piece in pieces)


def test_every_single_cut_of_a_stream_gives_the_same_objects():
    data = b'{"a":1}\0{"b":2}\0'
    for i in range(len(data) + 1):
        assert fed(NulFraming(), [data[:i], data[i:]]) == [b'{"a":1}\0', b'{"b":2}\0']


def test_an_event_is_not_forwarded_before_it_is_whole():
    framing = SseFraming()
    assert framing.feed(b"data: 1\n\ndata: 2\n") == [b"data: 1\n\n"]
    assert framing.feed(b"\nda") == [b"data: 2\n\n"]
    assert framing.rest() == b"da"


def test_empty_nul_objects_are_dropped():
    assert NulFraming().feed(b"\0a\0\0b\0") == [b"a\0", b"b\0"]


def test_an_object_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(streams, "MAX_OBJECT_BYTES", 8)
    framing = NulFraming()
    framing.feed(b"12345")
    with pytest.raises(ObjectTooLarge):
        framing.feed(b"6789")


@pytest.mark.parametrize(
    ("path", "content_type", "is_chunked", "framing"),
    [
        ("/v1/completions", "text/event-stream; charset=utf-8", True, SseFraming),
        ("/generate", "", True, NulFraming),  # as KsanaLLM's nodes answer
        ("/generate", "application/octet-stream", True, NulFraming),
        ("/generate", "application/json", False, None),
        ("/generate", "application/json", True, None),
        ("/v1/audio", "audio/wav", True, RawFraming),
    ],
)
def test_the_reply_headers_tell_the_framing(path, content_type, is_chunked, framing):
    assert framing_of(path, content_type, is_chunked) is framing


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (b'data: {"error": {"message": "no"}}\n\n', "no"),
        (b'{"detail": "no"}\0', "no"),
        (b'{"error": "no"}\0', "no"),
        (b'data: {"choices": [{"text": "an \\"error\\""}], "error": null}\n\n', None),
        (b'{"texts": ["\\"error\\""]}\0', None),
        (b"data: [DONE]\n\n", None),
        (b'not json "error"\0', None),
    ],
)
def test_errors_inside_streams_are_seen(piece, message):
    error = error_in(piece)
    assert (error and error["message"]) == message


def test_an_error_event_has_its_streams_form():
    error = {"error": {"message": "no"}}
    assert json.loads(NulFraming().error_event(error).removesuffix(b"\0")) == error
    assert json.loads(SseFraming().error_event(error).removeprefix(b"data: ")) == error
    assert RawFraming().error_event(error) is None
