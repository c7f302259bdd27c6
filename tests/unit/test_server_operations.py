"""What an operator sees: /health with reasons, /metrics, models, profiling, the event log, and the entry point's exit codes."""

import asyncio
import json
import socket

from prometheus_client.parser import text_string_to_metric_families
from server_fakes import node_config, running_node, write_tokenizer

from ksana_lab.protocol.engine import Profile
from ksana_lab.server.app import serve
from ksana_lab.types import NodeAddr, Role

BODY = {"prompt": [1], "max_tokens": 4}
ROUTER = {"router_addr": NodeAddr("127.0.0.1", 1), "inference_addr": NodeAddr("127.0.0.1", 2)}


async def samples(node):
    """{(name, label values): value} of /metrics."""
    text = (await node.client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name, *sorted(sample.labels.values()))] = sample.value
    return found


async def test_metrics_count_requests_times_and_the_engines_state(tmp_path):
    async with running_node(tmp_path) as node:
        node.engine.transfer = {"bytes_sent_total": 7.0, "link-gbps": 3.5}
        await node.client.post("/v1/completions", json=BODY)
        await node.client.post("/v1/completions", json={})
        seen = await samples(node)
    assert seen["ksana_lab_requests_total", "completed", "mixed"] == 1
    assert seen["ksana_lab_requests_total", "invalid_request_error", "mixed"] == 1
    for name in ("ttft", "tpot", "e2e", "queue", "prefill"):
        assert seen[f"ksana_lab_{name}_seconds_count", "mixed"] == 1, name
    assert seen["ksana_lab_prefill_seconds_sum", "mixed"] == 0.002
    assert seen["ksana_lab_kv_blocks", "mixed"] == 64 and seen["ksana_lab_kv_blocks_leaked", "mixed"] == 0
    assert seen["ksana_lab_sequences_swapped", "mixed"] == 1 and seen["ksana_lab_host_blocks_free", "mixed"] == 9
    assert seen["ksana_lab_swap_outs_total", "mixed"] == 3 and seen["ksana_lab_swap_ins_total", "mixed"] == 2
    assert seen["ksana_lab_preemptions_total", "mixed"] == 4 and seen["ksana_lab_engine_up", "mixed"] == 1
    assert seen["ksana_lab_transfer_bytes_sent_total", "mixed"] == 7 and seen["ksana_lab_transfer_link_gbps", "mixed"] == 3.5


async def test_two_servers_in_one_process_do_not_share_counters(tmp_path):
    async with running_node(tmp_path / "a") as first, running_node(tmp_path / "b") as second:
        await first.client.post("/v1/completions", json=BODY)
        assert ("ksana_lab_requests_total", "completed", "mixed") not in await samples(second)


async def test_a_healthy_node_says_what_it_is(tmp_path):
    async with running_node(tmp_path) as node:
        await node.server.engine.get_status(5)
        response = await node.client.get("/health")
    state = response.json()
    assert response.status_code == 200 and state["status"] == "healthy" and state["role"] == "mixed" and state["reasons"] == []
    assert state["engine"]["num_leaked_blocks"] == 0 and state["engine"]["num_blocks"] == 64
    assert state["engine"]["num_swapped"] == 1 and state["engine"]["num_free_host_blocks"] == 9


async def test_an_engine_that_says_nothing_is_not_healthy_and_metrics_still_answer(tmp_path):
    async with running_node(tmp_path, server_options={"silence_limit_s": 0.1}) as node:
        node.engine.mute = True
        while (response := await node.client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        assert "has said nothing" in response.json()["reasons"][0]
        assert (await samples(node))["ksana_lab_engine_silence_seconds", "mixed"] > 0.1


async def test_a_prefill_node_without_its_router_and_peer_is_not_healthy(tmp_path):
    async with running_node(tmp_path, Role.PREFILL, connector=ROUTER) as node:
        assert "not registered with the router at 127.0.0.1:1" in (await node.client.get("/health")).json()["reasons"][0]
        registrar = node.server.registrar
        registrar.is_registered, registrar.last_heartbeat_s = True, asyncio.get_running_loop().time()
        assert "no decode node is connected" in (await node.client.get("/health")).json()["reasons"][0]
        node.engine.connected = ["127.0.0.1:2__127.0.0.1:3"]
        await node.server.engine.get_status(5)
        assert (await node.client.get("/health")).status_code == 200


async def test_models_version_and_profiling(tmp_path):
    async with running_node(tmp_path) as node:
        (model,) = (await node.client.get("/v1/models")).json()["data"]
        assert model["id"] == "tiny-model" and model["max_model_len"] == 256 and model["root"].endswith("/tiny-model")
        assert (await node.client.get("/version")).json()["name"] == "ksana_lab"
        assert (await node.client.post("/start_profile")).status_code == 200
        assert (await node.client.post("/stop_profile")).status_code == 200
        assert [p.start for p in await node.engine.wait_for(Profile, 2)] == [True, False]


async def test_the_event_log_tells_each_requests_life(tmp_path):
    trace_dir = tmp_path / "trace"
    async with running_node(tmp_path, runtime={"trace_dir": str(trace_dir)}) as node:
        await node.client.post("/v1/completions", json=BODY, headers={"x-request-id": "good"})
        await node.client.post("/v1/completions", json={}, headers={"x-request-id": "bad"})
    (file,) = trace_dir.glob("mixed-api-*.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    named = [(e["name"], e["args"]) for e in events if e.get("cat") == "request"]
    assert [n for n, args in named if args["request_id"] == "good"] == ["ARRIVED", "QUEUED", "FIRST_TOKEN", "FINISHED"]
    assert [n for n, args in named if args["request_id"] == "bad"] == ["ARRIVED", "FAILED"]
    assert events[-1]["args"]["dropped"] == 0
    finished = next(args for name, args in named if name == "FINISHED")
    assert finished["num_output_tokens"] == 4 and finished["prefill_end_ns"] > finished["scheduled_ns"]


# ---- the entry point -------------------------------------------------------------------------------------------------


def test_serve_refuses_a_directory_that_is_no_model(tmp_path, caplog):
    config = node_config(tmp_path / "nothing")
    assert serve(config, "127.0.0.1", 0, f"ipc://{tmp_path}/api", lambda: None) == 2
    assert str(tmp_path / "nothing") in caplog.text


def test_serve_refuses_a_port_that_is_taken(tmp_path, caplog):
    config = node_config(write_tokenizer(tmp_path / "model"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve(config, "127.0.0.1", port, f"ipc://{tmp_path}/api", lambda: None) == 2
    assert f"127.0.0.1:{port}" in caplog.text


def test_serve_ends_with_an_error_when_the_engine_never_came_up(tmp_path, caplog):
    config = node_config(write_tokenizer(tmp_path / "model"))
    assert serve(config, "127.0.0.1", 0, f"ipc://{tmp_path}/api", lambda: "OSError: no weights") == 1
    assert "no weights" in caplog.text
