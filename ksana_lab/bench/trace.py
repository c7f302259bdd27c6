"""What recording costs: ``python -m ksana_lab.bench trace``. The same engine and work with the event log on and off, in turns.

One engine runs with its log and without, in pairs whose order alternates, so that whatever else the machine does falls on both; the cost is
the median of the pairs' ratios, with the interval of an order statistic. Beside it, what one event costs its caller. Knows no HTTP: tokens
per second of decode steps, where the log is written most often."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ksana_lab.engine.engine import Engine
from ksana_lab.engine.llm import LLM
from ksana_lab.tracing.events import read_logs
from ksana_lab.tracing.recorder import NullRecorder, Recorder
from ksana_lab.types import SamplingParams

_NUM_PROMPTS = 8
_DRAIN_S = 5.0


@dataclass(frozen=True)
class Cost:
    cost_percent: float  # of throughput; median over the pairs
    cost_low_percent: float  # 25th and 75th percentile of the pairs: what the machine's unrest makes of it
    cost_high_percent: float
    cpu_percent: float  # of the process's CPU time, its writer included; what others do on the machine hardly counts here
    tokens_per_s_off: float
    tokens_per_s_on: float
    events_per_token: float
    event_us: float  # for the thread that records one
    event_cpu_us: float  # writing included
    estimated_percent: float  # events per token times event_cpu_us, against the time of a token: free of the machine's unrest
    dropped: int
    num_pairs: int


def event_us(count: int = 50_000) -> tuple[float, float]:
    """What an event like a step's takes of its caller, and of the process altogether, writing included (CPU time)."""
    seqs = [[i, 40, 1] for i in range(_NUM_PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(folder, "bench", capacity=count)
        whole, own = time.process_time(), time.thread_time()
        for i in range(count):
            recorder.span("step", "step", i, i + 1, step=i, num_tokens=8, num_seqs=8, num_decodes=8, seqs=seqs)
        own = time.thread_time() - own
        recorder.close()
        whole = time.process_time() - whole
    return own / count * 1e6, whole / count * 1e6


class _Switch:
    """Gives one engine its recorder and takes it away. Two engines would not do: two that are alike differ by 2%."""

    def __init__(self, engine: Engine) -> None:
        assert engine._executor is not None and engine._executor.worker is not None
        self._engine, self._runner = engine, engine._executor.worker.runner
        self._recorder, self._timer = engine._recorder, self._runner.layer_timer

    def set(self, is_on: bool) -> None:
        """Between requests; what was recorded is written before."""
        end_s = time.monotonic() + _DRAIN_S
        while isinstance(self._recorder, Recorder) and self._recorder.num_waiting and time.monotonic() < end_s:
            time.sleep(0.005)
        recorder = self._recorder if is_on else NullRecorder()
        self._engine._recorder = self._engine.scheduler._events = recorder
        self._runner.layer_timer = self._timer if is_on else None


def measure(model_dir: str, *, num_pairs: int = 12, num_tokens: int = 256) -> Cost:
    """Raises what LLM raises."""
    prompts = [[3 + (7 * i + j) % 500 for j in range(32)] for i in range(_NUM_PROMPTS)]
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder, LLM(model_dir, trace_dir=folder) as llm:
        switch = _Switch(llm.engine)
        llm.generate(prompts, sampling)
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        cpu: dict[str, list[float]] = {"off": [], "on": []}
        for number in range(num_pairs):
            for name in ("off", "on") if number % 2 else ("on", "off"):
                switch.set(name == "on")
                begin, cpu_begin = time.perf_counter(), time.process_time()
                llm.generate(prompts, sampling)
                seconds[name].append(time.perf_counter() - begin)
                switch.set(False)  # until the last event is written: that is part of what the log costs
                cpu[name].append(time.process_time() - cpu_begin)
        llm.close()
        (log,) = read_logs(folder)
    num_events = len(log.events) / (num_pairs + 1)  # the warm-up is recorded, too
    return cost_of(seconds, cpu, _NUM_PROMPTS * num_tokens, num_events, event_us(), log.dropped or 0)


def cost_of(
    seconds: dict[str, list[float]],
    cpu: dict[str, list[float]],
    num_tokens: int,
    num_events: float,
    event: tuple[float, float],
    dropped: int,
) -> Cost:
    """``seconds`` and ``cpu``: of each pair's turn "off" and "on"; ``num_tokens``, ``num_events``: of one turn; ``event``: as event_us."""
    ratios = [100 * (1 - a / b) for a, b in zip(seconds["off"], seconds["on"], strict=True)]
    cpu_ratios = [100 * (1 - a / b) for a, b in zip(cpu["off"], cpu["on"], strict=True)]
    rate_off, rate_on = (num_tokens / statistics.median(seconds[name]) for name in ("off", "on"))
    quartiles = statistics.quantiles(ratios, n=4)
    own_us, whole_us = event
    return Cost(
        cost_percent=statistics.median(ratios),
        cost_low_percent=quartiles[0],
        cost_high_percent=quartiles[2],
        cpu_percent=statistics.median(cpu_ratios),
        tokens_per_s_off=rate_off,
        tokens_per_s_on=rate_on,
        events_per_token=num_events / num_tokens,
        event_us=own_us,
        event_cpu_us=whole_us,
        estimated_percent=100 * num_events / num_tokens * whole_us * rate_off / 1e6,
        dropped=dropped,
        num_pairs=len(ratios),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench trace", description="Throughput with the event log on and off.")
    parser.add_argument("--model-dir", default=".cache/tiny", help="a checkpoint (.cache/tiny: python -m ksana_lab.models.synth)")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256, help="per request, 8 requests at once")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    cost = measure(options.model_dir, num_pairs=options.pairs, num_tokens=options.tokens)
    for name, value in asdict(cost).items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.json:
        options.json.write_text(json.dumps(asdict(cost), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
