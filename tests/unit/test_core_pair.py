"""A prefill and a decode scheduler that hear of the same prompts in different order, with room for few: both come to an end."""

import random

from helpers_scheduling import FakeConnector, FakeWorkers, scheduler, sequence, true_next, true_output
from hypothesis import given, settings
from hypothesis import strategies as st

from ksana_lab.core.connector import FirstToken
from ksana_lab.types import Role


class Node:
    def __init__(self, role, prompts, order, **options):
        self.connector = FakeConnector(keeps_blocks=role is Role.PREFILL)
        self.scheduler = scheduler(role=role, connector=self.connector, **options)
        self.workers = FakeWorkers(self.scheduler)
        self.seqs = [sequence(i, size, 3, key=True, ignore_eos=True) for i, size in enumerate(prompts)]
        if role is Role.DECODE:
            self.connector.unbegun.update(order)
        for i in order:
            self.scheduler.add(self.seqs[i])


def exchange(p: Node, d: Node) -> None:
    """What the transfer does between two turns."""
    d.connector.unbegun.difference_update(p.connector.announced)
    for i in set(d.scheduler.waiting_kv) & set(p.scheduler.held):
        d.workers.store(d.seqs[i].block_table, d.seqs[i].prompt_token_ids)
        d.connector.news.received[i] = FirstToken(true_next(d.seqs[i].prompt_token_ids))
        p.connector.news.sent.append(i)


@settings(max_examples=250, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    seed=st.integers(0, 1 << 30),
    blocks=st.tuples(st.integers(6, 14), st.integers(6, 14)),
    places=st.tuples(st.integers(1, 4), st.integers(0, 3)),
    chunk=st.sampled_from([0, 5]),
    max_len=st.sampled_from([24, 1 << 20]),
    num_host_blocks=st.sampled_from([0, 9]),
)
def test_neither_waits_for_the_other(prompts, seed, blocks, places, chunk, max_len, num_host_blocks):
    orders = [random.Random(seed + i).sample(range(len(prompts)), len(prompts)) for i in range(2)]
    options = {"max_len": max_len, "max_num_seqs": places[0], "max_num_pretransfer_seqs": places[1], "prefill_chunk_tokens": chunk}
    options["num_host_blocks"] = num_host_blocks
    p = Node(Role.PREFILL, prompts, orders[0], num_blocks=blocks[0], **options)
    d = Node(Role.DECODE, prompts, orders[1], num_blocks=blocks[1], **options)
    for _ in range(40 * len(prompts)):
        p.workers.turn()
        d.workers.turn()
        exchange(p, d)
    assert p.scheduler.is_idle and d.scheduler.is_idle
    assert d.workers.outputs() == {seq.request_id: true_output(seq.prompt_token_ids, seq.sampling) for seq in d.seqs}
