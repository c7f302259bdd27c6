"""Every notebook runs from top to bottom on a CPU, holds no definitions and is kept without outputs."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT_S = 120


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_notebook_runs_from_top_to_bottom(notebook):
    NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS[0].parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for cell in notebook.cells:
        if cell.source.endswith("different_tokens(mixed, disaggregated)"):
            assert cell.outputs[-1].data["text/plain"] == "[]"


def test_prose_comes_first_and_cells_are_short(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert max(len(source.splitlines()) for source in code_cells(notebook)) <= 15


def test_a_notebook_defines_nothing(notebook):
    trees = [ast.parse(source) for source in code_cells(notebook)]
    definitions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    assert definitions == []


def test_outputs_are_stripped(notebook):
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
