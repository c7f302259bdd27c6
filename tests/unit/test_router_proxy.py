"""The token path over real sockets: what nodes are sent, how their streams are merged, and every way in which one side can fail."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from asyncio import Event, wait_for
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict
from router_stubs import (
    ACK,
    SSE,
    StubNode,
    event,
    hang,
    json_reply,
    obj,
    one_pair,
    running_router,
    stream,
    stub_nodes,
)

from ksana_lab.router import exchange as exchange_module
from ksana_lab.router.exchange import Client, Exchange
from ksana_lab.types import Role

BOUND_S = 10.0
DONE = b"data: [DONE]\n\n"


async def read(response: aiohttp.ClientResponse) -> bytes:
    return await wait_for(response.read(), BOUND_S)


async def ask(router, path: str, **options) -> tuple[int, bytes]:
    response = await wait_for(router.post(path, {"prompt": "x"}, **options), BOUND_S)
    return response.status, await read(response)


def assert_idle(router) -> None:
    assert router.router.proxy.num_requests == 0
    assert all((node.num_requests, node.num_tokens) == (0, 0) for node in router.router.registry)


# ---- what the nodes are sent -----------------------------------------------------------------------------------------


async def test_both_nodes_get_the_same_bytes_query_and_client_headers():
    body = b'{"prompt":  "x\\u00e9", "n": 1e0}'
    headers = {
        "Authorization": "Bearer k",
        "traceparent": "00-1",
        "X-Request-Id": "mine",
        "kv-comm-request-id": "9",
        "Connection": "X-Hop",
        "X-Hop": "1",
    }
    async with one_pair(json_reply(200, {}), json_reply(200, {})) as (router, p, d):
        response = await router.post("/v1/completions?a=%20b&c", body, headers=headers)
        assert p.bodies == d.bodies == [body] and p.requests[0].raw_path == "/v1/completions?a=%20b&c"
        sent = p.requests[0].headers
        assert dict(sent) | {"Host": ""} == dict(d.requests[0].headers) | {"Host": ""}
        assert (sent["authorization"], sent["traceparent"], sent["x-request-id"]) == ("Bearer k", "00-1", "mine")
        assert "x-hop" not in sent and response.headers["x-request-id"] == "mine"
        assert sent["kv-comm-group-key"] == f"{p.addr}__{d.addr}" and sent["x-ksana-lab-first-token"] == "prefill"
        assert sent["x-ksana-lab-created"].isdecimal() and sent.getall("kv-comm-request-id") == ["1"]


async def test_a_request_id_is_made_once_and_comm_request_ids_differ():
    async with one_pair(json_reply(200, {}), json_reply(200, {})) as (router, p, d):
        responses = [await router.post("/generate") for _ in range(3)]
        ids = [r.headers["x-request-id"] for r in responses]
        assert ids == [q.headers["x-request-id"] for q in p.requests] == [q.headers["x-request-id"] for q in d.requests]
        assert len(set(ids)) == len({q.headers["kv-comm-request-id"] for q in p.requests}) == 3


async def test_a_request_id_that_nodes_would_not_take_is_replaced_for_both():
    async with one_pair(json_reply(200, {}), json_reply(200, {})) as (router, p, d):
        await router.call("/generate", headers={"x-request-id": "x" * 200})
        assert p.requests[0].headers["x-request-id"] == d.requests[0].headers["x-request-id"] != "x" * 200


async def test_a_mixed_node_gets_no_pair_headers_and_ends_generate_streams_alike():
    node = StubNode("mixed", stream(obj(65), obj(65, 66)))
    async with stub_nodes(node), running_router() as router:
        await router.add(node, coordinator_addr=None)
        assert await ask(router, "/generate") == (200, obj(65) + obj(65, 66) + b"[DONE]\0")
        assert not {"kv-comm-group-key", "kv-comm-request-id", "x-ksana-lab-first-token"} & {h.lower() for h in node.requests[0].headers}
        assert_idle(router)


async def test_a_connection_to_a_node_is_probed_while_it_says_nothing():
    """A node may live and beat while its end of a connection is gone without a word."""
    node = StubNode("mixed", stream(obj(65), "hang"))
    async with stub_nodes(node), running_router(heartbeat_timeout_s=40.0) as router:
        async with router.router.proxy.session.post(f"http://{node.addr}/generate", data=b"{}") as response:
            sock = response.connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10  # and three probes: 40 s of silence


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ack", [{}, ACK])
async def test_generate_shows_prefills_token_at_once_then_decodes_objects(ack):
    go = Event()
    first = obj(65)
    async with one_pair(stream(first[:3], first[3:]), stream(go, obj(65, 66), obj(65, 66, 67), headers=ack)) as (router, _p, _d):
        response = await router.post("/generate")
        assert await wait_for(response.content.readuntil(b"\0"), BOUND_S) == first
        go.set()
        assert await read(response) == obj(65, 66) + obj(65, 66, 67) + b"[DONE]\0"
        assert response.headers["content-type"] == "application/octet-stream"
        assert_idle(router)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_wherever_the_network_cuts_the_client_gets_the_same(path):
    is_sse = path != "/generate"
    first, rest = (event("a"), event("b") + DONE) if is_sse else (obj(65), obj(65, 66) + obj(65, 66, 67))
    headers = SSE if is_sse else {}
    async with one_pair(hang(), hang()) as (router, p, d):
        for i in range(1, len(rest), 3):  # every single cut: test_router_streams
            p.handler = stream(first[: i % len(first)], first[i % len(first) :], headers=headers)
            d.handler = stream(rest[:i], rest[i:], headers=headers | ACK)
            assert await ask(router, path) == (200, first + rest + (b"" if is_sse else b"[DONE]\0"))


async def test_generate_leaves_out_prefills_object_when_decode_was_faster():
    go, end = Event(), Event()
    async with one_pair(stream(go, obj(65)), stream(obj(65, 66), end, obj(65, 66, 67))) as (router, p, _d):
        response = await router.post("/generate")
        assert await wait_for(response.content.readuntil(b"\0"), BOUND_S) == obj(65, 66)
        go.set()
        while router.router.registry.get(p.node_id).num_requests:  # until the router has read it
            await asyncio.sleep(0)
        end.set()
        assert await read(response) == obj(65, 66, 67) + b"[DONE]\0"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_decode_that_acknowledges_waits_for_prefills_first_token(path):
    go = Event()
    is_sse = path != "/generate"
    first, second = (event("a"), event("b") + DONE) if is_sse else (obj(65), obj(65, 66))
    headers = SSE if is_sse else {}
    async with one_pair(stream(go, first, headers=headers), stream(second, headers=headers | ACK)) as (router, _p, d):
        response = asyncio.create_task(ask(router, path))
        await wait_for(d.asked.wait(), BOUND_S)
        go.set()
        assert await response == (200, first + second + (b"" if is_sse else b"[DONE]\0"))


async def test_a_first_token_that_was_the_last_still_ends_the_stream():
    go = Event()
    async with one_pair(stream(go, obj(65)), stream(headers=ACK)) as (router, _p, d):
        asked = asyncio.create_task(ask(router, "/generate"))
        await wait_for(d.answered.wait(), BOUND_S)
        await router.nodes()  # decode's end is read by now
        go.set()
        assert await asked == (200, obj(65) + b"[DONE]\0")


async def test_sse_without_acknowledgement_is_decodes_stream_untouched():
    chunks = [b": ping\r\n\r\nda", b'ta: {"choices": []}\n', b"\n", DONE]
    async with one_pair(stream(event("a"), headers=SSE), stream(*chunks, headers=SSE)) as (router, _p, _d):
        response = await router.post("/v1/chat/completions")
        assert await read(response) == b"".join(chunks)
        assert response.headers["content-type"] == "text/event-stream" and "x-ksana-lab-first-token" not in response.headers


async def test_sse_with_acknowledgement_shows_prefills_events_at_once():
    go = Event()
    role, first = event(""), event("a")
    p_stream = stream(role, first[:5], first[5:], headers=SSE)
    async with one_pair(p_stream, stream(go, event("b"), DONE, headers=SSE | ACK)) as (router, _p, _d):
        response = await router.post("/v1/chat/completions")
        got = await wait_for(response.content.readexactly(len(role + first)), BOUND_S)
        go.set()
        assert got + await read(response) == role + first + event("b") + DONE
        assert "x-ksana-lab-first-token" not in response.headers


async def test_non_streaming_replies_are_decodes():
    async with one_pair(json_reply(200, {"p": 1}), json_reply(200, {"d": 1}, {"X-Mine": "1"})) as (router, _p, _d):
        response = await router.post("/v1/completions")
        assert (response.status, await response.json(), response.headers["x-mine"]) == (200, {"d": 1}, "1")
        assert_idle(router)


async def test_an_unknown_chunked_body_is_passed_through():
    audio = {"content-type": "audio/wav"}
    async with one_pair(stream(b"p", headers=audio), stream(b"a\0", b"b", headers=audio)) as (router, _p, _d):
        assert await ask(router, "/v1/audio") == (200, b"a\0b")


# ---- failures of one side --------------------------------------------------------------------------------------------

BAD = {"error": {"message": "too long", "type": "context_length_exceeded", "code": 400}}


@pytest.mark.parametrize("other", [hang(), stream("hang"), stream("hang", headers=SSE | ACK)])
@pytest.mark.parametrize("bad_side", ["prefill", "decode"])
async def test_an_error_answer_of_one_side_is_returned_and_ends_the_other(bad_side, other):
    handlers = {"prefill": other, "decode": other, bad_side: json_reply(400, BAD)}
    async with one_pair(**handlers) as (router, p, d):
        response = await wait_for(router.post("/v1/completions"), BOUND_S)
        assert (response.status, await response.json()) == (400, BAD)
        bad, good = (p, d) if bad_side == "prefill" else (d, p)
        assert response.headers["x-ksana-lab-failed-node"] == f"{bad_side} {bad.addr}"
        await wait_for(good.gone.wait(), BOUND_S)
        assert 'outcome="rejected"' in await (await router.session.get(router.url + "/metrics")).text()
        assert_idle(router)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_nodes_redirect_does_not_lead_the_client_past_the_router(side):
    elsewhere = json_reply(307, {}, {"location": "http://10.0.0.9:8067/v1/completions"})
    async with one_pair(**{"prefill": hang(), "decode": hang(), side: elsewhere}) as (router, _p, _d):
        response = await wait_for(router.post("/v1/completions/", allow_redirects=False), BOUND_S)
        error = (await response.json())["error"]
        assert response.status == 502 and "location" not in response.headers
        assert error["side"] == side and "answered 307, a redirect, which would lead past the router" in error["message"]


BLAME = {"error": {"message": "the decode node gave it up", "type": "transfer_failed", "code": 502}}
FULL = {"error": {"message": "full", "type": "queue_full", "code": 429}}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_node_that_blames_the_other_does_not_speak_for_it(is_stream):
    blamed = Event()

    async def full(request):
        await blamed.wait()
        return web.json_response(FULL, status=429)

    blame, decode = json_reply(502, BLAME), full
    if is_stream:
        said = [b"data: " + json.dumps(error).encode() + b"\n\n" for error in (BLAME, FULL)]
        blame, decode = stream(said[0], headers=SSE), stream(blamed, said[1], headers=SSE | ACK)
    async with one_pair(blame, decode) as (router, p, _d):
        asked = asyncio.create_task(router.post("/v1/completions"))
        await wait_for(p.answered.wait(), BOUND_S)
        asyncio.get_running_loop().call_later(0.02, blamed.set)
        response = await wait_for(asked, BOUND_S)
        assert (response.status, (await response.json())["error"]["type"]) == (429, "queue_full")


async def test_a_node_that_blames_a_silent_one_is_believed():
    async with one_pair(json_reply(502, BLAME), hang()) as (router, _p, d):
        response = await wait_for(router.post("/v1/completions"), BOUND_S)
        assert (response.status, await response.json()) == (502, BLAME)
        await wait_for(d.gone.wait(), BOUND_S)


@pytest.mark.parametrize(
    ("prefill", "decode", "side", "says"),
    [
        (stream("abort"), stream("hang"), "prefill", "closed the connection in the middle"),
        (stream(obj(65)[:4], "abort"), stream("hang"), "prefill", "closed the connection in the middle"),
        (stream(), stream("hang"), "prefill", "without a token"),
        (stream("hang"), stream("abort"), "decode", "closed the connection in the middle"),
        (stream("hang"), stream(), "decode", "without a token"),
        (stream("hang"), stream(b'{"error": {"message": "no blocks"}}\0'), "decode", "no blocks"),
        (stream(b'{"error": {"message": "no blocks"}}\0'), stream("hang"), "prefill", "no blocks"),
    ],
)
async def test_a_stream_that_breaks_before_its_first_token_is_a_json_error(prefill, decode, side, says):
    async with one_pair(prefill, decode) as (router, p, d):
        status, body = await ask(router, "/generate")
        error = json.loads(body)["error"]
        assert status == 502 and error["side"] == side and says in error["message"]
        await wait_for((d if side == "prefill" else p).gone.wait(), BOUND_S)
        assert_idle(router)


async def test_a_nodes_own_status_inside_a_stream_becomes_the_answers():
    late = b'data: {"error": {"message": "waited too long", "type": "timeout", "code": 504}}\n\n'
    async with one_pair(stream(late, headers=SSE), stream("hang", headers=SSE | ACK)) as (router, _p, _d):
        status, body = await ask(router, "/v1/completions")
        assert status == 504 and json.loads(body)["error"]["type"] == "timeout"


@pytest.mark.parametrize(
    ("path", "prefill", "decode", "shown"),
    [
        ("/generate", stream(obj(65)), stream(obj(65, 66), b'{"tex', "abort"), obj(65) + obj(65, 66)),
        ("/generate", stream(obj(65)), stream("abort"), None),
        (
            "/v1/completions",
            stream(event("a"), headers=SSE),
            stream(event("b"), b"data: ", "abort", headers=SSE | ACK),
            event("a") + event("b"),
        ),
    ],
)
async def test_a_stream_that_breaks_later_ends_with_an_error_event_that_names_the_side(path, prefill, decode, shown):
    async with one_pair(prefill, decode) as (router, _p, _d):
        _, body = await ask(router, path)
        if shown is not None:
            assert body.startswith(shown)
            body = body[len(shown) :]
        last = body.strip(b"\0\n").rpartition(b"\0")[2].removeprefix(b"data: ")
        assert json.loads(last)["error"]["side"] == "decode" and b"[DONE]" not in body
        assert_idle(router)


async def test_prefill_dying_after_decode_began_does_no_harm():
    go, seen = Event(), Event()
    async with one_pair(stream(obj(65), go, "abort"), stream(obj(65, 66), seen, obj(65, 66, 67))) as (router, p, _d):
        response = await router.post("/generate")
        while await wait_for(response.content.readuntil(b"\0"), BOUND_S) != obj(65, 66):
            pass
        go.set()
        await wait_for(p.gone.wait(), BOUND_S)
        seen.set()
        assert await read(response) == obj(65, 66, 67) + b"[DONE]\0"


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_silent_node_is_waited_for_no_longer_than_the_read_timeout(side):
    handlers = {"prefill": stream(obj(65)), "decode": stream(obj(65, 66)), side: hang()}
    async with one_pair(**handlers, read_timeout_s=0.2) as (router, p, d):
        status, body = await ask(router, "/generate")
        error = json.loads(body)["error"]
        assert status == 504 and error["side"] == side and "the router's read_timeout_s" in error["message"]
        await wait_for((p if side == "prefill" else d).gone.wait(), BOUND_S)


async def test_a_reply_in_one_piece_is_waited_for_while_its_node_lives():
    go = Event()

    async def late(request):
        await go.wait()
        return web.json_response({"d": 1})

    async with one_pair(json_reply(200, {}), late) as (router, _p, d):
        asked = asyncio.create_task(ask(router, "/v1/completions"))
        await wait_for(d.asked.wait(), BOUND_S)
        (exchange,) = router.router.proxy._exchanges
        exchange.check(time.monotonic() + 3000, 600, 3600, lambda node, silent_s: None)
        go.set()
        assert await asked == (200, b'{"d": 1}')


async def test_no_reply_is_waited_for_longer_than_the_reply_timeout():
    async with one_pair(json_reply(200, {}), hang(), reply_timeout_s=0.2) as (router, _p, d):
        status, body = await ask(router, "/v1/completions")
        error = json.loads(body)["error"]
        assert status == 504 and error["side"] == "decode" and "the router's reply_timeout_s" in error["message"]
        await wait_for(d.gone.wait(), BOUND_S)


async def test_a_node_that_stops_its_heartbeats_is_not_waited_for():
    async with one_pair(stream(obj(65)), stream("hang"), heartbeat_timeout_s=0.3) as (router, _p, d):
        _, body = await ask(router, "/generate")
        assert b"sends no heartbeats" in body and d.addr.encode() in body


async def test_a_node_that_restarts_takes_its_requests_with_it():
    async with one_pair(stream("hang"), stream("hang"), heartbeat_timeout_s=1) as (router, _p, d):
        asked = asyncio.create_task(ask(router, "/generate"))
        await wait_for(d.asked.wait(), BOUND_S)
        await router.add(d, incarnation="2")
        status, body = await asked
        assert status == 502 and json.loads(body)["error"]["side"] == "decode"


# ---- nobody to connect to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead_side", ["prefill", "decode"])
async def test_a_refused_connection_of_the_only_pair_names_the_side(dead_side):
    async with one_pair(hang(), hang()) as (router, p, d):
        dead = p if dead_side == "prefill" else d
        await dead.stop()
        status, body = await ask(router, "/generate")
        error = json.loads(body)["error"]
        assert status == 502 and (error["side"], error["node"]) == (dead_side, dead.addr) and "cannot connect" in error["message"]
        assert_idle(router)


async def test_a_refused_connection_is_tried_once_more_elsewhere():
    dead, p, d = StubNode("prefill", hang()), StubNode("prefill", json_reply(200, {})), StubNode("decode", json_reply(200, {"d": 1}))
    async with stub_nodes(dead, p, d), running_router(policy="round_robin") as router:
        for node in (dead, p, d):
            await router.add(node)
        keys = [await router.connect(prefill, d) for prefill in (dead, p)]
        await router.beat(d, connected=keys)
        await dead.stop()
        assert await ask(router, "/generate") == (200, b'{"d": 1}')
        assert await ask(router, "/generate") == (200, b'{"d": 1}')  # the dead one is avoided now
        text = await (await router.session.get(router.url + "/metrics")).text()
        assert "ksana_lab_router_retries_total 1.0" in text and len(p.requests) == 2
        assert_idle(router)


async def test_there_is_no_third_attempt():
    nodes = [StubNode("mixed", hang()) for _ in range(3)]
    async with stub_nodes(*nodes), running_router() as router:
        for node in nodes:
            await router.add(node)
            await node.stop()
        assert (await ask(router, "/generate"))[0] == 502
        assert sum(node.is_suspect for node in router.router.registry) == 2


async def test_nothing_is_tried_again_once_a_node_has_answered():
    a, b = StubNode("mixed", stream("abort")), StubNode("mixed", stream("abort"))
    async with stub_nodes(a, b), running_router() as router:
        await router.add(a)
        await router.add(b)
        assert (await ask(router, "/generate"))[0] == 502
        assert len(a.requests) + len(b.requests) == 1


async def test_no_pair_is_a_503_with_its_reason_and_retry_after():
    p, d = StubNode("prefill", hang()), StubNode("decode", hang())
    async with stub_nodes(p, d), running_router() as router:
        assert b"no prefill and no decode node is registered" in (await ask(router, "/generate"))[1]
        await router.add(p)
        await router.add(d)
        response = await router.post("/generate")
        assert response.status == 503 and response.headers["retry-after"] == "1"
        assert "no comm id is registered for the pair" in (await response.json())["detail"]


async def test_a_body_beyond_the_limit_is_refused():
    async with one_pair(hang(), hang(), max_body_bytes=1024) as (router, p, _d):
        response = await router.post("/generate", b"x" * 2000)
        assert response.status == 413 and not p.requests


# ---- the client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before any answer", "before the first token", "after it"])
async def test_a_client_that_goes_away_takes_both_requests_with_it(when):
    reply = {"before any answer": hang(), "before the first token": stream("hang"), "after it": stream(obj(65), "hang")}[when]
    async with one_pair(reply, reply) as (router, p, d):
        asked = asyncio.create_task(router.post("/generate"))
        await wait_for(asyncio.gather(p.asked.wait(), d.asked.wait()), BOUND_S)
        if when == "after it":
            response = await asked
            await wait_for(response.content.readuntil(b"\0"), BOUND_S)
            response.close()
        else:
            asked.cancel()
        await wait_for(asyncio.gather(p.gone.wait(), d.gone.wait()), BOUND_S)
        text = await (await router.session.get(router.url + "/metrics")).text()
        assert 'outcome="client_gone",route="/generate"} 1.0' in text
        assert_idle(router)


@pytest.mark.parametrize("reason", ["the client left", "prefill refused"])
async def test_decode_hears_of_a_request_that_prefill_has_heard_of(reason, monkeypatch):
    """Prefill may keep a finished prompt for decode, and only decode can tell it that nobody wants it."""
    prefill = json_reply(429, {"error": {"message": "full"}}) if reason == "prefill refused" else hang()
    async with one_pair(prefill, hang()) as (router, p, d):
        router_side, given_up = router.router.proxy.session.connector, Event()
        connect = router_side.connect

        async def connect_late(request, *args, **options):
            if request.url.authority == d.addr:
                await given_up.wait()
            return await connect(request, *args, **options)

        monkeypatch.setattr(router_side, "connect", connect_late)
        asked = asyncio.create_task(router.post("/generate"))
        await wait_for(p.asked.wait(), BOUND_S)
        if reason == "the client left":
            asked.cancel()
            await wait_for(p.gone.wait(), BOUND_S)
        else:
            await wait_for(p.answered.wait(), BOUND_S)
        given_up.set()
        await wait_for(d.gone.wait(), BOUND_S)
        await asyncio.gather(asked, return_exceptions=True)
        assert d.bodies == p.bodies
        assert_idle(router)


async def test_a_side_that_is_given_up_while_it_waits_does_not_trip_the_other(caplog):
    """Prefill waits for decode's status line when the client leaves; decode's comes while its request is still being delivered."""
    over = Event()

    async def reply(request):
        await over.wait()
        return web.json_response({})

    async with one_pair(stream("hang"), reply) as (router, _p, d):
        node = {leg.role: leg for leg in router.router.registry}
        route = SimpleNamespace(prefill=node[Role.PREFILL], decode=node[Role.DECODE])
        exchange = Exchange(router.router.proxy.session, Client(None, None, b"1"), route, "/generate", b"{}", CIMultiDict())
        waiting = asyncio.create_task(exchange._hold(exchange._prefill, exchange._decode_head))
        decode = asyncio.create_task(exchange._guard(exchange._decode, exchange._run_decode))
        await wait_for(d.asked.wait(), BOUND_S)
        waiting.cancel()
        over.set()
        await asyncio.wait([waiting])
        exchange.client.reply = lambda *answer: asyncio.sleep(0)
        await wait_for(decode, BOUND_S)
    assert exchange._over.result() is None and "InvalidStateError" not in caplog.text


def served(router, send=None):
    """The proxy as the server calls it, for a client that asks and stays."""
    messages = iter([{"type": "http.request", "body": b"{}"}])

    async def receive():
        return next(messages, None) or await Event().wait()

    return router.router.proxy({"type": "http", "method": "POST", "path": "/generate", "headers": []}, receive, send)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [(json_reply(200, {}), hang()), (stream(obj(65)), stream(obj(65, 66), "abort"))],
    ids=["before the answer", "inside the stream"],
)
async def test_a_client_that_does_not_take_its_error_is_counted_all_the_same(prefill, decode, monkeypatch):
    monkeypatch.setattr(exchange_module, "TELL_S", 0.05)

    async def send(message):
        if message.get("status", 200) >= 500 or b"error" in message.get("body", b""):
            await Event().wait()

    async with one_pair(prefill, decode, reply_timeout_s=0.2) as (router, _p, _d):
        await wait_for(served(router, send), BOUND_S)
        assert b'outcome="decode_failed",route="/generate"} 1.0' in router.router.telemetry.exposition()
        assert_idle(router)


async def test_a_request_that_the_server_cancels_is_counted():
    async with one_pair(hang(), hang()) as (router, _p, d):
        serving = asyncio.create_task(served(router))
        await wait_for(d.asked.wait(), BOUND_S)
        serving.cancel()
        await asyncio.wait([serving])
        assert b'outcome="cancelled",route="/generate"} 1.0' in router.router.telemetry.exposition()
        assert_idle(router)


async def test_a_client_that_reads_nothing_is_given_up():
    big = b'{"texts": ["' + b"x" * (1 << 20) + b'"]}\0'
    flood = stream(*[big] * 40, "hang")
    async with one_pair(stream(obj(65)), flood, read_timeout_s=0.3) as (router, _p, d):
        host, port = router.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        await wait_for(d.gone.wait(), BOUND_S)
        writer.transport.abort()
