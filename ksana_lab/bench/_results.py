"""The files of ``docs/results``: named figures, each with where and when it was measured; newer ones replace older ones of their name."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ksana_lab.errors import ConfigError

_ORIGIN = ("date", "machine", "commit")


@dataclass
class Row:
    name: str
    unit: str
    floor: float | None
    ours: float
    note: str = ""  # what takes trust from the figure

    @property
    def ratio(self) -> float | None:
        """How many times the floor (of a throughput: how many times below its ceiling)."""
        if not self.floor or not self.ours:
            return None
        return self.floor / self.ours if self.unit.endswith("/s") else self.ours / self.floor


def write_results(path: Path, rows: Sequence[Row], device: str) -> None:
    """Add ``rows``, measured now on ``device`` ("cuda" or "cpu"), newer ones in the place of those of the same name; the others keep their
    own date, machine and commit. Raises ConfigError as ``check_machine``."""
    check_machine(path, device)
    origin = dict(zip(_ORIGIN, (datetime.date.today().isoformat(), machine_of(device), _commit()), strict=True))
    kept = {row["name"]: row for row in read_rows(path)} if path.exists() else {}
    kept.update({row.name: _fields(row) | origin for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": list(kept.values())}, indent=1) + "\n", encoding="utf-8")


def _fields(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "note" or value}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row with date, machine and commit: its own, or the file's where they were once noted for all rows together."""
    found = json.loads(path.read_text(encoding="utf-8"))
    of_file = {name: found[name] for name in _ORIGIN if name in found}
    return [of_file | row for row in found["rows"]]


def check_machine(path: Path, device: str) -> None:
    """To be asked before anything is measured. Raises ConfigError where the file holds figures of another kind of machine."""
    here = _kind(machine_of(device))
    others = {_kind(row["machine"]) for row in read_rows(path) if "machine" in row} - {here} if path.exists() else set()
    if others:
        raise ConfigError(f"{path} holds figures of {', '.join(sorted(others))}, and this is {here}: name another file")


def machine_of(device: str) -> str:
    where = "CPU" if device == "cpu" else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{where}, torch {torch.__version__}"


def _kind(machine: str) -> str:
    """Without the number of GPUs and torch's version: "NVIDIA H200", "CPU"."""
    return machine.partition(", torch")[0].rpartition(" x ")[2]


def _commit() -> str:
    """Of the working tree; COMMIT from the environment where it is no repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("COMMIT", "unknown")
