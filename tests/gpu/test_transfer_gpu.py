"""Prefill and decode engines in two processes on GPUs: the tokens of one node, over every backend and mode; checksums on; nodes of
different tensor parallel sizes; a node killed in the middle of a transfer; nothing left behind.

Each request runs alone, so that the pair and the mixed node do the same arithmetic and greedy tokens can be compared exactly. With one GPU
the two processes share it."""

import random

import pytest
import torch

from ksana_lab.bench._engines import Pair
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.engine.llm import LLM
from ksana_lab.models.synth import shape, synthesize
from ksana_lab.transfer import packing
from ksana_lab.transfer.plan import HeadSlice, cells
from ksana_lab.types import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
TOP = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=5)
AS_LIKELY = 0.15  # in bfloat16
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


def make_pair(model_dir, devices=None, **connector):
    return Pair(
        model_dir, device="cuda", devices=devices or ((0,), (torch.cuda.device_count() - 1,)),
        is_prefill_here=connector.pop("is_here", False),
        cache={"num_blocks": NUM_BLOCKS}, scheduler={"max_num_batched_tokens": 2048, "max_num_seqs": 32},
        connector={"checksum": True, **connector},
    )  # fmt: skip


def assert_says_the_same_in_every_mode(backend, model_dir, alone):
    with make_pair(model_dir, backend=backend, is_here=True) as pair:
        worker = pair.engines["prefill"].engine.transfer_worker
        for mode in MODES:
            for checksum in (True, False):  # copies are posted before their layer is done only without checksums
                worker.reconfigure(worker.options.model_copy(update={"transfer_mode": mode, "checksum": checksum}))
                said = [pair.generate([prompt], GREEDY)[0] for prompt in BATCH]
                assert said == alone, (mode, checksum)
        pair.wait_clean()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda_ipc", "shm", "tcp"])
def test_a_pair_says_what_one_node_says_in_every_mode(backend, model_dir, alone):
    assert_says_the_same_in_every_mode(backend, model_dir, alone)


@pytest.mark.multi_gpu
def test_a_pair_joined_by_nccl_says_what_one_node_says_in_every_mode(model_dir, alone):
    """NCCL joins two GPUs, never one with itself."""
    with make_pair(model_dir, backend="nccl", is_here=True) as pair:
        worker = pair.engines["prefill"].engine.transfer_worker
        for mode in MODES:
            for wire_dtype in ("auto", "fp8_e4m3"):
                worker.reconfigure(worker.options.model_copy(update={"transfer_mode": mode, "wire_dtype": wire_dtype}))
                said = [pair.generate([prompt], GREEDY)[0] for prompt in BATCH]
                count = GREEDY.max_tokens if wire_dtype == "auto" else 1
                assert [tokens[:count] for tokens in said] == [tokens[:count] for tokens in alone], (mode, wire_dtype)
        pair.wait_clean()


def likeliest(pair, prompt):
    """The decode node's tokens with their log-probabilities."""
    found, ended, number = [], set(), pair.next_number()
    for role in ("prefill", "decode"):
        pair.add(role, number, prompt, TOP)

    def note(role, updates):
        for update in updates:
            assert update.error is None, update
            found.extend(update.logprobs or () if role == "decode" else ())
            ended.update([role] if update.finish is not None else [])

    pair.drive(lambda: len(ended) == 2, 60.0, note)
    return found


def assert_as_likely(said, alone):
    """Two ranks round otherwise than one: a token may be another where both are as likely, and behind it the text is another."""
    assert len(said) == len(alone)
    for ours, theirs in zip(said, alone, strict=True):
        gap = theirs.logprob - dict(theirs.top).get(ours.token_id, -float("inf"))
        assert gap < AS_LIKELY and abs(ours.logprob - theirs.logprob) < AS_LIKELY, (ours, theirs)
        if ours.token_id != theirs.token_id:
            return


@pytest.mark.multi_gpu
@pytest.mark.parametrize("devices", [((0,), (0, 1)), ((0, 1), (1,)), ((0, 1), (0, 1, 2, 3))], ids=["1-2", "2-1", "2-4"])
def test_nodes_of_different_sizes_say_what_one_node_says(devices, model_dir):
    if max(devices[1]) >= torch.cuda.device_count():
        pytest.skip(f"needs {len(devices[1])} CUDA GPUs, this machine has {torch.cuda.device_count()}")
    with LLM(model_dir, num_blocks=NUM_BLOCKS, max_num_batched_tokens=2048) as llm:
        alone = [llm.generate([prompt], TOP)[0].outputs[0].logprobs for prompt in BATCH]
    torch.cuda.empty_cache()
    with make_pair(model_dir, backend="cuda_ipc", devices=devices) as pair:
        for prompt, expected in zip(BATCH, alone, strict=True):
            assert_as_likely(likeliest(pair, prompt), expected)
        pair.wait_clean()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda_ipc", "shm", "tcp"])
def test_kv_travels_in_eight_bits(backend, model_dir, alone):
    """P's token is exact; D's may differ, since its KV does. What arrives is checked against the CPU's packing in the next test."""
    with make_pair(model_dir, backend=backend, is_here=True, wire_dtype="fp8_e4m3") as pair:
        worker = pair.engines["prefill"].engine.transfer_worker
        for mode in MODES:
            worker.reconfigure(worker.options.model_copy(update={"transfer_mode": mode}))
            before = worker.stats()["bytes_sent"]
            said = [pair.generate([prompt], GREEDY)[0] for prompt in BATCH]
            assert [tokens[0] for tokens in said] == [tokens[0] for tokens in alone]
            config = shape("qwen3", "0.6b")
            whole = sum(map(len, BATCH)) * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
            assert 0.5 < (worker.stats()["bytes_sent"] - before) / whole < 0.51
        pair.wait_clean()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_gpu_packs_as_a_cpu_does(dtype):
    layout = KVLayout(64, 4, 8, 16, 128, dtype)
    numbers = torch.randn(layout.total_bytes // 2).to(getattr(torch, dtype)).view(torch.uint8)
    whole, blocks, found = [HeadSlice(0, 0, 0, 0, 8)], random.Random(0).sample(range(64), 20), []
    for device in ("cpu", "cuda"):
        cache, target = numbers.to(device), torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
        packer, unpacker = packing.Packer(cache), packing.Unpacker(target)
        for batch in packing.batches(layout, cells(layout, layout, whole, blocks, blocks, 5, 307, range(4))):
            stage, event = packer.pack(batch, 0)
            if event is not None:
                event.synchronize()
            for at, to, count in batch.copies.tolist():
                target[to : to + count] = stage[at : at + count]
            torch.cuda.synchronize()
            unpacker.expand(*packing.read(layout, batch.describe(0)))
        found.append(target.cpu().view(getattr(torch, dtype)).float())
    assert torch.equal(found[0], found[1])


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


def soak(pair, num_requests, longest, seed):
    """Some two dozen under way at any time, a quarter of them given up by either side or both. Returns how many ended how."""
    dice, ended, given_up = random.Random(seed), {"prefill": {}, "decode": {}}, set()
    begun, turns = [], {}

    def turn() -> bool:
        while len(begun) < num_requests and len(begun) - len(ended["decode"]) < 24:
            (prompt,) = prompts([dice.randrange(1, longest)], dice.random())
            sampling = SamplingParams(max_tokens=dice.randrange(2, 17), temperature=0.0, ignore_eos=True)
            number = pair.next_number()
            for role in ("prefill", "decode"):
                name = pair.add(role, number, prompt, sampling)
            begun.append(name)
            if dice.random() < 0.25:
                turns[name] = dice.randrange(40)
        for name in [name for name, left in turns.items() if left <= 0]:
            del turns[name]
            given_up.add(name)
            for role in dice.choice((("prefill",), ("decode",), ("prefill", "decode"))):
                pair.engines[role].abort(name, "soak")
        for name in turns:
            turns[name] -= 1
        return len(begun) == num_requests and all(len(names) == num_requests for names in ended.values())

    def note(role, updates):
        for update in updates:
            if update.finish is not None:
                assert update.request_id not in ended[role], update
                assert update.error is None or update.request_id in given_up, update
                ended[role][update.request_id] = update.error

    pair.drive(turn, 400.0, note)
    return sum(error is None for error in ended["decode"].values()), len(given_up)


@pytest.mark.gpu
@pytest.mark.timeout(500)
def test_two_thousand_requests_with_cancels_leave_memory_and_blocks_as_they_were(model_dir):
    with make_pair(model_dir, backend="cuda_ipc", checksum=False) as pair:
        soak(pair, 200, 1500, seed=1)  # allocators and graphs reach their size
        pair.wait_clean()
        free = [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]
        num_whole, num_given_up = soak(pair, 2000, 1500, seed=2)
        assert num_whole >= 1500 and num_given_up > 300
        pair.wait_clean()
        assert all(abs(torch.cuda.mem_get_info(device)[0] - before) < 64 << 20 for device, before in enumerate(free))
        assert all(engine.status().num_leaked_blocks == 0 for engine in pair.engines.values())


def assert_survives_a_kill(backend, victim, model_dir, alone):
    survivor = "decode" if victim == "prefill" else "prefill"
    with make_pair(model_dir, backend=backend, checksum=False) as pair:
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


@pytest.mark.gpu
@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("backend", ["cuda_ipc", "shm", pytest.param("nccl", marks=pytest.mark.multi_gpu)])
def test_a_killed_node_takes_nothing_with_it_and_comes_back(backend, victim, model_dir, alone):
    assert_survives_a_kill(backend, victim, model_dir, alone)


def any_left(pair, role):
    from ksana_lab.bench._engines import left_of

    return left_of(pair.engines[role].status())
