"""The event log and Nsight Systems on GPUs: layers of a step lie inside it, on the host's clock; GPU rows lie where the log says.

``KSANA_LAB_FIXTURE=DIR`` keeps the pair's recording there, for tests/unit/test_tracing_gpu_recording.py (docs/tracing.md)."""

import os

import pytest

from ksana_lab.cluster import checks
from ksana_lab.cluster.local import Cluster
from ksana_lab.engine.llm import LLM
from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import save_records
from ksana_lab.models.synth import synthesize
from ksana_lab.notebook.session import config
from ksana_lab.tracing import nsight
from ksana_lab.tracing.shrink import shrink
from ksana_lab.tracing.timeline import CLIENT_FILE, load
from ksana_lab.types import SamplingParams
from ksana_lab.workload.spec import WorkloadSpec

SPEC = {"rate": 4, "num_requests": 2, "prompt_tokens": 150, "output_tokens": 4, "endpoint": "generate", "num_warmup": 1}
SMALL = [
    "router.port=auto", "nodes.prefill.ports=auto", "nodes.prefill.coordinator_ports=auto", "nodes.prefill.device_ids=auto",
    "nodes.decode.ports=auto", "nodes.decode.coordinator_ports=auto", "nodes.decode.device_ids=auto",
    "setting.batch_scheduler.split_fuse_token_num=96", "setting.batch_scheduler.max_token_len=2048", "nodes.prefill.max_batch_size=8",
    "nodes.decode.max_batch_size=8", "ksana_lab.num_blocks=400", "ksana_lab.transfer_mode=layer",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(synthesize(tmp_path_factory.mktemp("checkpoint") / "q", "qwen3", "0.6b", has_weights=False))


def has_nsys() -> bool:
    try:
        nsight.find_nsys()
    except ConfigError:
        return False
    return True


@pytest.mark.gpu
def test_layers_lie_inside_their_steps(tmp_path, model_dir):
    """The prompts are prefilled again and again between decode steps, which are graphs: the anchor must not take their end for now."""
    with LLM(model_dir, trace_dir=str(tmp_path), num_blocks=400) as llm:
        for _ in range(20):
            llm.generate([list(range(3, 203))] * 4, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    run = load(tmp_path)
    layers = run.computes.groupby("step").agg(start=("start_s", "min"), end=("end_s", "max"))
    joined = layers.join(run.steps.set_index("step"))
    assert len(joined) >= 20
    assert (joined["start"] > joined["start_s"] - 1e-3).all() and (joined["end"] < joined["end_s"] + 1e-3).all()


@pytest.mark.gpu
@pytest.mark.skipif(not has_nsys(), reason="no nsys, or no importer beside it (KSANA_LAB_NSYS names one)")
def test_a_trial_recording_holds_kernels():
    finding = checks.nsys(trial=True, has_gpu=True)
    assert finding.level == "ok", finding.text


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_nsys(), reason="no nsys, or no importer beside it (KSANA_LAB_NSYS names one)")
def test_a_pair_under_nsys_shows_its_kernels_where_its_log_says(tmp_path, model_dir):
    with Cluster.from_yaml(config("pd_1p1d_h200.yaml"), model_dir=model_dir, trace_dir=tmp_path, nsys=True, overrides=SMALL) as cluster:
        records = cluster.play(WorkloadSpec.from_dict(SPEC))
    save_records(records, tmp_path / CLIENT_FILE)
    if "KSANA_LAB_FIXTURE" in os.environ:  # first: a recording that fails below is what one wants to look at
        shrink(tmp_path, os.environ["KSANA_LAB_FIXTURE"])
    lacks = {path.name: nsight.lacking(path, has_gpu=True) for path in tmp_path.glob("*.sqlite")}
    assert lacks == {"prefill0.sqlite": None, "decode0.sqlite": None}
    run = load(tmp_path)
    assert run.checks()["is_ok"].all(), run.checks().to_string()
    steps = run.device[(run.device["kind"] == "gpu step") & (run.device["process"] == "prefill.tp0")]
    logged = run.steps[run.steps["role"] == "prefill"]
    inside = [
        ((logged["start_s"] - 1e-3 < s) & (e < logged["end_s"] + 1e-3)).any() for s, e in zip(steps["start_s"], steps["end_s"], strict=True)
    ]
    assert len(inside) > 0 and all(inside)
    layers = run.device[(run.device["kind"] == "gpu layer") & (run.device["process"] == "prefill.tp0")]
    assert set(layers["layer"]) == set(run.computes.loc[run.computes["role"] == "prefill", "layer"])
