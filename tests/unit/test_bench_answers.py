"""Client-side figures are of whole answers, and say when the client was the bottleneck."""

from types import SimpleNamespace

import pytest

from ksana_lab.bench import __main__ as bench
from ksana_lab.bench import engine, transfer
from ksana_lab.bench._answers import all_answered, note_of
from ksana_lab.bench._results import Row, read_rows, write_results
from ksana_lab.bench.engine import TRIAL, Ceilings, Floors
from ksana_lab.errors import KsanaLabError
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.models.synth import SHAPES


def answer(ttft_s: float = 0.5, gaps_s: tuple[float, ...] = (0.1, 0.1, 0.1), **more) -> RequestRecord:
    times = [10.0 + ttft_s]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    return RequestRecord("r", 8, len(times), sent_s=10.0, token_times_s=times, token_counts=[1] * len(times), **more)


@pytest.fixture
def served(monkeypatch):
    """Clusters that do not exist, and whatever answers a test puts in: a list, or a function of the URL asked."""
    answers = SimpleNamespace(of=lambda url: [answer()])

    class FakeCluster:
        def __init__(self, file, **_):
            self.url = next(name for name in ("mixed", "pd") if f"{name}.yaml" in str(file))

        from_yaml = classmethod(lambda cls, file, **options: cls(file, **options))
        status = lambda self: {"processes": [{"role": "mixed", "url": self.url}]}  # noqa: E731
        start = close = lambda self: None
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr("ksana_lab.cluster.local.Cluster", FakeCluster)
    monkeypatch.setattr("ksana_lab.workload.loadgen.play", lambda url, spec, **_: answers.of(url))
    monkeypatch.setattr("ksana_lab.tracing.phases.add_phases", lambda records, folder: None)
    return answers


def end_to_end() -> dict[str, Row]:
    return {row.name: row for row in transfer.measure_end_to_end("model", [64], "cpu", rounds=1, rate_requests=1)}


def engine_served() -> dict[str, Row]:
    floors = Floors(SHAPES["qwen3-tiny"], Ceilings(1e9, 1e9))
    return {row.name: row for row in engine.measure_served("tiny", "model", floors, TRIAL)}


@pytest.mark.parametrize("measure", [end_to_end, engine_served])
def test_a_failed_request_is_not_left_out_of_a_figure(measure, served):
    served.of = lambda url: [answer(), answer(error="the peer went away"), answer()]
    with pytest.raises(KsanaLabError, match="1 of 3 requests failed: the peer went away"):
        measure()


@pytest.mark.parametrize("measure", [end_to_end, engine_served])
def test_a_figure_of_a_client_that_lagged_says_so(measure, served):
    assert not any(row.note for row in measure().values())
    served.of = lambda url: [answer(labels={"client_lagged": 1})]
    rows = measure()
    assert rows and all("client lagged" in row.note for row in rows.values())


def test_a_pair_is_held_against_the_mixed_node(served):
    of = {"mixed": [answer(0.4, (0.1, 0.1, 0.1))], "pd": [answer(0.5, (0.3, 0.1, 0.1))]}
    served.of = of.get
    figures = {name: round(row.ours, 6) for name, row in end_to_end().items()}
    assert figures == {
        "ttft_ms.mixed.64": 400, "ttft_ratio.64": 1.25, "ttft_added_ms.64": 100, "first_gap_added_ms.64": 200,
        "pd_8rps.ttft_p50_ms": 500, "pd_8rps.tpot_p50_ms": 166.666667, "pd_8rps.tpot_p99_ms": 166.666667,
    }  # fmt: skip


def test_percentiles_over_http_are_of_the_client(served):
    served.of = lambda url: [answer(ttft / 10, (ttft / 10,)) for ttft in range(1, 102)]  # 0.1 … 10.1 s
    figures = {name: round(row.ours) for name, row in engine_served().items()}
    assert figures["tiny.served_ttft_ms.64"] == figures["tiny.served4rps.ttft_p50_ms"] == 5100
    assert figures["tiny.served4rps.ttft_p99_ms"] == figures["tiny.served4rps.tpot_p99_ms"] == 10_000


def test_a_run_without_a_token_is_no_figure():
    for records in ([], [RequestRecord("r", 8, sent_s=1.0)]):
        with pytest.raises(KsanaLabError):
            all_answered(records)
    assert note_of([answer(), answer(labels={"client_lagged": 1})]).startswith("client lagged in 1 of 2 requests")


def test_a_note_is_written_beside_its_figure(tmp_path):
    write_results(tmp_path / "x.json", [Row("a", "ms", None, 1.0, "client lagged"), Row("b", "ms", None, 1.0)], "cpu")
    assert [row.get("note") for row in read_rows(tmp_path / "x.json")] == ["client lagged", None]


def test_a_tool_without_figures_ends_with_an_error(monkeypatch, capsys):
    def main(argv):
        raise KsanaLabError("1 of 3 requests failed")

    monkeypatch.setattr(engine, "main", main)
    assert bench.main(["engine"]) == 1 and capsys.readouterr().err == "error: 1 of 3 requests failed\n"
