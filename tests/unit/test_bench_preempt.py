"""What bench preempt makes of its runs. That its path works: ``python -m ksana_lab.bench preempt --trial``."""

from types import SimpleNamespace

import pytest

from ksana_lab.bench import preempt
from ksana_lab.bench.preempt import TRIAL

RUNS = {  # of each case: seconds, preemptions and swap-outs of its runs, the first of which warms up
    "room": [(0.5, 0, 0), (2.0, 0, 0), (1.0, 0, 0)],
    "recompute": [(0.1, 50, 0), (4.0, 7, 0), (5.0, 9, 0)],
    "swap": [(0.1, 50, 40), (3.0, 6, 4), (2.0, 8, 5)],
}


@pytest.fixture
def figures(monkeypatch):
    """{name: (value, unit)} of engines whose runs take as long, and preempt as often, as RUNS says."""
    cases = iter(RUNS.values())

    class FakeEngine:
        def __init__(self, config):
            self.runs, self.counts = iter(next(cases)), [0, 0]

        def status(self):
            return SimpleNamespace(num_preemptions=self.counts[0], num_swap_outs=self.counts[1])

        def close(self):
            assert next(self.runs, None) is None

    def run_s(engine, lengths):
        seconds, *counts = next(engine.runs)
        engine.counts = [before + more for before, more in zip(engine.counts, counts, strict=True)]
        return seconds

    monkeypatch.setattr(preempt, "Engine", FakeEngine)
    monkeypatch.setattr(preempt, "offline_run_s", run_s)
    return {row.name: (row.ours, row.unit) for row in preempt.measure("tiny", "model", TRIAL)}


def test_the_faster_run_after_the_warm_up_counts_with_its_own_preemptions(figures):
    assert figures["tiny.room_tok_s"] == (240.0, "tokens/s")  # 6 x 40 tokens in 1 s, not in the warm-up's 0.5
    assert figures["tiny.recompute_preemptions"] == (7, "a run") and figures["tiny.recompute_tok_s"][0] == 60.0
    assert (figures["tiny.swap_preemptions"][0], figures["tiny.swap_swap_outs"][0]) == (8, 5)


def test_what_a_shortage_costs_is_held_against_room_for_all(figures):
    assert (figures["tiny.recompute_over_room"], figures["tiny.swap_over_room"]) == ((0.25, "x"), (0.5, "x"))
