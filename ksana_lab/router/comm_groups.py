"""Which prefill and decode nodes form pairs, what each is told of its pairs, and which pairs can serve. Derived from the registry; the only
thing kept here is the comm id of each pair. Knows no HTTP, no database, no clock of its own.

Every prefill group is meshed with every decode group. A comm id belongs to the processes that were registered when it came: once one
of them is replaced or gone, the id is void and P sees an empty one, the sign to make another. The protocol: KsanaLLM's simple_router."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ksana_lab.protocol.node import RegisterCommId, comm_key, split_comm_key
from ksana_lab.router.registry import Node, Refused, Registry
from ksana_lab.types import Role

logger = logging.getLogger(__name__)

MAX_REASONS = 4  # that a client is told why it cannot be served

Addresses = list[tuple[int, int, str]]  # (node_rank, device_id, coordinator_addr) per device, prefill's first


@dataclass(frozen=True, slots=True)
class CommId:
    comm_key: str
    comm_id: str
    registered_s: float
    node_ids: frozenset[str]  # of both groups when it was registered; ranks that join later do not void it


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Where a request can go: a connected pair, or a mixed node (``prefill`` and ``comm_key`` are None)."""

    comm_key: str | None
    prefill: Node | None
    decode: Node

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    def __str__(self) -> str:
        return self.comm_key or self.decode.inference_addr


@dataclass(frozen=True, slots=True)
class PairState:
    comm_key: str
    why_not: str | None  # None: routable
    comm_id_set: bool
    prefill_connected: bool
    decode_connected: bool
    num_requests: int


class Journal(Protocol):
    def put_comm_id(self, comm_id: CommId) -> None: ...

    def drop_comm_id(self, comm_key: str) -> None: ...


class CommGroups:
    """All pairs of one cluster."""

    def __init__(self, registry: Registry, journal: Journal) -> None:
        self._registry, self._journal = registry, journal
        self._comm_ids: dict[str, CommId] = {}
        self._in_flight: dict[str, int] = {}  # requests by comm key
        self._routes: list[Route] = []
        self._routes_are_for = (-1, 0.0)  # registry version, and the time at which some node's heartbeat runs out

    # ---- the protocol ----------------------------------------------------------------------------------------------

    def register_comm_id(self, request: RegisterCommId) -> None:
        """Raises Refused: 404 unknown node, 403 not this node's to register, 400 no such pair."""
        node = self._registry.get(request.node_id)
        if node.role is not Role.PREFILL or node.node_rank != 0:
            raise Refused(403, "Only prefill rank-0 nodes may register comm ids")
        try:
            prefill_addr, decode_addr = split_comm_key(request.comm_key)
        except ValueError as error:
            raise Refused(400, f"Invalid comm_key: {error}") from None
        if prefill_addr != node.inference_addr:
            raise Refused(403, f"comm_key {request.comm_key} does not belong to the {node}")
        decode = self._registry.group(decode_addr, Role.DECODE)
        if not decode:
            raise Refused(400, f"comm_key {request.comm_key} names no registered decode node")
        if not request.comm_id:
            raise Refused(400, "comm_id must not be empty")
        members = self._registry.group(prefill_addr, Role.PREFILL) + decode
        comm_id = CommId(request.comm_key, request.comm_id, self._registry.clock(), frozenset(n.node_id for n in members))
        self._comm_ids[request.comm_key] = comm_id
        self._registry.version += 1
        self._journal.put_comm_id(comm_id)
        logger.info("pair %s has a new comm id", request.comm_key)

    def answer(self, node: Node) -> tuple[dict[str, Addresses], dict[str, str]]:
        """(comm_group_to_address, comm_group_to_id) of a heartbeat answer.

        As in the reference, a pair is shown empty while its decode group is not ready, or its prefill group is not (but to rank 0), and
        the addresses come with the comm id. Unlike it, prefill is not shown a decode group none of which is alive: it would make a comm
        id for the dead, or wait for it."""
        addresses: dict[str, Addresses] = {}
        ids: dict[str, str] = {}
        for prefill, decode in self._pairs_of(node):
            if node.role is Role.PREFILL and not any(map(self._registry.is_online, decode)):
                continue
            key = comm_key(prefill[0].inference_addr, decode[0].inference_addr)
            comm_id = self._comm_id(key, prefill, decode)
            is_hidden = not self._registry.is_ready(decode) or (not self._registry.is_ready(prefill) and node.node_rank != 0)
            is_told = comm_id is not None and not is_hidden
            addresses[key] = _addresses(prefill, decode) if is_told else []
            ids[key] = comm_id.comm_id if comm_id is not None and is_told else ""
        return addresses, ids

    # ---- routing ---------------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """Every pair and mixed node that can serve now. Cheap: computed again only when something changed or fell silent."""
        version, until_s = self._routes_are_for
        if version != self._registry.version or self._registry.clock() > until_s:
            self._routes = [
                Route(state.comm_key, prefill[0], decode[0]) for prefill, decode, state in self._pairs() if state.why_not is None
            ]
            self._routes += [Route(None, None, group[0]) for group in self._groups(Role.MIXED) if self._why_unready(group) is None]
            beats = [node.last_heartbeat_s for node in self._registry if self._registry.is_online(node)]
            until_s = min(beats, default=0.0) + self._registry.heartbeat_timeout_s
            self._routes_are_for = self._registry.version, until_s
        return self._routes

    def why_no_route(self) -> str:
        """One line for the client that cannot be served; what is nearest to serving first."""
        reasons = [(self._share_online(p + d), f"{state.comm_key}: {state.why_not}") for p, d, state in self._pairs() if state.why_not]
        reasons += [(self._share_online(group), why) for group in self._groups(Role.MIXED) if (why := self._why_unready(group))]
        texts = [text for _, text in sorted(reasons, key=lambda reason: -reason[0])]
        missing = [role.value for role in (Role.PREFILL, Role.DECODE) if not self._groups(role)]
        if len(missing) == 1 or not texts:
            texts.insert(0, f"no {' and no '.join(missing)} node is registered" if missing else "no node is ready")
        more = [f"and {len(texts) - MAX_REASONS} more, see GET /nodes"] if len(texts) > MAX_REASONS else []
        return "; ".join(texts[:MAX_REASONS] + more)

    def _share_online(self, nodes: list[Node]) -> float:
        return sum(map(self._registry.is_online, nodes)) / len(nodes)

    def states(self) -> list[PairState]:
        return [state for _, _, state in self._pairs()]

    def take(self, route: Route) -> None:
        if route.comm_key is not None:
            self._in_flight[route.comm_key] = self._in_flight.get(route.comm_key, 0) + 1

    def give_back(self, route: Route) -> None:
        if route.comm_key is not None:
            self._in_flight[route.comm_key] -= 1

    # ---- housekeeping ----------------------------------------------------------------------------------------------

    def restore(self, comm_ids: Iterable[CommId]) -> None:
        self._comm_ids.update((c.comm_key, c) for c in comm_ids)

    def expire(self) -> None:
        """Called on a timer: drop ids and counters of pairs that are no more."""
        keys = {state.comm_key for state in self.states()}
        for key in [key for key in self._comm_ids if key not in keys]:
            del self._comm_ids[key]
            self._journal.drop_comm_id(key)
        for key in [key for key, count in self._in_flight.items() if not count and key not in keys]:
            del self._in_flight[key]

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _groups(self, role: Role) -> list[list[Node]]:
        return [self._registry.group(addr, role) for addr in self._registry.group_addrs(role)]

    def _pairs_of(self, node: Node) -> list[tuple[list[Node], list[Node]]]:
        own = self._registry.group(node.inference_addr, node.role)
        if node.role is Role.PREFILL:
            return [(own, decode) for decode in self._groups(Role.DECODE)]
        if node.role is Role.DECODE:
            return [(prefill, own) for prefill in self._groups(Role.PREFILL)]
        return []

    def _pairs(self) -> list[tuple[list[Node], list[Node], PairState]]:
        decodes = self._groups(Role.DECODE)
        return [(p, d, self._state(p, d)) for p in self._groups(Role.PREFILL) for d in decodes]

    def _comm_id(self, key: str, prefill: list[Node], decode: list[Node]) -> CommId | None:
        comm_id = self._comm_ids.get(key)
        if comm_id is None or not comm_id.node_ids <= {n.node_id for n in prefill + decode}:
            return None
        return comm_id

    def _state(self, prefill: list[Node], decode: list[Node]) -> PairState:
        key = comm_key(prefill[0].inference_addr, decode[0].inference_addr)
        comm_id = self._comm_id(key, prefill, decode)
        sides = ((prefill, decode), (decode, prefill))
        why = {side[0].role: self._why_unconnected(side, peer, key, comm_id) for side, peer in sides}
        return PairState(
            comm_key=key,
            why_not=self._why_unready(prefill) or self._why_unready(decode) or why[Role.PREFILL] or why[Role.DECODE],
            comm_id_set=comm_id is not None,
            prefill_connected=why[Role.PREFILL] is None,
            decode_connected=why[Role.DECODE] is None,
            num_requests=self._in_flight.get(key, 0),
        )

    def _why_unready(self, group: list[Node]) -> str | None:
        if self._registry.is_ready(group):
            return next((f"{node} says that its engine does not answer" for node in group if not node.is_serving), None)
        if group[0].node_rank != 0:
            return f"{group[0].role.value} node {group[0].inference_addr} rank 0 is not registered"
        for node in group:
            if not self._registry.is_online(node):
                return f"{node} is offline (last heartbeat {self._registry.silent_s(node):.1f} s ago)"
        return f"{group[0]} has {sum(n.num_devices for n in group)} of {max(n.world_size for n in group)} devices registered"

    def _why_unconnected(self, side: list[Node], peer: list[Node], key: str, comm_id: CommId | None) -> str | None:
        if comm_id is None:
            return "no comm id is registered for the pair"
        for node in side:
            if node.connected is None:  # the reference connects inside the heartbeat that shows it the id: the next one tells that it has
                if node.last_heartbeat_s <= comm_id.registered_s:
                    return f"{node} has sent no heartbeat since the comm id was registered"
            elif key not in node.connected:
                return f"{node} is not connected to {peer[0]}"
        return None


def _addresses(prefill: list[Node], decode: list[Node]) -> Addresses:
    def of(group: list[Node]) -> Addresses:
        return sorted((n.node_rank, device, n.coordinator_addr or "") for n in group for device in range(n.num_devices))

    return of(prefill) + of(decode)
