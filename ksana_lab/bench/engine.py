"""How far the engine is from what this GPU allows: decode steps, time to first token, throughput; floors measured in the same run.

Floors: a decode step must read every weight and every cached key and value once (bytes over the read bandwidth); a prefill must do its
multiplications (FLOPs over the rate of a large matrix product). Both ceilings are measured first, on random data. Weights are random, the
prefix cache is off, sampling is greedy, ends of text are ignored.

    python -m ksana_lab.bench engine [--models qwen3-8b …] [--parts decode,ttft,offline,served] [--json docs/results/engine.json]

On two GPUs ``--tp 2`` measures decode steps on one and on two of them. ``--trial`` runs through every path with a tiny model and few steps
on a CPU, to see that it works; its figures say nothing. ``--fp8 weights,kv`` measures with FP8 weights, KV cache, or both; rows and floors
are then of that."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ksana_lab.bench._answers import all_answered, note_of
from ksana_lab.bench._results import Row, check_machine, write_results
from ksana_lab.config.engine import EngineConfig
from ksana_lab.config.environment import ALLOCATOR_VARIABLE, engine_environment
from ksana_lab.engine.engine import Engine
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.synth import SHAPES, synthesize
from ksana_lab.protocol.engine import AddRequest
from ksana_lab.types import SamplingParams

_TURN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Scale:
    """How much is measured, and where."""

    device: str = "cuda"
    context: int = 1016  # mean tokens a decoding sequence has while it is measured
    steps: int = 160
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    small_batches: tuple[int, ...] = (1, 32, 256)
    tp_batches: tuple[int, ...] = (1, 32)
    lengths: tuple[int, ...] = (512, 2048, 8192, 16384)  # of prompts, for the time to the first token
    rounds: int = 7
    num_offline: int = 256
    offline: tuple[int, int] = (1024, 256)  # tokens in, out
    served: tuple[int, int] = (4096, 128)
    num_served: int = 100
    max_model_len: int = 20_480
    max_batched_tokens: int = 16_384
    num_blocks: int = 21_500
    num_blocks_small: int = 40_000
    num_blocks_tp: int = 6_000
    fp8: tuple[str, ...] = ()  # of weights, kv

    @property
    def max_num_seqs(self) -> int:
        return max(*self.batches, self.num_offline)


GPU = Scale()
TRIAL = Scale("cpu", 60, 16, (1, 4), (1, 4), (1, 4), (64, 256), 2, 8, (32, 8), (128, 8), 8, 512, 256, 512, 512, 512)


@dataclass(frozen=True)
class Ceilings:
    read_bytes_per_s: float
    matmul_flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device) -> Ceilings:
        """Read bandwidth; rate of an 8192³ product in bf16 (a CPU: less), the median of 10 after warm-up."""
        size = 8192 if device.type == "cuda" else 256
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        rate = 2 * size**3 / _median_s(lambda: a @ b, device)
        return cls(read_bytes_per_s(device), rate)


def read_bytes_per_s(device: torch.device) -> float:
    """Of a GPU by a kernel that only reads: a sum by torch stays 8% below that on an H200. A CPU sums 1 MiB."""
    if device.type == "cuda":
        from ksana_lab.bench import kernels

        return kernels.read_bytes_per_s()
    data = torch.randn(256 << 10)
    return data.numel() * 4 / _median_s(data.sum, device)


@dataclass(frozen=True)
class Floors:
    """Of one model on one GPU."""

    model: ModelConfig
    ceilings: Ceilings
    fp8: tuple[str, ...] = ()

    @property
    def _linear_parameters(self) -> int:
        """What every token is multiplied with, the head apart."""
        embeddings = self.model.vocab_size * self.model.hidden_size
        return self.model.num_parameters - embeddings * (1 if self.model.tie_word_embeddings else 2)

    @property
    def _head_parameters(self) -> int:
        return self.model.vocab_size * self.model.hidden_size

    @property
    def _kv_bytes_per_token(self) -> int:
        return 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim * (1 if "kv" in self.fp8 else 2)

    def decode_s(self, batch: int, context: int) -> float:
        weights = (1 if "weights" in self.fp8 else 2) * self._linear_parameters + 2 * self._head_parameters
        return (weights + batch * context * self._kv_bytes_per_token) / self.ceilings.read_bytes_per_s

    def prefill_s(self, length: int) -> float:
        attention = 2 * length**2 * self.model.num_heads * self.model.head_dim * self.model.num_layers  # causal: half of 4 n² d
        linear = 2 * length * self._linear_parameters / (2 if "weights" in self.fp8 else 1)  # tensor cores do FP8 at twice the rate
        flops = linear + 2 * self._head_parameters + attention
        return max(flops / self.ceilings.matmul_flops_per_s, self.decode_s(1, 0))

    def offline_s(self, num_seqs: int, prompt: int, output: int) -> float:
        return num_seqs * self.prefill_s(prompt) + sum(self.decode_s(num_seqs, prompt + i) for i in range(1, output))


# ---- driving an engine -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(model_dir: str, scale: Scale, *, num_blocks: int, max_num_seqs: int, tp: int = 1) -> Iterator[Engine]:
    config = EngineConfig.model_validate(
        {
            "model": {
                "model_dir": model_dir,
                "max_model_len": scale.max_model_len,
                "quant_method": "fp8_e4m3" if "weights" in scale.fp8 else "auto",
            },
            "parallel": {"tensor_parallel_size": tp},
            "cache": {"num_blocks": num_blocks, "dtype": "fp8_e4m3" if "kv" in scale.fp8 else "auto"},
            "scheduler": {"max_num_batched_tokens": scale.max_batched_tokens, "max_num_seqs": max_num_seqs, "max_num_waiting": 1 << 20},
            "runtime": {"device": scale.device},
        }
    )
    running = Engine(config)
    try:
        yield running
    finally:
        running.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Driver:
    """Adds sequences and turns the engine; knows when each token of each sequence was seen (time.perf_counter)."""

    def __init__(self, running: Engine) -> None:
        self.engine = running
        assert running._executor is not None and running._executor.worker is not None
        self._vocab_size = min(100_000, running._executor.worker.model_config.vocab_size)
        self.seen: dict[str, list[float]] = {}
        self._number = 0
        self._random = random.Random(0)

    def add(self, prompt: int, output: int, *, temperature: float = 0.0) -> str:
        name = f"bench-{self._number}"
        self._number += 1
        ids = [self._random.randrange(self._vocab_size // 100, self._vocab_size) for _ in range(prompt)]
        sampling = SamplingParams(max_tokens=output, temperature=temperature, seed=self._number, ignore_eos=True)
        self.seen[name] = []
        refusal = self.engine.add(AddRequest(name, ids, sampling, time.monotonic_ns()))
        assert refusal is None, refusal
        return name

    def run_until(self, is_done: Callable[[], bool]) -> None:
        deadline = time.perf_counter() + _TURN_TIMEOUT_S
        while not is_done():
            for update in self.engine.step():
                assert update.error is None, update
                self.seen[update.request_id] += [time.perf_counter()] * len(update.new_token_ids)
            assert time.perf_counter() < deadline, "the engine makes no progress"

    def finish(self) -> None:
        self.run_until(lambda: self.engine.is_idle)
        self.seen.clear()


def decode_step_s(running: Engine, batch: int, scale: Scale) -> float:
    """Seconds a step of ``batch`` decoding sequences, from the tokens' times: median over three runs of the mean over the steps."""
    runs = []
    for _ in range(3):
        driver = Driver(running)
        names = [driver.add(scale.context - scale.steps // 2, scale.steps + 8) for _ in range(batch)]
        driver.run_until(lambda names=names, driver=driver: all(len(driver.seen[name]) >= 4 for name in names))  # type: ignore[misc]
        last = names[-1]
        begin, done = driver.seen[last][-1], len(driver.seen[last])
        driver.run_until(lambda names=names, driver=driver, done=done: len(driver.seen[names[0]]) >= scale.steps or not driver.seen)  # type: ignore[misc]
        num_steps = len(driver.seen[last]) - done
        runs.append((driver.seen[last][-1] - begin) / num_steps)
        driver.finish()
    return statistics.median(runs)


def replay_s(running: Engine, batch: int, scale: Scale) -> float:
    """Seconds the GPU needs for the same step when nothing else goes on: its graph, replayed back to back."""
    runner = running._executor.worker.runner  # type: ignore[union-attr]
    graphs = runner._graphs
    assert graphs is not None, "decode graphs are off"
    size = next(s for s in graphs.sizes if s >= batch)
    graphs._seq_lens[:size].zero_()
    graphs._seq_lens[:batch].fill_(scale.context)
    blocks = -(-scale.context // running.scheduler.blocks.block_size)
    num_blocks = running.scheduler.blocks.num_blocks
    table = torch.randperm(num_blocks, device=graphs._block_tables.device)[: batch * blocks].view(batch, blocks)
    graphs._block_tables[:batch, :blocks] = table.int()
    graphs._slots[:size].fill_(-1)
    return _median_s(graphs._graphs[size].replay, graphs._seq_lens.device, num=30)


def ttft_s(running: Engine, length: int, scale: Scale) -> float:
    times = []
    for _ in range(scale.rounds + 1):
        driver = Driver(running)
        start = time.perf_counter()
        name = driver.add(length, 1)
        start = time.perf_counter()
        driver.run_until(lambda name=name, driver=driver: bool(driver.seen[name]))  # type: ignore[misc]
        times.append(driver.seen[name][0] - start)
        driver.finish()
    return statistics.median(times[1:])


def offline_run_s(running: Engine, lengths: Sequence[tuple[int, int]], temperature: float = 0.0) -> float:
    driver = Driver(running)
    for prompt, output in lengths:
        driver.add(prompt, output, temperature=temperature)
    start = time.perf_counter()
    driver.run_until(lambda: running.is_idle)
    return time.perf_counter() - start


# ---- rows ------------------------------------------------------------------------------------------------------------


def measure_large(name: str, model_dir: str, parts: Sequence[str], floors: Floors, scale: Scale) -> Iterator[Row]:
    with engine(model_dir, scale, num_blocks=scale.num_blocks, max_num_seqs=scale.max_num_seqs) as running:
        if "decode" in parts:
            for batch in scale.batches:
                floor = floors.decode_s(batch, scale.context) * 1e3
                step = decode_step_s(running, batch, scale)
                yield Row(f"{name}.decode_ms.b{batch}", "ms", floor, step * 1e3)
                if scale.device == "cuda":
                    gpu = replay_s(running, batch, scale)
                    yield Row(f"{name}.graph_ms.b{batch}", "ms", floor, gpu * 1e3)
                    if batch == scale.batches[-1]:
                        yield Row(f"cpu_exposed_pct.b{batch}", "%", None, max(0.0, 100 * (1 - gpu / step)))
        if "ttft" in parts:
            for length in scale.lengths:
                yield Row(f"{name}.ttft_ms.{length}", "ms", floors.prefill_s(length) * 1e3, ttft_s(running, length, scale) * 1e3)
        if "offline" in parts:
            times = [offline_run_s(running, [scale.offline] * scale.num_offline) for _ in range(2)]
            yield Row(f"{name}.offline_s", "s", floors.offline_s(scale.num_offline, *scale.offline), min(times))


def measure_small(name: str, model_dir: str, parts: Sequence[str], floors: Floors, scale: Scale) -> Iterator[Row]:
    with engine(model_dir, scale, num_blocks=scale.num_blocks_small, max_num_seqs=scale.max_num_seqs) as running:
        if "decode" in parts:
            for batch in scale.small_batches:
                floor = floors.decode_s(batch, scale.context) * 1e3
                yield Row(f"{name}.decode_ms.b{batch}", "ms", floor, decode_step_s(running, batch, scale) * 1e3)
                if scale.device == "cuda":
                    yield Row(f"{name}.graph_ms.b{batch}", "ms", floor, replay_s(running, batch, scale) * 1e3)
        if "offline" in parts:
            dice = random.Random(0)  # the workload of nano-vllm's benchmark
            longest = scale.offline[0]
            lengths = [(dice.randint(longest // 10, longest), dice.randint(longest // 10, longest)) for _ in range(scale.num_offline)]
            num_outputs = sum(output for _, output in lengths)
            seconds = min(offline_run_s(running, lengths, temperature=0.6) for _ in range(2))
            yield Row(f"{name}.offline_tok_s", "tokens/s", None, num_outputs / seconds)


def measure_tp(model_dir: str, tp: int, scale: Scale) -> Iterator[Row]:
    alone: dict[int, float] = {}
    for size in (1, tp):
        with engine(model_dir, scale, num_blocks=scale.num_blocks_tp, max_num_seqs=max(scale.tp_batches), tp=size) as running:
            for batch in scale.tp_batches:
                step = decode_step_s(running, batch, scale)
                yield Row(f"tp{size}.decode_ms.b{batch}", "ms", None, step * 1e3)
                if size > 1:
                    yield Row(f"tp{size}.decode_ratio.b{batch}", "x", 1 / size, step / alone[batch])
                alone.setdefault(batch, step)


def measure_served(name: str, model_dir: str, floors: Floors, scale: Scale) -> Iterator[Row]:
    """Over HTTP, client side: one mixed node, asked directly."""
    from ksana_lab.cluster.local import Cluster
    from ksana_lab.metrics.latency import tpot_s
    from ksana_lab.metrics.latency import ttft_s as client_ttft_s
    from ksana_lab.workload.loadgen import play
    from ksana_lab.workload.spec import WorkloadSpec

    vocab_size = min(100_000, floors.model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mixed.yaml")
        file.write_text(json.dumps(_served_cluster(model_dir, scale)), encoding="utf-8")  # JSON is YAML
        with Cluster.from_yaml(str(file)) as cluster:
            url = next(p["url"] for p in cluster.status()["processes"] if p["role"] == "mixed")
            for length in scale.lengths:
                spec = _fixed(length, 8, num_requests=scale.rounds, users=1, num_warmup=1, vocab_size=vocab_size)
                records = all_answered(play(url, WorkloadSpec.from_dict(spec), progress=False))
                ours = statistics.median(t for record in records if (t := client_ttft_s(record)) is not None)
                yield Row(f"{name}.served_ttft_ms.{length}", "ms", floors.prefill_s(length) * 1e3, ours * 1e3, note_of(records))
            spec = _fixed(*scale.served, num_requests=scale.num_served, rate=4.0, num_warmup=2, vocab_size=vocab_size)
            records = all_answered(play(url, WorkloadSpec.from_dict(spec), progress=False))
            for kind, function in (("ttft", client_ttft_s), ("tpot", tpot_s)):
                values = sorted(value for record in records if (value := function(record)) is not None)
                for percent in (50, 99):
                    at = values[min(len(values) - 1, round(percent / 100 * (len(values) - 1)))]
                    yield Row(f"{name}.served4rps.{kind}_p{percent}_ms", "ms", None, at * 1e3, note_of(records))


def _fixed(prompt: int, output: int, **fields: Any) -> dict[str, Any]:
    lengths = {"prompt_tokens": {"kind": "fixed", "tokens": prompt}, "output_tokens": {"kind": "fixed", "tokens": output}}
    return {**lengths, **fields}


def _served_cluster(model_dir: str, scale: Scale) -> dict[str, Any]:
    return {
        "model_dir": model_dir,
        "start_timeout_s": 180,
        "router": {"port": "auto"},
        "nodes": {"mixed": {"role": "mixed", "tensor_parallel_size": 1}},
        "setting": {
            "global": {"enable_cuda_graph": True},
            "batch_scheduler": {
                "max_step_tokens": scale.max_batched_tokens,
                "max_batch_size": scale.max_num_seqs,
                "max_token_len": scale.max_model_len,
                "split_fuse_token_num": 0,
            },
            "quantization_config": {
                "kv_cache": {"dtype": "fp8_e4m3" if "kv" in scale.fp8 else "auto"},
                "weight": {"quant_method": "fp8_e4m3" if "weights" in scale.fp8 else "auto"},
            },
        },
        "ksana_lab": {"device": scale.device, "num_blocks": scale.num_blocks_small, "num_threads": 0 if scale.device == "cuda" else 1},
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench engine", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen3-8b,qwen3-0.6b", help="of qwen3-8b, qwen3-0.6b")
    parser.add_argument("--parts", default="decode,ttft,offline,served", help="of decode, ttft, offline, served")
    parser.add_argument("--tp", type=int, default=0, metavar="N", help="measure decode on one GPU and on N instead")
    parser.add_argument("--fp8", default="", metavar="PARTS", help="of weights, kv: what is kept in 8 bits")
    parser.add_argument("--trial", action="store_true", help="qwen3-tiny on a CPU: does every path work?")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; rows of other names are kept")
    args = parser.parse_args(argv)
    environment = engine_environment(os.environ, has_cuda_graphs=True)
    if "backend:" in os.environ.get(ALLOCATOR_VARIABLE, ""):  # torch has read it by now, and decode graphs need torch's own allocator
        os.execve(sys.executable, [sys.executable, "-m", "ksana_lab.bench", "engine", *argv], environment)
    os.environ.update(environment)
    fp8 = tuple(sorted(part for part in args.fp8.split(",") if part))
    if not set(fp8) <= {"weights", "kv"}:
        parser.error(f"--fp8 takes weights, kv or weights,kv, not {args.fp8}")
    scale = replace(TRIAL if args.trial else GPU, fp8=fp8)
    if not args.trial and not torch.cuda.is_available():
        print("error: bench engine measures a GPU, and torch sees none here", file=sys.stderr)
        return 2
    if args.json:
        check_machine(Path(args.json), scale.device)
    parts, models = args.parts.split(","), ["qwen3-tiny"] if args.trial else args.models.split(",")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in _all_rows(folder, models, parts, args.tp, scale):
            row.name += "".join(f".fp8_{part}" for part in fp8)
            print(_line(row), flush=True)
            rows.append(row)
            if args.json:
                write_results(Path(args.json), rows, scale.device)
    return 0


def _all_rows(folder: str, models: Sequence[str], parts: Sequence[str], tp: int, scale: Scale) -> Iterator[Row]:
    ceilings = Ceilings.measure(torch.device(scale.device))
    gc.collect()
    if scale.device == "cuda":
        torch.cuda.empty_cache()
    print(
        f"ceilings: read {ceilings.read_bytes_per_s / 1e12:.2f} TB/s, matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s", flush=True
    )
    for name in models:
        arch, _, shape = name.partition("-")
        model_dir = str(synthesize(Path(folder, name), arch, shape, has_weights=False))
        floors = Floors(SHAPES[name], ceilings, scale.fp8)
        if tp:
            if name == models[0]:  # its rows carry no name
                yield from measure_tp(model_dir, tp, scale)
            continue
        if name != "qwen3-8b" or scale.device == "cpu":
            yield from measure_small(name, model_dir, parts, floors, scale)
        if name == "qwen3-8b" or scale.device == "cpu":
            yield from measure_large(name, model_dir, parts, floors, scale)
            if "served" in parts:
                yield from measure_served(name, model_dir, floors, scale)


def _line(row: Row) -> str:
    floor = "" if row.floor is None else f"{row.floor:10.3f}"
    ratio = "" if row.ratio is None else f"{row.ratio:6.2f}x"
    return f"{row.name:36s} floor {floor:>10s}  ours {row.ours:12.3f} {row.unit:9s} {ratio}{f'  ({row.note})' if row.note else ''}"


def _median_s(call: Callable[[], object], device: torch.device, num: int = 10) -> float:
    """Of ``num`` calls after three that warm up; of a GPU by its own clock."""
    time_s = _gpu_s if device.type == "cuda" else _host_s
    return statistics.median([time_s(call) for _ in range(num + 3)][3:])


def _gpu_s(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _host_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
