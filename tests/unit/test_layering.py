"""Who may import whom: docs/architecture.md, "Floors". Read from the source, so a lazy import counts as one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ksana_lab"
FLOORS = [
    {"types", "errors", "log", "process"},
    {"config", "protocol", "metrics", "cuda_driver"},
    {"core", "tracing", "attention"},
    {"layers"},
    {"models", "transfer", "router", "server", "workload"},
    {"engine", "cluster"},
    {"sweep", "bench", "launch"},
    {"notebook"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
TORCH_FREE = ("core", "tracing", "router", "server", "workload", "cluster")
STRICTER = {"layers": {"attention", "cuda_driver", *FLOORS[0]}}  # layers never see a configuration or a scheduler

SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    """ksana_lab/router/app.py -> router; ksana_lab/launch.py -> launch."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module named by an import anywhere in the file, also in functions and under TYPE_CHECKING, also as "module:Class" text."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_lazy_name(node.value):
            names.add(node.value.partition(":")[0])
    return names


def _is_lazy_name(text: str) -> bool:
    module, colon, name = text.partition(":")
    return bool(colon) and module.startswith("ksana_lab.") and name.isidentifier()


def forbidden_imports(path: Path) -> list[str]:
    part = part_of(path)
    mine = {m.split(".")[1] for m in imported_modules(ast.parse(path.read_text())) if m.startswith("ksana_lab.")} - {part}
    mine.discard("__version__")
    allowed = STRICTER.get(part, {name for name in mine if FLOOR.get(name, 99) < FLOOR[part]})
    return [f"{path.relative_to(PACKAGE.parent)} imports {name}" for name in sorted(mine - allowed)]


def test_every_part_stands_on_a_floor():
    assert {part_of(path) for path in SOURCES} <= set(FLOOR)


@pytest.mark.parametrize("part", sorted({part_of(path) for path in SOURCES} & set(FLOOR)))
def test_a_part_imports_only_lower_floors(part):
    assert [fault for path in SOURCES if part_of(path) == part for fault in forbidden_imports(path)] == []


def test_package_files_are_empty_but_the_root():
    filled = [str(path) for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()]
    assert filled == []


@pytest.mark.parametrize("part", [part for part in TORCH_FREE if (PACKAGE / part).is_dir()])
def test_a_torch_free_part_never_loads_torch(part):
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in SOURCES
        if part_of(path) == part and path.name not in ("__init__.py", "__main__.py")
    ]
    program = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_the_rule_sees_what_it_should(tmp_path, monkeypatch):
    """The test above can fail: a lazy import, a TYPE_CHECKING import and a registry entry of a higher floor are all found."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    bad = tmp_path / "core" / "x.py"
    bad.parent.mkdir()
    lines = ("def f():", "    from ksana_lab.engine import a", "if TYPE_CHECKING:", "    import ksana_lab.router.app")
    bad.write_text("\n".join((*lines, "T = {'n': 'ksana_lab.models.m:C'}")))
    assert [fault.split()[-1] for fault in forbidden_imports(bad)] == ["engine", "models", "router"]
