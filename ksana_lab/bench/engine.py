"""How far the engine is from what this GPU allows: decode steps, time to first token, throughput; floors measured in the same run.

Floors: a decode step must read every weight and every cached key and value once (bytes over the read bandwidth); a prefill must do its
multiplications (FLOPs over the rate of a large matrix product). Both ceilings are measured first, on random data. Weights are random, the
prefix cache is off, sampling is greedy, ends of text are ignored.

    python -m ksana_lab.bench engine [--model qwen3-8b …] [--parts decode,ttft,offline,served] [--json docs/results/engine.json]

On two GPUs ``--tp 2`` measures decode steps on one and on two of them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.engine import Engine
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.synth import SHAPES, synthesize
from ksana_lab.protocol.engine import AddRequest
from ksana_lab.types import SamplingParams

CONTEXT = 1016  # mean tokens a decoding sequence has while it is measured
STEPS = 160
TTFT_LENGTHS = (512, 2048, 8192, 16384)
_ROUNDS = 7
_TURN_TIMEOUT_S = 300.0


@dataclass
class Row:
    name: str
    unit: str
    floor: float | None
    ours: float

    @property
    def ratio(self) -> float | None:
        """How many times the floor (of a throughput: how many times below its ceiling)."""
        if not self.floor or not self.ours:
            return None
        return self.floor / self.ours if self.unit.endswith("/s") else self.ours / self.floor


@dataclass(frozen=True)
class Ceilings:
    read_bytes_per_s: float
    matmul_flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device) -> Ceilings:
        """Read bandwidth of a reduction over 4 GiB; rate of an 8192³ product in bf16. Medians of 10 after warm-up."""
        data = torch.randn(1 << 30, device=device)
        read = data.numel() * 4 / _median_s(lambda: data.sum(), device)
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        b = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rate = 2 * 8192**3 / _median_s(lambda: a @ b, device)
        return cls(read, rate)


@dataclass(frozen=True)
class Floors:
    """Of one model on one GPU."""

    model: ModelConfig
    ceilings: Ceilings

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
        return 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim * 2

    def decode_s(self, batch: int, context: int) -> float:
        weights = 2 * (self._linear_parameters + self._head_parameters)
        return (weights + batch * context * self._kv_bytes_per_token) / self.ceilings.read_bytes_per_s

    def prefill_s(self, length: int) -> float:
        attention = 2 * length**2 * self.model.num_heads * self.model.head_dim * self.model.num_layers  # causal: half of 4 n² d
        flops = 2 * length * self._linear_parameters + 2 * self._head_parameters + attention
        return max(flops / self.ceilings.matmul_flops_per_s, self.decode_s(1, 0))

    def offline_s(self, num_seqs: int, prompt: int, output: int) -> float:
        return num_seqs * self.prefill_s(prompt) + sum(self.decode_s(num_seqs, prompt + i) for i in range(1, output))


# ---- driving an engine -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(model_dir: str, *, num_blocks: int, max_num_seqs: int, device_ids: tuple[int, ...] = (), tp: int = 1) -> Iterator[Engine]:
    config = EngineConfig.model_validate(
        {
            "model": {"model_dir": model_dir, "max_model_len": 20480},
            "parallel": {"tensor_parallel_size": tp},
            "cache": {"num_blocks": num_blocks},
            "scheduler": {"max_num_batched_tokens": 16384, "max_num_seqs": max_num_seqs, "max_num_waiting": 1 << 20},
            "runtime": {"device": "cuda", "device_ids": device_ids},
        }
    )
    running = Engine(config)
    try:
        yield running
    finally:
        running.close()
        gc.collect()
        torch.cuda.empty_cache()


class Driver:
    """Adds sequences and turns the engine; knows when each token of each sequence was seen (time.perf_counter)."""

    def __init__(self, running: Engine) -> None:
        self.engine = running
        self.seen: dict[str, list[float]] = {}
        self._number = 0
        self._random = random.Random(0)

    def add(self, prompt: int, output: int, *, temperature: float = 0.0) -> str:
        name = f"bench-{self._number}"
        self._number += 1
        ids = [self._random.randrange(1000, 100_000) for _ in range(prompt)]
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


def decode_step_s(running: Engine, batch: int) -> float:
    """Seconds a step of ``batch`` decoding sequences, from the tokens' times: median over three runs of the mean over the steps."""
    runs = []
    for _ in range(3):
        driver = Driver(running)
        names = [driver.add(CONTEXT - STEPS // 2, STEPS + 8) for _ in range(batch)]
        driver.run_until(lambda names=names, driver=driver: all(len(driver.seen[name]) >= 4 for name in names))  # type: ignore[misc]
        last = names[-1]
        begin, done = driver.seen[last][-1], len(driver.seen[last])
        driver.run_until(lambda names=names, driver=driver, done=done: len(driver.seen[names[0]]) >= STEPS or not driver.seen)  # type: ignore[misc]
        num_steps = len(driver.seen[last]) - done
        runs.append((driver.seen[last][-1] - begin) / num_steps)
        driver.finish()
    return statistics.median(runs)


def replay_s(running: Engine, batch: int) -> float:
    """Seconds the GPU needs for the same step when nothing else goes on: its graph, replayed back to back."""
    runner = running._executor.worker.runner  # type: ignore[union-attr]
    graphs = runner._graphs
    assert graphs is not None, "decode graphs are off"
    size = next(s for s in graphs.sizes if s >= batch)
    graphs._seq_lens[:size].zero_()
    graphs._seq_lens[:batch].fill_(CONTEXT)
    blocks = -(-CONTEXT // running.scheduler.blocks.block_size)
    num_blocks = running.scheduler.blocks.num_blocks
    table = torch.randperm(num_blocks, device=graphs._block_tables.device)[: batch * blocks].view(batch, blocks)
    graphs._block_tables[:batch, :blocks] = table.int()
    graphs._slots[:size].fill_(-1)
    return _median_s(graphs._graphs[size].replay, graphs._seq_lens.device, num=30)


def ttft_s(running: Engine, length: int) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
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


def measure_8b(model_dir: str, parts: Sequence[str], floors: Floors) -> Iterator[Row]:
    with engine(model_dir, num_blocks=21_500, max_num_seqs=256) as running:
        if "decode" in parts:
            for batch in (1, 8, 32, 128, 256):
                step = decode_step_s(running, batch)
                yield Row(f"qwen3-8b.decode_ms.b{batch}", "ms", floors.decode_s(batch, CONTEXT) * 1e3, step * 1e3)
                gpu = replay_s(running, batch)
                yield Row(f"qwen3-8b.graph_ms.b{batch}", "ms", floors.decode_s(batch, CONTEXT) * 1e3, gpu * 1e3)
            yield Row("cpu_exposed_pct.b256", "%", None, max(0.0, 100 * (1 - gpu / step)))
        if "ttft" in parts:
            for length in TTFT_LENGTHS:
                yield Row(f"qwen3-8b.ttft_ms.{length}", "ms", floors.prefill_s(length) * 1e3, ttft_s(running, length) * 1e3)
        if "offline" in parts:
            times = [offline_run_s(running, [(1024, 256)] * 256) for _ in range(2)]
            yield Row("qwen3-8b.offline_s", "s", floors.offline_s(256, 1024, 256), min(times))


def measure_small(model_dir: str, parts: Sequence[str], floors: Floors) -> Iterator[Row]:
    with engine(model_dir, num_blocks=40_000, max_num_seqs=256) as running:
        if "decode" in parts:
            for batch in (1, 32, 256):
                step = decode_step_s(running, batch)
                yield Row(f"qwen3-0.6b.decode_ms.b{batch}", "ms", floors.decode_s(batch, CONTEXT) * 1e3, step * 1e3)
                yield Row(f"qwen3-0.6b.graph_ms.b{batch}", "ms", floors.decode_s(batch, CONTEXT) * 1e3, replay_s(running, batch) * 1e3)
        if "offline" in parts:
            dice = random.Random(0)  # the workload of nano-vllm's benchmark
            lengths = [(dice.randint(100, 1024), dice.randint(100, 1024)) for _ in range(256)]
            num_outputs = sum(output for _, output in lengths)
            seconds = min(offline_run_s(running, lengths, temperature=0.6) for _ in range(2))
            yield Row("qwen3-0.6b.offline_tok_s", "tokens/s", None, num_outputs / seconds)


def measure_tp(model_dir: str, tp: int) -> Iterator[Row]:
    steps: dict[int, dict[int, float]] = {}
    for size in (1, tp):
        with engine(model_dir, num_blocks=6_000, max_num_seqs=32, tp=size) as running:
            steps[size] = {batch: decode_step_s(running, batch) for batch in (1, 32)}
    for batch in (1, 32):
        yield Row(f"tp{tp}.decode_ms.b{batch}", "ms", None, steps[tp][batch] * 1e3)
        yield Row(f"tp{tp}.decode_ratio.b{batch}", "x", 1 / tp, steps[tp][batch] / steps[1][batch])


def measure_served(model_dir: str, floors: Floors) -> Iterator[Row]:
    """Over HTTP, client side: one mixed node, asked directly."""
    from ksana_lab.cluster.local import Cluster
    from ksana_lab.metrics.latency import tpot_s
    from ksana_lab.metrics.latency import ttft_s as client_ttft_s
    from ksana_lab.workload.loadgen import play
    from ksana_lab.workload.spec import WorkloadSpec

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mixed.yaml")
        file.write_text(json.dumps(_served_cluster(model_dir)), encoding="utf-8")  # JSON is YAML
        with Cluster.from_yaml(str(file)) as cluster:
            url = next(p["url"] for p in cluster.status()["processes"] if p["role"] == "mixed")
            for length in TTFT_LENGTHS:
                spec = _fixed(length, 8, num_requests=_ROUNDS, users=1, num_warmup=1)
                times = [client_ttft_s(record) for record in play(url, WorkloadSpec.from_dict(spec), progress=False)]
                ours = statistics.median(t for t in times if t is not None)
                yield Row(f"qwen3-8b.served_ttft_ms.{length}", "ms", floors.prefill_s(length) * 1e3, ours * 1e3)
            spec = _fixed(4096, 128, num_requests=100, rate=4.0, num_warmup=2)
            records = play(url, WorkloadSpec.from_dict(spec), progress=False)
            for name, function in (("ttft", client_ttft_s), ("tpot", tpot_s)):
                values = sorted(value for record in records if (value := function(record)) is not None)
                for percent in (50, 99):
                    at = values[min(len(values) - 1, round(percent / 100 * (len(values) - 1)))]
                    yield Row(f"qwen3-8b.served4rps.{name}_p{percent}_ms", "ms", None, at * 1e3)


def _fixed(prompt: int, output: int, **fields: Any) -> dict[str, Any]:
    lengths = {"prompt_tokens": {"kind": "fixed", "tokens": prompt}, "output_tokens": {"kind": "fixed", "tokens": output}}
    return {**lengths, "vocab_size": 100_000, **fields}


def _served_cluster(model_dir: str) -> dict[str, Any]:
    return {
        "model_dir": model_dir,
        "start_timeout_s": 180,
        "router": {"port": "auto"},
        "nodes": {"mixed": {"role": "mixed", "tensor_parallel_size": 1}},
        "setting": {
            "global": {"enable_cuda_graph": True},
            "batch_scheduler": {"max_step_tokens": 16384, "max_batch_size": 256, "max_token_len": 20480, "split_fuse_token_num": 0},
        },
        "ksana_lab": {"device": "cuda", "num_blocks": 40_000},
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench engine", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen3-8b,qwen3-0.6b", help="of qwen3-8b, qwen3-0.6b")
    parser.add_argument("--parts", default="decode,ttft,offline,served", help="of decode, ttft, offline, served")
    parser.add_argument("--tp", type=int, default=0, metavar="N", help="measure decode on one GPU and on N instead")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; rows of other names are kept")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: bench engine measures a GPU, and torch sees none here", file=sys.stderr)
        return 2
    parts, models = args.parts.split(","), args.models.split(",")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in _all_rows(folder, models, parts, args.tp):
            print(_line(row), flush=True)
            rows.append(row)
            if args.json:
                write_results(Path(args.json), rows)
    return 0


def _all_rows(folder: str, models: Sequence[str], parts: Sequence[str], tp: int) -> Iterator[Row]:
    ceilings = Ceilings.measure(torch.device("cuda"))
    gc.collect()
    torch.cuda.empty_cache()
    print(
        f"ceilings: read {ceilings.read_bytes_per_s / 1e12:.2f} TB/s, matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s", flush=True
    )
    for name in models:
        arch, _, shape = name.partition("-")
        model_dir = str(synthesize(Path(folder, name), arch, shape, has_weights=False))
        floors = Floors(SHAPES[name], ceilings)
        if tp:
            yield from measure_tp(model_dir, tp)
        elif name == "qwen3-8b":
            yield from measure_8b(model_dir, parts, floors)
            if "served" in parts:
                yield from measure_served(model_dir, floors)
        else:
            yield from measure_small(model_dir, parts, floors)


def _line(row: Row) -> str:
    floor = "" if row.floor is None else f"{row.floor:10.3f}"
    ratio = "" if row.ratio is None else f"{row.ratio:6.2f}x"
    return f"{row.name:36s} floor {floor:>10s}  ours {row.ours:12.3f} {row.unit:9s} {ratio}"


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Add ``rows`` to the file, newer ones in the place of those of the same name."""
    kept = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    kept.update({row.name: asdict(row) for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "commit": commit(), "rows": list(kept.values())}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def commit() -> str:
    """Of the working tree; COMMIT from the environment where it is no repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("COMMIT", "unknown")


def _median_s(call: Callable[[], object], device: torch.device, num: int = 10) -> float:
    times = []
    for i in range(num + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
