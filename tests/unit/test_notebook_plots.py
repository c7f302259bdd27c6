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


def test_a_failure_with_a_first_token_is_no_latency_and_a_cancelled_request_is_not_there():
    rows = frame(is_ok=[True, True, False, False], error=[None, None, "ended early", "cancelled"], is_cancelled=[False] * 3 + [True])
    line = plots.latency_cdfs(rows.assign(ttft_s=[0.1, 0.2, 0.3, 0.4]), metrics=("ttft_s",)).axes[0].lines[0]
    assert list(line.get_xdata()) == pytest.approx([100.0, 200.0])
    assert max(line.get_ydata()) == pytest.approx(2 / 3)


def test_a_request_that_cannot_have_the_metric_does_not_keep_the_curve_down():
    line = plots.latency_cdfs(frame(tpot_s=[0.01, 0.02, None, None]), metrics=("tpot_s",)).axes[0].lines[0]
    assert max(line.get_ydata()) == 1.0


def test_only_completed_requests_are_drawn_against_their_prompts():
    rows = frame(num_prompt_tokens=128, is_ok=[True, False, True, False])
    points, median = plots.against_prompt(rows.assign(ttft_s=[0.1, 9.0, 0.3, 9.0]), "ttft_s").axes[0].lines
    assert list(points.get_ydata()) == pytest.approx([100.0, 300.0])
    assert list(median.get_ydata()) == pytest.approx([200.0])


def test_a_gantt_bar_spans_sending_to_last_token():
    axes = plots.gantt(frame()).axes[0]
    bars = sorted(axes.patches, key=lambda bar: (bar.get_y(), bar.get_x()))
    assert (bars[0].get_x(), bars[0].get_width()) == (0.0, pytest.approx(0.2))
    assert bars[1].get_x() + bars[1].get_width() == pytest.approx(0.6)


def phases(**columns) -> list:
    """Of a request with TTFT 0.2 s and e2e 0.6 s: its prompt is computed from 0.08 to 0.18 s."""
    row = frame(router_path_s=0.03, queueing_s=0.05, prefill_s=0.1, exposed_transfer_s=0.0).assign(**columns).iloc[0]
    segments = plots._segments(row)
    assert sum(seconds for _, seconds in segments) == pytest.approx(0.6)
    return [(name, pytest.approx(seconds)) for name, seconds in segments]


def test_known_phases_lie_in_the_order_in_which_they_happened():
    assert phases() == [("to the node", 0.03), ("queue", 0.05), ("prefill", 0.1), ("to first token", 0.02), ("decode", 0.4)]


def test_exposed_transfer_is_cut_out_of_what_went_on_meanwhile():
    first_token_did_not_wait = [("prefill", 0.1), ("exposed transfer", 0.02), ("exposed transfer", 0.13), ("decode", 0.27)]
    assert phases(exposed_transfer_s=0.15)[2:] == first_token_did_not_wait
    first_token_waited = [("prefill", 0.1), ("exposed transfer", 0.015), ("to first token", 0.005), ("decode", 0.4)]
    assert phases(exposed_transfer_s=0.015)[2:] == first_token_waited


@pytest.mark.parametrize("unusable", [{"router_path_s": -900.0}, {"router_path_s": 900.0}, {"prefill_s": None}])
def test_phases_on_another_clock_leave_the_time_to_first_token_whole(unusable):
    assert phases(**unusable) == [("waiting for the first token", 0.2), ("decode", 0.4)]


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


def test_a_single_run_has_the_interval_of_its_requests():
    axes = plots.attainment_vs_rate(runs(num_completed=20, num_failed=0).drop_duplicates("rate")).axes[0]
    low, high = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(0.699, abs=1e-3), pytest.approx(0.972, abs=1e-3))


def modes(**columns) -> pd.DataFrame:
    """One run per rate of each of three transfer modes, beside mixed nodes."""
    pair = [
        runs("disaggregated", split="1P1D", transfer_mode=mode, ttft_s_p90=ttft) for mode, ttft in (("bulk", 3), ("chunk", 2), ("layer", 1))
    ]
    frame = pd.concat([*pair, runs("aggregated", split="4 mixed", transfer_mode="none", ttft_s_p90=4)])
    return frame.drop_duplicates(["transfer_mode", "rate"]).assign(repeat=0, **columns)


MODES = ["1P1D · bulk", "1P1D · chunk", "1P1D · layer", "4 mixed"]


def test_what_differs_in_another_axis_is_a_curve_of_its_own():
    axes = plots.latency_vs_rate(modes(), by="split").axes[0]
    assert not axes.containers  # nothing was taken for a repeat
    assert {line.get_label(): line.get_ydata()[0] for line in axes.lines} == dict(zip(MODES, (3e3, 2e3, 1e3, 4e3), strict=True))


def test_what_differs_in_another_axis_is_a_row_of_its_own():
    axes = plots.heat_map(modes(), value="ttft_s_p90").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == MODES


def test_requests_of_different_modes_do_not_share_a_curve():
    requests = pd.concat([frame("1P1D", run_id=mode, request_id="r", transfer_mode=mode) for mode in ("bulk", "layer")])
    assert [line.get_label() for line in plots.latency_cdfs(requests).axes[0].lines] == ["1P1D · bulk", "1P1D · layer"]


def test_links_are_different_points_of_the_pareto_front():
    links = pd.concat([runs(link=gbps, output_throughput_tps=10.0 * gbps).assign(repeat=[0, 1, 2] * 3) for gbps in (1, 10)])
    points = [line for line in plots.pareto(links).axes[0].lines if line.get_label().startswith("a · ")]
    assert [(line.get_label(), list(line.get_ydata())) for line in points] == [("a · link=1", [5.0] * 3), ("a · link=10", [50.0] * 3)]


def goodputs(values, **columns) -> pd.DataFrame:
    rows = [{"split": name, "goodput_rps_per_gpu": value} for name, value in values.items()]
    return pd.DataFrame(rows).assign(num_gpus=2, min_rate=4, max_rate=48, repeat=0, **columns)


def test_a_bar_of_a_lower_bound_says_so_and_one_of_a_lagging_client_has_a_star():
    axes = plots.goodput_by_split(goodputs({"1P1D": 24.0, "2 mixed": 18.5, "1P2D": 0.0}, is_trustworthy=[False, True, True])).axes[0]
    assert [text.get_text() for text in axes.texts] == ["≥ 24 *", "18.5", "< 2"]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [True, False, False]
    assert "did not keep up" in axes.get_xlabel() and "highest rate" in axes.get_xlabel()


def test_modes_have_bars_of_their_own():
    axes = plots.goodput_by_split(
        goodputs({"1P1D": 3.0, "4 mixed": 4.0}).merge(pd.DataFrame({"split": ["1P1D"] * 2, "mode": ["a", "b"]}), how="left")
    ).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1P1D\na", "1P1D\nb", "4 mixed"]


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
