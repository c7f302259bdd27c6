"""Before the first request on a Hopper GPU: dependent launch, and own kernels for the products of few rows, where both prove themselves.

``few_rows.choose`` says which kernel was measured to be best for a shape. Here each is run on the model's own weights: it must give what
cuBLAS gives, twice the same, and not clearly slower in a captured chain over all layers, each product behind a norm as in a decode step
(alone, the kernels that start early look slow). cuBLAS stays where a kernel fails, and where it is clearly slower; small differences do
not count, so that two nodes, or two starts of one, do not come to different kernels by chance. Ranks agree: right on all of them, fast
on rank 0."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksana_lab.layers import few_rows, fused
from ksana_lab.layers.embedding import VocabHead
from ksana_lab.layers.few_rows import PLAIN, ROW_CLASSES, SILU_MUL, Chosen, StreamConfig, TileConfig
from ksana_lab.layers.linear import GateUpLinear, QKVLinear, RowLinear
from ksana_lab.layers.replay import capture, replay_us
from ksana_lab.layers.tp import TPGroup

log = logging.getLogger(__name__)

_MAX_ERROR = 0.01  # norm of the difference over norm of cuBLAS' result; rounding to bfloat16 makes 0.003
_MAX_SLOWER = 1.15  # times cuBLAS' time: far from what chance does, for another kernel means other roundings
_MIN_LAUNCHES = 8
_REPLAYS = 7

Own = QKVLinear | GateUpLinear | RowLinear | VocabHead


@dataclass
class Product:
    """Layers of one kind whose weights have one shape."""

    name: str
    n: int  # columns of the result
    k: int
    epilogue: int
    layers: list[Own] = field(default_factory=list)

    @property
    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


@dataclass
class Verdict:
    is_right: bool
    ours_us: float = 0.0
    cublas_us: float = 0.0

    @property
    def is_fast(self) -> bool:
        return self.ours_us <= _MAX_SLOWER * self.cublas_us


Verdicts = dict[str, dict[int, Verdict]]  # name of a product -> class of rows


def choose_kernels(model: nn.Module, tp: TPGroup) -> None:
    """Set ``own`` of the model's products and ``pdl`` of the layers between them. Needs CUDA graphs; all ranks together."""
    can = torch.cuda.is_available() and few_rows.has_hopper_kernel()
    if any(not json.loads(answer) for answer in tp.exchange(json.dumps(can and _launches_depend_rightly()).encode())):
        log.info("products of few rows are cuBLAS' (no Hopper GPU with Triton 3.6, or dependent launch gave other results)")
        return
    products = products_of(model)
    mine = {product.name: {rows: _judge(product, rows) for rows in ROW_CLASSES if _config(product, rows)} for product in products}
    everyones = [_decode(message) for message in tp.exchange(_encode(mine))]
    agreed = agree(everyones)
    for product in products:
        _set(product, agreed[product.name])
    for module in model.modules():
        if hasattr(module, "pdl"):
            module.pdl = True  # type: ignore[assignment]
    if tp.rank == 0:
        for line in describe(everyones[0], agreed):
            log.info("few rows | %s", line)


def products_of(model: nn.Module) -> list[Product]:
    """What the kernels can multiply with: bfloat16, no bias, plain classes (FP8 has its own)."""
    found: dict[str, Product] = {}
    for layer in model.modules():
        if type(layer) not in (QKVLinear, GateUpLinear, RowLinear, VocabHead) or getattr(layer, "bias", None) is not None:
            continue
        assert isinstance(layer, QKVLinear | GateUpLinear | RowLinear | VocabHead)
        if layer.weight.dtype != torch.bfloat16 or not layer.weight.is_contiguous():
            continue
        rows, k = layer.weight.shape
        epilogue = SILU_MUL if isinstance(layer, GateUpLinear) else PLAIN
        kind = type(layer).__name__.removesuffix("Linear").removeprefix("Vocab").lower()
        name = f"{kind} {rows} x {k}"
        found.setdefault(name, Product(name, rows // (1 + epilogue), k, epilogue)).layers.append(layer)
    return list(found.values())


def agree(everyones: Iterable[Verdicts]) -> dict[str, list[int]]:
    """Name -> classes of rows for own kernels: right on every rank, fast on the first."""
    first, *others = list(everyones)
    return {
        name: [rows for rows, v in by_rows.items() if v.is_right and v.is_fast and all(o[name][rows].is_right for o in others)]
        for name, by_rows in first.items()
    }


def describe(verdicts: Verdicts, agreed: dict[str, list[int]]) -> list[str]:
    lines = []
    for name, by_rows in verdicts.items():
        for rows, v in by_rows.items():
            figures = f"{v.cublas_us:.1f} µs by cuBLAS, {v.ours_us:.1f} by ours" if v.is_right else "ours is WRONG"
            lines.append(f"{name}, {rows} rows, behind a norm: {figures} → {'ours' if rows in agreed[name] else 'cuBLAS'}")
    return lines


def _config(product: Product, rows: int) -> TileConfig | StreamConfig | None:
    device = product.weights[0].device
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return few_rows.choose(rows, product.n, product.k, product.epilogue, num_sms, True)


def _set(product: Product, classes: list[int]) -> None:
    if not classes:
        return
    configs = {rows: config for rows in classes if (config := _config(product, rows)) is not None}
    # Launches that follow one another share the counters, so one set serves all layers.
    chosen = Chosen(configs, few_rows.new_counters(product.n, product.weights[0].device), pdl=True)
    for layer in product.layers:
        layer.own = chosen


def _judge(product: Product, rows: int) -> Verdict:
    config = _config(product, rows)
    assert config is not None
    weights = product.weights
    weights = (weights * _MIN_LAUNCHES)[: max(len(weights), _MIN_LAUNCHES)]
    device = weights[0].device
    counters = few_rows.new_counters(product.n, device)
    x = torch.randn(rows, product.k, device=device).to(torch.bfloat16)
    scale = torch.ones(product.k, device=device, dtype=torch.bfloat16)

    def ours(h: Tensor, weight: Tensor) -> Tensor:
        return few_rows.linear(h, weight, config, counters, product.epilogue, True)

    def cublas(h: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(h, weight)
        return fused.silu_mul(y, True) if product.epilogue == SILU_MUL else y

    def chain(multiply: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return [multiply(fused.rms_norm(x, scale, 1e-6, True), weight) for weight in weights]

    try:
        eager = chain(ours)
        wanted = chain(cublas)
        (ours_graph, outputs), (cublas_graph, _) = capture(lambda: chain(ours)), capture(lambda: chain(cublas))
        # In turn, and the best of each: what else the GPU does meanwhile is nobody's merit.
        times = [(replay_us(ours_graph), replay_us(cublas_graph)) for _ in range(_REPLAYS + 1)]
        ours_us, cublas_us = (min(column) / len(weights) for column in zip(*times[1:], strict=True))
        is_right = all(map(torch.equal, outputs, eager)) and all(map(_is_close, eager, wanted))
        return Verdict(is_right, ours_us, cublas_us)
    except Exception as error:  # a kernel that does not compile must not keep the node from starting
        log.warning("%s, %d rows: the own kernel does not run here: %s: %s", product.name, rows, type(error).__name__, error)
        return Verdict(False)


def _is_close(ours: Tensor, reference: Tensor) -> bool:
    error = (ours.float() - reference.float()).norm() / reference.float().norm()
    return bool(error < _MAX_ERROR)  # False for NaN, too


def _launches_depend_rightly() -> bool:
    """Whether a chain of the kernels between products gives the same bits with dependent launches, in a graph, as without."""
    heads, kv_heads, head_dim, tokens = 4, 2, 128, 4
    width = (heads + 2 * kv_heads) * head_dim
    device = torch.device("cuda", torch.cuda.current_device())
    start = torch.randn(tokens, 2 * width, device=device).to(torch.bfloat16)
    weight = torch.rand(2 * width, device=device).to(torch.bfloat16)
    cos_sin = torch.rand(tokens, head_dim, device=device)
    slots = torch.arange(tokens, device=device)
    cache = torch.zeros(1, 2, kv_heads, 16, head_dim, device=device, dtype=torch.bfloat16)

    def chain(pdl: bool) -> list[Tensor]:
        x, residual, outputs = start, start.clone(), []
        for _ in range(8):
            gate_up = fused.add_rms_norm(x, residual, weight, 1e-6, pdl)
            qkv = fused.silu_mul(gate_up, pdl)
            fused.qk_norm_rope_store(qkv, heads, cache, slots, cos_sin, weight[:head_dim], weight[:head_dim], 1e-6, pdl)
            x = torch.cat((qkv, fused.rms_norm(qkv, weight[:width], 1e-6, pdl)), 1)
            outputs += [qkv, x]
        return [*outputs, residual]

    try:
        wanted = [output.clone() for output in chain(False)]
        chain(True)
        graph, outputs = capture(lambda: chain(True))
        graph.replay()
        return all(map(torch.equal, outputs, wanted))
    except Exception as error:
        log.warning("dependent launch does not work here: %s: %s", type(error).__name__, error)
        return False


def _encode(verdicts: Verdicts) -> bytes:
    plain = {name: {rows: [v.is_right, v.ours_us, v.cublas_us] for rows, v in by_rows.items()} for name, by_rows in verdicts.items()}
    return json.dumps(plain).encode()


def _decode(message: bytes) -> Verdicts:
    return {name: {int(rows): Verdict(*values) for rows, values in by_rows.items()} for name, by_rows in json.loads(message).items()}
