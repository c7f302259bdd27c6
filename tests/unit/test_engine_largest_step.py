"""The step whose memory is measured before the cache is made."""

from __future__ import annotations

import torch
from helpers_checkpoint import checkpoint

from ksana_lab.attention.sdpa import SdpaBackend
from ksana_lab.engine.model_runner import ModelRunner
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.registry import load_model


class NotingBackend(SdpaBackend):
    def __init__(self):
        self.seen = set()

    def attend(self, q, kv_layer, meta, scale):
        self.seen.add((q.shape[0], tuple(meta.query_lens), tuple(meta.context_lens), tuple(meta.seq_lens.tolist())))
        return super().attend(q, kv_layer, meta, scale)


def test_the_largest_step_may_have_earlier_context():
    model_dir, device, backend = checkpoint("qwen3"), torch.device("cpu"), NotingBackend()
    config = ModelConfig.from_dir(model_dir)
    model = load_model(config, model_dir, dtype=torch.float32, device=device, tp=TPGroup.single())
    runner = ModelRunner(model, max_num_seqs=2, max_model_len=256, block_size=16, backend=backend, device=device)
    kv_layers = [torch.zeros(1, 2, config.num_kv_heads, 16, config.head_dim) for _ in range(config.num_layers)]
    runner.run_largest_step(100, 2, kv_layers)
    runner.run_largest_step(100, 2, kv_layers, max_len=40, context=90)
    assert backend.seen == {(100, (100,), (100,), (100,)), (100, (40, 40, 20), (130, 130, 110), (130, 130, 110))}
    assert not any(layer.any() for layer in kv_layers)
