"""The bench's own parts: it must not be what it measures. One small run proves the whole."""

from __future__ import annotations

import json

import pytest

from ksana_lab.bench import __main__ as bench
from ksana_lab.bench.router import Load, main


def test_percentiles_are_nearest_rank():
    load = Load(1, first_byte_ms=[float(i) for i in range(100, 0, -1)])
    assert (load.percentile_ms(50), load.percentile_ms(99)) == (50.0, 99.0)
    assert Load(1, first_byte_ms=[7.0]).percentile_ms(99) == 7.0


def test_an_unknown_bench_is_answered_with_the_nearest(capsys):
    assert bench.main(["rooter"]) == 2
    assert "did you mean router?" in capsys.readouterr().err


@pytest.mark.integration
def test_a_small_run_measures_both_ways(tmp_path):
    path = tmp_path / "router.json"
    options = [
        "--requests",
        "5",
        "--streams",
        "4",
        "--duration",
        "0.4",
        "--rounds",
        "1",
        "--ttft-ms",
        "20",
        "--gap-ms",
        "2",
        "--tokens",
        "3",
    ]
    assert main([*options, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert rows["direct.c1"]["requests"] == rows["routed.c1"]["requests"] == 5
    assert min(rows[name]["first_byte_ms"]["p50"] for name in ("direct.c1", "routed.c1")) >= 19.0  # the stub's own time is in both
    assert rows["routed.full"]["requests"] >= 4 and rows["routed.full"]["cpu_ms_per_request"]["router"] >= 0
