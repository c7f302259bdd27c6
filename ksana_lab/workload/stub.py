"""A server of known timing, to prove the client against: it answers with a token after ``ttft_s`` and one every ``gap_s`` after it, and
notes when it really wrote each. A plain asyncio protocol, since a framework's own delays would be in what it is to prove.

    python -m ksana_lab.workload.stub --port 8100 --ttft-ms 100 --gap-ms 10

Speaks what client.py speaks: /generate, /v1/completions, /v1/chat/completions, /v1/models. No model: token k of any answer is k."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import orjson


@dataclass
class StubTiming:
    """What the stub really did with one request; monotonic seconds."""

    received_s: float
    written_s: list[float] = field(default_factory=list)  # one per token


@dataclass
class StubServer:
    ttft_s: float = 0.1
    gap_s: float = 0.01
    fail_after_tokens: int | None = None  # hang up after so many
    status: int = 200  # other than 200: answered at once with an OpenAI error body
    vocab_size: int = 300
    timings: dict[str, StubTiming] = field(default_factory=dict)  # by x-request-id
    bodies: dict[str, dict] = field(default_factory=dict)
    num_disconnects: int = 0  # clients that hung up before the end

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[asyncio.AbstractServer, str]:
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), host, port, backlog=1024)
        return server, f"http://{host}:{server.sockets[0].getsockname()[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Serves from a thread of its own on a free port of 127.0.0.1; yields the base URL."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        server, url = asyncio.run_coroutine_threadsafe(self.start(), loop).result(timeout=10)
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=10)
            loop.close()


class _Connection(asyncio.Protocol):
    def __init__(self, stub: StubServer) -> None:
        self.stub = stub
        self.buffer = b""
        self.transport: asyncio.Transport
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.stub.num_disconnects += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        request_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if len(body) < int(headers.get("content-length", 0)):
            return
        self.buffer = b""
        self.answer(request_line.split(" ")[1], headers, body)

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": "stub", "object": "model", "vocab_size": self.stub.vocab_size}]})
        elif self.stub.status != 200:
            self.reply(self.stub.status, {"error": {"type": "stub", "message": "asked to fail"}})
        else:
            self.stream(path, headers.get("x-request-id", ""), orjson.loads(body))

    def reply(self, status: int, body: dict) -> None:
        data = orjson.dumps(body)
        head = f"HTTP/1.1 {status} Stub\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.transport.write(head.encode() + data)

    def stream(self, path: str, request_id: str, body: dict) -> None:
        stub, loop = self.stub, asyncio.get_running_loop()
        timing = stub.timings[request_id] = StubTiming(time.monotonic())
        stub.bodies[request_id] = body
        num_tokens = body["sampling_config"]["max_new_tokens"] if path == "/generate" else body["max_tokens"]
        self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        first = loop.time() + stub.ttft_s

        def write_token(k: int) -> None:
            self.timer = None
            if stub.fail_after_tokens is not None and k >= stub.fail_after_tokens:
                self.transport.close()
                return
            data = _message(path, body, k, num_tokens)
            timing.written_s.append(time.monotonic())
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            if k + 1 < num_tokens:
                self.timer = loop.call_at(first + (k + 1) * stub.gap_s, write_token, k + 1)
            else:
                self.transport.write(b"0\r\n\r\n")

        self.timer = loop.call_at(first, write_token, 0)


def _message(path: str, body: dict, k: int, num_tokens: int) -> bytes:
    if path == "/generate":
        ids = list(range(k + 1))
        answer = {"texts": [" ".join(map(str, ids))], "output_token_ids": [ids], "input_token_ids": body["input_tokens"]}
        return orjson.dumps(answer) + b"\0"
    is_last = k + 1 == num_tokens
    prompt = body.get("prompt") or [0] * len(body["messages"][0]["content"].split())
    choice: dict = {"index": 0, "finish_reason": "length" if is_last else None}
    choice |= {"delta": {"content": f"{k} "}} if "chat" in path else {"text": f"{k} "}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": k + 1, "total_tokens": len(prompt) + k + 1}
    return b"data: " + orjson.dumps({"choices": [choice], "usage": usage}) + b"\n\n" + (b"data: [DONE]\n\n" if is_last else b"")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A server of known timing, to prove a load generator against. Ends with its standard input."
    )
    parser.add_argument("--port", type=int, default=8100, help="0 = a free one")
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    parser.add_argument("--gap-ms", type=float, default=10.0)
    parser.add_argument(
        "--timings", type=Path, default=None, metavar="FILE", help="at the end, when each token was written (JSON, monotonic seconds)"
    )
    options = parser.parse_args()
    stub = StubServer(options.ttft_ms / 1e3, options.gap_ms / 1e3)

    async def serve() -> None:
        server, url = await stub.start(port=options.port)
        print(f"{url}: first token after {options.ttft_ms:g} ms, one every {options.gap_ms:g} ms", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        server.close()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())  # not uvloop: it gathers writes to the end of a turn, after the time that was noted
    if options.timings is not None:
        options.timings.write_bytes(orjson.dumps(stub.timings))


if __name__ == "__main__":
    main()
