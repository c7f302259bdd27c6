"""A recording from GPUs, kept small, read again and again; and the tool that makes one small, over a report made by hand."""

import json
import sqlite3
from pathlib import Path

import pytest
from helpers_trace import FakeRun
from test_tracing_profilers import write_report

from ksana_lab.metrics.export import save_records
from ksana_lab.tracing import nsys, shrink
from ksana_lab.tracing.timeline import CLIENT_FILE, load

RECORDING = Path(__file__).parents[1] / "data" / "gpu_recording"


@pytest.fixture
def recording(tmp_path):
    fake = FakeRun()
    folder = fake.write(tmp_path / "whole")
    save_records(fake.client, folder / CLIENT_FILE)
    write_report(folder / "prefill0.sqlite")
    db = sqlite3.connect(folder / "prefill0.sqlite")
    db.execute("CREATE TABLE OSRT_API(start, end)")
    db.execute("INSERT INTO StringIds VALUES(99, 'nobody names this')")
    db.commit()
    db.close()
    return folder


def test_a_shrunk_recording_reads_as_the_whole_one(tmp_path, recording):
    shrink.shrink(recording, tmp_path / "small")
    whole, small = load(recording), load(shrink.unpack(tmp_path / "small", tmp_path / "again"))
    assert small.device.equals(whole.device) and len(small.device) > 5
    assert small.requests.equals(whole.requests) and small.checks().equals(whole.checks())


def test_what_nobody_reads_and_where_it_was_made_stay_behind(tmp_path, recording, capsys):
    assert shrink.main([str(recording), str(tmp_path / "small")]) == 0
    assert "7 files" in capsys.readouterr().out
    again = shrink.unpack(tmp_path / "small", tmp_path / "again")
    db = sqlite3.connect(again / "prefill0.sqlite")
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    strings = {value for (value,) in db.execute("SELECT value FROM StringIds")}
    db.close()
    assert "OSRT_API" not in tables and "gemm_kernel" in strings and "nobody names this" not in strings
    hosts = {json.loads(path.read_text().splitlines()[0]).get("args", {}).get("host") for path in again.glob("*.jsonl")}
    assert hosts == {"host", None}  # None: the client's file has no such header


def test_a_folder_without_logs_is_one_line(tmp_path, capsys):
    assert shrink.main([str(tmp_path), str(tmp_path / "small")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_recording_from_two_gpus_is_whole_and_adds_up(tmp_path):
    folder = shrink.unpack(RECORDING, tmp_path)
    run = load(folder)
    assert run.checks()["is_ok"].all(), run.checks().to_string()
    reports = {path.stem: nsys.read(path) for path in folder.glob("*.sqlite")}
    assert set(reports) == {"prefill0", "decode0"} and {report.anchor for report in reports.values()} == {"clock mark"}
    assert all(len(report.kernels) for report in reports.values())
    steps = run.device[(run.device["kind"] == "gpu step") & (run.device["process"] == "prefill.tp0")]
    logged = run.steps[run.steps["role"] == "prefill"]
    spans = zip(steps["start_s"], steps["end_s"], strict=True)
    inside = [((logged["start_s"] - 1e-3 < start) & (end < logged["end_s"] + 1e-3)).any() for start, end in spans]
    assert len(inside) > 0 and all(inside)
    layers = run.device[(run.device["kind"] == "gpu layer") & (run.device["process"] == "prefill.tp0")]
    assert set(layers["layer"]) == set(run.layers["layer"])
