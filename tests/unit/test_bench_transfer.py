"""What bench transfer makes of its samples: hand-computed figures, and none where none applies."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from ksana_lab.bench.transfer import Row, Setting, main, named, overlap_row, write_csv

FOUND = {  # of one prompt, as the sender counts
    "bytes_sent": 50_000_000.0, "copies": 4.0, "post_s": 0.001, "wire_s": 0.008, "exposed_s": 0.002, "device_wire_s": 0.004,
    "device_exposed_s": 0.0005, "prefill_s": 0.022, "handover_s": 0.003,
}  # fmt: skip


def row_of(gbps: float | None = None, **more: float) -> Row:
    return overlap_row(Setting("layer", gbps), "auto", 64, FOUND | more, off_ms=20.0)


def test_the_hardwares_own_link_is_judged_by_the_devices_clock():
    row = row_of()
    assert (row.wire_ms, row.device_exposed_ms, row.exposed_ms, row.nominal_wire_ms) == (4.0, 0.5, 2.0, None)
    assert row.hidden_fraction == 1 - 0.5 / 4.0
    assert row_of(device_exposed_s=0.0).hidden_fraction == 1.0


def test_an_emulated_link_is_judged_by_the_senders_clock_and_its_nominal_time_stands_beside():
    row = row_of(gbps=400.0)
    assert (row.wire_ms, row.device_exposed_ms, row.nominal_wire_ms) == (8.0, None, 1.0)  # 50 MB at 50 GB/s
    assert row.hidden_fraction == 1 - 2.0 / 8.0


def test_more_exposed_than_sent_hides_nothing():
    assert row_of(device_exposed_s=0.009).hidden_fraction == 0.0
    assert row_of(gbps=400.0, exposed_s=0.009).hidden_fraction == 0.0


def test_a_prefill_is_held_against_the_same_without_transfer():
    assert row_of().slowdown_pct == pytest.approx(10.0) and row_of(prefill_s=0.019).slowdown_pct == pytest.approx(-5.0)
    assert row_of().bandwidth_ratio is None


def test_a_link_is_held_against_a_contiguous_copy_and_nothing_else():
    row = Row("link", "shm", "bulk", 64, nbytes=8_000_000, wire_ms=4.0, total_ms=4.0, reference_ms=3.0)
    assert (row.bandwidth_ratio, row.bandwidth_gbs) == (0.75, 2.0)
    assert row.slowdown_pct is row.hidden_fraction is row.post_ms is None
    assert "post -" in row.line() and "not separable" in row.line() and "not separable" not in replace(row, post_ms=1.0).line()


def test_what_does_not_apply_is_an_empty_cell_and_no_figure(tmp_path):
    rows = [Row("link", "shm", "bulk", 64, nbytes=1, wire_ms=4.0, reference_ms=3.0), row_of(400.0)]
    write_csv(tmp_path / "x.csv", rows)
    with (tmp_path / "x.csv").open(newline="") as file:
        link, overlap = csv.DictReader(file)
    assert link["post_ms"] == link["slowdown_pct"] == link["hidden_fraction"] == overlap["bandwidth_ratio"] == ""
    assert {name for name, _, _ in named(rows)} == {
        "bandwidth_ratio.bulk.64", "bandwidth_gbs.bulk.64", "hidden_fraction.layer.64.400gbps", "exposed_ms.layer.64.400gbps",
    }  # fmt: skip


def test_the_documentations_table_has_no_figure_that_means_nothing():
    path = Path(__file__).parents[2] / "docs" / "results" / "exposed.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and not any(row["bandwidth_ratio"] for row in rows)
    assert all(bool(row["nominal_wire_ms"]) == bool(row["gbps"]) != bool(row["wire_ms"]) for row in rows)


def test_of_several_backends_the_first_ones_figures_are_kept():
    rows = [replace(row_of(), backend=backend, total_ms=total) for backend, total in (("cuda_ipc", 22.0), ("tcp", 30.0))]
    assert dict((name, value) for name, _, value in named(rows))["prefill_slowdown_pct.layer.64"] == pytest.approx(10.0)


@pytest.mark.parametrize("wrong", [["--backend", "shm,udp"], ["--mode", "layers"], ["--parts", "links"]])
def test_a_word_that_is_none_is_refused_with_those_that_are(wrong, capsys):
    with pytest.raises(SystemExit) as refused:
        main(wrong)
    assert refused.value.code == 2 and "is none of" in capsys.readouterr().err
