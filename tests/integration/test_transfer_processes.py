"""Prefill and decode engines in two processes: one is killed in the middle of a transfer and comes back; the tool that measures them."""

import csv
import json

import pytest
from helpers_checkpoint import checkpoint, oracle_greedy, prompts

from ksana_lab.bench import transfer
from ksana_lab.bench._engines import Pair, left_of
from ksana_lab.types import SamplingParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
BATCH = prompts(4, seed=5, longest=60)


@pytest.mark.parametrize(("victim", "survivor"), [("prefill", "decode"), ("decode", "prefill")])
def test_a_node_killed_in_mid_transfer_takes_nothing_with_it_and_comes_back(victim, survivor):
    sections = {"cache": {"block_size": 8, "num_blocks": 160}, "runtime": {"num_threads": 1}}
    with Pair(checkpoint("qwen3"), device="cpu", connector={"link": {"bandwidth_gbps": 0.0005}}, **sections) as pair:
        failed: set[str] = set()
        for prompt in BATCH:
            number = pair.next_number()
            for role in ("prefill", "decode"):
                pair.add(role, number, prompt, GREEDY)
        pair.drive(lambda: pair.engines["prefill"].status().transfer["bytes_sent"] > 0)
        pair.engines[victim].kill()
        dead = pair.engines.pop(victim)
        note = lambda role, news: failed.update(update.request_id for update in news if update.error)  # noqa: E731
        pair.drive(lambda: not left_of(pair.engines[survivor].status()), on_updates=note)
        note(survivor, pair.engines[survivor].step())
        assert failed or survivor == "prefill"  # P has done its part for its clients
        pair.engines[victim] = dead
        pair.restart(victim)
        assert pair.generate(BATCH[:1], GREEDY) == [oracle_greedy("qwen3", tuple(BATCH[0]), GREEDY.max_tokens)]
        pair.wait_clean()


def test_the_bench_measures_every_part_and_writes_its_files(tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "figure")}
    options = [f"--{name}={path}" for name, path in files.items() if name != "figure"] + [f"--figure={tmp_path / 'out.png'}"]
    options += ["--device", "cpu", "--model", "qwen3-tiny", "--backend", "shm", "--mode", "bulk,layer", "--tokens", "64"]
    assert transfer.main([*options, "--gbps", "none,1", "--rounds", "1"]) == 0
    names = {row["name"] for row in json.loads(files["json"].read_text())["rows"]}
    assert {
        "bandwidth_ratio.bulk.64",
        "hidden_fraction.layer.64",
        "hidden_fraction.layer.64.1gbps",
        "prefill_slowdown_pct.layer.64",
    } <= names
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    check_links([numbers(row) for row in rows if row["part"] == "link"])
    check_overlaps([numbers(row) for row in rows if row["part"] == "overlap"])
    assert (tmp_path / "out.png").stat().st_size > 1000


def numbers(row):
    return {name: float(cell) for name, cell in row.items() if cell and cell[0] in "-0123456789"}


def check_links(rows):
    assert len(rows) == 2
    for row in rows:
        assert "post_ms" not in row and row["wire_ms"] == row["total_ms"] > 0  # by shm the post is the copy: not separable
        assert row["bandwidth_ratio"] == pytest.approx(row["reference_ms"] / row["wire_ms"]) and row["reference_ms"] > 0
        assert not {"hidden_fraction", "slowdown_pct", "exposed_ms"} & row.keys()


def check_overlaps(rows):
    assert [row.get("gbps") for row in rows] == [None, None, 1.0, 1.0]
    for row in rows:
        assert row["reference_ms"] > 0.1  # a prefill of the tiny model
        assert row["slowdown_pct"] == pytest.approx(100 * (row["total_ms"] / row["reference_ms"] - 1))
        assert row["hidden_fraction"] == pytest.approx(1 - min(1, row["exposed_ms"] / row["wire_ms"]))
        assert row.get("nominal_wire_ms") == (pytest.approx(row["nbytes"] * 8 / 1e6) if "gbps" in row else None)
        assert "bandwidth_ratio" not in row and row["wire_ms"] >= row.get("nominal_wire_ms", 0.0)  # no link is faster than its own speed
