"""FP8 weights and KV cache on CUDA, through whole engines. Kernels alone: test_kernels_fp8.py, test_kernels_attention.py."""

import pytest
import torch

from ksana_lab.bench import quant
from ksana_lab.bench._engines import Pair
from ksana_lab.config.engine import EngineConfig
from ksana_lab.engine.llm import LLM
from ksana_lab.layers.linear_fp8 import FEW_ROWS, dequantize_rows
from ksana_lab.models.synth import synthesize
from ksana_lab.types import SamplingParams

DEVICE = torch.device("cuda")
PROMPTS = [[(i * j) % 150_000 + 5 for j in range(1, 40 + 60 * i)] for i in range(1, 9)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SETTINGS = {"weights": ("fp8_e4m3", "auto"), "cache": ("auto", "fp8_e4m3"), "both": ("fp8_e4m3", "fp8_e4m3")}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(synthesize(tmp_path_factory.mktemp("checkpoint") / "q", "qwen3", "0.6b", has_weights=False))


def sections(what, **others):
    quant_method, cache_dtype = SETTINGS[what]
    cache = {"dtype": cache_dtype, "num_blocks": 2000}
    return {"model": {"quant_method": quant_method}, "cache": cache, "scheduler": {"max_num_seqs": 64}, **others}


def open_llm(model_dir, what, **others):
    chosen = sections(what, **others)
    return LLM(EngineConfig.model_validate({**chosen, "model": {"model_dir": model_dir, **chosen["model"]}}))


def tokens(llm, prompts, params=GREEDY):
    return [result.outputs[0].token_ids for result in llm.generate(prompts, params)]


@pytest.mark.gpu
@pytest.mark.parametrize("what", SETTINGS)
def test_replayed_graphs_say_what_eager_steps_say(model_dir, what):
    said = []
    for has_graphs in (False, True):
        with open_llm(model_dir, what, runtime={"enable_cuda_graph": has_graphs}) as llm:
            said.append([tokens(llm, PROMPTS), tokens(llm, PROMPTS * 6)])  # 8 and 48 sequences: both products
    assert said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda_ipc", "tcp"])
@pytest.mark.parametrize("what", SETTINGS)
def test_a_pair_says_what_one_node_says(model_dir, what, backend):
    """Each prompt alone, so that both do the same arithmetic."""
    with open_llm(model_dir, what) as llm:
        expected = [tokens(llm, [prompt])[0] for prompt in PROMPTS]
    torch.cuda.empty_cache()
    chosen = sections(what, connector={"backend": backend, "checksum": True})
    with Pair(model_dir, device="cuda", devices=((0,), (torch.cuda.device_count() - 1,)), **chosen) as pair:
        assert [pair.generate([prompt], GREEDY)[0] for prompt in PROMPTS] == expected
        pair.wait_clean()


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [FEW_ROWS, 128])
def test_logits_are_near_those_of_widened_weights(model_dir, chunk):
    """bfloat16 itself is off by some percent with these weights, FP8 by ten times that."""
    text = [(7 * i) % 150_000 + 5 for i in range(256)]
    makers = {
        name: quant.Variant(name, torch.bfloat16, method) for name, method in (("fp8", "fp8_e4m3"), ("wide", "auto"), ("plain", "auto"))
    }
    forcings = {name: quant.Forcing(model_dir, variant, DEVICE, len(text)) for name, variant in makers.items()}
    for narrow, wide in zip(forcings["fp8"].model.layers, forcings["wide"].model.layers, strict=True):
        for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down"):
            source = narrow.get_submodule(name)
            wide.get_submodule(name).weight.copy_(dequantize_rows(source.weight, source.scale, torch.bfloat16))
    logits = {name: torch.cat(list(forcing.logits(text, chunk))) for name, forcing in forcings.items()}
    off = {name: ((logits["fp8"] - logits[name]).std() / logits[name].std()).item() for name in ("wide", "plain")}
    assert off["wide"] < (0.4 if chunk == FEW_ROWS else 0.9) * off["plain"] and off["plain"] > 0.05, off


@pytest.mark.gpu
def test_bytes_saved_by_weights_become_blocks(model_dir):
    blocks = []
    for quant_method in ("auto", "fp8_e4m3"):
        with LLM(model_dir, quant_method=quant_method, max_num_seqs=8) as llm:
            layout = llm.engine._executor.layout
            blocks.append(llm.engine.status().num_blocks)
        torch.cuda.empty_cache()
    saved = 28 * (4096 + 2048 + 3 * 3072) * 1024  # layers * (qkv + o + gate, up, down) * hidden, a byte each
    assert (blocks[1] - blocks[0]) * layout.block_bytes == pytest.approx(saved, rel=0.3)
