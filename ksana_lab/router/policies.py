"""Which of the routes that can serve gets the next request. Pure: candidates and features in, one of them out.

A policy that knows the nodes' caches fits the same interface: ``RequestFeatures.prefix_hashes`` tells what prompts have in common."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import orjson

from ksana_lab.router.comm_groups import Route
from ksana_lab.router.registry import Node

BYTES_PER_TOKEN = 4  # of a request body; English text has 4.2, token ids as JSON 5 to 7
TOKENS_PER_REQUEST = 512  # prompt tokens in flight that weigh as much as one more request in the batch
PREFIX_BYTES = 512  # of text, or 128 token ids: the grain of ``prefix_hashes``


class RequestFeatures:
    """What a policy may know of a request. Only what is asked for is computed: the body is parsed by nobody else on its way."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.num_prompt_tokens = max(1, len(body) // BYTES_PER_TOKEN)  # an estimate

    @cached_property
    def _fields(self) -> dict[str, Any]:
        try:
            fields = orjson.loads(self._body)
        except orjson.JSONDecodeError:
            return {}  # the node will say what is wrong with it
        return fields if isinstance(fields, dict) else {}

    @cached_property
    def prefix_hashes(self) -> tuple[int, ...]:
        """One 64-bit hash per leading ``PREFIX_BYTES`` of the prompt, each over all before it: equal hashes = equal beginnings."""
        prompt = next((self._fields[k] for k in ("input_tokens", "messages", "prompt") if self._fields.get(k)), "")
        text = prompt.encode() if isinstance(prompt, str) else orjson.dumps(prompt)
        digest = hashlib.blake2b(digest_size=8)
        hashes = []
        for start in range(0, len(text) - PREFIX_BYTES + 1, PREFIX_BYTES):
            digest.update(text[start : start + PREFIX_BYTES])
            hashes.append(int.from_bytes(digest.digest(), "big"))
        return tuple(hashes)


class Policy(Protocol):
    def choose(self, candidates: Sequence[Route], features: RequestFeatures) -> Route:
        """``candidates`` is never empty and always in the same order while nothing changes. Called once per attempt, on the token path."""
        ...


class Random:
    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, candidates: Sequence[Route], features: RequestFeatures) -> Route:
        return self._rng.choice(candidates)


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def choose(self, candidates: Sequence[Route], features: RequestFeatures) -> Route:
        self._next += 1
        return candidates[(self._next - 1) % len(candidates)]


class LeastLoaded:
    """The route whose nodes have least to do: requests in flight, and tokens of their prompts. Equals take turns."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Route], features: RequestFeatures) -> Route:
        self._turn += 1
        n = len(candidates)
        return min((candidates[(self._turn + i) % n] for i in range(n)), key=load_of)


def load_of(route: Route) -> float:
    """The mean over the route's nodes, so that a pair and a mixed node compare."""
    return sum(map(load_of_node, route.nodes)) / len(route.nodes)


def load_of_node(node: Node) -> float:
    return node.num_requests + node.num_requests_elsewhere + node.num_tokens / TOKENS_PER_REQUEST


POLICIES: dict[str, type[Random] | type[RoundRobin] | type[LeastLoaded]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
}


def make(name: str) -> Policy:
    return POLICIES[name]()
