"""Blocks of the cache copied to host memory and back, on a CPU; and how many there may be."""

import msgspec
import pytest
import torch
from helpers_scheduling import scheduler, sequence

from ksana_lab.config.engine import CacheOptions, EngineConfig, ModelOptions, ParallelOptions, SchedulerOptions
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.core.step import StepTokens
from ksana_lab.engine.commands import CommandBuilder, StepCommand
from ksana_lab.engine.host_blocks import HostBlocks, _runs, available_host_bytes, num_host_blocks
from ksana_lab.engine.kv_cache import allocate_plain, make_layer_views
from ksana_lab.errors import ConfigError
from ksana_lab.layers.tp import TPGroup

GIB = 1 << 30


def layout_of(num_blocks=6, order="block_major"):
    return KVLayout(num_blocks, 3, 2, 4, 8, "float32", order)


@pytest.mark.parametrize("order", ["block_major", "layer_major"])
def test_blocks_come_back_whole_and_to_where_they_are_wanted(order):
    layout = layout_of(order=order)
    memory = allocate_plain(layout.total_bytes, torch.device("cpu"))
    host = HostBlocks(memory, layout, 4, TPGroup.single())
    layers = make_layer_views(memory, layout)
    for number, layer in enumerate(layers):
        layer.copy_(torch.arange(6).view(6, 1, 1, 1, 1) + 10 * number)
    host.copy([(1, 0), (2, 1), (5, 3)], [])
    memory.zero_()
    host.copy([], [(0, 4), (1, 0), (3, 2)])
    for number, layer in enumerate(layers):
        assert layer[:, 0, 0, 0, 0].tolist() == [2 + 10 * number, 0, 5 + 10 * number, 0, 1 + 10 * number, 0]
        assert (layer == layer[:, :1, :1, :1, :1]).all()
    host.close()
    host.close()


def test_the_proof_leaves_a_cache_of_zeros():
    layout = layout_of()
    memory = allocate_plain(layout.total_bytes, torch.device("cpu"))
    HostBlocks(memory, layout, 1, TPGroup.single())
    assert not memory.any()


def test_a_block_that_does_not_come_back_stops_the_start(monkeypatch):
    monkeypatch.setattr(HostBlocks, "copy", lambda self, swap_out, swap_in: None)
    layout = layout_of()
    with pytest.raises(ConfigError, match="did not come back whole"):
        HostBlocks(allocate_plain(layout.total_bytes, torch.device("cpu")), layout, 1, TPGroup.single())


def test_consecutive_blocks_are_one_copy():
    assert list(_runs([(1, 5), (2, 6), (3, 7), (9, 8), (10, 9), (4, 0)])) == [(1, 5, 3), (9, 8, 2), (4, 0, 1)]
    assert list(_runs([])) == []


def config(mode="swap", factor=2.0, ranks=1):
    return EngineConfig(
        model=ModelOptions(model_dir="/m"),
        cache=CacheOptions(host_memory_factor=factor),
        scheduler=SchedulerOptions(preemption_mode=mode),
        parallel=ParallelOptions(tensor_parallel_size=ranks),
    )


def test_the_factor_counts_device_blocks(monkeypatch):
    monkeypatch.setattr("ksana_lab.engine.host_blocks.available_host_bytes", lambda: GIB)
    assert num_host_blocks(config(factor=1.5), layout_of(7)) == 10
    assert num_host_blocks(config(factor=0.0), layout_of(7)) == num_host_blocks(config(mode="recompute"), layout_of(7)) == 0


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (2, False)])
def test_all_ranks_together_must_fit_into_what_is_available(monkeypatch, ranks, fits):
    layout = layout_of(100)
    monkeypatch.setattr("ksana_lab.engine.host_blocks.available_host_bytes", lambda: 3 * layout.total_bytes)
    if fits:
        assert num_host_blocks(config(ranks=ranks), layout) == 200
    else:
        with pytest.raises(ConfigError, match=r"asks for .*lower it to at most 1\.35, .* or set preempt_mode: 1"):
            num_host_blocks(config(ranks=ranks), layout)


def test_a_control_groups_limit_counts(tmp_path):
    unlimited = available_host_bytes(tmp_path)
    (tmp_path / "memory.max").write_text(f"{8 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{6 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 17\ninactive_file {1 << 20}\n")
    assert unlimited > available_host_bytes(tmp_path) == 3 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes(tmp_path) > 8 << 20


def test_commands_carry_the_copies_and_introduce_who_comes_back():
    sched, builder = scheduler(num_blocks=5, num_host_blocks=5), CommandBuilder()
    for seq_id in range(2):
        sched.add(sequence(seq_id, 7, 9, ignore_eos=True))
    commands = []
    for _ in range(30):
        out = sched.schedule(1)
        if out.is_empty:
            break
        command = builder.build(out)
        commands.append(msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=StepCommand))
        assert commands[-1] == command
        sched.update(out, StepTokens({item.seq.seq_id: 3 for item in out.scheduled}), 1)
    (away,) = [command for command in commands if command.swap_out]
    (back,) = [command for command in commands if command.swap_in]
    assert away.gone == [1] and [host for _, host in away.swap_out] == [host for host, _ in back.swap_in]
    assert [new.seq_id for new in back.new] == [1]
    assert [device for _, device in back.swap_in] == back.new_blocks[1][: len(back.swap_in)]
