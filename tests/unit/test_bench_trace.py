"""The cost of recording is measured, with everything that was recorded written."""

from helpers_checkpoint import checkpoint

from ksana_lab.bench import trace


def test_cost_counts_events_and_drops_none():
    cost = trace.measure(checkpoint("qwen3"), num_pairs=2, num_tokens=8)
    assert cost.dropped == 0 and 0.1 < cost.events_per_token < 3
    assert cost.event_us <= cost.event_cpu_us < 200
    assert cost.estimated_percent == cost.estimated_percent > 0
