"""Which rows of a frame are repeats of one configuration, and what a configuration is called. Knows nothing of figures.

A row says of what it is (system, split, the sweep's axes), which repeat, and what was measured. Only rows that agree in all of the first
may be averaged; everything else belongs into curves, bars and points of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd

from ksana_lab.metrics.latency import PER_REQUEST
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import Summary
from ksana_lab.workload.spec import WorkloadSpec

_OF_GOODPUT = {"min_rate", "max_rate", "num_rates"}
_MEASURED = frozenset({f.name for kind in (Summary, RequestRecord) for f in fields(kind)} | set(PER_REQUEST) | _OF_GOODPUT)
# A unit at the end (``loop_lag_p99_s``, ``per_gpu``), a statistic of a time (``ttft_s_p90``), a bound of an interval.
_MEASURED_PATTERN = re.compile(r"goodput|.*(_m?s|_us|_rps|_tps|_per_gpu|_low|_high)$|.*_s_(mean|std|max|p\d+)$")
_ABOUT_THE_RUN = frozenset({"run_id", "repeat", "seed", "folder", "code_version", "num_gpus", "index", "client_lagged"})
_FOLLOW_FROM_OTHERS = ("system", "transfer_mode")  # where the split and the axes do not settle them, they count
_NO_TRANSFER = ("transfer_mode", "none")  # of mixed nodes


def groups(
    frame: pd.DataFrame, by: str, *, without: Collection[str] = (), sweep_axes: Sequence[str] | None = None
) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of each configuration, in the order of the rows: what ``by`` calls it, and every other column that tells it from another
    one. ``without``: columns that vary inside a group (the x of a curve). ``sweep_axes``: the columns that may tell configurations apart
    beside system and split; None = those that the frame names (``load_results``), or else whatever is neither a measurement nor about one
    run or request."""
    sweep_axes = frame.attrs.get("axes") if sweep_axes is None else sweep_axes
    keys, inside = [by], [name for name in without if name in frame]
    for column in _candidates(frame, sweep_axes):
        known = [*keys, *inside] if column in _FOLLOW_FROM_OTHERS else keys
        if column not in (by, *without) and _num_kinds(frame, [*known, column]) > _num_kinds(frame, known):
            keys.append(column)
    return [(_name(keys, values), rows) for values, rows in frame.groupby(keys, sort=False, dropna=False)]


def _candidates(frame: pd.DataFrame, sweep_axes: Sequence[str] | None) -> list[str]:
    """Those that people named come first: of two columns that say the same, the first is kept."""
    found = list(sweep_axes) if sweep_axes is not None else [str(column) for column in frame.columns if _is_setting(frame, str(column))]
    order = ["split", *(name for name in found if name not in ("split", *_FOLLOW_FROM_OTHERS)), "system"]
    order += ["transfer_mode"] if "transfer_mode" in found else []
    return [name for name in order if name in frame and name != "num_requests"]  # which goes with the rate


def _is_setting(frame: pd.DataFrame, name: str) -> bool:
    if name in _ABOUT_THE_RUN or name in _MEASURED or name.startswith("is_"):
        return False
    if "." not in name and name not in WorkloadSpec.model_fields and _MEASURED_PATTERN.match(name):
        return False
    if pd.api.types.is_float_dtype(frame[name]) and any(value != float(f"{value:.6g}") for value in frame[name].dropna()):
        return False  # an axis was written by people, in few digits
    is_of_requests = "request_id" in frame
    return not is_of_requests or ("run_id" in frame and _num_kinds(frame, ["run_id", name]) == _num_kinds(frame, ["run_id"]))


def _num_kinds(frame: pd.DataFrame, columns: list[str]) -> int:
    return len(frame[columns].drop_duplicates())


def _name(keys: Sequence[str], values: Sequence[Any]) -> str:
    """``1P1D · layer · link=10``: a word speaks for itself, a number needs its axis."""
    (_, first), *rest = zip(keys, values, strict=True)
    known = [(key, value) for key, value in rest if not pd.isna(value) and (key, value) != _NO_TRANSFER]
    return " · ".join([_said(first), *(value if isinstance(value, str) else f"{key}={_said(value)}" for key, value in known)])


def _said(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
