"""The engine process's loop, between a channel and an engine that are not there."""

import socket
from types import SimpleNamespace

import pytest

from ksana_lab.engine.engine_core import _Loop
from ksana_lab.protocol.engine import AddRequest, SequenceUpdate
from ksana_lab.types import FinishReason, SamplingParams


def test_a_refusal_does_not_wait_for_the_next_step():
    """A step may take long, and the peer of a pair has heard of the refusal already."""
    refusal = SequenceUpdate("r", [], finish=FinishReason.ERROR, error_type="queue_full", error="3 are waiting already")
    sent, (ours, theirs) = [], socket.socketpair()
    with ours, theirs:
        channel = SimpleNamespace(socket=ours, drain=lambda: [AddRequest("r", [5], SamplingParams(), 0)], send=sent.append)
        scheduler = SimpleNamespace(num_waiting=3, num_running=1)
        engine = SimpleNamespace(pollables=[], add=lambda request: refusal, scheduler=scheduler, spin_s=0.0)
        _Loop(engine, channel, SimpleNamespace(is_set=False))._receive()
    assert [update for message in sent for update in message.updates] == [refusal]


@pytest.mark.parametrize(("spin_s", "waits"), [(3600.0, [0, 0, 0]), (0.0, [8001])])
def test_an_engine_that_was_busy_looks_for_news_before_it_sleeps(spin_s, waits):
    asked = []

    def poll(wait_ms):
        asked.append(wait_ms)
        return wait_ms > 0 or len(asked) == 3

    busy = iter([True, False])

    def step():
        engine.is_busy = next(busy)
        signals.is_set = len(asked) > 0
        return []

    def drain():
        signals.is_set = bool(asked)
        return []

    signals = SimpleNamespace(is_set=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = SimpleNamespace(socket=ours, drain=drain, send=lambda message: None)
        engine = SimpleNamespace(
            pollables=[], spin_s=spin_s, step=step, is_idle=False, ready=lambda: None, status=lambda: None, fail_all=lambda why: [],
            wait_bound_s=lambda now_ns: 8.0,
        )  # fmt: skip
        loop = _Loop(engine, channel, signals)
        loop._poller = SimpleNamespace(poll=poll)
        loop.run()
    assert asked == waits
