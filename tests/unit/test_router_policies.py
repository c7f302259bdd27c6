"""Which route a policy picks."""

from __future__ import annotations

import json
import random
from collections import Counter

from ksana_lab.router.comm_groups import Route
from ksana_lab.router.policies import LeastLoaded, Random, RequestFeatures, RoundRobin, load_of
from ksana_lab.router.registry import Node
from ksana_lab.types import Role

ANY = RequestFeatures(b"{}")


def node(addr: str, role: Role = Role.MIXED) -> Node:
    return Node(addr, addr, role, 0, "1", None, 1, 1, None, 0.0, 0.0)


def mixed(*addrs: str) -> list[Route]:
    return [Route(None, None, node(addr)) for addr in addrs]


def mesh() -> list[Route]:
    prefills, decodes = [node(a, Role.PREFILL) for a in "pq"], [node(a, Role.DECODE) for a in "de"]
    return [Route(f"{p.node_id}__{d.node_id}", p, d) for p in prefills for d in decodes]


def test_round_robin_takes_turns():
    policy, routes = RoundRobin(), mixed("a", "b", "c")
    assert [policy.choose(routes, ANY).decode.node_id for _ in range(6)] == list("abcabc")


def test_random_reaches_all():
    policy, routes = Random(random.Random(0)), mixed("a", "b", "c")
    counts = Counter(policy.choose(routes, ANY).decode.node_id for _ in range(300))
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 70


def test_least_loaded_picks_the_idle_side_of_each_role():
    routes = mesh()
    routes[0].prefill.take(100)  # p
    routes[1].decode.take(100)  # e
    assert LeastLoaded().choose(routes, ANY).comm_key == "q__d"


def test_least_loaded_counts_tokens_not_only_requests():
    a, b = mixed("a", "b")
    a.decode.take(8000)
    b.decode.take(10), b.decode.take(10)
    assert LeastLoaded().choose([a, b], ANY) is b


def test_least_loaded_counts_what_others_sent():
    a, b = mixed("a", "b")
    a.decode.num_requests_elsewhere = 5
    b.decode.take(10)
    assert LeastLoaded().choose([a, b], ANY) is b


def test_least_loaded_spreads_over_idle_routes():
    policy, routes = LeastLoaded(), mixed("a", "b", "c")
    assert Counter(policy.choose(routes, ANY).decode.node_id for _ in range(6)) == {"a": 2, "b": 2, "c": 2}


def test_a_pair_and_a_mixed_node_with_a_request_on_each_node_weigh_the_same():
    (alone,), pair = mixed("a"), mesh()[0]
    for n in (*alone.nodes, *pair.nodes):
        n.take(100)
    assert load_of(alone) == load_of(pair)


def test_prompts_with_a_common_beginning_share_their_first_hashes():
    a, b = ["x" * 1024 + "a" * 600, "x" * 1024 + "b" * 600]
    of = [RequestFeatures(json.dumps({"stream": True, "prompt": p}).encode()).prefix_hashes for p in (a, b)]
    assert len(of[0]) == 3 and of[0][:2] == of[1][:2] and of[0][2] != of[1][2]


def test_features_of_a_body_that_is_no_json_are_empty():
    assert RequestFeatures(b"\xff{").prefix_hashes == () and RequestFeatures(b"[1]").prefix_hashes == ()
