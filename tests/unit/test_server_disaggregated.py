"""A prefill and a decode node's streams, joined as the router joins them, are one mixed node's; and the pair's headers are minded."""

import asyncio
import contextlib

import pytest
import pytest_asyncio
from server_fakes import FILLER, running_node

from ksana_lab.protocol.engine import AbortRequest, AddRequest, DeclineRequest, TransferKey
from ksana_lab.types import Role

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "127.0.0.1:1__127.0.0.1:2"
PAIR = {"kv-comm-group-key": KEY, "kv-comm-request-id": "77"}
ROUTED = {**PAIR, "x-request-id": "r1", "x-ksana-lab-created": "1700000000", "x-ksana-lab-first-token": "prefill"}
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
HALF = [233]  # the first byte of a longer character, by itself


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_nodes(tmp_path_factory):
    async with contextlib.AsyncExitStack() as stack:
        yield {
            role: await stack.enter_async_context(
                running_node(tmp_path_factory.mktemp(role.value), role, connector={"inference_addr": ("127.0.0.1", port)})
            )
            for role, port in ((Role.PREFILL, 1), (Role.DECODE, 2), (Role.MIXED, 3))
        }


@pytest.fixture
def nodes(shared_nodes):
    for node in shared_nodes.values():
        node.engine.reset()
    return shared_nodes


def script(nodes, tokens):
    for node in nodes.values():
        node.engine.script = tokens


async def streams(nodes, path, body, headers=ROUTED):
    """(prefill's events, decode's, mixed's) of the same request."""
    send = "objects" if path == GENERATE else "events"
    args = (body,) if path == GENERATE else (path, {**body, "stream": True})
    return [await getattr(nodes[role], send)(*args, headers=headers) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)]


BODIES = [
    (COMPLETIONS, {"prompt": [1, 2], "max_tokens": 6, "return_token_ids": True}),
    (COMPLETIONS, {"prompt": "the fox", "max_tokens": 6, "echo": True, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": [5], "max_tokens": 4, "logprobs": 1}),
    (COMPLETIONS, {"prompt": [5], "max_tokens": 4, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "logprobs": True, "return_token_ids": True}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_joined_streams_are_the_mixed_stream_event_by_event(nodes, path, body):
    prefill, decode, mixed = await streams(nodes, path, body)
    assert len(prefill) == 1 and [strip(e) for e in prefill + decode] == [strip(e) for e in mixed]
    assert prefill[0]["created"] == decode[0]["created"] == 1700000000 and prefill[0]["id"] == decode[0]["id"]


def strip(event):
    """How often a fast engine's tokens were seen together moves running totals between neighbouring events."""
    return {k: v for k, v in event.items() if k != "usage"} if event != "[DONE]" and event["choices"] else event


def told(events):
    """What a client makes of a stream of completions: per index (text, reasons to finish), and the number of ends."""
    choices = [e["choices"][0] for e in events if e != "[DONE]" and e["choices"]]
    told = {}
    for choice in choices:
        text, reasons = told.get(choice["index"], ("", []))
        told[choice["index"]] = (text + choice["text"], reasons + [choice["finish_reason"]] * (choice["finish_reason"] is not None))
    return told, events.count("[DONE]")


@pytest.mark.parametrize(
    ("tokens", "body"),
    [
        (HALF + [170, 5, 6], {"max_tokens": 4}),
        (HALF, {"max_tokens": 1}),
        ([83, 84], {"max_tokens": 9, "stop": ["ST", "t"]}),
        ([FILLER], {"max_tokens": 9, "stop_token_ids": [FILLER]}),
        ([7], {"max_tokens": 1}),
        ([7, 8, 9], {"max_tokens": 3, "n": 3, "seed": 1}),
        ([512], {"max_tokens": 5}),
        ([512, 8], {"max_tokens": 2, "ignore_eos": True}),
    ],
)
async def test_a_first_token_that_is_half_a_character_or_the_end_is_told_once(nodes, tokens, body):
    script(nodes, tokens)
    prefill, decode, mixed = await streams(nodes, COMPLETIONS, {"prompt": [1], **body})
    assert told(prefill + decode) == told(mixed)
    assert len(prefill) == body.get("n", 1) and "[DONE]" not in prefill


async def test_first_token_that_holds_back_for_a_stop_string(nodes):
    ids = nodes[Role.MIXED].server._tokenizer.encode("ST")
    script(nodes, [ids[0], FILLER])
    prefill, decode, mixed = await streams(nodes, COMPLETIONS, {"prompt": [1], "max_tokens": 3, "stop": ["STOP"]})
    assert prefill[0]["choices"][0]["text"] == "" and told(prefill + decode) == told(mixed)


@pytest.mark.parametrize("n", [1, 2])
async def test_generate_objects_go_on_from_prefill_without_a_step_back(nodes, n):
    config = {"max_new_tokens": 4, "num_return_sequences": n, "logprobs": 1}
    prefill, decode, mixed = await streams(nodes, GENERATE, {"input_tokens": [4], "sampling_config": config})
    lengths = [[len(ids) for ids in o["output_token_ids"]] for o in prefill + decode]
    assert lengths == sorted(lengths) and all(a <= b for row, after in zip(lengths, lengths[1:]) for a, b in zip(row, after))  # noqa: B905, RUF007
    assert max(lengths[: len(prefill)]) == [1] * n and min(lengths[len(prefill)]) >= 1 and max(lengths[len(prefill)]) >= 2
    assert decode[-1] == mixed[-1]


async def test_generate_of_one_token_is_told_by_prefill_alone(nodes):
    prefill, decode, _ = await streams(nodes, GENERATE, {"input_tokens": [4], "sampling_config": {"max_new_tokens": 1}})
    assert len(prefill) == 1 and decode == []


async def test_decode_answers_that_it_understood_and_only_then_leaves_out(nodes):
    body = {"prompt": [1], "max_tokens": 2, "stream": True}
    for headers, expected in ((ROUTED, "prefill"), (PAIR, None)):
        response = await nodes[Role.DECODE].client.post(COMPLETIONS, json=body, headers=headers)
        assert response.headers.get("x-ksana-lab-first-token") == expected


async def test_without_the_header_decode_streams_everything_as_the_reference_router_needs(nodes):
    _, decode, mixed = await streams(nodes, COMPLETIONS, BODIES[0][1], headers={**PAIR, "x-request-id": "r", "x-ksana-lab-created": "5"})
    assert decode == mixed


async def test_keys_of_a_transfer_are_alike_on_both_sides(nodes):
    await streams(nodes, COMPLETIONS, {"prompt": [[1], [2]], "n": 2, "max_tokens": 2})
    for role in (Role.PREFILL, Role.DECODE):
        added = nodes[role].engine.of(AddRequest)
        assert [a.transfer for a in added] == [TransferKey(KEY, 77, i) for i in range(4)]
    seeds = [[a.sampling.seed for a in nodes[role].engine.of(AddRequest)] for role in nodes]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0])) == 4
    assert all(a.transfer is None for a in nodes[Role.MIXED].engine.of(AddRequest))


async def test_a_request_without_pair_headers_is_served_whole(nodes):
    for role in (Role.PREFILL, Role.DECODE):
        headers = {"x-ksana-lab-first-token": "prefill"}
        events = await nodes[role].events(COMPLETIONS, {"prompt": [1], "max_tokens": 3, "stream": True}, headers)
        assert len(events) == 4 and nodes[role].engine.of(AddRequest)[0].transfer is None


@pytest.mark.parametrize(
    "headers",
    [
        {"kv-comm-group-key": KEY},
        {"kv-comm-request-id": "5"},
        {**PAIR, "kv-comm-request-id": "0"},
        {**PAIR, "kv-comm-request-id": "-1"},
        {**PAIR, "kv-comm-request-id": str(2**31)},
        {**PAIR, "kv-comm-group-key": "127.0.0.1:1"},
        {**PAIR, "kv-comm-group-key": "127.0.0.1:9__127.0.0.1:9"},
    ],
)
async def test_pair_headers_that_cannot_be_right_fail_at_once(nodes, headers):
    for role in (Role.PREFILL, Role.DECODE):
        response = await nodes[role].client.post(COMPLETIONS, json={"prompt": [1]}, headers=headers)
        assert response.status_code == 400 and "kv-comm" in response.json()["error"]["message"]


async def test_closing_prefills_stream_after_the_first_token_aborts_nothing(nodes):
    node = nodes[Role.PREFILL]
    async with node.client.stream("POST", GENERATE, json={"input_tokens": [1]}, headers=PAIR) as response:
        async for chunk in response.aiter_bytes():
            assert chunk
            break
    await node.client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 1})  # the close has been seen by now
    assert not node.engine.of(AbortRequest)


async def test_leaving_prefill_before_the_first_token_aborts(nodes):
    node = nodes[Role.PREFILL]
    node.engine.paused = True
    async with node.client.stream("POST", GENERATE, json={"input_tokens": [1]}, headers=PAIR):
        await node.engine.wait_for(AddRequest)
    (abort,) = await node.engine.wait_for(AbortRequest)
    assert abort.reason == "client disconnected"


async def test_headers_come_at_once_on_both_sides(nodes):
    for role in (Role.PREFILL, Role.DECODE):
        nodes[role].engine.paused = True
        request = nodes[role].client.stream("POST", COMPLETIONS, json={"prompt": [1], "stream": True}, headers=ROUTED)
        response = await asyncio.wait_for(request.__aenter__(), 5)
        assert response.status_code == 200
        await request.__aexit__(None, None, None)


async def test_prefill_answers_a_plain_request_with_its_one_token(nodes):
    response = await nodes[Role.PREFILL].client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 9}, headers=PAIR)
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 1


async def test_a_node_that_refuses_its_part_has_its_engine_tell_the_peer(tmp_path):
    options = {"connector": {"inference_addr": ("127.0.0.1", 2)}, "scheduler": {"max_num_waiting": 1}}
    async with running_node(tmp_path, Role.DECODE, paused=True, **options) as node:
        first = asyncio.create_task(node.client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 1}, headers=PAIR))
        await node.engine.wait_for(AddRequest)
        headers = {**PAIR, "kv-comm-request-id": "78"}
        refused = await node.client.post(COMPLETIONS, json={"prompt": [1, 2, 3], "n": 2}, headers=headers)
        assert refused.status_code == 429
        declined = await node.engine.wait_for(DeclineRequest, 2)
        assert [d.transfer for d in declined] == [TransferKey(KEY, 78, 0), TransferKey(KEY, 78, 1)]
        assert len(node.engine.of(AddRequest)) == 1  # nothing of the declined ones can run
        node.engine.step()
        assert (await first).status_code == 200


async def test_a_bad_body_is_the_others_to_refuse_too(nodes):
    response = await nodes[Role.DECODE].client.post(COMPLETIONS, json={"prompt": [1], "temperature": -1}, headers=PAIR)
    assert response.status_code == 400 and not nodes[Role.DECODE].engine.of(AddRequest)
