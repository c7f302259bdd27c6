"""``python -m ksana_lab.sweep.archive runs/h200_2gpu docs/results/h200_2gpu/runs.tar.xz``: a sweep's folder in one small file, from which
all its figures can be made again and judged by other bounds.

Holds the definition, and of every run in it the point, the workload, software and hardware, and the records: all times, no tokens or texts.
Logs, events, what can be made from records, and what names a machine or its folders stay behind. Unpacked it is a folder as any other:
``tar xf runs.tar.xz -C runs``."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import RECORDS_VERSION, load_records
from ksana_lab.sweep.store import MANIFEST, read_environment, read_manifest

_FILES = ("point.json", "workload.yaml", "report.json")
_ENVIRONMENT = ("code_version", "git_commit", "git_dirty", "python", "versions", "cpu", "num_usable_cores", "gpus")


def pack(folder: str | Path, file: str | Path) -> int:
    """Writes ``file``, the same bytes for the same folder; the number of runs. Raises ConfigError for a folder that holds no sweep."""
    folder, file = Path(folder), Path(file)
    manifest = read_manifest(folder)
    runs = [folder / "runs" / run_id for run_id in manifest.run_ids if (folder / "runs" / run_id).is_dir()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as archive:
        _add(archive, f"{manifest.name}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        for run in runs:
            for name, content in _contents(run):
                _add(archive, f"{manifest.name}/runs/{run.name}/{name}", content)
    return len(runs)


def _contents(run: Path) -> Iterator[tuple[str, bytes]]:
    for name in _FILES:
        if (run / name).is_file():
            yield name, (run / name).read_bytes()
    environment = read_environment(run.parents[1], run.name)
    yield "environment.json", json.dumps({name: environment[name] for name in _ENVIRONMENT if name in environment}, indent=1).encode()
    yield "records.jsonl", _without_tokens(run / "records.jsonl")


def _without_tokens(path: Path) -> bytes:
    """Times to the microsecond: what the client's clock is good for, and half as many bytes."""
    records = load_records(path)
    for record in records:
        record.output_token_ids = record.text = None
        record.token_times_s = [round(at_s, 6) for at_s in record.token_times_s]
    lines = [json.dumps({"ksana_lab_records": RECORDS_VERSION}), *(json.dumps(record.to_dict()) for record in records)]
    return "".join(f"{line}\n" for line in lines).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.sweep.archive", description="A sweep's folder in one small file.")
    parser.add_argument("folder", type=Path, help="for example runs/h200_2gpu")
    parser.add_argument("file", type=Path, help="for example docs/results/h200_2gpu/runs.tar.xz")
    options = parser.parse_args(arguments)
    try:
        num_runs = pack(options.folder, options.file)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.file}: {num_runs} runs, {options.file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
