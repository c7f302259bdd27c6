"""NIXL between GPU caches: the tokens of one node in every mode, the way that UCX found, a killed node. With one GPU the two processes
share it. UCX must be left to choose: unset UCX_TLS."""

import importlib.util

import pytest
from test_transfer_gpu import BATCH, GREEDY, MODES, alone, any_left, make_pair, model_dir, prompts  # noqa: F401

from ksana_lab.config.environment import INSTALL_NIXL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason=f"nixl is not installed: {INSTALL_NIXL}"),
]


def test_a_pair_says_what_one_node_says_in_every_mode(model_dir, alone):  # noqa: F811
    with make_pair(model_dir, backend="nixl", is_here=True) as pair:
        worker = pair.engines["prefill"].engine.transfer_worker
        for mode in MODES:
            for checksum in (True, False):
                worker.reconfigure(worker.options.model_copy(update={"transfer_mode": mode, "checksum": checksum}))
                said = [pair.generate([prompt], GREEDY)[0] for prompt in BATCH]
                assert said == alone, (mode, checksum)
        pair.wait_clean()


@pytest.mark.multi_gpu
def test_between_two_gpus_ucx_takes_the_way_that_the_hardware_offers(model_dir):  # noqa: F811
    with make_pair(model_dir, backend="nixl") as pair:
        stats = pair.engines["prefill"].status().transfer
        gbs = stats["link_bytes_per_s"] / 1e9
        assert stats["link_share_of_expected"] >= 0.5, f"{gbs:.1f} GB/s: UCX goes another way; UCX_PROTO_INFO=y shows which"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_node_takes_nothing_with_it_and_comes_back(victim, model_dir, alone):  # noqa: F811
    survivor = "decode" if victim == "prefill" else "prefill"
    with make_pair(model_dir, backend="nixl", checksum=False) as pair:
        failed = set()
        for prompt in prompts([2000] * 12, 5):
            number = pair.next_number()
            for role in ("prefill", "decode"):
                pair.add(role, number, prompt, GREEDY)
        pair.drive(lambda: pair.engines["prefill"].status().transfer["bytes_sent"] > 0)
        pair.engines[victim].kill()
        other = pair.engines.pop(victim)
        note = lambda role, news: failed.update(u.request_id for u in news if u.error)  # noqa: E731
        pair.drive(lambda: not any_left(pair, survivor), 60, note)
        note(survivor, pair.engines[survivor].step())
        assert failed or survivor == "prefill", "nothing was under way when the node died"
        pair.engines[victim] = other
        pair.restart(victim)
        assert pair.generate(BATCH[2:3], GREEDY) == alone[2:3]
        pair.wait_clean()
