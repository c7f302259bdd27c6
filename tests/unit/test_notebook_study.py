"""Folders of sweeps become a page: tables, figures, and a sentence on who wins."""

import pandas as pd
import pytest
from helpers_sweep import fake_sweep

from ksana_lab.notebook.study import attainment_table, main, verdict, write_study


def goodput(pair, mixed, *, max_rate=100.0, num_gpus=2):
    rows = [("disaggregated", "1P1D", pair), ("aggregated", "2 mixed", mixed)]
    frame = pd.DataFrame(rows, columns=["system", "split", "goodput_rps_per_gpu"])
    return frame.assign(num_gpus=num_gpus, max_rate=max_rate, repeat=0)


@pytest.mark.parametrize(
    ("pair", "mixed", "said"),
    [
        (10.0, 8.0, "1P1D 10, 2 mixed 8: disaggregation wins by 25%"),
        (6.0, 8.0, "disaggregation loses by 25%"),
        (8.1, 8.0, "as much as each other"),
        (6.0, 50.0, "2 mixed at least 50: disaggregation loses by at least 88%"),
        (50.0, 50.0, "says nothing about which is better"),
        (0.0, 8.0, "only the mixed nodes do"),
        (0.0, 0.0, "neither does"),
    ],
)
def test_the_verdict_is_that_of_the_numbers(pair, mixed, said):
    assert said in verdict(goodput(pair, mixed))


def test_the_best_split_speaks_for_disaggregation():
    extra = pd.DataFrame([("disaggregated", "3P1D", 12.0, 2, 100.0, 0)], columns=list(goodput(1, 1).columns))
    assert "3P1D 12, 2 mixed 8: disaggregation wins by 50%" in verdict(pd.concat([goodput(10.0, 8.0), extra]))


def test_the_best_mode_speaks_for_disaggregation_by_name():
    modes = pd.concat([goodput(value, 4.0).head(1).assign(mode=mode) for mode, value in (("bulk", 1.0), ("layer", 6.0), ("chunk", 2.0))])
    said = verdict(pd.concat([modes, goodput(1.0, 4.0).tail(1)]))
    assert "1P1D · layer 6, 2 mixed 4: disaggregation wins by 50%" in said


def test_intervals_that_overlap_leave_it_open():
    table = goodput(6.0, 8.0).assign(goodput_rps_per_gpu_low=[5.0, 5.9], goodput_rps_per_gpu_high=[6.1, 9.0])
    assert "1P1D 6 (95%: 5 to 6.1), 2 mixed 8 (95%: 5.9 to 9): no clear difference" in verdict(table)
    assert "loses by 25%" in verdict(table.assign(goodput_rps_per_gpu_low=[5.0, 7.0]))


def test_attainment_has_the_interval_of_its_repeats_or_of_its_requests():
    rows = pd.DataFrame({"split": "1P1D", "rate": [2, 2, 4], "repeat": [0, 1, 0], "slo_attainment": [0.9, 0.8, 0.9]})
    lines = attainment_table(rows.assign(num_completed=18, num_failed=2)).splitlines()
    assert lines[0] == "| rate | 1P1D |"
    assert lines[2:] == ["| 2 | 0.850 (0.215 to 1.000) |", "| 4 | 0.900 (0.699 to 0.972) |"]
    assert attainment_table(rows.assign(rate=[2, 4, None])).splitlines()[2:] == ["| 2 | 0.900 |", "| 4 | 0.800 |", "| - | 0.900 |"]


@pytest.fixture
def folder(tmp_path):
    """TTFT is a tenth of the rate: 2 requests/s meet the SLO of half a second, 8 do not."""
    sweep = fake_sweep(tmp_path, axes={"rate": [2, 8]})
    sweep.run_sync(progress=False)
    return sweep.folder


def test_other_bounds_have_a_table_and_wrong_ones_a_line(tmp_path, folder, capsys):
    page = tmp_path / "results.md"
    assert main([str(folder), "--out", str(page), "--also", "ttft_s=1.5", "--also", "ttft_s=0.1,e2e_s=9"]) == 0
    assert "| bounds | 1P1D | 2 mixed |" in page.read_text() and "| ttft_s ≤ 1.5 s | at least 4 (95%:" in page.read_text()
    assert "| ttft_s ≤ 0.1 s, e2e_s ≤ 9 s | 0 (95%: 0 to" in page.read_text()
    capsys.readouterr()
    assert main([str(folder), "--out", str(page), "--slo", "ttft_s=half"]) == 2
    assert capsys.readouterr().err.startswith("error: bounds are NAME=SECONDS")


def test_a_section_is_replaced_and_what_stands_around_it_stays(tmp_path, folder, capsys):
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("# Results\n\nBefore.\n")
    (said,) = write_study([folder], page)
    assert said.startswith("sweep, all requests: Requests/s per GPU") and "ttft_s ≤ 0.5 s" in page.read_text()
    page.write_text(page.read_text() + "\nAfter.\n")
    assert main([str(folder), "--out", str(page), "--slo", "ttft_s=1.5"]) == 0  # other bounds judge the same records
    assert "at least 4" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("## sweep\n") == 1 and text.startswith("# Results\n\nBefore.\n") and text.endswith("After.\n")
    assert "ttft_s ≤ 1.5 s" in text and "ttft_s ≤ 0.5 s" not in text
    figures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(figures) == 6 and all((page.parent / figure).stat().st_size > 1000 for figure in figures)
    assert str(tmp_path) not in text + "".join(path.read_text() for path in page.parent.rglob("*.csv"))


def test_a_folder_without_a_sweep_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "r.md")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "r.md").exists()


def test_workloads_have_verdicts_of_their_own_and_settings_do_not(tmp_path):
    axes = {"prompt_tokens": [8, 16], "transfer_mode": ["bulk", "layer"], "rate": [2, 8]}
    sweep = fake_sweep(tmp_path, axes=axes)
    sweep.run_sync(progress=False)
    said = write_study([sweep.folder], tmp_path / "page.md")
    assert [text.split(": ")[0] for text in said] == ["sweep, prompt_tokens=8", "sweep, prompt_tokens=16"]
    assert "| rate | 1P1D · bulk | 1P1D · layer | 2 mixed |" in (tmp_path / "page.md").read_text()
