"""Reports of Nsight Systems and Kineto, made by hand after real ones, joined with a log."""

import json
import sqlite3

import pytest
from helpers_trace import MS, FakeRun

from ksana_lab.errors import ConfigError
from ksana_lab.tracing import nsight, nsys
from ksana_lab.tracing.timeline import load

PID, TID = 101, 1001  # prefill-api is 101 in FakeRun, prefill.tp0 102
ENGINE = 102
START = 500 * MS  # of the session, on the monotonic clock


def global_tid(pid, tid=TID):
    return (1 << 48) | (pid << 24) | tid


def write_report(path, *, clock_mark=True, old=False):
    """One step of one layer range with two kernels in it, a third outside, and a copy to the peer GPU."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE StringIds(id INTEGER, value TEXT)")
    strings = ["layer layer=2 step=7", "gemm_kernel", "attention_kernel", "step step=7", "other", "send request=0.0 layer=2 bytes=4096"]
    db.executemany("INSERT INTO StringIds VALUES(?, ?)", list(enumerate(strings, start=10)))
    columns = "start, end, eventType, text, textId, domainId, globalTid, int64Value" + ("" if old else ", uint64Value")
    db.execute(f"CREATE TABLE NVTX_EVENTS({columns})")
    rows = [
        (0, None, 75, "ksana_lab", None, 1, global_tid(ENGINE), None),
        (0, None, 75, "NCCL", None, 2, global_tid(ENGINE), None),
        (100, 5000, 59, None, 13, 1, global_tid(ENGINE), 7),
        (200, 900, 59, None, 10, 1, global_tid(ENGINE), 2),
        (300, 700, 59, None, 14, 2, global_tid(ENGINE), 2),
        (950, 2000, 60, None, 15, 1, global_tid(ENGINE), 4096),
        (50, None, 34, "clock role=prefill.tp0", None, 1, global_tid(ENGINE), START + 50),
    ]
    if not clock_mark:
        rows.pop()
    marks = "?, " * 7 + "?" + ("" if old else ", NULL")
    db.executemany(f"INSERT INTO NVTX_EVENTS VALUES({marks})", rows)
    db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME(start, end, globalTid, correlationId, nameId)")
    calls = [(250, 260, 1), (600, 610, 2), (3000, 3010, 3)]
    db.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES(?, ?, ?, ?, 0)", [(a, b, global_tid(ENGINE), c) for a, b, c in calls])
    db.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL(start, end, deviceId, streamId, correlationId, globalPid, demangledName, shortName)"
    )
    kernels = [(1000, 1400, 1, 11), (1500, 1600, 2, 12), (4000, 4100, 3, 14)]
    db.executemany(
        "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES(?, ?, 0, 7, ?, ?, NULL, ?)",
        [(a, b, c, global_tid(ENGINE, 0), n) for a, b, c, n in kernels],
    )
    db.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY"
        "(start, end, deviceId, streamId, correlationId, globalPid, bytes, copyKind, srcDeviceId, dstDeviceId)"
    )
    db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES(1700, 1900, 0, 9, 9, ?, 4096, 10, 0, 1)", (global_tid(ENGINE, 0),))
    db.execute("CREATE TABLE TARGET_INFO_SESSION_START_TIME(utcEpochNs, utcTime, localTime)")
    db.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES(?, '', '')", (START,))  # FakeRun's wall clock is its monotonic one
    db.commit()
    db.close()
    return path


@pytest.mark.parametrize("old", [False, True])
def test_only_our_domain_is_read_and_registered_strings_are_resolved(tmp_path, old):
    report = nsys.read(write_report(tmp_path / "r.sqlite", old=old))
    assert report.nvtx["name"].tolist() == ["step", "layer", "send", "clock"]
    assert report.nvtx["pid"].unique().tolist() == [ENGINE] and report.nvtx["tid"].unique().tolist() == [TID]
    assert (report.anchor, report.offset_ns) == ("clock mark", START)


def test_a_layer_is_projected_onto_the_gpu(tmp_path):
    gpu = nsys.project(nsys.read(write_report(tmp_path / "r.sqlite"))).set_index("name")
    layer, step = gpu.loc["layer 2"], gpu.loc["step 7"]
    assert (layer["start_ns"], layer["end_ns"], layer["layer"]) == (1000, 1600, 2)
    assert layer["details"]["kernels"] == 2 and layer["details"]["busy_ns"] == 500
    assert (step["start_ns"], step["end_ns"]) == (1000, 4100)


@pytest.mark.parametrize("clock_mark", [True, False])
def test_rows_lie_on_the_clock_of_the_log(tmp_path, clock_mark):
    fake = FakeRun()
    fake.write(tmp_path)
    write_report(tmp_path / "prefill0.sqlite", clock_mark=clock_mark)
    run = load(tmp_path, client=fake.client)
    copy = run.device[run.device["kind"] == "copy"].iloc[0]
    assert copy["start_s"] * 1e9 + run.origin_ns == pytest.approx(START + 1700, abs=1)
    assert (copy["name"], copy["bytes"], copy["process"]) == ("copy peer to peer", 4096, "prefill.tp0")
    assert set(run.device["kind"]) == {"nvtx range", "nvtx span", "kernel", "copy", "gpu layer", "gpu step"}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("profiler", ["nsys", "kineto"])
def test_a_process_is_looked_for_on_the_host_of_its_report(tmp_path, profiler, order):
    """Containers count their processes alike: the decode host's engine has the number of the prefill host's."""
    fake = FakeRun(domain_of_decode="host-b", decode_clock_ahead_ms=7000.0)
    here, there = fake.write(tmp_path / "a"), tmp_path / "b"
    there.mkdir()
    engine = there / next(here.glob("decode.tp0*")).name
    engine.write_text(next(here.glob("decode.tp0*")).read_text().replace('"pid": 104', f'"pid": {ENGINE}'))
    next(here.glob("decode.tp0*")).unlink()
    if profiler == "nsys":
        write_report(there / "decode0.sqlite")
    else:
        events = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 60.0, "dur": 20.0, "pid": ENGINE, "tid": 1, "args": {}}]
        (there / "kineto-decode-1.json").write_text(json.dumps({"baseTimeNanoseconds": START, "traceEvents": events}))
    device = load([here, there][::order], client=fake.client).device
    assert len(device) and set(device["process"]) == {"decode.tp0"}


def test_a_file_that_is_no_report_is_left_out(tmp_path):
    fake = FakeRun()
    fake.write(tmp_path)
    (tmp_path / "x.sqlite").write_text("no database at all, but long enough to look like one" * 100)
    assert len(load(tmp_path, client=fake.client).device) == 0


def test_messages_are_taken_apart():
    assert nsys.parse("waiting for KV request_id=a-b seq_id=3") == ("waiting for KV", {"request_id": "a-b", "seq_id": "3"})
    assert nsys.parse("") == ("", {})


def test_kineto_rows_lie_on_the_clock_of_the_log(tmp_path):
    fake = FakeRun()
    fake.write(tmp_path)
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 100.0, "dur": 20.0, "pid": 0, "tid": 7, "args": {"device": 0, "stream": 7}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::linear", "ts": 50.0, "dur": 60.0, "pid": ENGINE, "tid": 1, "args": {}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 60.0, "dur": 20.0, "pid": ENGINE, "tid": 1, "args": {}},
    ]
    (tmp_path / "kineto-prefill-1.json").write_text(json.dumps({"baseTimeNanoseconds": START, "traceEvents": events}))
    device = load(tmp_path, client=fake.client).device
    assert device["name"].tolist() == ["aten::linear", "gemm"]  # the inner op is part of the outer
    assert device["process"].tolist() == ["prefill.tp0"] * 2 and device["lane"].iloc[1] == "GPU 0 stream 7"


def test_without_nsys_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(nsight, "_PLACES", ())
    with pytest.raises(ConfigError, match="install Nsight Systems"):
        nsight.find_nsys({"PATH": str(tmp_path)})
    with pytest.raises(ConfigError, match="not executable"):
        nsight.find_nsys({"PATH": str(tmp_path), "KSANA_LAB_NSYS": "/nowhere/nsys"})


def test_a_whole_report_lacks_nothing_and_kernels_only_where_there_is_a_gpu(tmp_path):
    path = write_report(tmp_path / "r.sqlite")
    assert nsight.lacking(path, has_gpu=True) is None
    db = sqlite3.connect(path)
    db.execute("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL")
    db.close()
    assert nsight.lacking(path) is None
    assert "no GPU kernels" in nsight.lacking(path, has_gpu=True)


def test_an_empty_report_names_the_cause_to_look_for(tmp_path, caplog):
    path = write_report(FakeRun().write(tmp_path) / "prefill0.sqlite")
    db = sqlite3.connect(path)
    db.execute("DROP TABLE NVTX_EVENTS")
    db.close()
    with caplog.at_level("WARNING", "ksana_lab"):
        load(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "prefill0.sqlite holds no ranges of ksana_lab" in line and "doctor --nsys" in line


def test_a_report_that_does_not_name_our_domain_is_read_all_the_same(tmp_path):
    path = write_report(tmp_path / "r.sqlite")
    db = sqlite3.connect(path)
    db.execute("DELETE FROM NVTX_EVENTS WHERE eventType = 75")
    db.commit()
    db.close()
    assert {"layer", "step", "send", "clock"} == set(nsys.read(path).nvtx["name"])


def test_a_replayed_graph_is_the_time_of_its_step_on_the_gpu(tmp_path):
    """A decode step is one row then, launched within the step's range."""
    path = write_report(tmp_path / "r.sqlite")
    db = sqlite3.connect(path)
    db.execute("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL")
    db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE(start, end, deviceId, streamId, correlationId, globalPid, graphId)")
    db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES(1000, 1400, 0, 7, 1, ?, 3)", (global_tid(ENGINE, 0),))
    db.commit()
    db.close()
    assert nsight.lacking(path, has_gpu=True) is None
    step = nsys.project(nsys.read(path)).set_index("name").loc["step 7"]
    assert (step["start_ns"], step["end_ns"], step["details"]["kernels"]) == (1000, 1400, 1)


def test_the_importers_libraries_are_its_own(tmp_path):
    env = nsight._importer_environment("/opt/host/QdstrmImporter", {"KSANA_LAB_NSYS_LIBS": "/libs", "LD_LIBRARY_PATH": "/mine"})
    assert env["LD_LIBRARY_PATH"] == "/libs:/opt/host:/mine"
