"""From a ModelConfig to a model with weights. One class serves every architecture so far; this is where another would be chosen."""

from __future__ import annotations

import logging
import os

import torch

from ksana_lab.layers import linear_fp8
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig, generated_seed
from ksana_lab.models.decoder import Decoder
from ksana_lab.models.synth import random_weight
from ksana_lab.models.weights import load_weights

logger = logging.getLogger(__name__)


def load_model(
    config: ModelConfig,
    model_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp: TPGroup | None = None,
    quant_method: str = "auto",
) -> Decoder:
    """This rank's share of the checkpoint, on ``device`` in ``dtype``; with ``quant_method`` "fp8_e4m3" the weights of the layers'
    products are quantised while they are read. A directory made with ``synth --no-weights`` gets its random
    weights made here, on the device, the same on every rank and node with that kind of device.

    Raises CheckpointError, and ConfigError when ``tp.size`` does not divide the model or the GPU cannot do FP8."""
    seed = generated_seed(model_dir)
    if seed is not None:
        logger.warning("%s holds no weights: making random ones from seed %d", model_dir, seed)
        return random_model(config, dtype=dtype, device=device, tp=tp, seed=seed, quant_method=quant_method)
    model = _new_model(config, dtype, device, tp, quant_method)
    # A tied checkpoint may still carry a copy of the embedding under the head's name.
    load_weights(model.pieces(), model_dir, ignored=frozenset({"lm_head.weight"} if config.tie_word_embeddings else ()))
    return model


def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp: TPGroup | None = None,
    seed: int = 0,
    quant_method: str = "auto",
) -> Decoder:
    """The shape with seeded random weights made on the device; no directory needed. On a CPU these are the weights that
    ``synth.synthesize`` writes with the same seed (rounded to ``config.dtype`` before they become ``dtype``). Ranks of one group hold
    shares of the same tensors."""
    model = _new_model(config, dtype, device, tp, quant_method)
    checkpoint_dtype = getattr(torch, config.dtype)
    for piece in model.pieces():
        weight = random_weight(piece.name, piece.full_shape, seed=seed, dtype=checkpoint_dtype, device=torch.device(device))
        piece.fill(weight.__getitem__)
    return model


def _new_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, tp: TPGroup | None, quant_method: str) -> Decoder:
    model = Decoder(config, dtype=dtype, device=torch.device(device), tp=tp or TPGroup.single(), quant_method=quant_method)
    linear_fp8.prove(model, dtype, torch.device(device))
    if quant_method != "auto":
        total, narrow = linear_fp8.quantized_bytes(model)
        logger.info("%d MiB of parameters, %d MiB of them in %s", total >> 20, narrow >> 20, quant_method)
    return model
