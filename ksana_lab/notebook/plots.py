"""Figures: a DataFrame in, a matplotlib Figure out. Knows nothing of how the numbers came about.

Two kinds of frame: one row per request (``metrics.export.to_frame``) for CDFs and Gantts, one row per run (``summary_row``) for everything
against a rate, a split, a length. Rows that agree on all but the seed are repeats: their mean is drawn, with a 95% interval. Rows that
differ in an axis of the sweep are drawn apart, named by ``by`` and by what differs (``notebook.configurations``).

Readable in print and for the colour-blind: Okabe and Ito's colours, and never colour alone (line styles, markers, hatches, words).
A figure is closed towards pyplot when it is returned, so a notebook shows it once; ``save`` writes PNG, PDF and CSV."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from ksana_lab.metrics.summary import SLO, confidence_interval
from ksana_lab.notebook import uncertainty
from ksana_lab.notebook.configurations import groups

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))

# Of a Gantt's bars, in the order in which a request goes through them: colour, hatch.
PHASES = {
    "waiting for the first token": ("#BBBBBB", ""),
    "to the node": ("#8C8C8C", ""),
    "queue": ("#E6E6E6", ""),
    "prefill": ("#E69F00", ""),
    "to first token": ("#BBBBBB", "...."),
    "exposed transfer": ("#D55E00", "////"),
    "decode": ("#56B4E9", ""),
}
_WIRE = {"hidden": ("#0072B2", ""), "exposed": ("#D55E00", "////")}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # text stays text
}


def latency_cdfs(
    frame: pd.DataFrame, *, by: str = "system", metrics: Sequence[str] = ("ttft_s", "tpot_s"), sweep_axes: Sequence[str] | None = None
) -> Figure:
    """One panel per metric, one curve per value of ``by``: the share of requests that were at most so slow. Requests of several rates share
    a curve: choose one rate first to see it alone."""
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.0), layout="constrained", squeeze=False)
        for panel, metric in zip(axes[0], metrics, strict=True):
            draw_cdf(panel, frame, metric, by, sweep_axes)
        _legend_above(figure, axes[0][0])
    return _done(figure)


def gantt(frame: pd.DataFrame, *, max_requests: int = 40, title: str | None = None) -> Figure:
    """One bar per request, in order of sending, divided into the phases that the frame knows."""
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.13 * min(len(frame), max_requests)), layout="constrained")
        seen = draw_gantt(axes, frame, max_requests)
        figure.legend(handles=_phase_patches(seen), loc="outside upper center", ncols=len(seen))
        if title:
            axes.set_title(title)
    return _done(figure)


def comparison(frame: pd.DataFrame, *, by: str = "system", max_requests: int = 30) -> Figure:
    """Systems on the same requests: TTFT and TPOT as CDFs above; below, on one time axis, the requests that came closest together."""
    names = list(dict.fromkeys(frame[by]))
    sent = {name: frame[frame[by] == name].sort_values("sent_s", ignore_index=True) for name in names}
    first = _busiest(sent[names[0]]["sent_s"].to_numpy(), max_requests)
    with plt.rc_context(_RC):
        figure = plt.figure(figsize=(9.0, 7.0), layout="constrained")
        grid = figure.add_gridspec(2, 2 * len(names), height_ratios=(1, 1.35))
        half = len(names)
        top = [figure.add_subplot(grid[0, :half]), figure.add_subplot(grid[0, half:])]
        for panel, metric in zip(top, ("ttft_s", "tpot_s"), strict=True):
            draw_cdf(panel, frame, metric, by)
        _legend_above(figure, top[0])
        seen: list[str] = []
        below: list[Axes] = []
        for i, name in enumerate(names):
            panel = figure.add_subplot(grid[1, 2 * i : 2 * i + 2], sharex=below[0] if below else None)
            seen += [p for p in draw_gantt(panel, sent[name].iloc[first : first + max_requests], max_requests, first) if p not in seen]
            panel.set_title(name)
            below.append(panel)
        figure.legend(handles=_phase_patches(seen), loc="outside lower center", ncols=len(seen))
    return _done(figure)


def _busiest(times: np.ndarray, count: int) -> int:
    """Where the ``count`` consecutive times that lie closest together begin."""
    if len(times) <= count:
        return 0
    return int(np.argmin(times[count - 1 :] - times[: len(times) - count + 1]))


def latency_vs_rate(
    runs: pd.DataFrame,
    *,
    metric: str = "ttft_s_p90",
    by: str = "system",
    slo_s: float | None = None,
    sweep_axes: Sequence[str] | None = None,
) -> Figure:
    """One curve per configuration: a latency percentile against the offered ``rate``; the SLO as a line."""
    figure, axes = _single()
    draw_curves(axes, runs, "rate", metric, by, scale=1e3, sweep_axes=sweep_axes)
    if slo_s is not None:
        _bound_line(axes, slo_s * 1e3, "SLO")
    _rate_ticks(axes, runs)
    axes.set(xlabel="offered rate (requests/s)", ylabel=f"{_statistic(metric)} (ms)")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def attainment_vs_rate(runs: pd.DataFrame, *, by: str = "system", target: float = 0.9, sweep_axes: Sequence[str] | None = None) -> Figure:
    """Share of requests that met the SLO against the offered rate; the target as a line. A point of a single run has the interval that its
    number of requests gives it."""
    figure, axes = _single()
    draw_curves(axes, uncertainty.with_attainment_interval(runs), "rate", "slo_attainment", by, sweep_axes=sweep_axes)
    _bound_line(axes, target, f"{target:.0%}")
    _rate_ticks(axes, runs)
    axes.set(xlabel="offered rate (requests/s)", ylabel="SLO attainment", ylim=(0, 1.02))
    return _finished(figure, axes)


def attainment_vs_slo_scale(
    requests: pd.DataFrame, slo: SLO, scales: Sequence[float], *, by: str = "system", target: float = 0.9
) -> Figure:
    """From one row per request: attainment if every bound were ``scale`` times as wide, as DistServe draws it. Requests of several rates
    share a curve. ``itl_s`` is not in such a frame: raises ValueError for an SLO that bounds it."""
    bounds = {name: bound for name, bound in vars(slo).items() if bound is not None}
    if "itl_s" in bounds:
        raise ValueError("an SLO with itl_s needs the records (summary.slo_attainment), not a frame of requests")
    points = []
    for name, rows in groups(_not_cancelled(requests), by, without=("rate",)):
        for _, group in rows.groupby("repeat") if "repeat" in rows else ((0, rows),):
            for scale in scales:
                met = group["is_ok"].astype(bool)
                for metric, bound in bounds.items():
                    met &= ~(group[metric] > bound * scale)  # a metric that a request cannot have does not break its bound
                points.append({by: name, "scale": scale, "slo_attainment": met.mean()})
    figure, axes = _single()
    draw_curves(axes, pd.DataFrame(points), "scale", "slo_attainment", by, sweep_axes=())
    _bound_line(axes, target, f"{target:.0%}")
    axes.set(xlabel="SLO scale", ylabel="SLO attainment", ylim=(0, 1.02))
    return _finished(figure, axes)


def goodput_by_split(
    runs: pd.DataFrame, *, split: str = "split", value: str = uncertainty.GOODPUT, sweep_axes: Sequence[str] | None = None
) -> Figure:
    """One bar per configuration (1P3D, 2P2D, …, mixed nodes), mean of the repeats with its interval. A hatched bar without a top is a lower
    bound: the target was met at the highest rate that was tried; ``<``: it was missed at the lowest. A star: the client did not keep up."""
    bars = groups(runs, split, sweep_axes=sweep_axes)
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(max(5.2, 1.0 + 0.9 * len(bars)), 3.4), layout="constrained")
    values = [uncertainty.goodput_estimate(r) if value == uncertainty.GOODPUT else uncertainty.estimate(r, value) for _, r in bars]
    for i, (found, (_, rows)) in enumerate(zip(values, bars, strict=True)):
        lowest = (rows["min_rate"] / rows["num_gpus"]).max() if "min_rate" in rows else np.nan
        _draw_bar(axes, i, found, lowest, "" if _is_trustworthy(rows) else " *")
    axes.set_xticks(range(len(bars)), [name.replace(" · ", "\n") for name, _ in bars])
    notes = ["≥ the target was met at the highest rate that was tried"] if any(found.is_lower_bound for found in values) else []
    notes += ["< it was missed at the lowest rate that was tried"] if any(found.value == 0 for found in values) else []
    notes += [] if _is_trustworthy(runs) else ["* the client did not keep up in at least one run"]
    axes.set_xlabel("\n".join([split, *notes]))
    axes.set_ylabel("goodput per GPU (requests/s)" if value == uncertainty.GOODPUT else _words(value))
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    return _done(figure)


def _draw_bar(axes: Axes, at: int, found: uncertainty.Estimate, lowest: float, mark: str) -> None:
    """Never black: the interval is. ``lowest``: per GPU, what a value of 0 is below; nan where that is not known."""
    colour, left, right, top = OKABE_ITO[at % 6], at - 0.4, at + 0.4, found.value
    if found.is_lower_bound:
        axes.bar(at, found.value, width=0.8, color=colour, alpha=0.45, hatch="////", edgecolor="#FFFFFF", linewidth=0)
        axes.plot([left, left, right, right], [found.value, 0, 0, found.value], color="#333333", linewidth=1.0)
    else:
        axes.bar(at, found.value, width=0.8, color=colour, edgecolor="#333333")
    if found.has_interval:
        up = 0.0 if found.is_lower_bound or np.isinf(found.high) else found.high - found.value
        axes.errorbar(at, found.value, yerr=[[found.value - found.low], [up]], color="#000000", capsize=3, linewidth=1.2)
        top += up
        if np.isinf(found.high):
            axes.plot(at, found.value, marker="^", color="#000000", markersize=5)
    said = f"{'≥ ' if found.is_lower_bound else ''}{found.value:.3g}"
    if found.value == 0:
        said = "none met" if np.isnan(lowest) else f"< {lowest:.3g}"
    axes.annotate(said + mark, (at, top), xytext=(0, 6), textcoords="offset points", ha="center")


def _is_trustworthy(rows: pd.DataFrame) -> bool:
    return "is_trustworthy" not in rows or bool(rows["is_trustworthy"].all())


def pareto(runs: pd.DataFrame, *, by: str = "system", num_gpus: str = "num_gpus", sweep_axes: Sequence[str] | None = None) -> Figure:
    """Tokens per second and user (1 / TPOT p50) against output tokens per second and GPU. One point per configuration and rate, repeats
    with their intervals; a marker per configuration, and through all that share a value of ``by`` their frontier."""
    points: dict[Any, list[pd.DataFrame]] = {value: [] for value in runs[by]}
    figure, axes = _single()
    for i, (name, rows) in enumerate(groups(runs, by, without=("rate",), sweep_axes=sweep_axes)):
        value, at = rows[by].iloc[0], _points(rows, num_gpus)
        points[value].append(at)
        style: dict[str, Any] = {"marker": _MARKERS[i % 7], "color": OKABE_ITO[list(points).index(value) % 7], "linestyle": ""}
        drawn = axes.errorbar(at["per_user"], at["per_gpu"], xerr=at["per_user_error"], yerr=at["per_gpu_error"], capsize=2, **style)
        drawn.lines[0].set_label(name)  # the legend shows the marker alone
    for i, found in enumerate(points.values()):
        edge = _frontier(pd.concat(found, ignore_index=True))
        axes.plot(edge["per_user"], edge["per_gpu"], linestyle=_LINES[i % 7], color=OKABE_ITO[i % 7])
    axes.set(xlabel="tokens/s per user (1 / TPOT p50)", ylabel="output tokens/s per GPU")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def _points(rows: pd.DataFrame, num_gpus: str) -> pd.DataFrame:
    """Of one configuration: tokens/s per user and per GPU, a row per rate; ``_error``: half-width over its repeats, nan of one."""
    frame = rows.assign(per_user=1.0 / rows["tpot_s_p50"], per_gpu=rows["output_throughput_tps"] / rows[num_gpus])
    points = []
    for _, repeats in frame.groupby("rate", dropna=False) if "rate" in frame else ((None, frame),):
        intervals = {name: confidence_interval(repeats[name].dropna().tolist()) for name in ("per_user", "per_gpu")}
        points.append({name: v.mean for name, v in intervals.items()} | {f"{name}_error": v.half_width for name, v in intervals.items()})
    return pd.DataFrame(points)


def heat_map(
    runs: pd.DataFrame, *, x: str = "rate", y: str = "split", value: str = "slo_attainment", sweep_axes: Sequence[str] | None = None
) -> Figure:
    """``value`` over two axes, written into every cell; repeats are averaged. What differs in yet another axis has a row of its own."""
    rows_of = groups(runs, y, without=(x,), sweep_axes=sweep_axes)
    grid = pd.DataFrame({name: rows.groupby(x)[value].mean() for name, rows in rows_of}).T.sort_index(axis=1)
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(
            figsize=(1.3 + 0.07 * max(map(len, grid.index)) + 0.7 * grid.shape[1], 1.2 + 0.45 * grid.shape[0]), layout="constrained"
        )
        in_ms = re.search(r"_s(_|$)", value) is not None
        numbers = grid.to_numpy(dtype=float) * (1e3 if in_ms else 1.0)
        low = 0.0 if value == "slo_attainment" else float(np.nanmin(numbers))
        high = float(np.nanmax(numbers))
        shown = axes.imshow(numbers, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        for (row, column), number in np.ndenumerate(numbers):
            if not np.isnan(number):
                axes.text(
                    column,
                    row,
                    f"{number:.0f}" if in_ms and number >= 10 else f"{number:.2f}",
                    ha="center",
                    va="center",
                    color="black" if number > (low + high) / 2 else "white",
                )
        axes.set_xticks(range(grid.shape[1]), [f"{label:g}" if isinstance(label, float) else str(label) for label in grid.columns])
        axes.set_yticks(range(grid.shape[0]), [str(label) for label in grid.index])
        axes.set(xlabel="offered rate (requests/s)" if x == "rate" else _words(x), ylabel=_words(y))
        axes.grid(visible=False)
        figure.colorbar(shown, label=f"{_statistic(value)} (ms)" if in_ms else _words(value))
    return _done(figure)


def exposed_vs_prompt(requests: pd.DataFrame, *, by: str = "transfer_mode") -> Figure:
    """KV transfer that prefill did not hide, against prompt length: one point per request, the median of each length drawn through. Counted
    from the prompt's last layer, or where that is not known (records of before) from the end of prefill."""
    return against_prompt(requests, "after_last_layer_s" if "after_last_layer_s" in requests else "exposed_transfer_s", by=by)


def against_prompt(requests: pd.DataFrame, metric: str, *, by: str = "system") -> Figure:
    """A latency of each completed request against its prompt's length. The line is a median: of each length where lengths repeat, else of
    each of eight equally full ranges of lengths."""
    requests = requests[requests["is_ok"].astype(bool)] if "is_ok" in requests else requests
    figure, axes = _single()
    for i, (name, rows) in enumerate(groups(requests.dropna(subset=[metric]), by, without=("rate",))):
        style = _style(i)
        axes.plot(rows["num_prompt_tokens"], rows[metric] * 1e3, **style | {"linestyle": ""}, markersize=4, alpha=0.3)
        middle = _medians(rows["num_prompt_tokens"], rows[metric] * 1e3)
        axes.plot(middle.index, middle, **style, markersize=5, label=name)
    axes.set(xlabel="prompt tokens", ylabel=f"{_words(metric)} (ms)")
    axes.set_xscale("log", base=2)
    lengths = sorted(set(requests["num_prompt_tokens"].tolist()))
    if len(lengths) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def _medians(lengths: pd.Series, values: pd.Series, max_ranges: int = 8) -> pd.Series:
    """Length -> median value; the length of a range is its own median."""
    is_repeated = lengths.nunique() * 3 <= len(lengths) or lengths.nunique() <= max_ranges
    ranges = lengths if is_repeated else pd.qcut(lengths, max_ranges, duplicates="drop", labels=False)
    frame = pd.DataFrame({"length": lengths, "value": values}).groupby(ranges.to_numpy()).median()
    return frame.set_index("length")["value"]


def layers_on_the_wire(pieces: pd.DataFrame, *, by: str = "transfer_mode") -> Figure:
    """When the pieces of one prompt's KV were on the wire, layer by layer, one panel per value of ``by``: the request with the most bytes
    of each. Zero is the end of its last layer's computing; what is right of it is exposed. ``pieces``: ``Timeline.transfers``."""
    groups = [(name, rows[rows["request_id"] == _largest(rows)]) for name, rows in pieces.groupby(by, sort=False)]
    with plt.rc_context(_RC):
        figure, panels = plt.subplots(
            len(groups), 1, figsize=(7.0, 0.9 + 1.3 * len(groups)), layout="constrained", sharex=True, squeeze=False
        )
        for axes, (name, rows) in zip(panels[:, 0], groups, strict=True):
            _draw_pieces(axes, rows)
            axes.set_title(str(name), fontsize=9)
        panels[-1][0].set_xlabel("time since the end of the last layer (ms)")
        figure.legend(handles=_phase_patches(("hidden", "exposed"), _WIRE), loc="outside upper center", ncols=2)
    return _done(figure)


def _largest(pieces: pd.DataFrame) -> str:
    return str(pieces.groupby("request_id")["bytes"].sum().idxmax())


def _draw_pieces(axes: Axes, rows: pd.DataFrame) -> None:
    end = rows["compute_end_s"].max()
    for row in rows.itertuples(index=False):
        start, stop, cut = (1e3 * (at - end) for at in (row.wire_start_s, row.end_s, max(row.wire_start_s, min(row.end_s, end))))
        for left, right, part in ((start, cut, "hidden"), (cut, stop, "exposed")):
            if right > left:
                colour, hatch = _WIRE[part]
                axes.broken_barh([(left, right - left)], (row.layer - 0.4, row.num_layers - 0.2), facecolor=colour, hatch=hatch,
                                 edgecolor="#555555", linewidth=0.3)  # fmt: skip
    num_layers = int((rows["layer"] + rows["num_layers"]).max())
    axes.axvline(0.0, color="#000000", linewidth=0.8, linestyle=":")
    axes.set(ylabel="layer", ylim=(num_layers - 0.4, -0.6))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def token_timeline(tokens: pd.DataFrame) -> Figure:
    """One answer, token by token: a row per message with ``at_s`` (since sending), ``token`` (1, 2, …) and ``node`` (who made it)."""
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(7.0, 2.3), layout="constrained")
        if len(tokens):
            first = tokens.iloc[0]
            axes.barh(0, first["at_s"] * 1e3, height=0.5, color="#DDDDDD", edgecolor="#555555", linewidth=0.3)
            axes.annotate("waiting for the first token", (first["at_s"] * 500, 0), ha="center", va="center", fontsize=7)
        if len(tokens) > 1 and tokens["node"].nunique() > 1:
            second = tokens.iloc[1]
            width = (second["at_s"] - first["at_s"]) * 1e3
            axes.barh(0, width, left=first["at_s"] * 1e3, height=0.5, color="#FFFFFF", hatch="////", edgecolor="#555555", linewidth=0.3)
            middle = (first["at_s"] + second["at_s"]) * 500
            axes.annotate(f"hand-over and one step: {width:.1f} ms", (middle, -0.3), xytext=(0, 6), textcoords="offset points", ha="center",
                          va="bottom", fontsize=7)  # fmt: skip
        for i, (node, rows) in enumerate(tokens.groupby("node", sort=False)):
            axes.plot(rows["at_s"] * 1e3, [0] * len(rows), linestyle="", marker=_MARKERS[i % 7], color=OKABE_ITO[i % 7], label=str(node))
        axes.set(xlabel="time since sending (ms)", ylim=(-0.6, 0.6), yticks=[])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        if len(tokens):
            _legend_above(figure, axes)
    return _done(figure)


def save(figure: Figure, path: str | Path, frame: pd.DataFrame | None = None) -> list[Path]:
    """``path`` without suffix -> path.png, path.pdf and, of ``frame``, path.csv. Returns what was written."""
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    figure.savefig(written[0], dpi=160)
    figure.savefig(written[1])
    if frame is not None:
        written.append(stem.with_name(f"{stem.name}.csv"))
        frame.to_csv(written[-1], index=False)
    return written


# ---- panels ----------------------------------------------------------------------------------------------------------


def draw_cdf(axes: Axes, frame: pd.DataFrame, metric: str, by: str, sweep_axes: Sequence[str] | None = None) -> None:
    """Steps at every completed request that has the metric. A failed request has no latency, whatever it got before it failed, and keeps
    the curve below 1; one that the client cancelled is not there."""
    for i, (name, rows) in enumerate(groups(_not_cancelled(frame), by, without=("rate",), sweep_axes=sweep_axes)):
        is_ok = rows["is_ok"].astype(bool) if "is_ok" in rows else rows[metric].notna()
        values = np.sort(rows.loc[is_ok, metric].dropna().to_numpy(dtype=float)) * 1e3
        share = np.arange(1, len(values) + 1) / max(len(values) + int((~is_ok).sum()), 1)
        style = _style(i)
        axes.step(values, share, where="post", color=style["color"], linestyle=style["linestyle"], linewidth=1.6, label=name)
    what = "gaps" if metric.startswith("itl") else "requests"  # a row of gaps_frame is no request
    axes.set(xlabel=f"{_words(metric)} (ms)", ylabel=f"share of {what}", ylim=(0, 1.02))
    axes.set_xlim(left=0)


def draw_curves(
    axes: Axes, frame: pd.DataFrame, x: str, y: str, by: str, *, scale: float = 1.0, sweep_axes: Sequence[str] | None = None
) -> None:
    """Mean of the repeats at each ``x`` with its 95% interval; of a single row with that of its columns ``<y>_low`` and ``<y>_high`` where
    it has them. One line style and marker per configuration."""
    curves = groups(frame, by, without=(x,), sweep_axes=sweep_axes)
    for i, (name, rows) in enumerate(curves):
        found = {at: uncertainty.estimate(group, y) for at, group in rows.groupby(x)}
        means = [scale * e.value for e in found.values()]
        lengths = [(e.value - e.low, e.high - e.value) if e.has_interval else (0.0, 0.0) for e in found.values()]
        errors = scale * np.maximum(0.0, np.array(lengths).reshape(-1, 2).T)
        style = _style(i) | {"linewidth": 1.4, "markersize": 5, "label": name}
        if errors.any():
            drawn = axes.errorbar(list(found), means, yerr=errors, capsize=3, elinewidth=0.9, **style)
            beside = ScaledTranslation((i - (len(curves) - 1) / 2) * 3 / 72, 0, axes.figure.dpi_scale_trans)  # or one bar hides another
            for artist in drawn.get_children():
                artist.set_transform(axes.transData + beside)
        else:
            axes.plot(list(found), means, **style)


def _style(number: int) -> dict[str, Any]:
    """Of the curve with this number: 49 differ."""
    shape = (number + number // 7) % 7
    return {"color": OKABE_ITO[number % 7], "linestyle": _LINES[shape], "marker": _MARKERS[shape]}


def _not_cancelled(requests: pd.DataFrame) -> pd.DataFrame:
    return requests[~requests["is_cancelled"].astype(bool)] if "is_cancelled" in requests else requests


def draw_gantt(axes: Axes, frame: pd.DataFrame, max_requests: int, first_number: int = 0) -> list[str]:
    """Draws one bar per row, numbered from ``first_number``, and returns the names of the phases that occurred."""
    rows = frame.sort_values("sent_s").head(max_requests)
    start = frame["sent_s"].min()
    seen: list[str] = []
    for y, (_, row) in enumerate(rows.iterrows(), start=first_number):
        left = row["sent_s"] - start
        for phase, length in _segments(row):
            colour, hatch = PHASES[phase]
            axes.barh(y, length, left=left, height=0.8, color=colour, hatch=hatch, edgecolor="#555555", linewidth=0.3)
            left += length
            seen += [] if phase in seen else [phase]
        if pd.notna(row.get("error")):
            axes.plot(max(left, row["sent_s"] - start), y, marker="x", color=OKABE_ITO[1], markersize=5)
    axes.set(xlabel="time since the first of them (s)", ylabel="request", ylim=(first_number + len(rows) - 0.4, first_number - 0.6))
    return [phase for phase in PHASES if phase in seen]


def _segments(row: pd.Series) -> list[tuple[str, float]]:
    """(phase, seconds) one after the other from sending to the last token: they add up to ``e2e_s``. The exposed transfer lies where it
    was, from the end of prefill on, and is cut out of what else went on meanwhile: out of decode, where no first token waited for it."""
    ttft, e2e = row["ttft_s"], row["e2e_s"]
    if pd.isna(ttft):
        return []
    marks = _marks(row)
    if marks is None:
        return [("waiting for the first token", ttft), ("decode", e2e - ttft)]
    spans = list(
        zip(("to the node", "queue", "prefill", "to first token", "decode"), [0.0, *marks, ttft], [*marks, ttft, e2e], strict=True)
    )
    exposed = row.get("exposed_transfer_s")
    until = marks[-1] + (0.0 if exposed is None or pd.isna(exposed) else exposed)
    cut = [span for name, start, end in spans for span in _cut(name, start, end, marks[-1], until)]
    return [(name, end - start) for name, start, end in cut if end > start]


def _cut(name: str, start: float, end: float, wire_start: float, wire_end: float) -> list[tuple[str, float, float]]:
    """The span, its part on the wire under another name."""
    first, last = max(start, min(wire_start, end)), min(end, max(wire_end, start))
    if last <= first:
        return [(name, start, end)]
    return [(name, start, first), ("exposed transfer", first, last), (name, last, end)]


def _marks(row: pd.Series) -> list[float] | None:
    """Seconds since sending at which the prefilling engine had the request, began with it, was through with its prompt. None when the
    row does not say, or says it on a clock that is not the client's."""
    parts = [row.get(column) for column in ("router_path_s", "queueing_s", "prefill_s")]
    if any(part is None or pd.isna(part) for part in parts):
        return None
    marks = np.cumsum(np.array(parts, dtype=float))
    slack = max(1e-3, 0.02 * row["ttft_s"])  # what clocks of two processes may be off by
    if min(*parts, row["ttft_s"] - marks[-1]) < -slack:
        return None
    return np.clip(np.maximum.accumulate(marks), 0.0, row["ttft_s"]).tolist()


def _single() -> tuple[Figure, Axes]:
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    return figure, axes


def _finished(figure: Figure, axes: Axes) -> Figure:
    _legend_above(figure, axes)
    return _done(figure)


def _bound_line(axes: Axes, at: float, name: str) -> None:
    """Named beside the panel, where no curve is."""
    axes.axhline(at, color="#000000", linewidth=0.8, linestyle=":")
    axes.annotate(name, (1.01, at), xycoords=("axes fraction", "data"), ha="left", va="center")


def _rate_ticks(axes: Axes, runs: pd.DataFrame, max_ticks: int = 8) -> None:
    """At the rates that were offered, where they are few."""
    rates = sorted(runs["rate"].dropna().unique())
    if len(rates) <= max_ticks:
        axes.xaxis.set_major_locator(FixedLocator(rates))


def _frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs that no other run beats on both axes, from left to right."""
    best, kept = -np.inf, []
    for index, row in rows.sort_values(["per_user", "per_gpu"], ascending=False).iterrows():
        if row["per_gpu"] > best:
            best = row["per_gpu"]
            kept.append(index)
    return rows.loc[kept[::-1]]


def _statistic(metric: str) -> str:
    """ "ttft_s_p90" -> "time to first token, p90"; "transfer_s" -> "transfer"."""
    name, _, statistic = metric.rpartition("_")
    return _words(metric) if statistic == "s" else f"{_words(name)}, {statistic}"


def _legend_above(figure: Figure, axes: Axes) -> None:
    """In as many columns as the figure is wide; further rows make it higher."""
    handles, labels = axes.get_legend_handles_labels()
    width = 0.55 + 0.066 * max(map(len, labels), default=0)  # inches of an entry: its sample, its letters
    columns = max(1, min(len(labels), int(figure.get_figwidth() / width)))
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, -(-len(labels) // columns) - 1))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def _phase_patches(phases: Sequence[str], styles: Mapping[str, tuple[str, str]] = PHASES) -> list[Patch]:
    return [Patch(facecolor=styles[p][0], hatch=styles[p][1], edgecolor="#555555", linewidth=0.3, label=p) for p in phases]


def _words(metric: str) -> str:
    return {
        "ttft_s": "time to first token",
        "tpot_s": "time per output token",
        "itl_s": "inter-token latency",
        "e2e_s": "end-to-end latency",
        "first_gap_s": "first to second token",
        "after_last_layer_s": "KV arriving after the last layer",
        "slo_attainment": "SLO attainment",
        "goodput_rps": "goodput (requests/s)",
    }.get(metric, metric.removesuffix("_s").replace("_", " "))


def _done(figure: Figure) -> Figure:
    plt.close(figure)
    return figure
