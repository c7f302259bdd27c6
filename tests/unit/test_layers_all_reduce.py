"""Which all-reduce a message takes, and that programs never share a place in memory. The kernels: tests/gpu/test_allreduce_gpu.py."""

import pytest

from ksana_lab.layers.all_reduce_plan import NCCL, ONE_SHOT, PROGRAMS, TWO_SHOT, Areas, Report, SizeTable, fastest, ladder, launch

MIB = 1 << 20


def test_a_message_takes_what_won_at_the_next_larger_size():
    table = fastest({8192: {NCCL: 9, ONE_SHOT: 4}, 16384: {NCCL: 9, ONE_SHOT: 8, TWO_SHOT: 7}, 32768: {NCCL: 9, TWO_SHOT: 10}})
    assert [table.choose(n) for n in (2, 8192, 8194, 16384, 16386, 1 << 40)] == [ONE_SHOT, ONE_SHOT, TWO_SHOT, TWO_SHOT, NCCL, NCCL]


def test_neighbouring_sizes_with_one_winner_are_one_step():
    table = fastest({n: {NCCL: 5.0, ONE_SHOT: 4.0} for n in (8192, 16384, 32768)})
    assert table == SizeTable(((32768, ONE_SHOT),)) and table.describe() == "one_shot up to 32 KiB, nccl above"


def test_nccl_between_two_of_ours_stays_and_wins_a_tie():
    table = fastest({8192: {NCCL: 5, ONE_SHOT: 4}, 16384: {NCCL: 5, ONE_SHOT: 5}, 32768: {NCCL: 5, TWO_SHOT: 4}})
    assert [table.choose(n) for n in (8192, 16384, 32768)] == [ONE_SHOT, NCCL, TWO_SHOT]


def test_without_measurements_everything_is_nccls():
    assert fastest({}).choose(1) == fastest({8192: {NCCL: 1.0}}).choose(1) == NCCL


def test_the_ladder_ends_at_the_first_size_that_holds_the_largest_message():
    assert ladder(1) == [8192] and ladder(8193) == [8192, 16384] and ladder(128 * MIB)[-1] == 16 * MIB


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("max_bytes", [8192, 3 * MIB, 128 * MIB])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_message_fits_its_programs_places(world, max_bytes, itemsize):
    areas = Areas.of(world, max_bytes)
    for algorithm, region in ((ONE_SHOT, areas.one_shot_region), (TWO_SHOT, areas.two_shot_region)):
        limit = areas.limit(algorithm) // itemsize
        for n in {16, 4096, 4112, limit // 2 + 16, limit - 16, limit} & set(range(16, limit + 1)):
            shape = launch(algorithm, n, world)
            chunk = shape.share * (1 if algorithm == ONE_SHOT else world)
            assert shape.programs <= PROGRAMS and shape.programs * chunk >= n
            assert shape.share * itemsize <= region and shape.share % 16 == 0
    assert areas.one_shot_area % 256 == areas.two_shot_area % 256 == areas.one_shot_region % 256 == areas.two_shot_region % 256 == 0


def test_a_report_crosses_ranks_whole_and_names_what_was_wrong():
    times = {8192: {NCCL: 9.5, ONE_SHOT: 4.0}, MIB: {NCCL: 17.0}}
    report = Report(2, "bfloat16", times, {TWO_SHOT: [8192]}, fastest(times))
    assert Report.from_json(report.to_json()) == report
    text = "\n".join(report.lines())
    assert "8 KiB        9.5        4.0   one_shot" in text and "WRONG RESULTS: two_shot at 8 KiB" in text
