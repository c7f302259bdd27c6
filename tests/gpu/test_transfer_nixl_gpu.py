"""NIXL between GPU caches: the tokens of one node in every mode, the way that UCX found, a killed node. With one GPU the two processes
share it. UCX must be left to choose: unset UCX_TLS."""

import importlib.util

import pytest
from test_transfer_gpu import alone, assert_says_the_same_in_every_mode, assert_survives_a_kill, make_pair, model_dir  # noqa: F401

from ksana_lab.config.environment import INSTALL_NIXL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason=f"nixl is not installed: {INSTALL_NIXL}"),
]


def test_a_pair_says_what_one_node_says_in_every_mode(model_dir, alone):  # noqa: F811
    assert_says_the_same_in_every_mode("nixl", model_dir, alone)


@pytest.mark.multi_gpu
def test_between_two_gpus_ucx_takes_the_way_that_the_hardware_offers(model_dir):  # noqa: F811
    with make_pair(model_dir, backend="nixl") as pair:
        stats = pair.engines["prefill"].status().transfer
        gbs = stats["link_bytes_per_s"] / 1e9
        assert stats["link_share_of_expected"] >= 0.5, f"{gbs:.1f} GB/s: UCX goes another way; UCX_PROTO_INFO=y shows which"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_node_takes_nothing_with_it_and_comes_back(victim, model_dir, alone):  # noqa: F811
    assert_survives_a_kill("nixl", victim, model_dir, alone)
