"""A prefill and a decode engine under load and under aborts: no wait for one another, no block left, no token changed."""

import random

import pytest
from helpers_checkpoint import oracle_greedy, prompts
from helpers_pair import EnginePair

from ksana_lab.types import SamplingParams

NUM = 6
GREEDY = SamplingParams(max_tokens=NUM, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def layer_tracker(monkeypatch):
    monkeypatch.setenv("ENABLE_LAYER_TRACKER", "1")


class Collected:
    """The decode node's tokens and whatever ended with an error, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}

    def __call__(self, role, updates) -> None:
        for update in updates:
            if role == "decode":
                self.tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            if update.error is not None:
                self.errors.setdefault(update.request_id, update.error)


def all_idle(pair: EnginePair) -> bool:
    return all(engine.is_idle for engine in pair.engines.values())


@pytest.mark.parametrize("backend", ["tcp", "shm"])
def test_nodes_with_room_for_one_prompt_hear_of_two_in_opposite_order(backend):
    batch, collected = [prompt[:40] for prompt in prompts(9, seed=3, longest=60) if len(prompt) >= 40][:2], Collected()
    with EnginePair(connector={"backend": backend}, cache={"num_blocks": 8}) as pair:
        for role, order in (("prefill", (0, 1)), ("decode", (1, 0))):
            for i in order:
                pair.add(role, i, batch[i], GREEDY)
        pair.drive(lambda: collected.errors or all_idle(pair), on_updates=collected)
        assert collected.errors == {} and collected.tokens == {
            f"r{i}": oracle_greedy("qwen3", tuple(prompt), NUM) for i, prompt in enumerate(batch)
        }
        assert pair.leaks() == {"prefill": 0, "decode": 0}


@pytest.mark.parametrize(
    ("backend", "mode", "tp"),
    [*((backend, mode, (1, 1)) for backend in ("tcp", "shm") for mode in ("bulk", "chunk", "layer")), ("shm", "layer", (2, 1))],
)
def test_aborts_in_every_phase_leave_nothing_and_change_nothing(backend, mode, tp):
    """Each request may be aborted on either side or on both, at any turn of the engines. Half of them are left alone."""
    dice, batch, collected = random.Random(f"{backend}{tp}{mode}"), prompts(40, seed=4, longest=60), Collected()
    link = {"bandwidth_gbps": 0.05}  # a prompt takes some ten turns
    with EnginePair(
        tp=tp,
        connector={"backend": backend, "transfer_mode": mode, "link": link},
        scheduler={"prefill_chunk_tokens": 16, "max_num_seqs": 4},
        cache={"num_blocks": 40},
    ) as pair:
        doomed = {i: dice.choice([("prefill",), ("decode",), ("prefill", "decode")]) for i in range(0, len(batch), 2)}
        begins = {(role, i): 7 * i + dice.randrange(10) for i in range(len(batch)) for role in ("prefill", "decode")}
        ends = {(role, i): begins[role, i] + dice.randrange(12) for i, roles in doomed.items() for role in roles}
        for turn in range(330):
            for role, i in [request for request, at in begins.items() if at == turn]:
                pair.add(role, i, batch[i], GREEDY)
            for role, i in [request for request, at in ends.items() if at == turn]:
                pair.engines[role].abort(f"r{i}", "client disconnected")
            for role, engine in pair.engines.items():
                collected(role, engine.step())
        pair.drive(lambda: all_idle(pair), on_updates=collected)
        alone = [i for i in range(len(batch)) if i not in doomed]
        assert not any(f"r{i}" in collected.errors for i in alone) and len(collected.errors) > 5, collected.errors
        for i in alone:
            assert collected.tokens[f"r{i}"] == oracle_greedy("qwen3", tuple(batch[i]), NUM)
        assert pair.leaks() == {"prefill": 0, "decode": 0}
