"""Clocks of several hosts."""

import json

import pytest
from helpers_trace import MS, FakeRun

from ksana_lab.tracing.clock import Offset, OffsetEstimator, align
from ksana_lab.tracing.events import ProcessLog, read_logs
from ksana_lab.tracing.timeline import load


def with_pings(folder, offset_ns, error_ns):
    """Add to the decode node's log what it measured of the prefill node's clock."""
    path = next(folder.glob("decode.tp0*"))
    head, *rest, last = path.read_text().splitlines()
    args = {"domain": "host-a", "offset_ns": offset_ns, "error_ns": error_ns}
    event = {"ph": "i", "ts": 1, "name": "offset", "cat": "clock", "args": args}
    end = json.loads(last)
    end["args"]["written"] += 1
    path.write_text("\n".join([head, json.dumps(event), *rest, json.dumps(end)]) + "\n")


def test_one_host_needs_no_offset(tmp_path):
    alignment = align(read_logs(FakeRun().write(tmp_path)))
    assert alignment.offsets == {"host-a": Offset(0, 0, "same host")}


@pytest.mark.parametrize("ahead_ms", [7000.0, -300.0])
def test_pings_bring_two_hosts_together(tmp_path, ahead_ms):
    """No receive before its send beyond the error, and the phases as on one host."""
    fake = FakeRun(domain_of_decode="host-b", decode_clock_ahead_ms=ahead_ms)
    with_pings(fake.write(tmp_path), round(-ahead_ms * MS) + 20_000, 50_000)
    run = load(tmp_path, client=fake.client)
    assert run.alignment.offsets["host-b"] == Offset(round(ahead_ms * MS) - 20_000, 50_000)
    assert (run.transfers["recv_end_s"] + run.transfers["clock_error_s"] >= run.transfers["wire_start_s"]).all()
    assert run.checks()["is_ok"].all(), run.checks()


def test_a_wrong_offset_is_caught(tmp_path):
    fake = FakeRun(domain_of_decode="host-b", decode_clock_ahead_ms=100.0)
    with_pings(fake.write(tmp_path), round(-150 * MS), 50_000)
    checks = load(tmp_path, client=fake.client).checks().set_index("name")
    assert not checks.loc["sent before received", "is_ok"]


def test_order_bounds_the_offset_where_nobody_pinged(tmp_path):
    fake = FakeRun(domain_of_decode="host-b", decode_clock_ahead_ms=250.0)
    fake.write(tmp_path)
    path = next(tmp_path.glob("decode-api*"))
    first = {"ph": "i", "ts": round((1030 + 250) * MS), "name": "FIRST_TOKEN", "cat": "request", "args": {"request_id": "r-0"}}
    head, *rest, end = path.read_text().splitlines()
    path.write_text("\n".join([head, *rest, json.dumps(first), end]) + "\n")
    offset = align(read_logs(tmp_path)).offsets["host-b"]
    assert offset.source == "order" and abs(offset.offset_ns - 250 * MS) <= offset.error_ns < 60 * MS


def test_wall_clocks_are_the_last_resort():
    logs = [ProcessLog(None, "router", 1, clock_domain="a", monotonic_ns=100, unix_ns=1100),
            ProcessLog(None, "decode.tp0", 2, clock_domain="b", monotonic_ns=500, unix_ns=1100)]  # fmt: skip
    offset = align(logs).offsets["b"]
    assert (offset.offset_ns, offset.source) == (400, "wall clock") and offset.error_ns >= MS


def test_the_shortest_round_trip_tells_best():
    estimator = OffsetEstimator()
    assert estimator.add(1000, 5600, 2000) == Offset(4100, 500)
    assert estimator.add(3000, 7000, 9000) is None
    assert estimator.add(10_000, 14_060, 10_100) == Offset(4010, 50)


def test_drift_widens_the_error(tmp_path):
    fake = FakeRun(domain_of_decode="host-b")
    with_pings(fake.write(tmp_path), 0, 1000)
    with_pings(tmp_path, 90_000, 5000)
    assert align(read_logs(tmp_path)).offsets["host-b"].error_ns == 1000 + 90_000 - 6000
