"""Figures of a Timeline: each takes the run and returns a matplotlib Figure. How to read them: docs/tracing.md.

Colours are Okabe and Ito's, and never alone: what is exposed is hatched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ksana_lab.tracing.perfetto import link_use
from ksana_lab.tracing.timeline import Timeline
from ksana_lab.tracing.transfers import link_names

_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
}
# What is drawn as one, in order: (phases, colour, hatch).
GROUPS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "HTTP and routing": (("client → router", "routing", "router → node", "node → router", "router → client"), "#CCCCCC", ""),
    "API process": (("tokenising", "detokenising"), "#F0E442", ""),
    "queueing": (("queueing",), "#999999", "...."),
    "prefill": (("prefill",), "#E69F00", ""),
    "rest of transfer": (("rest of transfer",), "#D55E00", "////"),
    "hand-over": (("noticing KV", "decode queue"), "#CC79A7", "\\\\\\\\"),
    "decode": (("decode",), "#56B4E9", ""),
    "delivery": (("delivery",), "#FFFFFF", ""),
}
_GROUP_OF = {phase: group for group, (phases, _, _) in GROUPS.items() for phase in phases}
_COMPUTE, _HIDDEN, _EXPOSED = ("#E69F00", ""), ("#0072B2", ""), ("#D55E00", "////")
_MIN_BAR = 1e-5  # of the axis: thinner bars are drawn as lines


def layer_lanes(run: Timeline, request_id: str | None = None) -> Figure:
    """One request: for each layer when it was computed and when its KV was on the wire, the exposed part marked. By default the request of
    the most layers sent apart."""
    request = request_id or _most_interesting(run)
    layers = run.layers[run.layers["request_id"] == request] if request else run.layers.head(0)
    first = layers[["compute_start_s", "wire_start_s"]].min().min() if len(layers) else 0.0
    num = int(layers["layer"].max()) + 1 if len(layers) else 1
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(7.5, 1.3 + 0.34 * min(num, 40)), layout="constrained")
        for row in layers.itertuples(index=False):
            if row.compute_s == row.compute_s:
                _bar(axes, row.layer - 0.2, row.compute_start_s - first, row.compute_end_s - first, 0.36, _COMPUTE)
            ends = _compute_end(run, row)
            cut = min(max(ends, row.wire_start_s), row.end_s)
            _bar(axes, row.layer + 0.2, row.wire_start_s - first, cut - first, 0.36, _HIDDEN)
            _bar(axes, row.layer + 0.2, cut - first, row.end_s - first, 0.36, _EXPOSED)
        if len(layers):
            end = max(_compute_end(run, row) for row in layers.itertuples(index=False)) - first
            axes.axvline(1e3 * end, color="#000000", linewidth=0.8, linestyle=":")
            axes.annotate(
                "last layer computed", (1e3 * end, -0.6), fontsize=7, ha="right", va="bottom", xytext=(-3, 1), textcoords="offset points"
            )
        axes.set(
            xlabel="time since the first layer began (ms)", ylabel="layer", ylim=(num - 0.4, -0.6), title=f"{request or 'no transfer'}"
        )
        axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, {"computed": _COMPUTE, "on the wire, hidden": _HIDDEN, "on the wire, exposed": _EXPOSED})
    return _done(figure)


def request_gantt(run: Timeline, *, max_requests: int = 40) -> Figure:
    """One bar per request, from sending to its last token, divided into phases; together they are the latency that the client saw."""
    requests = run.measured.head(max_requests)
    start = requests["sent_s"].min() if len(requests) else 0.0
    phases = run.breakdown.assign(group=run.breakdown["phase"].map(_GROUP_OF))
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.16 * max(4, len(requests))), layout="constrained")
        for y, request in enumerate(requests["request_id"]):
            for row in phases[phases["request_id"] == request].itertuples(index=False):
                _bar(axes, y, row.start_s - start, row.end_s - start, 0.8, GROUPS[row.group][1:], scale=1.0)
        axes.set(xlabel="time since the first request (s)", ylabel="request", ylim=(len(requests) - 0.4, -0.6))
        _legend(figure, {name: GROUPS[name][1:] for name in GROUPS if name in set(phases["group"])})
    return _done(figure)


def ttft_decomposition(run: Timeline, *, max_requests: int = 40) -> Figure:
    """One stacked bar per request: what its time to first token consists of. A line marks the client's own measurement."""
    requests = run.measured.head(max_requests)
    phases = run.breakdown[run.breakdown["is_ttft"]]
    phases = phases.assign(group=phases["phase"].map(_GROUP_OF))
    table = phases.pivot_table(index="request_id", columns="group", values="seconds", aggfunc="sum", fill_value=0.0)
    table = table.reindex(requests["request_id"]).fillna(0.0) * 1e3
    groups = [name for name in GROUPS if name in table and table[name].sum() > 0]
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(max(4.5, 1.5 + 0.22 * len(table)), 3.4), layout="constrained")
        bottom = pd.Series(0.0, index=table.index)
        for name in groups:
            _, colour, hatch = GROUPS[name]
            axes.bar(
                range(len(table)), table[name], bottom=bottom, width=0.8, color=colour, hatch=hatch, edgecolor="#555555", linewidth=0.3
            )
            bottom += table[name]
        ttft = requests["ttft_s"].to_numpy(dtype=float) * 1e3
        axes.hlines(ttft, [x - 0.48 for x in range(len(ttft))], [x + 0.48 for x in range(len(ttft))], color="#000000", linewidth=1.0)
        axes.set(xlabel="request, in order of sending", ylabel="time to first token (ms)")
        axes.grid(axis="x", visible=False)
        _legend(figure, {**{name: GROUPS[name][1:] for name in groups}})
    return _done(figure)


def link_utilisation(run: Timeline) -> Figure:
    """What is on each link over time, and how busy the engines are: one panel per link, one for the steps."""
    use = link_use(run)
    links = list(use["link"].drop_duplicates())
    nodes = [node for node in run.steps["node"].drop_duplicates()] if len(run.steps) else []
    with plt.rc_context(_RC):
        figure, panels = plt.subplots(
            len(links) + 1, 1, sharex=True, layout="constrained", squeeze=False,
            figsize=(7.5, 1.0 + 1.3 * len(links) + 0.35 * max(1, len(nodes))),
            height_ratios=[3] * len(links) + [max(1, len(nodes))],
        )  # fmt: skip
        for panel, link in zip(panels[:, 0], links, strict=False):
            rows = use[use["link"] == link]
            rate, unit = (rows["bytes_per_s"] / 1e9, "GB/s") if rows["bytes_per_s"].max() >= 1e8 else (rows["bytes_per_s"] / 1e6, "MB/s")
            panel.fill_between(rows["at_s"], rate, step="post", color="#0072B2", alpha=0.35, linewidth=0)
            panel.step(rows["at_s"], rate, where="post", color="#0072B2", linewidth=0.8)
            sent = run.transfers[link_names(run.transfers) == link]
            panel.set_title(f"{link}: {sent['bytes'].sum() / 1e6:.1f} MB in {len(sent)} pieces", fontsize=8, loc="left")
            panel.set(ylabel=unit)
            panel.set_ylim(bottom=0)
        last = panels[-1, 0]
        for y, node in enumerate(nodes):
            own = run.steps[run.steps["node"] == node]
            spans = list(zip(own["start_s"], own["end_s"] - own["start_s"], strict=True))
            last.broken_barh(spans, (y - 0.4, 0.8), color="#E69F00" if str(node).startswith("prefill") else "#56B4E9")
        last.set_yticks(range(len(nodes)), [f"{node} steps" for node in nodes])
        last.set(xlabel="time since the first request (s)", ylim=(len(nodes) - 0.4, -0.6))
    return _done(figure)


FIGURES: dict[str, Callable[[Timeline], Figure]] = {
    "layer_lanes": layer_lanes,
    "request_gantt": request_gantt,
    "ttft_decomposition": ttft_decomposition,
    "link_utilisation": link_utilisation,
}


def _most_interesting(run: Timeline) -> str | None:
    own = run.transfers[run.transfers["request_id"].isin(run.measured["request_id"])]
    own = own if len(own) else run.transfers
    return None if not len(own) else str(own.groupby("request_id", sort=False).size().idxmax())


def _compute_end(run: Timeline, row: Any) -> float:
    pieces = run.transfers
    same = (pieces["request_id"] == row.request_id) & (pieces["index"] == row.index) & (pieces["src_rank"] == row.src_rank)
    own = pieces[same]
    return float(own["compute_end_s"].iloc[0])


def _bar(axes: Axes, y: float, start: float, end: float, height: float, style: Sequence[str], scale: float = 1e3) -> None:
    if end > start:
        axes.barh(
            y, (end - start) * scale, left=start * scale, height=height, color=style[0], hatch=style[1], edgecolor="#555555", linewidth=0.3
        )


def _legend(figure: Figure, styles: dict[str, Sequence[str]]) -> None:
    handles = [Patch(facecolor=s[0], hatch=s[1], edgecolor="#555555", linewidth=0.3, label=name) for name, s in styles.items()]
    if handles:
        columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.75)))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _done(figure: Figure) -> Figure:
    plt.close(figure)
    return figure
