"""Every way a request can end badly: the client leaves, the engine dies or falls silent, the queue is full, the node shuts down."""

import asyncio

import pytest
from server_fakes import node_config, parse_events, running_node, write_tokenizer

from ksana_lab.protocol.engine import AbortRequest, AddRequest, EngineFailed, SequenceUpdate, Shutdown, StepUpdates
from ksana_lab.server import engine_client
from ksana_lab.server.app import serve
from ksana_lab.types import FinishReason

COMPLETIONS = "/v1/completions"
BODY = {"prompt": [1], "max_tokens": 100}


@pytest.fixture
async def node(tmp_path):
    async with running_node(tmp_path, paused=True) as node:
        yield node


async def outcome(node, name):
    """The count of requests that ended as ``name``."""
    for line in (await node.client.get("/metrics")).text.splitlines():
        if line.startswith("ksana_lab_requests_total{") and f'outcome="{name}"' in line:
            return float(line.rsplit(" ", 1)[1])
    return 0.0


# ---- the client leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_before", [0, 1, 3])
async def test_leaving_a_stream_aborts_the_sequence(node, tokens_before):
    async with node.client.stream("POST", COMPLETIONS, json={**BODY, "stream": True}) as response:
        await node.engine.wait_for(AddRequest)
        lines = response.aiter_lines()
        for _ in range(tokens_before):
            node.engine.step()
            assert (await anext(lines)).startswith("data:") and await anext(lines) == ""
    (abort,) = await node.engine.wait_for(AbortRequest)
    assert abort.reason == "client disconnected"
    assert await outcome(node, "aborted") == 1


async def test_leaving_a_plain_request_aborts_every_sequence(node):
    request = asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "n": 3}))
    await node.engine.wait_for(AddRequest, 3)
    request.cancel()
    aborts = await node.engine.wait_for(AbortRequest, 3)
    assert {a.request_id for a in aborts} == {a.request_id for a in node.engine.of(AddRequest)}


async def test_leaving_in_the_middle_of_the_body_reaches_no_engine(node):
    host, port = node.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with asyncio_deadline(10):
        while await outcome(node, "aborted") != 1:
            await asyncio.sleep(0)
    assert not node.engine.of(AddRequest)


async def test_a_client_that_stops_reading_is_given_up(node):
    """As uvicorn shows it: ``send`` does not return while the client's window is full."""
    route = node.server._generating[COMPLETIONS]
    route._stalls._timeout_s = 0.2
    messages = iter([{"type": "http.request", "body": b'{"prompt": [1], "max_tokens": 9, "stream": true}'}])

    async def receive():
        return next(messages, None) or await asyncio.Future()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Future()

    request = asyncio.create_task(route({"headers": [], "path": COMPLETIONS}, receive, send))
    await node.engine.wait_for(AddRequest)
    node.engine.step()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(request, 10)
    await node.engine.wait_for(AbortRequest)
    assert await outcome(node, "aborted") == 1


class asyncio_deadline:
    """Fail, not hang."""

    def __init__(self, seconds):
        self._seconds = seconds

    async def __aenter__(self):
        task = asyncio.current_task()
        self._handle = asyncio.get_running_loop().call_later(self._seconds, task.cancel, "too late")

    async def __aexit__(self, *_):
        self._handle.cancel()


# ---- the engine ------------------------------------------------------------------------------------------------------


async def test_a_dead_engine_fails_streams_and_plain_requests_at_once_and_the_node_ends(node):
    plain = asyncio.create_task(node.client.post(COMPLETIONS, json=BODY))
    stream = asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "stream": True}))
    await node.engine.wait_for(AddRequest, 2)
    node.engine.step()
    node.engine.die("CUDA error: out of memory")
    answer = await asyncio.wait_for(plain, 5)
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "unavailable" and answer.headers["retry-after"]
    events = parse_events((await asyncio.wait_for(stream, 5)).text)
    assert events[-1]["error"]["code"] == 503 and "[DONE]" not in events and "choices" in events[0]
    assert await asyncio.wait_for(asyncio.shield(node.task), 10) == 1
    assert "out of memory" in node.server.engine.failure


ASSERTED = "torch.AcceleratorError: CUDA error: device-side assert triggered"
TRACEBACK = f"""Traceback (most recent call last):
  File "a.py", line 1, in run
    step()
  File "b.py", line 2, in step
    kernel()
{ASSERTED}
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (TRACEBACK, ASSERTED),
        (f"its process ended\nINFO starting\n{TRACEBACK}", f"its process ended: {ASSERTED}"),
        ("its process ended\nINFO starting", "its process ended"),
        ("EngineDead: rank 1 is gone", "EngineDead: rank 1 is gone"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_client_hears_of_a_dead_engine_in_one_line_that_says_why(failure, line):
    assert engine_client.gist_of(failure) == line


async def test_an_engine_that_says_it_failed_is_believed(node):
    request = asyncio.create_task(node.client.post("/generate", json={"input_tokens": [1]}))
    await node.engine.wait_for(AddRequest)
    node.engine.send(EngineFailed("self-check failed"))
    last = (await asyncio.wait_for(request, 5)).content.split(b"\0")[-2]
    assert b'"error"' in last and b"self-check failed" in last


def test_a_node_that_cannot_trace_is_not_started(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    config = node_config(write_tokenizer(tmp_path), runtime={"trace_dir": "/proc/x"})
    assert serve(config, "127.0.0.1", 0, f"ipc://{tmp_path}/api", lambda: None) == 2
    assert "ksana_lab.trace_dir /proc/x cannot be written" in caplog.text


async def test_a_node_that_is_loading_says_so(tmp_path):
    async with running_node(tmp_path, ready=None) as node:
        response = await node.client.post(COMPLETIONS, json=BODY)
        assert response.status_code == 503 and "loading" in response.json()["error"]["message"]
        assert (await node.client.get("/health")).status_code == 503


@pytest.mark.parametrize(
    ("finish", "type_", "status"),
    [
        (FinishReason.ERROR, "transfer_failed", 502),
        (FinishReason.ABORT, "timeout", 504),
        (FinishReason.ABORT, None, 499),
        (FinishReason.ABORT, "queue_full", 429),
        (FinishReason.ERROR, None, 500),
    ],
)
async def test_an_error_of_the_engine_has_its_status_or_ends_the_stream(node, finish, type_, status):
    for i, stream in enumerate((False, True)):
        request = asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "stream": stream, "n": 2}))
        added = (await node.engine.wait_for(AddRequest, 2 * i + 2))[-2:]
        update = SequenceUpdate(added[0].request_id, [], finish, error_type=type_, error="the peer went away")
        node.engine.send(StepUpdates([update], 0, 0))
        response = await request
        error = parse_events(response.text)[-1]["error"] if stream else response.json()["error"]
        assert error["message"] == "the peer went away" and error["code"] == status
        assert response.status_code == (200 if stream else status)
        aborts = await node.engine.wait_for(AbortRequest, i + 1)
        assert aborts[-1].request_id == added[1].request_id  # the other sample ends with it


async def test_a_silent_engine_times_a_request_out(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client, "NEWS_GRACE_S", 0.0)
    options = {"server_options": {"probe_period_s": 0.05}, "scheduler": {"waiting_timeout_s": 0.2}}
    async with running_node(tmp_path, paused=True, **options) as node:
        response = await node.client.post(COMPLETIONS, json=BODY)
        assert response.status_code == 504 and response.json()["error"]["type"] == "timeout"
        await node.engine.wait_for(AbortRequest)


# ---- admission -------------------------------------------------------------------------------------------------------


async def test_a_full_queue_is_a_429_until_something_starts(tmp_path):
    async with running_node(tmp_path, paused=True, scheduler={"max_num_waiting": 1}) as node:
        first = asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "max_tokens": 2}))
        await node.engine.wait_for(AddRequest)
        refused = await node.client.post(COMPLETIONS, json=BODY)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "queue_full"
        node.engine.step(2)
        assert (await first).status_code == 200
        node.engine.paused = False
        assert (await node.client.post(COMPLETIONS, json={**BODY, "max_tokens": 1})).status_code == 200


async def test_a_cache_smaller_than_the_model_bounds_the_prompt(tmp_path):
    from server_fakes import READY

    ready = type(READY)(**{**{f: getattr(READY, f) for f in READY.__struct_fields__}, "num_blocks": 4})
    async with running_node(tmp_path, ready=ready) as node:
        response = await node.client.post(COMPLETIONS, json={"prompt": [1] * 64})
        assert response.status_code == 400 and "KV cache holds 64" in response.json()["error"]["message"]
        assert (await node.client.post(COMPLETIONS, json={"prompt": [1] * 60, "max_tokens": 4})).status_code == 200


async def test_one_request_id_sent_twice_at_once_is_two_requests(node):
    requests = [
        asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "max_tokens": 1}, headers={"x-request-id": "same"}))
        for _ in range(2)
    ]
    added = await node.engine.wait_for(AddRequest, 2)
    assert len({a.request_id for a in added}) == 2
    node.engine.step()
    assert [(await r).json()["id"] for r in requests] == ["cmpl-same"] * 2


async def test_the_id_of_an_aborted_request_waits_for_the_engine_to_let_go(node):
    headers = {"x-request-id": "again"}
    async with node.client.stream("POST", COMPLETIONS, json={**BODY, "stream": True}, headers=headers):
        await node.engine.wait_for(AddRequest)
    await node.engine.wait_for(AbortRequest)
    second = asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "max_tokens": 1}, headers=headers))
    added = await node.engine.wait_for(AddRequest, 2)
    node.engine.send(StepUpdates([SequenceUpdate("again:0", [], FinishReason.ABORT)], 0, 0))  # late news of the first
    node.engine.step()
    assert (await second).status_code == 200 and added[1].request_id == "again#2:0"


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_shutdown_ends_streams_with_an_error_and_tells_the_engine(node):
    stream = asyncio.create_task(node.client.post(COMPLETIONS, json={**BODY, "stream": True}))
    await node.engine.wait_for(AddRequest)
    node.server.stop()
    assert "shutting down" in parse_events((await asyncio.wait_for(stream, 5)).text)[-1]["error"]["message"]
    assert await asyncio.wait_for(asyncio.shield(node.task), 10) == 0
    await node.engine.wait_for(Shutdown)


async def test_a_hundred_streams_at_once_get_their_own_tokens(node):
    from server_fakes import expected_tokens

    node.engine.paused = False
    bodies = [{"prompt": [i], "max_tokens": 20, "stream": True, "return_token_ids": True} for i in range(1, 101)]
    streams = await asyncio.gather(*(node.events(COMPLETIONS, body) for body in bodies))
    for body, events in zip(bodies, streams, strict=True):
        assert [t for e in events[:-1] for t in e["choices"][0]["token_ids"]] == expected_tokens(body["prompt"], 20)
    assert node.server.engine.num_in_flight == node.server.engine.num_unstarted == 0 and not node.server.engine._streams
