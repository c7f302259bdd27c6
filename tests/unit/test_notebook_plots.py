"""A frame in, a figure out, closed towards pyplot and saved with its numbers."""

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ksana_lab.notebook import plots


def frame(system="a", **columns) -> pd.DataFrame:
    rows = [
        {"sent_s": 10.0 + i, "ttft_s": 0.2, "tpot_s": 0.05 + 0.01 * i, "e2e_s": 0.6, "error": None, "is_ok": True, "system": system}
        for i in range(4)
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_a_cdf_of_failures_does_not_reach_one():
    failed = frame().assign(ttft_s=[0.1, 0.2, None, None], is_ok=[True, True, False, False], error=[None, None, "x", "x"])
    line = plots.latency_cdfs(failed).axes[0].lines[0]
    assert max(line.get_ydata()) == 0.5


def test_a_gantt_bar_spans_sending_to_last_token():
    axes = plots.gantt(frame()).axes[0]
    bars = sorted(axes.patches, key=lambda bar: (bar.get_y(), bar.get_x()))
    assert (bars[0].get_x(), bars[0].get_width()) == (0.0, pytest.approx(0.2))
    assert bars[1].get_x() + bars[1].get_width() == pytest.approx(0.6)


def test_known_phases_divide_the_time_to_first_token():
    known = frame(queueing_s=0.05, prefill_s=0.1, exposed_transfer_s=0.0)
    widths = [seconds for _, seconds in plots._segments(known.iloc[0])]
    assert sum(widths) == pytest.approx(0.6)
    assert [name for name, _ in plots._segments(known.iloc[0])][-2:] == ["to first token", "decode"]


def test_a_comparison_names_both_systems_and_leaves_no_open_figure():
    figure = plots.comparison(pd.concat([frame("mixed"), frame("pair")]))
    titles = " ".join(axes.get_title() for axes in figure.axes)
    assert "mixed" in titles and "pair" in titles
    assert plt.get_fignums() == []


def test_save_writes_picture_print_and_numbers(tmp_path):
    written = plots.save(plots.gantt(frame()), tmp_path / "deep" / "gantt", frame())
    assert [path.suffix for path in written] == [".png", ".pdf", ".csv"]
    assert all(path.stat().st_size > 100 for path in written)
