"""A recording made small enough to keep: ``python -m ksana_lab.tracing.shrink FROM TO``.

Copies the logs and ``client.jsonl`` with the host's name left out, and of each report the tables and columns that nsys.py reads, with the
strings that they name, as ``<name>.sqlite.gz``. ``unpack`` makes a folder of it that ``timeline.load`` reads. Knows nothing of what it
copies."""

from __future__ import annotations

import gzip
import json
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ksana_lab.errors import ConfigError

_HOST = "host"
_TEXTS = ("textId", "shortName", "demangledName")  # columns that name a string
# Table -> columns; what a report lacks is left out.
_KEPT = {
    "NVTX_EVENTS": "start end eventType text textId domainId globalTid int64Value uint64Value",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start end shortName demangledName globalPid deviceId streamId correlationId",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start end globalPid deviceId streamId correlationId",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start end bytes copyKind srcDeviceId dstDeviceId globalPid deviceId streamId correlationId",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end globalTid correlationId",
    "TARGET_INFO_SESSION_START_TIME": "utcEpochNs",
}


def shrink(source: str | Path, target: str | Path) -> list[Path]:
    """The files written. Raises ConfigError when there is no log in ``source``."""
    source, target = Path(source), Path(target)
    logs = sorted(source.glob("*.jsonl"))
    if not logs:
        raise ConfigError(f"{source} holds no event log (*.jsonl)")
    target.mkdir(parents=True, exist_ok=True)
    written = [_copy_log(path, target / path.name) for path in logs]
    return [*written, *(_copy_report(path, target / f"{path.name}.gz") for path in sorted(source.glob("*.sqlite")))]


def unpack(source: str | Path, target: str | Path) -> Path:
    """``target``, with what ``shrink`` left in ``source`` as it is read."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in Path(source).iterdir():
        if path.suffix == ".gz":
            (target / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        elif path.suffix == ".jsonl":
            (target / path.name).write_bytes(path.read_bytes())
    return target


def _copy_log(source: Path, target: Path) -> Path:
    """Its first line names the host."""
    first, _, rest = source.read_text(encoding="utf-8").partition("\n")
    header = json.loads(first)
    if "host" in header.get("args", {}):
        header["args"]["host"] = _HOST
        first = json.dumps(header)
    target.write_text(f"{first}\n{rest}", encoding="utf-8")
    return target


def _copy_report(source: Path, target: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.sqlite"
        with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as old, closing(sqlite3.connect(small)) as new:
            there = {name for (name,) in old.execute("SELECT name FROM sqlite_master WHERE type='table'")}
            named: set[int] = set()
            for table in [name for name in _KEPT if name in there]:
                named |= _copy_table(old, new, table)
            if "StringIds" in there:
                new.execute("CREATE TABLE StringIds(id INTEGER, value TEXT)")
                rows = (row for row in old.execute("SELECT id, value FROM StringIds") if row[0] in named)
                new.executemany("INSERT INTO StringIds VALUES(?, ?)", rows)
            new.commit()
            new.execute("VACUUM")
        target.write_bytes(gzip.compress(small.read_bytes(), mtime=0))
    return target


def _copy_table(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> set[int]:
    """Ids of the strings that its rows name."""
    there = {row[1] for row in old.execute(f"PRAGMA table_info({table})")}
    columns = [column for column in _KEPT[table].split() if column in there]
    names = ", ".join(f'"{column}"' for column in columns)
    rows = old.execute(f"SELECT {names} FROM {table}").fetchall()
    new.execute(f"CREATE TABLE {table}({names})")
    new.executemany(f"INSERT INTO {table} VALUES({', '.join('?' * len(columns))})", rows)
    texts = [columns.index(column) for column in _TEXTS if column in columns]
    return {row[i] for row in rows for i in texts if row[i] is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2:
        print("usage: python -m ksana_lab.tracing.shrink FROM TO", file=sys.stderr)
        return 2
    try:
        files = shrink(*given)
    except (ConfigError, sqlite3.DatabaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given[1]}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
