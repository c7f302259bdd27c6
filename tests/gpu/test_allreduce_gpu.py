"""All-reduce through the ranks' own memory: sums to the bit, calls back to back, a peer that never comes; and what an engine makes of it.

The kernels' tests also run in Triton's interpreter, if TRITON_INTERPRET=1 is set: two processes over shared CPU memory."""

import multiprocessing
import os
import random
import traceback

import pytest
import torch

from ksana_lab.errors import KsanaLabError
from ksana_lab.layers import all_reduce
from ksana_lab.layers.all_reduce_plan import LL, NCCL, NORM_ROWS, ONE_SHOT, OURS, TWO_SHOT, Areas, Report, describe_norm, fastest
from ksana_lab.layers.replay import capture
from ksana_lab.layers.tp import TPGroup

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.timeout(300), *([] if INTERPRETED else [pytest.mark.multi_gpu])]
pytest.importorskip("triton")
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # to bfloat16 the interpreter cuts, it does not round
MAX_BYTES = 1 << 20 if INTERPRETED else 64 << 20
LOOKS = 1 << 16 if INTERPRETED else 1 << 23


def on_ranks(work, tmp_path, *args, size=2, width=0):
    """``work(tp, memory, *args)`` in a process for each rank; results in rank order. ``width``: of rows that are normalised."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(size) as pool:
        results = pool.starmap_async(_rank, [(work, rank, size, str(tmp_path), args, width) for rank in range(size)]).get(timeout=240)
    for result in results:
        assert not isinstance(result, str), result
    return results


def _rank(work, rank, size, folder, args, width):
    try:
        torch.set_num_threads(1)
        if not INTERPRETED:
            torch.cuda.set_device(rank)
        tp = TPGroup.connect(rank, size, f"file://{folder}/meeting", backend="gloo" if INTERPRETED else "nccl", timeout_s=60)
        try:
            memory = _shared_memory(tp, folder, width) if INTERPRETED else _mapped_memory(tp, width)
            result = work(tp, memory, *args)
            tp.exchange(b"")
            memory.close()
            tp.exchange(b"")
            return result
        finally:
            tp.close()
    except BaseException:
        return traceback.format_exc()  # an exception of a child may not survive the way back


def _shared_memory(tp, folder, width):
    areas = Areas.of(tp.size, MAX_BYTES, width)
    own = torch.from_file(f"{folder}/rank{tp.rank}", shared=True, size=areas.nbytes, dtype=torch.uint8)
    tp.barrier()
    maps = [torch.from_file(f"{folder}/rank{rank}", shared=True, size=areas.nbytes, dtype=torch.uint8) for rank in range(tp.size)]
    memory = all_reduce.PeerMemory(
        tp.rank, areas, own, [m.data_ptr() for m in maps], torch.zeros(1, dtype=torch.int32), lambda: maps.clear()
    )
    return memory


def _mapped_memory(tp, width):
    memory, reason = all_reduce.map_peers(tp, MAX_BYTES, width)
    assert memory is not None, reason
    if width:
        memory.compile_norm(DTYPE)
    return memory


def compare(tp, memory, name, sizes, seed):
    """Messages of ``sizes`` elements back to back; only then are the sums looked at."""
    inputs = [all_reduce._random(n * DTYPE.itemsize, DTYPE, tp.device, seed=seed + 100 * i + tp.rank) for i, n in enumerate(sizes)]
    expected = [all_reduce.sum_in_rank_order(tp.gather(x)) for x in inputs]
    for x in inputs:
        assert memory.takes(name, x)
        memory.run(name, x, LOOKS)
    assert not memory.has_given_up
    return [torch.equal(x, want) for x, want in zip(inputs, expected, strict=True)]


@pytest.mark.parametrize("size", [2, 4] if INTERPRETED else [2])
def test_sums_of_many_sizes_are_right_to_the_bit(tmp_path, size):
    sizes = [16, 4096, 4112, 48, 65536, 16, 8208, 262_144] if INTERPRETED else [16, 4096, 4112, 8192, 131_072, 16, 999_984, 4 << 20]
    for results in on_ranks(sum_both_ways, tmp_path, sizes, size=size):
        assert all(results), results


def sum_both_ways(tp, memory, sizes):
    right = []
    for name in OURS:
        limit = memory.areas.limit(name) // DTYPE.itemsize
        right += compare(tp, memory, name, [n for n in sizes if n <= limit and (name != LL or n % 32 == 0)], seed=7)
    for i in range(6):  # a program's places are used again in every second call, whatever ran between
        right += compare(tp, memory, OURS[i % 3], random.Random(i).sample([32, 4096, 2080, 8192, 64, 8224], 4), seed=i)
    return right


@pytest.mark.parametrize(("size", "width"), [(2, 64), (2, 896), (2, 4096), *([(4, 256)] if INTERPRETED else [(2, 5120)])])
def test_sum_and_norm_at_once_are_one_after_the_other_to_the_bit(tmp_path, size, width):
    for results in on_ranks(norm_both_ways, tmp_path, size=size, width=width):
        assert all(results), results


def norm_both_ways(tp, memory):
    rows = [1, 64, 2, 33, 1, 1, *random.Random(memory.areas.norm_width).sample(range(1, 65), 4)]
    if INTERPRETED and memory.areas.norm_width > 1024:
        rows = [1, 5, 1, 3]
    right = compare_norms(tp, memory, rows, seed=3)
    for i, name in enumerate(OURS):  # among the others, each with its own places
        right += compare(tp, memory, name, [4096], seed=i) + compare_norms(tp, memory, [3 - i, 1], seed=10 * i)
    return right


def compare_norms(tp, memory, many_rows, seed):
    """Rows back to back; only then are the results looked at, against ll and a norm behind it."""
    from ksana_lab.layers import fused_triton

    inputs = [all_reduce._rows_to_norm(tp, memory, rows, DTYPE, seed + 1000 * i) for i, rows in enumerate(many_rows)]
    expected = []
    for x, before, weight in inputs:
        total, after = x.clone(), before.clone()
        if memory.takes(LL, total):
            memory.run(LL, total, LOOKS)
        else:
            total = all_reduce.sum_in_rank_order(tp.gather(x))
        expected.append((fused_triton.add_rms_norm(total, after, weight, 1e-6), after))
    sources = [x.clone() for x, _, _ in inputs]
    assert all(memory.takes_norm(x, residual) for x, residual, _ in inputs)
    normed = [memory.run_norm(x, residual, weight, 1e-6, LOOKS) for x, residual, weight in inputs]
    assert not memory.has_given_up
    assert all(torch.equal(x, source) for (x, _, _), source in zip(inputs, sources, strict=True))
    return [
        torch.equal(y, wanted) and torch.equal(residual, after)
        for y, (_, residual, _), (wanted, after) in zip(normed, inputs, expected, strict=True)
    ]


def test_epochs_survive_their_wrap(tmp_path):
    assert on_ranks(sum_across_the_wrap, tmp_path, width=128) == [[True] * 18] * 2


def sum_across_the_wrap(tp, memory):
    last = 2**31 - 3
    flags = memory._own[: memory.areas.ll_area].view(torch.int32)
    flags.fill_(last)
    for epochs in memory.epochs:
        epochs.fill_(last)
    tp.exchange(b"")
    right = compare_norms(tp, memory, [1, 2, 1, 4, 1, 3], seed=1)  # which also calls ll six times
    for epochs in memory.epochs:
        epochs.fill_(last)
    tp.exchange(b"")
    return right + [right for name in (LL, ONE_SHOT) for right in compare(tp, memory, name, [4096] * 6, seed=1)]


def test_a_peer_that_never_comes_is_given_up_on(tmp_path):
    assert on_ranks(wait_for_nobody, tmp_path, 4096) == [True, False]


def wait_for_nobody(tp, memory, looks):
    x = torch.ones(64, dtype=DTYPE, device=tp.device)
    if tp.rank == 0:
        memory.run(TWO_SHOT, x, looks)
        report = Report(2, "", {}, {}, fastest({8192: {NCCL: 2.0, ONE_SHOT: 1.0}}))
        if not INTERPRETED:
            torch.cuda.synchronize()
        with pytest.raises(KsanaLabError, match="a peer did not come"):
            all_reduce.AllReduceBySize(memory, report, DTYPE).check()
    return memory.has_given_up


def test_a_sum_that_normalises_gives_up_and_is_forgiven(tmp_path):
    assert on_ranks(norm_for_nobody, tmp_path, 4096, width=64) == [(True, False, True), (False, False, True)]


def norm_for_nobody(tp, memory, looks):
    """One rank comes late, by a whole call; from then on both are right."""
    x = torch.ones(2, 64, dtype=DTYPE, device=tp.device)
    if tp.rank == 0:
        memory.run_norm(x, x.clone(), x[0], 1e-6, looks)
        if not INTERPRETED:
            torch.cuda.synchronize()
    tp.exchange(b"")
    if tp.rank == 1:
        memory.run_norm(x, x.clone(), x[0], 1e-6, looks)
    tp.exchange(b"")
    gave_up = memory.has_given_up
    memory.forgive()
    return gave_up, memory.has_given_up, all(compare_norms(tp, memory, [1, 2, 3], seed=1))


@pytest.mark.parametrize("name", [LL, ONE_SHOT, "norm"])
def test_a_group_that_is_left_lets_kernels_go(tmp_path, name):
    assert on_ranks(leave, tmp_path, name, width=64) == [True, False]


def leave(tp, memory, name):
    """The host's word ends a wait that would take minutes."""
    x = torch.ones(64, dtype=DTYPE, device=tp.device)
    if tp.rank == 0:
        memory.abort()
        memory.run_norm(x[None], x[None].clone(), x, 1e-6, 1 << 28) if name == "norm" else memory.run(name, x, 1 << 28)
        if not INTERPRETED:
            torch.cuda.synchronize()
    return memory.has_given_up


@pytest.mark.skipif(not INTERPRETED, reason="on GPUs an engine does it, below")
def test_a_model_over_shared_memory_says_what_one_rank_says(tmp_path):
    first, second = on_ranks(generate, tmp_path)
    assert first == second == generate(TPGroup.single(), None)


def generate(tp, memory):
    from helpers_model import PagedBatch

    from ksana_lab.models.registry import random_model
    from ksana_lab.models.synth import SHAPES

    if memory is not None:
        table = fastest({8192: {NCCL: 2.0, LL: 1.0}, 16384: {NCCL: 2.0, ONE_SHOT: 1.0}, 1 << 20: {NCCL: 2.0, TWO_SHOT: 1.0}})
        tp.by_size = all_reduce.AllReduceBySize(memory, Report(2, "float32", {}, {}, table), torch.float32)
        tp.all_reduce_nccl = None  # nothing falls back
    model = random_model(SHAPES["qwen3-tiny"], dtype=torch.float32, device=torch.device("cpu"), tp=tp)
    batch = PagedBatch(model)
    return [batch.greedy([(i * j) % 1000 + 3 for j in range(n)], 4) for i, n in ((7, 24), (11, 60), (13, 120))]


@pytest.mark.skipif(not INTERPRETED, reason="on GPUs an engine does it, below")
def test_a_model_that_sums_and_normalises_at_once_says_the_same(tmp_path):
    (first, fused_calls), (second, _) = on_ranks(logits_at_once, tmp_path, width=64)
    apart, _ = logits_at_once(TPGroup.single(), None)
    assert fused_calls == 3 * 8  # steps of few rows, norms behind a sum in each
    for one, other, wanted in zip(first, second, apart, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=0.02, atol=0.05)


def logits_at_once(tp, memory):
    from helpers_model import PagedBatch

    from ksana_lab.models.registry import random_model
    from ksana_lab.models.synth import SHAPES

    calls = []
    if memory is not None:
        tp.by_size = all_reduce.AllReduceBySize(memory, Report(2, "float16", {}, {}, fastest({1 << 20: {NCCL: 2.0, LL: 1.0}})), DTYPE)
        tp.by_size.norm_rows = 64
        run = memory.run_norm
        memory.run_norm = lambda *args: calls.append(args) or run(*args)
    model = random_model(SHAPES["qwen3-tiny"], dtype=DTYPE, device=torch.device("cpu"), tp=tp)
    batch = PagedBatch(model)
    seq = batch.new_sequence(100)
    steps = [[(7 * i) % 1000 + 3 for i in range(n)] for n in (70, 20, 1, 1)]
    logits = [batch.step([(seq, tokens)])[0] for tokens in steps]
    return logits, len(calls)


# ---- only on GPUs ------------------------------------------------------------------------------------------------------------------------

on_gpus = pytest.mark.skipif(INTERPRETED, reason="needs GPUs")


@on_gpus
def test_replayed_graphs_and_eager_calls_take_turns(tmp_path):
    assert on_ranks(replay, tmp_path) == [True, True]


def replay(tp, memory):
    sizes = [4096, 65_536, 1 << 20]
    inputs = [all_reduce._random(n * 2, DTYPE, tp.device, seed=n + tp.rank) for n in sizes]
    expected = [all_reduce.sum_in_rank_order(tp.gather(x)) for x in inputs]
    work = [torch.empty_like(x) for x in inputs]

    def run():
        for x, source in zip(work, inputs, strict=True):
            x.copy_(source)
        for i, x in enumerate(work):
            memory.run(OURS[i], x)

    run()
    graph, _ = capture(run)
    good = True
    for turn in range(50):
        if turn % 3 == 2:
            run()
        else:
            graph.replay()
        if turn % 7 == tp.rank:  # now one rank is late, now the other
            torch.cuda._sleep(1_000_000)
        good = good and all(torch.equal(x, want) for x, want in zip(work, expected, strict=True))
    return good


@on_gpus
def test_replayed_norms_and_eager_ones_take_turns(tmp_path):
    assert on_ranks(replay_norms, tmp_path, width=4096) == [True, True]


def replay_norms(tp, memory):
    from ksana_lab.layers import fused_triton

    inputs = [all_reduce._rows_to_norm(tp, memory, rows, DTYPE, seed=rows) for rows in (1, 64, 7, 32)]
    expected = []
    for x, before, weight in inputs:
        after = before.clone()
        expected += [fused_triton.add_rms_norm(all_reduce.sum_in_rank_order(tp.gather(x)), after, weight, 1e-6), after]

    def run():
        residuals = [before.clone() for _, before, _ in inputs]
        return [
            out
            for (x, _, weight), residual in zip(inputs, residuals, strict=True)
            for out in (memory.run_norm(x, residual, weight, 1e-6), residual)
        ]

    run()
    graph, replayed = capture(run)
    good = True
    for turn in range(50):
        outputs = run() if turn % 3 == 2 else graph.replay() or replayed
        if turn % 7 == tp.rank:  # now one rank is late, now the other
            torch.cuda._sleep(1_000_000)
        good = good and all(map(torch.equal, outputs, expected))
    return good


@on_gpus
def test_the_ranks_agree_on_a_table_and_nothing_is_wrong(tmp_path):
    (first, norms), (second, same) = on_ranks(measure, tmp_path, width=4096)
    report = Report.from_json(first)
    assert norms == same and set(norms) == set(NORM_ROWS)
    assert first == second and not any(report.wrong.values())
    assert min(report.times_us) == 8192 and all(NCCL in row and row[NCCL] > 0 for row in report.times_us.values())
    print("\n".join([*report.lines(), *describe_norm(norms)]))


def measure(tp, memory):
    memory.compile(DTYPE)
    report = all_reduce.measure(tp, memory, DTYPE)
    memory.compile_norm(DTYPE)
    return report.to_json(), all_reduce.measure_norm(tp, all_reduce.AllReduceBySize(memory, report, DTYPE), DTYPE)


@on_gpus
def test_an_engine_says_the_same_by_size_and_by_nccl(tmp_path, monkeypatch):
    """With two ranks each sum has two terms, which have one rounding whoever adds them."""
    from ksana_lab.engine.llm import LLM
    from ksana_lab.models.synth import synthesize
    from ksana_lab.types import SamplingParams

    model = str(synthesize(tmp_path / "q", "qwen3", "0.6b", has_weights=False))
    prompts = [[(i * j) % 150_000 + 5 for j in range(1, 40 + 60 * i)] for i in range(1, 9)]
    said = []
    for is_set in (True, False):
        if is_set:
            monkeypatch.setenv("SELECT_ALL_REDUCE_BY_SIZE", "1")
        else:
            monkeypatch.delenv("SELECT_ALL_REDUCE_BY_SIZE")
        with LLM(model, num_blocks=2000, max_num_seqs=16, tensor_parallel_size=2, few_rows_linear=False) as llm:
            assert (llm.engine._executor.worker.tp.by_size is not None) == is_set
            params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
            said.append([result.outputs[0].token_ids for result in llm.generate(prompts, params)])
    assert said[0] == said[1]
