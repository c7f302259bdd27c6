"""Real processes killed, stopped and abandoned with requests in every phase: each client gets its tokens or an error that names the side,
every surviving node gets its blocks back, and the cluster serves again without a restart of the others.

One fault meets all phases and all ways of asking at once: four requests each that decode, that wait for their turn to decode, whose KV is
under way, and whose prompts are being computed or queued."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
from helpers_checkpoint import checkpoint, oracle_greedy
from helpers_cluster import WAYS, Client, Reply, family, gauges, levels, node_of, nothing_left, prompt_of, until

from ksana_lab.cluster.local import Cluster
from ksana_lab.types import Role

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
CONFIG = Path(__file__).parents[2] / "configs" / "pd_1p1d_cpu.yaml"
SLOW = [  # 2 KiB of KV per token: the link carries about 60 prompt tokens a second
    "max_batch_size=4", "max_step_tokens=16", "split_fuse_token_num=16", "max_token_len=6000", "enable_auto_prefix_cache=false",
    "ksana_lab.num_blocks=2048", "ksana_lab.link.bandwidth_gbps=0.001", "router.heartbeat_timeout_s=8",
]  # fmt: skip
SMALL = [
    "ksana_lab.num_blocks=40", "nodes.decode.ksana_lab.num_blocks=32", "max_batch_size=6", "split_fuse_token_num=64",
    "max_waiting_queue_len=6", "waiting_timeout_in_ms=4000",
]  # fmt: skip
COMMON = ["heartbeat_interval_ms=200", "ksana_lab.num_threads=1", "ksana_lab.lease_s=20"]
DECODE, READY, TRANSFER, PREFILL = "decode", "ready", "transfer", "prefill"
SHOWN = 40  # tokens of a long answer that are compared


@pytest.fixture(scope="module")
def clusters():
    opened: dict[str, Cluster] = {}

    def cluster(kind: str) -> Cluster:
        if kind not in opened:
            options = [*SMALL] if kind == "small" else [*SLOW, f"communication_type={kind}"]
            opened[kind] = Cluster.from_yaml(CONFIG, model_dir=checkpoint(), overrides=[*COMMON, *options]).start()
        heal(opened[kind])
        return opened[kind]

    yield cluster
    with ThreadPoolExecutor() as pool:
        list(pool.map(Cluster.close, opened.values()))


def heal(cluster: Cluster) -> None:
    """After a test that failed, the next one finds all processes alive."""
    for process in cluster.status()["processes"]:
        if process["pid"] is None:
            cluster.restart(process["name"])


async def fill(client: Client) -> dict[str, list[Reply]]:
    """Requests in every phase, by phase."""
    groups: dict[str, list[Reply]] = {}

    def ask(phase: str, size: int, max_tokens: int) -> None:
        groups[phase] = [client.ask(way, prompt_of(size, 7 * size + i), max_tokens) for i, way in enumerate(WAYS)]

    async def reached(phase: str, is_so) -> None:
        nodes = await until(lambda: seen(is_so), phase)
        assert nodes["decode0"]["kv_blocks_leaked"] == nodes["prefill0"]["kv_blocks_leaked"] == 0

    async def seen(is_so):
        nodes = await levels(client.cluster)
        return is_so(nodes["prefill0"], nodes["decode0"]) and nodes

    ask(DECODE, 8, 2000)
    await reached(DECODE, lambda p, d: d["sequences_running"] == 4)
    ask(READY, 10, 20)
    await reached(READY, lambda p, d: d["sequences_running"] == 8)  # four of them beyond the batch
    ask(TRANSFER, 700, 20)  # eleven seconds each, one after the other
    await reached(TRANSFER, lambda p, d: p["sequences_held"] >= 1 and d["sequences_waiting_kv"] == 4)
    ask(PREFILL, 4500, 20)
    await reached(PREFILL, lambda p, d: p["sequences_running"] >= 1 and p["sequences_waiting"] >= 1)
    return groups


async def expect_survivors(client: Client, groups: dict[str, list[Reply]]) -> None:
    """P is gone: what was on D before goes on, in turn, with the right tokens."""
    streams = [reply for reply in groups[DECODE] if reply.way.is_stream]
    await until(lambda: all(len(reply.tokens) >= SHOWN for reply in streams), "decoding goes on")
    for reply in streams:
        assert reply.tokens[:SHOWN] == oracle_greedy("qwen3", tuple(reply.prompt), SHOWN)
    await client.cut(groups[DECODE])
    for reply in await client.ended(groups[READY]):
        assert reply.tokens == oracle_greedy("qwen3", tuple(reply.prompt), 20), reply


async def expect_failures(client: Client, replies: list[Reply], side: str, bound_s: float = 30.0) -> None:
    for reply in await client.ended(replies, bound_s):
        said = f"{reply.error} {reply.headers.get('x-ksana-lab-failed-node', '')}"
        assert reply.error and not reply.is_cut and f"{side} node" in said, reply
        assert reply.status in ((200, 502, 503, 504) if reply.tokens else (502, 503, 504)), reply
        shown = reply.tokens[:SHOWN]
        assert not shown or shown == oracle_greedy("qwen3", tuple(reply.prompt), len(shown)), reply


async def expect_service(cluster: Cluster) -> None:
    await until(lambda: is_routable(cluster), "a routable pair")
    async with Client(cluster) as client:
        replies = [client.ask(way, prompt_of(33, i), 8) for i, way in enumerate(WAYS)]
        for reply in await client.ended(replies):
            assert reply.tokens == oracle_greedy("qwen3", tuple(reply.prompt), 8), reply
    await nothing_left(cluster)


def is_routable(cluster: Cluster) -> bool:
    return all(pair["is_routable"] for pair in cluster.status()["pairs"]) and bool(cluster.status()["pairs"])


async def expect_refusal(cluster: Cluster, side: str) -> None:
    """A request that comes while one side is away."""
    async with Client(cluster) as client:
        replies = await client.ended([client.ask(way, [5, 6, 7], 4) for way in WAYS])
        for reply in replies:
            assert reply.status in (502, 503) and side in reply.error, reply


def pids(cluster: Cluster) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in cluster.status()["processes"]}


async def restart(cluster: Cluster, name: str) -> None:
    before = pids(cluster)
    await asyncio.to_thread(cluster.restart, name)
    after = pids(cluster)
    assert {n: pid for n, pid in after.items() if n != name} == {n: pid for n, pid in before.items() if n != name}


async def kill(cluster: Cluster, name: str, what: str) -> None:
    if what == "node":
        await asyncio.to_thread(cluster.kill, name)
    else:
        family(cluster, name)[1].kill()
        await until(lambda: pids(cluster)[name] is None, "the end of a node without its engine")


@pytest.mark.parametrize(("backend", "what"), [("tcp", "node"), ("shm", "engine")])
async def test_p_is_killed(clusters, backend, what):
    cluster = clusters(backend)
    async with Client(cluster) as client:
        groups = await fill(client)
        await kill(cluster, "prefill0", what)
        await expect_failures(client, groups[TRANSFER] + groups[PREFILL], "prefill")
        await expect_survivors(client, groups)
        await nothing_left(cluster, without="prefill0")
    await expect_refusal(cluster, "prefill")
    await restart(cluster, "prefill0")
    await expect_service(cluster)


@pytest.mark.parametrize(("backend", "what"), [("shm", "node"), ("tcp", "engine")])
async def test_d_is_killed(clusters, backend, what):
    cluster = clusters(backend)
    async with Client(cluster) as client:
        await fill(client)
        await kill(cluster, "decode0", what)
        await expect_failures(client, client.replies, "decode")
        await nothing_left(cluster, without="decode0")
    await expect_refusal(cluster, "decode")
    await restart(cluster, "decode0")
    await expect_service(cluster)


async def test_the_router_is_killed(clusters):
    cluster = clusters("tcp")
    known = {node["node_id"] for node in cluster.status()["nodes"]}
    async with Client(cluster) as client:
        await fill(client)
        cluster.kill("router")
        for reply in await client.ended(client.replies):
            assert reply.is_cut, reply
        await nothing_left(cluster)
    await restart(cluster, "router")
    assert {node["node_id"] for node in cluster.status()["nodes"]} == known
    await expect_service(cluster)


async def test_clients_go_away(clusters):
    for backend in ("shm", "tcp"):
        cluster = clusters(backend)
        async with Client(cluster) as client, Client(cluster) as leaving:
            await fill(leaving)
            stays = client.ask(WAYS[0], prompt_of(12, 1), 20)
            await leaving.cut(leaving.replies)
            await client.ended([stays])
            assert stays.tokens == oracle_greedy("qwen3", tuple(stays.prompt), 20)
        await nothing_left(cluster)
        await expect_service(cluster)


async def test_a_client_goes_away_in_the_middle_of_its_question(clusters):
    cluster = clusters("tcp")
    _, writer = await asyncio.open_connection(*cluster.url.removeprefix("http://").split(":"))
    writer.write(b'POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"prompt":')
    await writer.drain()
    writer.close()
    await expect_service(cluster)


async def test_a_node_stands_still(clusters):
    """Its sockets stay open and nobody says anything: only time tells. Nothing needs a restart when it goes on."""
    await asyncio.gather(stand_still(clusters("tcp"), "prefill"), stand_still(clusters("shm"), "decode"))


async def stand_still(cluster: Cluster, side: str) -> None:
    name = node_of(cluster, Role(side))
    async with Client(cluster) as client:
        groups = await fill(client)
        stopped = family(cluster, name)
        try:
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            if side == "prefill":
                await expect_failures(client, groups[TRANSFER] + groups[PREFILL], side, 60)
                await expect_survivors(client, groups)
            else:
                await expect_failures(client, client.replies, side, 60)
            await expect_refusal(cluster, side)
            await nothing_left(cluster, without=name)  # over tcp D needs nobody's word; P lets go when the session ends
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)
    await nothing_left(cluster)
    await expect_service(cluster)


async def test_what_waits_too_long_is_told_so(clusters):
    cluster = clusters("small")
    async with Client(cluster) as client:
        engine = family(cluster, "prefill0")[1]
        engine.send_signal(signal.SIGSTOP)
        try:
            for reply in await client.ended([client.ask(way, prompt_of(40, 3), 8) for way in WAYS]):
                assert reply.status == 504 and "no first token within 4 s" in reply.error, reply
        finally:
            engine.send_signal(signal.SIGCONT)
    await expect_service(cluster)


async def test_hundreds_of_requests_many_of_them_abandoned_on_nodes_with_little_room(clusters):
    cluster = clusters("small")
    dice, asked = random.Random(5), iter(range(300))
    prompts = [prompt_of(size, size) for size in (1, 3, 16, 17, 40, 80, 129, 200, 260, 300)]
    answers = [oracle_greedy("qwen3", tuple(prompt), 16) for prompt in prompts]
    outcomes: Counter[str] = Counter()

    async def visit(client: Client) -> str:
        number, size = dice.randrange(len(prompts)), dice.choice((1, 2, 5, 16))
        reply = client.ask(dice.choice(WAYS), prompts[number], size)
        if dice.random() < 0.3:
            await asyncio.wait([reply.task], timeout=0.5 * dice.random() ** 2)
            if not reply.task.done():
                await client.cut([reply])
                return "cut"
        await client.ended([reply])
        assert reply.tokens == answers[number][: len(reply.tokens)], reply
        if reply.status == 429:
            assert reply.headers["Retry-After"] == "1"
            return "queue full"
        assert reply.is_complete or "no first token within 4 s" in reply.error, reply
        return "complete" if reply.is_complete else "too late"

    async def visitor(client: Client) -> None:
        for _ in asked:
            while (outcome := await visit(client)) == "queue full":
                outcomes[outcome] += 1
                await asyncio.sleep(0.05)  # a fraction of what Retry-After asks for
            outcomes[outcome] += 1

    async with Client(cluster) as client:
        await asyncio.gather(*(visitor(client) for _ in range(16)))
    assert outcomes["complete"] > 100 and outcomes["cut"] > 10 and outcomes["queue full"], outcomes
    await nothing_left(cluster)
    counters = await gauges(cluster.plan.nodes[0].url)
    assert counters["transfer_bad_messages"] == 0
    await expect_service(cluster)


async def test_a_stranger_request_to_a_node_is_served_there(clusters):
    """No pair's headers: the node serves it alone, and waits for nobody."""
    cluster = clusters("small")
    for node in cluster.plan.nodes:
        async with aiohttp.ClientSession(trust_env=False) as session:
            async with session.post(f"{node.url}/generate", json=WAYS[1].body([5, 6, 7], 6)) as answer:
                assert (await answer.json())["output_token_ids"] == [oracle_greedy("qwen3", (5, 6, 7), 6)]
    await nothing_left(cluster)
