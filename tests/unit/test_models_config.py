"""ModelConfig reads what transformers 4 and 5 write, and refuses what it cannot serve by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import get_args

import pytest

from ksana_lab.config.engine import ModelOptions
from ksana_lab.errors import CheckpointError, ConfigError
from ksana_lab.models.config import DTYPES, SYNTH_SPEC_FILE, Llama3RopeScaling, ModelConfig, generated_seed
from ksana_lab.models.synth import SHAPES, synthesize

OLD = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
    "rope_theta": 5000.0,
    "eos_token_id": 2,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def checkpoint(path, config: dict, generation: dict | None = None):
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_dir(path)


def test_absent_keys_mean_their_defaults(tmp_path):
    config = checkpoint(tmp_path, OLD)
    assert (config.num_kv_heads, config.head_dim, config.tie_word_embeddings) == (4, 16, False)
    assert (config.dtype, config.rope_theta, config.rope_scaling, config.eos_token_ids) == ("bfloat16", 5000.0, None, (2,))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **SCALING}, "torch_dtype": "float16"},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "llama3", **SCALING}, "torch_dtype": "torch.float16"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, **SCALING}, "dtype": "float16"},
    ],
)
def test_old_and_new_spellings_say_the_same(tmp_path, spelling):
    base = {key: value for key, value in OLD.items() if key not in ("torch_dtype", "rope_theta")}
    config = checkpoint(tmp_path, base | spelling)
    assert (config.rope_theta, config.rope_scaling, config.dtype) == (5000.0, Llama3RopeScaling(8.0, 1.0, 4.0, 64), "float16")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_what_transformers_saves_again_reads_the_same(tmp_path, arch):
    from transformers import AutoConfig

    path = synthesize(tmp_path / arch, arch, "tiny")
    before = ModelConfig.from_dir(path)
    AutoConfig.from_pretrained(path).save_pretrained(path)
    assert "rope_parameters" in (path / "config.json").read_text()  # the new spelling
    assert ModelConfig.from_dir(path) == before == SHAPES[f"{arch}-tiny"]


def test_qwen_architectures_imply_biases_and_norms(tmp_path):
    qwen2 = checkpoint(tmp_path, OLD | {"architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.has_qkv_bias, qwen2.has_output_bias, qwen2.has_qk_norm) == (True, False, False)
    qwen3 = checkpoint(tmp_path, OLD | {"architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.has_qkv_bias, qwen3.has_qk_norm, qwen3.head_dim) == (False, True, 128)


def test_generation_config_decides_where_to_stop(tmp_path):
    assert checkpoint(tmp_path, OLD, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert checkpoint(tmp_path, OLD, {"eos_token_id": 0}).eos_token_ids == (0,)


@pytest.mark.parametrize("nothing", [{}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_generation_config_without_an_end_leaves_config_json_to_decide(tmp_path, nothing):
    assert checkpoint(tmp_path, OLD, nothing).eos_token_ids == (2,)


def test_a_bad_end_names_the_file_it_stands_in(tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json must give eos_token_id .*found 'x'"):
        checkpoint(tmp_path, OLD, {"eos_token_id": "x"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*supported are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor as a positive number, found none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path, change, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint(tmp_path, OLD | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings as a positive integer, found None"),
        ({"num_hidden_layers": True}, "num_hidden_layers as a positive integer, found True"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads as a positive integer, found '4'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads as a divisor of num_attention_heads 4, found 3"),
        ({"head_dim": -16}, "head_dim as a positive integer, found -16"),
        ({"head_dim": 15}, "head_dim as an even number.*found 15"),
        ({"num_attention_heads": 128}, "head_dim as an even number.*it is 0, found none"),
        ({"rope_theta": "x"}, "rope_theta as a positive number, found 'x'"),
        ({"rope_theta": None}, "rope_theta as a positive number, found None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps as a positive number, found nan"),
        ({"rope_scaling": "linear"}, "rope_scaling as a mapping, found 'linear'"),
        ({"rope_parameters": {"rope_theta": None}}, r"rope_parameters\.rope_theta as a positive number, found None"),
        ({"eos_token_id": "</s>"}, "eos_token_id as a token id or a list of them, found '</s>'"),
        ({"eos_token_id": [2, None]}, "eos_token_id as a token id"),
        ({"torch_dtype": "int8"}, "torch_dtype as one of float32, bfloat16, float16, found 'int8'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings as true or false, found 'false'"),
    ],
)
def test_a_bad_value_is_refused_with_file_key_and_value(tmp_path, change, complaint):
    with pytest.raises(CheckpointError, match=rf"config\.json must give {complaint}"):
        checkpoint(tmp_path, OLD | change)


@pytest.mark.parametrize("architectures", ["MambaForCausalLM", 5, [{}]])
def test_architectures_of_any_form_are_refused_in_one_line(tmp_path, architectures):
    with pytest.raises(CheckpointError, match="supported are LlamaForCausalLM"):
        checkpoint(tmp_path, OLD | {"architectures": architectures})


def test_null_heads_mean_their_defaults(tmp_path):
    config = checkpoint(tmp_path, OLD | {"num_key_value_heads": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim) == (4, 16)


def test_the_dtypes_are_those_of_the_option():
    choices = get_args(ModelOptions.model_fields["dtype"].annotation)
    assert {"auto", *DTYPES} == set(choices)


def test_directory_faults_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a directory"):
        ModelConfig.from_dir(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_dir(tmp_path)


def test_missing_weight_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2.*two\.safetensors"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_dir(tmp_path)


def test_directory_without_weights_needs_its_seed(tmp_path):
    path = synthesize(tmp_path / "shape", "qwen3", "tiny", seed=7, has_weights=False)
    assert ModelConfig.from_dir(path) == SHAPES["qwen3-tiny"]
    assert generated_seed(path) == 7
    (path / SYNTH_SPEC_FILE).write_text('{"has_weights": false}')
    with pytest.raises(CheckpointError, match="seed as an integer, found none"):
        ModelConfig.from_dir(path)


@pytest.mark.parametrize(("size", "local_kv_heads", "first"), [(1, 4, [0]), (2, 2, [0, 2]), (8, 1, [0, 0, 1, 1, 2, 2, 3, 3])])
def test_kv_heads_are_shared_out_or_replicated(size, local_kv_heads, first):
    config = SHAPES["qwen3-tiny"]
    config.check_tensor_parallel(size)
    assert config.num_local_kv_heads(size) == local_kv_heads
    assert [config.first_kv_head(rank, size) for rank in range(size)] == first


def test_indivisible_tensor_parallel_size_is_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size 3 .* 8 attention heads, 4 KV heads"):
        SHAPES["qwen3-tiny"].check_tensor_parallel(3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("qwen3-32b", 32.76), ("llama-8b", 8.03), ("llama-1b", 1.236)]
    + [("qwen2-0.5b", 0.494), ("qwen2-7b", 7.62), ("llama-70b", 70.55)],
)
def test_shapes_have_their_published_sizes(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_reading_a_config_loads_no_torch():
    code = "import sys, ksana_lab.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
