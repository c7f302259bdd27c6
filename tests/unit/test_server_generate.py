"""KsanaLLM's /generate over real HTTP: request fields, cumulative NUL-ended objects, the plain answer, and errors by name."""

import json

import pytest
import pytest_asyncio
from server_fakes import expected_tokens, running_node

from ksana_lab.protocol.engine import AddRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


def text_so_far(node, ids):
    """Without half a character at the end."""
    detokenizer = node.server._tokenizer.detokenizer()
    return "".join([detokenizer.push(i) for i in ids])


async def test_each_token_is_an_object_when_the_client_keeps_up(node):
    node.engine.paused = True
    seen = []
    body = {"input_tokens": [5], "sampling_config": {"max_new_tokens": 3}}
    async with node.client.stream("POST", "/generate", json=body) as response:
        await node.engine.wait_for(AddRequest)
        node.engine.step()
        async for chunk in response.aiter_bytes():
            assert chunk.endswith(b"\0")
            seen.append(len(json.loads(chunk[:-1])["output_token_ids"][0]))
            node.engine.step()
    assert seen == [1, 2, 3]


async def test_stream_is_the_default_and_cumulative(node):
    objects = await node.objects({"input_tokens": [5, 6, 7], "sampling_config": {"max_new_tokens": 4}})
    tokens = expected_tokens([5, 6, 7], 4)
    assert all(o["output_token_ids"][0] == tokens[: len(o["output_token_ids"][0])] for o in objects)
    assert all(o["texts"][0] == text_so_far(node, o["output_token_ids"][0]) for o in objects[:-1])
    assert objects[-1] == {
        "texts": [text_of(node, tokens)],
        "output_token_ids": [tokens],
        "logprobs": [[]],
        "input_token_ids": [5, 6, 7],
    }


async def test_plain_answer_has_the_same_shape(node):
    body = {"prompt": "the quick fox", "stream": False, "sampling_config": {"max_new_tokens": 3, "logprobs": 2}}
    response = await node.client.post("/generate", json=body)
    ids = node.server._tokenizer.encode("the quick fox")
    tokens = expected_tokens(ids, 3)
    answer = response.json()
    assert response.headers["content-type"] == "application/json" and answer["output_token_ids"] == [tokens]
    assert answer["logprobs"] == [[[[t, -0.5], [t + 1, -1.5]] for t in tokens]] and answer["input_token_ids"] == ids


async def test_samples_of_one_prompt_share_an_object(node):
    body = {"input_tokens": [9], "stream": False, "sampling_config": {"max_new_tokens": 2, "num_return_sequences": 3, "seed": 7, "topk": 5}}
    answer = (await node.client.post("/generate", json=body)).json()
    assert len(answer["texts"]) == len(answer["output_token_ids"]) == len(answer["logprobs"]) == 3
    added = node.engine.of(AddRequest)
    assert [(a.sampling.n, a.sampling.seed, a.request_id[-2:]) for a in added] == [(1, 7, ":0"), (1, 8, ":1"), (1, 9, ":2")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"temperature": 0.0, "max_tokens": 255}),
        ({"topk": 5, "topp": 0.5, "temperature": 0.7}, {"temperature": 0.7, "top_k": 5, "top_p": 0.5}),
        ({"topk": 5, "topp": 0, "temperature": 0}, {"temperature": 1.0, "top_p": 1.0}),
        ({"topk": 5, "temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"max_new_tokens": 9999}, {"max_tokens": 255}),
        ({"stop_strings": ["x"], "stop_token_ids": [3], "ignore_eos": True}, {"stop": ("x",), "stop_token_ids": (3,), "ignore_eos": True}),
        ({"seed": 3, "topk": 9, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5},
         {"seed": 3, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5}),
    ],
)  # fmt: skip
async def test_sampling_config_means_what_the_reference_means(node, config, expected):
    node.engine.script = []
    node.engine.paused = True
    async with node.client.stream("POST", "/generate", json={"input_tokens": [1], "sampling_config": config}):
        (added,) = await node.engine.wait_for(AddRequest)
    assert {name: getattr(added.sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"input_tokens": []}, "prompt"),
        ({"input_tokens": [99999]}, "prompt"),
        ({"input_tokens": "abc"}, "input_tokens"),
        ({"input_tokens": [1], "sampling_config": {"topk": 0}}, "topk"),
        ({"input_tokens": [1], "sampling_config": {"topk": 1025}}, "topk"),
        ({"input_tokens": [1], "sampling_config": {"topp": 1.5, "topk": 3}}, "topp"),
        ({"input_tokens": [1], "sampling_config": {"topp": 5, "topk": 3}}, "topp"),
        ({"input_tokens": [1], "sampling_config": {"num_return_sequences": 0}}, "num_return_sequences"),
        ({"input_tokens": [1], "sampling_config": {"num_beams": 4}}, "num_beams"),
        ({"input_tokens": [1], "sampling_config": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size"),
        ({"input_tokens": [1], "sampling_config": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"input_tokens": [1], "sampling_config": {"json_schema": "{}"}}, "json_schema"),
        ({"input_tokens": [1], "sampling_config": {"stop_strings": [""]}}, "stop_strings"),
        ({"input_tokens": [1], "sampling_config": {"stop_token_ids": [2**63], "min_tokens": 1}}, "stop_token_ids"),
        ({"input_tokens": [1], "structured_output_regex": "a+"}, "structured_output_regex"),
        ({"input_tokens": [1], "input_refit_embedding": {"pos": [1], "embeddings": [[0.1]]}}, "input_refit_embedding"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"prompt": "x", "model_type": "llama"}, "model_type"),
        ({"prompt": "not json", "use_chat_template": True}, "prompt"),
    ],
)
async def test_a_bad_or_unsupported_field_is_named(node, body, field):
    response = await node.client.post("/generate", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].split(".")[-1] in (field, "sampling_config") and field in error["message"]
    assert response.json()["detail"] == error["message"] and error["ksana_code"] == 2000 and not node.engine.of(AddRequest)


async def test_a_rule_about_another_field_names_it_as_this_body_does(node):
    body = {"input_tokens": [1], "sampling_config": {"min_tokens": 9, "max_new_tokens": 3}}
    error = (await node.client.post("/generate", json=body)).json()["error"]
    assert error["message"] == "min_tokens must be in 0..max_new_tokens, got 9" and error["param"] == "min_tokens"


async def test_what_asks_for_nothing_passes(node):
    config = {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "json_schema": "", "max_new_tokens": 1, "logprobs": 0}
    body = {"prompt": "x", "model_type": "empty", "structured_output_regex": None, "additional_params": {}, "made_up": 1}
    assert len(await node.objects({**body, "sampling_config": config})) == 1


async def test_use_chat_template_renders_the_messages_in_prompt(node):
    messages = [{"role": "user", "content": "hi"}]
    await node.objects({"prompt": json.dumps(messages), "use_chat_template": True, "sampling_config": {"max_new_tokens": 1}})
    (added,) = node.engine.of(AddRequest)
    text = node.server._tokenizer.decode(added.prompt_token_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_stop_string_ends_the_stream_and_the_sequence_in_the_engine(node):
    tokenizer = node.server._tokenizer
    node.engine.script = tokenizer.encode("the fox STOP there")
    (*_, last) = await node.objects({"input_tokens": [1], "sampling_config": {"stop_strings": ["STOP"]}})
    assert last["texts"] == ["the fox "]
    assert tokenizer.decode(last["output_token_ids"][0]).startswith("the fox STOP")


async def test_a_prompt_as_long_as_the_model_is_refused(node):
    response = await node.client.post("/generate", json={"input_tokens": [1] * 256})
    assert response.status_code == 400 and response.json()["error"]["type"] == "context_length_exceeded"
    assert "256 tokens" in response.json()["error"]["message"]


async def test_not_json_is_said_so(node):
    response = await node.client.post("/generate", content=b"{prompt: x}")
    assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"]
