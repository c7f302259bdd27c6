"""Preemption by swapping, as the scheduler and the block manager see it."""

import pytest
from helpers_scheduling import FakeConnector, FakeWorkers, scheduler, sequence, true_next, true_output

from ksana_lab.core.connector import FirstToken
from ksana_lab.core.step import SchedulerOutput
from ksana_lab.types import Role


def two_that_grow(**options):
    """Two sequences of which the newer must go when both have grown."""
    sched = scheduler(**{"num_blocks": 8, "num_host_blocks": 8} | options)
    seqs = [sequence(i, 8, 16, ignore_eos=True) for i in range(2)]
    for seq in seqs:
        sched.add(seq)
    return sched, seqs


def expected(seqs):
    return {seq.request_id: true_output(seq.prompt_token_ids, seq.sampling) for seq in seqs}


def until_swapped(sched, work):
    for _ in range(200):
        out = work.turn()
        if sched.num_swapped:
            return out
    raise AssertionError("nothing was swapped out")


@pytest.mark.parametrize("depth", [0, 1])
def test_what_was_computed_is_copied_and_not_computed_again(depth):
    sched, seqs = two_that_grow()
    ran = []
    work = FakeWorkers(sched, depth=depth, on_step=lambda out: ran.extend((item.seq.seq_id, item.start) for item in out.scheduled))
    work.drain()
    assert work.outputs() == expected(seqs)
    assert sched.num_swap_outs == sched.num_swap_ins == sched.num_preemptions == 1
    assert len(ran) == len(set(ran))  # no token runs twice
    assert sched.blocks.host_pool.num_free == 8 and sched.check() == 0


def test_a_step_copies_out_what_the_steps_before_have_written():
    sched, seqs = two_that_grow()
    work = FakeWorkers(sched)
    out = until_swapped(sched, work)
    victim = seqs[1]
    num_blocks = -(-victim.num_computed_tokens // sched.blocks.block_size)
    assert [host for _, host in out.swap_out] == victim.host_block_table and len(out.swap_out) == num_blocks
    assert out.gone == [1] and victim.block_table == [] and victim.num_computed_tokens > 8 and not out.swap_in
    assert sched.blocks.host_pool.num_free == 8 - num_blocks and sched.check() == 0


def test_without_host_blocks_left_a_sequence_is_computed_again():
    sched, seqs = two_that_grow(num_host_blocks=2)
    work = FakeWorkers(sched)
    work.drain()
    assert sched.num_preemptions == 1 and sched.num_swap_outs == 0
    assert work.outputs() == expected(seqs)


def test_some_are_swapped_and_others_computed_again():
    sched = scheduler(num_blocks=10, num_host_blocks=4)
    seqs = [sequence(i, 4, 24, ignore_eos=True) for i in range(4)]
    for seq in seqs:
        sched.add(seq)
    work = FakeWorkers(sched)
    work.drain()
    assert 0 < sched.num_swap_outs < sched.num_preemptions and work.outputs() == expected(seqs)


def test_a_prompt_half_computed_goes_on_where_it_was():
    sched = scheduler(num_blocks=8, num_host_blocks=8, prefill_chunk_tokens=2)
    sched.add(old := sequence(0, 7, 20, ignore_eos=True))
    work = FakeWorkers(sched)
    work.turn()
    sched.add(new := sequence(1, 20, 4, ignore_eos=True))
    until_swapped(sched, work)
    assert 0 < new.num_computed_tokens < 20
    work.drain()
    assert work.outputs() == expected([old, new]) and sched.num_swap_ins == 1


def test_what_the_prefix_cache_still_has_is_shared_and_not_copied():
    sched = scheduler(num_blocks=8, num_host_blocks=8, caching=True)
    prompt = list(range(12))
    seqs = [sequence(0, prompt, 12, ignore_eos=True), sequence(1, [*prompt, 20], 12, ignore_eos=True)]
    for seq in seqs:
        sched.add(seq)
    copied = []
    work = FakeWorkers(sched, on_step=lambda out: copied.append((len(out.swap_out), len(out.swap_in))))
    work.drain()
    assert work.outputs() == expected(seqs) and sched.num_swap_ins > 0
    assert sum(back for _, back in copied) < sum(away for away, _ in copied)


@pytest.mark.parametrize("how", ["abort", "fail_all", "finish"])
def test_a_swapped_sequence_that_ends_gives_its_host_blocks_back(how):
    sched, _ = two_that_grow()
    work = FakeWorkers(sched, depth=1)
    until_swapped(sched, work)
    if how == "abort":
        sched.abort("r1", "gone", 0)
    elif how == "fail_all":
        sched.fail_all("unavailable", "going down", 0)
    else:
        sched.abort("r1", "stop", 0)
    assert sched.blocks.host_pool.num_free == 8
    work.drain()
    assert sched.is_idle and sched.check() == 0 and sched.blocks.num_free == 8


def test_the_last_token_may_come_when_its_sequence_is_swapped_out_already():
    swaps = set()
    for max_tokens in range(6, 12):
        sched = scheduler(num_blocks=8, num_host_blocks=8, caching=True)
        seqs = [sequence(0, 8, 16, ignore_eos=True), sequence(1, 8, max_tokens, ignore_eos=True)]
        for seq in seqs:
            sched.add(seq)
        work = FakeWorkers(sched, depth=1)
        work.drain()
        assert work.outputs() == expected(seqs) and sched.check() == 0 and sched.blocks.num_free == 8
        swaps.add((sched.num_swap_outs, sched.num_swap_ins))
    assert (1, 0) in swaps


def test_a_prompt_that_is_swapped_out_can_time_out():
    sched = scheduler(num_blocks=8, num_host_blocks=8, prefill_chunk_tokens=2, waiting_timeout_s=1.0)
    work = FakeWorkers(sched)
    sched.add(sequence(0, 7, 20, ignore_eos=True))
    work.turn()
    sched.add(sequence(1, 20, 4, ignore_eos=True))
    until_swapped(sched, work)
    work.now_ns = 2_000_000_000
    work.drain()
    assert work.finishes() == {"r0": "length", "r1": "timeout"} and sched.blocks.host_pool.num_free == 8


def test_the_self_check_sees_a_host_block_that_nobody_owns():
    sched, seqs = two_that_grow()
    until_swapped(sched, FakeWorkers(sched))
    seqs[1].host_block_table.pop()
    assert sched.check() == 1


def decode_node(**options):
    connector = FakeConnector(keeps_blocks=False)
    sched = scheduler(role=Role.DECODE, connector=connector, **{"num_blocks": 8, "num_host_blocks": 8} | options)
    return sched, connector


def test_a_decode_node_swaps_what_has_arrived():
    sched, connector = decode_node()
    work = FakeWorkers(sched)
    seqs = [sequence(i, 8, 16, key=True, ignore_eos=True) for i in range(2)]
    for seq in seqs:
        sched.add(seq)
    work.turn()
    for seq in seqs:
        work.store(seq.block_table, seq.prompt_token_ids)
        connector.news.received[seq.seq_id] = FirstToken(true_next(seq.prompt_token_ids))
    work.drain()
    assert sched.num_swap_ins == 1 and connector.announced == [0, 1] and work.outputs() == expected(seqs)


def test_no_block_is_announced_to_a_prefill_node_while_a_copy_may_still_read_it():
    sched, connector = decode_node(num_blocks=9)
    for i in range(2):
        sched.add(sequence(i, 8, 20, ignore_eos=True))  # served here, as by a mixed node
    work = FakeWorkers(sched, depth=1)
    until_swapped(sched, work)
    sched.abort("r1", "gone", 0)
    sched.add(sequence(2, 3, 1, key=True))
    work.turn()  # schedules while the copies may be under way, then hears that they are over
    assert connector.announced == []
    work.turn()
    assert connector.announced == [2]


def test_more_may_be_kept_free_before_one_is_swapped_in():
    def turns_until_back(spare):
        sched = scheduler(num_blocks=12, num_host_blocks=12, swap_in_spare_blocks=spare)
        for seq_id, max_tokens in enumerate((24, 10, 24)):
            sched.add(sequence(seq_id, 8, max_tokens, ignore_eos=True))
        work, turns = FakeWorkers(sched), 0
        until_swapped(sched, work)
        while not sched.num_swap_ins:
            work.turn()
            turns += 1
        return turns

    assert turns_until_back(0.0) < turns_until_back(4.0)


def test_a_step_of_copies_alone_is_not_empty():
    assert SchedulerOutput(0).is_empty
    assert not SchedulerOutput(0, swap_out=[(1, 2)]).is_empty and not SchedulerOutput(0, swap_in=[(1, 2)]).is_empty
