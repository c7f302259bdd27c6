"""The loader fills every parameter exactly once, from any cut of files, and names what is wrong with a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ksana_lab.errors import CheckpointError
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.registry import load_model, random_model
from ksana_lab.models.synth import synthesize

CPU = torch.device("cpu")


def load(path, dtype=torch.float32):
    return load_model(ModelConfig.from_dir(path), path, dtype=dtype, device=CPU)


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def assert_same_weights(one, other) -> None:
    torch.testing.assert_close(parameters_of(one), parameters_of(other), rtol=0, atol=0)


@pytest.fixture
def path(tmp_path):
    return synthesize(tmp_path / "model", "qwen3", "tiny")


def rewrite(path, change) -> None:
    """Pass the checkpoint's tensors through ``change``, which edits the dict in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_sharded_checkpoint_equals_a_single_file(tmp_path, path):
    sharded = synthesize(tmp_path / "sharded", "qwen3", "tiny", max_shard_bytes=100_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * ModelConfig.from_dir(path).num_parameters
    assert_same_weights(load(sharded), load(path))


def test_weights_are_converted_to_the_asked_dtype(path):
    wide, narrow = load(path, torch.float32), load(path, torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(wide.layers[0].mlp.down.weight.bfloat16(), narrow.layers[0].mlp.down.weight)


def test_tied_head_is_the_embedding_even_if_the_file_repeats_it(path):
    model = load(path)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(1024, 64, dtype=torch.bfloat16)}))
    assert_same_weights(load(path), model)


def test_untied_head_has_weights_of_its_own(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: lm_head\.weight"):
        load(path)
    head = torch.randn(1024, 64, dtype=torch.bfloat16)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert torch.equal(load(path).head.weight.bfloat16(), head)


def test_missing_and_unexpected_tensors_are_named(path):
    rewrite(path, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.bias": torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=r"unexpected 1 tensors: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load(path)
    rewrite(path, lambda tensors: (tensors.pop("model.layers.0.self_attn.k_proj.bias"), tensors.pop("model.norm.weight")))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: model\.norm\.weight"):
        load(path)


def test_wrong_shape_is_named_with_both_shapes(path):
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[65\], config\.json implies \[64\]"):
        load(path)


def test_tensor_in_two_files_is_refused(path):
    (path / "model.safetensors").rename(path / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"holds twice 1 tensors: model\.norm\.weight"):
        load(path)


@pytest.mark.parametrize(("content", "hint"), [(b"version https://git-lfs", "git lfs pull"), (None, "is the download complete")])
def test_file_that_is_no_safetensors_gets_a_hint(path, content, hint):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content or whole[:300_000])
    with pytest.raises(CheckpointError, match=hint):
        load(path)


def test_old_checkpoints_may_carry_rotary_buffers(path):
    before = load(path)
    rewrite(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert_same_weights(load(path), before)


def test_directory_without_weights_loads_those_that_synth_would_write(tmp_path, path):
    promised = synthesize(tmp_path / "promised", "qwen3", "tiny", has_weights=False)
    assert not list(promised.glob("*.safetensors"))
    assert_same_weights(load(promised), load(path))
    config = ModelConfig.from_dir(path)
    assert_same_weights(random_model(config, dtype=torch.float32, device=CPU), load(path))
