"""KV that travels in eight bits, through real ends: over every backend and mode, re-sharded, checked, slowed down, started again."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_checkpoint import checkpoint, prompts
from helpers_pair import EnginePair
from test_transfer_end_to_end import send
from test_transfer_failures import assert_clean, begin
from transfer_nodes import Node, make_pair, random_kv, send_after_preemption, wait_for

from ksana_lab.bench.wire_dtype import measure
from ksana_lab.engine.llm import LLM
from ksana_lab.errors import TransferError
from ksana_lab.models.synth import shape
from ksana_lab.transfer import packing
from ksana_lab.transfer.link import Pacer
from ksana_lab.types import Role, SamplingParams

FP8 = {"wire_dtype": "fp8_e4m3"}


@pytest.fixture(autouse=True)
def tracker_enabled(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


def assert_close(found: np.ndarray, kv: np.ndarray) -> None:
    """Within half a step of float8_e4m3fn, and not the numbers themselves."""
    lost = np.abs(found - kv)
    assert (lost <= np.abs(kv) / 14 + np.abs(kv).max() / 448 / 512).all() and lost.max() > 0


@pytest.mark.parametrize("mode", ["bulk", "chunk", "layer"])
@pytest.mark.parametrize(("p_tp", "d_tp"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("backend", ["tcp", "shm"])
def test_every_number_arrives_in_a_third_of_its_bytes(backend, p_tp, d_tp, mode):
    with make_pair(p_tp, d_tp, backend=backend, transfer_mode=mode, checksum=True, **FP8) as (p, d):
        kv, seq = send(p, d)
        assert_close(d.read(seq, 37), kv)
        wait_for(lambda: p.connector.stats()["bytes_sent"] == d.connector.stats()["bytes_received"] > 0, "both counters")
        assert p.connector.stats()["bytes_sent"] < 0.36 * kv.nbytes  # blocks of 4 tokens, heads of 8 numbers: many scales
        assert sum(span["bytes"] for span in p.recorder.spans) == p.connector.stats()["bytes_sent"]


def test_what_d_has_cached_is_neither_sent_nor_touched():
    with make_pair(**FP8) as (p, d):
        kv, seq = send(p, d, num_cached=16)
        assert_close(d.read(seq, 37, start=16), kv[:, :, :, 16:])
        assert not d.read(seq, 16).any()


def test_the_checksum_is_of_the_bytes_on_the_wire(monkeypatch):
    read = packing.read

    def spoil(layout, packed):
        form, targets = read(layout, packed)
        d.memories[0][int(targets[0]) + form.header_bytes] ^= 1
        return form, targets

    with make_pair(checksum=True, **FP8) as (p, d):
        monkeypatch.setattr(packing, "read", spoil)
        on_p, on_d = begin(p, d)
        d.wait(lambda news: on_d.seq_id in news.failed, "failure")
        assert "checksum" in d.news.failed[on_d.seq_id]
        p.abort(on_p)
        assert_clean(p, d)


def test_an_emulated_link_counts_the_bytes_on_the_wire(monkeypatch):
    book, booked = Pacer.book, []
    monkeypatch.setattr(Pacer, "book", lambda self, nbytes, *when: (booked.append(nbytes), book(self, nbytes, *when))[1])
    with make_pair(transfer_mode="bulk", p={"link": {"bandwidth_gbps": 0.002}}, **FP8) as (p, d):
        send(p, d, num_tokens=128, chunk=128)
        (span,) = p.recorder.spans
        assert sum(booked) == p.connector.stats()["bytes_sent"]
        assert (span["end_ns"] - span["start_ns"]) / 1e9 >= sum(booked) * 8 / 0.002e9


def test_a_prompt_that_was_preempted_is_packed_anew():
    with make_pair(transfer_mode="layer", **FP8) as (p, d):
        kv, on_d = send_after_preemption(p, d)
        assert_close(d.read(on_d, 16), kv)


def test_a_request_given_up_while_it_is_expanded_keeps_off_its_blocks(monkeypatch):
    with make_pair(transfer_mode="bulk", backend="shm", **FP8) as (p, d):
        unpacker, kv = d.workers[0]._receiver._unpacker, random_kv(128)
        expand, seen = unpacker.expand, []

        def one_step(form, targets):
            expand(form, targets)
            seen.append(len(targets))
            if len(seen) == 1:  # as a time-out or a client's end would, from the other thread
                d.abort(on_d)
                wait_for(lambda: not d.workers[0]._receiver._incoming, "the drop")

        monkeypatch.setattr(unpacker, "expand", one_step)
        monkeypatch.setattr(packing, "STAGE_BYTES", 2048)
        on_d, on_p = d.sequence(1, 128), p.sequence(1, 128)
        d.connector.on_allocated(on_d)
        p.prefill(on_p, kv)
        d.wait(lambda news: on_d.seq_id in news.failed, "the end")
        assert len(seen) == 1
        assert_clean(p, d)


def test_a_pair_that_does_not_agree_says_so_on_both_sides():
    p, d = Node(Role.PREFILL, **FP8), Node(Role.DECODE)
    try:
        for node in (p, d):
            node.name(p, d)
        for node in (p, d):
            wait_for(lambda node=node: "fp8_e4m3 on the prefill node and auto on" in str(node.connector.pairs()), "the refusal")
    finally:
        d.close()
        p.close()


def test_a_model_whose_heads_are_too_small_is_refused(monkeypatch):
    monkeypatch.setattr("transfer_nodes.HEAD_DIM", 4)
    with pytest.raises(TransferError, match="leave it out for this model"):
        Node(Role.DECODE, **FP8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_answer_over_eight_bits(dtype):
    greedy, batch, config = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), prompts(6, seed=3), shape("qwen3", "tiny")
    with LLM(checkpoint("qwen3"), num_blocks=160, block_size=8, dtype=dtype) as llm:
        alone = [llm.generate([prompt], greedy)[0].outputs[0].token_ids for prompt in batch]
    sections = {"model": {"model_dir": checkpoint("qwen3"), "dtype": dtype}, "cache": {"enable_prefix_caching": True}}
    with EnginePair(connector=FP8 | {"checksum": True}, **sections) as pair:
        said = pair.generate(batch, greedy)
        itemsize = 4 if dtype == "float32" else 2
        whole = sum(map(len, batch)) * config.num_layers * 2 * config.num_kv_heads * config.head_dim * itemsize
        ratio = pair.engines["prefill"].status().transfer["bytes_sent"] / whole
        assert 1 / itemsize < ratio < 1.1 / itemsize  # scales; and filling where a prompt ends within a block
        assert [tokens[0] for tokens in said] == [tokens[0] for tokens in alone] and {len(tokens) for tokens in said} == {8}
        assert set(pair.leaks().values()) == {0}


def test_logits_lose_what_four_bits_less_than_bfloat16_cost():
    found = {name: value for name, _, value in measure(checkpoint("qwen3"), "cpu", prompt_tokens=100, steps=24, rounds=2)}
    assert 0.5 < found["fp8_wire.bytes_ratio"] < 0.52
    assert 8 < found["fp8_wire.logits_rms"] / found["bf16_cache.logits_rms"] < 24  # a step is 16 times as long
    assert found["fp8_wire.kl"] < 0.05 and found["fp8_wire.top1"] > 0.6  # of random weights, whose logits lie close together
