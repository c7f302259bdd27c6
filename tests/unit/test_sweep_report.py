"""Results read back: tables, other versions, another SLO, goodput; and the cut of the event logs."""

import json

import pandas as pd
import pytest
from helpers_sweep import fake_sweep

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.summary import SLO
from ksana_lab.notebook import plots
from ksana_lab.sweep.events import EventTap
from ksana_lab.sweep.report import goodput, load_requests, load_results, markdown


@pytest.fixture
def done(tmp_path):
    fake_sweep(tmp_path, axes={"rate": [2, 4, 8]}, repeats=2).run_sync()
    return tmp_path / "out"


def test_another_slo_is_applied_to_the_records(done):
    assert load_results(done).groupby("rate")["slo_attainment"].mean().tolist() == [1, 1, 0]
    assert load_results(done, slo=SLO(ttft_s=0.3)).groupby("rate")["slo_attainment"].mean().tolist() == [1, 0, 0]


def test_requests_carry_the_columns_of_their_run(done):
    requests = load_requests(done)
    assert len(requests) == 12 * 5
    assert {"system", "split", "rate", "seed", "transfer_mode", "ttft_s", "run_id"} <= set(requests.columns)


def test_goodput_is_per_gpu_and_per_repeat(done):
    table = goodput(load_results(done), ["rate"])
    assert table["num_gpus"].tolist() == [2] * 4 and sorted(table["repeat"]) == [0, 0, 1, 1]
    assert table["goodput_rps_per_gpu"].tolist() == pytest.approx([(4 + 4 * 0.1) / 2] * 4)  # crosses 90% between 4 and 8


def test_tables_fit_the_plots(done):
    runs, requests = load_results(done), load_requests(done)
    for figure in (
        plots.latency_vs_rate(runs, slo_s=0.5),
        plots.attainment_vs_rate(runs),
        plots.heat_map(runs),
        plots.pareto(runs),
        plots.goodput_by_split(goodput(runs)),
        plots.attainment_vs_slo_scale(requests, SLO(ttft_s=0.5), [0.5, 1, 2]),
    ):
        assert figure.axes[0].has_data()


def test_the_markdown_joins_repeats_and_marks_what_is_not_trusted(done):
    runs = load_results(done)
    lines = markdown(runs, ["rate"]).splitlines()
    assert len(lines) == 2 + 6 and lines[2].startswith("| disaggregated | 1P1D | 2 | 2 | 10 | 0 | 200.0 |")
    assert "did not keep up" in markdown(runs.assign(is_trustworthy=False))
    assert markdown(pd.DataFrame()) == "no finished runs\n"


def test_one_failed_request_in_three_repeats_is_not_rounded_away(tmp_path):
    runs = fake_sweep(tmp_path, repeats=3, baseline=False).run_sync()
    lines = markdown(runs.assign(num_completed=[5, 4, 5], num_failed=[0, 1, 0])).splitlines()
    assert "| runs | ok | failed | TTFT" in lines[0] and "| 3 | 14 | 1 |" in lines[2]
    lines = markdown(runs.assign(num_completed=[4, 4, 5], num_cancelled=[1, 1, 0])).splitlines()
    assert "| ok | failed | cancelled |" in lines[0] and "| 13 | 0 | 2 |" in lines[2]


def test_a_folder_that_names_its_runs_by_id_alone_is_still_read(done):
    path = done / "sweep.json"
    manifest, before = json.loads(path.read_text()), load_results(done)
    runs = manifest.pop("runs")
    path.write_text(json.dumps({**manifest, "run_ids": list(runs)}))
    pd.testing.assert_frame_equal(load_results(done), before)


def test_results_of_another_version_are_refused_in_one_line(done):
    path = done / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ksana_lab_sweep": 0}))
    with pytest.raises(ConfigError, match="holds results of version 0; this ksana_lab reads version 1") as caught:
        load_results(done)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"ksana_lab_sweep": 1, "what": 2}'])
def test_a_folder_without_results_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="holds no results of a sweep"):
        load_results(tmp_path)
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read as the results of a sweep"):
        load_results(tmp_path)


def test_goodput_without_an_slo_says_what_to_do(tmp_path):
    fake_sweep(tmp_path, slo=None).run_sync()
    with pytest.raises(ConfigError, match="goodput needs an SLO"):
        goodput(load_results(tmp_path / "out"))


def event(name, request_id):
    return json.dumps({"ts": 1, "name": name, "args": {"request_id": request_id}}) + "\n"


def test_a_run_gets_its_part_of_a_log_with_the_header_and_whole_lines(tmp_path):
    log, header = tmp_path / "router-1.jsonl", json.dumps({"ph": "M", "args": {"role": "router"}}) + "\n"
    log.write_text(header + event("FINISHED", "before"))
    tap = EventTap(tmp_path)
    tap.mark()
    with log.open("a") as file:
        file.write(event("ARRIVED", "a") + event("FINISHED", "a") + '{"half')
    assert tap.copy_to(tmp_path / "run", ["a"])
    assert (tmp_path / "run" / log.name).read_text() == header + event("ARRIVED", "a") + event("FINISHED", "a")


def test_a_log_that_never_shows_the_end_is_said_to_be_incomplete(tmp_path):
    tap = EventTap(tmp_path)
    tap.mark()
    (tmp_path / "late.jsonl").write_text(event("ARRIVED", "a"))
    assert not tap.copy_to(tmp_path / "run", ["a"], timeout_s=0.2)
    assert (tmp_path / "run" / "late.jsonl").exists()
