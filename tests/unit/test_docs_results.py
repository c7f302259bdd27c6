"""docs/results.md says what its records say, by the command that it names."""

import re
import shlex
import tarfile
from pathlib import Path

from ksana_lab.notebook.study import main

DOCS = Path(__file__).parents[2] / "docs"
SECTION = re.compile(r"<!-- study h200_2gpu -->.*<!-- end of h200_2gpu -->", re.DOTALL)


def test_the_study_of_two_gpus_is_that_of_its_records(tmp_path):
    page = (DOCS / "results.md").read_text()
    with tarfile.open(DOCS / "results" / "h200_2gpu" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    command = re.search(r"notebook\.study runs/h200_2gpu --out docs/results\.md (.*?)\n\n", page, re.DOTALL)
    bounds = shlex.split(command[1].replace("\\\n", " "))
    assert main([str(tmp_path / "h200_2gpu"), "--out", str(tmp_path / "results.md"), *bounds]) == 0
    assert SECTION.search((tmp_path / "results.md").read_text())[0] == SECTION.search(page)[0]
