"""A prefill engine and a decode engine in one test, joined by the real connectors over real sockets; no HTTP, no router."""

from __future__ import annotations

import time
from contextlib import ExitStack

from helpers_checkpoint import checkpoint

from ksana_lab.cluster.ports import PortPool
from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.engine import Engine
from ksana_lab.protocol.engine import AddRequest, PeerUpdate, SequenceUpdate, TransferKey
from ksana_lab.types import NodeAddr, SamplingParams

TIMEOUT_S = 60.0


class EnginePair:
    """``tp``: ranks of (P, D). Other options are fields of a section, e.g. ``cache={"block_size": 8}``. ``decode``: D's own sections, of a
    pair that is not expected to connect."""

    def __init__(
        self,
        *,
        arch: str = "qwen3",
        tp: tuple[int, int] = (1, 1),
        model_dir: str | None = None,
        decode: dict[str, dict] | None = None,
        **sections: dict,
    ) -> None:
        self._stack = ExitStack()
        ports = PortPool()
        self._stack.callback(ports.close)
        addresses = {role: NodeAddr("127.0.0.1", ports("127.0.0.1")) for role in ("prefill", "decode")}
        self.comm_key = "127.0.0.1:1__127.0.0.1:2"
        self.engines: dict[str, Engine] = {}
        try:
            for role, size in zip(("prefill", "decode"), tp, strict=True):
                own = sections | (decode or {}) if role == "decode" else sections
                config = _config(role, size, addresses[role], model_dir or checkpoint(arch), own)
                self.engines[role] = engine = Engine(config)
                self._stack.callback(engine.close)
            tuples = [(0, i, str(addresses[role])) for role, size in zip(addresses, tp, strict=True) for i in range(size)]
            update = PeerUpdate([PeerUpdate.Pair(self.comm_key, "comm-1", tuples)])
            for engine in self.engines.values():
                engine.update_peers(update)
            if decode is None:
                self.drive(lambda: all(engine.status().connected for engine in self.engines.values()))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EnginePair:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def add(self, role: str, number: int, prompt: list[int], sampling: SamplingParams) -> None:
        key = TransferKey(self.comm_key, number + 1)
        request = AddRequest(f"r{number}", list(prompt), sampling, time.monotonic_ns(), transfer=key)
        assert self.engines[role].add(request) is None

    def drive(self, is_done, *, on_updates=lambda role, updates: None) -> None:
        """Turn both engines until ``is_done()``."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_done():
            assert time.monotonic() < deadline, {role: engine.status() for role, engine in self.engines.items()}
            for role, engine in self.engines.items():
                on_updates(role, engine.step())

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, *, order: str = "both") -> list[list[int]]:
        """The decode node's tokens of each prompt. ``order``: who hears of a request first."""
        tokens: dict[str, list[int]] = {f"r{i}": [] for i in range(len(prompts))}
        finished: dict[str, set[str]] = {"prefill": set(), "decode": set()}

        def collect(role: str, updates: list[SequenceUpdate]) -> None:
            for update in updates:
                assert update.error is None, update
                if role == "decode":
                    tokens[update.request_id] += update.new_token_ids
                if update.finish is not None:
                    finished[role].add(update.request_id)

        roles = {"both": ("prefill", "decode"), "late_decode": ("prefill",), "late_prefill": ("decode",)}[order]
        late = {"both": (), "late_decode": ("decode",), "late_prefill": ("prefill",)}[order]
        for role in roles:
            for i, prompt in enumerate(prompts):
                self.add(role, i, prompt, sampling)
        if order == "late_decode":
            self.drive(lambda: len(finished["prefill"]) == len(prompts), on_updates=collect)
        for role in late:
            for i, prompt in enumerate(prompts):
                self.add(role, i, prompt, sampling)
        self.drive(lambda: len(finished["decode"]) == len(prompts), on_updates=collect)
        self.drive(lambda: all(engine.is_idle for engine in self.engines.values()))
        return list(tokens.values())

    def leaks(self) -> dict[str, int]:
        """Blocks that are not free, by role."""
        counts = {}
        for role, engine in self.engines.items():
            status = engine.status()
            counts[role] = status.num_blocks - status.num_free_blocks + status.num_leaked_blocks
        return counts


def _config(role: str, tp_size: int, address: NodeAddr, model_dir: str, sections: dict) -> EngineConfig:
    connector = {"role": role, "coordinator_addr": address, "router_addr": NodeAddr("127.0.0.1", 1), "inference_addr": address}
    return EngineConfig.model_validate(
        {
            "model": {"model_dir": model_dir} | sections.get("model", {}),
            "parallel": {"tensor_parallel_size": tp_size},
            "cache": {"block_size": 8, "num_blocks": 160} | sections.get("cache", {}),
            "scheduler": {"waiting_timeout_s": 30.0} | sections.get("scheduler", {}),
            "connector": connector | {"connect_timeout_s": 30.0, "lease_s": 20.0} | sections.get("connector", {}),
            "runtime": {"device": "cpu", "num_threads": 1} | sections.get("runtime", {}),
        }
    )
