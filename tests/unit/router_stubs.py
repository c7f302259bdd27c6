"""A router on a loopback socket and stub nodes whose replies a test writes; for the tests of the router."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
from aiohttp import web

from ksana_lab.config.router import RouterConfig
from ksana_lab.protocol.node import FIRST_TOKEN_HEADER
from ksana_lab.router.app import Router, _Server, bind, uvicorn_config

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ACK = {FIRST_TOKEN_HEADER: "prefill"}
SSE = {"content-type": "text/event-stream"}


class StubNode:
    """Answers every POST with ``handler``; ``gone`` is set when the router closed a connection before the reply was whole."""

    def __init__(self, role: str, handler: Handler) -> None:
        self.role, self.handler = role, handler
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.asked, self.answered, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.addr = self.node_id = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.addr = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        self.asked.set()
        try:
            response = await self.handler(request)
            self.answered.set()
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone.set()
            raise

    def registration(self, **more: object) -> dict:
        port = int(self.addr.rpartition(":")[2])
        return {
            "inference_addr": self.addr,
            "group_role": self.role,
            "node_rank": 0,
            "coordinator_addr": f"127.0.0.1:{port - 1 if port > 60000 else port + 1}",
            "world_size": 1,
            "devices": [{"device_id": 0, "device_ip": "127.0.0.1"}],
            "incarnation": "1",
            **more,
        }


def json_reply(status: int, body: object, headers: dict | None = None) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return handler


def stream(*steps: bytes | asyncio.Event | str, headers: dict | None = None) -> Handler:
    """A chunked reply of these pieces. An Event is waited for; "hang" waits for ever; "abort" cuts the connection."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        if not headers or "content-type" not in headers:
            response.headers.popall("content-type", None)
        response.enable_chunked_encoding()
        await response.prepare(request)
        for step in steps:
            if isinstance(step, bytes):
                await response.write(step)
            elif isinstance(step, asyncio.Event):
                await step.wait()
            elif step == "hang":
                await asyncio.Event().wait()
            else:
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError
        await response.write_eof()
        return response

    return handler


def hang() -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    return handler


def obj(*tokens: int) -> bytes:
    """One object of a cumulative /generate stream."""
    return json.dumps({"texts": ["".join(map(chr, tokens))], "output_token_ids": [list(tokens)]}).encode() + b"\0"


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


class RunningRouter:
    def __init__(self, router: Router, url: str, session: aiohttp.ClientSession) -> None:
        self.router, self.url, self.session = router, url, session

    async def post(self, path: str, body: object = None, **options: object) -> aiohttp.ClientResponse:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        headers = {"content-type": "application/json", **options.pop("headers", {})}  # type: ignore[dict-item]
        return await self.session.post(self.url + path, data=data, headers=headers, **options)

    async def call(self, path: str, body: object = None, **options: object) -> tuple[int, dict]:
        async with await self.post(path, body, **options) as response:
            return response.status, json.loads(await response.read())

    async def nodes(self) -> dict:
        async with self.session.get(self.url + "/nodes") as response:
            return await response.json()

    async def add(self, node: StubNode, **more: object) -> None:
        status, answer = await self.call("/RegisterNode", node.registration(**more))
        assert status == 201, answer
        node.node_id = answer["node_id"]

    async def connect(self, prefill: StubNode, decode: StubNode) -> str:
        """Make a routable pair of two registered nodes."""
        key = f"{prefill.addr}__{decode.addr}"
        status, answer = await self.call("/RegisterCommId", {"node_id": prefill.node_id, "comm_key": key, "comm_id": "id"})
        assert status == 200, answer
        for node in (prefill, decode):
            await self.beat(node, connected=[key])
        return key

    async def beat(self, node: StubNode, connected: list[str] | None = None, **more: object) -> dict:
        status, answer = await self.call("/Heartbeat", {"node_id": node.node_id, "connected_comm_keys": connected, **more})
        assert status == 200, answer
        return answer


class _ReadyServer(_Server):
    def __init__(self, config: object) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.is_ready = asyncio.Event()

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        self.is_ready.set()


@contextlib.asynccontextmanager
async def running_router(**options: object) -> AsyncIterator[RunningRouter]:
    options = {"port": 0, "database_url": "sqlite://", **options}
    router = Router(RouterConfig(**options))  # type: ignore[arg-type]
    router.load()
    with bind("127.0.0.1", 0) as listener:
        server = _ReadyServer(uvicorn_config(router))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.is_ready.wait()
        async with aiohttp.ClientSession() as session:
            yield RunningRouter(router, f"http://127.0.0.1:{listener.getsockname()[1]}", session)
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def stub_nodes(*nodes: StubNode) -> AsyncIterator[None]:
    for node in nodes:
        await node.start()
    try:
        yield
    finally:
        for node in nodes:
            await node.stop()


@contextlib.asynccontextmanager
async def one_pair(prefill: Handler, decode: Handler, **options: object) -> AsyncIterator[tuple[RunningRouter, StubNode, StubNode]]:
    """A router with one routable pair."""
    p, d = StubNode("prefill", prefill), StubNode("decode", decode)
    async with stub_nodes(p, d), running_router(**options) as router:
        await router.add(p)
        await router.add(d)
        await router.connect(p, d)
        yield router, p, d
