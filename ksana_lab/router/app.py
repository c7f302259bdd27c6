"""The router's process: control routes (KsanaLLM's RegisterNode, Heartbeat, RegisterCommId; UnregisterNode, /nodes, /health, /metrics,
/v1/models) and the proxied ones, one asyncio loop, state in memory with a store behind it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import json
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import field_validator

from ksana_lab import log
from ksana_lab.config.router import RouterConfig
from ksana_lab.errors import ConfigError
from ksana_lab.protocol.node import Heartbeat, RegisterCommId, RegisterNode, UnregisterNode
from ksana_lab.router import policies
from ksana_lab.router.comm_groups import CommGroups
from ksana_lab.router.exchange import Failure, Receive, Send, url_of
from ksana_lab.router.proxy import Proxy
from ksana_lab.router.registry import Node, Refused, Registry
from ksana_lab.router.store import Store
from ksana_lab.router.telemetry import Telemetry
from ksana_lab.tracing.recorder import NullRecorder, open_recorder
from ksana_lab.types import NodeAddr, Role, family_of

logger = logging.getLogger(__name__)


class CheckedRegisterNode(RegisterNode):
    @field_validator("inference_addr")
    @classmethod
    def _has_host_and_port(cls, value: str) -> str:
        NodeAddr.parse(value)
        return value


class Router:
    """An ASGI application. ``load`` it first; ``open`` and ``close`` are called by the server's lifespan.

    ``clock``: Unix seconds that never run backwards."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] | None = None) -> None:
        self.config = config
        clock = clock or steady_clock()
        self.store = Store(config.resolved_database_url, config.cluster_name)
        self.registry = Registry(config.cluster_name, config.heartbeat_timeout_s, clock, self.store)
        self.groups = CommGroups(self.registry, self.store)
        self.telemetry = Telemetry(_recorder(config.trace_dir), self.registry, self.groups)
        policy = policies.make(config.policy)
        self.proxy = Proxy(config, self.registry, self.groups, policy, self.store.request_ids, self.telemetry)
        self._control = _control_app(self)
        self._timer: asyncio.Task[None] | None = None
        self._started_s = time.monotonic()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and _is_proxied(scope["path"]):
            await self.proxy(scope, receive, send)
        else:
            await self._control(scope, receive, send)

    def load(self) -> None:
        """Open the database and take over what an earlier process knew; blocks. Raises ConfigError when it cannot be used."""
        snapshot = self.store.open()
        self.registry.restore(snapshot.nodes)
        self.groups.restore(snapshot.comm_ids)
        if snapshot.nodes:
            logger.info("%d nodes are known from before", len(snapshot.nodes))

    async def open(self) -> None:
        """``load`` comes first."""
        await self.proxy.open()
        self._timer = asyncio.get_running_loop().create_task(self._tick())

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self.proxy.close()
        await asyncio.to_thread(self.store.close)
        self.telemetry.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.proxy.check_interval_s)
            try:
                self.registry.expire()
                self.groups.expire()
                self.proxy.check()
            except Exception:  # every time-out of the router hangs on this loop: it must go on
                logger.exception("the router's timer")

    # ---- what the control routes answer ------------------------------------------------------------------------------

    def register(self, request: RegisterNode) -> dict[str, Any]:
        node = self.registry.register(request)
        return {"node_id": node.node_id, "is_online": True, "last_heartbeat": _iso_utc(node.last_heartbeat_s)}

    def heartbeat(self, beat: Heartbeat) -> dict[str, Any]:
        node = self.registry.heartbeat(beat)
        addresses, ids = self.groups.answer(node)
        return {
            "node_id": node.node_id,
            "is_online": True,
            "group_ready": self.registry.is_ready(self.registry.group(node.inference_addr, node.role)),
            "coordinator_addr": node.coordinator_addr,
            "node_role": node.role.value,
            "timestamp": datetime.datetime.fromtimestamp(node.last_heartbeat_s).isoformat(),
            "comm_group_to_address": addresses,
            "comm_group_to_id": ids,
        }

    def nodes(self) -> dict[str, Any]:
        routable = self.groups.routes()
        return {
            "cluster_name": self.config.cluster_name,
            "policy": self.config.policy,
            "nodes": [self._node(node) for node in self.registry],
            "pairs": [
                {
                    "comm_key": state.comm_key,
                    "is_routable": state.why_not is None,
                    "why_not": state.why_not,
                    "comm_id_set": state.comm_id_set,
                    "prefill_connected": state.prefill_connected,
                    "decode_connected": state.decode_connected,
                    "in_flight": state.num_requests,
                }
                for state in self.groups.states()
            ],
            "mixed": [
                {
                    "inference_addr": node.inference_addr,
                    "is_routable": any(route.decode is node for route in routable),
                    "in_flight": node.num_requests,
                }
                for node in self.registry
                if node.role is Role.MIXED
            ],
        }

    def _node(self, node: Node) -> dict[str, Any]:
        return {
            "node_id": node.node_id,
            "inference_addr": node.inference_addr,
            "coordinator_addr": node.coordinator_addr,
            "role": node.role.value,
            "node_rank": node.node_rank,
            "world_size": node.world_size,
            "is_online": self.registry.is_online(node),
            "last_heartbeat_s_ago": round(self.registry.silent_s(node), 3),
            "incarnation": node.incarnation,
            "load": node.load.model_dump(exclude_none=True),
            "in_flight": node.num_requests,
            "in_flight_tokens": node.num_tokens,
        }

    def health(self) -> dict[str, Any]:
        """``status``: "ok" when requests can be served, else "waiting" with the reason; a router without nodes is healthy but of no use."""
        routes = self.groups.routes()
        return {
            "status": "ok" if routes else "waiting",
            "reason": None if routes else self.groups.why_no_route(),
            "routes": len(routes),
            "nodes_online": sum(self.registry.is_online(node) for node in self.registry),
            "nodes_known": len(self.registry),
            "in_flight": self.proxy.num_requests,
            "database": self.store.error or "ok",
            "uptime_s": round(time.monotonic() - self._started_s, 1),
        }

    async def models(self) -> Response:
        """What the first node that answers says; all nodes of a cluster serve one model."""
        assert self.proxy.session is not None
        timeout = aiohttp.ClientTimeout(total=self.config.connect_timeout_s)
        reasons = []
        for node in {node.inference_addr: node for route in self.groups.routes() for node in route.nodes}.values():
            try:
                async with self.proxy.session.get(url_of(node, "/v1/models"), timeout=timeout, allow_redirects=False) as response:
                    if response.status == 200:
                        return Response(await response.read(), media_type="application/json")
                    reasons.append(f"{node} answered {response.status}")
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                reasons.append(f"{node}: {error or type(error).__name__}")
        reason = "; ".join(reasons) or self.groups.why_no_route()
        failure = Failure("no_route", 503, "unavailable", f"No available nodes for processing: {reason}")
        return JSONResponse(failure.body(), 503, headers={"retry-after": "1"})


def _is_proxied(path: str) -> bool:
    return path == "/generate" or path.startswith(("/v1/", "/v2/"))


def _control_app(router: Router) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await router.open()
        try:
            yield
        finally:
            await router.close()

    app = FastAPI(title="ksana_lab router", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # FastAPI's own form, in ASCII: what it quotes of the request may be text that UTF-8 cannot hold.
        return Response(json.dumps({"detail": jsonable_encoder(error.errors())}), 422, media_type="application/json")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # starlette logs it
        return JSONResponse({"detail": f"Internal error: {type(error).__name__}"}, 500)

    @app.post("/RegisterNode", status_code=201)
    async def register_node(request: CheckedRegisterNode) -> dict[str, Any]:
        return router.register(request)

    @app.post("/UnregisterNode")
    async def unregister_node(request: UnregisterNode) -> dict[str, Any]:
        router.registry.sign_off(request.node_id)
        return {"status": "OK"}

    @app.post("/Heartbeat")
    async def heartbeat(beat: Heartbeat) -> dict[str, Any]:
        return router.heartbeat(beat)

    @app.post("/RegisterCommId")
    async def register_comm_id(request: RegisterCommId) -> dict[str, Any]:
        router.groups.register_comm_id(request)
        return {"status": "OK", "comm_id": request.comm_id}

    @app.get("/nodes")
    async def nodes() -> dict[str, Any]:
        return router.nodes()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return router.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.telemetry.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return await router.models()

    return app


class _Server(uvicorn.Server):
    """Says when it listens; and ends by returning, where uvicorn would raise the signal again that stopped it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            logger.info("listening on http://%s", NodeAddr(*listener.getsockname()[:2]))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def uvicorn_config(router: Router) -> uvicorn.Config:
    grace_s = max(1, round(router.config.shutdown_grace_s))
    return uvicorn.Config(
        router,
        http="httptools",
        loop="auto",  # uvloop where it runs
        ws="none",
        proxy_headers=False,  # nobody here asks who the client is
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=grace_s,
        backlog=4096,
    )


def serve(config: RouterConfig) -> int:
    """Serve until SIGINT or SIGTERM; the exit code: 0, or 2 when the port, the database or a directory cannot be had."""
    log.setup("router", level=config.log_level)
    try:
        _log_to(config.log_dir)
        with bind(config.host, config.port) as listener:
            router = Router(config)
            router.load()
            logger.info("cluster %s, policy %s", config.cluster_name, config.policy)
            sys.setswitchinterval(0.0005)  # s; the store's thread must not hold up the token path for the default 5 ms
            _allow_many_sockets()
            gc.freeze()  # what was imported is here to stay: no collection need walk it
            _Server(uvicorn_config(router)).run(sockets=[listener])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _allow_many_sockets() -> None:
    """Each request in flight has three; the usual limit of 1,024 files would end at 340 of them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls its limit infinite and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_to(log_dir: str | None) -> None:
    """Also to ``<log_dir>/router.log``. Raises ConfigError."""
    if log_dir is None:
        return
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(log_dir) / "router.log", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the router's log_dir {log_dir} cannot be written: {error.strerror}") from None
    root = logging.getLogger()
    handler.setFormatter(root.handlers[0].formatter)
    root.addHandler(handler)


def _recorder(trace_dir: str | None) -> NullRecorder:
    try:
        return open_recorder(trace_dir, "router")
    except OSError as error:
        raise ConfigError(f"the router's trace_dir {trace_dir} cannot be written: {error.strerror}") from None


def bind(host: str, port: int) -> socket.socket:
    """A listening-to-be socket. Raises ConfigError that names the address."""
    family = family_of(host)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"the router cannot listen on {NodeAddr(host, port)}: {error.strerror}; give another --host or --port") from None
    return listener


def steady_clock() -> Callable[[], float]:
    """Unix seconds that follow the monotonic clock: comparable with what an earlier process wrote, and never set back."""
    offset_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset_s


def _iso_utc(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, tz=datetime.timezone.utc).isoformat()
