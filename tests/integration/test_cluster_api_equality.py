"""Whatever is asked of a prefill/decode pair through the router, the answer is that of one mixed node: the same JSON but for the time it
names, and the same stream event by event. (How many tokens an object of /generate adds depends on how fast it is read, on any node.)"""

from __future__ import annotations

import asyncio
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from helpers_checkpoint import checkpoint
from helpers_cluster import nothing_left, prompt_of

from ksana_lab.cluster.local import Cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
CONFIGS = Path(__file__).parents[2] / "configs"
# Without the prefix cache: how much of a prompt was cached is told, and depends on what was asked before.
OPTIONS = ["enable_auto_prefix_cache=false", "heartbeat_interval_ms=200", "ksana_lab.num_threads=1", "split_fuse_token_num=16"]
FILES = {"mixed": "mixed_cpu.yaml", "pd": "pd_1p1d_cpu.yaml"}

IDS = prompt_of(21, 1)
TEXT = "Der Wald steht schwarz und schweiget, und aus den Wiesen steiget"
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two?"}]},
]
GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "seed": 11}


def generate(prompt: dict[str, Any], **config: Any) -> tuple[str, dict[str, Any]]:
    return GENERATE, {**prompt, "sampling_config": {"max_new_tokens": 12, "ignore_eos": True, **config}}


def completion(prompt: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}


BODIES = {
    "generate ids": generate({"input_tokens": IDS}),
    "generate text": generate({"prompt": TEXT}),
    "generate template": generate({"prompt": json.dumps([{"role": "user", "content": "Hi"}]), "use_chat_template": True}),
    "generate one token": generate({"input_tokens": IDS}, max_new_tokens=1),
    "generate logprobs": generate({"input_tokens": IDS}, logprobs=3),
    "generate sampled": generate({"input_tokens": IDS}, topk=40, topp=0.9, temperature=1.1, seed=5, presence_penalty=0.7),
    "generate without a seed": generate({"input_tokens": IDS}, topk=40, temperature=1.1, do_sample=True),
    "generate three": generate({"input_tokens": IDS}, topk=40, temperature=1.1, seed=5, num_return_sequences=3, logprobs=1),
    "completion ids": completion(IDS, return_token_ids=True),
    "completion text": completion(TEXT, stream_options={"include_usage": True}),
    "completion echo": completion(TEXT, echo=True),
    "completion one token": completion(IDS, max_tokens=1, logprobs=2, return_token_ids=True),
    "completion logprobs": completion(IDS, logprobs=4, return_token_ids=True),
    "completion sampled": completion(IDS, **SAMPLED, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.4),
    "completion continuous usage": completion(IDS, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    "completion three of two": completion([TEXT, "Und"], **SAMPLED, n=3, logprobs=1, return_token_ids=True, max_tokens=7),
    "completion may end": completion(IDS, **SAMPLED, ignore_eos=False, max_tokens=200, min_tokens=3),
    "chat": chat(stream_options={"include_usage": True}),
    "chat logprobs": chat(logprobs=True, top_logprobs=2, return_token_ids=True),
    "chat both spellings": chat(max_tokens=30, max_completion_tokens=5),
    "chat two": chat(**SAMPLED, n=2, logprobs=True),
    "chat one token": chat(max_tokens=1, return_token_ids=True),
    "bad field": completion(IDS, temperature=-1),
    "bad message": chat(messages=[{"role": "nobody", "content": ""}]),
    "too long": completion(prompt_of(9000, 2)),
    "asks too much": completion(IDS, max_tokens=9000),
    "no such token": generate({"input_tokens": [5, 10_000]}),
    "no prompt": generate({}),
}
# Made from what the model says: a stop can lie inside the first token, across the first two, or later, or never come.
STOPS = {
    "in the first token": lambda texts, ids: {"stop": texts[0]},
    "across the first two": lambda texts, ids: {"stop": (texts[0] + texts[1])[-2:]},
    "later": lambda texts, ids: {"stop": ["never", "".join(texts[3:5])]},
    "kept": lambda texts, ids: {"stop": "".join(texts[3:5]), "include_stop_str_in_output": True},
    "half of it at the end": lambda texts, ids: {"stop": texts[4] + "Z", "max_tokens": 5},
    "the first token": lambda texts, ids: {"stop_token_ids": ids[:1]},
    "a later token": lambda texts, ids: {"stop_token_ids": ids[4:5]},
}


@pytest.fixture(scope="module")
def clusters():
    def start(name: str) -> Cluster:
        return Cluster.from_yaml(CONFIGS / FILES[name], model_dir=checkpoint(), overrides=OPTIONS).start()

    with ThreadPoolExecutor() as pool:
        checkpoint()
        opened = dict(zip(FILES, pool.map(start, FILES), strict=True))
        yield opened
        list(pool.map(Cluster.close, opened.values()))


async def ask(cluster: Cluster, path: str, body: dict[str, Any], request_id: str) -> tuple[int, str, bytes]:
    async with aiohttp.ClientSession(cluster.url, trust_env=False, timeout=aiohttp.ClientTimeout(60)) as session:
        async with session.post(path, json=body, headers={"x-request-id": request_id}) as response:
            assert response.headers["x-request-id"] == request_id
            return response.status, response.headers.get("content-type", ""), await response.read()


async def answers(clusters, path: str, body: dict[str, Any], request_id: str) -> tuple[Any, Any]:
    """(mixed, pd), each (status, content type, parsed answer)."""
    both = await asyncio.gather(*(ask(clusters[name], path, body, request_id) for name in ("mixed", "pd")))
    return tuple((status, kind, parse(kind, data)) for status, kind, data in both)  # type: ignore[return-value]


def parse(kind: str, data: bytes) -> Any:
    """An answer without what differs from one time to the next; a stream as the list of its events."""
    if kind == "application/json":
        return timeless(json.loads(data))
    end = b"\n\n" if kind.startswith("text/event-stream") else b"\0"
    *events, rest = data.split(end)
    assert not rest, data
    texts = [event.removeprefix(b"data: ") for event in events]
    assert texts.pop() == b"[DONE]", data
    return [timeless(json.loads(text)) for text in texts]


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    assert abs(answer.pop("created", 0) - 1.7e9) < 1e9 or "texts" in answer or "error" in answer
    return answer


def by_index(events: list[dict[str, Any]]) -> dict[int | None, list[dict[str, Any]]]:
    """Samples of one request advance in any order: each one's events in order, then what is not of one sample."""
    lines: dict[int | None, list[dict[str, Any]]] = {}
    for event in events:
        assert len(event["choices"]) <= 1
        index = event["choices"][0]["index"] if event["choices"] else None
        line = lines.setdefault(index, [])
        if line and index is not None and event["choices"][0].get("token_ids") == []:  # a first token that was the last: P shows, D ends it
            join(line[-1]["choices"][0], event["choices"][0])
        else:
            line.append(event)
    return lines


def join(choice: dict[str, Any], end: dict[str, Any]) -> None:
    if "delta" in choice:
        choice["delta"]["content"] += end["delta"]["content"]
    else:
        choice["text"] += end["text"]
    choice |= {name: end[name] for name in ("finish_reason", "stop_reason")}


def assert_same(pd: Any, mixed: Any) -> None:
    assert pd == mixed


def assert_same_stream(pd: list[dict[str, Any]], mixed: list[dict[str, Any]]) -> None:
    if "choices" in mixed[0]:
        assert by_index(pd) == by_index(mixed)
        return
    states = [{tuple(map(len, event["output_token_ids"])): event for event in events} for events in (pd, mixed)]
    for at in states[0].keys() & states[1].keys():
        assert states[0][at] == states[1][at]
    assert pd[-1] == mixed[-1] and set(map(len, pd[0]["output_token_ids"])) == {1}
    sizes = [tuple(map(len, event["output_token_ids"])) for event in pd]
    assert all(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for a, b in itertools.pairwise(sizes)), sizes


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("name", BODIES)
async def test_the_pair_answers_as_one_node(clusters, name, is_stream):
    path, body = BODIES[name]
    mixed, pd = await answers(clusters, path, {**body, "stream": is_stream}, f"eq-{name.replace(' ', '-')}")
    is_error = mixed[0] != 200
    assert pd[:2] == mixed[:2] and is_error == (name.startswith(("bad", "too", "asks", "no ")))
    if is_stream and not is_error:
        assert_same_stream(pd[2], mixed[2])
    else:
        assert pd[2] == mixed[2]


@pytest.mark.parametrize("stop", STOPS)
async def test_stops_wherever_they_are(clusters, stop):
    _, body = completion(IDS, return_token_ids=True, max_tokens=8)
    _, _, events = (await answers(clusters, COMPLETIONS, {**body, "stream": True}, "probe"))[0]
    choices = [event["choices"][0] for event in events]
    fields = STOPS[stop]([c["text"] for c in choices if c["token_ids"]], [i for c in choices for i in c["token_ids"]])
    for number, is_stream in enumerate((True, False)):
        mixed, pd = await answers(clusters, COMPLETIONS, {**body, **fields, "stream": is_stream}, f"stop-{number}")
        assert pd[:2] == mixed[:2] and mixed[0] == 200
        (assert_same_stream if is_stream else assert_same)(pd[2], mixed[2])
    reason = mixed[2]["choices"][0]["finish_reason"]
    assert reason == ("length" if stop == "half of it at the end" else "stop")


async def test_a_hundred_requests_at_once_are_told_apart(clusters):
    names = [name for name in BODIES if not name.startswith(("bad", "too", "asks", "no ", "generate without"))]
    asked = [(number, *BODIES[names[number % len(names)]]) for number in range(100)]
    pairs = await asyncio.gather(*(answers(clusters, path, {**body, "stream": False}, f"many-{number}") for number, path, body in asked))
    for mixed, pd in pairs:
        assert mixed[0] == 200 and pd == mixed
    for cluster in clusters.values():
        await nothing_left(cluster)


async def test_the_models_and_the_route_that_does_not_exist(clusters):
    for path in ("/v1/models", "/v1/nothing"):
        seen = []
        for cluster in clusters.values():
            async with aiohttp.ClientSession(trust_env=False) as session, session.get(f"{cluster.url}{path}") as response:
                seen.append((response.status, await response.json()))
        assert seen[0] == seen[1]
