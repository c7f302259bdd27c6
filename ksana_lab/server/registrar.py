"""A node's side of the router's protocol: register, heartbeat, comm ids, peers. Off every request's path.

Start-up order does not matter: it tries for ever, with back-off. It registers again by itself when the router forgot this node (404), gives
every pair of a prefill node a fresh comm id when the router shows none, and tells the engine each time the pairs change. A node whose
engine falls silent says so once, then nothing until it speaks again: silence is the one sign that the reference's router knows.

Works with the reference router, which ignores our extra fields and answers an unknown node with 500 instead of 404."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
import uuid

import httpx
import pydantic

from ksana_lab.config.engine import ConnectorOptions
from ksana_lab.errors import ConfigError, EngineDead, KsanaLabError
from ksana_lab.protocol.engine import EngineReady, EngineStatus, PeerUpdate
from ksana_lab.protocol.node import (
    Device,
    Heartbeat,
    HeartbeatAnswer,
    NodeLoad,
    RegisterCommId,
    RegisterNode,
    RegisterNodeAnswer,
    UnregisterNode,
    split_comm_key,
)
from ksana_lab.server.engine_client import EngineClient
from ksana_lab.types import Role

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
SIGN_OFF_TIMEOUT_S = 1.0  # a router that is slow to hear of our end finds out by itself
ENGINE_SILENCE_S = 15.0  # of the engine, after which the router is told to send nothing here; /health's bound too
FIRST_RETRY_S, MAX_RETRY_S = 0.2, 5.0
_UNKNOWN_NODE_WORDS = ("不存在", "not found", "unknown node")
_FORGOTTEN_AFTER_500S = 3  # the reference's 500 says nothing; to register for one stray 500 would clear this node's pairs
_REPEAT_LOG_S = 30.0


class RouterRefused(KsanaLabError):
    """The router answered, and not with success."""

    def __init__(self, path: str, status: int, text: str) -> None:
        super().__init__(f"{path} -> {status}: {text[:300]}")
        self.status = status

    @property
    def means_unknown_node(self) -> bool:
        return self.status == 404 or (self.status >= 500 and any(word in str(self).lower() for word in _UNKNOWN_NODE_WORDS))


class Registrar:
    """Run ``run`` as a task once the engine is ready. Its attributes are the node's registration state, for /health."""

    def __init__(
        self,
        options: ConnectorOptions,
        engine: EngineClient,
        *,
        client: httpx.AsyncClient | None = None,
        first_retry_s: float = FIRST_RETRY_S,
        silence_limit_s: float = ENGINE_SILENCE_S,
    ) -> None:
        """Raises ConfigError without router_addr or inference_addr."""
        if options.router_addr is None or options.inference_addr is None:
            raise ConfigError("a node that registers with a router needs connector.router_addr and connector.inference_addr")
        self._options, self._engine, self._first_retry_s = options, engine, first_retry_s
        self._client = client or httpx.AsyncClient(base_url=f"http://{options.router_addr}", timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self.incarnation = uuid.uuid4().hex
        self._job_id = f"{time.time_ns() // 1000}_{secrets.randbelow(10**6):06d}"
        self._wake = asyncio.Event()
        self._fresh_keys: set[str] = set()  # pairs given a comm id in the latest round
        self._told: list[PeerUpdate.Pair] | None = None
        self._has_told_silence = False
        self._logged: tuple[str, float] = ("", 0.0)
        self.silence_limit_s = silence_limit_s
        self.node_id = ""
        self.is_registered = False
        self.last_heartbeat_s: float | None = None  # monotonic, of the last good one
        self.last_error: str | None = None
        self.comm_ids: dict[str, str] = {}  # of every pair of ours, as the router last said

    def problem(self) -> str | None:
        """Why the router may not route to this node; None when it can."""
        if not self.is_registered:
            return f"not registered with the router at {self._options.router_addr}: {self.last_error or 'not tried yet'}"
        if self._has_told_silence:
            return f"the router at {self._options.router_addr} is told to send nothing here: the engine does not answer"
        silent_s = time.monotonic() - (self.last_heartbeat_s or 0.0)
        if silent_s > max(3 * self._options.heartbeat_interval_s, REQUEST_TIMEOUT_S):
            return f"no heartbeat has reached the router at {self._options.router_addr} for {silent_s:.0f} s: {self.last_error}"
        return None

    # ---- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled, or until the engine is gone."""
        ready = self._engine.ready
        assert ready is not None, "run the registrar when the engine is ready"
        last_connected: list[str] = []

        def on_status(status: EngineStatus) -> None:
            nonlocal last_connected
            if status.connected != last_connected:  # a pair that came up should not wait for the next heartbeat
                last_connected = list(status.connected)
                self._wake.set()
            if self._has_told_silence:
                self._wake.set()

        self._engine.on_status = on_status
        try:
            while True:
                await self._register(ready)
                await self._heartbeats()
        except EngineDead as error:
            log.debug("stop registering: %s", error)
        finally:
            self._engine.on_status = None

    async def _register(self, ready: EngineReady) -> None:
        """Until the router accepts this node."""
        self.is_registered = False
        retry_s = self._first_retry_s
        while True:
            try:
                answer = RegisterNodeAnswer.model_validate_json(await self._post("/RegisterNode", self._registration(ready)))
                if not answer.node_id:
                    raise RouterRefused("/RegisterNode", 200, "no node_id in the answer")
                break
            except (httpx.HTTPError, RouterRefused, ValueError) as error:
                self._note_failure(f"cannot register with the router at {self._options.router_addr}", error, "; trying again")
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, MAX_RETRY_S)
        self.node_id, self.is_registered = answer.node_id, True
        self.last_error, self.last_heartbeat_s = None, time.monotonic()
        self._told = None  # the engine hears of the pairs again, whatever they are
        self._has_told_silence = False
        log.info("registered with the router at %s as %s", self._options.router_addr, self.node_id)

    async def _heartbeats(self) -> None:
        """Until the router no longer knows this node."""
        num_500s = 0
        while True:
            wait_s = self._options.heartbeat_interval_s
            try:
                if await self._heartbeat():
                    wait_s = 0.0
                num_500s = 0
            except RouterRefused as error:
                num_500s = num_500s + 1 if error.status >= 500 else 0
                self._note_failure("heartbeat refused", error)
                if error.means_unknown_node or num_500s >= _FORGOTTEN_AFTER_500S:
                    log.warning("the router does not know this node any more; registering again")
                    return
            except (httpx.HTTPError, ValueError) as error:
                self._note_failure(f"the router at {self._options.router_addr} does not answer", error)
            await self._sleep(wait_s)

    async def _heartbeat(self) -> bool:
        """One exchange. True: a comm id was registered, and the next heartbeat will show the pair's addresses."""
        status, is_serving = self._engine.status, self._engine.silence_s <= self.silence_limit_s
        if not is_serving and self._has_told_silence:
            return False
        heartbeat = Heartbeat(node_id=self.node_id, load=_load_of(status), is_serving=is_serving)
        if self._options.role.is_disaggregated:
            heartbeat.connected_comm_keys = list(status.connected) if status else []
        answer = HeartbeatAnswer.model_validate_json(await self._post("/Heartbeat", heartbeat))
        self.last_heartbeat_s, self.last_error = time.monotonic(), None
        self._note_serving(is_serving)
        self.comm_ids = dict(answer.comm_group_to_id)
        fresh = await self._register_comm_ids(answer)
        self._tell_engine(answer)
        is_news = bool(fresh - self._fresh_keys)
        self._fresh_keys = fresh
        return is_news

    def _note_serving(self, is_serving: bool) -> None:
        if is_serving and self._has_told_silence:
            log.info("the engine answers again, and the router knows")
        elif not is_serving:
            log.warning("the engine has said nothing for %.0f s: the router is told to send nothing here", self._engine.silence_s)
        self._has_told_silence = not is_serving

    async def _register_comm_ids(self, answer: HeartbeatAnswer) -> set[str]:
        """Prefill rank 0 names every pair of its own that has no id. Returns those pairs."""
        if self._options.role is not Role.PREFILL:
            return set()
        nameless = [key for key, comm_id in answer.comm_group_to_id.items() if not comm_id and self._is_own(key)]
        for key in nameless:
            await self._post("/RegisterCommId", RegisterCommId(node_id=self.node_id, comm_key=key, comm_id=uuid.uuid4().hex))
            log.info("registered a comm id for pair %s", key)
        return set(nameless)

    def _is_own(self, key: str) -> bool:
        return split_comm_key(key)[0] == str(self._options.inference_addr)

    def _tell_engine(self, answer: HeartbeatAnswer) -> None:
        """The pairs that have both an id and addresses; the others cannot be connected yet."""
        addresses = answer.comm_group_to_address
        pairs = [
            PeerUpdate.Pair(key, comm_id, addresses[key])
            for key, comm_id in sorted(answer.comm_group_to_id.items())
            if comm_id and addresses.get(key)
        ]
        if pairs != self._told:
            self._engine.update_peers(PeerUpdate(pairs))
            self._told = pairs

    # ---- talking to the router ---------------------------------------------------------------------------------------

    async def _post(self, path: str, message: pydantic.BaseModel) -> bytes:
        """The answer's body. Raises RouterRefused for a status that is no success, httpx.HTTPError."""
        body = message.model_dump_json(exclude_none=True)
        response = await self._client.post(path, content=body, headers={"content-type": "application/json"})
        if not response.is_success:
            raise RouterRefused(path, response.status_code, response.text)
        return response.content

    def _registration(self, ready: EngineReady) -> RegisterNode:
        options = self._options
        host = (options.coordinator_addr or options.inference_addr).host  # type: ignore[union-attr]
        return RegisterNode(
            inference_addr=str(options.inference_addr),
            cluster_name=options.cluster_name,
            group_role=options.role.value,
            node_rank=0,
            coordinator_addr=str(options.coordinator_addr) if options.coordinator_addr else None,
            world_size=len(ready.devices),
            devices=[Device(device_id=i, device_type=kind, device_ip=host) for i, kind in ready.devices],
            hostname=socket.gethostname(),
            job_id=self._job_id,
            start_time=time.strftime("%Y-%m-%d %H:%M:%S"),
            node_id=self.node_id or None,
            incarnation=self.incarnation,
            heartbeat_interval_s=options.heartbeat_interval_s,
        )

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except asyncio.TimeoutError:
            pass
        self._wake.clear()

    def _note_failure(self, what: str, error: Exception, outlook: str = "") -> None:
        """Log what is new at once, what repeats every half minute."""
        self.last_error = str(error) or type(error).__name__
        message, now_s = f"{what}: {self.last_error}", time.monotonic()
        if message != self._logged[0] or now_s - self._logged[1] > _REPEAT_LOG_S:
            log.warning("%s%s", message, outlook)
            self._logged = (message, now_s)

    async def close(self) -> None:
        """Sign off, so that the router does not take this node for a live one for another minute. May be called twice."""
        if self.is_registered:
            self.is_registered = False
            await self._sign_off()
        await self._client.aclose()

    async def _sign_off(self) -> None:
        try:
            await asyncio.wait_for(self._post("/UnregisterNode", UnregisterNode(node_id=self.node_id)), SIGN_OFF_TIMEOUT_S)
        except (httpx.HTTPError, RouterRefused, asyncio.TimeoutError) as error:
            log.debug("not signed off: %s", error)


def _load_of(status: EngineStatus | None) -> NodeLoad | None:
    if status is None:
        return None
    return NodeLoad(
        num_running=status.num_running,
        num_waiting=status.num_waiting + status.num_waiting_kv,
        num_free_blocks=status.num_free_blocks,
        num_blocks=status.num_blocks,
        **{name: status.transfer.get(name) for name in ("link_bytes_per_s", "link_round_trip_s", "link_share_of_expected")},
    )
