"""Which nodes exist and which of them are alive. Knows no HTTP, no database, no clock of its own and no pairs (comm_groups.py does).

Invariants: at most one node per identity (inference_addr, role, node_rank); a node_id names one process for ever, so a restarted node gets
a new one; being online is never stored, it is derived from the last heartbeat."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ksana_lab.errors import RequestError
from ksana_lab.protocol.node import Heartbeat, NodeLoad, RegisterNode
from ksana_lab.types import NodeAddr, Role

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 5.0  # of a node that does not say
PURGE_AFTER_S = 3600.0  # a node silent for so long (or ten heartbeat time-outs, if that is longer) is forgotten


class Refused(RequestError):
    """A control call that cannot be granted; ``str(error)`` goes into ``{"detail": …}``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnknownNode(Refused):
    def __init__(self, node_id: str) -> None:
        super().__init__(404, f"Node {node_id!r} is not registered; register again with POST /RegisterNode")


@dataclass(slots=True, eq=False)
class Node:
    """One process of one group. Times are Unix seconds of the router's clock."""

    node_id: str
    inference_addr: str
    role: Role
    node_rank: int
    incarnation: str  # differs between two starts of the same node; "" = the node does not say
    coordinator_addr: str | None
    world_size: int  # devices of the whole group
    num_devices: int  # of this process
    hostname: str | None
    registered_s: float
    last_heartbeat_s: float  # registering counts as one
    connected: frozenset[str] | None = None  # comm keys; None = a node of the reference, which does not say
    load: NodeLoad = field(default_factory=NodeLoad)
    # Of this router process alone, never stored.
    num_requests: int = 0  # in flight through this router
    num_tokens: int = 0  # their prompts, estimated
    num_requests_elsewhere: int = 0  # what the node reported beyond ours: other routers, direct clients
    is_suspect: bool = False  # refused a connection since its last heartbeat, or has sent none to this process yet
    is_serving: bool = True  # False: it said that its engine does not answer
    heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S
    was_online: bool = True
    replaced: str = ""  # the incarnation that had its place before

    @property
    def identity(self) -> tuple[str, str, int]:
        return self.inference_addr, self.role.value, self.node_rank

    def take(self, num_tokens: int) -> None:
        self.num_requests += 1
        self.num_tokens += num_tokens

    def give_back(self, num_tokens: int) -> None:
        self.num_requests -= 1
        self.num_tokens -= num_tokens

    def __str__(self) -> str:
        rank = f" rank {self.node_rank}" if self.node_rank else ""
        return f"{self.role.value} node {self.inference_addr}{rank}"


class Journal(Protocol):
    """Told of every change that a restarted router must know; never blocks. ``urgent``: soon, else when convenient."""

    def put_node(self, node: Node, *, urgent: bool) -> None: ...

    def drop_node(self, node: Node) -> None: ...


class Registry:
    """All nodes of one cluster. ``clock`` gives Unix seconds and never runs backwards."""

    def __init__(
        self,
        cluster_name: str,
        heartbeat_timeout_s: float,
        clock: Callable[[], float],
        journal: Journal,
        purge_after_s: float | None = None,
    ) -> None:
        self.cluster_name, self.heartbeat_timeout_s = cluster_name, heartbeat_timeout_s
        self.clock, self._journal = clock, journal
        self.purge_after_s = max(PURGE_AFTER_S, 10 * heartbeat_timeout_s) if purge_after_s is None else purge_after_s
        self.version = 0  # grows with every change that may alter which nodes and pairs can be used
        self._by_id: dict[str, Node] = {}
        self._groups: dict[tuple[str, Role], dict[int, Node]] = {}

    # ---- reading ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, node_id: str) -> Node:
        """Raises UnknownNode (404)."""
        try:
            return self._by_id[node_id]
        except KeyError:
            raise UnknownNode(node_id) from None

    def group(self, inference_addr: str, role: Role) -> list[Node]:
        """The processes that serve one inference_addr, by rank; empty if there is none."""
        ranks = self._groups.get((inference_addr, role), {})
        return [ranks[rank] for rank in sorted(ranks)]

    def group_addrs(self, role: Role) -> list[str]:
        return [addr for addr, role_ in self._groups if role_ is role]

    def is_online(self, node: Node) -> bool:
        return self.clock() - node.last_heartbeat_s <= self.heartbeat_timeout_s

    def is_current(self, node: Node) -> bool:
        """False once the node was replaced by its next incarnation, or purged."""
        return self._by_id.get(node.node_id) is node

    def silent_s(self, node: Node) -> float:
        return max(0.0, self.clock() - node.last_heartbeat_s)

    def is_ready(self, group: list[Node]) -> bool:
        """All devices of the group are online: the reference's ``group_ready``."""
        return bool(group) and sum(n.num_devices for n in group if self.is_online(n)) == max(n.world_size for n in group)

    # ---- the protocol ----------------------------------------------------------------------------------------------

    def register(self, request: RegisterNode) -> Node:
        """Admit a node, or its next incarnation in place of its old self. Registering the same incarnation again changes nothing but its
        particulars: an answer that got lost may be asked for again. Raises Refused (400, 409)."""
        if request.cluster_name and request.cluster_name != self.cluster_name:
            raise Refused(400, f"Cluster '{request.cluster_name}' is not allowed; expecting '{self.cluster_name}'")
        coordinator_addr = _checked_coordinator(request)
        world_size, num_devices = _checked_devices(request)
        role = Role(request.group_role)
        incarnation = request.incarnation or request.job_id or request.start_time or ""
        old = self._predecessor(request, role, incarnation)
        self._make_way(request, role, coordinator_addr, old)
        now = self.clock()
        if old is not None and incarnation and (old.incarnation, old.role) == (incarnation, role):
            node = old
            node.coordinator_addr, node.world_size, node.num_devices = coordinator_addr, world_size, num_devices
            node.last_heartbeat_s = now
        else:
            node = Node(
                node_id=self._new_id(request.node_id),
                inference_addr=request.inference_addr,
                role=role,
                node_rank=request.node_rank,
                incarnation=incarnation,
                coordinator_addr=coordinator_addr,
                world_size=world_size,
                num_devices=num_devices,
                hostname=request.hostname,
                registered_s=now,
                last_heartbeat_s=now,
            )
            if old is not None:
                node.replaced = old.incarnation
                self._remove(old)
            self._insert(node)
            logger.info("%s %s as %s", node, "restarted, registered" if old else "registered", node.node_id)
        node.heartbeat_interval_s = request.heartbeat_interval_s or HEARTBEAT_INTERVAL_S
        node.was_online, node.is_suspect = True, False
        self._changed(node, urgent=True)
        return node

    def sign_off(self, node_id: str) -> None:
        """The node ends in order: its addresses are free at once. Raises UnknownNode (404)."""
        node = self.get(node_id)
        self._remove(node)
        logger.info("%s signed off", node)

    def heartbeat(self, beat: Heartbeat) -> Node:
        """Raises UnknownNode (404): the node must register again."""
        node = self.get(beat.node_id)
        if not node.was_online:
            logger.info("%s is back", node)
        connected = None if beat.connected_comm_keys is None else frozenset(beat.connected_comm_keys)
        is_news = connected != node.connected or not node.was_online
        node.connected, node.last_heartbeat_s = connected, self.clock()
        node.was_online, node.is_suspect = True, False
        self._note_serving(node, beat.is_serving is not False)
        if beat.load is not None:
            node.load = beat.load
            node.num_requests_elsewhere = max(0, beat.load.num_running + beat.load.num_waiting - node.num_requests)
        self._changed(node, urgent=is_news)
        return node

    def _note_serving(self, node: Node, is_serving: bool) -> None:
        if is_serving and not node.is_serving:
            logger.info("%s serves again: its engine answers", node)
        elif not is_serving and node.is_serving:
            logger.warning("%s says that its engine does not answer: it gets no requests until it does", node)
        node.is_serving = is_serving

    def suspect(self, node: Node) -> None:
        """A connection to it was refused: prefer others until it sends a heartbeat."""
        node.is_suspect = True
        self.version += 1

    def expire(self) -> None:
        """Called on a timer: say which nodes fell silent, forget those that did long ago."""
        for node in list(self._by_id.values()):
            if self.silent_s(node) > self.purge_after_s:
                self._remove(node)
                logger.warning("%s was silent for %.0f s: forgotten", node, self.silent_s(node))
            elif node.was_online and not self.is_online(node):
                node.was_online = False
                self.version += 1
                logger.warning("%s is offline: no heartbeat for %.1f s", node, self.silent_s(node))

    def restore(self, nodes: Iterable[Node]) -> None:
        """Nodes that an earlier router process knew. They are online if their last heartbeat is recent enough, like any other, but one
        that has been heard since is preferred."""
        for node in nodes:
            node.was_online, node.is_suspect = self.is_online(node), True
            self._insert(node)
        self.version += 1

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _predecessor(self, request: RegisterNode, role: Role, incarnation: str) -> Node | None:
        """The node this one replaces: the same identity; or the same address and rank on the same host in another role, since one port
        has one owner."""
        same = self._groups.get((request.inference_addr, role), {}).get(request.node_rank)
        if same is not None:
            if not incarnation or same.incarnation != incarnation:
                self._refuse_twin(same, request)
            return same
        for node in self._by_id.values():
            if (node.inference_addr, node.node_rank) == (request.inference_addr, request.node_rank):
                if _is_same_host(node, request) or not self.is_online(node):
                    return node
                raise Refused(409, f"inference_addr {request.inference_addr} is in use by the live {node}; give each node its own")
        return None

    def _refuse_twin(self, old: Node, request: RegisterNode) -> None:
        """A node that moved to another host leaves its old self silent; two that beat would replace each other for ever. Clones share a
        hostname: theirs is told by an incarnation that comes back after it was replaced."""
        is_back = bool(old.replaced) and old.replaced == (request.incarnation or request.job_id or request.start_time)
        if not is_back and (None in (old.hostname, request.hostname) or old.hostname == request.hostname):
            return
        if self.is_online(old) and self.silent_s(old) <= 2 * old.heartbeat_interval_s:
            advice = f"give the one on host {request.hostname} its own, where the router can reach it (127.0.0.1 is every host's)"
            raise Refused(
                409, f"inference_addr {request.inference_addr} is in use by the {old.role.value} node on host {old.hostname}; {advice}"
            )

    def _make_way(self, request: RegisterNode, role: Role, coordinator_addr: str | None, old: Node | None) -> None:
        """No two nodes share a coordinator_addr: a live owner refuses the newcomer, a dead one goes. The newcomer's own host cannot have a
        live one: each binds its address before it registers. A mixed node binds none."""
        if coordinator_addr is None or not role.is_disaggregated:
            return
        for node in list(self._by_id.values()):
            if node is old or node.coordinator_addr != coordinator_addr or not node.role.is_disaggregated:
                continue
            if self.is_online(node) and not _is_same_host(node, request):
                message = f"coordinator_addr {coordinator_addr} is in use by the live {node}; give {request.inference_addr} its own"
                raise Refused(409, message)
            logger.info("%s is gone and gives way to %s, which has its coordinator_addr", node, request.inference_addr)
            self._remove(node)

    def _new_id(self, asked: str | None) -> str:
        return asked if asked and asked not in self._by_id else uuid.uuid4().hex

    def _insert(self, node: Node) -> None:
        self._by_id[node.node_id] = node
        self._groups.setdefault((node.inference_addr, node.role), {})[node.node_rank] = node

    def _remove(self, node: Node) -> None:
        del self._by_id[node.node_id]
        ranks = self._groups[node.inference_addr, node.role]
        del ranks[node.node_rank]
        if not ranks:
            del self._groups[node.inference_addr, node.role]
        self.version += 1
        self._journal.drop_node(node)

    def _changed(self, node: Node, *, urgent: bool) -> None:
        self.version += 1
        self._journal.put_node(node, urgent=urgent)


def _is_same_host(node: Node, request: RegisterNode) -> bool:
    """False also when either does not say."""
    return node.hostname is not None and node.hostname == request.hostname


def _checked_coordinator(request: RegisterNode) -> str | None:
    """An address peers can dial without a resolver, as the reference demands of P and D."""
    addr = request.coordinator_addr
    if addr is None and request.group_role == "mixed":
        return None
    if not addr:
        raise Refused(400, "coordinator_addr must be provided")
    try:
        if addr != addr.strip() or not NodeAddr.parse(addr).is_ip_literal:
            raise ValueError(f"{addr!r} must be an IP address and a port, without a name, scheme or path")
    except ValueError as error:
        raise Refused(400, f"Invalid coordinator_addr: {error}") from None
    return addr


def _checked_devices(request: RegisterNode) -> tuple[int, int]:
    """(devices of the group, devices of this node)"""
    num_devices = len(request.devices or ())
    if request.group_role == "mixed":
        world_size = request.world_size or num_devices or 1
        return world_size, num_devices or world_size
    if request.world_size is None or not num_devices:
        raise Refused(400, "world_size or devices must be provided")
    if num_devices > request.world_size:
        raise Refused(400, "World size must match the number of devices")
    return request.world_size, num_devices
