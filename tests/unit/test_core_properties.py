"""Random streams of requests, aborts, time-outs and transfer news, on every role and pipeline depth: what must hold whatever happens."""

import random
from collections import Counter

import pytest
from helpers_scheduling import FakeConnector, FakeWorkers, scheduler, sequence, true_next, true_output
from hypothesis import given, settings
from hypothesis import strategies as st

from ksana_lab.core.connector import FirstToken
from ksana_lab.errors import RequestError
from ksana_lab.types import Role

MS = 1_000_000


def check_step(sched, out):
    """One step keeps every limit."""
    lens = [item.num_tokens for item in out.scheduled]
    assert sum(lens) <= sched.options.max_num_batched_tokens and len(lens) <= sched.max_num_seqs
    assert lens == sorted(lens, key=lambda n: n > 1) and all(n > 0 for n in lens)
    assert len({item.seq.seq_id for item in out.scheduled}) == len(lens)
    chunk = sched.options.prefill_chunk_tokens or max(lens, default=0)
    assert all(n <= chunk for n in lens)
    assert all(len(item.seq.block_table) * sched.blocks.block_size >= item.end for item in out.scheduled)
    assert not (out.swap_out and out.swap_in)
    for copies in (out.swap_out, out.swap_in):
        assert len({target for _, target in copies}) == len(copies)


def check_blocks(sched):
    """Nothing has leaked, and no block of one sequence is another's."""
    assert sched.check() == 0
    living = [seq for queue in sched._queues for seq in queue.values()]
    assert not any(seq.block_table and seq.host_block_table for seq in living)
    on_host = [block for seq in living for block in seq.host_block_table]
    assert len(set(on_host)) == len(on_host)
    owners = Counter(block for seq in living for block in seq.block_table)
    assert all(sched.blocks.pool.ref_count(block) == owners[block] for block in range(sched.blocks.num_blocks))


@st.composite
def setups(draw):
    return {
        "num_blocks": draw(st.integers(3, 20)),
        "num_host_blocks": draw(st.sampled_from([0, 0, 3, 10, 60])),
        "swap_in_spare_blocks": draw(st.sampled_from([0.0, 1.0, 2.0])),
        "caching": draw(st.booleans()),
        "max_num_batched_tokens": draw(st.integers(1, 24)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "prefill_chunk_tokens": draw(st.sampled_from([0, 1, 3, 8])),
        "max_num_pretransfer_seqs": draw(st.integers(0, 3)),
        "waiting_timeout_s": draw(st.sampled_from([0.05, 1e9])),
    }


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.booleans()), min_size=1, max_size=12)


class Peer:
    """The other node of a fake connector, driven by dice: delivers, dooms, fails and acknowledges at random."""

    def __init__(self, sched, work, dice):
        self.sched, self.work, self.dice = sched, work, dice

    def act(self, is_draining):
        sched, news = self.sched, self.sched.connector.news
        for seq in list(sched.waiting_kv.values()):
            fate = self.dice.random()
            if fate < 0.3 or is_draining:
                self.work.store(seq.block_table, seq.prompt_token_ids)
                news.received[seq.seq_id] = FirstToken(true_next(seq.prompt_token_ids))
            elif fate < 0.35:
                news.failed[seq.seq_id] = "cut"
            elif fate < 0.4:
                news.doomed[seq.seq_id] = "cut"
        for seq_id in list(sched.connector.unbegun):
            if is_draining or self.dice.random() < 0.2:
                sched.connector.unbegun.discard(seq_id)
        for seq_id in list(sched.held):
            if is_draining or self.dice.random() < 0.3:
                if sched.role is Role.PREFILL and self.dice.random() < 0.7:
                    news.sent.append(seq_id)
                else:
                    news.failed[seq_id] = "dropped"


class Connector(FakeConnector):
    """Keeps the blocks of what it was told about and has not reported on. Its peer writes as soon as it knows where."""

    work = None

    def on_allocated(self, seq):
        super().on_allocated(seq)
        if self.work.scheduler.role is Role.DECODE:
            self.work.store(seq.block_table, seq.prompt_token_ids)

    def on_finished(self, seq):
        super().on_finished(seq)
        return bool(seq.block_table) and (not seq.output_token_ids or seq.seq_id in self.first_tokens)


def play(setup, stream, seed, role, depth):
    """Adds, aborts and turns in random order, then runs until nothing is left."""
    dice = random.Random(seed)
    connector = Connector() if role.is_disaggregated else None
    sched = scheduler(role=role, connector=connector, **setup)
    work = FakeWorkers(sched, depth=depth, on_step=lambda out: check_step(sched, out))
    peer = Peer(sched, work, dice)
    if connector:
        connector.work = work
    seqs, aborted = {}, set()
    for number, (size, max_tokens, kind, has_key) in enumerate(stream):
        prompt = [(kind + i) % 49 for i in range(size)]  # few distinct prompts: prefixes are shared
        seq = sequence(number, prompt, max_tokens, key=has_key and role.is_disaggregated, arrival_ns=work.now_ns)
        if connector and dice.random() < 0.5:
            connector.unbegun.add(number)
        try:
            sched.add(seq)
            seqs[seq.request_id] = seq
        except RequestError:
            pass
        for _ in range(dice.randrange(4)):
            work.now_ns += dice.randrange(20) * MS
            if connector:
                peer.act(False)
            work.turn()
            check_blocks(sched)
            if seqs and dice.random() < 0.15:
                victim = dice.choice(list(seqs))
                aborted.add(victim)
                sched.abort(victim, "gone", work.now_ns)
    for _ in range(200):
        if connector:
            peer.act(True)
        work.drain()
        if sched.is_idle:
            break
    return sched, work, seqs


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("role", list(Role))
@settings(max_examples=40, deadline=None)
@given(setup=setups(), stream=requests, seed=st.integers(0, 1 << 30))
def test_whatever_happens_nothing_leaks_and_every_token_is_right(role, depth, setup, stream, seed):
    check_end(*play(setup, stream, seed, role, depth))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("role", list(Role))
@settings(max_examples=40, deadline=None)
@given(
    setup=setups(),
    blocks=st.tuples(st.integers(8, 14), st.integers(1, 30)),
    stream=st.lists(st.tuples(st.integers(1, 12), st.integers(8, 30), st.integers(0, 2), st.booleans()), min_size=3, max_size=8),
    seed=st.integers(0, 1 << 30),
)
def test_the_same_where_most_is_swapped(role, depth, setup, blocks, stream, seed):
    """Short prompts and long answers: sequences are admitted together and outgrow the blocks."""
    setup |= {"num_blocks": blocks[0], "num_host_blocks": blocks[1], "max_num_batched_tokens": 24, "max_num_seqs": 6}
    check_end(*play(setup, stream, seed, role, depth))


def check_end(sched, work, seqs):
    assert sched.is_idle and sched.check() == 0
    assert sched.blocks.num_free == sched.blocks.num_blocks
    assert sched.blocks.host_pool.num_free == sched.blocks.host_pool.num_blocks
    finishes, outputs = work.finishes(), work.outputs()
    assert finishes.keys() == seqs.keys()
    for name, seq in seqs.items():
        expected = true_output(seq.prompt_token_ids, seq.sampling, sched.max_model_len)
        if sched.role is Role.PREFILL and seq.transfer:
            expected = expected[:1]
        given_out = outputs.get(name, [])
        assert given_out == expected[: len(given_out)]
        assert len(given_out) == len(expected) or finishes[name] in ("aborted", "timeout", "transfer_failed")


@settings(max_examples=60, deadline=None)
@given(setup=setups(), stream=requests)
def test_a_pipelined_engine_says_the_same_as_one_that_waits(setup, stream):
    setup["waiting_timeout_s"] = 1e9
    said = []
    for depth in (0, 1):
        sched = scheduler(**setup)
        work = FakeWorkers(sched, depth=depth)
        for number, (size, max_tokens, kind, _) in enumerate(stream):
            try:
                sched.add(sequence(number, [(kind + i) % 49 for i in range(size)], max_tokens))
            except RequestError:
                pass
        work.drain()
        assert sched.is_idle
        said.append((work.outputs(), work.finishes()))
    assert said[0] == said[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30))
def test_an_old_request_is_not_starved_by_newer_ones(seed):
    """A prompt as large as the cache, in a never-ending stream of small ones, gets its turn: nobody who came later goes first."""
    dice = random.Random(seed)
    sched = scheduler(num_blocks=8, max_num_seqs=4, caching=dice.random() < 0.5)
    work, number = FakeWorkers(sched), 0
    while "r5" not in work.finishes():
        size = 28 if number == 5 else dice.randrange(1, 9)
        sched.add(sequence(number, size, dice.randrange(1, 5)))
        number += 1
        work.turn()
        assert number < 120
