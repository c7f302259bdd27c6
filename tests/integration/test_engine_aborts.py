"""Two real engines, and a client that goes away in every phase: both sides end clean, and the next request is served."""

import time

import pytest
from helpers_checkpoint import oracle_greedy
from helpers_pair import EnginePair

from ksana_lab.types import SamplingParams

PROMPT = [(7 * i) % 900 + 5 for i in range(60)]
LONG = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def pair():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENABLE_LAYER_TRACKER", "1")
        with EnginePair(connector={"backend": "shm"}, scheduler={"prefill_chunk_tokens": 10}) as made:
            made.number = 100
            yield made


class Story:
    """One request on both nodes, told step by step."""

    def __init__(self, pair):
        self.pair, self.ends, self.num_tokens = pair, {}, 0
        pair.number += 1
        self.name = f"r{pair.number}"

    def add(self, *roles):
        for role in roles:
            self.pair.add(role, self.pair.number, PROMPT, LONG)

    def turn(self, role):
        for update in self.pair.engines[role].step():
            self.num_tokens += len(update.new_token_ids) if role == "decode" else 0
            if update.finish is not None:
                self.ends[role] = update.error_type or update.finish.value

    def until(self, condition, *roles):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, [engine.status() for engine in self.pair.engines.values()]
            for role in roles:
                self.turn(role)

    def abort(self, role):
        self.pair.engines[role].abort(self.name, "client disconnected")

    def queue(self, role, name):
        return getattr(self.pair.engines[role].scheduler, name)

    def end(self):
        engines = self.pair.engines
        for role in engines:
            self.turn(role)  # hears of the abort
        self.until(lambda: all(engine.is_idle for engine in engines.values()), "prefill", "decode")
        assert self.pair.leaks() == {"prefill": 0, "decode": 0}
        assert self.pair.generate([PROMPT], SHORT) == [oracle_greedy("qwen3", tuple(PROMPT), 4)]


def test_decode_node_gives_up_while_it_waits_for_kv(pair):
    story = Story(pair)
    story.add("prefill", "decode")
    story.turn("prefill")  # D takes blocks when P has begun
    story.until(lambda: story.queue("decode", "waiting_kv"), "decode")
    story.abort("decode")
    story.until(lambda: len(story.ends) == 2, "prefill", "decode")
    assert story.ends["decode"] == "aborted"
    story.end()


def test_decode_node_gives_up_before_it_had_blocks(pair):
    story = Story(pair)
    story.add("prefill")
    story.until(lambda: story.queue("prefill", "held"), "prefill")
    story.add("decode")
    story.abort("decode")
    story.end()
    assert story.ends == {"prefill": "length", "decode": "aborted"}


def test_prefill_node_gives_up_in_the_middle_of_the_prompt(pair):
    story = Story(pair)
    story.add("decode", "prefill")
    story.turn("decode")
    story.turn("prefill")
    assert story.queue("prefill", "running")
    story.abort("prefill")
    story.until(lambda: len(story.ends) == 2, "prefill", "decode")
    assert story.ends == {"prefill": "aborted", "decode": "transfer_failed"}
    story.end()


def test_client_of_the_decode_node_goes_while_it_decodes(pair):
    story = Story(pair)
    story.add("prefill", "decode")
    story.until(lambda: story.num_tokens > 3, "prefill", "decode")
    story.abort("decode")
    story.abort("prefill")  # its part is over: ignored
    story.end()
    assert story.ends == {"prefill": "length", "decode": "aborted"}


def test_time_out_on_the_decode_node_when_no_prefill_ever_comes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENABLE_LAYER_TRACKER", "1")
        with EnginePair(connector={"backend": "shm"}, scheduler={"waiting_timeout_s": 0.5}) as pair:
            pair.number = 0
            story = Story(pair)
            story.add("decode")
            story.until(lambda: "decode" in story.ends, "prefill", "decode")
            assert story.ends["decode"] in ("timeout", "transfer_failed")
            story.end()
