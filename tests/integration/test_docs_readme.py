"""The README's cell runs as it stands."""

import re
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
@pytest.mark.timeout(180)
def test_the_readmes_cell_runs(capsys):
    matplotlib.use("agg")
    cell = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    assert len([line for line in cell.splitlines() if line.strip()]) <= 11
    few = cell.replace("num_requests=40", "num_requests=4")
    assert few != cell
    names: dict = {}
    exec(few, names)
    assert all(record.is_ok for records in names["systems"].values() for record in records)
    assert "TTFT p50 (ms)" in capsys.readouterr().out
