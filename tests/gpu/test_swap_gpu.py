"""Swapping on CUDA: pinned memory, copies among overlapping steps and replayed graphs. Compared are runs that do the same arithmetic."""

import pytest
import torch

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.engine.commands import StepCommand
from ksana_lab.engine.host_blocks import HostBlocks
from ksana_lab.engine.llm import LLM
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.synth import synthesize
from ksana_lab.types import SamplingParams

PROMPTS = [[(i * j) % 150_000 + 5 for j in range(1, 40 + 40 * i)] for i in range(1, 9)]
NUM_TOKENS = 200
SWAP = {"preemption_mode": "swap", "host_memory_factor": 2.0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(synthesize(tmp_path_factory.mktemp("checkpoint") / "q", "qwen3", "0.6b", has_weights=False))


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["block_major", "layer_major"])
def test_blocks_come_back_whole_while_the_next_steps_write(order):
    layout = KVLayout(64, 4, 2, 16, 128, "bfloat16", order)
    memory = torch.zeros(layout.total_bytes, dtype=torch.uint8, device="cuda")
    host = HostBlocks(memory, layout, 48, TPGroup.single())
    try:
        assert host._host.is_pinned()
        memory.random_(0, 256)
        expected = memory.clone()
        pairs = [(5 * i % 64, i) for i in range(48)]
        host.copy(pairs, [])
        memory.zero_()  # enqueued behind the copies, as a later step's writes are
        host.copy([], [(target, source) for source, target in pairs])
        axes = (64, 4) if order == "block_major" else (4, 64)
        cells, wanted = (m.view(*axes, layout.cell_bytes) for m in (memory, expected))
        for block, _ in pairs:
            index = (block,) if order == "block_major" else (slice(None), block)
            assert torch.equal(cells[index], wanted[index])
    finally:
        host.close()


def run(model_dir, params, **options):
    with LLM(model_dir, max_num_seqs=8, max_model_len=1024, **options) as llm:
        results = llm.generate(PROMPTS, params)
        status = llm.engine.status()
        assert llm.engine.is_idle and llm.engine.scheduler.check() == 0
    assert status.num_free_host_blocks == status.num_host_blocks and status.num_swapped == 0
    return [result.outputs[0] for result in results], status


@pytest.mark.gpu
@pytest.mark.parametrize("has_graphs", [False, True])
def test_every_block_comes_back_as_it_went(model_dir, monkeypatch, has_graphs):
    """With steps overlapping, and host blocks used again."""
    kept, copy, counts = {}, HostBlocks.copy, []

    def watched(self, swap_out, swap_in):
        for device, host in swap_out:
            kept[host] = self._cache[device].clone()  # enqueued where the copy is
        copy(self, swap_out, swap_in)
        counts.append(len(swap_in))
        assert all(torch.equal(self._cache[device], kept.pop(host)) for host, device in swap_in)

    monkeypatch.setattr(HostBlocks, "copy", watched)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    _, status = run(model_dir, params, num_blocks=130, enable_cuda_graph=has_graphs, **SWAP)
    assert status.num_swap_ins > 0 and sum(counts) > 10


@pytest.mark.gpu
def test_what_was_swapped_goes_on_as_it_would_have(model_dir):
    """Sums of different batches differ in their last bits, and now and then a choice with them: where tokens part there was a tie."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=1, ignore_eos=True)
    plain, _ = run(model_dir, params, num_blocks=2000)
    swapped, status = run(model_dir, params, num_blocks=130, **SWAP)
    assert status.num_swap_ins == status.num_swap_outs > 0
    for one, other in zip(plain, swapped, strict=True):
        pairs = list(zip(one.logprobs, other.logprobs, strict=True))
        parted = next((i for i, (a, b) in enumerate(pairs) if a.token_id != b.token_id), NUM_TOKENS - 1)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs[: parted + 1]) < 0.5


@pytest.mark.gpu
def test_a_decode_node_announces_no_block_that_a_copy_still_reads(model_dir):
    """The end of a step that copies out waits for the device, also when it brings no token."""
    with LLM(model_dir, max_num_seqs=8, max_model_len=1024, num_blocks=130, **SWAP) as llm:
        runner = llm.engine._executor.worker.runner
        runner.peers_write = True
        command = StepCommand(0, [], [], {}, [], [], [], [], swap_out=[(block, block) for block in range(100)])
        torch.cuda._sleep(200_000_000)
        pending = runner.execute(command)
        end = torch.cuda.Event()
        end.record()
        assert not end.query()
        pending.result()
        assert pending._event is not None and pending._event.query()


@pytest.mark.multi_gpu
def test_two_ranks_swap_their_heads(model_dir):
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    _, status = run(model_dir, params, num_blocks=130, tensor_parallel_size=2, **SWAP)
    assert status.num_swap_ins == status.num_swap_outs > 0
