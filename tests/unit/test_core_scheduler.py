import pytest
from helpers_scheduling import EOS, FakeWorkers, scheduler, sequence, true_output

from ksana_lab.core.step import StepTokens
from ksana_lab.errors import InvalidRequest, PromptTooLong, QueueFull
from ksana_lab.types import FinishReason, Role

S = 1_000_000_000


def ran(out):
    return {item.seq.seq_id: item.num_tokens for item in out.scheduled}


def add(sched, *seqs):
    for seq in seqs:
        sched.add(seq)
    return seqs


def test_first_come_first_served_within_the_token_budget():
    sched = scheduler(max_num_batched_tokens=10)
    add(sched, sequence(0, 6), sequence(1, 6), sequence(2, 6))
    assert ran(sched.schedule(0)) == {0: 6, 1: 4}


def test_decodes_run_before_the_chunks_of_older_prompts():
    sched = scheduler(max_num_batched_tokens=8, prefill_chunk_tokens=6)
    work = FakeWorkers(sched)
    add(sched, sequence(0, 20), sequence(1, 2, ignore_eos=True))
    work.turn()  # 6 of the long prompt, and the short one whole
    out = work.turn()
    assert [(item.seq.seq_id, item.num_tokens) for item in out.scheduled] == [(1, 1), (0, 6)]


def test_a_prompt_is_cut_into_chunks_and_samples_after_the_last():
    sched = scheduler(prefill_chunk_tokens=8)
    add(sched, sequence(0, 19))
    work, chunks = FakeWorkers(sched), []
    while not work.updates:
        chunks += [(item.start, item.end, item.samples) for item in work.turn().scheduled]
    assert chunks == [(0, 8, False), (8, 16, False), (16, 19, True)]


def test_no_more_sequences_run_at_once_than_allowed():
    sched = scheduler(max_num_seqs=2)
    add(sched, *(sequence(i, 3) for i in range(4)))
    assert len(sched.schedule(0).scheduled) == 2 and sched.num_waiting == 2


def test_outputs_are_those_of_each_sequence_alone():
    sched = scheduler(caching=True, max_num_batched_tokens=9)
    seqs = add(sched, *(sequence(i, 5 + i, max_tokens=12) for i in range(6)))
    work = FakeWorkers(sched)
    work.drain()
    assert work.outputs() == {seq.request_id: true_output(seq.prompt_token_ids, seq.sampling) for seq in seqs}
    assert sched.check() == 0 and sched.blocks.num_free == 64


def test_memory_shortage_preempts_the_newest_and_costs_no_token():
    sched = scheduler(num_blocks=8)
    seqs = add(sched, sequence(0, 8, 16, ignore_eos=True), sequence(1, 8, 16, ignore_eos=True))
    work = FakeWorkers(sched)
    work.drain()
    assert seqs[0].num_preemptions == 0 and seqs[1].num_preemptions > 0
    assert work.outputs() == {seq.request_id: true_output(seq.prompt_token_ids, seq.sampling) for seq in seqs}


def test_a_preempted_sequence_goes_before_those_that_never_ran():
    sched = scheduler(num_blocks=6, max_num_seqs=2)
    add(sched, sequence(0, 8, 12, ignore_eos=True), sequence(1, 8, 12, ignore_eos=True), sequence(2, 4, 2))
    work, admitted = FakeWorkers(sched), []
    work.on_step = lambda out: admitted.extend(item.seq.seq_id for item in out.scheduled if item.is_first)
    work.drain()
    assert admitted == [0, 1, 1, 2]


def test_recomputation_finds_its_own_prefix_in_the_cache():
    sched = scheduler(num_blocks=8, caching=True)
    add(sched, sequence(0, 8, 16, ignore_eos=True), sequence(1, 8, 16, ignore_eos=True))
    work, recomputed = FakeWorkers(sched), []
    work.on_step = lambda out: recomputed.extend(item for item in out.scheduled if item.is_first and item.seq.num_preemptions)
    work.drain()
    assert recomputed and all(item.start > 0 for item in recomputed)


def test_the_head_of_the_queue_is_not_overtaken():
    sched = scheduler(num_blocks=8)
    work = FakeWorkers(sched)
    add(sched, sequence(0, 20, 4, ignore_eos=True))
    work.turn()
    add(sched, sequence(1, 20), sequence(2, 1))  # the third would fit
    assert ran(work.turn()) == {0: 1}


def test_a_prompt_that_never_fits_is_refused_at_once():
    sched = scheduler(num_blocks=4)
    with pytest.raises(PromptTooLong, match="16 tokens"):
        sched.add(sequence(0, 16))
    assert sched.is_idle
    sched.add(sequence(1, 15))


def test_one_sequence_alone_ends_when_the_cache_is_full():
    sched = scheduler(num_blocks=3)
    (seq,) = add(sched, sequence(0, 8, 100, ignore_eos=True))
    work = FakeWorkers(sched)
    work.drain()
    assert seq.finish_reason is FinishReason.LENGTH and seq.num_tokens == 12 and seq.num_preemptions == 0


def test_model_length_ends_a_sequence():
    sched = scheduler(max_len=11)
    (seq,) = add(sched, sequence(0, 8, 100, ignore_eos=True))
    FakeWorkers(sched).drain()
    assert seq.num_tokens == 11


def test_a_full_queue_is_refused_and_a_duplicate_id_too():
    sched = scheduler(max_num_waiting=1)
    sched.add(sequence(0, 3))
    with pytest.raises(QueueFull):
        sched.add(sequence(1, 3))
    with pytest.raises(InvalidRequest, match="in use"):
        sched.add(sequence(0, 3))
    with pytest.raises(InvalidRequest, match="empty"):
        sched.add(sequence(2, 0))


def test_token_ids_beyond_the_vocabulary_are_refused():
    sched = scheduler(vocab_size=10)
    for bad in ([3, 10], [-1, 3]):
        with pytest.raises(InvalidRequest, match=r"0\.\.9"):
            sched.add(sequence(0, bad))
    sched.add(sequence(0, [0, 9]))


def test_waiting_longer_than_the_timeout_is_an_error_and_frees_everything():
    sched = scheduler(num_blocks=4, waiting_timeout_s=2.0)
    work = FakeWorkers(sched)
    add(sched, sequence(0, 8, 7, ignore_eos=True, arrival_ns=0), sequence(1, 9, arrival_ns=S))
    work.turn()
    assert sched.next_deadline_ns == 3 * S  # the first has its first token and cannot time out any more
    work.now_ns = 3 * S
    work.drain()
    assert work.finishes() == {"r0": "length", "r1": "timeout"}
    assert sched.blocks.num_free == 4


def test_a_prompt_under_way_can_time_out_too():
    sched = scheduler(prefill_chunk_tokens=4, waiting_timeout_s=1.0)
    work = FakeWorkers(sched)
    add(sched, sequence(0, 40))
    work.turn()
    work.now_ns = S
    work.drain()
    assert work.finishes() == {"r0": "timeout"} and sched.is_idle and sched.check() == 0


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_turns", [0, 1, 2, 4])
def test_abort_in_every_phase_frees_the_blocks(num_turns, depth):
    sched = scheduler(prefill_chunk_tokens=5)
    work = FakeWorkers(sched, depth=depth)
    add(sched, sequence(0, 10, 20, ignore_eos=True))
    for _ in range(num_turns):
        work.turn()
    sched.abort("r0", "client disconnected", 0)
    work.drain()
    assert work.finishes() == {"r0": "aborted"}
    assert sched.is_idle and sched.check() == 0 and sched.blocks.num_free == 64


def test_a_stop_found_in_the_text_ends_in_silence():
    sched = scheduler()
    work = FakeWorkers(sched)
    add(sched, sequence(0, 4, 20, ignore_eos=True))
    work.turn()
    sched.abort("r0", "stop", 0)
    sched.abort("r0", "stop", 0)  # late news are ignored
    work.drain()
    assert work.finishes() == {} and sched.is_idle


def test_abort_of_a_preempted_sequence():
    sched = scheduler(num_blocks=6)
    add(sched, sequence(0, 8, 16, ignore_eos=True), sequence(1, 8, 16, ignore_eos=True))
    work = FakeWorkers(sched)
    while not sched.preempted:
        work.turn()
    sched.abort("r1", "gone", 0)
    work.drain()
    assert work.finishes() == {"r0": "length", "r1": "aborted"} and sched.check() == 0


def test_blocks_of_a_finished_sequence_stay_until_the_step_under_way_is_over():
    sched = scheduler(num_blocks=4)
    prompt = next(p for p in ([i] for i in range(40)) if true_output(p, sequence(0, 1, 9).sampling)[1:2] == [EOS])
    sched.add(sequence(0, prompt, 9))
    work = FakeWorkers(sched, depth=1)
    while not work.finishes():
        work.turn()
    assert len(sched.draining) == 1 and sched.blocks.num_free == 3 and not sched.is_idle  # one token too many is being computed
    work.drain()
    assert sched.is_idle and sched.blocks.num_free == 4
    assert work.outputs() == {"r0": true_output(prompt, sequence(0, 1, 9).sampling)}


def test_a_known_end_is_not_overrun_when_pipelined():
    sched = scheduler()
    work = FakeWorkers(sched, depth=1)
    sched.add(sequence(0, 3, 5, ignore_eos=True))
    work.drain()
    assert work.num_steps == 5


def test_min_tokens_and_stop_tokens():
    sched = scheduler()
    (seq,) = add(sched, sequence(0, [1, 2], 10, min_tokens=3, stop_token_ids=(7,)))
    step = sched.schedule(0)
    for token in (7, 3, 7):
        sched.update(step, StepTokens({0: token}), 0)
        step = sched.schedule(0)
    last = sched.take_updates()[-1]
    assert seq.output_token_ids == [7, 3, 7]  # the first came too early to stop
    assert (last.finish, last.stop_reason) == (FinishReason.STOP, 7)


def test_prefix_hits_are_reported_to_the_client():
    sched = scheduler(caching=True)
    work = FakeWorkers(sched)
    sched.add(sequence(0, list(range(10)), 2))
    work.drain()
    sched.add(sequence(1, [*range(9), 30], 2))
    work.drain()
    assert next(u for u in work.updates if u.request_id == "r1").num_cached_tokens == 8
    assert (sched.prefix_hit_tokens, sched.prefix_query_tokens) == (8, 20)


def test_events_carry_the_routers_request_id():
    class Sink:
        enabled, seen = True, []

        def instant(self, name, cat, **args):
            self.seen.append((name, args["request_id"]))

    sched = scheduler()
    sched._events = Sink()
    seq = sequence(0, 3, 1)
    seq.request_id = "abc:0"
    sched.add(seq)
    FakeWorkers(sched).drain()
    assert Sink.seen == [(name, "abc") for name in ("QUEUED", "PREFILL_START", "PREFILL_END", "FIRST_TOKEN", "FINISHED")]


def test_everything_ends_when_the_engine_goes_down():
    sched = scheduler(max_num_seqs=1)
    add(sched, sequence(0, 4), sequence(1, 4))
    sched.schedule(0)
    sched.fail_all("unavailable", "going down", 0)
    assert {u.request_id: u.error_type for u in sched.take_updates()} == {"r0": "unavailable", "r1": "unavailable"}


@pytest.mark.parametrize(
    ("role", "option", "first"),
    [
        (Role.PREFILL, None, {0: 1500, 1: 500}),
        (Role.PREFILL, 1600, {0: 1500}),
        (Role.PREFILL, 0, {0: 1500, 1: 500, 2: 900}),
        (Role.MIXED, None, {0: 1500, 1: 500, 2: 900}),
    ],
)
def test_a_prefill_node_s_step_takes_more_than_one_prompt_up_to_a_bound(role, option, first):
    sched = scheduler(num_blocks=2000, role=role, max_num_batched_tokens=8192, prefill_step_tokens=option)
    add(sched, *(sequence(i, length) for i, length in enumerate((1500, 500, 900))))
    assert ran(sched.schedule(0)) == first


def test_what_a_prefill_node_finds_in_its_cache_does_not_count_for_the_bound():
    sched = scheduler(num_blocks=2000, role=Role.PREFILL, max_num_batched_tokens=8192, caching=True)
    shared = [7] * 3000
    add(sched, sequence(0, shared, max_tokens=1))
    FakeWorkers(sched).drain()
    add(sched, *(sequence(i, [*shared, *[i] * 50]) for i in range(1, 9)))
    assert len(ran(sched.schedule(0))) == 8


def test_of_a_prompt_in_chunks_the_first_counts_for_the_bound_of_a_prefill_node_s_step():
    sched = scheduler(num_blocks=5000, role=Role.PREFILL, max_num_batched_tokens=8192, prefill_chunk_tokens=512)
    add(sched, *(sequence(i, 3000) for i in range(5)))
    assert ran(sched.schedule(0)) == {i: 512 for i in range(4)}


def test_a_prompt_above_the_bound_of_a_prefill_node_s_step_runs_whole_and_alone():
    sched = scheduler(num_blocks=2000, role=Role.PREFILL, max_num_batched_tokens=8192)
    add(sched, sequence(0, 5000), sequence(1, 5))
    assert ran(sched.schedule(0)) == {0: 5000}
