"""The bench's own parts: it must not be what it measures. One small run proves the whole."""

from __future__ import annotations

import argparse
import asyncio
import json
from types import SimpleNamespace

import pytest

from ksana_lab.bench import __main__ as bench
from ksana_lab.bench import router
from ksana_lab.bench.router import Bench, Load, Shape, main


def test_percentiles_are_nearest_rank():
    load = Load(1, first_byte_ms=[float(i) for i in range(100, 0, -1)])
    assert (load.percentile_ms(50), load.percentile_ms(99)) == (50.0, 99.0)
    assert Load(1, first_byte_ms=[7.0]).percentile_ms(99) == 7.0


OPTIONS = argparse.Namespace(argv=["--streams", "4"], streams=4)


@pytest.fixture
def report():
    """Of known samples: alone 10 and 12 ms direct, 11 and 15 routed; at saturation 80 requests in 4 s direct, 60 routed."""
    alone = {True: Load(1, [10.0, 12.0], 2, 0.1), False: Load(1, [11.0, 15.0], 2, 0.1)}
    full = {True: Load(4, [10.0], 80, 4.0), False: Load(4, [10.0], 60, 4.0, router_cpu_s=0.03, stub_cpu_s=0.12, client_cpu_s=0.06)}
    return router._report(OPTIONS, Shape(100.0, 10.0, 11), alone, full)


def test_what_the_router_adds_is_routed_less_direct(report):
    assert report["added_first_byte_ms"] == {"p50": 1.0, "p99": 3.0}


def test_requests_per_second_are_requests_over_the_time_of_their_rounds(report):
    assert report["routed_rps"] == report["rows"]["routed.full"]["rps"] == 15.0 and report["rows"]["direct.full"]["rps"] == 20.0
    assert report["routed_over_direct_rps"] == 0.75 and report["most_possible_rps"] == 20.0  # 4 streams of 0.2 s


def test_cpu_time_is_shared_among_the_requests(report):
    assert report["rows"]["routed.full"]["cpu_ms_per_request"] == pytest.approx({"router": 0.5, "stubs": 2.0, "client": 1.0})


def test_a_load_adds_up_its_rounds():
    load = Load(2)
    load.add([(1.0, 1.25, 2.0)], 2.0, (1.0, 10.0, 100.0), (1.5, 11.0, 102.0))
    load.add([(5.0, 5.5, 6.0)], 3.0, (2.0, 20.0, 200.0), (2.25, 20.5, 201.0))
    assert (load.first_byte_ms, load.num_requests, load.duration_s, load.rps) == ([250.0, 500.0], 2, 5.0, 0.4)
    assert (load.router_cpu_s, load.stub_cpu_s, load.client_cpu_s) == (0.75, 1.5, 3.0)


def test_cpu_time_is_user_and_system_of_the_router_of_all_stubs_and_of_this_process():
    def process(user, system):
        return SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=user, system=system, iowait=9.0))

    router_s, stubs_s, client_s = Bench("", "", process(1.5, 0.25), [process(1.0, 2.0), process(4.0, 8.0)], b"")._cpu_s()
    assert (router_s, stubs_s) == (1.75, 15.0) and client_s > 0  # it has imported something


def test_the_clock_of_saturation_starts_when_all_streams_are_connected(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(router, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))

    class FakeStream:
        close = lambda self: None  # noqa: E731

        async def ask(self):
            now_s[0] += 1.0
            return now_s[0] - 1.0, now_s[0], now_s[0]

    class SlowToConnect(Bench):
        _cpu_s = lambda self: (now_s[0], 0.0, 0.0)  # noqa: E731

        async def _connect(self, is_direct, shape):
            now_s[0] += 100.0
            return FakeStream()

    load = Load(2)
    asyncio.run(SlowToConnect("", "", None, [], b"")._closed_loops(load, True, Shape(1.0, 1.0, 1), 4.0))
    assert load.duration_s == load.num_requests == load.router_cpu_s and 4.0 <= load.duration_s <= 5.0


def test_figures_from_another_machine_are_called_so(report, capsys):
    router._print(report)
    out = capsys.readouterr().out
    assert out.count("KsanaLLM's router, measured elsewhere: ") == 2 and " times" not in out


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
    assert rows["routed.full"]["requests"] >= 4 and 0.4 * rows["routed.full"]["rps"] <= rows["routed.full"]["requests"]
