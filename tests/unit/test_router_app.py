"""The control plane over HTTP, with the fields, statuses and words that KsanaLLM's nodes know; what a restart keeps; the process itself."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from router_stubs import StubNode, hang, json_reply, one_pair, running_router, stub_nodes

from ksana_lab.config.router import RouterConfig
from ksana_lab.protocol.node import RegisterNode
from ksana_lab.router.app import Router, serve

# As python/simple_router's clients send them (connector/ in KsanaLLM's tree).
REGISTER = {
    "inference_addr": "10.0.0.1:8067",
    "coordinator_addr": "10.0.0.1:13569",
    "cluster_name": "",
    "group_role": "prefill",
    "node_rank": 0,
    "world_size": 2,
    "devices": [
        {"device_id": 0, "device_type": "NVIDIA H20", "device_ip": "10.0.0.1"},
        {"device_id": 1, "device_type": "NVIDIA H20", "device_ip": "10.0.0.1"},
    ],
    "start_time": "2026-03-01 10:00:00",
    "job_id": "1772359200000000_123456",
}
REGISTER_DECODE = REGISTER | {"inference_addr": "10.0.0.2:6890", "coordinator_addr": "10.0.0.2:13571", "group_role": "decode"}
KEY = "10.0.0.1:8067__10.0.0.2:6890"


async def test_a_reference_pair_comes_up_by_the_recorded_exchange():
    async with running_router() as router:
        status, answer = await router.call("/RegisterNode", REGISTER)
        assert status == 201 and set(answer) == {"node_id", "is_online", "last_heartbeat"} and answer["is_online"] is True
        assert datetime.datetime.fromisoformat(answer["last_heartbeat"])
        p = answer["node_id"]
        d = (await router.call("/RegisterNode", REGISTER_DECODE))[1]["node_id"]

        status, beat = await router.call("/Heartbeat", {"node_id": p})
        assert status == 200 and datetime.datetime.fromisoformat(beat.pop("timestamp")).tzinfo is None
        assert beat == {
            "node_id": p,
            "is_online": True,
            "group_ready": True,
            "coordinator_addr": "10.0.0.1:13569",
            "node_role": "prefill",
            "comm_group_to_address": {KEY: []},
            "comm_group_to_id": {KEY: ""},
        }
        answer = await router.call("/RegisterCommId", {"node_id": p, "comm_key": KEY, "comm_id": "AbC=="})
        assert answer == (200, {"status": "OK", "comm_id": "AbC=="})
        beat = (await router.call("/Heartbeat", {"node_id": d}))[1]
        assert beat["comm_group_to_id"] == {KEY: "AbC=="}
        assert beat["comm_group_to_address"] == {
            KEY: [[0, 0, "10.0.0.1:13569"], [0, 1, "10.0.0.1:13569"], [0, 0, "10.0.0.2:13571"], [0, 1, "10.0.0.2:13571"]]
        }
        await router.call("/Heartbeat", {"node_id": p})
        assert (await router.nodes())["pairs"][0]["is_routable"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/Heartbeat", {"node_id": "nobody"}, 404, "register again"),
        ("/RegisterCommId", {"node_id": "nobody", "comm_key": "a__b", "comm_id": "x"}, 404, "register again"),
        ("/RegisterNode", REGISTER | {"cluster_name": "x"}, 400, "Cluster 'x' is not allowed; expecting 'default_cluster'"),
        ("/RegisterNode", REGISTER | {"coordinator_addr": "localhost:1"}, 400, "coordinator_addr"),
        ("/RegisterNode", REGISTER | {"devices": []}, 400, "world_size or devices must be provided"),
    ],
)
async def test_refusals_have_the_references_form(path, body, status, says):
    async with running_router() as router:
        got, answer = await router.call(path, body)
        assert got == status and says in answer["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("inference_addr", addr) for addr in ("nohost", ":80", "a:", "x" * 125 + ":80")),
        *(("node_rank", rank) for rank in (-1, 2**31)),
        *(("hostname", name) for name in ("\ud800", "a\0b", "x" * 257)),
        ("group_role", "both"),
        ("world_size", 2**63),
        ("node_id", "x" * 65),
    ],
)
async def test_bad_fields_are_422_with_their_place(field, value):
    async with running_router() as router:
        status, answer = await router.call("/RegisterNode", REGISTER | {field: value})
        assert status == 422 and answer["detail"][0]["loc"] == ["body", field] and answer["detail"][0]["msg"]


@pytest.mark.parametrize("load", [{"link_bytes_per_s": -1}, {"link_round_trip_s": "inf"}, {"num_running": -3}])
async def test_a_load_that_no_node_has_is_refused_and_the_node_stays(load):
    async with running_router() as router:
        p = (await router.call("/RegisterNode", REGISTER))[1]["node_id"]
        assert (await router.call("/Heartbeat", {"node_id": p, "load": load}))[0] == 422
        assert (await router.nodes())["nodes"][0]["is_online"]


async def test_a_comm_id_that_no_answer_can_carry_is_refused():
    async with running_router() as router:
        p = (await router.call("/RegisterNode", REGISTER))[1]["node_id"]
        await router.call("/RegisterNode", REGISTER_DECODE)
        status, _ = await router.call("/RegisterCommId", {"node_id": p, "comm_key": KEY, "comm_id": "\ud800"})
        assert status == 422 and (await router.call("/Heartbeat", {"node_id": p}))[0] == 200


async def test_only_prefill_rank_0_registers_comm_ids():
    async with running_router() as router:
        await router.call("/RegisterNode", REGISTER)
        d = (await router.call("/RegisterNode", REGISTER_DECODE))[1]["node_id"]
        answer = await router.call("/RegisterCommId", {"node_id": d, "comm_key": KEY, "comm_id": "x"})
        assert answer == (403, {"detail": "Only prefill rank-0 nodes may register comm ids"})


async def test_nodes_shows_roles_load_and_why_a_pair_cannot_serve():
    p, d, m = (StubNode(role, hang()) for role in ("prefill", "decode", "mixed"))
    async with stub_nodes(p, d, m), running_router() as router:
        for node in (p, d, m):
            await router.add(node)
        await router.beat(p, load={"num_running": 3, "num_waiting": 1, "num_free_blocks": 7, "num_blocks": 9})
        seen = await router.nodes()
        node = next(n for n in seen["nodes"] if n["role"] == "prefill")
        assert node["load"] == {"num_running": 3, "num_waiting": 1, "num_free_blocks": 7, "num_blocks": 9}
        assert node["is_online"] and node["last_heartbeat_s_ago"] < 10 and node["in_flight"] == 0 and node["incarnation"] == "1"
        (pair,) = seen["pairs"]
        assert (pair["is_routable"], pair["comm_id_set"], pair["why_not"]) == (False, False, "no comm id is registered for the pair")
        assert seen["mixed"] == [{"inference_addr": m.addr, "is_routable": True, "in_flight": 0}]


async def test_health_tells_whether_anything_can_be_served():
    async with one_pair(hang(), hang()) as (router, _, d):

        async def health() -> dict:
            return await (await router.session.get(router.url + "/health")).json()

        assert (await health())["status"] == "ok" and (await health())["database"] == "ok"
        await router.beat(d, connected=[])
        assert (await health())["status"] == "waiting" and "is not connected" in (await health())["reason"]


async def test_models_are_asked_from_a_node_that_answers():
    async with one_pair(json_reply(500, {}), json_reply(200, {"data": [{"id": "tiny"}]})) as (router, _, d):
        assert await (await router.session.get(router.url + "/v1/models")).json() == {"data": [{"id": "tiny"}]}
        await d.stop()
        response = await router.session.get(router.url + "/v1/models")
        assert response.status == 503 and "answered 500" in (await response.json())["detail"]


async def test_a_restarted_router_knows_its_nodes_and_serves_at_once(tmp_path):
    url = f"sqlite:///{tmp_path}/router.db"
    p, d = StubNode("prefill", json_reply(200, {})), StubNode("decode", json_reply(200, {"d": 1}))
    async with stub_nodes(p, d):
        async with running_router(database_url=url) as router:
            await router.add(p)
            await router.add(d)
            key = await router.connect(p, d)
            assert await router.call("/generate") == (200, {"d": 1})
        async with running_router(database_url=url) as router:
            assert await router.call("/generate") == (200, {"d": 1})
            assert (await router.beat(d, connected=[key]))["comm_group_to_id"] == {key: "id"}  # under the node_id it had
    assert len({request.headers["kv-comm-request-id"] for request in d.requests}) == 2


def test_a_restored_node_is_offline_when_its_last_heartbeat_is_too_old(tmp_path):
    config = RouterConfig(port=0, database_url=f"sqlite:///{tmp_path}/router.db")
    first, later, too_late = (Router(config, clock=lambda s=s: 1e9 + s) for s in (0, 59, 61))
    first.load()
    first.register(RegisterNode(**REGISTER))
    first.store.close()
    for router, is_online in ((later, True), (too_late, False)):
        router.load()
        router.store.close()
        assert router.nodes()["nodes"][0]["is_online"] is is_online


async def test_the_event_log_tells_a_requests_way(tmp_path):
    async with one_pair(json_reply(200, {}), json_reply(200, {"d": 1}), trace_dir=str(tmp_path)) as (router, p, d):
        await router.call("/generate", headers={"x-request-id": "mine"})
    (log,) = tmp_path.glob("router-*.jsonl")
    events = [e for e in map(json.loads, log.read_text().splitlines()) if e.get("cat") == "request"]
    assert [e["name"] for e in events] == ["ARRIVED", "ROUTED", "FIRST_TOKEN", "FINISHED"]
    assert {e["args"]["request_id"] for e in events} == {"mine"}
    assert (events[1]["args"]["prefill"], events[1]["args"]["decode"], events[1]["args"]["comm_request_id"]) == (p.addr, d.addr, 1)


# ---- the process -----------------------------------------------------------------------------------------------------


def test_a_taken_port_ends_with_code_2_and_names_it(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve(RouterConfig(port=port, database_url="sqlite://")) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_an_unusable_database_ends_with_code_2(capsys):
    assert serve(RouterConfig(port=0, database_url="sqlite:////proc/nowhere/router.db")) == 2
    assert "cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_code_0_and_leaves_an_event_log(tmp_path, number):
    config = {"port": 0, "database_url": f"sqlite:///{tmp_path}/router.db", "trace_dir": str(tmp_path / "trace"), "log_dir": str(tmp_path)}
    code = "from ksana_lab.config.router import RouterConfig; from ksana_lab.router.app import serve; "
    code += f"raise SystemExit(serve(RouterConfig(**{config})))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "listening on" in line:
                break
        os.kill(process.pid, number)
        assert process.wait(20) == 0
    (log,) = (tmp_path / "trace").glob("router-*.jsonl")
    assert '"name":"end"' in log.read_text() and "listening on" in (tmp_path / "router.log").read_text()
