"""What the serving tests stand on: a small real byte-level BPE tokenizer, a fake engine on the real channel, a real node around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import zmq
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ksana_lab.config.engine import EngineConfig
from ksana_lab.protocol.channel import EngineChannel
from ksana_lab.protocol.engine import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStatus,
    FromEngine,
    GetStatus,
    SequenceUpdate,
    StepUpdates,
    ToEngine,
)
from ksana_lab.server.app import NodeServer
from ksana_lab.server.tokenizing import Tokenizer
from ksana_lab.types import FinishReason, Role, TokenLogprob

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "naïve café – 東京 2024 🙂🚀 straße",
    "STOP here, stop there; a stop string",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=1)
def bpe() -> str:
    """A byte-level BPE of 512 tokens and three special ones, as tokenizer.json."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("added word")])  # holds a space: not spelled in the byte alphabet
    return tokenizer.to_str()


def write_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(bpe(), encoding="utf-8")
    config = {"eos_token": "<|endoftext|>", "bos_token": None, "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


# ---- a fake engine on the real channel -------------------------------------------------------------------------------

READY = EngineReady(max_model_len=256, num_blocks=64, block_size=16, vocab_size=515, device="cpu", devices=[(0, "cpu")], max_num_seqs=8)


FILLER = 256  # what FakeEngine says behind the end of its script


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What FakeEngine says to ``prompt``: printable and half characters, never a special token."""
    return [(sum(prompt) * 31 + 97 * k) % 500 for k in range(count)]


@dataclass
class FakeSequence:
    request: AddRequest
    tokens: list[int] = field(default_factory=list)


class FakeEngine:
    """Speaks protocol.engine in a thread of its own. Deterministic; runs freely, or (``paused``) one token per ``step``."""

    def __init__(self, address: str, *, ready: EngineReady | None = READY, is_prefill: bool = False, paused: bool = False) -> None:
        self.is_prefill, self.paused, self.ready = is_prefill, paused, ready
        self.mute = False  # answers nothing
        self.connected: list[str] = []
        self.transfer: dict[str, float] = {}
        self.script: list[int] | None = None  # tokens to say instead of expected_tokens, then FILLER
        self.log_tail: str | None = None  # set by die()
        self.received: list[ToEngine] = []
        self._arrived = threading.Condition()
        self._live: dict[str, FakeSequence] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake_r, self._wake_w = socket.socketpair()
        self._channel = EngineChannel(address)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # what a test does
    def step(self, count: int = 1) -> None:
        self._do(lambda: [self._step() for _ in range(count)])

    def reset(self) -> None:
        """As new, for the next test of a shared node."""
        self.paused, self.script, self.mute = False, None, False
        done = threading.Event()
        self._do(lambda: (self._live.clear(), done.set()))
        assert done.wait(10)
        self.received = []

    def send(self, message: FromEngine) -> None:
        self._do(lambda: self._channel.send(message))

    def die(self, log_tail: str = "Traceback: out of memory") -> None:
        self.log_tail = log_tail

    def alive(self) -> str | None:
        return self.log_tail

    async def wait_for(self, kind: type, count: int = 1) -> list[Any]:
        """The first ``count`` messages of ``kind``."""
        return await asyncio.to_thread(self._wait_for, kind, count)

    def of(self, kind: type) -> list[Any]:
        return [m for m in self.received if isinstance(m, kind)]

    def close(self) -> None:
        self._do(None)
        self._thread.join(timeout=10)
        self._channel.close()
        self._wake_r.close()
        self._wake_w.close()

    # its thread
    def _wait_for(self, kind: type, count: int) -> list[Any]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.of(kind)) >= count, timeout=10), f"no {count} {kind.__name__} came"
            return self.of(kind)[:count]

    def _do(self, command: Any) -> None:
        self._commands.put(command)
        self._wake_w.send(b"x")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._channel.socket, zmq.POLLIN)
        poller.register(self._wake_r, zmq.POLLIN)
        if self.ready is not None:
            self._channel.send(self.ready)
        while True:
            poller.poll(0 if self._live and not self.paused else None)
            for message in self._channel.drain():
                self._on_message(message)
            while not self._commands.empty():
                self._wake_r.recv(1)
                command = self._commands.get()
                if command is None:
                    return
                command()
            if self._live and not self.paused:
                self._step()

    def _on_message(self, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self._live[message.request_id] = FakeSequence(message)
        elif isinstance(message, AbortRequest):
            self._live.pop(message.request_id, None)
        elif isinstance(message, GetStatus) and not self.mute:
            self._channel.send(self.status(message.token))
        with self._arrived:
            self.received.append(message)
            self._arrived.notify_all()

    def status(self, token: int = -1) -> EngineStatus:
        return EngineStatus(
            token=token, num_waiting=1, num_running=len(self._live), num_waiting_kv=2, num_held=3, num_blocks=64, num_free_blocks=60,
            num_leaked_blocks=0, num_preemptions=4, prefix_hit_tokens=5, prefix_query_tokens=6, prompt_tokens=7, generated_tokens=8,
            steps=9, connected=list(self.connected), transfer=dict(self.transfer), now_ns=time.monotonic_ns(),
            num_swapped=1, num_swap_outs=3, num_swap_ins=2, num_host_blocks=10, num_free_host_blocks=9,
        )  # fmt: skip

    def _step(self) -> None:
        updates = [self._advance(sequence) for sequence in list(self._live.values())]
        self._channel.send(StepUpdates(updates, 0, len(self._live)))

    def _advance(self, sequence: FakeSequence) -> SequenceUpdate:
        request, sampling = sequence.request, sequence.request.sampling
        k = len(sequence.tokens)
        if self.script is None:
            token = expected_tokens(request.prompt_token_ids, k + 1)[k]
        else:
            token = self.script[k] if k < len(self.script) else FILLER
        sequence.tokens.append(token)
        finish = None
        if token in sampling.stop_token_ids or (token in request.eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif k + 1 >= sampling.max_tokens or (self.is_prefill and request.transfer is not None):
            finish = FinishReason.LENGTH
        if finish is not None:
            del self._live[request.request_id]
        top = tuple((token + i, -0.5 - i) for i in range(sampling.logprobs or 0))
        return SequenceUpdate(
            request.request_id,
            [token],
            finish,
            stop_reason=token if finish is FinishReason.STOP else None,
            logprobs=None if sampling.logprobs is None else [TokenLogprob(token, -0.5, top)],
            num_cached_tokens=2,
            scheduled_ns=request.arrival_ns + 1_000_000,
            prefill_end_ns=request.arrival_ns + 3_000_000,
            first_token_ns=time.monotonic_ns(),
        )


# ---- a node: the real server around the fake engine ------------------------------------------------------------------


@dataclass
class Node:
    server: NodeServer
    engine: FakeEngine
    url: str
    client: httpx.AsyncClient
    task: asyncio.Task[int]

    async def events(self, path: str, body: dict, headers: dict[str, str] | None = None) -> list[Any]:
        """The events of one SSE stream, JSON decoded; "[DONE]" as itself."""
        response = await self.client.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse_events(response.text)

    async def objects(self, body: dict, headers: dict[str, str] | None = None) -> list[Any]:
        """The objects of one /generate stream."""
        response = await self.client.post("/generate", json=body, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["transfer-encoding"] == "chunked" and (not response.content or response.content.endswith(b"\0"))
        return [json.loads(part) for part in response.content.split(b"\0") if part]


def parse_events(text: str) -> list[Any]:
    parts = [part for part in text.split("\n\n") if part]
    assert all(part.startswith("data: ") for part in parts), parts
    return ["[DONE]" if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def node_config(model_dir: Path, role: Role = Role.MIXED, **groups: dict) -> EngineConfig:
    options = {"model": {"model_dir": str(model_dir)}, **groups}
    options["connector"] = {"role": role, **options.get("connector", {})}
    return EngineConfig.model_validate(options)


@contextlib.asynccontextmanager
async def running_node(tmp_path: Path, role: Role = Role.MIXED, *, paused: bool = False, ready: EngineReady | None = READY,
                       server_options: dict | None = None, **groups: dict):  # fmt: skip
    """A node serving HTTP on a free port of the loopback; ``groups``: option groups of EngineConfig."""
    config = node_config(write_tokenizer(tmp_path / "tiny-model"), role, **groups)
    address = f"ipc://{tmp_path}/api-{role.value}"
    engine = FakeEngine(address, ready=ready, is_prefill=role is Role.PREFILL, paused=paused)
    server = NodeServer(config, Tokenizer.load(config.model.model_dir), address, engine.alive, **(server_options or {}))
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.run(listener))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = httpx.AsyncClient(base_url=url, timeout=10, trust_env=False, verify=False)
    try:
        if ready is not None:
            await server.engine.wait_ready(10)
        yield Node(server, engine, url, client, task)
    finally:
        await client.aclose()
        server.stop()
        await asyncio.wait_for(task, 15)
        engine.close()
        listener.close()
