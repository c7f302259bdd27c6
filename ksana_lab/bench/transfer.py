"""KV transfer, measured: what the data plane reaches, what stays exposed behind a real prefill, what a client notices.

    python -m ksana_lab.bench transfer [--model qwen3-8b] [--backend auto] [--mode bulk,layer] [--tokens 1024,8192] [--gbps none,400]
                                       [--parts link,overlap,fp8] [--end-to-end] [--csv FILE] [--figure FILE] [--json FILE]

``link``: two processes and a link between them; blocks scattered at random on both sides; descriptors, post time and wire time apart where
the device takes its own time (elsewhere they are not separable: no post, and the wire is the whole round), held against one contiguous copy
of the same bytes in the same run. ``overlap``: a prefill engine here and a decode engine in another process;
prompts with the transfer on and off in turn, since clocks drift. ``--end-to-end``: a mixed node and a 1P1D pair, both behind routers, asked
in turn. ``fp8``: what KV in eight bits does to the logits, on a model directory of one's own with ``--model-dir``. Weights are random but
there; on a CPU the same code runs with the tiny model.

Hidden fraction = 1 - exposed / wire, with exposed the time from the last layer's end to the last byte's arrival, and wire the sum over the
pieces. On a GPU both are taken by its clock; ``exposed_ms`` is the sender's own, up to the acknowledgement. On an emulated link, of which a
GPU's clock knows nothing, both are the sender's; what the bytes take at the link's speed, and nothing else, is ``nominal_wire_ms``."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksana_lab.bench import _results
from ksana_lab.bench._answers import all_answered, note_of
from ksana_lab.bench._engines import Pair
from ksana_lab.bench._transfer_peer import WINDOW
from ksana_lab.bench.wire_dtype import measure as measure_fp8
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.metrics.latency import PER_REQUEST, TTFT_PARTS, tpot_s, ttft_s
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.models.synth import shape, synthesize
from ksana_lab.protocol.engine import SequenceUpdate
from ksana_lab.transfer.base import DeviceTicket, Link
from ksana_lab.transfer.plan import HeadSlice, copies, shifted
from ksana_lab.transfer.registry import AUTO, make_backend, registers_source
from ksana_lab.types import SamplingParams

_BLOCK_SIZE = 16
_TIMEOUT_S = 60.0
_CHUNK_TOKENS = 2048  # of the data plane's chunk mode
_PER_TURN = 2  # requests that count, of each cluster, before the other's turn
_STYLES: dict[str, dict[str, Any]] = {  # of a mode in every panel; colours of Okabe and Ito
    "bulk": {"color": "#0072B2", "marker": "o"},
    "chunk": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "layer": {"color": "#D55E00", "marker": "^"},
    "auto": {"color": "#009E73", "marker": "D", "linestyle": ":"},
}
_HOLD_CYCLES = 100_000_000  # of the GPU, 50 ms: longer than the host posts


@dataclass
class Row:
    """One setting. ms are medians; ``gbps`` None = as fast as the hardware; any other None = does not apply, or cannot be told apart."""

    part: str
    backend: str
    mode: str
    tokens: int
    gbps: float | None = None
    wire_dtype: str = "auto"
    nbytes: int = 0  # on the wire
    descriptors: int = 0
    post_ms: float | None = None
    wire_ms: float | None = None  # measured
    nominal_wire_ms: float | None = None  # emulated links: the bytes over gbps
    total_ms: float = 0.0  # link: until the last acknowledgement; overlap: until P has its token
    reference_ms: float = 0.0  # link: one contiguous copy; overlap: the same prefill with the transfer off
    exposed_ms: float | None = None
    device_exposed_ms: float | None = None
    handover_ms: float | None = None  # from P's token to D's

    @property
    def bandwidth_ratio(self) -> float | None:
        return self.reference_ms / self.wire_ms if self.part == "link" and self.wire_ms else None

    @property
    def bandwidth_gbs(self) -> float | None:
        return self.nbytes / self.wire_ms / 1e6 if self.part == "link" and self.wire_ms else None

    @property
    def hidden_fraction(self) -> float | None:
        exposed = self.exposed_ms if self.device_exposed_ms is None else self.device_exposed_ms  # by the clock that took wire_ms
        return None if exposed is None or not self.wire_ms else 1.0 - min(1.0, exposed / self.wire_ms)

    @property
    def slowdown_pct(self) -> float | None:
        return 100 * (self.total_ms / self.reference_ms - 1) if self.part == "overlap" and self.reference_ms else None

    def line(self) -> str:
        where = (
            f"{self.part:8s} {self.backend:8s} {self.mode:6s} {self.tokens:6d} tok {'wire' if self.gbps is None else f'{self.gbps:g}G':>5s}"
        )
        if self.part == "link":
            return (
                f"{where}  {self.descriptors:6d} descr  post {_shown(self.post_ms, '7.3f')}  wire {_shown(self.wire_ms, '8.3f')}  "
                f"total {self.total_ms:8.3f} ms  {_shown(self.bandwidth_gbs, '7.1f')} GB/s  "
                f"{_shown(self.bandwidth_ratio, '.3f')} of contiguous{'' if self.post_ms is not None else '; post and wire not separable'}"
            )
        nominal = "" if self.nominal_wire_ms is None else f" (nominal {self.nominal_wire_ms:.3f})"
        return (
            f"{where}  prefill {self.total_ms:8.2f} (off {self.reference_ms:8.2f}, {_shown(self.slowdown_pct, '+5.1f')}%)  "
            f"wire {_shown(self.wire_ms, '8.3f')}{nominal}  exposed {_shown(self.exposed_ms, '7.3f')} "
            f"device {_shown(self.device_exposed_ms, '6.3f')}  hidden {_shown(self.hidden_fraction, '.3f')}  "
            f"handover {_shown(self.handover_ms, '7.3f')} ms"
        )


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


# ---- the data plane alone --------------------------------------------------------------------------------------------


class _Acks:
    def __init__(self) -> None:
        self.count = 0
        self.lost: str | None = None

    def on_ack(self, token: int, error: str | None) -> None:
        assert error is None, error
        self.count += 1

    def on_lost(self, reason: str) -> None:
        self.lost = reason


@contextmanager
def link_between(
    name: str, layout: KVLayout, devices: tuple[torch.device, torch.device]
) -> Iterator[tuple[Link, torch.Tensor, _Acks, Any]]:
    """(link, P's cache of random bytes, acknowledgements, the peer process) to a process that serves a cache of the same layout."""
    command = [sys.executable, "-m", "ksana_lab.bench._transfer_peer", name, str(layout.total_bytes), str(devices[1])]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None and peer.stdout is not None
    link = None
    try:
        device = devices[0]
        backend = make_backend(name, "127.0.0.1", on_gpu=device.type == "cuda")
        cache = torch.randint(0, 256, (layout.total_bytes,), dtype=torch.uint8, device=device)
        if registers_source(name):
            cache = backend.allocate(layout.total_bytes, device).copy_(cache)
        endpoint = json.loads(peer.stdout.readline())
        acks = _Acks()
        link = backend.connect(endpoint, cache, 1, acks, _TIMEOUT_S)
        report = link.examine(_TIMEOUT_S)
        print(f"{name}: {report.path}, burst {report.bandwidth / 1e9:.1f} GB/s, round trip {report.round_trip_s * 1e6:.0f} us", flush=True)
        yield link, cache, acks, peer
    finally:
        if link is not None:
            link.close()
        peer.stdin.close()
        try:
            peer.wait(10)
        except subprocess.TimeoutExpired:
            peer.kill()
            peer.wait()
        peer.stdout.close()


def measure_link(
    model: str, backends: Sequence[str], modes: Sequence[str], lengths: Sequence[int], device: str, rounds: int
) -> Iterator[Row]:
    devices = (
        (torch.device("cuda:0"), torch.device(f"cuda:{torch.cuda.device_count() - 1}")) if device == "cuda" else (torch.device("cpu"),) * 2
    )
    layout = _layout(model, max(lengths), device)
    for name in backends:
        with link_between(name, layout, devices) as (link, cache, acks, peer):
            for tokens, mode in itertools.product(lengths, [mode for mode in modes if mode != "auto"]):
                yield _measure_one(link, cache, acks, peer, layout, name, mode, tokens, rounds)


def _layout(model: str, longest: int, device: str) -> KVLayout:
    config = shape(*model.split("-", 1))
    dtype = "bfloat16" if device == "cuda" else "float32"
    return KVLayout(3 * -(-longest // _BLOCK_SIZE), config.num_layers, config.num_kv_heads, _BLOCK_SIZE, config.head_dim, dtype)


def _measure_one(
    link: Link, cache: torch.Tensor, acks: _Acks, peer: Any, layout: KVLayout, name: str, mode: str, tokens: int, rounds: int
) -> Row:
    dice = np.random.default_rng(tokens)
    num = -(-tokens // _BLOCK_SIZE)
    here, there = (dice.permutation(layout.num_blocks)[:num].tolist() for _ in range(2))
    slices = [HeadSlice(0, 0, 0, 0, layout.num_kv_heads)]
    lists: dict[tuple[int, int], np.ndarray] = {}  # as a sender has it: one for all layers of the same tokens
    writes = []
    for first, last, layers, layer in _parts(mode, tokens, layout.num_layers):
        if (first, last) not in lists:
            lists[first, last] = copies(layout, layout, slices, here, there, first, last, layers)
        writes.append((lists[first, last], layout.cell_offset(0, layer)))
    row = Row("link", name, mode, tokens, nbytes=tokens * layout.token_bytes, descriptors=sum(len(runs) for runs, _ in writes))
    is_behind = link.is_device_ordered and mode == "layer"  # as beside a prefill
    post, wire, total = [], [], []
    has_clock = True
    for i in range(2 * rounds + 2 if is_behind else rounds + 2):
        fresh = {id(runs): runs.copy() for runs, _ in writes}  # every prompt has blocks of its own, whose list is uploaded once
        is_held = is_behind and i % 2 == 0  # until all is posted, so that the device's times are the wire's and not the host's
        before, begin, tickets, posted = acks.count, time.perf_counter(), [], 0.0
        event = None
        if is_behind:
            if is_held:
                torch.cuda._sleep(_HOLD_CYCLES)
            event = torch.cuda.Event()
            event.record()
        for runs, offset in writes:
            start = time.perf_counter()
            tickets.append(link.write(fresh[id(runs)], WINDOW, event, (offset, offset)))
            posted += time.perf_counter() - start
        for ticket in tickets:
            assert ticket.wait(_TIMEOUT_S), "a copy was not over in time"
        for _ in writes:
            link.notify(WINDOW, 1, b"done")
        deadline = time.monotonic() + _TIMEOUT_S
        while acks.count < before + len(writes):
            assert time.monotonic() < deadline and acks.lost is None, acks.lost or "no acknowledgement"
            time.sleep(20e-6)
        round_s = time.perf_counter() - begin
        if i < 2:  # they warm up
            continue
        if not is_held:
            total.append(round_s)
            post.append(posted)
        if is_held or not is_behind:
            times = [t.wire_s for t in tickets if isinstance(t, DeviceTicket)]
            has_clock = len(times) == len(tickets)
            wire.append(sum(times) if has_clock else round_s)
    row.wire_ms, row.total_ms = (1e3 * statistics.median(seconds) for seconds in (wire, total))
    row.post_ms = 1e3 * statistics.median(post) if has_clock else None
    _check_bytes(cache, peer, [shifted(runs, (offset, offset)) for runs, offset in writes])
    row.reference_ms = 1e3 * _reference_s(link, row.nbytes)
    return row


def _parts(mode: str, tokens: int, num_layers: int) -> Iterator[tuple[int, int, range, int]]:
    """(first token, end, layers, by how many layers to move them)"""
    if mode == "layer":
        yield from ((0, tokens, range(1), layer) for layer in range(num_layers))
    else:
        step = _CHUNK_TOKENS if mode == "chunk" else tokens
        yield from ((first, min(tokens, first + step), range(num_layers), 0) for first in range(0, tokens, step))


def _check_bytes(cache: torch.Tensor, peer: Any, plans: Sequence[np.ndarray]) -> None:
    """A few runs, by their sums on either side."""
    for runs in (plans[0], plans[-1]):
        for source, target, nbytes in runs[:: max(1, len(runs) // 3)].tolist():
            peer.stdin.write(f"{target} {nbytes}\n")
            peer.stdin.flush()
            theirs, ours = int(peer.stdout.readline()), int(cache[source : source + nbytes].to(torch.int64).sum())
            assert theirs == ours, f"{nbytes} bytes at {source} arrived damaged at {target}"


def _reference_s(link: Any, nbytes: int) -> float:
    """One contiguous copy of as many bytes over the same way."""
    if hasattr(link, "contiguous_copy_s"):
        return float(link.contiguous_copy_s(nbytes))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        ticket = link.write(np.array([[0, 0, nbytes]], np.int64), WINDOW)
        assert ticket.wait(_TIMEOUT_S), "a copy was not over in time"
        link._stream.ping(_TIMEOUT_S)
        times.append(time.perf_counter() - begin)
    return min(times)


# ---- behind a real prefill -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    mode: str
    gbps: float | None


def measure_overlap(
    model_dir: str, backend: str, settings: Sequence[Setting], lengths: Sequence[int], device: str, rounds: int, wire_dtype: str = "auto"
) -> Iterator[Row]:
    config = shape(*Path(model_dir).name.split("-", 1))
    longest = max(lengths)
    pair = Pair(
        model_dir, device=device, devices=((0,), (max(0, torch.cuda.device_count() - 1),)), is_prefill_here=True,
        cache={"num_blocks": 3 * -(-longest // _BLOCK_SIZE) + 16, "block_size": _BLOCK_SIZE},
        scheduler={"max_num_batched_tokens": 16384, "max_num_seqs": 16, "waiting_timeout_s": 120.0},
        connector={"backend": backend, "transfer_mode": "layer", "wire_dtype": wire_dtype}, model={"max_model_len": longest + 16},
        runtime={"num_threads": 0 if device == "cuda" else 1},
    )  # fmt: skip
    with pair:
        bench = _Overlap(pair, config.vocab_size)
        for length in lengths:
            for row in bench.measure(length, settings, backend, rounds):
                yield replace(row, wire_dtype=wire_dtype)


class _Overlap:
    def __init__(self, pair: Pair, vocab_size: int) -> None:
        self._pair, self._vocab = pair, vocab_size
        self._prefill = pair.engines["prefill"].engine
        self._options = self._prefill.config.connector
        self._dice = random.Random(0)

    def measure(self, length: int, settings: Sequence[Setting], backend: str, rounds: int) -> list[Row]:
        """Every setting and the transfer switched off, once in each round, in another order each time, and each behind a prefill that
        does not count: a GPU that has idled behind a slow link computes the next prompt faster."""
        samples: dict[Setting | None, list[dict[str, float]]] = {key: [] for key in (None, *settings)}
        for i in range(rounds + 1):
            for key in self._dice.sample(list(samples), len(samples)):
                self._once(length, None)
                sample = self._once(length, key)
                if i:  # the first round warms up
                    samples[key].append(sample)
        middle = {key: {name: statistics.median(s[name] for s in seen) for name in seen[0]} for key, seen in samples.items()}
        off_ms = middle[None]["prefill_s"] * 1e3
        return [overlap_row(key, backend, length, middle[key], off_ms) for key in settings]

    def _once(self, length: int, setting: Setting | None) -> dict[str, float]:
        pair = self._pair
        prompt = [self._dice.randrange(3, self._vocab) for _ in range(length)]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        if setting is not None:
            link = self._options.link.model_copy(update={"bandwidth_gbps": setting.gbps})
            options = self._options.model_copy(update={"transfer_mode": setting.mode, "link": link})
            self._prefill.transfer_worker.reconfigure(options)
        before = self._prefill.transfer_worker.stats()
        number = pair.next_number()
        if setting is not None:
            pair.add("decode", number, prompt, sampling)
            self._await_announcement()
        ended: dict[str, float] = {}
        time.sleep(2e-3)  # in every case: a processor that has just waited for the announcement is slower for a while
        begin = time.perf_counter()
        pair.add("prefill", number, prompt, sampling, is_alone=setting is None)
        deadline = begin + _TIMEOUT_S
        while len(ended) < (1 if setting is None else 2) or not self._prefill.is_idle:
            for role, engine in pair.engines.items():
                if role == "decode" and (setting is None or "prefill" not in ended):
                    continue  # nothing but P's own work while P works
                _note(ended, role, engine.step())
            assert time.perf_counter() < deadline, f"no end: {pair.statuses()}"
        after = self._prefill.transfer_worker.stats()
        sample = {name: after[name] - before[name] for name in after if not name.startswith("link_")}
        sample["prefill_s"] = ended["prefill"] - begin
        sample["handover_s"] = ended.get("decode", ended["prefill"]) - ended["prefill"]
        return sample

    def _await_announcement(self) -> None:
        """As under load, where D knows of a request before P has computed it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._prefill.status().transfer.get("state_announced", 0.0):
            assert time.monotonic() < deadline, "the decode node announces nothing"
            time.sleep(100e-6)


def overlap_row(setting: Setting, backend: str, length: int, found: dict[str, float], off_ms: float) -> Row:
    """``found``: what the sender counted for one prompt. The device's clock counts where it ticked, except on an emulated link: there it
    knows only of the copy behind it."""
    is_device = setting.gbps is None and found["device_wire_s"] > 0
    return Row(
        "overlap", backend, setting.mode, length, setting.gbps, nbytes=int(found["bytes_sent"]), descriptors=int(found["copies"]),
        post_ms=found["post_s"] * 1e3, wire_ms=found["device_wire_s" if is_device else "wire_s"] * 1e3,
        nominal_wire_ms=None if setting.gbps is None else found["bytes_sent"] * 8 / (setting.gbps * 1e9) * 1e3,
        total_ms=found["prefill_s"] * 1e3, reference_ms=off_ms, exposed_ms=found["exposed_s"] * 1e3,
        device_exposed_ms=found["device_exposed_s"] * 1e3 if is_device else None, handover_ms=found["handover_s"] * 1e3,
    )  # fmt: skip


def _note(ended: dict[str, float], role: str, updates: Sequence[SequenceUpdate]) -> None:
    for update in updates:
        assert update.error is None, update.error
        if update.finish is not None:
            ended[role] = time.perf_counter()


# ---- as a client sees it ---------------------------------------------------------------------------------------------


def measure_end_to_end(model_dir: str, lengths: Sequence[int], device: str, rounds: int, rate_requests: int) -> Iterator[_results.Row]:
    """Both clusters run at once and are asked in turns of random order, alone; P shares its GPU with the mixed node,
    which is idle then. The first request of a turn does not count: what the GPU did before it is the other cluster's business. Raises
    KsanaLabError when a request fails; a figure of answers whose client lagged has a note."""
    from ksana_lab.cluster.local import Cluster
    from ksana_lab.tracing.phases import add_phases
    from ksana_lab.workload.loadgen import play
    from ksana_lab.workload.spec import WorkloadSpec

    longest, dice = max(lengths), random.Random(0)
    seen: dict[tuple[str, int], list[RequestRecord]] = {}
    with tempfile.TemporaryDirectory() as folder:
        clusters = {}
        for name in ("mixed", "pd"):
            file = Path(folder, f"{name}.yaml")
            file.write_text(json.dumps(_cluster(model_dir, name, device, longest)), encoding="utf-8")
            clusters[name] = Cluster.from_yaml(str(file), trace_dir=Path(folder, name))
        try:
            for cluster in clusters.values():
                cluster.start()
            for length in lengths:
                found = {name: seen.setdefault((name, length), []) for name in clusters}
                for i in range(rounds + 1):
                    for name in dice.sample(list(clusters), len(clusters)):
                        spec = WorkloadSpec.from_dict(_fixed(length, 16, num_requests=_PER_TURN, users=1, num_warmup=1, seed=i))
                        records = all_answered(play(clusters[name].url, spec, progress=False))
                        found[name] += records if i else []  # the first round warms up
                yield from _compared(found, length)
            if rate_requests:
                spec = WorkloadSpec.from_dict(_fixed(min(4096, longest), 128, num_requests=rate_requests, rate=8.0, num_warmup=2))
                records = all_answered(play(clusters["pd"].url, spec, progress=False))
                for name, function, percent in (("ttft_p50", ttft_s, 50), ("tpot_p50", tpot_s, 50), ("tpot_p99", tpot_s, 99)):
                    values = [1e3 * value for record in records if (value := function(record)) is not None]
                    yield _results.Row(f"pd_8rps.{name}_ms", "ms", None, float(np.percentile(values, percent)), note_of(records))
        finally:
            for cluster in clusters.values():
                cluster.close()
        for (name, length), records in seen.items():  # the logs are whole when the nodes have ended
            add_phases(records, Path(folder, name))
            for part in (*TTFT_PARTS, "exposed_transfer_s"):
                if values := [1e3 * value for record in records if (value := PER_REQUEST[part](record)) is not None]:
                    name_of_part = f"part_ms.{part.removesuffix('_s')}.{name}.{length}"
                    yield _results.Row(name_of_part, "ms", None, statistics.median(values), note_of(records))


def _compared(found: dict[str, list[RequestRecord]], length: int) -> Iterator[_results.Row]:
    """The pair beside the mixed node, both at prompts of one length."""
    mixed, pd = (statistics.median(1e3 * t for r in found[name] if (t := ttft_s(r)) is not None) for name in ("mixed", "pd"))
    note = note_of([*found["mixed"], *found["pd"]])
    yield _results.Row(f"ttft_ms.mixed.{length}", "ms", None, mixed, note)
    yield _results.Row(f"ttft_ratio.{length}", "x", None, pd / mixed, note)
    yield _results.Row(f"ttft_added_ms.{length}", "ms", None, pd - mixed, note)
    gaps = [1e3 * (r.token_times_s[1] - r.token_times_s[0]) for r in found["pd"] if len(r.token_times_s) > 2]
    steps = [1e3 * (b - a) for r in found["pd"] for a, b in itertools.pairwise(r.token_times_s[1:])]
    if gaps and steps:
        yield _results.Row(f"first_gap_added_ms.{length}", "ms", None, statistics.median(gaps) - statistics.median(steps), note)


def _fixed(prompt: int, output: int, **more: Any) -> dict[str, Any]:
    lengths = {"prompt_tokens": {"kind": "fixed", "tokens": prompt}, "output_tokens": {"kind": "fixed", "tokens": output}}
    return {**lengths, "vocab_size": 1000, **more}


def _cluster(model_dir: str, kind: str, device: str, longest: int) -> dict[str, Any]:
    node: dict[str, Any] = {"tensor_parallel_size": 1}
    on = (lambda index: {"device_ids": [index]}) if device == "cuda" else (lambda index: {})
    last = max(0, torch.cuda.device_count() - 1)
    nodes: dict[str, Any] = {"mixed": {**node, "role": "mixed", **on(0)}}
    if kind == "pd":
        nodes = {"prefill": {**node, "role": "prefill", **on(0)}, "decode": {**node, "role": "decode", **on(last)}}
    return {
        "model_dir": model_dir,
        "start_timeout_s": 180,
        "router": {"port": "auto"},
        "nodes": nodes,
        "setting": {
            "global": {"enable_cuda_graph": True},
            "connector": {"communication_type": "auto", "heartbeat_interval_ms": 1000},
            "batch_scheduler": {
                "max_step_tokens": 16384, "max_batch_size": 128, "max_token_len": longest + 256, "split_fuse_token_num": 0,
            },
        },
        "ksana_lab": {
            "device": device, "num_blocks": 12_000 if device == "cuda" else 4 * -(-longest // _BLOCK_SIZE), "transfer_mode": "auto",
        },
    }  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    if args.json:
        _results.check_machine(args.json, args.device)
    arch, _, shape_name = args.model.partition("-")
    chosen = AUTO[args.device == "cuda"]
    backends = list(dict.fromkeys(name for given in args.backend for name in (chosen if given == "auto" else [given])))
    rows: list[Row] = []
    figures: list[_results.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model_dir = str(synthesize(Path(folder, args.model), arch, shape_name, has_weights=args.device != "cuda"))
        if "link" in args.parts:
            for row in measure_link(args.model, backends, args.mode, args.tokens, args.device, args.rounds):
                _keep(row, rows, args)
        if "overlap" in args.parts:
            settings = [Setting(mode, gbps) for gbps in args.gbps for mode in args.mode if gbps is None or mode != "auto"]
            for backend in args.backend:
                for row in measure_overlap(model_dir, backend, settings, args.tokens, args.device, args.rounds, args.wire_dtype):
                    _keep(row, rows, args)
        figures += [_results.Row(name, unit, None, value) for name, unit, value in named(rows)]
        if "fp8" in args.parts:
            for name, unit, value in measure_fp8(args.model_dir or model_dir, args.device, prompt_tokens=max(args.tokens)):
                print(f"{name:36s} {value:10.5f} {unit}", flush=True)
                figures.append(_results.Row(name, unit, None, value))
        if args.end_to_end:
            for figure in measure_end_to_end(model_dir, args.tokens, args.device, args.rounds, args.rate_requests):
                print(f"{figure.name:32s} {figure.ours:10.3f} {figure.unit}{f'  ({figure.note})' if figure.note else ''}", flush=True)
                figures.append(figure)
                _write(args, figures)
    for name, unit, value in named(rows):
        print(f"{name:36s} {value:10.4f} {unit}", flush=True)
    _write(args, figures)
    if args.figure and rows:
        draw(rows, args.figure)
    return 0


def _keep(row: Row, rows: list[Row], args: argparse.Namespace) -> None:
    print(row.line(), flush=True)
    rows.append(row)
    if args.csv:
        write_csv(args.csv, rows)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench transfer", description="KV transfer, measured.")
    parser.add_argument("--model", default="qwen3-8b" if device == "cuda" else "qwen3-tiny", metavar="ARCH-SHAPE")
    parser.add_argument("--model-dir", metavar="DIR", help="of fp8: a checkpoint instead of random weights of --model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument(
        "--backend", type=_words("auto", "cuda_ipc", "shm", "tcp", "nccl", "gloo", "nixl"), default=["auto"], metavar="NAMES",
        help="e.g. cuda_ipc,tcp; auto: of link every one that a pair would try, of overlap the one that it takes",
    )  # fmt: skip
    modes = "bulk", "chunk", "layer", "auto"
    parser.add_argument("--mode", type=_words(*modes), default=[*modes[:3]], metavar="MODES", help=f"of {', '.join(modes)}")
    parser.add_argument("--tokens", type=_numbers, default=[512, 2048, 8192] if device == "cuda" else [64, 256], help="prompt lengths")
    parser.add_argument("--gbps", type=_speeds, default=[None], help="emulated links, e.g. none,400,100,25 (none: the hardware's own)")
    parts = "link", "overlap", "fp8"
    parser.add_argument("--parts", type=_words(*parts), default=[*parts[:2]], metavar="PARTS", help=f"of {', '.join(parts)}; may be empty")
    parser.add_argument("--wire-dtype", choices=("auto", "fp8_e4m3"), default="auto", help="overlap: of KV on its way")
    parser.add_argument("--end-to-end", action="store_true", help="mixed against 1P1D through routers")
    parser.add_argument("--rate-requests", type=int, default=100, help="end to end: requests at 8 a second; 0 = none")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("csv", "figure", "json"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _words(*known: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        words = text.split(",") if text else []
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return words

    return read


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _speeds(text: str) -> list[float | None]:
    return [None if part == "none" else float(part) for part in text.split(",")]


def _write(args: argparse.Namespace, figures: Sequence[_results.Row]) -> None:
    if args.json:
        _results.write_results(args.json, figures, args.device)


def named(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """The figures that ``docs/results/transfer.json`` keeps: of the backend that was measured first."""
    out: dict[str, tuple[str, float | None]] = {}
    for row in rows:
        link = ("" if row.gbps is None else f".{row.gbps:g}gbps") + ("" if row.wire_dtype == "auto" else f".{row.wire_dtype}")
        if row.part == "link":
            out.setdefault(f"bandwidth_ratio.{row.mode}.{row.tokens}", ("x", row.bandwidth_ratio))
            out.setdefault(f"bandwidth_gbs.{row.mode}.{row.tokens}", ("GB/s", row.bandwidth_gbs))
        else:
            out.setdefault(f"hidden_fraction.{row.mode}.{row.tokens}{link}", ("", row.hidden_fraction))
            out.setdefault(f"exposed_ms.{row.mode}.{row.tokens}{link}", ("ms", row.exposed_ms))
            if row.gbps is None:
                out.setdefault(f"prefill_slowdown_pct.{row.mode}.{row.tokens}{link}", ("%", row.slowdown_pct))
    return [(name, unit, value) for name, (unit, value) in out.items() if value is not None]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """What does not apply to a row is an empty cell."""
    derived = ("bandwidth_ratio", "hidden_fraction", "slowdown_pct")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *derived])
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row) | {name: getattr(row, name) for name in derived})


def draw(rows: Sequence[Row], path: Path) -> None:
    """Exposed time against prompt length: a row of panels for each backend, in it one for each link speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.part == "overlap"]
    backends, speeds = ([*dict.fromkeys(getattr(row, name) for row in rows)] for name in ("backend", "gbps"))
    if not rows:
        return
    lengths = sorted({row.tokens for row in rows})
    size = (max(4.0, 3.2 * len(speeds)), 0.4 + 2.9 * len(backends))
    figure, panels = plt.subplots(len(backends), len(speeds), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    drawn: dict[str, Any] = {}
    for axes, (backend, gbps) in zip(panels.flat, itertools.product(backends, speeds), strict=True):
        for mode in dict.fromkeys(row.mode for row in rows):
            own = [row for row in rows if (row.backend, row.gbps, row.mode) == (backend, gbps, mode)]
            if points := sorted((row.tokens, row.exposed_ms or 0.0) for row in own):
                (drawn[mode],) = axes.plot(*zip(*points, strict=True), **_STYLES[mode])
        speed = "hardware's own link" if gbps is None else f"{gbps:g} Gb/s"
        axes.set(title=speed if backend == "auto" else f"{backend}, {speed}", xscale="log", yscale="log")
        axes.set_xticks(lengths, labels=[str(length) for length in lengths], fontsize=7)
        axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("prompt tokens")
    for axes in panels[:, 0]:
        axes.set_ylabel("exposed (ms)")
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(drawn), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
