"""A frame in, a figure out, closed towards pyplot and saved with its numbers."""

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ksana_lab.metrics.summary import SLO
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


def runs(system="a", **columns) -> pd.DataFrame:
    rows = [
        {"system": system, "rate": rate, "ttft_s_p90": 0.1 * rate + 0.01 * repeat, "slo_attainment": 1.0 - 0.1 * rate}
        | {"tpot_s_p50": 0.01 * rate, "output_throughput_tps": 100.0 * rate, "num_gpus": 2}
        for rate in (1, 2, 4)
        for repeat in range(3)
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_repeats_are_averaged_and_carry_an_interval():
    axes = plots.latency_vs_rate(runs(), slo_s=0.3).axes[0]
    bars = axes.containers[0]
    assert list(bars.lines[0].get_ydata()) == pytest.approx([110.0, 210.0, 410.0])
    assert bars.has_yerr
    assert axes.get_ylabel() == "time to first token, p90 (ms)"


def test_a_single_repeat_is_drawn_without_an_interval():
    axes = plots.attainment_vs_rate(runs().drop_duplicates("rate")).axes[0]
    assert not axes.containers
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.9, 0.8, 0.6])


def test_a_wider_slo_is_met_by_more_requests():
    axes = plots.attainment_vs_slo_scale(frame().assign(ttft_s=[0.1, 0.2, 0.3, 0.4]), SLO(ttft_s=0.2), [0.5, 1.0, 2.0]).axes[0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.25, 0.5, 1.0])


def test_the_frontier_leaves_out_what_another_run_beats():
    rows = pd.DataFrame({"per_user": [1.0, 2.0, 3.0, 1.5], "per_gpu": [9.0, 8.0, 1.0, 2.0]})
    assert plots._frontier(rows)["per_user"].tolist() == [1.0, 2.0, 3.0]


def test_a_heat_map_writes_the_mean_of_the_repeats_into_each_cell():
    texts = [text.get_text() for text in plots.heat_map(runs(split="1P1D")).axes[0].texts]
    assert texts == ["0.90", "0.80", "0.60"]


def test_goodput_bars_and_pareto_and_exposed_transfer_are_drawn():
    bars = plots.goodput_by_split(runs(split="1P1D", goodput_rps_per_gpu=2.5)).axes[0].patches
    assert bars[0].get_height() == pytest.approx(2.5)
    assert plots.pareto(runs()).axes[0].get_xlabel().startswith("tokens/s per user")
    requests = frame(exposed_transfer_s=0.002, num_prompt_tokens=128, transfer_mode="layer")
    assert plots.exposed_vs_prompt(requests).axes[0].lines[1].get_ydata() == pytest.approx([2.0])


def test_repeats_of_a_rate_are_one_point_of_the_pareto_front():
    repeats = pd.concat([runs(repeat=k, output_throughput_tps=100.0 + k) for k in range(3)])
    axes = plots.pareto(repeats).axes[0]
    assert len(axes.containers[0].lines[0].get_xdata()) == 3  # rates
    assert axes.containers[0].has_yerr


def test_attainment_over_slo_scale_has_intervals_over_repeats():
    requests = pd.concat([frame(repeat=k).assign(ttft_s=[0.1, 0.2, 0.3, 0.2 + 0.1 * k]) for k in range(3)])
    axes = plots.attainment_vs_slo_scale(requests, SLO(ttft_s=0.25), [0.5, 1.0, 2.0]).axes[0]
    assert list(axes.containers[0].lines[0].get_ydata()) == pytest.approx([0.25, (0.75 + 0.5 + 0.5) / 3, 1.0])


def test_a_heat_map_of_a_latency_is_in_milliseconds():
    axes = plots.heat_map(runs(split="1P1D"), value="ttft_s_p90").axes
    assert [text.get_text() for text in axes[0].texts] == ["110", "210", "410"]
    assert axes[1].get_ylabel() == "time to first token, p90 (ms)"


def test_many_different_lengths_are_drawn_as_medians_of_ranges():
    lengths = pd.Series(range(1, 161))
    middle = plots._medians(lengths, lengths * 2.0)
    assert len(middle) == 8
    assert middle.iloc[0] == pytest.approx(2 * middle.index[0])


def pieces(mode: str) -> pd.DataFrame:
    """Two layers of one prompt: the first travels before the end of prefill at 1 s, the second across it."""
    rows = [(0, 0.8, 0.9), (1, 0.95, 1.1)]
    columns = {"request_id": "r", "num_layers": 1, "bytes": 10.0, "compute_end_s": 1.0, "transfer_mode": mode}
    return pd.DataFrame([{"layer": layer, "wire_start_s": start, "end_s": end, **columns} for layer, start, end in rows])


def test_a_piece_on_the_wire_is_cut_where_prefill_ended():
    figure = plots.layers_on_the_wire(pd.concat([pieces("bulk"), pieces("layer")]))
    assert [axes.get_title() for axes in figure.axes] == ["bulk", "layer"]
    spans = [path.get_extents() for bars in figure.axes[0].collections for path in bars.get_paths()]
    assert [(box.x0, box.x1) for box in spans] == [pytest.approx(span) for span in ((-200, -100), (-50, 0), (0, 100))]


def test_an_answer_names_the_node_of_each_token_and_its_hand_over():
    tokens = pd.DataFrame({"token": [1, 2, 3], "at_s": [0.1, 0.13, 0.14], "node": ["prefill node", "decode node", "decode node"]})
    axes = plots.token_timeline(tokens).axes[0]
    assert any("30.0 ms" in text.get_text() for text in axes.texts)
    assert [len(line.get_xdata()) for line in axes.lines] == [1, 2]
    assert len(plots.token_timeline(tokens.iloc[:0]).axes[0].lines) == 0
