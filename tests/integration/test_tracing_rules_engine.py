"""Rules of ``explain`` over what a real engine recorded."""

import pytest
from helpers_checkpoint import checkpoint

from ksana_lab.engine.llm import LLM
from ksana_lab.errors import InvalidRequest
from ksana_lab.tracing.explain import explain
from ksana_lab.tracing.timeline import load
from ksana_lab.types import SamplingParams

pytestmark = pytest.mark.integration


def explained(folder, prompts, lengths, **options):
    with LLM(checkpoint("qwen3"), trace_dir=str(folder), num_threads=1, **options) as llm:
        llm.generate(prompts, [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in lengths])
    return explain(load(folder))


def prompt(length):
    return [3 + i % 900 for i in range(length)]


def test_prefill_between_decodes_is_interference(tmp_path):
    """The first decodes while chunks of the others are computed; after that both decode alone."""
    finding = explained(tmp_path, [prompt(8), prompt(1500)], [40, 30], max_num_batched_tokens=256).of("interference")
    assert finding is not None and finding.lost_s > 0


def test_one_request_alone_suffers_no_interference(tmp_path):
    assert explained(tmp_path, [prompt(200)], [8]).of("interference") is None


def test_sequences_without_blocks_are_preempted(tmp_path):
    lengths = [60] * 4
    finding = explained(tmp_path / "few", [prompt(20)] * 4, lengths, num_blocks=24, block_size=8, enable_prefix_caching=False).of(
        "preemptions"
    )
    assert finding is not None and finding.numbers["count"] >= 1
    assert explained(tmp_path / "many", [prompt(20)] * 4, lengths, num_blocks=200, block_size=8).of("preemptions") is None


def test_what_the_engine_gives_up_is_a_failure_in_its_own_words(tmp_path):
    with LLM(checkpoint("qwen3"), trace_dir=str(tmp_path)) as llm:
        llm.generate([prompt(8)], SamplingParams(max_tokens=2))
        with pytest.raises(InvalidRequest):
            llm.generate([prompt(8), []], SamplingParams(max_tokens=2))
    finding = explain(load(tmp_path)).of("failures")
    assert finding.numbers["count"] == 1 and "generate was interrupted" in finding.text
