"""Records out of memory and back: a tidy table, CSV and Parquet, JSON lines, and the result JSON of ``vllm bench serve``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from ksana_lab.errors import ConfigError
from ksana_lab.metrics import latency
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import Distribution, Summary, is_cancelled

INSTALL_PARQUET = "pip install 'ksana_lab[parquet]'"
RECORDS_VERSION = 1  # of the JSON-lines file; changes when RequestRecord's fields change meaning


def to_frame(records: Iterable[RequestRecord], **columns: Any) -> pd.DataFrame:
    """One row per request: ids, counts, every per-request metric in seconds, what was sent of its KV where that is known, labels, and
    ``columns`` repeated in each row."""
    return pd.DataFrame([_row(r, columns) for r in records])


def gaps_frame(records: Iterable[RequestRecord], **columns: Any) -> pd.DataFrame:
    """One row per message after the first of every completed request: request_id, position of the message, itl_s. What a CDF of ITL is
    drawn from."""
    rows = [
        {"request_id": r.request_id, "message": i, "itl_s": gap, **r.labels, **columns}
        for r in records
        if r.is_ok
        for i, gap in enumerate(latency.itl_s(r), start=1)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["request_id", "message", "itl_s"])


def _row(record: RequestRecord, columns: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "request_id": record.request_id,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_output_tokens": record.num_output_tokens,
        "scheduled_s": record.scheduled_s,
        "sent_s": record.sent_s,
        "finished_s": record.finished_s,
        "finish_reason": record.finish_reason,
        "error": record.error,
        "is_ok": record.is_ok,
        "is_cancelled": is_cancelled(record),
    }
    row.update({name: function(record) for name, function in latency.PER_REQUEST.items()})
    if record.transfer:
        row |= record.transfer | {"hidden_fraction": latency.hidden_fraction(record)}
    return row | record.labels | columns


def summary_row(summary: Summary, **columns: Any) -> dict[str, Any]:
    """A run as one row of a tidy table: counts, throughputs, ``<metric>_<statistic>`` in seconds, goodput and attainment, ``columns``.

    What the sweep plots read; ``pd.DataFrame([summary_row(...), ...])`` has a row per run."""
    row = {f.name: value for f in fields(summary) if isinstance(value := getattr(summary, f.name), (int, float))}
    for f in fields(summary):
        values = getattr(summary, f.name)
        if isinstance(values, Distribution):
            row |= {f"{f.name}_{statistic}": getattr(values, statistic) for statistic in ("mean", "p50", "p90", "p95", "p99")}
    return row | columns


def write_csv(frame: pd.DataFrame, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return path


def write_parquet(frame: pd.DataFrame, path: str | Path) -> Path:
    """A column of several types (an axis with ``unset`` beside numbers) becomes text. Raises ConfigError when pyarrow is not installed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not has_parquet():
        raise ConfigError(f"Parquet needs pyarrow: {INSTALL_PARQUET}; or write CSV")
    mixed = [name for name in frame.columns if frame[name].dropna().map(type).nunique() > 1]
    frame.assign(**{name: frame[name].map(str, na_action="ignore") for name in mixed}).to_parquet(path, index=False)
    return path


def has_parquet() -> bool:
    return importlib.util.find_spec("pyarrow") is not None


def save_records(records: Iterable[RequestRecord], path: str | Path) -> Path:
    """JSON lines; the first says which version the rest is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"ksana_lab_records": RECORDS_VERSION}) + "\n")
        for record in records:
            file.write(json.dumps(record.to_dict()) + "\n")
    return path


def load_records(path: str | Path) -> list[RequestRecord]:
    """Raises ConfigError when the file is missing, is no records file, or is one of another version."""
    path = Path(path)
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        version = json.loads(header).get("ksana_lab_records")
    except OSError as error:
        raise ConfigError(f"cannot read records {path}: {error.strerror}") from error
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is not a records file of ksana_lab: its first line is no header") from None
    if version != RECORDS_VERSION:
        raise ConfigError(f"{path} holds records of version {version}; this ksana_lab reads version {RECORDS_VERSION}: measure again")
    try:
        return [RequestRecord.from_dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds a line that is no request record: {error}") from None


def vllm_result(records: Sequence[RequestRecord], summary: Summary) -> dict[str, Any]:
    """The keys of ``vllm bench serve --save-result --save-detailed``; latencies in milliseconds, lists in seconds as vLLM has them.

    Every record has one place in ``input_lens``, ``output_lens``, ``ttfts``, ``itls``, ``generated_texts``, ``errors``, in the order given.
    As in vLLM, a request that did not complete failed, also one that the client cut off on purpose, and has 0 output tokens, so that
    ``completed`` and ``failed`` add up to ``num_prompts`` and ``output_lens`` to ``total_output_tokens``."""
    result: dict[str, Any] = {
        "num_prompts": summary.num_requests,
        "completed": summary.num_completed,
        "failed": summary.num_failed + summary.num_cancelled,
        "duration": summary.duration_s,
        "total_input_tokens": summary.num_prompt_tokens,
        "total_output_tokens": summary.num_output_tokens,
        "request_throughput": summary.request_throughput_rps,
        "request_goodput": summary.goodput_rps,
        "output_throughput": summary.output_throughput_tps,
        "total_token_throughput": summary.total_throughput_tps,
    }
    for name, values in (("ttft", summary.ttft_s), ("tpot", summary.tpot_s), ("itl", summary.itl_s), ("e2el", summary.e2e_s)):
        result |= _milliseconds(name, values)
    result["input_lens"] = [r.num_prompt_tokens for r in records]
    result["output_lens"] = [r.num_output_tokens if r.is_ok else 0 for r in records]
    result["ttfts"] = [latency.ttft_s(r) or 0.0 for r in records]  # vLLM writes 0.0 for a request without a first token
    result["itls"] = [latency.itl_s(r) for r in records]
    result["generated_texts"] = [r.text or "" for r in records]
    result["errors"] = [r.error or "" for r in records]
    return result


def _milliseconds(name: str, values: Distribution) -> dict[str, float]:
    kinds = {"mean": values.mean, "median": values.median, "std": values.std, "p90": values.p90, "p95": values.p95, "p99": values.p99}
    return {f"{kind}_{name}_ms": 1e3 * value for kind, value in kinds.items()}
