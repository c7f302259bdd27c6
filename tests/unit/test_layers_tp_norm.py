"""A row layer leaves its rank's term, and the norm behind it sums: at once where the group offers it, else one after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ksana_lab.layers.linear import RowLinear
from ksana_lab.layers.linear_fp8 import Fp8RowLinear
from ksana_lab.layers.norm import RMSNorm
from ksana_lab.layers.tp import TPGroup

CPU = torch.device("cpu")
HIDDEN = 16


class FakeGroup(TPGroup):
    """One of two ranks, whose sums are twice its own terms. ``at_once``: it normalises as well."""

    def __init__(self, at_once: bool) -> None:
        super().__init__(0, 2, FakeProcessGroup())
        self.at_once, self.calls = at_once, []

    def all_reduce(self, x):
        self.calls.append("sum")
        return x.mul_(2)

    def all_reduce_norm(self, x, residual, weight, eps):
        if not self.at_once:
            return None
        self.calls.append("sum and norm")
        residual += 2 * x
        return torch.nn.functional.rms_norm(residual, weight.shape, weight, eps)


class FakeProcessGroup:
    def name(self):
        return "gloo"


def new_norm(tp: TPGroup | None) -> RMSNorm:
    norm = RMSNorm(HIDDEN, 1e-6, torch.float32, CPU, tp)
    norm.weight.copy_(torch.linspace(0.5, 2.0, HIDDEN))
    return norm


@pytest.mark.parametrize(("at_once", "calls"), [(True, ["sum and norm"]), (False, ["sum"])])
def test_what_joins_a_residual_is_summed_once(at_once, calls):
    tp = FakeGroup(at_once)
    x, residual = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
    wanted = residual + 2 * x
    y, total = new_norm(tp)(x, residual)
    assert tp.calls == calls
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(y, new_norm(None).normalize(wanted))


@pytest.mark.parametrize("at_once", [True, False])
def test_what_has_no_residual_is_whole(at_once):
    tp = FakeGroup(at_once)
    x = torch.randn(3, HIDDEN)
    y, total = new_norm(tp)(x)
    assert tp.calls == [] and total is x and torch.equal(y, new_norm(None).normalize(x))


def test_a_group_that_did_not_choose_does_nothing_at_once():
    x = torch.ones(1, HIDDEN)
    assert TPGroup.single().all_reduce_norm(x, x, x[0], 1e-6) is None


@pytest.mark.parametrize("layer_class", [RowLinear, Fp8RowLinear])
def test_terms_of_row_layers_add_up_with_one_bias(layer_class, tmp_path):
    def term(tp: TPGroup):
        layer = layer_class(32, HIDDEN, True, tp, torch.float32, CPU)
        layer.weight.copy_(torch.ones(HIDDEN, 32 // tp.size))
        layer.bias.fill_(5.0)
        if layer_class is Fp8RowLinear:
            layer.scale.fill_(1.0)
        return layer(torch.ones(2, 32 // tp.size))

    def on(rank: int):
        tp = TPGroup.connect(rank, 2, f"file://{tmp_path}/meeting", timeout_s=30)
        x = term(tp)
        _, total = new_norm(tp)(x.clone(), torch.ones_like(x))
        tp.barrier()
        return x, total

    with ThreadPoolExecutor(2) as pool:
        (first, total), (second, same) = pool.map(on, range(2))
    assert torch.equal(first + second, term(TPGroup.single())) and not torch.equal(first, second)
    assert torch.equal(total, first + second + 1) and torch.equal(total, same)
