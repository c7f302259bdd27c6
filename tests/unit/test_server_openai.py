"""/v1/completions and /v1/chat/completions over real HTTP: what real clients send, what they get, and errors by name."""

import asyncio
from types import SimpleNamespace

import pytest
import pytest_asyncio
from server_fakes import expected_tokens, running_node

from ksana_lab.core.scheduler import STOPPED_BY_CALLER
from ksana_lab.protocol.engine import AbortRequest, AddRequest
from ksana_lab.server.openai_api import LogprobWriter
from ksana_lab.types import TokenLogprob

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_node(tmp_path_factory):
    async with running_node(tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def node(shared_node):
    shared_node.engine.reset()
    return shared_node


def text_of(node, ids):
    return node.server._tokenizer.decode(ids)


async def post(node, path, body, status=200):
    response = await node.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


# ---- completions -----------------------------------------------------------------------------------------------------


async def test_completion_of_token_ids(node):
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "return_token_ids": True, "model": "any"}
    answer = await post(node, COMPLETIONS, body)
    tokens = expected_tokens([1, 2, 3], 4)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "any"
    (choice,) = answer["choices"]
    assert choice["text"] == text_of(node, tokens) and choice["finish_reason"] == "length"
    assert choice["token_ids"] == tokens and choice["prompt_token_ids"] == [1, 2, 3]
    expected_usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert {k: answer["usage"][k] for k in expected_usage} == expected_usage


async def test_a_list_of_prompts_times_n_is_numbered_through(node):
    answer = await post(node, COMPLETIONS, {"prompt": ["the fox", "a dog"], "n": 2, "max_tokens": 2, "seed": 4, "return_token_ids": True})
    prompts = [node.server._tokenizer.encode(t) for t in ("the fox", "a dog")]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert answer["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[1]) and answer["usage"]["completion_tokens"] == 8
    assert [a.sampling.seed for a in node.engine.of(AddRequest)] == [4, 5, 4, 5]


@pytest.mark.parametrize("prompt", ["text", ["text"], [5, 6], [[5, 6], [7]]])
async def test_every_form_of_prompt(node, prompt):
    answer = await post(node, COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert len(answer["choices"]) == (2 if prompt == [[5, 6], [7]] else 1)


async def test_stream_deltas_join_to_the_plain_answer(node):
    body = {"prompt": [7], "max_tokens": 9, "return_token_ids": True}
    whole = await post(node, COMPLETIONS, body)
    events = await node.events(COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, usage, done = events
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert [t for c in chunks for t in c["choices"][0]["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 8 + ["length"]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [7] and "prompt_token_ids" not in chunks[1]["choices"][0]
    assert usage["choices"] == [] and usage["usage"] == whole["usage"] and done == "[DONE]"
    assert len({(c["id"], c["created"], c["object"]) for c in chunks}) == 1


async def test_continuous_usage_counts_every_token(node):
    options = {"include_usage": True, "continuous_usage_stats": True}
    node.engine.paused = True
    counts = []
    body = {"prompt": [7], "max_tokens": 3, "stream": True, "stream_options": options}
    async with node.client.stream("POST", COMPLETIONS, json=body) as response:
        await node.engine.wait_for(AddRequest)
        node.engine.step()
        async for line in response.aiter_lines():
            if '"usage"' in line:
                counts.append(int(line.split('"completion_tokens":')[1].split(",")[0]))
                node.engine.step()
    assert counts == [1, 2, 3, 3]


async def test_without_stream_options_there_is_no_usage(node):
    events = await node.events(COMPLETIONS, {"prompt": [7], "max_tokens": 2, "stream": True})
    assert all("usage" not in e for e in events[:-1]) and len(events) == 3


async def test_echo_shows_the_prompt_first(node):
    body = {"prompt": "the fox", "max_tokens": 2, "echo": True}
    whole = (await post(node, COMPLETIONS, body))["choices"][0]["text"]
    events = await node.events(COMPLETIONS, {**body, "stream": True})
    assert whole.startswith("the fox") and "".join(e["choices"][0]["text"] for e in events[:-1]) == whole


async def test_completion_logprobs_are_four_parallel_lists(node):
    body = {"prompt": [3], "max_tokens": 3, "logprobs": 2}
    logprobs = (await post(node, COMPLETIONS, body))["choices"][0]["logprobs"]
    texts = [node.server._tokenizer.token_text(t) for t in expected_tokens([3], 3)]
    assert logprobs["tokens"] == texts and logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, len(texts[0]), len(texts[0]) + len(texts[1])]
    assert all(position[text] == -0.5 for position, text in zip(logprobs["top_logprobs"], texts, strict=True))
    events = await node.events(COMPLETIONS, {**body, "stream": True})
    streamed = [e["choices"][0]["logprobs"] for e in events[:-1]]
    assert {key: [x for part in streamed for x in part[key]] for key in logprobs} == logprobs


async def test_parts_of_a_character_are_spelled_apart_in_completion_logprobs(node):
    spelled = node.server._tokenizer.token_bytes
    half = next(i for i in range(500) if _is_part(spelled(i)) and _is_part(spelled(i + 1)))
    node.engine.script = [half]
    logprobs = (await post(node, COMPLETIONS, {"prompt": [3], "max_tokens": 1, "logprobs": 2}))["choices"][0]["logprobs"]
    names = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled(i)) for i in (half, half + 1)]
    assert logprobs["tokens"] == names[:1] and logprobs["text_offset"] == [0]
    assert logprobs["top_logprobs"] == [{names[0]: -0.5, names[1]: -1.5}]


def _is_part(token: bytes) -> bool:
    return token.decode("utf-8", "ignore") == ""


def test_of_tokens_spelled_alike_the_chosen_one_counts():
    tokenizer = SimpleNamespace(token_bytes=lambda i: b"a" if i < 3 else b"b", token_text=lambda i: "a")
    sequence = SimpleNamespace(token_ids=[1])
    top = ((2, -0.1), (1, -0.7), (4, -1.0), (3, -2.0))
    logprobs = LogprobWriter(tokenizer, 4).completion(sequence, 0, [TokenLogprob(1, -0.7, top)])
    assert logprobs["top_logprobs"] == [{"a": -0.7, "b": -1.0}]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens(node, stream):
    ids = node.server._tokenizer.encode("one two; STOP here")
    node.engine.script = ids
    body = {"prompt": [1], "max_tokens": 50, "stop": ["nothing", "two; ST"], "stream": stream}
    if stream:
        events = await node.events(COMPLETIONS, body)
        text = "".join(e["choices"][0]["text"] for e in events[:-1])
        last = events[-2]["choices"][0]
    else:
        last = (await post(node, COMPLETIONS, body))["choices"][0]
        text = last["text"]
    assert (text, last["finish_reason"], last["stop_reason"]) == ("one ", "stop", "two; ST")


async def test_a_stop_string_ends_the_sequence_in_the_engine(node):
    node.engine.paused, node.engine.script = True, node.server._tokenizer.encode("one STOP two")
    answer = asyncio.create_task(post(node, COMPLETIONS, {"prompt": [1], "max_tokens": 250, "stop": "STOP"}))
    await node.engine.wait_for(AddRequest)
    node.engine.step(len(node.engine.script))
    (abort,) = await node.engine.wait_for(AbortRequest)
    assert abort.reason == STOPPED_BY_CALLER and (await answer)["choices"][0]["text"] == "one "


async def test_stop_string_can_be_included_and_min_tokens_shields(node):
    node.engine.script = node.server._tokenizer.encode("ab STOP cd STOP")
    body = {"prompt": [1], "max_tokens": 50, "stop": "STOP", "include_stop_str_in_output": True}
    assert (await post(node, COMPLETIONS, body))["choices"][0]["text"] == "ab STOP"


async def test_a_stop_token_ends_it_and_its_text_is_left_out(node):
    ids = node.server._tokenizer.encode("the fox.")
    node.engine.script = ids
    body = {"prompt": [1], "max_tokens": 50, "stop_token_ids": [ids[-1]], "return_token_ids": True}
    choice = (await post(node, COMPLETIONS, body))["choices"][0]
    assert choice["text"] == "the fox" and choice["stop_reason"] == ids[-1] and choice["token_ids"] == ids


async def test_end_of_sequence_has_no_stop_reason_and_ignore_eos_goes_on(node):
    eos = node.server._tokenizer.eos_token_ids[0]
    node.engine.script = [5, eos, 6, 7]
    choice = (await post(node, COMPLETIONS, {"prompt": [1], "max_tokens": 4}))["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    choice = (await post(node, COMPLETIONS, {"prompt": [1], "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}))["choices"][0]
    assert choice["finish_reason"] == "length" and choice["token_ids"] == [5, eos, 6, 7]


# ---- chat ------------------------------------------------------------------------------------------------------------


async def test_chat_answer(node):
    answer = await post(node, CHAT, {"messages": HELLO, "max_completion_tokens": 3, "return_token_ids": True})
    (added,) = node.engine.of(AddRequest)
    tokens = expected_tokens(added.prompt_token_ids, 3)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["prompt_token_ids"] == added.prompt_token_ids and answer["choices"][0]["token_ids"] == tokens
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text_of(node, tokens)}
    assert text_of(node, added.prompt_token_ids) == "user\nhello\nassistant\n"


async def test_chat_stream_says_the_role_with_the_first_token(node):
    events = await node.events(CHAT, {"messages": HELLO, "max_tokens": 3, "stream": True})
    *chunks, done = events
    assert chunks[0]["object"] == "chat.completion.chunk" and done == "[DONE]"
    assert [c["choices"][0]["delta"].get("role") for c in chunks] == ["assistant", None, None]
    whole = await post(node, CHAT, {"messages": HELLO, "max_tokens": 3})
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == whole["choices"][0]["message"]["content"]


async def test_content_as_parts_is_the_same_as_a_string(node):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel\nlo"}, {"type": "text", "text": "you"}]}]
    await post(node, CHAT, {"messages": parts, "max_tokens": 1})
    await post(node, CHAT, {"messages": [{"role": "user", "content": "hel\nlo\nyou"}], "max_tokens": 1})
    first, second = node.engine.of(AddRequest)
    assert first.prompt_token_ids == second.prompt_token_ids


async def test_chat_fills_what_fits_when_no_limit_is_given(node):
    node.engine.script = [node.server._tokenizer.eos_token_ids[0]]
    await post(node, CHAT, {"messages": HELLO})
    (added,) = node.engine.of(AddRequest)
    assert added.sampling.max_tokens == 256 - len(added.prompt_token_ids)


async def test_chat_logprobs_have_bytes_and_rivals(node):
    body = {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    content = (await post(node, CHAT, body))["choices"][0]["logprobs"]["content"]
    spelled = node.server._tokenizer.token_bytes(expected_tokens(node.engine.of(AddRequest)[0].prompt_token_ids, 1)[0])
    assert content[0]["bytes"] == list(spelled) and content[0]["logprob"] == -0.5
    assert [t["logprob"] for t in content[0]["top_logprobs"]] == [-0.5, -1.5] and len(content) == 2


async def test_n_streams_are_told_apart_by_index(node):
    events = await node.events(CHAT, {"messages": HELLO, "max_tokens": 3, "n": 2, "stream": True})
    by_index = {i: [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == i] for i in (0, 1)}
    assert all(len(c) == 3 and c[-1]["finish_reason"] == "length" and c[0]["delta"]["role"] == "assistant" for c in by_index.values())


# ---- what real clients send ------------------------------------------------------------------------------------------

VLLM_BENCH_COMPLETIONS = {
    "model": "m", "prompt": "the fox", "repetition_penalty": 1.0, "max_tokens": 2, "logprobs": None, "stream": True,
    "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0, "top_p": 1.0,
}  # fmt: skip
VLLM_BENCH_CHAT = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}], "max_completion_tokens": 2,
    "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0,
}  # fmt: skip
AIPERF_CHAT = {
    "messages": [{"role": "user", "name": "", "content": "the fox"}], "model": "m", "stream": True, "max_completion_tokens": 2,
    "min_tokens": 2, "ignore_eos": True, "stream_options": {"include_usage": True},
}  # fmt: skip
GUIDELLM = {
    "model": "m", "prompt": "the fox", "max_tokens": 2, "max_completion_tokens": 2, "stop": None, "ignore_eos": True, "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "user": "bench",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETIONS, VLLM_BENCH_COMPLETIONS), (CHAT, VLLM_BENCH_CHAT), (CHAT, AIPERF_CHAT), (COMPLETIONS, GUIDELLM)],
)
async def test_bodies_of_benchmark_clients(node, path, body):
    events = await node.events(path, body)
    assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] == 2
    sampling = node.engine.of(AddRequest)[0].sampling
    assert sampling.max_tokens == 2 and sampling.ignore_eos


async def test_extra_sampling_fields_reach_the_engine(node):
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    await post(node, COMPLETIONS, {"prompt": [1], "max_tokens": 2, "top_p": 0.9, "temperature": 0.8, **extra})
    sampling = node.engine.of(AddRequest)[0].sampling
    assert {name: getattr(sampling, name) for name in extra} == extra and sampling.top_p == 0.9 and sampling.temperature == 0.8


async def test_top_k_minus_one_is_off_and_null_is_the_default(node):
    await post(node, COMPLETIONS, {"prompt": [1], "max_tokens": None, "top_k": -1, "temperature": None, "n": None, "seed": None})
    sampling = node.engine.of(AddRequest)[0].sampling
    assert (sampling.top_k, sampling.temperature, sampling.max_tokens) == (0, 1.0, 16) and sampling.seed is not None


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1], "echo": True}, "prompt"),
        (COMPLETIONS, {"prompt": [1], "max_tokens": "many"}, "max_tokens"),
        (COMPLETIONS, {"prompt": [1], "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": [1], "temperature": -1}, "temperature"),
        (COMPLETIONS, {"prompt": [1], "top_p": 0}, "top_p"),
        (COMPLETIONS, {"prompt": [1], "n": 1000}, "n"),
        (COMPLETIONS, {"prompt": [1], "logprobs": 50}, "logprobs"),
        (COMPLETIONS, {"prompt": [1], "stop": [""]}, "stop"),
        (COMPLETIONS, {"prompt": [1], "stop_token_ids": [515]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": [1], "stop_token_ids": [3, -1]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": [1], "stop_token_ids": [3] * 1025}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": [1], "stop_token_ids": [2**64 - 1], "min_tokens": 1}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": [1], "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": [1], "logit_bias": {"5": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": [1], "echo": True, "logprobs": 1}, "echo"),
        (COMPLETIONS, {"prompt": [1], "suffix": "x"}, "suffix"),
        (COMPLETIONS, {"prompt": [[1]] * 300, "n": 4}, "n"),
        (CHAT, {}, None),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": "yes"}}, "stream_options"),
    ],
)  # fmt: skip
async def test_a_bad_or_unsupported_field_is_a_400_that_names_it(node, path, body, param):
    error = (await post(node, path, body, status=400))["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param and error["code"] == 400
    assert (param or "messages") in error["message"] and not node.engine.of(AddRequest)


@pytest.mark.parametrize("body", [{"prompt": ["x"] * 1025}, {"prompt": ["x"] * 9, "n": 128}])
async def test_too_many_prompts_are_refused_before_any_is_tokenised(node, monkeypatch, body):
    monkeypatch.setattr(node.server._tokenizer, "encode_all_async", None)
    error = (await post(node, COMPLETIONS, body, status=400))["error"]
    assert error["param"] == "n" and "at most 1024" in error["message"]


async def test_many_short_prompts_are_tokenised_together_as_each_alone(node):
    texts = [f"the fox {i}" for i in range(300)]
    await post(node, COMPLETIONS, {"prompt": texts, "max_tokens": 1})
    assert [a.prompt_token_ids for a in node.engine.of(AddRequest)] == [node.server._tokenizer.encode(t) for t in texts]


async def test_more_tokens_than_fit_is_said_with_the_number_that_does(node):
    error = (await post(node, COMPLETIONS, {"prompt": [1] * 200, "max_tokens": 57}, status=400))["error"]
    assert error["type"] == "context_length_exceeded" and "56" in error["message"]
    error = (await post(node, COMPLETIONS, {"prompt": [1] * 256}, status=400))["error"]
    assert error["type"] == "context_length_exceeded" and "256 tokens" in error["message"]


async def test_unknown_fields_are_ignored_and_logged_once(node, caplog):
    for _ in range(2):
        await post(node, COMPLETIONS, {"prompt": [1], "max_tokens": 1, "frobnicate": 1})
    assert sum("frobnicate" in record.message for record in caplog.records) == 1


async def test_what_asks_for_nothing_passes(node):
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1, "user": "u"}
    await post(node, CHAT, {"messages": HELLO, "max_tokens": 1, **harmless})


async def test_wrong_method_and_path_are_json_too(node):
    assert (await node.client.get(COMPLETIONS)).status_code == 405
    response = await node.client.post("/v1/embeddings", json={})
    assert response.status_code == 404 and response.json()["error"]["code"] == 404


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate", "/health"])
async def test_a_slash_at_the_end_is_another_path_and_not_sent_on(node, path):
    response = await node.client.request("GET" if path == "/health" else "POST", path + "/")
    assert response.status_code == 404 and "location" not in response.headers
    assert response.json()["error"]["code"] == 404


async def test_request_id_is_echoed_and_used(node):
    response = await node.client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 1}, headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1" and response.json()["id"] == "cmpl-abc-1"
    assert node.engine.of(AddRequest)[0].request_id == "abc-1:0"
