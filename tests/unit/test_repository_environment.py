"""The files that set a machine up say the same thing."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_names_what_pyproject_needs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    needed = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    assert sorted(pip) == sorted([*needed, "-e ."])


def test_environment_yml_holds_no_hashes_or_exact_builds():
    text = (ROOT / "environment.yml").read_text()
    assert not re.search(r"sha256|==", text)


def test_the_pinned_torch_is_one_the_package_accepts():
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    accepted = re.search(r"torch>=(\d+)\.(\d+)", " ".join(project()["dependencies"]))
    assert pinned and accepted
    assert tuple(map(int, pinned.groups())) >= tuple(map(int, accepted.groups()))
