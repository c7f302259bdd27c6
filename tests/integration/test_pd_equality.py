"""A prompt computed on one node and continued on another gives the tokens that one node gives, over every backend, mode and TP pair."""

import pytest
from helpers_checkpoint import ARCHITECTURES, checkpoint, oracle_greedy, prompts
from helpers_pair import EnginePair

from ksana_lab.engine.llm import LLM
from ksana_lab.transfer import registry
from ksana_lab.types import SamplingParams

NUM = 12
GREEDY = SamplingParams(max_tokens=NUM, temperature=0.0, ignore_eos=True)
BATCH = prompts(5, seed=11, longest=50)
MODES = ("bulk", "chunk", "layer")
BACKENDS = ("tcp", "shm")


@pytest.fixture(autouse=True)
def layer_tracker(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


def expected(arch, batch):
    return [oracle_greedy(arch, tuple(prompt), NUM) for prompt in batch]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_one_rank_each(backend, mode):
    connector = {"backend": backend, "transfer_mode": mode, "checksum": True, "layers_per_chunk": 2}
    with EnginePair(connector=connector, scheduler={"prefill_chunk_tokens": 13}) as pair:
        assert pair.generate(BATCH, GREEDY) == expected("qwen3", BATCH)
        assert pair.leaks() == {"prefill": 0, "decode": 0}


@pytest.mark.parametrize("tp", [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_tensor_parallel_pairs(tp, backend, mode):
    connector = {"backend": backend, "transfer_mode": mode, "checksum": True}
    with EnginePair(tp=tp, connector=connector, scheduler={"prefill_chunk_tokens": 13}) as pair:
        assert pair.generate(BATCH, GREEDY) == expected("qwen3", BATCH)
        assert pair.leaks() == {"prefill": 0, "decode": 0}


def test_what_shm_is_between_gpus(monkeypatch):
    monkeypatch.setitem(registry._BACKENDS, "shm", registry._ON_GPU["shm"])
    with EnginePair(connector={"backend": "shm", "transfer_mode": "layer", "checksum": True}) as pair:
        assert pair.generate(BATCH, GREEDY) == expected("qwen3", BATCH)
        assert pair.leaks() == {"prefill": 0, "decode": 0}


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "qwen3"])
def test_other_architectures(arch):
    with EnginePair(arch=arch, connector={"backend": "shm"}) as pair:
        assert pair.generate(BATCH, GREEDY) == expected(arch, BATCH)


@pytest.mark.parametrize("order", ["late_decode", "late_prefill"])
def test_whichever_side_hears_of_it_first(order):
    with EnginePair(connector={"backend": "tcp"}) as pair:
        assert pair.generate(BATCH, GREEDY, order=order) == expected("qwen3", BATCH)
        assert pair.leaks() == {"prefill": 0, "decode": 0}


def test_prefix_hits_on_either_side_are_not_sent_twice():
    shared = prompts(1, seed=21, longest=64)[0] * 2
    batch = [shared + tail for tail in prompts(4, seed=22, longest=9)]
    with EnginePair(connector={"backend": "shm"}, cache={"enable_prefix_caching": True}) as pair:
        first = pair.generate(batch[:1], GREEDY)
        sent_once = pair.engines["prefill"].status().transfer
        again = pair.generate(batch[:1], GREEDY)
        sent_twice = pair.engines["prefill"].status().transfer
        assert first == again == expected("qwen3", batch[:1])
        name = next(n for n in sent_once if "bytes" in n)
        assert 0 < sent_twice[name] - sent_once[name] < sent_once[name] / 2
        assert pair.generate(batch, GREEDY) == expected("qwen3", batch)


def test_a_decode_node_short_of_blocks_recomputes_and_says_the_same():
    batch = prompts(6, seed=31, longest=40)
    with EnginePair(connector={"backend": "shm"}, cache={"num_blocks": 15}) as pair:
        assert pair.generate(batch, GREEDY) == expected("qwen3", batch)
        assert pair.leaks() == {"prefill": 0, "decode": 0}


def test_seeded_sampling_is_the_same_as_on_one_node():
    sampling = SamplingParams(max_tokens=NUM, temperature=1.3, top_p=0.9, seed=7, presence_penalty=0.5, ignore_eos=True)
    with LLM(checkpoint("qwen3"), block_size=8) as llm:
        alone = [result.outputs[0].token_ids for result in llm.generate(BATCH, sampling)]
    with EnginePair(connector={"backend": "tcp"}) as pair:
        assert pair.generate(BATCH, sampling) == alone


def test_a_prompt_whose_first_token_ends_it_needs_no_decode_step():
    first = oracle_greedy("qwen3", tuple(BATCH[0]), 1)
    with EnginePair(connector={"backend": "tcp"}) as pair:
        stopping = SamplingParams(max_tokens=NUM, temperature=0.0, stop_token_ids=tuple(first))
        assert pair.generate(BATCH[:1], stopping) == [first]
        assert pair.generate(BATCH[:1], SamplingParams(max_tokens=1, temperature=0.0)) == [first]
        assert pair.leaks() == {"prefill": 0, "decode": 0}


def test_control_threads_are_woken_when_the_model_s_thread_has_time(monkeypatch):
    """For a prompt: when its first layer is computed; for its token: by ``flush``, which comes when the client has it."""
    with EnginePair(connector={"backend": "tcp"}) as pair:
        engine, said = pair.engines["prefill"], []
        coordinator, worker = engine._transfer._coordinator, engine.transfer_worker
        layer_done, ring = worker.layer_done, coordinator._mailbox.ring
        monkeypatch.setattr(worker, "layer_done", lambda layer: (said.append(layer), layer_done(layer)))
        monkeypatch.setattr(coordinator._mailbox, "ring", lambda: (said.append("ring"), ring()))
        pair.add("prefill", 0, BATCH[0], GREEDY)
        while not engine.step():
            pass
        assert said == [0, "ring", 1, 2, 3]
        engine.flush()
        assert said[5:] == ["ring"]
