"""A node's API process: HTTP server, engine client, registrar, and what an operator asks (/health, /metrics, /version, profiling).

``serve`` is the entry point; ``NodeServer`` is the same on a running loop. The HTTP port is open from the start, so that /health tells
what is still missing; requests get 503 until the engine is ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from ksana_lab import __version__
from ksana_lab.config.engine import EngineConfig
from ksana_lab.errors import CheckpointError, ConfigError, EngineDead, InvalidRequest, ServiceUnavailable
from ksana_lab.server.endpoint import Endpoint, GeneratingRoute, Receive, Scope, Send, StallWatch, error_json, retry_headers
from ksana_lab.server.engine_client import EngineClient
from ksana_lab.server.generate_api import GenerateEndpoint
from ksana_lab.server.generation import GenerationService
from ksana_lab.server.metrics import CONTENT_TYPE, ServerMetrics
from ksana_lab.server.openai_api import ChatEndpoint, CompletionEndpoint
from ksana_lab.server.registrar import ENGINE_SILENCE_S, Registrar
from ksana_lab.server.tokenizing import Tokenizer
from ksana_lab.tracing.recorder import open_recorder
from ksana_lab.types import NodeAddr, Role, family_of

log = logging.getLogger(__name__)

ENGINE_START_TIMEOUT_S = 3600.0  # reading a large model from a slow disk
STATUS_TIMEOUT_S = 1.0  # for /health and /metrics
SHUTDOWN_GRACE_S = 5  # for the last answers
KEEP_ALIVE_S = 200  # the reference's; a router's pooled connection must outlive a quiet minute

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2


def serve(config: EngineConfig, host: str, port: int, api_address: str, engine_alive: Callable[[], str | None]) -> int:
    """Serve one node until SIGINT, SIGTERM or the end of its engine. Blocking; returns the exit code.

    ``api_address``: where the engine connects (bound here). ``engine_alive``: None while the engine's process lives, else its log's end."""
    try:
        tokenizer = Tokenizer.load(config.tokenizer.tokenizer_dir or config.model.model_dir)
    except CheckpointError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    try:
        listener = socket.create_server((host, port), family=family_of(host), backlog=2048, reuse_port=False)
    except OSError as error:
        log.error("cannot listen on %s:%d: %s; is another server running there? choose another --port", host, port, error.strerror)
        tokenizer.close()
        return EXIT_CONFIG
    sys.setswitchinterval(0.0005)  # s; tokenising and trace threads must not hold up the token path for the default 5 ms
    with listener:
        try:
            server = NodeServer(config, tokenizer, api_address, engine_alive)
        except ConfigError as error:
            log.error("%s", error)
            tokenizer.close()
            return EXIT_CONFIG
        return uvloop.run(server.run(listener))


class NodeServer:
    """One node's HTTP server and everything behind it but the engine. ``run`` once. Raises ConfigError when it cannot trace."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        api_address: str,
        engine_alive: Callable[[], str | None],
        *,
        probe_period_s: float = 1.0,
        silence_limit_s: float = ENGINE_SILENCE_S,
    ) -> None:
        connector = config.connector
        self.config, self._tokenizer, self._silence_limit_s = config, tokenizer, silence_limit_s
        self.model_name = Path(config.model.model_dir).name or config.model.model_dir
        self.engine = EngineClient(
            api_address,
            engine_alive,
            max_num_waiting=config.scheduler.max_num_waiting,
            waiting_timeout_s=config.scheduler.waiting_timeout_s,
            probe_period_s=probe_period_s,
            node=f"{connector.role.value} node",
        )
        self.registrar = Registrar(connector, self.engine, silence_limit_s=silence_limit_s) if connector.router_addr is not None else None
        self.metrics = ServerMetrics(connector.role.value)
        self.metrics.watch(self._gauges, lambda: self.engine.status)
        try:
            self.recorder = open_recorder(config.runtime.trace_dir, f"{connector.role.value}-api")
        except OSError as error:
            raise ConfigError(f"ksana_lab.trace_dir {config.runtime.trace_dir} cannot be written: {error.strerror or error}") from error
        self._service = GenerationService(config, self.engine, tokenizer, self.metrics, self.recorder)
        self._generating = self._generating_routes()
        self._control = self._control_app()
        self._http: _HttpServer | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    async def run(self, listener: socket.socket) -> int:
        """Serve on ``listener`` until ``stop`` or the engine's end. Returns the exit code."""
        self.engine.open()
        self._http = _HttpServer(self, self._before_shutdown)
        log.info("listening on http://%s", NodeAddr(*listener.getsockname()[:2]))
        lifecycle = asyncio.create_task(self._follow_engine(), name="follow-engine")
        try:
            await self._http.serve(sockets=[listener])
        finally:
            lifecycle.cancel()
            await asyncio.gather(lifecycle, return_exceptions=True)
            if self.registrar is not None:
                await self.registrar.close()
            await self.engine.close()
            self._tokenizer.close()
            self.recorder.close()
        return EXIT_FAILED if self.engine.failure is not None else EXIT_OK

    def stop(self) -> None:
        """Begin a graceful shutdown, as SIGTERM does."""
        if self._http is not None:
            self._http.should_exit = True

    async def _follow_engine(self) -> None:
        """Register when the engine is ready; end the server when it is gone, for a node without an engine is of no use."""
        registering: asyncio.Task[None] | None = None
        try:
            ready = await self.engine.wait_ready(ENGINE_START_TIMEOUT_S)
            log.info("ready: %d KV blocks of %d tokens on %s", ready.num_blocks, ready.block_size, ready.device)
            if self.registrar is not None:
                registering = asyncio.create_task(self.registrar.run(), name="registrar")
                registering.add_done_callback(_log_failure)
            await self.engine.failed.wait()
        except EngineDead as error:
            log.error("%s", error)
        finally:
            if registering is not None:
                registering.cancel()
        self.stop()

    def _before_shutdown(self) -> None:
        self.engine.fail_requests(ServiceUnavailable(f"this {self.config.connector.role.value} node is shutting down"))

    # ---- routes ------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application. Generating routes are served directly: per-chunk cost matters there."""
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._generating.get(scope["path"])
            if route is not None:
                await route(scope, receive, send)
                return
        await self._control(scope, receive, send)

    def _generating_routes(self) -> dict[str, GeneratingRoute]:
        stalls = StallWatch()
        endpoints: dict[str, Endpoint] = {
            "/generate": GenerateEndpoint(self._service),
            "/v1/completions": CompletionEndpoint(self._service, self.model_name),
            "/v1/chat/completions": ChatEndpoint(self._service, self.model_name),
        }
        return {path: GeneratingRoute(endpoint, self._service, stalls) for path, endpoint in endpoints.items()}

    def _control_app(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/version", self._version),
            Route("/v1/models", self._models),
            Route("/models", self._models),
            Route("/start_profile", self._start_profile, methods=["POST"]),
            Route("/stop_profile", self._stop_profile, methods=["POST"]),
            *(Route(path, route, methods=["POST"]) for path, route in self._generating.items()),  # for 405
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})  # type: ignore[dict-item]
        app.router.redirect_slashes = False  # a redirect names this node, and would lead a router's client past the router
        return app

    async def _health(self, request: Request) -> HttpResponse:
        await self._refresh_status()
        reasons = self.problems()
        verdict = {"status": "unhealthy" if reasons else "healthy", "reasons": reasons}
        return _json(verdict | self._state(), 503 if reasons else 200)

    async def _refresh_status(self) -> None:
        """Or keep the last one: an engine that is dead or in a long step is told by ``problems`` and by the gauges beside it."""
        with contextlib.suppress(EngineDead):
            await self.engine.get_status(STATUS_TIMEOUT_S)

    def problems(self) -> list[str]:
        """Why this node cannot serve its part; [] when it can."""
        if self.engine.failure is not None:
            return [f"the engine is gone: {self.engine.failure}"]
        if self.engine.ready is None:
            return ["the engine is still loading its model"]
        reasons = []
        if self.engine.silence_s > self._silence_limit_s:
            reasons.append(f"the engine has said nothing for {self.engine.silence_s:.0f} s")
        if self.registrar is not None:
            if (problem := self.registrar.problem()) is not None:
                reasons.append(problem)
            elif self._lacks_peer():
                peer = "decode" if self.config.connector.role is Role.PREFILL else "prefill"
                reasons.append(f"no {peer} node is connected; known pairs: {sorted(self.registrar.comm_ids) or 'none'}")
        return reasons

    def _lacks_peer(self) -> bool:
        return self.config.connector.role.is_disaggregated and not (self.engine.status and self.engine.status.connected)

    def _state(self) -> dict[str, Any]:
        ready, status, registrar = self.engine.ready, self.engine.status, self.registrar
        state: dict[str, Any] = {
            "role": self.config.connector.role.value,
            "model": self.model_name,
            "engine": {
                "ready": ready is not None,
                "alive": self.engine.failure is None,
                "silent_s": round(self.engine.silence_s, 3),
                "sequences_in_flight": self.engine.num_in_flight,
            },
        }
        if status is not None:
            fields = (
                "num_waiting", "num_running", "num_waiting_kv", "num_held", "num_swapped", "num_blocks", "num_free_blocks",
                "num_host_blocks", "num_free_host_blocks", "num_leaked_blocks",
            )  # fmt: skip
            state["engine"] |= {name: getattr(status, name) for name in fields}
        if registrar is not None:
            state["router"] = {
                "address": str(self.config.connector.router_addr),
                "registered": registrar.is_registered,
                "node_id": registrar.node_id,
                "incarnation": registrar.incarnation,
                "last_error": registrar.last_error,
                "last_heartbeat_age_s": None
                if registrar.last_heartbeat_s is None
                else round(time.monotonic() - registrar.last_heartbeat_s, 3),
                "pairs": {
                    key: {"has_comm_id": bool(comm_id), "connected": bool(status and key in status.connected)}
                    for key, comm_id in registrar.comm_ids.items()
                },
            }
        return state

    async def _metrics(self, request: Request) -> HttpResponse:
        await self._refresh_status()
        return HttpResponse(self.metrics.render(), media_type=CONTENT_TYPE.decode())

    def _gauges(self) -> dict[str, float]:
        is_up = self.engine.ready is not None and self.engine.failure is None
        gauges = {
            "ksana_lab_engine_up": float(is_up),
            "ksana_lab_engine_silence_seconds": self.engine.silence_s,
            "ksana_lab_sequences_in_flight": self.engine.num_in_flight,
            "ksana_lab_sequences_unstarted": self.engine.num_unstarted,
        }
        if self.registrar is not None:
            gauges["ksana_lab_registered"] = float(self.registrar.problem() is None)
        return gauges

    async def _version(self, request: Request) -> HttpResponse:
        return _json({"name": "ksana_lab", "version": __version__})

    async def _models(self, request: Request) -> HttpResponse:
        ready = self.engine.ready
        model = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "ksana_lab", "root": self.config.model.model_dir}
        limits = {"max_model_len": ready.max_model_len if ready else None, "vocab_size": ready.vocab_size if ready else None}
        return _json({"object": "list", "data": [{**model, **limits}]})

    async def _start_profile(self, request: Request) -> HttpResponse:
        return self._profile(True)

    async def _stop_profile(self, request: Request) -> HttpResponse:
        return self._profile(False)

    def _profile(self, start: bool) -> HttpResponse:
        try:
            self.engine.profile(start)
        except EngineDead as error:
            unavailable = ServiceUnavailable(str(error))
            return _raw_json(error_json(unavailable), unavailable.status, dict(_decoded(retry_headers(unavailable))))
        return _json({"status": "started" if start else "stopped"})


class _HttpServer(uvicorn.Server):
    """uvicorn, told to end requests before it waits for them, and to hand signals back to whoever called ``serve``."""

    def __init__(self, app: NodeServer, before_shutdown: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
            )
        )
        self._before_shutdown = before_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_shutdown()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again afterwards: the caller still has an engine to end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


def _json(body: dict[str, Any], status: int = 200) -> HttpResponse:
    return _raw_json(orjson.dumps(body), status)


def _raw_json(body: bytes, status: int, headers: dict[str, str] | None = None) -> HttpResponse:
    return HttpResponse(body, status, headers, media_type="application/json")


def _decoded(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode(), value.decode()) for name, value in headers]


async def _http_error(request: Request, error: HTTPException) -> HttpResponse:
    """404 and 405 in the shape of every other error."""
    problem = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}")
    problem.status = error.status_code
    return _raw_json(error_json(problem), error.status_code, dict(error.headers or {}))


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended", task.get_name(), exc_info=error)
