"""Every notebook runs from top to bottom on a CPU, holds no definitions and is kept without outputs."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT_S = 120

# Put behind the cell that is tagged "parameters", the one that a researcher changes: the same notebook, less to measure.
_ONE_SPLIT = "axes.split={1P1D: {nodes.prefill.count: 1, nodes.decode.count: 1}}"
_SMALL_SWEEP = f"CHANGES = ['{_ONE_SPLIT}', 'axes.rate=[6]', 'duration_s=1.5', 'workload.num_warmup=2']"
SMALLER = {
    "01_one_node": "RATES, DURATION_S = [4, 12], 2",
    "02_disaggregate": "NUM_REQUESTS = 8",
    "03_layerwise_transfer": "NUM_REQUESTS = 8",
    "04_sweep_the_split": _SMALL_SWEEP,
    "05_read_your_results": _SMALL_SWEEP,  # finds what 04 left, or measures it
    "06_nsight_timeline": "NUM_REQUESTS = 6",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the notebooks keep goes to a folder of the test's own, the same for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSANA_LAB_RESULTS", str(tmp_path_factory.mktemp("results")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def make_smaller(notebook, parameters: str) -> None:
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(parameters))


def code_cells(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_notebook_runs_from_top_to_bottom(notebook, request, results):
    if parameters := SMALLER.get(request.node.callspec.id):
        make_smaller(notebook, parameters)
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


def test_it_runs_elsewhere_by_changing_one_cell(notebook):
    """The names of files, models and sizes stand in one cell at most; what follows only uses them."""
    named = [source for source in code_cells(notebook) if "config(" in source or "tiny_model()" in source]
    tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if not notebook.cells[0].source.startswith("# 00"):
        assert named == tagged or (named == [] and len(tagged) <= 1)


def test_outputs_are_stripped(notebook):
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
