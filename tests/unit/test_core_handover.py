"""The scheduler between two nodes: what a decode node waits for, what a prefill node holds."""

import pytest
from helpers_scheduling import FakeConnector, FakeWorkers, scheduler, sequence, true_next, true_output

from ksana_lab.core.connector import FirstToken
from ksana_lab.errors import QueueFull
from ksana_lab.types import FinishReason, Role

S = 1_000_000_000


def decode_node(**options):
    connector = FakeConnector()
    sched = scheduler(role=Role.DECODE, connector=connector, **options)
    return sched, connector, FakeWorkers(sched)


def prefill_node(**options):
    connector = FakeConnector()
    sched = scheduler(role=Role.PREFILL, connector=connector, **options)
    return sched, connector, FakeWorkers(sched)


def deliver(work, connector, seq):
    """The peer has sent everything."""
    work.store(seq.block_table, seq.prompt_token_ids)
    connector.news.received[seq.seq_id] = FirstToken(true_next(seq.prompt_token_ids))


def test_decode_waits_until_all_kv_has_arrived():
    sched, connector, work = decode_node()
    seq = sequence(0, 9, 6, key=True)
    sched.add(seq)
    assert connector.queued == [0]
    assert not work.turn().scheduled and connector.announced == [0] and len(seq.block_table) == 3
    deliver(work, connector, seq)
    connector.keeps_blocks = False
    work.drain()
    assert work.outputs()["r0"] == true_output(seq.prompt_token_ids, seq.sampling)
    assert sched.check() == 0 and sched.blocks.num_free == 64


def test_first_token_that_ends_the_sequence_never_runs():
    sched, connector, work = decode_node()
    sched.add(seq := sequence(0, 5, 1, key=True))
    work.turn()
    connector.keeps_blocks = False
    deliver(work, connector, seq)
    work.drain()
    assert work.num_steps == 0 and work.finishes() == {"r0": "length"} and sched.is_idle


def test_first_token_is_news_with_the_phases_of_the_transfer():
    sched, connector, work = decode_node()
    sched.add(seq := sequence(0, 5, 4, key=True))
    work.now_ns = 3
    work.turn()
    deliver(work, connector, seq)
    work.now_ns = 8
    work.turn()
    first = work.updates[0]
    assert (first.scheduled_ns, first.transfer_start_ns, first.transfer_end_ns, first.first_token_ns) == (3, 3, 8, 8)


def test_kv_arrives_early_for_sequences_beyond_the_batch():
    sched, connector, work = decode_node(max_num_seqs=1, max_num_pretransfer_seqs=2)
    seqs = [sequence(i, 5, 30, key=True, ignore_eos=True) for i in range(4)]
    for seq in seqs:
        sched.add(seq)
    work.turn()
    assert connector.announced == [0, 1, 2]
    for seq in seqs[:2]:
        deliver(work, connector, seq)
    assert [item.seq.seq_id for item in work.turn().scheduled] == [0]
    assert list(sched.ready) == [1] and connector.announced == [0, 1, 2]


def test_two_prompts_that_do_not_fit_together_come_one_after_the_other():
    sched, connector, work = decode_node(num_blocks=6)
    connector.keeps_blocks = False
    first, second = sequence(0, 15, 2, key=True), sequence(1, 15, 2, key=True)
    sched.add(first)
    sched.add(second)
    work.turn()
    assert connector.announced == [0]
    deliver(work, connector, first)
    work.drain()
    assert connector.announced == [0, 1]


def test_a_prompt_that_p_has_begun_goes_before_one_that_it_has_not_when_room_is_scarce():
    sched, connector, work = decode_node(num_blocks=6)
    connector.unbegun.add(0)
    for seq_id in (0, 1):
        sched.add(sequence(seq_id, 15, 2, key=True))
    work.turn()
    assert connector.announced == [1]
    connector.unbegun.clear()
    work.turn()
    assert connector.announced == [1] and list(sched.waiting) == [0]  # no room yet, but it is its turn


@pytest.mark.parametrize(("max_len", "places", "announced"), [(16, 9, [0, 1, 2]), (32, 9, [0, 1]), (16, 2, [0])])
def test_prompts_that_p_has_not_begun_leave_a_place_and_room_for_the_longest_sequence(max_len, places, announced):
    sched, connector, work = decode_node(num_blocks=16, max_len=max_len, max_num_seqs=1, max_num_pretransfer_seqs=places - 1)
    connector.unbegun.update(range(4))
    for seq_id in range(4):
        sched.add(sequence(seq_id, 15, 1, key=True))
    work.turn()
    assert connector.announced == announced
    sched.add(begun := sequence(9, max_len - 1, 1, key=True))
    work.turn()
    assert connector.announced == [*announced, begun.seq_id]


def test_preemption_on_a_decode_node_recomputes_locally():
    sched, connector, work = decode_node(num_blocks=8)
    connector.keeps_blocks = False
    seqs = [sequence(i, 8, 16, key=True, ignore_eos=True) for i in range(2)]
    for seq in seqs:
        sched.add(seq)
    work.turn()
    for seq in seqs:
        deliver(work, connector, seq)
    work.drain()
    assert sched.num_preemptions > 0 and connector.announced == [0, 1]
    assert work.outputs() == {seq.request_id: true_output(seq.prompt_token_ids, seq.sampling) for seq in seqs}


def test_prefix_hits_of_a_decode_node_are_not_awaited():
    sched, connector, work = decode_node(caching=True)
    connector.keeps_blocks = False
    sched.add(old := sequence(0, list(range(12)), 1, key=True))
    work.turn()
    deliver(work, connector, old)
    work.drain()
    sched.add(seq := sequence(1, list(range(12)), 1, key=True))
    work.turn()
    assert seq.num_cached_tokens == 8  # the last block always comes, with at least one token


@pytest.mark.parametrize("how", ["abort", "timeout"])
def test_blocks_under_transfer_stay_until_nobody_writes_them(how):
    sched, connector, work = decode_node(waiting_timeout_s=1.0)
    sched.add(sequence(0, 9, key=True))
    work.turn()
    if how == "abort":
        sched.abort("r0", "client disconnected", 0)
    work.now_ns = 2 * S
    work.drain()
    assert work.finishes() == {"r0": {"abort": "aborted", "timeout": "timeout"}[how]}
    assert connector.finished == [0] and sched.blocks.num_free == 61 and not sched.is_idle
    connector.news.failed[0] = "dropped"
    work.drain()
    assert sched.blocks.num_free == 64 and sched.is_idle and len(work.finishes()) == 1


def test_a_failed_transfer_is_an_error_and_frees_the_blocks():
    sched, connector, work = decode_node()
    sched.add(sequence(0, 9, key=True))
    work.turn()
    connector.news.failed[0] = "the prefill node is gone"
    work.drain()
    assert work.finishes() == {"r0": "transfer_failed"} and "gone" in work.updates[0].error
    assert connector.finished == [] and sched.is_idle and sched.blocks.num_free == 64


def test_a_doomed_transfer_tells_the_client_first_and_frees_later():
    sched, connector, work = decode_node()
    sched.add(sequence(0, 9, key=True))
    work.turn()
    connector.news.doomed[0] = "link lost"
    work.drain()
    assert work.finishes() == {"r0": "transfer_failed"} and sched.blocks.num_free == 61
    connector.news.failed[0] = "link lost"
    work.drain()
    assert sched.blocks.num_free == 64 and sched.is_idle


def test_requests_without_a_key_are_served_as_by_a_mixed_node():
    sched, connector, work = decode_node()
    sched.add(seq := sequence(0, 9, 5))
    work.drain()
    assert work.outputs()["r0"] == true_output(seq.prompt_token_ids, seq.sampling)
    assert connector.announced == [] and connector.finished == []


def test_prefill_node_stops_after_one_token_and_holds_the_blocks():
    sched, connector, work = prefill_node()
    sched.add(seq := sequence(0, 9, 50, key=True, ignore_eos=True))
    work.drain()
    assert work.outputs()["r0"] == [connector.first_tokens[0]] == true_output(seq.prompt_token_ids, seq.sampling)[:1]
    assert seq.finish_reason is FinishReason.LENGTH and connector.finished == [0]
    assert list(sched.held) == [0] and sched.blocks.num_free == 61 and not sched.is_idle
    connector.news.sent.append(0)
    work.drain()
    assert sched.is_idle and sched.blocks.num_free == 64


def test_prefill_node_says_stop_when_the_first_token_is_the_end():
    sched, connector, work = prefill_node()
    prompt = next(p for p in ([i, i] for i in range(49)) if true_next(p) == 49)
    sched.add(sequence(0, prompt, 50, key=True))
    work.drain()
    assert work.finishes() == {"r0": "stop"} and connector.first_tokens == {0: 49}


def test_prefill_node_offers_its_prefix_hits_from_token_zero():
    sched, connector, work = prefill_node(caching=True, prefill_chunk_tokens=4)
    sched.add(sequence(0, list(range(12)), key=True))
    work.drain()
    connector.sends.clear()
    sched.add(sequence(1, [*range(10), 40, 41, 42], key=True))
    work.drain()
    assert connector.sends == [(1, 0, 12), (1, 12, 13)]


def test_abort_of_a_held_prompt_leaves_the_transfer_alone():
    sched, connector, work = prefill_node()
    sched.add(sequence(0, 9, key=True))
    work.drain()
    sched.abort("r0", "client disconnected", 0)
    work.drain()
    assert connector.finished == [0] and list(sched.held) == [0] and work.finishes() == {"r0": "length"}


def test_prompts_being_sent_are_never_preempted():
    sched, _, work = prefill_node(num_blocks=8, prefill_chunk_tokens=4)
    sched.add(local := sequence(0, 7, 20, ignore_eos=True))  # bypasses disaggregation, and grows
    work.turn()
    sched.add(sent := sequence(1, 22, key=True))
    work.drain()
    assert sent.num_preemptions == 0 and local.num_preemptions > 0 and len(sched.preempted) == 1
    sched.connector.news.sent.append(1)
    work.drain()
    assert work.outputs()["r0"] == true_output(local.prompt_token_ids, local.sampling)


def test_prefill_failure_while_running_waits_for_the_step_under_way():
    sched, connector, _ = prefill_node(prefill_chunk_tokens=4)
    work = FakeWorkers(sched, depth=1)
    sched.add(sequence(0, 9, key=True))
    work.turn()
    connector.news.failed[0] = "the decode node cancelled"
    work.drain()
    assert work.finishes() == {"r0": "transfer_failed"} and sched.is_idle and sched.check() == 0


def test_the_peer_hears_of_a_request_that_was_refused():
    sched, connector, _ = prefill_node(max_num_waiting=1)
    sched.add(sequence(0, 9, key=True))
    refused = sequence(1, 9, key=True)
    with pytest.raises(QueueFull):
        sched.add(refused)
    assert "1 requests are waiting already" in connector.declined[refused.transfer] and connector.queued == [0]
