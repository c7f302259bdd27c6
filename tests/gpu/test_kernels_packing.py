"""The packing kernels against torch's operations. With TRITON_INTERPRET=1 they run on the CPU, on numbers that eight bits hold exactly:
the interpreter rounds some others wrongly."""

import os

import numpy as np
import pytest
import torch

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.transfer import packing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
pytest.importorskip("triton")
DEVICE = "cpu" if INTERPRETED else "cuda"


def kernels():
    from ksana_lab.transfer import packing_triton

    return packing.Kernels("triton", packing_triton.quantise, packing_triton.expand)


def exact_numbers(count, dice):
    """What float8_e4m3fn holds, the largest among each four: every scale is one."""
    numbers = torch.randint(0, 0x7E, (count,), generator=dice).to(torch.uint8).view(packing.FP8).float()
    numbers *= torch.randint(0, 2, (count,), generator=dice) * 2 - 1
    numbers[::4] = packing.LARGEST
    return numbers


FORMS = [(0, None, "cell"), (0, None, "half"), (1, 3, "head"), (2, 3, "head")]


@pytest.mark.parametrize("dtype", ["float16", "float32"] if INTERPRETED else ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("order", ["block_major", "layer_major"])
@pytest.mark.parametrize(("block_size", "head_dim"), [(4, 16), (3, 24)] if INTERPRETED else [(16, 128), (64, 64), (5, 24)])
def test_every_form_of_unit(dtype, order, block_size, head_dim):
    layout = KVLayout(7, 3, 2, block_size, head_dim, dtype, order)
    dice = torch.Generator().manual_seed(1)
    count = layout.total_bytes // layout.itemsize
    numbers = (exact_numbers(count, dice) if INTERPRETED else torch.randn(count, generator=dice)).to(getattr(torch, dtype))
    for first, last, kind in FORMS:
        last = last or block_size
        groups = {"cell": 4, "half": 2, "head": 1}[kind]
        form = packing.Form(layout, first, last, groups)
        token = first * head_dim * layout.itemsize
        units = np.array(
            [layout.head_offset(block, layer, 1 if kind != "cell" else 0, 0) + token for block, layer in ((6, 0), (1, 2), (3, 1))]
        )
        found = []
        for how in (packing.TORCH, kernels()):
            cache = numbers.clone().view(torch.uint8).to(DEVICE)
            target = torch.zeros((3, form.wire_bytes), dtype=torch.uint8, device=DEVICE)
            how.quantise(cache, form, units, target)
            for offset, unit in zip(units.tolist(), target, strict=True):
                cache[offset : offset + form.wire_bytes] = unit
            how.expand(cache, form, units)
            found.append((target.cpu(), cache.cpu().view(getattr(torch, dtype))))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), (first, last, kind)


def test_what_is_no_number_stays_none():
    layout = KVLayout(1, 1, 1, 4, 16, "float16")
    cache = torch.ones(layout.total_bytes // 2, dtype=torch.float16)
    cache[3], cache[64 + 5] = float("nan"), float("inf")
    cache, form = cache.view(torch.uint8).to(DEVICE), packing.Form(layout, 0, 4, 2)
    target = torch.zeros((1, form.wire_bytes), dtype=torch.uint8, device=DEVICE)
    kernels().quantise(cache, form, np.array([0]), target)
    cache[: form.wire_bytes] = target[0]
    kernels().expand(cache, form, np.array([0]))
    back = cache.view(torch.float16).cpu()
    assert back[:64].isnan().all() and not back[64 + 5].isfinite()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds wrongly")
def test_a_gpu_that_can_is_given_the_kernels():
    wanted = "triton" if torch.cuda.get_device_capability() >= (8, 9) else "torch"
    assert packing.choose(KVLayout(4, 1, 8, 16, 128, "bfloat16"), torch.device("cuda")).name == wanted
