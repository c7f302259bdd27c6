"""Ranks that share a model give the tokens of one rank. Here ranks are threads: a TPGroup needs no process of its own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_model import PagedBatch

from ksana_lab.errors import EngineDead, KsanaLabError
from ksana_lab.layers.embedding import VocabEmbedding, VocabHead
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.registry import load_model
from ksana_lab.models.synth import synthesize

CPU = torch.device("cpu")


def on_every_rank(size: int, init_method: str, work) -> list:
    """Run ``work(tp)`` on every rank of a group; results in rank order."""

    def run(rank: int):
        tp = TPGroup.connect(rank, size, init_method, timeout_s=30)
        try:
            return work(tp)
        finally:
            tp.barrier()
            tp.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture
def meeting(tmp_path):
    return f"file://{tmp_path}/meeting"


@pytest.mark.parametrize(("arch", "size"), [("llama", 2), ("qwen2", 2), ("qwen3", 2), ("qwen3", 4), ("qwen2", 8)])
def test_logits_equal_those_of_one_rank(tmp_path, meeting, arch, size):
    path = synthesize(tmp_path / arch, arch, "tiny")
    config = ModelConfig.from_dir(path)
    prompt = list(range(3, 203, 5))

    def work(tp: TPGroup):
        batch = PagedBatch(load_model(config, path, dtype=torch.float32, device=CPU, tp=tp))
        seq = batch.new_sequence(60)
        first = batch.step([(seq, prompt)])[0]
        return first, batch.step([(seq, [7])])[0]

    (expected_first, expected_second) = work(TPGroup.single())
    results = on_every_rank(size, meeting, work)
    for first, second in results:
        assert torch.equal(first, results[0][0])  # every rank may sample
        torch.testing.assert_close(first, expected_first, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(second, expected_second, rtol=1e-4, atol=2e-5)


def test_vocabulary_that_ranks_do_not_divide_is_padded(meeting):
    vocab, hidden = 10, 4
    weight = torch.randn(vocab, hidden)

    def work(tp: TPGroup):
        embedding = VocabEmbedding(vocab, hidden, tp, torch.float32, CPU)
        (piece,) = embedding.pieces("embedding")
        piece.dest.copy_(weight[piece.index])
        head = VocabHead(vocab, hidden, tp, torch.float32, CPU, tied_to=embedding.weight)
        return embedding(torch.arange(vocab)), head(weight)

    for rows, logits in on_every_rank(4, meeting, work):
        assert torch.equal(rows, weight)
        torch.testing.assert_close(logits, weight @ weight.T)


def test_operations_agree_over_tcp(free_port):
    def work(tp: TPGroup):
        x = torch.full((2, 3), float(tp.rank + 1))
        return tp.all_gather(x).tolist(), tp.all_reduce(x).tolist()

    gathered, reduced = [[1.0] * 3 + [2.0] * 3] * 2, [[3.0] * 3] * 2
    assert on_every_rank(2, f"tcp://127.0.0.1:{free_port}", work) == [(gathered, reduced)] * 2


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_groups_live_in_one_process(tmp_path):
    def both(index: int):
        return on_every_rank(2, f"file://{tmp_path}/group{index}", lambda tp: float(tp.all_reduce(torch.tensor([index + tp.rank * 10.0]))))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(both, (1, 2))) == [[12.0, 12.0], [14.0, 14.0]]


def test_missing_rank_is_an_error_in_bounded_time(meeting):
    start = time.monotonic()
    with pytest.raises(KsanaLabError, match="rank 0 of 2 did not meet the others"):
        TPGroup.connect(0, 2, meeting, timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_waiting_for_a_rank_ends_when_it_is_known_to_be_dead(meeting):
    def note_death() -> None:
        raise EngineDead("rank 1 ended")

    with pytest.raises(EngineDead):
        TPGroup.connect(0, 2, meeting, timeout_s=60, while_waiting=note_death)


def test_rank_that_leaves_fails_the_others_at_once(meeting):
    left = threading.Event()

    def run(rank: int) -> float:
        tp = TPGroup.connect(rank, 2, meeting, timeout_s=30)
        tp.barrier()
        if rank == 1:
            tp.close()
            left.set()
            return 0.0
        assert left.wait(10)
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            tp.all_reduce(torch.ones(1))
        return time.monotonic() - start

    with ThreadPoolExecutor(2) as pool:
        waited, _ = pool.map(run, range(2))
    assert waited < 5


def test_single_group_is_free_and_closes_twice():
    tp = TPGroup.single()
    x = torch.ones(2)
    assert tp.all_reduce(x) is x and tp.all_gather(x) is x
    tp.barrier()
    tp.close()
    tp.close()


def test_messages_of_any_length_reach_every_rank(meeting):
    texts = [b"", b"\x00a longer one", b"b"]
    assert on_every_rank(3, meeting, lambda tp: tp.exchange(texts[tp.rank])) == [texts] * 3


def test_ranks_on_cpus_keep_their_all_reduce_and_say_why(meeting, caplog):
    def work(tp: TPGroup):
        tp.choose_all_reduce_by_size(1 << 20, torch.float32)
        return tp.by_size, tp.all_reduce(torch.ones(16)).tolist()

    with caplog.at_level("INFO"):
        assert on_every_rank(2, meeting, work) == [(None, [2.0] * 16)] * 2
    assert "all-reduce is not chosen by size: the ranks are not on GPUs" in caplog.text
