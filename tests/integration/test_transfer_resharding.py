"""A prefill and a decode node of different tensor parallel sizes, a process each, as ``shm`` and ``cuda_ipc`` have them: every byte of the
right heads, from the rank that computed it to the ranks that need it. On a GPU all ranks' caches share one."""

import multiprocessing
from contextlib import contextmanager

import numpy as np
import pytest
from transfer_nodes import BLOCK, BLOCKS, HEADS, Node, random_kv, wait_for

from ksana_lab.types import Role

LENGTHS = {1: 37, 2: 64, 3: 5}  # tokens of each request
TIMEOUT_S = 60.0
SIZES = ((1, 2), (4, 2), (2, 1), (2, 4), (8, 2), (1, 8))
CASES = [  # what sizes do to a plan is tested in test_transfer_end_to_end; here: processes, and GPUs
    ("cpu", "shm", "layer", 2, 4),
    *(
        pytest.param("cuda", backend, mode, *tp, marks=pytest.mark.gpu)
        for backend, mode, sizes in (
            ("cuda_ipc", "layer", SIZES),
            ("cuda_ipc", "bulk", SIZES[:2]),
            ("shm", "layer", SIZES[:2]),
            ("tcp", "layer", SIZES[:2]),
        )
        for tp in sizes
    ),
]


def sequences(node):
    """By number, in blocks scattered over the cache."""
    blocks = np.random.default_rng(node.role is Role.DECODE).permutation(BLOCKS).tolist()
    return {n: node.sequence(n, length, [blocks.pop() for _ in range(-(-length // BLOCK))]) for n, length in LENGTHS.items()}


def decode(pipe, tp, options):
    """The decode node's process."""
    node = Node(Role.DECODE, tp, **options)
    try:
        pipe.send(None)
        node.name(node, address=pipe.recv())
        seqs = sequences(node)
        for seq in seqs.values():
            node.connector.on_allocated(seq)
        node.wait(lambda news: len(news.received) == len(seqs), "all requests", TIMEOUT_S)
        pipe.send({number: (node.read(seq, LENGTHS[number]), node.news.received[seq.seq_id].token_id) for number, seq in seqs.items()})
        pipe.recv()  # P has heard of the last acknowledgement
    finally:
        node.close()


@contextmanager
def decode_process(tp, options):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=decode, args=(theirs, tp, options), daemon=True)
    process.start()
    theirs.close()

    def receive():
        assert pipe.poll(TIMEOUT_S), f"the decode node said nothing for {TIMEOUT_S:g} s"
        return pipe.recv()

    try:
        receive()
        yield pipe.send, receive
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    finally:
        process.kill()


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


@pytest.mark.parametrize(("device", "backend", "mode", "p_tp", "d_tp"), CASES)
def test_every_byte_arrives_and_each_rank_sends_its_own(device, backend, mode, p_tp, d_tp):
    options = {"backend": backend, "transfer_mode": mode, "device": device}
    with decode_process(d_tp, options) as (tell, receive):
        p = Node(Role.PREFILL, p_tp, **options)
        try:
            p.name(p)
            tell(p.connector.address)
            wait_for(p.connector.connected, "the decode node", TIMEOUT_S)
            kv = {number: random_kv(length, seed=number) for number, length in LENGTHS.items()}
            seqs = sequences(p)
            for number, seq in seqs.items():
                p.prefill(seq, kv[number], chunk=20, token=number)
            p.wait(lambda news: len(news.sent) == len(seqs), "acknowledgements", TIMEOUT_S)
            for number, (arrived, token) in receive().items():
                assert np.array_equal(arrived, kv[number]) and token == number
            num_copies = max(1, d_tp // HEADS)  # of a head that several decode ranks hold
            share = num_copies * sum(numbers.nbytes for numbers in kv.values()) / min(p_tp, HEADS)
            sent = [worker.stats()["bytes_sent"] for worker in p.workers]
            assert sorted(sent) == [0] * (p_tp - min(p_tp, HEADS)) + [share] * min(p_tp, HEADS)  # of a head's replicas one sends
            tell(None)
        finally:
            p.close()
