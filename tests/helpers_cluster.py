"""Clients of a running cluster, one for each way of asking, and what its nodes say of themselves."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from ksana_lab.cluster.local import Cluster
from ksana_lab.types import Role

BOUND_S = 30.0  # generous: for what takes milliseconds on an idle machine


@dataclass(frozen=True)
class Way:
    """One of the four ways to ask for greedy tokens."""

    name: str
    path: str
    is_stream: bool

    def body(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        if self.path == "/generate":
            config = {"max_new_tokens": max_tokens, "ignore_eos": True}
            return {"input_tokens": prompt, "stream": self.is_stream, "sampling_config": config}
        extra = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"prompt": prompt, "stream": self.is_stream, "max_tokens": max_tokens, **extra}


WAYS = (
    Way("generate stream", "/generate", True),
    Way("generate", "/generate", False),
    Way("completions stream", "/v1/completions", True),
    Way("completions", "/v1/completions", False),
)


@dataclass
class Reply:
    """What became of one request. ``tokens`` so far; ``error``: the server's words, or the client's own for a cut connection."""

    way: Way
    prompt: list[int]
    max_tokens: int
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    error: str = ""
    is_cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    @property
    def is_complete(self) -> bool:
        return not self.error and len(self.tokens) == self.max_tokens

    def take(self, piece: dict[str, Any]) -> None:
        if "error" in piece:
            self.error = json.dumps(piece["error"])
        elif "output_token_ids" in piece:
            self.tokens = piece["output_token_ids"][0]
        else:
            self.tokens = self.tokens + piece["choices"][0]["token_ids"]

    def __repr__(self) -> str:
        return f"<{self.way.name}: {len(self.prompt)} + {len(self.tokens)}/{self.max_tokens}, {self.status} {self.error}>"


class Client:
    """Asks one cluster. ``async with`` it: leaving cuts what still runs."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.replies = cluster, []

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(self.cluster.url, connector=aiohttp.TCPConnector(limit=0), trust_env=False)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.cut(self.replies)
        await self._session.close()

    def ask(self, way: Way, prompt: list[int], max_tokens: int) -> Reply:
        reply = Reply(way, prompt, max_tokens)
        reply.task = asyncio.create_task(self._run(reply))
        self.replies.append(reply)
        return reply

    async def cut(self, replies: list[Reply]) -> None:
        """Go away without waiting for the answers."""
        for reply in replies:
            reply.task.cancel()
        await asyncio.gather(*(reply.task for reply in replies), return_exceptions=True)

    async def ended(self, replies: list[Reply], bound_s: float = BOUND_S) -> list[Reply]:
        _, pending = await asyncio.wait([reply.task for reply in replies], timeout=bound_s)
        assert not pending, f"no end within {bound_s:g} s: {[reply for reply in replies if not reply.task.done()]}"
        for reply in replies:
            await reply.task
        return replies

    async def _run(self, reply: Reply) -> None:
        try:
            async with self._session.post(reply.way.path, json=reply.way.body(reply.prompt, reply.max_tokens)) as response:
                reply.status, reply.headers = response.status, dict(response.headers)
                if reply.way.is_stream and response.status == 200:
                    async for piece in _pieces(response, b"\0" if reply.way.path == "/generate" else b"\n\n"):
                        reply.take(piece)
                else:
                    reply.take(await response.json())
        except aiohttp.ClientError as error:
            reply.error, reply.is_cut = repr(error), True


async def _pieces(response: aiohttp.ClientResponse, end: bytes) -> AsyncIterator[dict[str, Any]]:
    held = b""
    async for data in response.content.iter_any():
        *whole, held = (held + data).split(end)
        for text in whole:
            text = text.removeprefix(b"data: ").strip()
            if text and text != b"[DONE]":
                yield json.loads(text)


async def until(probe: Callable[[], Any], what: str, bound_s: float = BOUND_S) -> Any:
    """Ask ``probe`` (it may be async) until its answer is true: other processes offer no event to wait for."""
    deadline = time.monotonic() + bound_s
    while True:
        answer = probe()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {bound_s:g} s: {what}"
        await asyncio.sleep(0.01)


async def gauges(url: str) -> dict[str, float]:
    """A node's /metrics without its labels: name (without the prefix) -> value."""
    async with aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(5)) as session:
        async with session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.partition("{")[0].removeprefix("ksana_lab_"): float(value) for name, _, value in samples}


async def levels(cluster: Cluster) -> dict[str, dict[str, float]]:
    """Gauges of every node, by its name."""
    nodes = cluster.plan.nodes
    return dict(zip([n.name for n in nodes], await asyncio.gather(*(gauges(n.url) for n in nodes)), strict=True))


async def nothing_left(cluster: Cluster, without: str = "", bound_s: float = BOUND_S) -> None:
    """Every surviving node has all its blocks back and waits for nothing."""
    for node in cluster.plan.nodes:
        if node.name != without:
            last: dict[str, float] = {}

            async def is_clean(url: str = node.url, last: dict[str, float] = last) -> bool:
                last.update(await gauges(url))
                return not any(left_over(last).values())

            try:
                await until(is_clean, "nothing left", bound_s)
            except AssertionError:
                raise AssertionError(f"{node.name} keeps {left_over(last)}\n{cluster.logs(node.name)}") from None


def left_over(gauges: dict[str, float]) -> dict[str, float]:
    """What must be 0 on a node without work."""
    left = {name: gauges[f"sequences_{name}"] for name in ("waiting", "running", "waiting_kv", "held", "in_flight", "unstarted")}
    left |= {"leaked": gauges["kv_blocks_leaked"], "used": gauges["kv_blocks"] - gauges["kv_blocks_free"]}
    return left | {name: value for name, value in gauges.items() if name.startswith("transfer_state_") or name == "transfer_quarantined"}


def family(cluster: Cluster, name: str) -> list[psutil.Process]:
    """A node's processes: the API's first, then its engine's."""
    pid = next(process["pid"] for process in cluster.status()["processes"] if process["name"] == name)
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def node_of(cluster: Cluster, role: Role) -> str:
    return next(node.name for node in cluster.plan.nodes if node.role is role)


def prompt_of(length: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, 1000) for _ in range(length)]
