"""The real Nsight Systems around real nodes, on a CPU; and the same run from the event logs alone."""

import shutil

import numpy as np
import pytest
from helpers_checkpoint import checkpoint
from helpers_trace import record_minus_timeline

from ksana_lab.cluster import checks
from ksana_lab.cluster.local import Cluster
from ksana_lab.notebook.session import config
from ksana_lab.tracing import nsight, nsys
from ksana_lab.tracing.explain import explain
from ksana_lab.tracing.phases import add_phases
from ksana_lab.tracing.timeline import load
from ksana_lab.workload.spec import WorkloadSpec

SPEC = {"rate": 6, "num_requests": 5, "prompt_tokens": 120, "output_tokens": 5, "endpoint": "generate", "num_warmup": 1}
CHANGES = ("setting.batch_scheduler.split_fuse_token_num=48",)


def play(folder, changes=CHANGES, **options):
    with Cluster.from_yaml(
        config("pd_1p1d_cpu.yaml"), model_dir=checkpoint("qwen3"), trace_dir=folder, overrides=changes, **options
    ) as cluster:
        return cluster.play(WorkloadSpec.from_dict(SPEC))


@pytest.mark.integration
def test_a_recorded_run_is_whole_and_adds_up(tmp_path):
    records = play(tmp_path)
    run = load(tmp_path, client=records)
    checks = run.checks()
    assert checks["is_ok"].all(), checks.to_string()
    assert len(run.measured) == 5 and run.measured["ttft_s"].notna().all()
    assert len(explain(run).findings) >= 1
    assert set(run.computes["layer"]) == set(range(run.layers["layer"].max() + 1))
    prefills = run.chunks[(run.chunks["kind"] == "prefill") & run.chunks["request_id"].isin(run.measured["request_id"])]
    assert (prefills.groupby("request_id")["num_tokens"].sum() == 120).all()


@pytest.mark.integration
def test_one_name_is_one_number_in_a_runs_records_and_in_its_timeline(tmp_path):
    """The decode node has two ranks, and both get their share."""
    records = play(tmp_path, changes=(*CHANGES, "nodes.decode.tensor_parallel_size=2"))
    assert add_phases(records, tmp_path) == len(records) == 5
    run = load(tmp_path, client=records)
    assert run.checks()["is_ok"].all(), run.checks().to_string()
    assert run.transfers.groupby("dst_rank")["bytes"].sum().tolist() == [run.requests["kv_bytes"].sum() / 2] * 2
    difference = record_minus_timeline(records, run)
    assert {"queueing_s", "prefill_s", "exposed_transfer_s", "transfer_s"} <= set(difference)
    assert (difference.abs() < 1e-6).all(axis=None), difference.to_string()


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("nsys") is None, reason="no nsys on the PATH; .ci/run installs it where apt can")
def test_nodes_under_nsys_leave_reports_that_agree_with_their_logs(tmp_path):
    records = play(tmp_path, nsys=True)
    assert {p.stem for p in tmp_path.glob("*.sqlite")} == {"prefill0", "decode0"}
    reports = {path.stem: nsys.read(path) for path in tmp_path.glob("*.sqlite")}
    assert not {name: lack for name in reports if (lack := nsight.lacking(tmp_path / f"{name}.sqlite"))}
    for name, report in reports.items():  # what was recorded has a clock beside it: each step its own
        own = report.nvtx[report.nvtx["tid"].isin(report.nvtx.loc[report.nvtx["name"] == "step", "tid"])]
        counts = own["name"].value_counts()
        assert report.anchor == "clock mark" and counts["clock"] >= counts["step"] > 0, (name, counts.to_dict())
    run = load(tmp_path, client=records)
    assert run.checks()["is_ok"].all(), run.checks().to_string()
    ranges = run.device[(run.device["kind"] == "nvtx range") & (run.device["name"] == "step") & (run.device["process"] == "prefill.tp0")]
    starts = np.sort(ranges["start_s"].to_numpy())
    logged = np.sort(run.steps[run.steps["role"] == "prefill"]["start_s"].to_numpy())
    # Between the two stamps the process may be put aside for a while, on a busy machine: not in most of the steps.
    assert len(starts) == len(logged) > 0 and np.median(np.abs(starts - logged)) < 1e-3
    sends = run.device[(run.device["kind"] == "nvtx span") & (run.device["name"] == "send")]
    assert len(sends) == len(run.transfers) and sends["bytes"].sum() == run.transfers["bytes"].sum()
    assert {"engine queue", "prefill", "waiting for KV", "decode"} <= set(run.device["name"])


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("nsys") is None, reason="no nsys on the PATH; .ci/run installs it where apt can")
def test_the_doctor_tries_a_recording():
    finding = checks.nsys(trial=True)
    assert finding.level == "ok" and "a trial recording is whole" in finding.text
