"""From scheduler to tensors: what ranks are told, and what they make of it."""

import numpy as np
import pytest
import torch
from helpers_scheduling import BLOCK, FakeWorkers, scheduler, sequence

from ksana_lab.config.engine import CacheOptions
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.core.step import StepTokens
from ksana_lab.engine.commands import CommandBuilder, StepCommand
from ksana_lab.engine.input_batch import InputBatch
from ksana_lab.engine.kv_cache import allocate_plain, cpu_num_blocks, make_layer_views
from ksana_lab.engine.sampler import PLAIN_GREEDY
from ksana_lab.engine.wakeup import Wakeup


class Rank:
    """A scheduler, and one rank that prepares its steps and samples token 40 + step."""

    def __init__(self, **options):
        self.sched = scheduler(**options)
        self.builder = CommandBuilder()
        self.batch = InputBatch(4, 64, BLOCK, 50, torch.device("cpu"))
        self.num_steps = 0

    def step(self):
        out = self.sched.schedule(1)
        command = self.builder.build(out)
        self.batch.apply(command)
        inputs = self.batch.prepare(command)
        token = 40 + self.num_steps
        self.num_steps += 1
        self.batch.remember(inputs, torch.full((len(inputs.sample_seq_ids),), token))
        self.sched.update(out, StepTokens({seq_id: token for seq_id in inputs.sample_seq_ids}), 1)
        return command, inputs


def test_a_prompt_and_then_its_decodes():
    rank = Rank()
    rank.sched.add(seq := sequence(0, [5, 6, 7, 8, 9], ignore_eos=True))
    _, inputs = rank.step()
    assert inputs.input_ids.tolist() == [5, 6, 7, 8, 9] and inputs.positions.tolist() == [0, 1, 2, 3, 4]
    slots = [seq.block_table[p // BLOCK] * BLOCK + p % BLOCK for p in range(7)]
    assert inputs.attn.slot_mapping.tolist() == slots[:5] and inputs.logits_indices.tolist() == [4]
    _, inputs = rank.step()
    assert inputs.input_ids.tolist() == [40] and inputs.positions.tolist() == [5]  # the token never came from the host
    assert inputs.attn.slot_mapping.tolist() == slots[5:6] and inputs.attn.seq_lens.tolist() == [6]
    assert inputs.logits_indices is None and inputs.is_pure_decode and inputs.sampling is PLAIN_GREEDY


def test_decodes_stand_before_chunks():
    rank = Rank(max_num_batched_tokens=8)
    rank.sched.add(sequence(0, [1, 2, 3], ignore_eos=True))
    rank.step()
    rank.sched.add(sequence(1, [11, 12, 13, 14, 15, 16, 17, 18, 19]))
    _, inputs = rank.step()
    attn = inputs.attn
    assert inputs.seq_ids == [0, 1] and attn.num_decodes == 1 and attn.query_lens == [1, 7] and attn.context_lens == [4, 7]
    assert attn.query_start_loc.tolist() == [0, 1, 8] and attn.block_tables.shape == (2, 2)
    assert inputs.sample_seq_ids == [0] and inputs.logits_indices is None
    _, inputs = rank.step()
    assert inputs.input_ids.tolist() == [41, 18, 19] and inputs.logits_indices.tolist() == [0, 2]


def test_a_decode_is_told_in_a_few_integers():
    rank = Rank()
    rank.sched.add(sequence(0, [1, 2, 3], ignore_eos=True))
    first, _ = rank.step()
    assert [new.token_ids for new in first.new] == [[1, 2, 3]] and list(first.new_blocks) == [0]
    second, _ = rank.step()
    assert second.new == [] and second.new_blocks == {} and (second.seq_ids, second.starts, second.num_tokens) == ([0], [3], [1])
    third, _ = rank.step()
    assert len(third.new_blocks[0]) == 1  # the second block begins


def test_rows_of_sequences_that_left_are_clean_for_the_next():
    rank = Rank()
    rank.sched.add(sequence(0, 20, 1))
    rank.step()
    rank.sched.add(sequence(1, 3, ignore_eos=True))
    command, inputs = rank.step()
    assert command.gone == [0] and inputs.attn.block_tables.shape == (1, 1)
    assert (rank.batch._block_tables != 0).sum() <= 1


def test_a_preempted_sequence_is_introduced_again_with_its_outputs():
    rank = Rank(num_blocks=5)
    rank.sched.add(sequence(0, [1] * 7, 9, ignore_eos=True))
    rank.sched.add(sequence(1, [2] * 7, 9, ignore_eos=True))
    introduced = []
    for _ in range(30):
        if not rank.sched.running and not rank.sched.num_waiting:
            break
        command, _ = rank.step()
        introduced += [(new.seq_id, len(new.token_ids), new.num_prompt_tokens) for new in command.new]
    assert introduced[:2] == [(0, 7, 7), (1, 7, 7)] and introduced[2][0] == 1 and introduced[2][1] > 7


def test_commands_survive_the_wire():
    import msgspec

    sched, builder = scheduler(), CommandBuilder(default_seed=9)
    sched.add(sequence(3, 6, min_tokens=2, stop_token_ids=(4,)))
    command = builder.build(sched.schedule(1))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=StepCommand)
    assert again == command and again.new[0].seed == 12 and again.new[0].masked_token_ids == [4, 49]


def test_steps_that_are_not_executed_lose_no_farewell():
    sched, builder = scheduler(), CommandBuilder()
    sched.add(sequence(0, 4, 1))
    work = FakeWorkers(sched, on_step=lambda out: builder.build(out))
    work.turn()
    builder.note_gone(sched.schedule(1).gone)
    sched.add(sequence(1, 4))
    assert builder.build(sched.schedule(1)).gone == [0]


@pytest.mark.parametrize("order", ["block_major", "layer_major"])
def test_layer_views_lie_where_the_layout_says(order):
    layout = KVLayout(5, 3, 2, 4, 8, "float32", order)
    memory = allocate_plain(layout.total_bytes, torch.device("cpu"))
    views = make_layer_views(memory, layout)
    views[2][3, 1, 1, 0, 0] = 1.5
    offset = layout.head_offset(3, 2, 1, 1)
    assert memory[offset : offset + 4].view(torch.float32).item() == 1.5
    assert len(views) == 3 and views[0].shape == (5, 2, 2, 4, 8)


def test_default_cache_of_a_cpu_is_enough_but_bounded():
    assert cpu_num_blocks(CacheOptions(block_size=16), 1 << 10, max_num_seqs=4, max_model_len=100) == 28
    assert cpu_num_blocks(CacheOptions(block_size=16), 1 << 20, max_num_seqs=1000, max_model_len=10_000) == 512
    assert cpu_num_blocks(CacheOptions(num_blocks=7), 1 << 20, 10, 10) == 7


def test_a_ring_before_the_wait_is_not_lost():
    import select

    bell = Wakeup()
    bell.ring()
    assert select.select([bell.fileno()], [], [], 0)[0]
    bell.clear()
    assert not select.select([bell.fileno()], [], [], 0)[0]
    bell.close()
    bell.close()
    bell.ring()


def test_inputs_are_int64_and_int32_as_the_kernels_want():
    rank = Rank()
    rank.sched.add(sequence(0, 6))
    _, inputs = rank.step()
    attn = inputs.attn
    assert {inputs.input_ids.dtype, inputs.positions.dtype, attn.slot_mapping.dtype} == {torch.int64}
    assert {attn.query_start_loc.dtype, attn.seq_lens.dtype, attn.block_tables.dtype} == {torch.int32}
    assert isinstance(inputs.sample_rows, np.ndarray)
