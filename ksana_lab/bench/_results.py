"""The files of ``docs/results``: named figures with where and when they were measured; newer ones replace older ones of their name."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass
class Row:
    name: str
    unit: str
    floor: float | None
    ours: float

    @property
    def ratio(self) -> float | None:
        """How many times the floor (of a throughput: how many times below its ceiling)."""
        if not self.floor or not self.ours:
            return None
        return self.floor / self.ours if self.unit.endswith("/s") else self.ours / self.floor


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Add ``rows`` to the file, newer ones in the place of those of the same name."""
    kept = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    kept.update({row.name: asdict(row) for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "CPU"
    machine = f"{where}, torch {torch.__version__}"
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "commit": _commit(), "rows": list(kept.values())}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    """Of the working tree; COMMIT from the environment where it is no repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("COMMIT", "unknown")
