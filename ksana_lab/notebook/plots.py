"""Figures: a DataFrame in (metrics.export.to_frame), a matplotlib Figure out. Knows nothing of how the numbers came about.

Readable in print and for the colour-blind: Okabe and Ito's colours, and never colour alone (line styles, markers, hatches, words).
A figure is closed towards pyplot when it is returned, so a notebook shows it once; ``save`` writes PNG, PDF and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

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
    axes.set(xlabel=f"{_words(metric)} (ms)", ylabel="share of requests", ylim=(0, 1.02))
    axes.set_xlim(left=0)


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


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def _phase_patches(phases: Sequence[str]) -> list[Patch]:
    return [Patch(facecolor=PHASES[p][0], hatch=PHASES[p][1], edgecolor="#555555", linewidth=0.3, label=p) for p in phases]


def _words(metric: str) -> str:
    return {
        "ttft_s": "time to first token",
        "tpot_s": "time per output token",
        "itl_s": "inter-token latency",
        "e2e_s": "end-to-end latency",
        "first_gap_s": "first to second token",
    }.get(metric, metric.removesuffix("_s").replace("_", " "))


def _done(figure: Figure) -> Figure:
    plt.close(figure)
    return figure
