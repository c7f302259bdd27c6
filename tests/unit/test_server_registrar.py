"""Registration against a stub router over real HTTP: start-up order, being forgotten, comm ids, peers, the reference's manners."""

import asyncio
import contextlib
import socket

import pytest
import uvicorn
from router_stubs import running_router
from server_fakes import running_node
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from ksana_lab.errors import ConfigError
from ksana_lab.protocol.engine import GetStatus, PeerUpdate
from ksana_lab.server.registrar import Registrar
from ksana_lab.types import NodeAddr, Role

PREFILL, DECODE = "127.0.0.1:8067", "127.0.0.1:6890"
KEY = f"{PREFILL}__{DECODE}"
ADDRESSES = [[0, 0, "127.0.0.1:13569"], [0, 0, "127.0.0.1:13571"]]


class StubRouter:
    """Answers as scripted and keeps what it was sent. ``forget``: the next heartbeats get this status and text until a node registers."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.registered, self.heartbeats, self.comm_ids = [], [], []
        self.ids, self.addresses = {}, {}
        self.forget = self.refuse = None
        self.news = asyncio.Condition()

    async def wait(self, condition):
        async with self.news:
            await asyncio.wait_for(self.news.wait_for(condition), 10)

    async def _note(self, messages, request):
        async with self.news:
            messages.append(await request.json())
            self.news.notify_all()
        return messages[-1]

    async def register(self, request):
        await self._note(self.registered, request)
        if self.refuse is not None:
            return JSONResponse({"detail": self.refuse}, 400)
        self.forget = None
        return JSONResponse({"node_id": f"n{len(self.registered)}", "is_online": True, "last_heartbeat": "2026-01-01T00:00:00"}, 201)

    async def heartbeat(self, request):
        message = await self._note(self.heartbeats, request)
        if self.forget is not None:
            return PlainTextResponse(self.forget[1], self.forget[0])
        answer = {"node_id": message["node_id"], "is_online": True, "group_ready": True, "node_role": "prefill", "timestamp": "now"}
        return JSONResponse({**answer, "comm_group_to_id": self.ids, "comm_group_to_address": self.addresses})

    async def comm_id(self, request):
        message = await self._note(self.comm_ids, request)
        self.ids = {**self.ids, message["comm_key"]: message["comm_id"]}
        self.addresses = {**self.addresses, message["comm_key"]: ADDRESSES}
        return JSONResponse({"status": "OK", "comm_id": message["comm_id"]})

    @contextlib.asynccontextmanager
    async def serving(self):
        routes = [(f"/{name}", handler) for name, handler in
                  (("RegisterNode", self.register), ("Heartbeat", self.heartbeat), ("RegisterCommId", self.comm_id))]  # fmt: skip
        app = Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in routes])
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        server.capture_signals = contextlib.nullcontext
        task = asyncio.create_task(server.serve(sockets=[self.listener]))
        try:
            yield self
        finally:
            server.should_exit = True
            await task
            self.listener.close()


def connector(router, **more):
    options = {
        "router_addr": ("127.0.0.1", router.port),
        "inference_addr": NodeAddr.parse(PREFILL),
        "coordinator_addr": ("127.0.0.1", 13569),
        "heartbeat_interval_s": 0.05,
    }
    return {"connector": {**options, **more}}


async def test_a_node_says_all_that_the_reference_router_asks_for(tmp_path):
    async with StubRouter().serving() as router, running_node(tmp_path, Role.PREFILL, **connector(router)):
        await router.wait(lambda: len(router.heartbeats) >= 2)
    (sent,) = router.registered
    assert (sent["inference_addr"], sent["coordinator_addr"], sent["group_role"]) == (PREFILL, "127.0.0.1:13569", "prefill")
    assert (sent["node_rank"], sent["world_size"], sent["cluster_name"]) == (0, 1, "")
    assert sent["devices"] == [{"device_id": 0, "device_ip": "127.0.0.1", "device_type": "cpu"}]
    micros, _, digits = sent["job_id"].partition("_")
    assert micros.isdecimal() and len(digits) == 6 and len(sent["incarnation"]) == 32 and len(sent["start_time"]) == 19
    assert router.heartbeats[0]["node_id"] == "n1"


async def test_the_router_may_come_up_last(tmp_path):
    router = StubRouter()
    router.listener.close()  # nobody listens yet
    async with running_node(tmp_path, Role.DECODE, **connector(router, inference_addr=NodeAddr.parse(DECODE))) as node:
        while node.server.registrar.last_error is None:
            await asyncio.sleep(0.01)
        assert "not registered" in (await node.client.get("/health")).json()["reasons"][0]
        router.listener = socket.create_server(("127.0.0.1", router.port))
        async with router.serving():
            await router.wait(lambda: router.heartbeats)
            assert node.server.registrar.is_registered


@pytest.mark.parametrize("answer", [(404, '{"detail":"unknown"}'), (500, "Internal Server Error"), (500, "节点不存在")])
async def test_a_node_that_was_forgotten_registers_again_as_itself(tmp_path, answer):
    async with StubRouter().serving() as router, running_node(tmp_path, Role.PREFILL, **connector(router)):
        await router.wait(lambda: router.heartbeats)
        router.forget = answer
        await router.wait(lambda: len(router.registered) == 2)
        await router.wait(lambda: router.heartbeats[-1]["node_id"] == "n2")
    first, second = router.registered
    assert first["incarnation"] == second["incarnation"] and second["node_id"] == "n1"


async def test_one_stray_500_is_no_reason_to_register_again(tmp_path):
    async with StubRouter().serving() as router, running_node(tmp_path, Role.PREFILL, **connector(router)):
        await router.wait(lambda: router.heartbeats)
        router.forget = (500, "Internal Server Error")
        seen = len(router.heartbeats)
        await router.wait(lambda: len(router.heartbeats) > seen)
        router.forget = None
        seen = len(router.heartbeats)
        await router.wait(lambda: len(router.heartbeats) > seen + 2)
    assert len(router.registered) == 1


async def test_a_refused_registration_is_tried_again_and_told(tmp_path):
    async with StubRouter().serving() as router:
        router.refuse = "Cluster 'x' is not allowed"
        async with running_node(tmp_path, Role.PREFILL, **connector(router)) as node:
            await router.wait(lambda: len(router.registered) >= 2)
            assert "Cluster 'x' is not allowed" in (await node.client.get("/health")).json()["reasons"][0]
            router.refuse = None
            await router.wait(lambda: router.heartbeats)


async def test_prefill_names_its_nameless_pairs_and_tells_the_engine_when_they_are_complete(tmp_path):
    async with StubRouter().serving() as router:
        router.ids = {KEY: "", f"10.0.0.9:1__{DECODE}": ""}  # the second is another prefill node's
        async with running_node(tmp_path, Role.PREFILL, **connector(router, heartbeat_interval_s=60.0)) as node:
            (update, complete) = await node.engine.wait_for(PeerUpdate, 2)  # the second without waiting a minute
    (sent,) = router.comm_ids
    assert sent["comm_key"] == KEY and sent["node_id"] == "n1" and update.pairs == []
    assert complete.pairs == [PeerUpdate.Pair(KEY, sent["comm_id"], [tuple(a) for a in ADDRESSES])]


async def test_a_new_incarnation_of_the_pair_gets_a_fresh_id(tmp_path):
    async with StubRouter().serving() as router:
        router.ids = {KEY: ""}
        async with running_node(tmp_path, Role.PREFILL, **connector(router)) as node:
            await node.engine.wait_for(PeerUpdate, 2)
            router.ids, router.addresses = {KEY: ""}, {}  # the decode node restarted, says the router
            updates = await node.engine.wait_for(PeerUpdate, 4)
    first, second = (message["comm_id"] for message in router.comm_ids)
    assert first != second and [[p.comm_id for p in u.pairs] for u in updates] == [[], [first], [], [second]]


async def test_decode_names_nothing_and_is_told_only_changes(tmp_path):
    async with StubRouter().serving() as router:
        router.ids, router.addresses = {KEY: "id1"}, {KEY: ADDRESSES}
        async with running_node(tmp_path, Role.DECODE, **connector(router, inference_addr=NodeAddr.parse(DECODE))) as node:
            await router.wait(lambda: len(router.heartbeats) >= 4)
            router.ids = {KEY: "id2"}
            updates = await node.engine.wait_for(PeerUpdate, 2)
            assert [u.pairs[0].comm_id for u in updates] == ["id1", "id2"] and len(node.engine.of(PeerUpdate)) == 2
    assert not router.comm_ids


async def test_heartbeats_carry_load_and_a_new_connection_does_not_wait_for_the_next(tmp_path):
    options = {"server_options": {"probe_period_s": 0.05}}
    async with StubRouter().serving() as router:
        async with running_node(tmp_path, Role.PREFILL, **connector(router, heartbeat_interval_s=60.0), **options) as node:
            await router.wait(lambda: router.heartbeats)
            node.engine.connected = [KEY]
            await router.wait(lambda: router.heartbeats[-1].get("connected_comm_keys") == [KEY])
            assert router.heartbeats[-1]["load"] == {"num_running": 0, "num_waiting": 3, "num_free_blocks": 60, "num_blocks": 64}


async def test_a_mixed_node_behind_a_router_registers_as_mixed(tmp_path):
    async with StubRouter().serving() as router:
        async with running_node(tmp_path, Role.MIXED, **connector(router)) as node:
            await router.wait(lambda: router.heartbeats)
            assert (await node.client.get("/health")).status_code == 200
    assert router.registered[0]["group_role"] == "mixed" and "connected_comm_keys" not in router.heartbeats[-1]


async def test_a_node_whose_engine_is_silent_says_so_once_and_beats_again_when_it_speaks(tmp_path):
    async with StubRouter().serving() as router:
        options = {"server_options": {"probe_period_s": 0.02}}
        async with running_node(tmp_path, Role.MIXED, **connector(router), **options) as node:
            node.server.registrar.silence_limit_s = 0.5
            await router.wait(lambda: router.heartbeats)
            node.engine.mute = True
            await router.wait(lambda: router.heartbeats[-1]["is_serving"] is False)
            said = len(router.heartbeats)
            await node.engine.wait_for(GetStatus, len(node.engine.of(GetStatus)) + 5)  # time for many heartbeats
            assert len(router.heartbeats) == said and "the engine does not answer" in node.server.registrar.problem()
            node.engine.mute = False
            await router.wait(lambda: router.heartbeats[-1]["is_serving"])
            assert len(router.registered) == 1


async def test_a_node_that_ends_in_order_signs_off(tmp_path):
    async with running_router() as router:
        address = NodeAddr.parse(router.url.removeprefix("http://"))
        async with running_node(tmp_path, Role.PREFILL, **connector(address)) as node:
            while not node.server.registrar.is_registered:
                await asyncio.sleep(0.01)
            assert len(router.router.registry) == 1
        assert len(router.router.registry) == 0


async def test_a_router_that_knows_no_sign_off_does_not_hold_up_the_end(tmp_path):
    async with StubRouter().serving() as router, running_node(tmp_path, Role.PREFILL, **connector(router)) as node:
        await router.wait(lambda: router.heartbeats)
        node.server.stop()
        assert await node.task == 0


async def test_registering_needs_both_addresses():
    from ksana_lab.config.engine import ConnectorOptions

    with pytest.raises(ConfigError, match="inference_addr"):
        Registrar(ConnectorOptions(router_addr=NodeAddr("127.0.0.1", 1)), None)
