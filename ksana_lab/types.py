"""Words that every floor shares: roles, sampling parameters, finish reasons, addresses. Imports nothing of ours."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Role(str, Enum):
    """What a node does. KsanaLLM calls it ``group_role`` and spells MIXED ``none``."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def is_disaggregated(self) -> bool:
        return self is not Role.MIXED


class FinishReason(str, Enum):
    """Why a sequence stopped. The first two are the OpenAI API's words; the rest are never seen in a 200 answer's body alone."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def is_loopback(host: str) -> bool:
    """Whether ``host``, an IP literal or a name, means whichever host says it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def family_of(host: str) -> socket.AddressFamily:
    """Of a socket at ``host``, an IP literal or a name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class NodeAddr(NamedTuple):
    """``host:port``; the host is an IP literal or a name, never a URL."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> NodeAddr:
        """Parse ``host:port`` or ``[v6]:port``. Raises ValueError that names the text and the fault."""
        host, sep, port = text.strip().rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not sep or not host or any(c in host for c in " \t/?#@"):
            raise ValueError(f"{text!r} is not host:port")
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError(f"{text!r}: port must be 1..65535")
        return cls(host, int(port))

    @property
    def is_ip_literal(self) -> bool:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True


def seed_of(*parts: object) -> int:
    """63 bits for a request that brings no seed, from the node's own and what names the request. Hashed, so that sample j's ``+ j`` is
    never another request's seed."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token of one sequence. ``temperature == 0`` is greedy and ignores top-k, top-p, min-p and seed.

    Raises ValueError from ``__post_init__`` with the field's name first, so that an API can answer 422 with it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # same seed, same tokens, whatever the batch and on whichever node
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    presence_penalty: float = 0.0  # over output, as in the OpenAI API
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None  # None: none; k >= 0: of the chosen token and the k likeliest
    n: int = 1

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "must be in 0..100"),
            ("top_k", self.top_k >= 0, "must be 0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be in (0, 1]"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be in 0..1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "must be in (0, 100]"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "must be in -2..2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "must be in -2..2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "must be in 0..20"),
            ("n", 1 <= self.n <= 128, "must be in 1..128"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "must be in 0..max_tokens"),
        )
        for name, is_good, rule in checks:
            if not is_good:
                raise ValueError(f"{name} {rule}, got {getattr(self, name)!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities at one position, before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # likeliest first


@dataclass
class RequestOutput:
    """What ``LLM.generate`` returns for one prompt: ``n`` completions."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
