"""Prefill and decode engines in two processes on GPUs: the tokens of one node, over every backend and mode; checksums on; a node killed in
the middle of a transfer; nothing left behind.

Each request runs alone, so that the pair and the mixed node do the same arithmetic and greedy tokens can be compared exactly. With one GPU
the two processes share it."""

import random

import pytest
import torch

from ksana_lab.bench._engines import Pair
from ksana_lab.engine.llm import LLM
from ksana_lab.models.synth import synthesize
from ksana_lab.types import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
MODES = ("bulk", "chunk", "layer", "auto")
NUM_BLOCKS = 1200


def prompts(lengths, seed):
    dice = random.Random(seed)
    return [[dice.randrange(3, 100_000) for _ in range(length)] for length in lengths]


BATCH = prompts((5, 16, 333, 1500, 4097), 1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(synthesize(tmp_path_factory.mktemp("checkpoint") / "q", "qwen3", "0.6b", has_weights=False))


@pytest.fixture(scope="module")
def alone(model_dir):
    with LLM(model_dir, num_blocks=NUM_BLOCKS, max_num_batched_tokens=2048) as llm:
        tokens = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in BATCH]
    torch.cuda.empty_cache()
    return tokens


def make_pair(model_dir, **connector):
    return Pair(
        model_dir, device="cuda", devices=(0, torch.cuda.device_count() - 1), is_prefill_here=connector.pop("is_here", False),
        cache={"num_blocks": NUM_BLOCKS}, scheduler={"max_num_batched_tokens": 2048, "max_num_seqs": 32},
        connector={"checksum": True, **connector},
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda_ipc", "tcp"])
def test_a_pair_says_what_one_node_says_in_every_mode(backend, model_dir, alone):
    with make_pair(model_dir, backend=backend, is_here=True) as pair:
        worker = pair.engines["prefill"].engine.transfer_worker
        for mode in MODES:
            for checksum in (True, False):  # copies are posted before their layer is done only without checksums
                worker.reconfigure(worker.options.model_copy(update={"transfer_mode": mode, "checksum": checksum}))
                said = [pair.generate([prompt], GREEDY)[0] for prompt in BATCH]
                assert said == alone, (mode, checksum)
        pair.wait_clean()


@pytest.mark.gpu
def test_many_at_once_leave_nothing_behind(model_dir):
    batch = prompts([random.Random(2).randrange(20, 2500) for _ in range(60)], 3)
    with make_pair(model_dir, backend="cuda_ipc", checksum=False) as pair:
        said = pair.generate(batch, GREEDY)
        assert all(len(tokens) == GREEDY.max_tokens for tokens in said)
        free = torch.cuda.mem_get_info(0)[0]
        for number in range(3):
            pair.generate(prompts([900] * 20, 10 + number), GREEDY)
        pair.wait_clean()
        assert abs(torch.cuda.mem_get_info(0)[0] - free) < 256 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_node_takes_nothing_with_it_and_comes_back(victim, model_dir, alone):
    survivor = "decode" if victim == "prefill" else "prefill"
    with make_pair(model_dir, backend="cuda_ipc", checksum=False) as pair:
        failed = set()
        for prompt in prompts([2000] * 12, 5):
            number = pair.next_number()
            for role in ("prefill", "decode"):
                pair.add(role, number, prompt, GREEDY)
        pair.drive(lambda: pair.engines["prefill"].status().transfer["bytes_sent"] > 0)
        pair.engines[victim].kill()
        other = pair.engines.pop(victim)
        note = lambda role, news: failed.update(u.request_id for u in news if u.error)  # noqa: E731
        pair.drive(lambda: not any_left(pair, survivor), 60, note)
        note(survivor, pair.engines[survivor].step())
        assert failed or survivor == "prefill", "nothing was under way when the node died"
        pair.engines[victim] = other
        pair.restart(victim)
        assert pair.generate(BATCH[2:3], GREEDY) == alone[2:3]
        pair.wait_clean()


def any_left(pair, role):
    from ksana_lab.bench._engines import left_of

    return left_of(pair.engines[role].status())
