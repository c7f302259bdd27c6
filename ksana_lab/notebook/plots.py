"""Figures: a DataFrame in, a matplotlib Figure out. Knows nothing of how the numbers came about.

Two kinds of frame: one row per request (``metrics.export.to_frame``) for CDFs and Gantts, one row per run (``summary_row``) for everything
against a rate, a split, a length. Rows that agree on all but the seed are repeats: their mean is drawn, with a 95% interval.

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

from ksana_lab.metrics.summary import SLO, confidence_interval

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))

# Of a Gantt's bars, in the order in which a request goes through them: colour, hatch.
PHASES = {
    "waiting for the first token": ("#BBBBBB", ""),
    "queue": ("#E6E6E6", ""),
    "prefill": ("#E69F00", ""),
    "exposed transfer": ("#D55E00", "////"),
    "to first token": ("#BBBBBB", ""),
    "decode": ("#56B4E9", ""),
}
_WIRE = {"hidden": ("#56B4E9", ""), "exposed": ("#D55E00", "////")}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
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


def latency_cdfs(frame: pd.DataFrame, *, by: str = "system", metrics: Sequence[str] = ("ttft_s", "tpot_s")) -> Figure:
    """One panel per metric, one curve per value of ``by``: the share of requests that were at most so slow."""
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.0), layout="constrained", squeeze=False)
        for panel, metric in zip(axes[0], metrics, strict=True):
            draw_cdf(panel, frame, metric, by)
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


def latency_vs_rate(runs: pd.DataFrame, *, metric: str = "ttft_s_p90", by: str = "system", slo_s: float | None = None) -> Figure:
    """One curve per value of ``by``: a latency percentile against the offered ``rate``; the SLO as a line."""
    figure, axes = _single()
    draw_curves(axes, runs, "rate", metric, by, scale=1e3)
    if slo_s is not None:
        axes.axhline(slo_s * 1e3, color="#000000", linewidth=0.8, linestyle=":")
        axes.annotate("SLO", (1.0, slo_s * 1e3), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="offered rate (requests/s)", ylabel=f"{_statistic(metric)} (ms)")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def attainment_vs_rate(runs: pd.DataFrame, *, by: str = "system", target: float = 0.9) -> Figure:
    """Share of requests that met the SLO against the offered rate; the target as a line."""
    figure, axes = _single()
    draw_curves(axes, runs, "rate", "slo_attainment", by)
    _target_line(axes, target)
    axes.set(xlabel="offered rate (requests/s)", ylabel="SLO attainment", ylim=(0, 1.02))
    return _finished(figure, axes)


def attainment_vs_slo_scale(
    requests: pd.DataFrame, slo: SLO, scales: Sequence[float], *, by: str = "system", target: float = 0.9
) -> Figure:
    """From one row per request: attainment if every bound were ``scale`` times as wide, as DistServe draws it. ``itl_s`` is not in such a
    frame: raises ValueError for an SLO that bounds it."""
    bounds = {name: bound for name, bound in vars(slo).items() if bound is not None}
    if "itl_s" in bounds:
        raise ValueError("an SLO with itl_s needs the records (summary.slo_attainment), not a frame of requests")
    rows = requests[~requests["is_cancelled"]] if "is_cancelled" in requests else requests
    points = []
    for (name, *_), group in rows.groupby([by, "repeat"] if "repeat" in rows else [by], sort=False):
        for scale in scales:
            met = group["is_ok"].astype(bool)
            for metric, bound in bounds.items():
                met &= ~(group[metric] > bound * scale)  # a metric that a request cannot have does not break its bound
            points.append({by: name, "scale": scale, "slo_attainment": met.mean()})
    figure, axes = _single()
    draw_curves(axes, pd.DataFrame(points), "scale", "slo_attainment", by)
    _target_line(axes, target)
    axes.set(xlabel="SLO scale", ylabel="SLO attainment", ylim=(0, 1.02))
    return _finished(figure, axes)


def goodput_by_split(runs: pd.DataFrame, *, split: str = "split", value: str = "goodput_rps_per_gpu") -> Figure:
    """One bar per split (1P3D, 2P2D, …, aggregated), mean of the repeats with its interval."""
    figure, axes = _single()
    for i, (_, rows) in enumerate(runs.groupby(split, sort=False)):
        interval = confidence_interval(rows[value].dropna().tolist())
        error = None if np.isnan(interval.half_width) else interval.half_width
        axes.bar(i, interval.mean, yerr=error, color=OKABE_ITO[i % 7], hatch=_HATCHES[i % len(_HATCHES)], edgecolor="#333333", capsize=3)
        axes.annotate(f"{interval.mean:.2f}", (i, interval.mean + (error or 0.0)), xytext=(0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(runs[split].nunique()), list(dict.fromkeys(runs[split].astype(str))))
    axes.set(xlabel=split, ylabel="goodput per GPU (requests/s)" if value == "goodput_rps_per_gpu" else _words(value))
    axes.grid(axis="x", visible=False)
    return _done(figure)


def pareto(
    runs: pd.DataFrame, *, by: str = "system", num_gpus: str = "num_gpus", point: Sequence[str] = ("split", "rate", "transfer_mode")
) -> Figure:
    """Tokens per second and user (1 / TPOT p50) against output tokens per second and GPU; each system's frontier drawn through. Repeats,
    rows that agree in the columns ``point``, are one point with its intervals."""
    frame = runs.assign(per_user=1.0 / runs["tpot_s_p50"], per_gpu=runs["output_throughput_tps"] / runs[num_gpus])
    figure, axes = _single()
    for i, (name, rows) in enumerate(frame.groupby(by, sort=False)):
        style: dict[str, Any] = {"marker": _MARKERS[i % 7], "color": OKABE_ITO[i % 7]}
        points = _means(rows, point)
        axes.errorbar(points["per_user"], points["per_gpu"], xerr=points["per_user_error"], yerr=points["per_gpu_error"], linestyle="",
                      capsize=2, alpha=0.45, **style)  # fmt: skip
        edge = _frontier(points)
        axes.plot(edge["per_user"], edge["per_gpu"], linestyle=_LINES[i % 7], label=str(name), **style)
    axes.set(xlabel="tokens/s per user (1 / TPOT p50)", ylabel="output tokens/s per GPU")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def _means(rows: pd.DataFrame, point: Sequence[str]) -> pd.DataFrame:
    """One row per point; ``_error``: half-width over its repeats, nan of one."""
    same = [column for column in point if column in rows and rows[column].notna().all()]
    if "repeat" not in rows or rows["repeat"].nunique() < 2 or not same:
        return rows.assign(per_user_error=np.nan, per_gpu_error=np.nan)
    points = []
    for _, group in rows.groupby(same, sort=False):
        intervals = {name: confidence_interval(group[name].dropna().tolist()) for name in ("per_user", "per_gpu")}
        points.append({name: v.mean for name, v in intervals.items()} | {f"{name}_error": v.half_width for name, v in intervals.items()})
    return pd.DataFrame(points)


def heat_map(runs: pd.DataFrame, *, x: str = "rate", y: str = "split", value: str = "slo_attainment") -> Figure:
    """``value`` over two axes, written into every cell; repeats are averaged."""
    grid = runs.pivot_table(index=y, columns=x, values=value, aggfunc="mean", sort=False).sort_index(axis=1)
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(1.6 + 0.7 * grid.shape[1], 1.2 + 0.45 * grid.shape[0]), layout="constrained")
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
    """KV transfer that prefill did not hide, against prompt length: one point per request, the median of each length drawn through."""
    return against_prompt(requests, "exposed_transfer_s", by=by)


def against_prompt(requests: pd.DataFrame, metric: str, *, by: str = "system") -> Figure:
    """A latency of each request against its prompt's length. The line is a median: of each length where lengths repeat, else of each of
    eight equally full ranges of lengths."""
    figure, axes = _single()
    for i, (name, rows) in enumerate(requests.dropna(subset=[metric]).groupby(by, sort=False)):
        colour, marker = OKABE_ITO[i % 7], _MARKERS[i % 7]
        axes.plot(rows["num_prompt_tokens"], rows[metric] * 1e3, linestyle="", marker=marker, markersize=4, color=colour, alpha=0.3)
        middle = _medians(rows["num_prompt_tokens"], rows[metric] * 1e3)
        axes.plot(middle.index, middle, linestyle=_LINES[i % 7], marker=marker, markersize=5, color=colour, label=str(name))
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
        panels[-1][0].set_xlabel("time since the end of prefill (ms)")
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


def draw_cdf(axes: Axes, frame: pd.DataFrame, metric: str, by: str) -> None:
    """Steps at every request; a failed request has no latency and keeps the curve below 1."""
    for i, (name, rows) in enumerate(frame.groupby(by, sort=False)):
        values = np.sort(rows[metric].dropna().to_numpy(dtype=float)) * 1e3
        counted = rows["is_ok"] | rows["error"].notna() if "is_ok" in rows else rows[metric].notna()
        total = max(int(counted.sum()), len(values), 1)
        share = np.arange(1, len(values) + 1) / total
        axes.step(values, share, where="post", color=OKABE_ITO[i % 7], linestyle=_LINES[i % 7], linewidth=1.6, label=str(name))
    what = "gaps" if metric.startswith("itl") else "requests"  # a row of gaps_frame is no request
    axes.set(xlabel=f"{_words(metric)} (ms)", ylabel=f"share of {what}", ylim=(0, 1.02))
    axes.set_xlim(left=0)


def draw_curves(axes: Axes, frame: pd.DataFrame, x: str, y: str, by: str, *, scale: float = 1.0) -> None:
    """Mean of the repeats at each ``x`` with a 95% interval where there are several; one line style and marker per value of ``by``."""
    for i, (name, rows) in enumerate(frame.groupby(by, sort=False)):
        intervals = {at: confidence_interval((group[y].dropna() * scale).tolist()) for at, group in rows.groupby(x)}
        means = [interval.mean for interval in intervals.values()]
        errors = [0.0 if np.isnan(interval.half_width) else interval.half_width for interval in intervals.values()]
        style: dict[str, Any] = {"linestyle": _LINES[i % 7], "marker": _MARKERS[i % 7], "color": OKABE_ITO[i % 7], "label": str(name)}
        if any(errors):
            axes.errorbar(list(intervals), means, yerr=errors, capsize=3, linewidth=1.4, markersize=5, **style)
        else:
            axes.plot(list(intervals), means, linewidth=1.4, markersize=5, **style)


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
    """(phase, seconds) from sending to the last token. Without the server's phases the time to first token stays whole."""
    if pd.isna(row["ttft_s"]):
        return []
    known = [
        (phase, row[column])
        for phase, column in (("queue", "queueing_s"), ("prefill", "prefill_s"), ("exposed transfer", "exposed_transfer_s"))
        if column in row and pd.notna(row[column])
    ]
    rest = row["ttft_s"] - sum(seconds for _, seconds in known)
    ahead = [*known, ("to first token", max(0.0, rest))] if known else [("waiting for the first token", row["ttft_s"])]
    return [*ahead, ("decode", row["e2e_s"] - row["ttft_s"])]


def _single() -> tuple[Figure, Axes]:
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    return figure, axes


def _finished(figure: Figure, axes: Axes) -> Figure:
    _legend_above(figure, axes)
    return _done(figure)


def _target_line(axes: Axes, target: float) -> None:
    axes.axhline(target, color="#000000", linewidth=0.8, linestyle=":")
    axes.annotate(f"{target:.0%}", (1.0, target), xycoords=("axes fraction", "data"), ha="right", va="bottom")


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
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _phase_patches(phases: Sequence[str], styles: Mapping[str, tuple[str, str]] = PHASES) -> list[Patch]:
    return [Patch(facecolor=styles[p][0], hatch=styles[p][1], edgecolor="#555555", linewidth=0.3, label=p) for p in phases]


def _words(metric: str) -> str:
    return {
        "ttft_s": "time to first token",
        "tpot_s": "time per output token",
        "itl_s": "inter-token latency",
        "e2e_s": "end-to-end latency",
        "first_gap_s": "first to second token",
        "slo_attainment": "SLO attainment",
        "goodput_rps": "goodput (requests/s)",
    }.get(metric, metric.removesuffix("_s").replace("_", " "))


def _done(figure: Figure) -> Figure:
    plt.close(figure)
    return figure
