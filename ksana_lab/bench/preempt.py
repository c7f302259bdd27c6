"""What a shortage of KV blocks costs: the same requests with room for all, and with too few blocks, preempted sequences computed again or
swapped to host memory.

    python -m ksana_lab.bench preempt [--model qwen3-8b] [--json docs/results/preempt.json]

Requests are added at once and answered greedily in full length. Weights are random, the prefix cache is off. Each case
warms up with a run of its own; of the two that follow the faster counts, with its own preemptions.
``--trial`` goes through it with a tiny model on a CPU, to see that it works; its figures say nothing."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ksana_lab.bench._results import Row, check_machine, write_results
from ksana_lab.bench.engine import offline_run_s
from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.engine import Engine
from ksana_lab.models.synth import synthesize


@dataclass(frozen=True)
class Load:
    """``share``: of the blocks that all need together at their end, what there is when there are few."""

    device: str = "cuda"
    num_seqs: int = 64
    prompt: int = 2048
    output: int = 1024
    share: float = 0.6
    block_size: int = 16

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * -(-(self.prompt + self.output) // self.block_size) + self.num_seqs


GPU = Load()
TRIAL = Load("cpu", 6, 40, 40, 0.6)


@dataclass(frozen=True)
class Run:
    seconds: float
    num_preemptions: int
    num_swap_outs: int


def measure(name: str, model_dir: str, load: Load) -> Iterator[Row]:
    few = int(load.share * load.num_blocks)
    room_tok_s = 0.0
    for case, mode, num_blocks in (("room", "recompute", load.num_blocks), ("recompute", "recompute", few), ("swap", "swap", few)):
        best = _best_run(_config(model_dir, load, mode, num_blocks), load)
        tok_s = load.num_seqs * load.output / best.seconds
        yield Row(f"{name}.{case}_tok_s", "tokens/s", None, tok_s)
        if case == "room":
            room_tok_s = tok_s
        else:
            yield Row(f"{name}.{case}_over_room", "x", None, tok_s / room_tok_s)
        yield Row(f"{name}.{case}_preemptions", "a run", None, best.num_preemptions)
        if mode == "swap":
            yield Row(f"{name}.{case}_swap_outs", "a run", None, best.num_swap_outs)


def _best_run(config: EngineConfig, load: Load) -> Run:
    engine = Engine(config)
    try:
        _one_run(engine, load)  # warms up
        runs = [_one_run(engine, load) for _ in range(2)]
    finally:
        engine.close()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return min(runs, key=lambda run: run.seconds)


def _one_run(engine: Engine, load: Load) -> Run:
    before = engine.status()
    seconds = offline_run_s(engine, [(load.prompt, load.output)] * load.num_seqs)
    after = engine.status()
    return Run(seconds, after.num_preemptions - before.num_preemptions, after.num_swap_outs - before.num_swap_outs)


def _config(model_dir: str, load: Load, mode: str, num_blocks: int) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "model": {"model_dir": model_dir, "max_model_len": load.prompt + load.output},
            "cache": {"num_blocks": num_blocks, "block_size": load.block_size, "host_memory_factor": 1.0 if mode == "swap" else 0.0},
            "scheduler": {"max_num_seqs": load.num_seqs, "max_num_batched_tokens": 8 * load.prompt, "preemption_mode": mode},
            "runtime": {"device": load.device},
        }
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench preempt", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-8b", help="qwen3-8b, qwen3-0.6b, …")
    parser.add_argument("--trial", action="store_true", help="qwen3-tiny on a CPU: does it work?")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; rows of other names are kept")
    args = parser.parse_args(argv)
    if not args.trial and not torch.cuda.is_available():
        print("error: bench preempt measures a GPU, and torch sees none here", file=sys.stderr)
        return 2
    load = TRIAL if args.trial else GPU
    if args.json:
        check_machine(Path(args.json), load.device)
    name = "qwen3-tiny" if args.trial else args.model
    arch, _, shape = name.partition("-")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model_dir = str(synthesize(Path(folder, name), arch, shape, has_weights=False))
        for row in measure(name, model_dir, load):
            print(f"{row.name:36s} {row.ours:12.3f} {row.unit}", flush=True)
            rows.append(row)
            if args.json:
                write_results(Path(args.json), rows, load.device)
    return 0
