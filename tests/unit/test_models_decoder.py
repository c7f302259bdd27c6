"""The decoder gives the logits of transformers, however a sequence is cut into steps, batched and paged."""

from __future__ import annotations

import random

import pytest
import torch
from helpers_model import PagedBatch, blas_sums_rows_alike, make_metadata
from transformers import AutoModelForCausalLM

from ksana_lab.attention.base import ForwardContext
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.decoder import Decoder
from ksana_lab.models.registry import load_model, random_model
from ksana_lab.models.synth import SHAPES, synthesize

ARCHS = ("llama", "qwen2", "qwen3")
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, logits of standard deviation about 2


@pytest.fixture(scope="module", params=ARCHS)
def pair(request, tmp_path_factory):
    """(our model, transformers' model) of one checkpoint, both float32."""
    path = synthesize(tmp_path_factory.mktemp("checkpoint") / request.param, request.param, "tiny")
    ours = load_model(ModelConfig.from_dir(path), path, dtype=torch.float32, device=torch.device("cpu"))
    return ours, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1024), k=count)


@torch.inference_mode()
def reference_logits(oracle, ids: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([ids])).logits[0]


def test_whole_prompt_gives_the_logits_of_transformers(pair):
    ours, oracle = pair
    ids = tokens(50)
    batch = PagedBatch(ours)
    logits = batch.step([(batch.new_sequence(50), ids)])[0]
    torch.testing.assert_close(logits, reference_logits(oracle, ids), **TOLERANCE)


def test_long_positions_follow_the_rope_scaling_of_transformers(pair):
    ours, oracle = pair
    ids = tokens(2500)  # beyond Llama's original_max_position_embeddings of 1024
    batch = PagedBatch(ours, block_size=64)
    logits = batch.step([(batch.new_sequence(2500), ids)])[0]
    torch.testing.assert_close(logits[-64:], reference_logits(oracle, ids)[-64:], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 5, 8, 13])
def test_chunks_read_earlier_tokens_from_pages(pair, chunk):
    ours, oracle = pair
    ids = tokens(29, seed=1)
    batch = PagedBatch(ours)
    seq = batch.new_sequence(29)
    logits = torch.cat([batch.step([(seq, ids[i : i + chunk])])[0] for i in range(0, 29, chunk)])
    torch.testing.assert_close(logits, reference_logits(oracle, ids), **TOLERANCE)


@pytest.mark.parametrize("order", ["block_major", "layer_major"])
def test_mixed_step_of_decodes_and_chunks_equals_each_sequence_alone(pair, order):
    ours, oracle = pair
    lengths, last_chunks = (3, 200, 17, 70, 21, 40), (1, 1, 1, 1, 5, 40)
    prompts = [tokens(length, seed=i) for i, length in enumerate(lengths)]
    batch = PagedBatch(ours, num_blocks=96, order=order)
    sequences = [batch.new_sequence(length) for length in lengths]
    for seq, ids, last in zip(sequences, prompts, last_chunks, strict=True):
        if len(ids) > last:
            batch.step([(seq, ids[:-last])])
    step = [(seq, ids[-last:]) for seq, ids, last in zip(sequences, prompts, last_chunks, strict=True)]
    for logits, ids, last in zip(batch.step(step, num_padding=3), prompts, last_chunks, strict=True):
        torch.testing.assert_close(logits, reference_logits(oracle, ids)[-last:], **TOLERANCE)


def test_prefix_hit_reads_blocks_of_another_sequence(pair):
    ours, oracle = pair
    first = tokens(24, seed=2)
    second = first[:16] + tokens(9, seed=3)
    batch = PagedBatch(ours)
    owner = batch.new_sequence(24)
    batch.step([(owner, first)])
    sharer = batch.new_sequence(25, shared_blocks=owner.block_table[:2])
    logits = batch.step([(sharer, second[16:])])[0]
    torch.testing.assert_close(logits, reference_logits(oracle, second)[16:], **TOLERANCE)


def test_greedy_tokens_equal_transformers_and_vary(pair):
    ours, oracle = pair
    prompt = tokens(12, seed=4)
    output = PagedBatch(ours).greedy(prompt, 48)
    expected = oracle.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=None)[0, 12:].tolist()
    assert output == expected
    assert len(set(output)) > 24  # a model that repeats itself would hide cache faults


def test_layers_report_in_order_once_per_step():
    model = random_model(SHAPES["qwen3-tiny"], dtype=torch.float32, device=torch.device("cpu"))
    done: list[int] = []
    batch = PagedBatch(model, on_layer_done=done.append)
    batch.step([(batch.new_sequence(9), tokens(9))])
    assert done == [0, 1, 2, 3]


def test_layer_reports_after_its_keys_are_in_the_cache():
    model = random_model(SHAPES["qwen3-tiny"], dtype=torch.float32, device=torch.device("cpu"))
    batch = PagedBatch(model, num_blocks=1, block_size=8)
    written: list[list[bool]] = []
    batch.on_layer_done = lambda layer: written.append([not cells.isnan().any() for cells in batch.kv_layers])
    batch.step([(batch.new_sequence(8), tokens(8))])
    assert written == [[i <= layer for i in range(4)] for layer in range(4)]


@pytest.mark.parametrize("name", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "qwen3-small"])
def test_neither_neighbours_nor_chunks_change_a_token(name):
    model = random_model(SHAPES[name], dtype=torch.float32, device=torch.device("cpu"))
    batch = PagedBatch(model, num_blocks=400)
    ids = tokens(150)
    whole = batch.step([(batch.new_sequence(150), ids)])[0]
    others = [batch.new_sequence(90) for _ in range(12)]
    for i, seq in enumerate(others):
        batch.step([(seq, tokens(i * 4 + 1, seed=i))])
    crowded = batch.new_sequence(150)
    parts = [batch.step([(crowded, ids[:70])])[0], batch.step([(others[0], [5]), (crowded, ids[70:147])])[1]]
    parts += [
        batch.step([(seq, [7]) for seq in others[:6]] + [(crowded, [last])] + [(seq, [9]) for seq in others[6:]])[6] for last in ids[147:]
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=2e-5)
    if name.endswith("tiny") and blas_sums_rows_alike():  # some BLAS block larger products by their number of rows
        assert torch.equal(torch.cat(parts), whole)


def test_model_needs_no_global_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = random_model(SHAPES["qwen3-tiny"], dtype=torch.float32, device=torch.device("cpu"))
        batch = PagedBatch(model)
        logits = batch.step([(batch.new_sequence(4), tokens(4))])[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(model, Decoder)
    assert {p.dtype for p in model.parameters()} == {logits.dtype} == {torch.float32}


@pytest.mark.parametrize("wanted", [slice(0, 2), torch.tensor([3, 11]), slice(0)], ids=["first", "indices", "none"])
def test_wanted_tokens_come_out_as_ever_and_every_tokens_keys_are_kept(wanted):
    seen = []
    model = random_model(SHAPES["qwen3-tiny"], dtype=torch.float32, device=torch.device("cpu"))
    caches, hidden = [], []
    for chosen in (None, wanted):
        batch = PagedBatch(model, on_layer_done=seen.append)
        meta = make_metadata([(batch.new_sequence(12), 12)], batch.block_size)
        ctx = ForwardContext(meta, batch.kv_layers, batch.backend, batch.on_layer_done)
        with torch.inference_mode():
            hidden.append(model(torch.arange(12), torch.arange(12), ctx, chosen))
        caches.append(torch.stack(batch.kv_layers).nan_to_num(0.0))
    torch.testing.assert_close(hidden[1], hidden[0][wanted])
    assert torch.equal(*caches) and seen == [*range(4)] * 2
