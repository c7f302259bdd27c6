"""The cost of recording is measured, with everything that was recorded written."""

from types import SimpleNamespace

import pytest
from helpers_checkpoint import checkpoint

from ksana_lab.bench import trace
from ksana_lab.engine.llm import LLM
from ksana_lab.tracing.events import read_logs
from ksana_lab.types import SamplingParams


def test_cost_counts_events_and_drops_none():
    cost = trace.measure(checkpoint("qwen3"), num_pairs=2, num_tokens=8)
    assert cost.dropped == 0 and 0.1 < cost.events_per_token < 3
    assert cost.event_us <= cost.event_cpu_us < 200
    events_per_s = cost.events_per_token * cost.tokens_per_s_off
    assert cost.estimated_percent == pytest.approx(100 * events_per_s * cost.event_cpu_us / 1e6) and events_per_s > 0


def test_cost_is_what_the_log_takes_of_the_throughput_without_it():
    seconds = {"off": [1.0, 1.0, 1.0, 3.0], "on": [1.25, 1.25, 1.25, 2.0]}  # 20% less throughput, thrice; once 50% more
    cost = trace.cost_of(seconds, {"off": [3.0] * 4, "on": [4.0] * 4}, num_tokens=64, num_events=128, event=(4.0, 5.0), dropped=3)
    assert (cost.cost_percent, cost.cpu_percent) == (pytest.approx(20.0), 25.0)
    assert cost.cost_low_percent == pytest.approx(-32.5) and cost.cost_high_percent == pytest.approx(20.0)
    assert (cost.tokens_per_s_off, cost.tokens_per_s_on, cost.events_per_token) == (64.0, pytest.approx(51.2), 2.0)
    assert cost.estimated_percent == pytest.approx(0.064)  # 128 events a second, 5 us each
    assert (cost.event_us, cost.event_cpu_us, cost.dropped, cost.num_pairs) == (4.0, 5.0, 3, 4)


@pytest.fixture
def machine(monkeypatch):
    """An engine whose turns take 1 s, and 1.25 s and 128 events while its log is on."""
    state = SimpleNamespace(now_s=0.0, is_on=True, num_events=0)

    class FakeLLM:
        engine = None
        __init__ = lambda self, model_dir, trace_dir: None  # noqa: E731
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        close = lambda self: None  # noqa: E731

        def generate(self, prompts, sampling):
            state.now_s += 1.25 if state.is_on else 1.0
            state.num_events += 128 if state.is_on else 0

    monkeypatch.setattr(trace, "LLM", FakeLLM)
    monkeypatch.setattr(trace, "_Switch", lambda engine: SimpleNamespace(set=lambda is_on: setattr(state, "is_on", is_on)))
    monkeypatch.setattr(trace, "read_logs", lambda folder: [SimpleNamespace(events=range(state.num_events), dropped=0)])
    monkeypatch.setattr(trace, "event_us", lambda: (4.0, 5.0))
    clock = lambda: state.now_s  # noqa: E731
    monkeypatch.setattr(trace, "time", SimpleNamespace(perf_counter=clock, process_time=clock))


def test_turns_with_and_without_the_log_are_held_against_each_other(machine):
    cost = trace.measure("model", num_pairs=3, num_tokens=8)
    assert cost.cost_percent == cost.cpu_percent == pytest.approx(20.0)
    assert (cost.events_per_token, cost.num_pairs) == (2.0, 3)  # 128 a turn of 64 tokens: the turns without the log have none


def test_what_is_done_while_the_recorder_is_off_is_not_in_the_log(tmp_path):
    with LLM(checkpoint("qwen3"), trace_dir=str(tmp_path)) as llm:
        switch = trace._Switch(llm.engine)
        for is_on, num_tokens in ((False, 9), (True, 5), (False, 9)):
            switch.set(is_on)
            llm.generate([[3, 4, 5]], SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))
    (log,) = read_logs(tmp_path)
    assert len(list(log.named("step", "step"))) == 5
