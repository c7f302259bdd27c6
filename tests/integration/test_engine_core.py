"""The engine process, over its real socket: every request hears its end, nothing leaks, every way of stopping is orderly."""

import os
import signal
import subprocess
import sys
import time

import msgspec
import psutil
import pytest
import zmq
from helpers_checkpoint import checkpoint, oracle_greedy, prompts

from ksana_lab.config.engine import CacheOptions, EngineConfig, ModelOptions, ParallelOptions, SchedulerOptions
from ksana_lab.engine.engine_core import run
from ksana_lab.protocol.engine import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStatus,
    FromEngine,
    GetStatus,
    Shutdown,
    StepUpdates,
)
from ksana_lab.types import FinishReason, SamplingParams

_MAIN = """
import sys
from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.engine_core import run
sys.exit(run(EngineConfig.model_validate_json(sys.argv[1]), sys.argv[2]))
"""

ENDLESS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


class Node:
    """An engine process and the API process's end of its link."""

    def __init__(self, directory, **sections):
        model = ModelOptions(model_dir=checkpoint(), max_model_len=512)
        self.config = EngineConfig(model=model, **sections)
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        address = f"ipc://{directory}/api"
        self.socket.bind(address)
        arguments = [sys.executable, "-c", _MAIN, self.config.model_dump_json(), address]
        self.process = subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.decoder = msgspec.msgpack.Decoder(FromEngine)
        self.updates, self.statuses = [], []

    def send(self, message):
        self.socket.send_multipart([b"engine", msgspec.msgpack.encode(message)])

    def add(self, request_id, prompt, sampling=ENDLESS):
        self.send(AddRequest(request_id, prompt, sampling, time.monotonic_ns()))

    def receive(self):
        assert self.socket.poll(60_000), "the engine says nothing"
        message = self.decoder.decode(self.socket.recv_multipart()[1])
        if isinstance(message, StepUpdates):
            self.updates += message.updates
        if isinstance(message, EngineStatus):
            self.statuses.append(message)
        return message

    def wait_for(self, kind):
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def status(self, token):
        self.send(GetStatus(token))
        while (status := self.wait_for(EngineStatus)).token != token:
            pass
        return status

    def finish_of(self, request_id):
        while True:
            for update in self.updates:
                if update.request_id == request_id and update.finish is not None:
                    return update
            self.receive()

    def tokens_of(self, request_id):
        return [token for update in self.updates if update.request_id == request_id for token in update.new_token_ids]

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    scheduler = SchedulerOptions(max_num_seqs=2, prefill_chunk_tokens=16, max_num_batched_tokens=32, max_num_waiting=3)
    made = Node(tmp_path_factory.mktemp("engine"), cache=CacheOptions(num_blocks=60), scheduler=scheduler)
    ready = made.wait_for(EngineReady)
    assert (ready.num_blocks, ready.block_size, ready.max_model_len, ready.device) == (60, 16, 512, "cpu")
    yield made
    made.close()


def assert_clean(node, token):
    status = node.status(token)
    assert (status.num_running, status.num_waiting, status.num_leaked_blocks) == (0, 0, 0)
    assert status.num_free_blocks == status.num_blocks


def test_tokens_arrive_one_by_one_and_are_right(node):
    prompt = prompts(1, seed=4)[0]
    node.add("plain", prompt, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    last = node.finish_of("plain")
    assert node.tokens_of("plain") == oracle_greedy("qwen3", tuple(prompt), 8) and last.finish is FinishReason.LENGTH
    news = [update for update in node.updates if update.request_id == "plain"]
    assert len(news) == 8 and 0 < news[0].scheduled_ns <= news[0].first_token_ns
    assert_clean(node, 1)


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_abort_in_every_phase_leaves_nothing(node, phase):
    if phase == "waiting":  # behind two that fill the batch
        node.add("w0", [7] * 10)
        node.add("w1", [8] * 10)
    name = f"abort-{phase}"
    node.add(name, [9] * 300)
    if phase == "decode":
        while not node.tokens_of(name):
            node.receive()
    node.send(AbortRequest(name))
    assert node.finish_of(name).error_type == "aborted"
    assert bool(node.tokens_of(name)) == (phase == "decode")
    for other in ("w0", "w1"):
        node.send(AbortRequest(other, "stop"))
    assert_clean(node, 2)


def test_refusals_say_why(node):
    node.add("long", [1] * 512)
    assert node.finish_of("long").error_type == "context_length_exceeded"
    crowd = [f"crowd{i}" for i in range(20)]
    for name in crowd[:2]:
        node.add(name, [3] * 40)
    while not all(node.tokens_of(name) for name in crowd[:2]):  # else a step between two messages takes two out of a full queue
        node.receive()
    for name in crowd[2:]:
        node.add(name, [3] * 40)
    assert node.finish_of(crowd[-1]).error_type == "queue_full"
    for name in crowd:
        node.send(AbortRequest(name))
    for name in crowd:
        node.finish_of(name)
    assert_clean(node, 3)


def test_status_comes_by_itself_while_work_goes_on(node):
    """Two requests at any time: a second without a pause, however fast one is."""
    node.statuses.clear()
    names = iter(f"busy{i}" for i in range(1000))
    running = {next(names), next(names)}
    for name in running:
        node.add(name, [5] * 20)
    while not any(status.token == -1 and status.num_running for status in node.statuses):
        for name in [name for name in running if any(update.request_id == name and update.finish for update in node.updates)]:
            running.remove(name)
            running.add(name := next(names))
            node.add(name, [5] * 20)
        node.receive()
    for name in running:
        node.send(AbortRequest(name))
    assert_clean(node, 4)


def test_the_outcome_of_the_self_check_comes_when_work_runs_out(node):
    node.statuses.clear()
    node.add("brief", [5] * 20, SamplingParams(max_tokens=1, temperature=0.0))
    node.finish_of("brief")
    while not any(status.token == -1 and not status.num_running for status in node.statuses):
        node.receive()
    assert node.statuses[-1].num_leaked_blocks == 0


@pytest.mark.parametrize("how", ["message", "SIGTERM"])
def test_stopping_tells_every_client_and_ends_with_0(tmp_path, how):
    node = Node(tmp_path, cache=CacheOptions(num_blocks=60))
    try:
        node.wait_for(EngineReady)
        node.add("open", [5] * 20)
        while not node.tokens_of("open"):
            node.receive()
        if how == "message":
            node.send(Shutdown())
        else:
            node.process.send_signal(getattr(signal, how))
        assert node.finish_of("open").error_type == "unavailable"
        assert node.process.wait(20) == 0
    finally:
        node.close()


def test_a_dead_rank_fails_the_engine_with_a_reason(tmp_path):
    node = Node(tmp_path, parallel=ParallelOptions(tensor_parallel_size=2), cache=CacheOptions(num_blocks=60))
    try:
        node.wait_for(EngineReady)
        node.add("open", [5] * 20)
        while not node.tokens_of("open"):
            node.receive()
        (rank1,) = psutil.Process(node.process.pid).children()
        rank1.kill()
        failure = node.wait_for(EngineFailed)
        assert "rank 1" in failure.error
        assert node.process.wait(20) == 1
    finally:
        node.close()


def test_a_rank_that_dies_before_it_has_joined_is_not_waited_for(tmp_path):
    node = Node(tmp_path, parallel=ParallelOptions(tensor_parallel_size=2), cache=CacheOptions(num_blocks=60))
    try:
        engine = psutil.Process(node.process.pid)
        while not (ranks := engine.children()):
            assert node.process.poll() is None
        ranks[0].kill()  # it has not even imported torch
        assert "rank 1" in node.wait_for(EngineFailed).error
        assert node.process.wait(20) == 1
    finally:
        node.close()


def test_ranks_end_with_a_killed_engine(tmp_path):
    node = Node(tmp_path, parallel=ParallelOptions(tensor_parallel_size=2), cache=CacheOptions(num_blocks=60))
    try:
        node.wait_for(EngineReady)
        (rank1,) = psutil.Process(node.process.pid).children()
        node.process.kill()
        psutil.wait_procs([rank1], timeout=20)
        assert not rank1.is_running() or rank1.status() == psutil.STATUS_ZOMBIE
        assert list(tmp_path.glob("e-*/rank1.sock"))  # what it leaves is in the node's own folder, which somebody removes
    finally:
        node.close()


def test_a_bad_model_fails_with_the_reason(tmp_path):
    address = f"ipc://{tmp_path}/api"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        assert run(EngineConfig(model=ModelOptions(model_dir=str(tmp_path / "none"))), address) == 1
        assert socket.poll(10_000)
        failure = msgspec.msgpack.decode(socket.recv_multipart()[1], type=FromEngine)
    assert isinstance(failure, EngineFailed) and "does not exist" in failure.error
