"""Layers through their own kernels for few rows, and the choice at start-up on a real model.

Where there is no GPU the dispatch runs in Triton's interpreter, if TRITON_INTERPRET=1 is set."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.timeout(300), *([] if INTERPRETED else [pytest.mark.gpu])]
pytest.importorskip("triton")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 1e-5 if INTERPRETED else 5e-3


@pytest.mark.parametrize("rows", [1, 8, 13, 32])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_layer_through_its_own_kernel(rows, is_gated):
    from ksana_lab.layers import few_rows
    from ksana_lab.layers.linear import GateUpLinear, RowLinear
    from ksana_lab.layers.tp import TPGroup

    tp = TPGroup.single()
    layer = GateUpLinear(512, 128, tp, DTYPE, DEVICE) if is_gated else RowLinear(512, 256, False, tp, DTYPE, DEVICE)
    layer.weight.normal_(0, 512**-0.5)
    x = torch.randn(rows, 512, device=DEVICE).to(DTYPE)
    run = layer.activated if is_gated else layer
    wide = x.double() @ layer.weight.double().T
    gate, up = wide.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up if is_gated else wide
    configs = {
        8: few_rows.TileConfig(16, 64, 128, 2, 3),
        16: few_rows.TileConfig(16, 64, 256, 1, 3),
        32: few_rows.TileConfig(32, 64, 128, 4, 4),
    }
    layer.own = few_rows.Chosen(configs | {1: configs[8]}, few_rows.new_counters(256, DEVICE), pdl=not INTERPRETED)
    assert layer.own.config(rows) is not None
    error = (run(x).double() - expected).norm() / expected.norm()
    assert error < TOLERANCE


on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@on_gpu
def test_start_up_finds_every_kernel_right(caplog):
    """On a Hopper GPU nothing may be wrong; what is slower is said in the log."""
    from ksana_lab.layers import few_rows, start_up
    from ksana_lab.layers.tp import TPGroup
    from ksana_lab.models.registry import random_model
    from ksana_lab.models.synth import SHAPES

    if not few_rows.has_hopper_kernel():
        pytest.skip("needs compute capability 9 and Triton 3.6")
    model = random_model(SHAPES["qwen3-0.6b"], dtype=torch.bfloat16, device=DEVICE)
    with caplog.at_level("INFO"):
        start_up.choose_kernels(model, TPGroup.single())
    print(caplog.text)
    assert "WRONG" not in caplog.text and "does not" not in caplog.text and "other results" not in caplog.text
    assert "→ ours" in caplog.text and all(layer.pdl for layer in model.modules() if hasattr(layer, "pdl"))


@on_gpu
@pytest.mark.parametrize("has_graphs", [True, False])
def test_an_engine_with_own_kernels_stays_close_to_one_without(tmp_path, has_graphs):
    from ksana_lab.engine.llm import LLM
    from ksana_lab.models.synth import synthesize
    from ksana_lab.types import SamplingParams

    model = str(synthesize(tmp_path / "q", "qwen3", "0.6b", has_weights=False))
    prompts = [[(i * j) % 150_000 + 5 for j in range(1, 40 + 60 * i)] for i in range(1, 9)]
    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=1, ignore_eos=True)  # the second token is a decode step's
    said = []
    for own in (True, False):
        with LLM(model, num_blocks=2000, max_num_seqs=16, few_rows_linear=own, enable_cuda_graph=has_graphs) as llm:
            said.append([result.outputs[0] for result in llm.generate(prompts, params)])
    assert [one.token_ids[0] for one in said[0]] == [two.token_ids[0] for two in said[1]]
    pairs = [(one.logprobs[1], two.logprobs[1]) for one, two in zip(*said, strict=True)]
    errors = [abs(one.logprob - two.logprob) for one, two in pairs if one.token_id == two.token_id]
    assert len(errors) >= len(prompts) // 2 and max(errors) < 0.25
