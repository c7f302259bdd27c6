"""Folders of sweeps become a page: tables, figures, and a sentence on who wins."""

import pandas as pd
import pytest
from helpers_sweep import fake_sweep

from ksana_lab.notebook.study import main, verdict, write_study


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


@pytest.fixture
def folder(tmp_path):
    """TTFT is a tenth of the rate: 2 requests/s meet the SLO of half a second, 8 do not."""
    sweep = fake_sweep(tmp_path, axes={"rate": [2, 8]})
    sweep.run_sync(progress=False)
    return sweep.folder


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
