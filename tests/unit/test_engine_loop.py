"""The engine process's loop and the engine's turn, between parts that are not there."""

import socket
from collections import deque
from types import SimpleNamespace

from ksana_lab.core.step import SchedulerOutput
from ksana_lab.engine.engine import Engine
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
        engine = SimpleNamespace(pollables=[], add=lambda request: refusal, scheduler=scheduler)
        _Loop(engine, channel, SimpleNamespace(is_set=False))._receive()
    assert [update for message in sent for update in message.updates] == [refusal]


def test_peers_hear_of_a_turn_that_runs_nothing_before_it_waits_for_the_device():
    """Of a request that just got its blocks, while the last decode step is under way."""
    happened, nothing = [], SchedulerOutput(1)
    engine = Engine.__new__(Engine)
    engine.wakeup = SimpleNamespace(clear=lambda: None)
    engine._transfer = SimpleNamespace(hold=lambda: happened.append("held"), release=lambda: happened.append("told"))
    engine._executor = SimpleNamespace(check=lambda: None, skip=lambda out: None, result=lambda pending: happened.append("waited"))
    engine.scheduler = SimpleNamespace(schedule=lambda now: nothing, update=lambda *_: None, take_updates=lambda: [], is_idle=False)
    engine._inflight, engine._depth, engine._was_idle = deque([(SchedulerOutput(0), None, 0)]), 1, False
    engine.step()
    assert happened[:3] == ["held", "told", "waited"]
