"""Readers for recorded workloads: when requests came, how long they were, which prefixes they shared.

- azure: CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Patel et al., Splitwise, ISCA 2024)
- mooncake: JSON lines with timestamp (ms), input_length, output_length, hash_ids of 512 tokens each (Qin et al., Mooncake, FAST 2025)
- burstgpt: CSV with Timestamp (s), Request tokens, Response tokens (Wang et al., BurstGPT, KDD 2025)
- sharegpt: JSON conversations, of which the first human turn and the answer to it; holds text, so it needs a tokenizer

CSV columns are found by name. What cannot be used is an error that names file, row and field; BurstGPT's failed requests (0 response
tokens) and ShareGPT's unanswered ones are left out and counted. Knows nothing of scaling, clipping or vocabulary: see spec.py."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from ksana_lab.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
FORMATS = ("azure", "mooncake", "burstgpt", "sharegpt")

# Shipped with the package; ksana_lab/workload/data/README.md has attribution and licences.
BUNDLED = {
    "azure_llm_2023_conv_sample": "azure_llm_2023_conv_sample.csv",
    "mooncake_synthetic_sample": "mooncake_synthetic_sample.jsonl",
}

Encode = Callable[[str], list[int]]  # text -> token ids


@dataclass(frozen=True)
class TraceRow:
    at_s: float  # since the trace's own zero
    prompt_tokens: int
    output_tokens: int  # 0 where the recorded answer was empty
    hash_ids: tuple[int, ...] = ()  # one per block of the prompt; equal ids = equal tokens
    prompt_token_ids: tuple[int, ...] | None = None  # of a trace that holds text


@dataclass(frozen=True)
class Trace:
    name: str
    rows: list[TraceRow]  # in order of at_s
    block_tokens: int = 0  # tokens per hash id; 0 = no hash ids
    num_dropped: int = 0  # rows that were no usable request
    has_timestamps: bool = True


def read_trace(path: str | Path, format: str | None = None, *, encode: Encode | None = None) -> Trace:
    """``path`` is a file or a name in ``BUNDLED``; ``format`` None = from the file's columns or suffix. Raises ConfigError."""
    file = resolve(path)
    kind = format or guess_format(file)
    if kind not in FORMATS:
        raise ConfigError(f"trace format {kind!r} is unknown; known: {', '.join(FORMATS)}")
    try:
        trace = _READERS[kind](file, encode)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read trace {file}: {error}") from error
    if not trace.rows:
        raise ConfigError(f"{file}: holds no usable request ({kind}, {trace.num_dropped} rows left out)")
    return replace(trace, rows=sorted(trace.rows, key=lambda row: row.at_s))


def resolve(path: str | Path) -> Path:
    """The file of a path or of a bundled name. Raises ConfigError when there is none."""
    name = str(path)
    file = Path(__file__).parent / "data" / BUNDLED[name] if name in BUNDLED else Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(f"trace {name!r} is no file, and no bundled trace ({', '.join(BUNDLED)})")
    return file


def guess_format(file: Path) -> str:
    """From the suffix, and for CSV from the header. Raises ConfigError when neither tells."""
    if file.suffix in (".jsonl", ".json"):
        return "mooncake" if file.suffix == ".jsonl" else "sharegpt"
    with file.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream), [])
    for kind, columns in (("azure", _AZURE), ("burstgpt", _BURSTGPT)):
        if set(columns) <= set(header):
            return kind
    raise ConfigError(f"{file}: columns {header} are neither Azure's {list(_AZURE)} nor BurstGPT's {list(_BURSTGPT)}; name them so")


# ---- one reader per format -------------------------------------------------------------------------------------------

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")


def _azure(file: Path, encode: Encode | None) -> Trace:
    rows, start = [], None
    for where, row in _csv_rows(file, _AZURE):
        at = _wall_clock_s(row["TIMESTAMP"], where)
        start = at if start is None else start
        rows.append(TraceRow(at - start, _tokens(row, "ContextTokens", where, least=1), _tokens(row, "GeneratedTokens", where)))
    return Trace(file.stem, rows)


def _burstgpt(file: Path, encode: Encode | None) -> Trace:
    rows, num_dropped = [], 0
    for where, row in _csv_rows(file, _BURSTGPT):
        prompt, output = _tokens(row, "Request tokens", where), _tokens(row, "Response tokens", where)
        at = _number(row["Timestamp"], "Timestamp", where)
        if prompt and output:
            rows.append(TraceRow(at, prompt, output))
        else:
            num_dropped += 1
    return Trace(file.stem, rows, num_dropped=num_dropped)


def _mooncake(file: Path, encode: Encode | None) -> Trace:
    rows = []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                rows.append(_mooncake_row(line, f"{file}, line {number}"))
    return Trace(file.stem, rows, block_tokens=MOONCAKE_BLOCK_TOKENS)


def _mooncake_row(line: str, where: str) -> TraceRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    _require(row if isinstance(row, dict) else {}, ("timestamp", "input_length", "output_length"), where)
    hash_ids = row.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in hash_ids):
        raise ConfigError(f"{where}: hash_ids must be a list of integers")
    prompt = _tokens(row, "input_length", where, least=1)
    if hash_ids and not (len(hash_ids) - 1) * MOONCAKE_BLOCK_TOKENS < prompt <= len(hash_ids) * MOONCAKE_BLOCK_TOKENS:
        raise ConfigError(f"{where}: {len(hash_ids)} hash_ids of {MOONCAKE_BLOCK_TOKENS} tokens do not cover input_length {prompt}")
    at_s = _number(row["timestamp"], "timestamp (milliseconds)", where) / 1e3
    return TraceRow(at_s, prompt, _tokens(row, "output_length", where), tuple(hash_ids))


def _sharegpt(file: Path, encode: Encode | None) -> Trace:
    if encode is None:
        raise ConfigError(
            f"{file} is read as ShareGPT, which holds text: set trace.tokenizer_dir to the directory of the model that will answer it "
            "(a Mooncake trace is JSON lines and ends in .jsonl)"
        )
    try:
        conversations = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    if not isinstance(conversations, list):
        raise ConfigError(f"{file}: a ShareGPT file is a list of conversations, this is {type(conversations).__name__}")
    rows, num_dropped = [], 0
    for number, conversation in enumerate(conversations):
        question, answer = _first_exchange(conversation, f"{file}, conversation {number}")
        ids, output = encode(question), len(encode(answer))
        if ids and output:
            rows.append(TraceRow(0.0, len(ids), output, prompt_token_ids=tuple(ids)))
        else:
            num_dropped += 1
    return Trace(file.stem, rows, num_dropped=num_dropped, has_timestamps=False)


def _first_exchange(conversation: Any, where: str) -> tuple[str, str]:
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise ConfigError(f"{where}: needs 'conversations', a list of {{'from', 'value'}}")
    for asked, answered in pairwise(turns):
        if asked.get("from") in ("human", "user") and answered.get("from") in ("gpt", "chatgpt", "assistant", "bing", "bard"):
            return asked["value"], answered["value"]
    return "", ""


_READERS: dict[str, Callable[[Path, Encode | None], Trace]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "burstgpt": _burstgpt,
    "sharegpt": _sharegpt,
}


# ---- fields ----------------------------------------------------------------------------------------------------------


def _csv_rows(file: Path, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line n", row by column name)."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        header = reader.fieldnames or []
        missing = [c for c in columns if c not in header]
        if missing:
            raise ConfigError(f"{file}: column {missing[0]!r} is missing; the file has {list(header)}")
        for row in reader:
            yield f"{file}, line {reader.line_num}", row


def _require(row: dict[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in row:
            raise ConfigError(f"{where}: field {name!r} is missing; the row has {sorted(row)}")


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {name} must be a number, got {value!r}") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{where}: {name} must not be negative, got {value!r}")
    return number


def _tokens(row: dict[str, Any], name: str, where: str, *, least: int = 0) -> int:
    number = _number(row[name], name, where)
    if number != int(number) or number < least:
        raise ConfigError(f"{where}: {name} must be a whole number of at least {least} tokens, got {row[name]!r}")
    return int(number)


def _wall_clock_s(text: str, where: str) -> float:
    """Azure writes seven digits of a second, and in 2024 a time zone; Python 3.10 parses exactly six."""
    day, _, rest = (text or "").strip().partition(".")
    zone = next((i for i, c in enumerate(rest) if not c.isdigit()), len(rest))
    digits, suffix = rest[:zone], rest[zone:]
    try:
        at = datetime.fromisoformat(f"{day}.{digits[:6]:0<6}{suffix}")
    except ValueError:
        raise ConfigError(f"{where}: TIMESTAMP {text!r} is not like 2023-11-16 18:15:46.6805900") from None
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp()
