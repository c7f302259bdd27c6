"""Registry and comm groups without sockets, database or waiting: the clock is a number."""

from __future__ import annotations

import pytest

from ksana_lab.protocol.node import Heartbeat, NodeLoad, RegisterCommId, RegisterNode
from ksana_lab.router.comm_groups import CommGroups
from ksana_lab.router.registry import Node, Refused, Registry, UnknownNode

P, D = "10.0.0.1:8067", "10.0.0.2:6890"
KEY = f"{P}__{D}"


class NullJournal:
    def put_node(self, node, *, urgent): ...
    def drop_node(self, node): ...
    def put_comm_id(self, comm_id): ...
    def drop_comm_id(self, comm_key): ...


class Cluster:
    """A registry and its groups on a clock that only the test moves."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.now = 1000.0
        self.registry = Registry("default_cluster", timeout_s, lambda: self.now, NullJournal())
        self.groups = CommGroups(self.registry, NullJournal())
        self._port = 20000

    def add(self, addr: str, role: str, **more) -> Node:
        self._port += 1
        fields = {"coordinator_addr": f"10.0.0.9:{self._port}", "world_size": 1, "devices": [{"device_id": 0}], "incarnation": "1"}
        fields |= {"node_rank": 0, **more}
        return self.registry.register(RegisterNode(inference_addr=addr, group_role=role, **fields))

    def beat(self, node: Node, connected=None, **more) -> tuple[dict, dict]:
        beat = Heartbeat(node_id=node.node_id, connected_comm_keys=connected, **more)
        return self.groups.answer(self.registry.heartbeat(beat))

    def connect(self, prefill: Node, comm_id: str = "id", key: str = KEY) -> None:
        self.groups.register_comm_id(RegisterCommId(node_id=prefill.node_id, comm_key=key, comm_id=comm_id))

    def why_not(self) -> str | None:
        return self.groups.states()[0].why_not


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def pair(cluster: Cluster) -> tuple[Node, Node]:
    p, d = cluster.add(P, "prefill"), cluster.add(D, "decode")
    cluster.connect(p)
    cluster.beat(p, [KEY])
    cluster.beat(d, [KEY])
    return p, d


# ---- registration ----------------------------------------------------------------------------------------------------


def test_registering_the_same_incarnation_again_keeps_the_node_id(cluster):
    assert cluster.add(P, "prefill").node_id == cluster.add(P, "prefill").node_id
    assert len(cluster.registry) == 1


def test_a_restarted_node_replaces_its_old_self(cluster):
    old = cluster.add(P, "prefill", coordinator_addr="10.0.0.1:13569")
    new = cluster.add(P, "prefill", coordinator_addr="10.0.0.1:14000", incarnation="2")
    assert new.node_id != old.node_id and list(cluster.registry) == [new]
    with pytest.raises(UnknownNode) as error:
        cluster.beat(old)
    assert error.value.status == 404


def test_a_restarted_node_does_not_keep_its_id_even_if_it_asks(cluster):
    old = cluster.add(P, "prefill")
    assert cluster.add(P, "prefill", incarnation="2", node_id=old.node_id).node_id != old.node_id


@pytest.mark.parametrize("fields", [{"job_id": "a"}, {"start_time": "2026-01-01 00:00:00"}])
def test_job_id_and_start_time_tell_incarnations_of_reference_nodes_apart(cluster, fields):
    first = cluster.add(P, "prefill", incarnation=None, **fields)
    assert cluster.add(P, "prefill", incarnation=None, **fields) is first
    assert cluster.add(P, "prefill", incarnation=None, **{name: "other" for name in fields}) is not first


def test_a_node_without_incarnation_counts_as_restarted(cluster):
    assert cluster.add(P, "prefill", incarnation=None) is not cluster.add(P, "prefill", incarnation=None)


def test_the_asked_node_id_is_given_when_it_is_free(cluster):
    assert cluster.add(P, "prefill", node_id="mine").node_id == "mine"
    assert cluster.add(D, "decode", node_id="mine").node_id != "mine"


def test_coordinator_of_a_live_node_is_refused_and_its_owner_named(cluster):
    cluster.add(P, "prefill", coordinator_addr="10.0.0.1:13569")
    with pytest.raises(Refused, match=P) as error:
        cluster.add(D, "decode", coordinator_addr="10.0.0.1:13569")
    assert error.value.status == 409


def test_coordinator_of_a_dead_node_is_taken_over(cluster):
    cluster.add(P, "prefill", coordinator_addr="10.0.0.1:13569")
    cluster.now += 11
    d = cluster.add(D, "decode", coordinator_addr="10.0.0.1:13569")
    assert list(cluster.registry) == [d]


def test_coordinator_of_the_same_host_is_taken_over_at_once(cluster):
    cluster.add(P, "prefill", coordinator_addr="10.0.0.1:13569", hostname="a")
    p = cluster.add("10.0.0.1:8068", "prefill", coordinator_addr="10.0.0.1:13569", hostname="a")
    assert list(cluster.registry) == [p]
    with pytest.raises(Refused, match="coordinator_addr"):
        cluster.add(D, "decode", coordinator_addr="10.0.0.1:13569", hostname="b")


def test_mixed_nodes_may_name_a_coordinator_that_none_of_them_binds(cluster):
    for addr, role in ((P, "prefill"), (D, "mixed"), ("10.0.0.3:1", "mixed")):
        cluster.add(addr, role, coordinator_addr="10.0.0.1:13569", hostname="a")
    assert len(cluster.registry) == 3


def test_what_a_node_had_is_free_when_it_signs_off(cluster, pair):
    cluster.registry.sign_off(pair[0].node_id)
    assert not cluster.groups.routes() and cluster.groups.why_no_route() == "no prefill node is registered"
    cluster.add("10.0.0.1:9999", "prefill", coordinator_addr=pair[0].coordinator_addr)
    with pytest.raises(UnknownNode):
        cluster.registry.sign_off(pair[0].node_id)


def test_two_hosts_do_not_share_an_inference_addr(cluster):
    a = cluster.add("127.0.0.1:8067", "mixed", hostname="a", heartbeat_interval_s=2.0)
    cluster.now += 3.9
    with pytest.raises(Refused, match="the mixed node on host a; give the one on host b its own") as error:
        cluster.add("127.0.0.1:8067", "mixed", hostname="b", incarnation="2")
    assert error.value.status == 409 and list(cluster.registry) == [a]


def test_clones_of_one_hostname_do_not_replace_each_other_for_ever(cluster):
    for incarnation in "12":
        cluster.add(P, "prefill", hostname="localhost", incarnation=incarnation)
    with pytest.raises(Refused, match=r"give the one on host localhost its own, where the router can reach it"):
        cluster.add(P, "prefill", hostname="localhost", incarnation="1")
    cluster.now += 60
    assert cluster.add(P, "prefill", hostname="localhost", incarnation="1")


def test_a_node_that_moved_to_another_host_takes_its_place_after_two_heartbeats(cluster):
    cluster.add(P, "prefill", hostname="a", heartbeat_interval_s=2.0)
    cluster.now += 4.1
    moved = cluster.add(P, "prefill", hostname="b", incarnation="2")
    assert list(cluster.registry) == [moved]


@pytest.mark.parametrize("fields", [{"hostname": "a", "incarnation": "2"}, {"hostname": None, "incarnation": "2"}, {"hostname": "b"}])
def test_a_restart_or_a_renamed_host_is_no_twin(cluster, fields):
    cluster.add(P, "prefill", hostname="a")
    assert cluster.add(P, "prefill", **fields) and len(cluster.registry) == 1


def test_one_address_has_one_role(cluster):
    cluster.add(P, "prefill", hostname="a")
    with pytest.raises(Refused, match="live prefill node"):
        cluster.add(P, "decode", hostname="b")
    assert cluster.add(P, "decode", hostname="a").role == "decode"  # the same host: the old process cannot hold the port any more
    assert len(cluster.registry) == 1


def test_another_cluster_is_refused_in_the_references_words(cluster):
    with pytest.raises(Refused, match="Cluster 'x' is not allowed; expecting 'default_cluster'"):
        cluster.add(P, "prefill", cluster_name="x")


@pytest.mark.parametrize(
    "addr", [None, "", "host.name:1", "http://10.0.0.1:1", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", "10.0.0.1:1/x", " 10.0.0.1:1"]
)
def test_bad_coordinator_addr_is_refused(cluster, addr):
    with pytest.raises(Refused) as error:
        cluster.add(P, "prefill", coordinator_addr=addr)
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": []}, "world_size or devices must be provided"),
        ({"devices": None}, "world_size or devices must be provided"),
        ({"world_size": None}, "world_size or devices must be provided"),
        ({"devices": [{"device_id": 0}, {"device_id": 1}]}, "World size must match the number of devices"),
    ],
)
def test_bad_devices_are_refused_in_the_references_words(cluster, fields, message):
    with pytest.raises(Refused, match=message):
        cluster.add(P, "prefill", **fields)


# ---- heartbeats ------------------------------------------------------------------------------------------------------


def test_online_ends_with_the_configured_timeout():
    cluster = Cluster(timeout_s=3.0)
    node = cluster.add(P, "prefill")
    cluster.now += 3.0
    assert cluster.registry.is_online(node)
    cluster.now += 0.1
    assert not cluster.registry.is_online(node)
    cluster.beat(node)
    assert cluster.registry.is_online(node)


def test_a_node_silent_for_long_is_forgotten(cluster, pair):
    cluster.now += cluster.registry.purge_after_s + 1
    cluster.beat(pair[0])
    cluster.registry.expire()
    assert list(cluster.registry) == [pair[0]]


def test_a_restored_node_is_trusted_after_its_first_heartbeat(cluster):
    node = cluster.add(P, "prefill")
    again = Cluster()
    again.registry.restore([node])
    assert again.registry.is_online(node) and node.is_suspect
    again.beat(node)
    assert not node.is_suspect


def test_load_reported_beyond_ours_counts_as_others(cluster):
    node = cluster.add(P, "prefill")
    node.take(100)
    cluster.beat(node, load=NodeLoad(num_running=2, num_waiting=3))
    assert node.num_requests_elsewhere == 4


# ---- the heartbeat's answer --------------------------------------------------------------------------------------------


def test_a_pair_is_empty_until_prefill_registers_a_comm_id(cluster):
    p, d = cluster.add(P, "prefill"), cluster.add(D, "decode")
    assert cluster.beat(p) == ({KEY: []}, {KEY: ""})
    cluster.connect(p, "abc")
    assert cluster.beat(d) == ({KEY: [(0, 0, p.coordinator_addr), (0, 0, d.coordinator_addr)]}, {KEY: "abc"})


def test_addresses_come_prefill_first_then_by_rank_and_device(cluster):
    devices = [{"device_id": 5}, {"device_id": 6}]  # the reference numbers them itself
    p = cluster.add(P, "prefill", world_size=2, devices=devices, coordinator_addr="10.0.0.8:1")
    d = cluster.add(D, "decode", world_size=2, devices=devices, coordinator_addr="10.0.0.7:1")
    cluster.connect(p)
    assert cluster.beat(d)[0][KEY] == [(0, 0, "10.0.0.8:1"), (0, 1, "10.0.0.8:1"), (0, 0, "10.0.0.7:1"), (0, 1, "10.0.0.7:1")]


def test_every_prefill_is_meshed_with_every_decode(cluster):
    nodes = [cluster.add(f"10.0.0.{i}:1", "prefill") for i in (1, 2)]
    cluster.add("10.0.0.3:1", "decode")
    cluster.add("10.0.0.4:1", "decode")
    assert set(cluster.beat(nodes[0])[1]) == {"10.0.0.1:1__10.0.0.3:1", "10.0.0.1:1__10.0.0.4:1"}
    assert cluster.beat(cluster.add("10.0.0.5:1", "mixed")) == ({}, {})


def half_a_decode_group(cluster: Cluster) -> tuple[Node, Node]:
    """A prefill node, rank 0 of a decode group of two processes, and their comm id; rank 1 is not there yet."""
    p = cluster.add(P, "prefill", world_size=2, devices=[{"device_id": 0}, {"device_id": 1}])
    d0 = cluster.add(D, "decode", world_size=2)
    cluster.connect(p)
    return p, d0


def test_a_group_is_ready_when_all_its_devices_are_online(cluster):
    _, d0 = half_a_decode_group(cluster)
    assert not cluster.registry.is_ready([d0])
    d1 = cluster.add(D, "decode", node_rank=1, world_size=2)
    assert cluster.registry.is_ready([d0, d1])
    cluster.now += 11
    cluster.beat(d0)
    assert not cluster.registry.is_ready([d0, d1])


def test_a_pair_whose_decode_group_is_not_ready_is_shown_empty(cluster):
    p, d0 = half_a_decode_group(cluster)
    assert cluster.beat(p) == cluster.beat(d0) == ({KEY: []}, {KEY: ""})
    assert "has 1 of 2 devices registered" in cluster.why_not()


def test_a_comm_id_survives_the_arrival_of_a_later_rank(cluster):
    _, d0 = half_a_decode_group(cluster)
    cluster.add(D, "decode", node_rank=1, world_size=2)
    addresses, ids = cluster.beat(d0)
    assert ids == {KEY: "id"} and [rank for rank, _, _ in addresses[KEY]] == [0, 0, 0, 1]


def test_decode_rank_0_still_sees_a_prefill_that_is_blocked(cluster, pair):
    cluster.now += 11
    addresses, ids = cluster.beat(pair[1])
    assert ids == {KEY: "id"} and len(addresses[KEY]) == 2


def test_prefill_is_not_shown_a_dead_decode(cluster, pair):
    cluster.now += 11
    assert cluster.beat(pair[0]) == ({}, {})
    cluster.beat(pair[1])
    assert cluster.beat(pair[0])[1] == {KEY: "id"}


# ---- comm ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_restart_of_either_side_voids_the_comm_id(cluster, pair, who):
    cluster.add(P if who == "prefill" else D, who, incarnation="2")
    assert not cluster.groups.states()[0].comm_id_set
    node = cluster.registry.group(P, pair[0].role)[0]
    assert cluster.beat(node)[1] == {KEY: ""}  # so that prefill makes a fresh one


def test_only_prefill_rank_0_may_register_a_comm_id(cluster, pair):
    with pytest.raises(Refused, match="Only prefill rank-0 nodes may register comm ids") as error:
        cluster.connect(pair[1])
    assert error.value.status == 403


@pytest.mark.parametrize(
    ("key", "status"),
    [("nonsense", 400), (f"10.9.9.9:1__{D}", 403), (f"{P}__10.9.9.9:1", 400)],
)
def test_a_comm_id_is_taken_for_ones_own_pairs_only(cluster, pair, key, status):
    with pytest.raises(Refused) as error:
        cluster.connect(pair[0], key=key)
    assert error.value.status == status


# ---- routing ---------------------------------------------------------------------------------------------------------


def test_a_pair_serves_when_both_sides_are_connected(cluster):
    p, d = cluster.add(P, "prefill"), cluster.add(D, "decode")
    for step, says in [
        (lambda: cluster.beat(p, []), "no comm id"),
        (lambda: cluster.connect(p), "prefill node 10.0.0.1:8067 is not connected"),
        (lambda: cluster.beat(p, [KEY]), "decode node 10.0.0.2:6890 has sent no heartbeat"),
        (lambda: cluster.beat(d, []), "decode node 10.0.0.2:6890 is not connected"),
    ]:
        step()
        assert says in cluster.why_not() and not cluster.groups.routes()
    cluster.beat(d, [KEY])
    assert cluster.why_not() is None and [r.comm_key for r in cluster.groups.routes()] == [KEY]


def test_reference_nodes_serve_once_both_sent_a_heartbeat_after_the_comm_id(cluster):
    p, d = cluster.add(P, "prefill"), cluster.add(D, "decode")
    cluster.beat(p)
    cluster.connect(p)
    cluster.now += 1
    cluster.beat(p)
    assert not cluster.groups.routes()
    cluster.beat(d)
    assert len(cluster.groups.routes()) == 1


def test_a_pair_stops_serving_when_a_side_loses_its_peer(cluster, pair):
    assert cluster.groups.routes()
    cluster.beat(pair[1], [])
    assert not cluster.groups.routes()


def test_a_pair_stops_serving_when_a_side_falls_silent(cluster, pair):
    assert cluster.groups.routes()
    cluster.now += 6
    cluster.beat(pair[0], [KEY])
    cluster.now += 6
    assert not cluster.groups.routes()  # nobody but the clock said so
    assert "decode node 10.0.0.2:6890 is offline (last heartbeat 12.0 s ago)" in cluster.groups.why_no_route()


def test_a_mixed_node_serves_alone(cluster):
    node = cluster.add("10.0.0.5:1", "mixed", coordinator_addr=None, devices=None, world_size=None)
    (route,) = cluster.groups.routes()
    assert route.decode is node and route.comm_key is None
    cluster.now += 11
    assert not cluster.groups.routes()


def test_a_node_that_says_its_engine_does_not_answer_gets_nothing_until_it_does(cluster, pair):
    answer = cluster.beat(pair[1], [KEY], is_serving=False)
    assert "decode node 10.0.0.2:6890 says that its engine does not answer" in cluster.why_not() and not cluster.groups.routes()
    assert answer[1] == cluster.beat(pair[0], [KEY])[1] == {KEY: "id"}  # the pair itself stays as it is
    cluster.beat(pair[1], [KEY], is_serving=True)
    assert cluster.groups.routes()


def test_a_mixed_node_without_its_engine_is_passed_over(cluster):
    nodes = [cluster.add(f"10.0.0.{i}:1", "mixed") for i in (5, 6)]
    cluster.beat(nodes[0], is_serving=False)
    assert [route.decode for route in cluster.groups.routes()] == [nodes[1]]
    cluster.beat(nodes[0])  # a node that does not say is taken to serve
    assert len(cluster.groups.routes()) == 2


def test_why_no_route_names_the_missing_roles(cluster):
    assert cluster.groups.why_no_route() == "no prefill and no decode node is registered"
    cluster.add(P, "prefill")
    assert cluster.groups.why_no_route() == "no decode node is registered"


def test_why_no_route_begins_with_the_living_and_is_short(cluster):
    for i in range(5):
        cluster.add(f"10.0.1.{i}:1", "prefill")
    cluster.add("10.0.2.1:1", "decode")
    cluster.now += 11
    cluster.add(P, "prefill"), cluster.add(D, "decode")
    first, *others, last = cluster.groups.why_no_route().split("; ")
    assert first == f"{KEY}: no comm id is registered for the pair"
    assert len(others) == 3 and last == "and 8 more, see GET /nodes"


def test_why_no_route_tells_of_mixed_nodes(cluster):
    node = cluster.add("10.0.0.5:1", "mixed")
    cluster.beat(node, is_serving=False)
    assert cluster.groups.why_no_route() == "mixed node 10.0.0.5:1 says that its engine does not answer"


def test_ids_of_pairs_that_are_no_more_are_dropped(cluster, pair):
    cluster.now += cluster.registry.purge_after_s + 1
    cluster.registry.expire()
    cluster.groups.expire()
    assert not cluster.groups.states() and not cluster.groups._comm_ids
