"""The token path: an ASGI application for POST /generate, /v1/… and /v2/…. Chooses a route, runs the exchange, tries once more if nothing
was accepted, tells the client what went wrong. Does not parse bodies and never waits for the database."""

from __future__ import annotations

import asyncio
import re
import socket
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

import aiohttp
from multidict import CIMultiDict

from ksana_lab.config.router import RouterConfig
from ksana_lab.errors import ServiceUnavailable
from ksana_lab.protocol.node import (
    COMM_KEY_HEADER,
    COMM_REQUEST_ID_HEADER,
    CREATED_HEADER,
    FIRST_TOKEN_FROM_PREFILL,
    FIRST_TOKEN_HEADER,
    REQUEST_ID_HEADER,
)
from ksana_lab.router.comm_groups import CommGroups, Route
from ksana_lab.router.exchange import BodyTooLarge, Client, ClientGone, Exchange, Failure, Receive, Send, note_sent, tell
from ksana_lab.router.policies import Policy, RequestFeatures
from ksana_lab.router.registry import Node, Registry
from ksana_lab.router.store import RequestIds
from ksana_lab.router.streams import Framing
from ksana_lab.router.telemetry import Telemetry

KEEPALIVE_S = 4.0  # below the 5 s after which a uvicorn node closes an idle connection, so that none closes under a request
_NUM_PROBES = 3  # of a silent connection, unanswered, after which it has ended
# Not passed on: what concerns one connection only, what the HTTP client writes itself, what is the router's to say, and compression,
# since a compressed stream has no visible objects.
_NOT_FOR_NODES = {
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    COMM_KEY_HEADER,
    COMM_REQUEST_ID_HEADER,
    CREATED_HEADER,
    FIRST_TOKEN_HEADER,
    REQUEST_ID_HEADER,
}


_GOOD_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Proxy:
    """``open`` in the running loop before use; ``close`` may be called twice."""

    def __init__(
        self, config: RouterConfig, registry: Registry, groups: CommGroups, policy: Policy, request_ids: RequestIds, telemetry: Telemetry
    ) -> None:
        self._config, self._registry, self._groups = config, registry, groups
        self._policy, self._request_ids, self._telemetry = policy, request_ids, telemetry
        self._exchanges: set[Exchange] = set()
        self.session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._config.max_connections, keepalive_timeout=KEEPALIVE_S, socket_factory=self._probing_socket
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout_s),  # ``check`` bounds the rest
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
            auto_decompress=False,
            trust_env=False,  # an HTTP proxy is never in the way of internal traffic
            trace_configs=[note_sent()],
        )

    def _probing_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """For a node whose end of a connection is gone without a word, while the node itself lives and sends its heartbeats: nothing else
        would end the wait for its reply. An outage shorter than ``heartbeat_timeout_s`` ends nothing."""
        made = socket.socket(*address[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        interval_s = max(1, round(self._config.heartbeat_timeout_s / (1 + _NUM_PROBES)))
        for option, value in (("TCP_KEEPIDLE", interval_s), ("TCP_KEEPINTVL", interval_s), ("TCP_KEEPCNT", _NUM_PROBES)):
            if hasattr(socket, option):  # Linux
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return made

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()
            self.session = None

    @property
    def num_requests(self) -> int:
        return len(self._exchanges)

    def check(self) -> None:
        """Called on a timer: end what has waited too long."""
        now_s = time.monotonic()
        for exchange in list(self._exchanges):
            exchange.check(now_s, self._config.read_timeout_s, self._config.reply_timeout_s, self._why_dead)

    @property
    def check_interval_s(self) -> float:
        """Fine enough for the shortest time-out, and no finer."""
        config = self._config
        return min(1.0, config.read_timeout_s / 4, config.reply_timeout_s / 4, config.heartbeat_timeout_s / 4)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        arrival_s = time.monotonic()
        headers, request_id = _node_headers(scope["headers"])
        client = Client(receive, send, request_id.encode("latin-1"))
        outcome, message = "cancelled", None
        try:
            failure = await self._answer(client, scope, headers, request_id, arrival_s)
            outcome, message = (failure.outcome, failure.message) if failure else ("ok", None)
        except ClientGone:
            outcome = "client_gone"
        except Exception:
            outcome = "internal_error"
            raise
        finally:
            self._telemetry.ended(request_id, scope["path"], outcome, message)

    async def _answer(
        self, client: Client, scope: MutableMapping[str, Any], headers: CIMultiDict[str], request_id: str, arrival_s: float
    ) -> Failure | None:
        """The client has its answer, or what went wrong. Raises ClientGone when its request never came whole."""
        framing: Framing | None = None
        try:
            body = await client.read_body(self._config.max_body_bytes)
        except BodyTooLarge:
            message = f"the request is larger than max_body_bytes = {self._config.max_body_bytes}"
            failure: Failure | None = Failure("too_large", 413, "invalid_request_error", message)
        else:
            self._telemetry.arrived(request_id, scope["path"], len(body))
            watch = asyncio.get_running_loop().create_task(client.watch())
            try:
                failure, framing = await self._serve(client, _target(scope), body, headers, request_id, arrival_s)
            finally:
                watch.cancel()
        if failure is not None:
            await tell(client, failure, framing)
        return failure

    async def _serve(
        self, client: Client, target: str, body: bytes, headers: CIMultiDict[str], request_id: str, arrival_s: float
    ) -> tuple[Failure | None, Framing | None]:
        assert self.session is not None, "open() first"
        features = RequestFeatures(body)
        avoided: Node | None = None
        while True:
            try:
                route = self._choose(features, avoided)
                comm_request_id = self._stamp(headers, route)
            except Failure as failure:
                return failure, None
            self._telemetry.routed(request_id, route, comm_request_id)
            exchange = Exchange(self.session, client, route, target, body, headers)
            asked_s = time.monotonic()
            ended = await self._run(exchange, features)
            if ended is None or not ended.is_retryable or ended.node is None:
                break
            self._registry.suspect(ended.node)
            if avoided is not None or not self._routes_without(ended.node):
                break
            avoided = ended.node
            self._telemetry.retried()
        if client.first_byte_s is not None and exchange.first_data_s is not None:
            overhead_s = asked_s - arrival_s + client.first_byte_s - exchange.first_data_s
            self._telemetry.first_byte(request_id, target.partition("?")[0], client.first_byte_s - arrival_s, overhead_s)
        return ended, exchange.framing

    async def _run(self, exchange: Exchange, features: RequestFeatures) -> Failure | None:
        """With its load on its nodes' accounts: each side's until that side is over."""
        self._exchanges.add(exchange)
        self._groups.take(exchange.route)
        for node in exchange.route.nodes:
            node.take(features.num_prompt_tokens)
        try:
            return await exchange.run(on_side_over=lambda node: node.give_back(features.num_prompt_tokens))
        finally:
            self._groups.give_back(exchange.route)
            self._exchanges.discard(exchange)

    def _choose(self, features: RequestFeatures, avoided: Node | None) -> Route:
        """Raises Failure (503) that says why nobody can serve."""
        routes = self._routes_without(avoided)
        if not routes:
            message = f"No available nodes for processing: {self._groups.why_no_route()}"
            raise Failure("no_route", 503, ServiceUnavailable.type, message, retry_after_s=ServiceUnavailable.retry_after_s)
        trusted = [route for route in routes if not any(node.is_suspect for node in route.nodes)]
        return self._policy.choose(trusted or routes, features)

    def _routes_without(self, node: Node | None) -> list[Route]:
        routes = self._groups.routes()
        return routes if node is None else [route for route in routes if node not in route.nodes]

    def _stamp(self, headers: CIMultiDict[str], route: Route) -> int | None:
        """Raises Failure (503) when there is no request id to give."""
        for name in (COMM_KEY_HEADER, COMM_REQUEST_ID_HEADER, FIRST_TOKEN_HEADER):
            headers.popall(name, None)
        headers[CREATED_HEADER] = str(int(time.time()))
        if route.comm_key is None:
            return None
        try:
            comm_request_id = self._request_ids.next()
        except ServiceUnavailable as error:
            raise Failure("no_route", 503, error.type, str(error), retry_after_s=error.retry_after_s) from None
        headers[COMM_KEY_HEADER] = route.comm_key
        headers[COMM_REQUEST_ID_HEADER] = str(comm_request_id)
        headers[FIRST_TOKEN_HEADER] = FIRST_TOKEN_FROM_PREFILL
        return comm_request_id

    def _why_dead(self, node: Node, silent_s: float) -> str | None:
        if not self._registry.is_current(node):
            return "was replaced, signed off or was forgotten while the request ran"
        timeout_s = self._config.heartbeat_timeout_s
        if silent_s > timeout_s and not self._registry.is_online(node):
            return f"sends no heartbeats and was silent for {silent_s:.1f} s"
        return None


def _node_headers(raw: list[tuple[bytes, bytes]]) -> tuple[CIMultiDict[str], str]:
    """The client's headers for the nodes, and the request id, which is made if the client gave none that can be used."""
    headers: CIMultiDict[str] = CIMultiDict()
    request_id, named = "", ""
    for name_bytes, value_bytes in raw:  # ASGI: names are lower case
        name, value = name_bytes.decode("latin-1"), value_bytes.decode("latin-1")
        if name not in _NOT_FOR_NODES:
            headers.add(name, value)
        elif name == REQUEST_ID_HEADER:
            request_id = value
        elif name == "connection":
            named = value
    for name in named.split(","):  # headers that Connection names are for this hop only
        headers.popall(name.strip(), None)
    if not _GOOD_REQUEST_ID.fullmatch(request_id):
        request_id = uuid.uuid4().hex  # both nodes would make one each
    headers[REQUEST_ID_HEADER] = request_id
    return headers, request_id


def _target(scope: MutableMapping[str, Any]) -> str:
    """Path and query as the client wrote them."""
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    query = scope.get("query_string", b"").decode("latin-1")
    return f"{path}?{query}" if query else path
