"""Which pieces of a prompt go when, in every mode."""

from __future__ import annotations

import pytest

from ksana_lab.core.connector import SendStep
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.protocol.transfer import Target
from ksana_lab.transfer.outgoing import Outgoing, Route, Step
from ksana_lab.transfer.schedule import equal

KEY = TransferKey("p:1__d:1", 7)
LAYERS, BLOCK = 4, 4


def prompt(mode="layer", group=1, *, schedule=None, is_announced=True, num_cached=0):
    out: Outgoing[str] = Outgoing(KEY, 1, LAYERS, BLOCK, mode=mode, schedule=schedule or equal(LAYERS, group))
    if is_announced:
        announce(out, num_cached)
    return out


def announce(out, num_cached=0):
    out.target = Target(KEY, 1, 1, [], 100, num_cached)
    out.routes = [Route("link")]


def run(out, start, end, *, is_last=False, layers=LAYERS, attempt=0):
    step = Step(LAYERS, [i + 1 for i in range(layers)])
    out.add(SendStep(KEY, (0, 1, 2, 3), start, end, is_last, attempt=attempt), step)
    return step


def pieces(out):
    taken = []
    while (piece := out.take(out.routes[0])) is not None:
        taken.append((piece.start, piece.end, piece.layers.start, piece.layers.stop))
    return taken


def test_layer_mode_sends_each_layer_as_it_finishes():
    out = prompt()
    step = run(out, 0, 8, is_last=True, layers=0)
    seen = []
    for layer in range(LAYERS):
        step.ready_ns.append(layer)
        seen += pieces(out)
    assert seen == [(0, 8, i, i + 1) for i in range(LAYERS)]


def test_layers_go_in_groups_and_the_last_group_may_be_short():
    out = prompt(group=3)
    step = run(out, 0, 8, is_last=True, layers=2)
    assert pieces(out) == []
    step.ready_ns.append(3)
    assert pieces(out) == [(0, 8, 0, 3)]
    step.ready_ns.append(4)
    assert pieces(out) == [(0, 8, 3, 4)]


def test_chunk_mode_waits_for_the_last_layer_of_the_chunk():
    out = prompt("chunk")
    step = run(out, 0, 8, layers=LAYERS - 1)
    assert pieces(out) == []
    step.ready_ns.append(4)
    assert pieces(out) == [(0, 8, 0, LAYERS)]


def test_bulk_mode_waits_for_the_whole_prompt():
    out = prompt("bulk")
    run(out, 0, 8)
    assert pieces(out) == []
    run(out, 8, 11, is_last=True)
    assert pieces(out) == [(0, 11, 0, LAYERS)]


@pytest.mark.parametrize("mode", ["bulk", "chunk", "layer"])
def test_a_late_announcement_finds_everything_in_one_piece(mode):
    out = prompt(mode, is_announced=False)
    run(out, 0, 8)
    run(out, 8, 11, is_last=True)
    announce(out)
    assert pieces(out) == [(0, 11, 0, LAYERS)]


def test_an_open_block_travels_with_the_next_chunk():
    out = prompt("chunk")
    run(out, 0, 6)
    run(out, 6, 7)
    assert pieces(out) == [(0, 4, 0, LAYERS)]
    run(out, 7, 10, is_last=True)
    assert pieces(out) == [(4, 10, 0, LAYERS)]


def test_two_chunks_in_flight_are_sent_in_order():
    out = prompt()
    first, second = run(out, 0, 4, layers=1), run(out, 4, 8, is_last=True, layers=0)
    assert pieces(out) == [(0, 4, 0, 1)]
    first.ready_ns += [2, 3, 4]
    second.ready_ns += [5]
    assert pieces(out) == [(0, 4, 1, 4), (4, 8, 0, 1)]


def test_what_the_decode_node_has_cached_is_not_sent():
    out = prompt("chunk", num_cached=8)
    run(out, 0, 4)
    run(out, 4, 10, is_last=True)
    assert pieces(out) == [(8, 10, 0, LAYERS)]


def test_nothing_to_send_is_sent_once_it_is_computed():
    out = prompt("layer", num_cached=8)
    step = run(out, 0, 8, is_last=True, layers=LAYERS - 1)
    assert pieces(out) == [] and not out.is_sent
    step.ready_ns.append(4)
    assert out.is_sent


def test_sent_only_when_every_piece_is_acknowledged():
    out = prompt()
    run(out, 0, 8, is_last=True)
    assert not out.is_sent
    assert len(pieces(out)) == 1 and not out.is_sent
    out.routes[0].num_unacked -= 1
    assert out.is_sent


def test_a_new_attempt_starts_from_nothing():
    out = prompt("chunk")
    run(out, 0, 8)
    pieces(out)
    run(out, 0, 4, attempt=1)
    assert pieces(out) == [(0, 4, 0, LAYERS)]


def test_pieces_of_a_schedule_may_differ_in_size():
    out, seen = prompt(schedule=(1, 3, 4)), []
    step = run(out, 0, 8, is_last=True, layers=0)
    for layer in range(LAYERS):
        step.ready_ns.append(layer)
        seen.append(pieces(out))
    assert seen == [[(0, 8, 0, 1)], [], [(0, 8, 1, 3)], [(0, 8, 3, 4)]]


def test_on_a_device_groups_are_handed_out_before_they_are_computed():
    out = prompt(group=2)
    out.is_early = True
    step = run(out, 0, 8, is_last=True, layers=0)
    step.events += ["e0", "e1", "e2"]
    piece = out.take(out.routes[0])
    assert (piece.layers, piece.after, piece.ready_ns) == (range(0, 2), "e1", 0)
    assert out.take(out.routes[0]) is None
    step.events.append("e3")
    assert out.take(out.routes[0]).layers == range(2, 4)
    step.ready_ns += [5, 6]
    assert (piece.after, piece.ready_ns) == (None, 6)
    assert not out.is_sent


@pytest.mark.parametrize("mode", ["bulk", "chunk"])
def test_on_a_device_whole_prompts_wait_for_the_last_layer_s_event(mode):
    out = prompt(mode)
    out.is_early = True
    step = run(out, 0, 8, is_last=True, layers=1)
    step.events += [f"e{i}" for i in range(LAYERS)]
    piece = out.take(out.routes[0])
    assert (piece.start, piece.end, piece.layers, piece.after) == (0, 8, range(LAYERS), f"e{LAYERS - 1}")
