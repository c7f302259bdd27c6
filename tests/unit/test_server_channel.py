"""The API <-> engine link: typed both ways, in order, bounded, and honest about an engine that is not there."""

import asyncio

import msgspec
import pytest
import zmq

from ksana_lab.errors import EngineDead
from ksana_lab.protocol import channel
from ksana_lab.protocol.channel import EngineChannel, ServerChannel
from ksana_lab.protocol.engine import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    PeerUpdate,
    SequenceUpdate,
    StepUpdates,
    TransferKey,
)
from ksana_lab.types import FinishReason, SamplingParams, TokenLogprob

READY = EngineReady(max_model_len=128, num_blocks=64, block_size=16, vocab_size=256, device="cpu", devices=[(0, "cpu")], max_num_seqs=8)


class Inbox:
    """What a ServerChannel delivered; ``get`` waits for the next."""

    def __init__(self):
        self.messages, self.errors = asyncio.Queue(), asyncio.Queue()

    async def get(self):
        return await asyncio.wait_for(self.messages.get(), 10)


@pytest.fixture
async def link(tmp_path):
    inbox = Inbox()
    server = ServerChannel(f"ipc://{tmp_path}/api", inbox.messages.put_nowait, inbox.errors.put_nowait)
    server.open()
    engine = EngineChannel(server.address)
    engine.send(READY)
    assert await inbox.get() == READY
    yield server, engine, inbox
    engine.close()
    server.close()


async def test_every_field_survives_the_way_to_the_engine(link):
    server, engine, _ = link
    sampling = SamplingParams(max_tokens=3, stop=("a", "b"), stop_token_ids=(7,), seed=5, logprobs=2)
    request = AddRequest("r:0", [1, 2, 3], sampling, 123, (2,), TransferKey("p:1__d:2", 9, 1))
    peers = PeerUpdate([PeerUpdate.Pair("p:1__d:2", "id", [(0, 0, "127.0.0.1:1"), (0, 0, "127.0.0.1:2")])])
    for message in (request, peers, AbortRequest("r:0")):
        server.send(message)
    received = [await asyncio.to_thread(engine.recv, 10) for _ in range(3)]
    assert received == [request, peers, AbortRequest("r:0")]


async def test_updates_arrive_whole_and_in_order(link):
    _, engine, inbox = link
    logprobs = [TokenLogprob(4, -0.5, ((4, -0.5), (1, -1.5)))]
    sent = [StepUpdates([SequenceUpdate("r:0", [i], logprobs=logprobs)], 0, 1) for i in range(500)]
    sent.append(StepUpdates([SequenceUpdate("r:0", [], finish=FinishReason.STOP, stop_reason=2)], 0, 0))
    for message in sent:
        engine.send(message)
    assert [await inbox.get() for _ in sent] == sent


async def test_traffic_both_ways_at_once_loses_no_wakeup(link):
    server, engine, inbox = link

    def echo():
        for _ in range(300):
            message = engine.recv(10)
            engine.send(StepUpdates([SequenceUpdate(message.request_id, [])], 0, 0))

    task = asyncio.get_running_loop().run_in_executor(None, echo)
    for i in range(300):
        server.send(AbortRequest(str(i)))
    assert [(await inbox.get()).updates[0].request_id for _ in range(300)] == [str(i) for i in range(300)]
    await task


async def test_drain_takes_what_is_there_and_does_not_wait(link):
    server, engine, _ = link
    assert engine.drain() == [] and engine.recv(0) is None
    for i in range(3):
        server.send(AbortRequest(str(i)))
    got = []
    while len(got) < 3:
        assert await asyncio.to_thread(engine.socket.poll, 10_000)
        got += engine.drain()
    assert [m.request_id for m in got] == ["0", "1", "2"]


async def test_sending_to_no_engine_fails_at_once(tmp_path):
    server = ServerChannel(f"ipc://{tmp_path}/api", print, print)
    server.open()
    with pytest.raises(EngineDead):
        server.send(AbortRequest("r"))
    server.close()
    server.close()
    with pytest.raises(EngineDead, match="closed"):
        server.send(AbortRequest("r"))


async def test_foreign_bytes_are_reported_and_a_foreign_peer_is_dropped(link):
    server, engine, inbox = link
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.connect(server.address)
    stranger.send(msgspec.msgpack.encode(EngineFailed("not mine")))
    engine.socket.send(b"\x93\x01\x02\x03")
    assert isinstance(await asyncio.wait_for(inbox.errors.get(), 10), msgspec.MsgspecError)
    engine.send(EngineFailed("mine"))
    assert (await inbox.get()).error == "mine"
    stranger.close(0)


def test_an_oversized_message_is_refused_where_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1000)
    engine = EngineChannel(f"ipc://{tmp_path}/api")
    with pytest.raises(ValueError, match="EngineFailed takes"):
        engine.send(EngineFailed("x" * 2000))
    engine.close()
    engine.close()
