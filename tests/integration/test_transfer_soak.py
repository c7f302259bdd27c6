"""Hundreds of requests with cancels at any moment, over few blocks that are used again as soon as they are free."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_transfer_failures import assert_clean
from transfer_nodes import BLOCKS, Node, make_pair, random_kv

from ksana_lab.core.connector import FirstToken


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


SETTINGS = [("tcp", 1, 1, "layer"), ("shm", 2, 1, "layer"), ("tcp", 1, 2, "chunk"), ("staged_shm", 1, 2, "layer")]


class Side:
    """One node's sequences and its free blocks."""

    def __init__(self, node: Node) -> None:
        self.node, self.free = node, list(range(BLOCKS))
        self.seqs: dict[int, tuple] = {}  # seq_id -> (number, seq); blocks are owned
        self.dead: set[int] = set()  # numbers that ended without their KV

    def begin(self, number: int, num_tokens: int):
        needed = -(-num_tokens // self.node.layout.block_size)
        if needed > len(self.free):
            return None
        blocks, self.free = self.free[:needed], self.free[needed:]
        seq = self.node.sequence(number, num_tokens, blocks=blocks)
        self.seqs[seq.seq_id] = (number, seq)
        self.node.connector.on_allocated(seq)
        return seq

    def end(self, seq_id: int):
        number, seq = self.seqs.pop(seq_id)
        self.free += seq.block_table
        return number, seq


def play(p: Side, d: Side, num_requests: int, seed: int, num_tokens: int = 40) -> tuple[int, int]:
    """Returns (received, failed)."""
    rng = random.Random(seed)
    kvs: dict[int, np.ndarray] = {}
    todo_d, todo_p = list(range(1, num_requests + 1)), list(range(1, num_requests + 1))
    computing: list[list] = []  # [number, seq, computed tokens]
    num_received = 0

    def hear() -> None:
        nonlocal num_received
        for side in (p, d):
            side.node._wake.clear()
            for worker in side.node.workers:
                worker.poll()
            news = side.node.connector.poll()
            for seq_id in news.received:
                number, seq = side.end(seq_id)
                assert np.array_equal(d.node.read(seq, seq.num_prompt_tokens), kvs[number]), number
                assert not side.node.connector.on_finished(seq)
                num_received += 1
            for seq_id in (*news.sent, *news.failed):
                number, _ = side.end(seq_id)
                if seq_id in news.failed:
                    side.dead.add(number)
                    computing[:] = [c for c in computing if side is d or c[0] != number]

    while todo_d or todo_p or p.seqs or d.seqs:
        hear()
        if todo_d and rng.random() < 0.5:
            number = todo_d[0]
            kvs.setdefault(number, random_kv(1 + rng.randrange(num_tokens), seed=number))
            if d.begin(number, kvs[number].shape[3]) is not None:
                todo_d.pop(0)
        if todo_p and len(computing) < 4 and rng.random() < 0.5:
            number = todo_p[0]
            kvs.setdefault(number, random_kv(1 + rng.randrange(num_tokens), seed=number))
            if (seq := p.begin(number, kvs[number].shape[3])) is not None:
                computing.append([todo_p.pop(0), seq, 0])
        if computing:
            entry = rng.choice(computing)
            number, seq, done = entry
            entry[2] = end = min(seq.num_prompt_tokens, done + 1 + rng.randrange(16))
            p.node.compute(seq, kvs[number], done, end)
            if end == seq.num_prompt_tokens:
                computing.remove(entry)
                p.node.connector.on_first_token(seq, FirstToken(number))
                p.node.connector.on_finished(seq)
            elif rng.random() < 0.05:
                computing.remove(entry)
                p.node.abort(seq)
        elif p.seqs or d.seqs:
            (p if rng.random() < 0.5 else d).node._wake.wait(0.01)
        if d.seqs and rng.random() < 0.05:
            d.node.abort(rng.choice(list(d.seqs.values()))[1])
    assert sorted(p.free) == sorted(d.free) == list(range(BLOCKS))
    return num_received, len(d.dead)


@pytest.mark.parametrize(("backend", "p_tp", "d_tp", "mode"), SETTINGS)
def test_nothing_leaks_and_nothing_is_corrupted(backend, p_tp, d_tp, mode):
    with make_pair(p_tp, d_tp, backend=backend, transfer_mode=mode, checksum=True, lease_s=5.0) as (p, d):
        num_received, num_failed = play(Side(p), Side(d), 150, seed=1)
        assert num_received + num_failed == 150 and num_received > 75 and num_failed > 5
        assert_clean(p, d)
        assert p.connector.stats()["lease_expiries"] == 0
