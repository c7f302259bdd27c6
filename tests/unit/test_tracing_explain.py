"""One run per cause, and the sentence it must lead to."""

import pytest
from helpers_trace import FakeRun

from ksana_lab.tracing import __main__ as command
from ksana_lab.tracing.explain import explain, why_exposed
from ksana_lab.tracing.timeline import load


def joined(tmp_path, **numbers):
    fake = FakeRun(**numbers)
    return load(fake.write(tmp_path), client=fake.client)


def rules(run):
    return {finding.rule for finding in explain(run).findings}


def test_a_run_that_only_computes_has_nothing_to_explain(tmp_path):
    assert rules(joined(tmp_path, wire_ms=0.1)) <= {"nothing", "bottleneck"}


def test_queueing_names_its_share(tmp_path):
    finding = explain(joined(tmp_path, queueing_ms=20.0)).of("queueing")
    assert finding.numbers["share"] == pytest.approx(20.0 / 40.0, abs=0.03)
    assert "49%" in finding.text or "48%" in finding.text or "50%" in finding.text


def test_waiting_for_the_step_under_way_is_queueing_and_no_overhead(tmp_path):
    explanation = explain(joined(tmp_path, looks_after_ms=20.0))
    finding = explanation.of("queueing")
    assert finding.lost_s == pytest.approx(0.0205, abs=1e-4) and finding.numbers["unseen_s"] == pytest.approx(0.02, abs=1e-4)
    assert "20.0 ms of it until the engine looked" in finding.text and explanation.of("overhead") is None


@pytest.mark.parametrize(
    ("reason", "numbers"),
    [
        ("link", {"wire_ms": 9.0}),
        ("one piece", {"mode": "bulk", "wire_ms": 2.0}),
        ("late announcement", {"announced_after_ms": 40.0, "wire_ms": 1.0}),
        ("fragments", {"wire_ms": 9.0, "copies": 512, "post_us": 8000.0}),
        ("tail", {"wire_ms": 4.5, "num_layers": 2}),
    ],
)
def test_why_a_transfer_is_exposed(tmp_path, reason, numbers):
    run = joined(tmp_path, **numbers)
    assert set(why_exposed(run)["reason"]) == {reason}
    assert f"exposed: {reason}" in rules(run)


def test_a_link_is_as_slow_as_it_is_with_others_beside_it(tmp_path):
    """Two ranks send at the same time: 7 ms for a layer on each link, and not 3.5."""
    finding = explain(joined(tmp_path, num_ranks=2, wire_ms=7.0)).of("exposed: link")
    assert "a layer takes 7.0 ms to send, 5.0 ms to compute" in finding.text and "0.15 GB/s" in finding.text


def test_a_decode_side_that_keeps_requests_waiting(tmp_path):
    finding = explain(joined(tmp_path, announced_after_ms=30.0, free_blocks=3)).of("decode admission")
    assert finding.lost_s == pytest.approx(0.03, abs=1e-3)


def test_a_slow_handover(tmp_path):
    assert "hand-over" in rules(joined(tmp_path, decode_wait_ms=15.0))


def test_short_prompts_pay_for_http(tmp_path):
    assert "overhead" in rules(joined(tmp_path, compute_ms=0.2, http_ms=2.0))


def test_the_busier_side_is_named(tmp_path):
    finding = explain(joined(tmp_path, num_requests=8, gap_ms=21.0, wire_ms=0.1, num_decodes=1)).of("bottleneck")
    assert finding.numbers["prefill"] > 0.85 > finding.numbers["decode"]
    assert finding.advice.startswith("Prefill is the bottleneck")


def test_the_most_expensive_comes_first(tmp_path):
    findings = explain(joined(tmp_path, queueing_ms=50.0, wire_ms=9.0)).findings
    assert findings[0].rule == "queueing" and findings[0].lost_s >= findings[1].lost_s


def test_the_command_prints_and_writes(tmp_path, capsys):
    fake = FakeRun(queueing_ms=20.0)
    fake.write(tmp_path)
    assert command.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "queueing for the prefill engine" in said and "hidden + exposed = wire" in said
    assert (tmp_path / "trace.json").stat().st_size > 1000
    assert {p.stem for p in (tmp_path / "figures").glob("*.png")} == {
        "layer_lanes",
        "request_gantt",
        "ttft_decomposition",
        "link_utilisation",
    }


def test_the_command_without_a_log(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "no event log" in capsys.readouterr().err
