"""Which all-reduce a message takes, and that programs never share a place in memory. The kernels: tests/gpu/test_allreduce_gpu.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ksana_lab.bench import allreduce
from ksana_lab.errors import KsanaLabError
from ksana_lab.layers import all_reduce, fused
from ksana_lab.layers.all_reduce_plan import (
    LL,
    NCCL,
    NORM_ROWS,
    ONE_SHOT,
    OURS,
    PROGRAMS,
    TWO_SHOT,
    Areas,
    Report,
    SizeTable,
    describe_norm,
    fastest,
    fused_rows,
    ladder,
    launch,
    norm_launch,
    norm_width,
)
from ksana_lab.layers.tp import TPGroup

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
    assert ladder(1) == [8192] and ladder(8193) == [8192, 16384] and ladder(128 * MIB)[-1] == 64 * MIB


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("max_bytes", [8192, 3 * MIB, 128 * MIB])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_message_fits_its_programs_places(world, max_bytes, itemsize):
    areas = Areas.of(world, max_bytes)
    for algorithm in OURS:
        area, region = areas.place(algorithm)
        itemsize = 4 if algorithm == LL else itemsize
        limit = areas.limit(algorithm) // itemsize
        for n in (n for n in (16, 4096, 4112, limit // 2 + 16, limit - 16, limit) if 0 < n <= limit):
            shape = launch(algorithm, n, world)
            chunk = shape.share * (world if algorithm == TWO_SHOT else 1)
            assert shape.programs <= PROGRAMS and shape.programs * chunk >= n
            assert shape.share * (8 if algorithm == LL else itemsize) <= region and shape.share % 16 == 0
            assert shape.share <= shape.tile or algorithm != LL
        assert area % 256 == region % 256 == 0
    assert areas.ll_area < areas.one_shot_area < areas.two_shot_area < areas.nbytes < 300 * MIB


@pytest.mark.parametrize(("world", "mib"), [(2, 2), (8, 14)])
def test_rows_to_be_normalised_have_their_own_places_behind_the_others(world, mib):
    plain, areas = Areas.of(world, MIB), Areas.of(world, MIB, 4096)
    assert areas.norm_area == plain.nbytes == plain.norm_area and areas.nbytes - plain.nbytes == mib * MIB
    assert areas.norm_region >= 8 * 4096 // 2 and areas.norm_area % 256 == areas.norm_region % 256 == 0


@pytest.mark.parametrize(
    ("hidden_size", "itemsize", "width"),
    [(4096, 2, 4096), (896, 2, 896), (8192, 2, 8192), (4096, 4, 0), (8224, 2, 0), (80, 2, 0), (0, 2, 0)],
)
def test_rows_that_one_program_takes(hidden_size, itemsize, width):
    assert norm_width(hidden_size, itemsize) == width


def test_a_tile_holds_a_row_and_has_the_warps_of_the_norm_alone():
    assert [norm_launch(width) for width in (32, 1024, 4096, 5120, 8192)] == [(32, 1), (1024, 2), (4096, 8), (8192, 8), (8192, 8)]


def test_rows_are_fused_up_to_the_first_at_which_that_is_not_faster():
    times = {1: (3.9, 6.1), 8: (4.0, 6.2), 32: (5.0, 9.0), 64: (9.0, 9.0)}
    assert fused_rows(times) == 32 and fused_rows({1: (7.0, 6.0), 8: (1.0, 2.0)}) == 0
    lines = describe_norm(times)
    assert lines[0] == "1 row: 3.9 µs fused, 6.1 apart → fused" and lines[3] == "64 rows: 9.0 µs fused, 9.0 apart → apart"


def test_a_report_crosses_ranks_whole_and_names_what_was_wrong():
    times = {8192: {NCCL: 9.5, ONE_SHOT: 4.0}, MIB: {NCCL: 17.0}}
    report = Report(2, "bfloat16", times, {TWO_SHOT: [8192]}, fastest(times))
    assert Report.from_json(report.to_json()) == report
    text = "\n".join(report.lines())
    assert "8 KiB        9.5        4.0   one_shot" in text and "WRONG RESULTS: two_shot at 8 KiB" in text


@pytest.fixture
def memory():
    areas = Areas.of(2, 1 << 20)
    own = torch.zeros(areas.nbytes, dtype=torch.uint8)
    return all_reduce.PeerMemory(0, areas, own, [own.data_ptr()] * 2, torch.zeros(1, dtype=torch.int32), lambda: None)


@pytest.fixture
def by_size(memory, monkeypatch):
    ran = []
    monkeypatch.setattr(memory, "run", lambda algorithm, x: ran.append(algorithm))
    report = Report(2, "bfloat16", {}, {}, SizeTable(((16384, ONE_SHOT), (65536, TWO_SHOT))))
    chooser = all_reduce.AllReduceBySize(memory, report, torch.bfloat16)
    chooser.ran = ran
    return chooser


def test_each_size_takes_its_algorithm(by_size):
    assert [by_size.reduce(torch.zeros(n, dtype=torch.bfloat16)) for n in (16, 8192, 8208, 32768, 32784)] == [True] * 4 + [False]
    assert by_size.ran == [ONE_SHOT, ONE_SHOT, TWO_SHOT, TWO_SHOT]


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4096),
        torch.zeros(4096, dtype=torch.bfloat16)[:4090],
        torch.zeros(4096, dtype=torch.bfloat16)[1:3601],
        torch.zeros(64, 128, dtype=torch.bfloat16).t(),
        torch.zeros(0, dtype=torch.bfloat16),
    ],
    ids=["another type", "no multiple of 16", "not aligned", "not contiguous", "empty"],
)
def test_what_the_kernels_cannot_take_is_nccls(by_size, x):
    assert not by_size.reduce(x) and by_size.ran == []


def test_a_wait_in_vain_is_an_error_and_leaving_is_none(by_size, memory):
    by_size.check()
    memory.word.fill_(all_reduce.GAVE_UP)
    with pytest.raises(KsanaLabError, match="rank 0: a peer did not come to an all-reduce"):
        by_size.check()
    memory.close()
    memory.close()
    by_size.check()


def bf16(*shape, **options):
    return torch.zeros(*shape, dtype=torch.bfloat16, **options)


@pytest.fixture
def norms(by_size, monkeypatch):
    """by_size for rows of 64, whose kernel gives its argument back."""
    areas = Areas.of(2, 1 << 20, 64)
    monkeypatch.setattr(by_size.memory, "areas", areas)
    monkeypatch.setattr(by_size.memory, "run_norm", lambda x, residual, weight, eps: x)
    by_size.norm_rows = 8
    return by_size


def test_few_rows_are_summed_and_normalised_at_once(norms):
    for rows in (1, 8):
        assert norms.reduce_norm(x := bf16(rows, 64), bf16(rows, 64), bf16(64), 1e-6) is x
    assert norms.reduce_norm(bf16(9, 64), bf16(9, 64), bf16(64), 1e-6) is None
    norms.norm_rows = 0
    assert norms.reduce_norm(bf16(1, 64), bf16(1, 64), bf16(64), 1e-6) is None


@pytest.mark.parametrize(
    ("x", "residual"),
    [
        (bf16(0, 64), bf16(0, 64)),
        (bf16(2, 32), bf16(2, 32)),
        (bf16(2, 64).half(), bf16(2, 64).half()),
        (bf16(2, 64).float(), bf16(2, 64).float()),
        (bf16(2, 64), bf16(2, 64).float()),
        (bf16(2, 64), bf16(1, 64)),
        (bf16(64, 2).t(), bf16(2, 64)),
        (bf16(2, 64), bf16(64, 2).t()),
        (bf16(129)[1:].view(2, 64), bf16(2, 64)),
    ],
    ids=["empty", "width", "half", "float", "residual's type", "residual's rows", "layout", "residual's layout", "not aligned"],
)
def test_rows_that_the_kernel_cannot_take_stay_as_they_are(norms, x, residual):
    assert norms.reduce_norm(x, residual, bf16(64), 1e-6) is None


@pytest.mark.parametrize(
    ("change", "why"), [({}, None), ({"host": "b"}, "different hosts"), ({"pid": 1}, "one process"), ({"gpu": "x"}, "share a GPU")]
)
def test_ranks_that_cannot_map_each_others_memory_are_told_apart(change, why):
    reason = all_reduce.why_apart([{"host": "a", "pid": 1, "gpu": "x"}, {"host": "a", "pid": 2, "gpu": "y"} | change])
    assert (reason is None) if why is None else why in reason


def test_the_bench_says_why_there_is_nothing_to_compare(tmp_path):
    def work(rank: int):
        tp = TPGroup.connect(rank, 2, f"file://{tmp_path}/meeting", timeout_s=30)
        return allreduce._measure(tp, 1 << 20, torch.bfloat16)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [(None, "the ranks are not on GPUs")] * 2


class FakeMemory:
    """What map_peers would give; its sums go over the process group. ``faults``: (rank, algorithm) that adds wrongly."""

    def __init__(self, tp: TPGroup, faults: set[tuple[int, str]], width: int) -> None:
        self._tp, self._faults, self.pdl = tp, faults, False
        self.rank, self.areas, self.has_given_up, self.is_closed, self.ran = tp.rank, Areas.of(2, 32 << 10, width), False, False, []

    def compile(self, dtype):
        if (self.rank, "compile") in self._faults:
            raise ValueError("no such instruction")

    def takes(self, algorithm, x):
        return True

    def run(self, algorithm, x, looks=0):
        self.ran.append(algorithm)
        x.copy_(all_reduce.sum_in_rank_order(self._tp.gather(x)))
        if (self.rank, algorithm) in self._faults:
            x[-1] += 1

    def compile_norm(self, dtype):
        if (self.rank, "compile norm") in self._faults:
            raise ValueError("no such instruction")

    def takes_norm(self, x, residual):
        return True

    def run_norm(self, x, residual, weight, eps, looks=0):
        self.ran.append("norm")
        total = all_reduce.sum_in_rank_order(self._tp.gather(x))
        self.has_given_up = (self.rank, "gives up") in self._faults
        if (self.rank, "norm") in self._faults and len(x) == 8:
            total[-1] += 1
        return fused.add_rms_norm(total, residual, weight, eps)

    def forgive(self):
        self.has_given_up = False

    def close(self):
        self.is_closed = True


@pytest.fixture
def start_two(tmp_path, monkeypatch):
    """Both ranks of a group that measures; per rank (its by_size, its memory, a sum by it)."""

    class Graph:
        def __init__(self, run):
            self._run, self.result = run, run()

        def replay(self):
            for out, again in zip(self.result or [], self._run() or [], strict=True):
                out.copy_(again)

    def capture(run):
        graph = Graph(run)
        return graph, graph.result

    def start(faults=frozenset(), slow=(), dtype=torch.float32, hidden_size=0):
        def timed(reduce, x):  # NCCL's is a method of the group, sums of ours are closures that name their algorithm
            name = {"all_reduce_nccl": NCCL, "at_once": "norm", "apart": "apart"}.get(reduce.__name__) or reduce.__defaults__[0]
            return {NCCL: 9.0, LL: 3.0, ONE_SHOT: 4.0, TWO_SHOT: 5.0, "norm": 4.0, "apart": 6.0}[name] + 100 * (name in slow)

        memories = {}
        monkeypatch.setattr(all_reduce, "capture", capture)
        monkeypatch.setattr(all_reduce, "_median_us", timed)
        monkeypatch.setattr(
            all_reduce, "map_peers", lambda tp, n, width: (memories.setdefault(tp.rank, FakeMemory(tp, faults, width)), None)
        )

        def work(rank: int):
            tp = TPGroup.connect(rank, 2, f"file://{tmp_path}/meeting", timeout_s=30)
            tp.choose_all_reduce_by_size(32 << 10, dtype, hidden_size)
            total = tp.all_reduce(torch.full((4096,), rank + 1.0, dtype=dtype))
            tp.barrier()
            return tp.by_size, memories[rank], total[-1].item()

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, range(2)))

    return start


def test_ranks_start_with_the_fastest_of_what_is_right(start_two):
    for by_size, memory, total in start_two():
        assert by_size.report.table == SizeTable(((32768, LL),)) and memory.ran[-1] == LL and total == 3.0 and not memory.is_closed


def test_what_is_wrong_on_one_rank_is_used_on_none(start_two):
    for by_size, memory, total in start_two(faults={(1, LL)}):
        assert by_size.report.table == SizeTable(((32768, TWO_SHOT),)) and by_size.report.wrong[LL] == [8192, 16384, 32768]
        assert by_size.report.times_us[8192][ONE_SHOT] == 4.0, "faster, shown, and not trusted"
        assert memory.ran[-1] == TWO_SHOT and total == 3.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"faults": {(1, "compile")}}, "rank 1: ValueError: no such instruction"),
        ({"slow": (LL, ONE_SHOT, TWO_SHOT)}, "nothing else was right and faster"),
    ],
    ids=["does not compile", "slow"],
)
def test_what_is_no_use_is_closed_and_the_log_says_why(start_two, caplog, change, why):
    with caplog.at_level("INFO"):
        for by_size, memory, total in start_two(**change):
            assert by_size is None and memory.is_closed and total == 3.0
    assert f"all-reduce is not chosen by size: {why}" in caplog.text


NORMS = {"dtype": torch.bfloat16, "hidden_size": 64}


def test_ranks_sum_and_normalise_at_once_where_that_is_right_and_faster(start_two, caplog):
    with caplog.at_level("INFO"):
        for by_size, memory, _ in start_two(**NORMS):
            assert by_size.norm_rows == max(NORM_ROWS) == 64 and "norm" in memory.ran
    assert caplog.text.count("all-reduce + norm | 1 row: 4.0 µs fused, 6.0 apart → fused") == 1  # rank 0 speaks for all


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"faults": {(1, "norm")}}, "rank 0: KsanaLabError: its results are WRONG at 8 rows"),
        ({"faults": {(1, "compile norm")}}, "rank 1: ValueError: no such instruction"),
        ({"faults": {(1, "gives up")}}, "rank 0: KsanaLabError: its results are WRONG at 1, 8, 32, 64 rows"),
        ({"dtype": torch.float32}, "there is a kernel for 16 bits"),
    ],
    ids=["wrong on one rank", "does not compile", "gives up", "type"],
)
def test_where_it_is_no_use_sum_and_norm_stay_apart_and_the_log_says_why(start_two, caplog, change, why):
    with caplog.at_level("INFO"):
        for by_size, memory, total in start_two(**NORMS | change):
            assert by_size.norm_rows == 0 and by_size.report.table.steps and total == 3.0
            assert not memory.has_given_up and not memory.is_closed
    assert f"all-reduce and norm stay apart: {why}" in caplog.text


def test_sum_and_norm_at_once_are_slower_and_stay_apart(start_two, caplog):
    with caplog.at_level("INFO"):
        assert [by_size.norm_rows for by_size, _, _ in start_two(slow=("norm",), **NORMS)] == [0, 0]
    assert "1 row: 104.0 µs fused, 6.0 apart → apart" in caplog.text
