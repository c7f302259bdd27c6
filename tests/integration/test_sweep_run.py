"""A sweep over real processes: killed half-way, run again, nothing measured twice, everything kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from ksana_lab.metrics.export import load_records
from ksana_lab.metrics.latency import TTFT_PARTS
from ksana_lab.models.synth import synthesize
from ksana_lab.sweep.report import load_requests, load_results

CONFIGS = Path(__file__).parents[2] / "configs"
SWEEP = {
    "cluster": str(CONFIGS / "pd_1p1d_cpu.yaml"),
    "set": {"num_threads": 1},
    "workload": {"num_requests": 8, "prompt_tokens": 48, "output_tokens": 6, "num_warmup": 1},
    "slo": {"ttft_s": 5},
    "axes": {"rate": [8, 16]},
}
pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.fixture
def start(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SWEEP))
    model = synthesize(tmp_path / "model", "qwen3", "tiny", seed=0)
    command = [
        sys.executable,
        "-m",
        "ksana_lab.sweep",
        str(tmp_path / "tiny.yaml"),
        "--model-dir",
        str(model),
        "--out",
        str(tmp_path / "out"),
    ]
    started = []

    def start() -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def read_until(process: subprocess.Popen, text: str, times: int = 1) -> None:
    seen = []
    for line in process.stdout:
        seen.append(line)
        times -= text in line
        if not times:
            return
    raise AssertionError("".join(seen))


def test_a_killed_sweep_goes_on_where_it_was_and_keeps_everything(tmp_path, start):
    first = start()
    read_until(first, "measuring", times=2)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    (kept,) = (tmp_path / "out" / "runs").iterdir()
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}

    second = start()
    output = second.communicate(timeout=200)[0]
    assert second.returncode == 0, output
    states = [line.partition(":")[0] for line in output.splitlines() if ": disaggregated" in line or ": aggregated" in line]
    assert [state for state in states if state in ("kept", "done", "failed")] == ["kept", "done", "done", "done"], output
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before

    runs = load_results(tmp_path / "out")
    assert runs["split"].tolist() == ["1P1D", "1P1D", "2 mixed", "2 mixed"] and runs["rate"].tolist() == [8, 16, 8, 16]
    assert runs["num_completed"].tolist() == [8] * 4 and runs["slo_attainment"].tolist() == [1] * 4
    assert list((tmp_path / "out" / "partial").iterdir()) == []
    for folder in map(Path, runs["folder"]):
        check_folder(folder)
    check_decomposition(tmp_path / "out")


def check_decomposition(out: Path) -> None:
    """Router, queue, prefill and the first token's way add up to what the client saw, and none of them is less than nothing."""
    requests = load_requests(out)
    parts = requests[list(TTFT_PARTS)]
    allowed = (0.02 * requests["ttft_s"]).clip(lower=1e-3)
    assert len(requests) == 32 and parts.notna().all(axis=None)
    assert ((parts.sum(axis=1) - requests["ttft_s"]).abs() <= allowed).all()
    assert (parts.min(axis=1) >= -allowed).all(), parts
    assert (requests.loc[requests["system"] == "disaggregated", "exposed_transfer_s"] >= 0).all()
    table = pd.read_csv(out / "ttft.csv")
    assert table["num_requests"].tolist() == [8] * 4 and "| first token |" in (out / "results.md").read_text()


def check_folder(folder: Path) -> None:
    """Every request's end is in the router's log; each node's own file, with its ports, is kept."""
    (router,) = (folder / "events").glob("router-*.jsonl")
    events = [json.loads(line) for line in router.read_text().splitlines()]
    assert events[0]["args"]["role"] == "router"
    ended = {event["args"]["request_id"] for event in events if event["name"] == "FINISHED"}
    assert {record.request_id for record in load_records(folder / "records.jsonl")} <= ended
    assert len(list((folder / "nodes").iterdir())) == 2


def test_ctrl_c_closes_the_cluster_and_says_how_to_go_on(start):
    process = start()
    read_until(process, "measuring")
    family = psutil.Process(process.pid).children(recursive=True)
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in output
    assert [p for p in psutil.wait_procs(family, timeout=1)[1] if p.status() != psutil.STATUS_ZOMBIE] == []
    assert time.monotonic() - started_s < 30


def test_a_wrong_sweep_ends_with_code_2_and_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**SWEEP, "axes": {"ratte": [1]}}))
    command = [sys.executable, "-m", "ksana_lab.sweep", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "did you mean rate?" in done.stderr
    assert not (tmp_path / "out").exists()
