"""A window of torch.profiler, as /start_profile and /stop_profile open and close it, lies over the steps that it saw."""

from helpers_checkpoint import checkpoint

from ksana_lab.engine.llm import LLM
from ksana_lab.tracing.timeline import load
from ksana_lab.types import SamplingParams


def test_ops_lie_inside_the_steps(tmp_path):
    with LLM(checkpoint("qwen3"), trace_dir=str(tmp_path)) as llm:
        llm.engine.profile(True)
        llm.generate([[5] * 40], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        llm.engine.profile(False)
    run = load(tmp_path)
    ops = run.device[run.device["kind"] == "cpu op"]
    middle = (ops["start_s"] + ops["end_s"]) / 2
    inside = [((run.steps["start_s"] - 1e-3 <= at) & (at <= run.steps["end_s"] + 1e-3)).any() for at in middle]
    assert len(ops) > 20 and sum(inside) > 0.9 * len(ops)
