"""Steps of short prompts replayed as graphs, against the same steps launched kernel by kernel.

With TRITON_INTERPRET=1 the filling of buffers and the start-up proof run on the CPU, with stand-ins that run a step again when replayed."""

import os

import pytest
import torch

from ksana_lab.engine import cuda_graph
from ksana_lab.types import SamplingParams

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, engines do it, below")
class TestBuffers:
    @pytest.fixture
    def graphs(self):
        from ksana_lab.attention.triton import TritonBackend
        from ksana_lab.core.kv_layout import KVLayout
        from ksana_lab.engine.kv_cache import make_layer_views
        from ksana_lab.layers.tp import TPGroup
        from ksana_lab.models.registry import random_model
        from ksana_lab.models.synth import SHAPES

        model = random_model(SHAPES["qwen3-tiny"], dtype=torch.float32, device=torch.device("cpu"), tp=TPGroup.single())
        config = model.config
        layout = KVLayout(24, config.num_layers, config.num_kv_heads, 16, config.head_dim, "float32")
        views = make_layer_views(torch.zeros(layout.total_bytes, dtype=torch.uint8), layout)
        made = cuda_graph.PrefillGraphs(model, TritonBackend(pdl=False), views, max_num_tokens=128, max_num_blocks=12)
        made._graphs = {size: [Again(lambda size=size: made._run(size))] for size in made.sizes}
        return made

    def test_every_size_proves_right_and_the_cache_is_left_empty(self, graphs):
        assert graphs.sizes == [64, 128] and graphs.prove()
        assert not any(layer.any() for layer in graphs._kv_layers)

    @pytest.mark.parametrize("buffer", ["_slots", "_wanted", "_seq_lens", "_block_tables", "_positions"])
    def test_a_buffer_that_is_not_filled_does_not_pass(self, graphs, buffer):
        fill = graphs._fill
        graphs._fill = lambda *args: (fill(*args), getattr(graphs, buffer).zero_())
        assert not graphs.prove()


class Again:
    def __init__(self, run):
        self.replay = run


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from ksana_lab.models.synth import synthesize

    return str(synthesize(tmp_path_factory.mktemp("checkpoint") / "q", "qwen3", "0.6b", has_weights=False))


def first_tokens(model_dir, num_tokens, batches):
    from ksana_lab.engine.llm import LLM

    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
    with LLM(model_dir, num_blocks=2000, max_num_seqs=16, prefill_graph_tokens=num_tokens) as llm:
        graphs, seen = llm.engine._executor.worker.runner._prefill_graphs, []
        if graphs is not None:
            replay = graphs.replay
            graphs.replay = lambda inputs, on_layer_done: (seen.append(len(inputs.input_ids)), replay(inputs, on_layer_done))[1]
        return [[result.outputs[0].logprobs[0] for result in llm.generate(batch, params)] for batch in batches], seen


@pytest.mark.gpu
def test_an_engine_with_prefill_graphs_stays_close_to_one_without(model_dir):
    prompt = lambda n, seed: [(i * seed) % 150_000 + 5 for i in range(1, n + 1)]  # noqa: E731
    batches = [[prompt(n, n)] for n in (2, 63, 64, 65, 333, 1000)] + [[prompt(50 + 40 * i, i) for i in range(1, 6)], [prompt(1500, 3)]]
    (with_graphs, seen), (without, _) = (first_tokens(model_dir, num_tokens, batches) for num_tokens in (1024, 0))
    assert seen == [2, 63, 64, 65, 333, 1000, sum(50 + 40 * i for i in range(1, 6))]
    pairs = [pair for one, two in zip(with_graphs, without, strict=True) for pair in zip(one, two, strict=True)]
    errors = [abs(one.logprob - two.logprob) for one, two in pairs if one.token_id == two.token_id]
    assert len(errors) >= 0.7 * len(pairs) and max(errors) < 0.25
