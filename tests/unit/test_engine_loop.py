"""The engine process's loop, between a channel and an engine that are not there."""

import socket
from types import SimpleNamespace

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
