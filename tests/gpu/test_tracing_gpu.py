"""The event log on a GPU: layers of a step lie inside it, on the host's clock."""

import pytest
import torch
from helpers_checkpoint import checkpoint

from ksana_lab.engine.llm import LLM
from ksana_lab.tracing.timeline import load
from ksana_lab.types import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_lie_inside_their_steps(tmp_path):
    with LLM(checkpoint("qwen3"), trace_dir=str(tmp_path)) as llm:
        llm.generate([list(range(3, 203))] * 4, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    run = load(tmp_path)
    layers = run.computes.groupby("step").agg(start=("start_s", "min"), end=("end_s", "max"))
    joined = layers.join(run.steps.set_index("step"))
    assert len(joined) >= 1
    assert (joined["start"] > joined["start_s"] - 1e-3).all() and (joined["end"] < joined["end_s"] + 1e-3).all()
