"""What the router costs: the same stub nodes asked directly and through it, in one run, on one machine.

Stub nodes speak the router's protocol (register, heartbeat, comm id, first token from prefill) and stream objects at known times, so that
all that is added is the router's. Three figures: time added to the first byte at concurrency 1; requests per second at many streams; CPU
time per request. Client, stubs and router share the machine's cores, as they did when KsanaLLM's router was measured: with stubs of the
same first-byte time, on 2 cores of another machine, it added about 50 ms and saturated near 52 requests/s. These two are shown beside ours
as measured elsewhere; no ratio to them is a measurement."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import http.client
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast

import psutil

from ksana_lab.process import die_with_parent
from ksana_lab.protocol.node import COMM_KEY_HEADER, FIRST_TOKEN_FROM_PREFILL, FIRST_TOKEN_HEADER

REFERENCE_ADDED_MS, REFERENCE_RPS = 50.0, 52.0  # of KsanaLLM's router, on another machine
START_S = 30.0  # for all processes to be up
HEARTBEAT_S = 0.2
Times = tuple[float, float, float]


@dataclass(frozen=True)
class Shape:
    """One reply: the first object after ``ttft_ms``, then one every ``gap_ms``."""

    ttft_ms: float
    gap_ms: float
    num_tokens: int

    def header(self) -> str:
        return f"{self.ttft_ms},{self.gap_ms},{self.num_tokens}"

    @property
    def duration_s(self) -> float:
        return (self.ttft_ms + (self.num_tokens - 1) * self.gap_ms) / 1e3


# ---- stub node -------------------------------------------------------------------------------------------------------


class _StubConnection(asyncio.Protocol):
    """Just enough HTTP/1.1 to be cheap: the stub must not be what is measured. The shape comes in a request header."""

    def __init__(self, role: str) -> None:
        self._role, self._received = role, bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end]).lower()
            size = int(_header(head, b"content-length") or 0)
            if len(self._received) < end + 4 + size:
                return
            del self._received[: end + 4 + size]
            self._reply(head)

    def _reply(self, head: bytes) -> None:
        assert self._transport is not None
        ttft_ms, gap_ms, num_tokens = _header(head, b"x-stub-shape").split(b",")
        is_paired = bool(_header(head, COMM_KEY_HEADER.encode()))
        tokens = range(int(num_tokens))
        if is_paired:
            tokens = tokens[:1] if self._role == "prefill" else tokens[1:]
        ack = f"{FIRST_TOKEN_HEADER}: {FIRST_TOKEN_FROM_PREFILL}\r\n" if is_paired and self._role == "decode" else ""
        self._transport.write(f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n{ack}\r\n".encode())
        asyncio.get_running_loop().call_later(
            (float(ttft_ms) + tokens.start * float(gap_ms)) / 1e3, self._send, tokens, float(gap_ms) / 1e3
        )

    def _send(self, tokens: range, gap_s: float) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        body = json.dumps({"texts": ["token " * (tokens.start + 1)], "output_token_ids": [list(range(tokens.start + 1))]}).encode() + b"\0"
        chunk = b"%x\r\n%b\r\n" % (len(body), body)
        if len(tokens) > 1:
            self._transport.write(chunk)
            asyncio.get_running_loop().call_later(gap_s, self._send, tokens[1:], gap_s)
        else:
            self._transport.write(chunk + b"0\r\n\r\n")


def _header(head: bytes, name: bytes) -> bytes:
    _, found, rest = head.partition(b"\r\n" + name + b":")
    return rest.partition(b"\r\n")[0].strip() if found else b""


def _stub_main(role: str, router_addr: str, parent: Connection) -> None:
    die_with_parent(os.getppid())

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _StubConnection(role), "127.0.0.1", 0, backlog=4096)
        addr = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        threading.Thread(target=_take_part, args=(role, addr, router_addr), daemon=True).start()
        parent.send(addr)
        await server.serve_forever()

    _run(serve())


def _take_part(role: str, addr: str, router_addr: str) -> None:
    """Register, then heartbeat for ever; prefill gives each of its pairs a comm id."""
    port = int(addr.rpartition(":")[2])
    particulars = {"inference_addr": addr, "group_role": role, "node_rank": 0, "coordinator_addr": f"127.0.0.2:{port}", "world_size": 1}
    node = _post(router_addr, "/RegisterNode", {**particulars, "devices": [{"device_id": 0}], "incarnation": str(os.getpid())})
    connected: list[str] = []
    while True:
        answer = _post(router_addr, "/Heartbeat", {"node_id": node["node_id"], "connected_comm_keys": connected})
        connected = [key for key, comm_id in answer["comm_group_to_id"].items() if comm_id]
        for key in answer["comm_group_to_id"]:
            if role == "prefill" and key not in connected:
                _post(router_addr, "/RegisterCommId", {"node_id": node["node_id"], "comm_key": key, "comm_id": key})
        time.sleep(HEARTBEAT_S)


def _post(addr: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(addr, timeout=START_S)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    if response.status >= 400:
        raise RuntimeError(f"{path}: {response.status} {answer}")
    return answer


def _router_main(port: int, policy: str, directory: str) -> None:
    die_with_parent(os.getppid())
    from ksana_lab.config.router import RouterConfig
    from ksana_lab.router.app import serve

    url = f"sqlite:///{directory}/router.db"
    raise SystemExit(serve(RouterConfig.model_validate({"port": port, "policy": policy, "database_url": url, "log_level": "WARNING"})))


# ---- client ----------------------------------------------------------------------------------------------------------


class _Stream(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._reply: asyncio.Future[Times] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self) -> Times:
        assert self._transport is not None
        self._reply = asyncio.get_running_loop().create_future()
        self._sent_s, self._first_s, self._in_body, self._tail = time.perf_counter(), 0.0, False, b""
        self._transport.write(self._request)
        return await self._reply

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._tail += data
        if not self._in_body:
            head, end, body = self._tail.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                return self._fail(f"{head[:40]!r} {body[:200]!r}")
            self._in_body, self._tail = True, body
            if not body:
                return
        self._first_s = self._first_s or now_s
        self._tail = self._tail[-7:]
        if self._tail == b"\r\n0\r\n\r\n" and self._reply is not None:
            self._reply.set_result((self._sent_s, self._first_s, now_s))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection was closed in the middle of a reply")

    def _fail(self, message: str) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(RuntimeError(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Load:
    """What one way of asking gave."""

    num_streams: int
    first_byte_ms: list[float] = field(default_factory=list)
    num_requests: int = 0
    duration_s: float = 0.0
    router_cpu_s: float = 0.0
    stub_cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    def add(self, replies: list[Times], duration_s: float, cpu_before: Times, cpu_after: Times) -> None:
        self.duration_s += duration_s
        self.num_requests += len(replies)
        self.first_byte_ms += [(first_s - sent_s) * 1e3 for sent_s, first_s, _ in replies]
        router, stubs, client = (after - before for after, before in zip(cpu_after, cpu_before, strict=True))
        self.router_cpu_s, self.stub_cpu_s, self.client_cpu_s = (
            self.router_cpu_s + router,
            self.stub_cpu_s + stubs,
            self.client_cpu_s + client,
        )

    @property
    def rps(self) -> float:
        return self.num_requests / self.duration_s if self.duration_s else 0.0

    def percentile_ms(self, q: int) -> float:
        """Nearest rank."""
        ordered = sorted(self.first_byte_ms)
        return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * q // 100) - 1))]


@dataclass
class Bench:
    """The processes of one run, and how to load them."""

    router_addr: str
    direct_addr: str
    router: psutil.Process
    stubs: list[psutil.Process]
    body: bytes

    def full(self, into: Load, is_direct: bool, shape: Shape, duration_s: float) -> None:
        """``into.num_streams`` closed loops for ``duration_s``, once all of them are connected."""
        _run(self._closed_loops(into, is_direct, shape, duration_s))

    def alone(self, into: dict[bool, Load], shape: Shape, num_requests: int) -> None:
        """One request at a time, directly and through the router in turn, each on a connection that stays."""
        _run(self._in_turn(into, shape, num_requests))

    async def _closed_loops(self, into: Load, is_direct: bool, shape: Shape, duration_s: float) -> None:
        replies: list[Times] = []

        async def loop(stream: _Stream) -> None:
            while time.perf_counter() < until_s:
                replies.append(await stream.ask())
            stream.close()

        streams = [await self._connect(is_direct, shape) for _ in range(into.num_streams)]
        before, start_s = self._cpu_s(), time.perf_counter()
        until_s = start_s + duration_s
        await asyncio.wait_for(asyncio.gather(*map(loop, streams)), duration_s + 10 * shape.duration_s + 30)
        into.add(replies, time.perf_counter() - start_s, before, self._cpu_s())

    async def _in_turn(self, into: dict[bool, Load], shape: Shape, num_requests: int) -> None:
        streams = {is_direct: await self._connect(is_direct, shape) for is_direct in into}
        for i in range(num_requests + 3):
            for is_direct, load in into.items():
                before, start_s = self._cpu_s(), time.perf_counter()
                reply = await asyncio.wait_for(streams[is_direct].ask(), 30 + shape.duration_s)
                if i >= 3:  # the first ones open the router's own connections
                    load.add([reply], time.perf_counter() - start_s, before, self._cpu_s())
        for stream in streams.values():
            stream.close()

    async def _connect(self, is_direct: bool, shape: Shape) -> _Stream:
        addr = self.direct_addr if is_direct else self.router_addr
        head = f"POST /generate HTTP/1.1\r\nhost: {addr}\r\ncontent-type: application/json\r\nx-stub-shape: {shape.header()}\r\n"
        request = head.encode() + b"content-length: %d\r\n\r\n" % len(self.body) + self.body
        host, _, port = addr.rpartition(":")
        return (await asyncio.get_running_loop().create_connection(lambda: _Stream(request), host, int(port)))[1]

    def _cpu_s(self) -> tuple[float, float, float]:
        return _cpu_of(self.router), sum(map(_cpu_of, self.stubs)), _cpu_of(psutil.Process())


def _cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextlib.contextmanager
def started(num_pairs: int, policy: str, prompt_bytes: int) -> Iterator[Bench]:
    """Router and stub nodes in processes of their own, routable; all gone afterwards."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="ksana-lab-bench-") as directory:
        try:
            router = context.Process(target=_router_main, args=(port, policy, directory), daemon=True)
            router.start()
            processes.append(router)
            addr = f"127.0.0.1:{port}"
            _wait_for(router, lambda: _get(addr, "/health") is not None, "the router does not answer")
            addrs: dict[str, list[str]] = {"prefill": [], "decode": []}
            for role in ["prefill", "decode"] * num_pairs:
                ours, theirs = context.Pipe()
                stub = context.Process(target=_stub_main, args=(role, addr, theirs), daemon=True)
                stub.start()
                processes.append(stub)
                if not ours.poll(START_S):
                    raise RuntimeError(f"a {role} stub did not start within {START_S:g} s")
                addrs[role].append(ours.recv())
            _wait_for(router, lambda: (_get(addr, "/health") or {}).get("routes") == num_pairs**2, "the stub nodes did not connect")
            body = json.dumps({"prompt": "x" * prompt_bytes, "stream": True}).encode()
            stubs = [psutil.Process(p.pid) for p in processes[1:]]
            yield Bench(addr, addrs["decode"][0], psutil.Process(router.pid), stubs, body)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(10)


def _get(addr: str, path: str) -> dict[str, Any] | None:
    connection = http.client.HTTPConnection(addr, timeout=5)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    except OSError:
        return None
    finally:
        connection.close()


def _wait_for(process: Any, is_true: Callable[[], bool], why_not: str) -> None:
    until_s = time.monotonic() + START_S
    while not is_true():
        if time.monotonic() > until_s or not process.is_alive():
            raise RuntimeError(f"{why_not} (waited {START_S:g} s)")
        time.sleep(0.05)


def _run(main: Any) -> Any:
    """On uvloop where it runs, as the router's server does."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


# ---- the report ------------------------------------------------------------------------------------------------------


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Direct and routed rounds alternate, so that whatever else the machine does hits both alike."""
    shape = Shape(options.ttft_ms, options.gap_ms, options.tokens)
    short = Shape(options.ttft_ms, options.gap_ms, 2)
    alone = {True: Load(1), False: Load(1)}
    bench.alone(alone, short, options.requests)
    full = {True: Load(options.streams), False: Load(options.streams)}
    for is_direct in full:
        bench.full(Load(options.streams), is_direct, short, 0.5)  # connections, caches
    for _ in range(options.rounds):
        for is_direct, load in full.items():
            bench.full(load, is_direct, shape, options.duration / options.rounds)
    return _report(options, shape, alone, full)


def _report(options: argparse.Namespace, shape: Shape, alone: dict[bool, Load], full: dict[bool, Load]) -> dict[str, Any]:
    rows = {}
    for name, load in (("direct.c1", alone[True]), ("routed.c1", alone[False]), ("direct.full", full[True]), ("routed.full", full[False])):
        n = max(1, load.num_requests)
        rows[name] = {
            "streams": load.num_streams,
            "requests": load.num_requests,
            "first_byte_ms": {"p50": load.percentile_ms(50), "p99": load.percentile_ms(99), "mean": statistics.mean(load.first_byte_ms)},
            "rps": load.rps,
            "cpu_ms_per_request": {
                "router": load.router_cpu_s / n * 1e3,
                "stubs": load.stub_cpu_s / n * 1e3,
                "client": load.client_cpu_s / n * 1e3,
            },
        }
    added = {q: rows["routed.c1"]["first_byte_ms"][q] - rows["direct.c1"]["first_byte_ms"][q] for q in ("p50", "p99")}  # type: ignore[index]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_average": os.getloadavg()[0],
        },
        "command": "python -m ksana_lab.bench router " + " ".join(options.argv),
        "shape": asdict(shape),
        "rows": rows,
        "added_first_byte_ms": added,
        "routed_rps": full[False].rps,
        "routed_over_direct_rps": full[False].rps / full[True].rps,
        "most_possible_rps": options.streams / shape.duration_s if shape.duration_s else None,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _print(report: dict[str, Any]) -> None:
    print(f"{report['machine']['cores']} cores, {report['machine']['cpu']}, load average {report['machine']['load_average']:.1f}")
    print(f"{'':42}first byte (ms)         CPU ms per request")
    print(f"{'':14}{'streams':>8}{'requests':>9}{'p50':>13}{'p99':>10}{'req/s':>8}{'router':>9}{'stubs':>8}{'client':>8}")
    for name, row in report["rows"].items():
        first, cpu = row["first_byte_ms"], row["cpu_ms_per_request"]
        spent = "".join(f"{cpu[who]:{width}.2f}" for who, width in (("router", 9), ("stubs", 8), ("client", 8)))
        print(f"{name:14}{row['streams']:8}{row['requests']:9}{first['p50']:13.2f}{first['p99']:10.2f}{row['rps']:8.0f}{spent}")
    added, rps = report["added_first_byte_ms"], report["routed_rps"]
    print(f"\nadded to the first byte at concurrency 1: p50 {added['p50']:.2f} ms, p99 {added['p99']:.2f} ms", end="")
    print(f"   (KsanaLLM's router, measured elsewhere: {REFERENCE_ADDED_MS:.0f} ms)")
    most = report["most_possible_rps"]
    print(f"requests/s: {rps:.0f}, {report['routed_over_direct_rps']:.2f} of direct", end="")
    print(f", the streams' own length allows {most:.0f}" if most else "", end="")
    print(f"   (KsanaLLM's router, measured elsewhere: {REFERENCE_RPS:.0f})")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench router", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=80, help="at concurrency 1, each way (default %(default)s)")
    parser.add_argument("--streams", type=int, default=128, help="at saturation (default %(default)s)")
    parser.add_argument("--duration", type=float, default=10.0, help="s at saturation, each way (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of saturation, direct and routed in turn (default %(default)s)")
    parser.add_argument("--ttft-ms", type=float, default=100.0, help="of the stub nodes (default %(default)s)")
    parser.add_argument("--gap-ms", type=float, default=10.0, help="between a stub's objects (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="objects per reply at saturation (default %(default)s)")
    parser.add_argument("--prompt-bytes", type=int, default=2000, help="(default %(default)s)")
    parser.add_argument("--pairs", type=int, default=1, help="prefill and decode stubs, each (default %(default)s)")
    parser.add_argument("--policy", default="least_loaded", choices=("random", "round_robin", "least_loaded"))
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args(argv)
    options.argv = list(argv)
    try:
        with started(options.pairs, options.policy, options.prompt_bytes) as bench:
            report = measure(bench, options)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(report)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0
