"""Rules of ``explain`` over recordings of a mixed node that the real recorder wrote, on a clock that the test turns."""

from types import SimpleNamespace

import pytest

from ksana_lab.tracing import recorder as recorder_module
from ksana_lab.tracing.explain import explain
from ksana_lab.tracing.recorder import Recorder
from ksana_lab.tracing.timeline import load

MS = 1_000_000


class Mixed:
    """A mixed node's engine. Times in ms."""

    def __init__(self, folder, monkeypatch, **options):
        self.ms = 1000.0
        clock = SimpleNamespace(monotonic_ns=lambda: round(self.ms * MS), time_ns=lambda: round(self.ms * MS))
        monkeypatch.setattr(recorder_module, "time", clock)
        self.folder, self.num_steps = folder, 0
        self.recorder = Recorder(folder, "mixed.tp0", **options)

    def request(self, name, queued, start, end, finished, **more):
        for what, at in (("QUEUED", queued), ("PREFILL_START", start), ("PREFILL_END", end), ("FIRST_TOKEN", end), ("FINISHED", finished)):
            self.mark(what, at, name, **more)

    def mark(self, what, at, name, **more):
        self.ms = 1000.0 + at
        self.recorder.instant(what, "request", request_id=name, seq_id=ord(name), **more)

    def step(self, start, end, *seqs, decodes=0):
        begin, over = round((1000 + start) * MS), round((1000 + end) * MS)
        args = {"step": self.num_steps, "num_tokens": sum(n for *_, n in seqs), "num_seqs": len(seqs), "num_decodes": decodes}
        self.recorder.span("step", "step", begin, over, **args, seqs=[[ord(name), first, n] for name, first, n in seqs])
        self.num_steps += 1

    def explain(self):
        self.recorder.close()
        return explain(load(self.folder, profilers=False))


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    return Mixed(tmp_path, monkeypatch)


def test_interleaving_is_time_between_a_prompts_own_chunks(mixed):
    mixed.request("a", 0, 0, 50, 60)
    mixed.request("b", 0, 10, 40, 60)
    for start, name, first in ((0, "a", 0), (10, "b", 0), (20, "b", 16), (30, "b", 32), (40, "a", 16)):
        mixed.step(start, start + 10, (name, first, 16))
    finding = mixed.explain().of("interleaving")
    assert finding.lost_s == pytest.approx(0.015)  # 30 ms of a, none of b
    assert finding.numbers["chunks"] == 2.5 and "15.0 ms pass between them" in finding.text


def test_chunks_that_follow_each_other_are_not_interleaved(mixed):
    mixed.request("a", 0, 0, 20, 60)
    mixed.request("b", 0, 20, 40, 60)
    for start, name, first in ((0, "a", 0), (10, "a", 16), (20, "b", 0), (30, "b", 16)):
        mixed.step(start, start + 10, (name, first, 16))
    assert mixed.explain().of("interleaving") is None


@pytest.mark.parametrize(("shared_ms", "is_said"), [(12, True), (5, False)])
def test_interference_is_decode_steps_that_carry_prefill(mixed, shared_ms, is_said):
    mixed.request("a", 0, 0, 10, 200)
    mixed.request("b", 20, 20, 20 + shared_ms, 200)
    mixed.step(0, 10, ("a", 0, 64))
    mixed.step(12, 16, ("a", 64, 1), decodes=1)
    mixed.step(20, 20 + shared_ms, ("a", 65, 1), ("b", 0, 64), decodes=1)
    mixed.step(50, 54, ("a", 66, 1), ("b", 64, 1), decodes=2)
    finding = mixed.explain().of("interference")
    assert (finding is not None) == is_said
    if is_said:
        assert "33% of decode steps carry prefill of others and take 12.0 ms instead of 4.0 ms" in finding.text
        assert finding.lost_s == pytest.approx(0.008 / 2)


def test_interference_is_lost_by_everybody_who_decodes_in_the_step(mixed):
    for name, start in (("a", 0), ("b", 10), ("c", 30)):
        mixed.request(name, start, start, start + 10, 200)
    mixed.step(20, 24, ("a", 64, 1), ("b", 64, 1), decodes=2)
    mixed.step(30, 42, ("a", 65, 1), ("b", 65, 1), ("c", 0, 64), decodes=2)
    assert mixed.explain().of("interference").lost_s == pytest.approx(2 * 0.008 / 3)


@pytest.mark.parametrize("count", [0, 2])
def test_preemptions_are_counted(mixed, count):
    mixed.request("a", 0, 0, 10, 100)
    for at in range(count):
        mixed.mark("PREEMPTED", 20 + at, "a", mode="swap")
    finding = mixed.explain().of("preemptions")
    assert (finding.numbers["count"] if finding else 0) == count
    assert finding is None or finding.text.endswith("to be computed again or swapped in.")


def test_failures_are_counted_with_the_first_reason(mixed):
    mixed.request("a", 0, 0, 10, 100)
    mixed.mark("QUEUED", 5, "b")
    mixed.mark("FAILED", 30, "b", error="TransferError", message="the link broke")
    explanation = mixed.explain()
    assert explanation.headline.startswith("1 requests")  # what failed has no latency
    assert "1 requests failed, the first with: TransferError" in explanation.of("failures").text


def test_a_run_in_which_all_failed_says_so(mixed):
    mixed.mark("QUEUED", 5, "b")
    mixed.mark("FAILED", 30, "b", error="TransferError")
    explanation = mixed.explain()
    assert "No request completed" in explanation.headline and explanation.of("failures").numbers["count"] == 1


def test_a_recording_that_dropped_events_says_how_many(tmp_path, monkeypatch):
    mixed = Mixed(tmp_path, monkeypatch, max_bytes=1000)  # the header and some of the marks
    mixed.request("a", 0, 0, 10, 100)
    mixed.request("b", 0, 0, 10, 100)
    finding = mixed.explain().of("recording")
    assert "nothing dropped: " in finding.text and "had no room for" in finding.text


def test_a_whole_recording_without_trouble_says_nothing_of_the_kind(mixed):
    mixed.request("a", 0, 0, 10, 100)
    mixed.step(0, 10, ("a", 0, 64))
    rules = {finding.rule for finding in mixed.explain().findings}
    assert not rules & {"recording", "failures", "preemptions", "interference", "interleaving", "bottleneck"}
