"""Figures in a file keep where and when they were measured, whoever writes beside them."""

import json
from pathlib import Path

import pytest

from ksana_lab.bench import __main__ as bench
from ksana_lab.bench import _results
from ksana_lab.bench._results import Row, read_rows, write_results
from ksana_lab.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def old_file(path: Path, machine: str) -> Path:
    """As they were: one date, machine and commit for all rows."""
    row = {"name": "a", "unit": "ms", "floor": 1.0, "ours": 2.0}
    path.write_text(json.dumps({"date": "2026-01-02", "machine": machine, "commit": "abc", "rows": [row]}))
    return path


def test_a_row_that_is_kept_keeps_its_date_machine_and_commit(tmp_path, monkeypatch):
    file = old_file(tmp_path / "x.json", "CPU, torch 1.0")
    monkeypatch.setattr(_results, "_commit", lambda: "def")
    write_results(file, [Row("b", "ms", None, 3.0)], "cpu")
    old, new = read_rows(file)
    assert (old["date"], old["machine"], old["commit"]) == ("2026-01-02", "CPU, torch 1.0", "abc")
    assert new["date"] > "2026-01-02" and new["machine"].startswith("CPU, torch ") and new["commit"] == "def"


def test_a_run_on_a_cpu_does_not_touch_figures_of_a_gpu(tmp_path):
    file = old_file(tmp_path / "x.json", "1 x and 2 x NVIDIA H200, torch 2.11.0+cu130")
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"holds figures of NVIDIA H200, and this is CPU: name another file"):
        write_results(file, [Row("a", "ms", 1.0, 9.0)], "cpu")
    assert file.read_text() == before


def test_another_number_of_the_same_gpus_is_no_other_kind(tmp_path, monkeypatch):
    file = old_file(tmp_path / "x.json", "1 x and 2 x NVIDIA H200, torch 2.11.0+cu130")
    monkeypatch.setattr(_results, "machine_of", lambda device: "1 x NVIDIA H200, torch 2.12.0")
    write_results(file, [Row("b", "ms", None, 3.0)], "cuda")
    assert [row["machine"][:8] for row in read_rows(file)] == ["1 x and ", "1 x NVID"]


@pytest.mark.parametrize("command", ["engine --trial", "preempt --trial", "transfer --device cpu"])
def test_a_tool_refuses_the_file_before_it_measures(command, tmp_path, capsys):
    file = old_file(tmp_path / "x.json", "2 x NVIDIA H200, torch 2.11.0+cu130")
    assert bench.main([*command.split(), "--json", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "name another file" in err and not out


@pytest.mark.parametrize("name", ["engine", "transfer"])
def test_the_figures_of_the_documentation_are_read(name):
    assert {row["machine"].rpartition(" x ")[2] for row in read_rows(RESULTS / f"{name}.json")} == {"NVIDIA H200, torch 2.11.0+cu130"}
