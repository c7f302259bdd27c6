"""A sweep's folder travels in one file: the same tables come out of it, and nothing of the machine goes along."""

import json
import tarfile

import pandas as pd
import pytest
from helpers_sweep import fake_sweep

from ksana_lab.sweep.archive import main, pack
from ksana_lab.sweep.report import load_requests, load_results


@pytest.fixture
def folder(tmp_path):
    fake_sweep(tmp_path, axes={"rate": [2, 8]}).run_sync(progress=False)
    return tmp_path / "out"


@pytest.fixture
def unpacked(folder, tmp_path):
    assert pack(folder, tmp_path / "runs.tar.xz") == 4
    with tarfile.open(tmp_path / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "sweep"


def test_the_same_tables_come_out_of_it(folder, unpacked):
    for load, differs in ((load_results, ["folder"]), (load_requests, [])):
        pd.testing.assert_frame_equal(load(unpacked).drop(columns=differs), load(folder).drop(columns=differs), atol=2e-6, rtol=0)


def test_neither_tokens_nor_the_machine_s_names_go_along(folder, unpacked, tmp_path):
    environment = json.loads(next(folder.glob("runs/*/environment.json")).read_text())
    texts = [path.read_text() for path in unpacked.rglob("*") if path.is_file()]
    assert not any(str(tmp_path) in text or f'"{environment["host"]}"' in text for text in texts)
    assert all('"output_token_ids": null' in line for path in unpacked.rglob("records.jsonl") for line in path.read_text().splitlines()[1:])


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        pack(folder, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_without_a_sweep_is_told_in_a_line(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "a.tar.xz")]) == 2 and capsys.readouterr().err.startswith("error: ")
