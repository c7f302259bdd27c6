"""Synthetic checkpoints are the same everywhere, complete or absent, and what transformers and tokenizers make of them agrees."""

from __future__ import annotations

import hashlib
import zlib

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ksana_lab.errors import CheckpointError
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.synth import SHAPES, main, random_weight, synthesize


def digest(path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_same_arguments_make_the_same_bytes(tmp_path):
    one, two = synthesize(tmp_path / "one", "llama", "tiny"), synthesize(tmp_path / "two", "llama", "tiny")
    assert digest(one) == digest(two)
    other = synthesize(tmp_path / "other", "llama", "tiny", seed=1)
    assert {name for name, value in digest(other).items() if value != digest(one)[name]} == {"model.safetensors", "ksana_lab_synth.json"}


def test_weights_are_the_same_on_every_machine():
    weight = random_weight("model.layers.0.mlp.up_proj.weight", (8, 64), seed=0, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert zlib.crc32(weight.view(torch.int16).numpy().tobytes()) == 3034442187
    assert weight.float().std().item() == pytest.approx(0.2, rel=0.1)


def test_finished_directory_is_left_alone(tmp_path):
    path = synthesize(tmp_path / "model")
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    synthesize(tmp_path / "model")
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_other_content_is_never_overwritten(tmp_path):
    path = synthesize(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds another synthetic checkpoint"):
        synthesize(path, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="was not made by"):
        synthesize(tmp_path / "mine")


def test_nothing_remains_of_an_interrupted_run(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ksana_lab.models.synth._write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "llama-8b", "qwen2-7b"])
def test_every_token_of_the_vocabulary_decodes(tmp_path, name):
    arch, _, shape = name.partition("-")
    path = synthesize(tmp_path / name, arch, shape, has_weights=False)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    vocab_size = SHAPES[name].vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(0, vocab_size, max(1, vocab_size // 997)))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_transformers_and_tokenizers_encode_alike(tmp_path, arch):
    path = synthesize(tmp_path / arch, arch, "tiny", has_weights=False)
    fast, raw = AutoTokenizer.from_pretrained(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "Hello world,  it's 你好 12345\n\n  def f(x): é <|nothing|>"
    ids = raw.encode(text).ids
    assert fast(text).input_ids == ids
    assert raw.decode(ids) == text
    assert (ids[0] == fast.bos_token_id) == (arch == "llama")


@pytest.mark.parametrize(("name", "eos"), [("llama-8b", (128009, 128001)), ("qwen3-8b", (151645, 151643)), ("qwen2-tiny", (1023, 1021))])
def test_special_tokens_have_their_published_ids(tmp_path, name, eos):
    arch, _, shape = name.partition("-")
    path = synthesize(tmp_path / name, arch, shape, has_weights=False)
    assert ModelConfig.from_dir(path).eos_token_ids == eos
    assert AutoTokenizer.from_pretrained(path).eos_token_id == eos[0]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_chat_template_opens_the_assistants_turn(tmp_path, arch):
    tokenizer = AutoTokenizer.from_pretrained(synthesize(tmp_path / arch, arch, "tiny", has_weights=False))
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).rstrip().endswith("assistant" if arch == "qwen3" else "assistant<|end_header_id|>")
    assert {tokenizer.eos_token_id} < set(ids)
    assert ids.count(tokenizer.bos_token_id) == (1 if arch == "llama" else 0)


def test_command_line_writes_or_says_why_not(tmp_path, capsys):
    out = str(tmp_path / "model")
    assert main(["--arch", "qwen3", "--shape", "tiny", "--out", out]) == 0
    assert "287,424 parameters" in capsys.readouterr().out
    assert main(["--arch", "qwen3", "--shape", "9b", "--out", out]) == 2
    assert "known are tiny, small, 0.6b" in capsys.readouterr().err
