"""What each kernel of a step takes, and what its bytes or multiplications would: time, floor, ratio, on one GPU.

Ceilings are measured first, on random data: the bandwidth of a plain read, and the rate of a large bf16 product. Every kernel runs many
times in a captured graph, over inputs that together exceed the L2 cache; the median replay counts. Needs torch and Triton only.

    python -m ksana_lab.bench kernels [--shape qwen3-8b] [--batch 1,8,32,128,256] [--context 1016] [--prompt 512,2048,8192] [--json FILE]"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_L2_BYTES = 256 << 20  # inputs rotate over more than this
_BLOCK = 64
_DEVICE = "cuda"


@dataclass(frozen=True)
class Shape:
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = {
    "qwen3-8b": Shape(4096, 32, 8, 128, 12288, 151_936),
    "qwen3-0.6b": Shape(1024, 16, 8, 128, 3072, 151_936),
    "llama-3.1-8b": Shape(4096, 32, 8, 128, 14336, 128_256),
}


@dataclass
class Row:
    name: str
    us: float
    floor_us: float

    @property
    def ratio(self) -> float:
        return self.us / self.floor_us


@dataclass(frozen=True)
class Ceilings:
    read_bytes_per_s: float
    matmul_flops_per_s: float

    def bytes_us(self, count: float) -> float:
        return count / self.read_bytes_per_s * 1e6

    def flops_us(self, count: float) -> float:
        return count / self.matmul_flops_per_s * 1e6


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if not torch.cuda.is_available():
        print("error: this bench measures GPU kernels, and torch sees no CUDA GPU here")
        return 1
    shape = SHAPES[args.shape]
    with torch.inference_mode():
        ceilings = measure_ceilings()
        read, matmul = ceilings.read_bytes_per_s / 1e12, ceilings.matmul_flops_per_s / 1e12
        print(f"{torch.cuda.get_device_name()}: {read:.2f} TB/s read, {matmul:.0f} TFLOP/s")
        print(f"{'kernel':44} {'us':>9} {'floor':>9} {'ratio':>6}")
        rows = []
        for row in measure(shape, ceilings, args.batch, args.context, args.prompt):
            print(f"{row.name:44} {row.us:9.2f} {row.floor_us:9.2f} {row.ratio:6.2f}", flush=True)
            rows.append(row)
    if args.json:
        report = {
            "machine": torch.cuda.get_device_name(),
            "shape": args.shape,
            "ceilings": asdict(ceilings),
            "rows": [asdict(r) for r in rows],
        }
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        prog="python -m ksana_lab.bench kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32, 128, 256], help="sequences of a decode step")
    parser.add_argument("--context", type=int, default=1016, help="keys of each decoding sequence")
    parser.add_argument("--prompt", type=numbers, default=[512, 2048, 8192], help="tokens of a prefill step")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def median_us(launch: Callable[[int], object], copies: int = 1, replays: int = 9) -> float:
    """Microseconds of launch(i), i over the copies of its inputs, captured in a graph and replayed."""
    launches = max(copies, 8)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for i in range(copies):
            launch(i)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i % copies)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) * 1e3 / launches


def measure_ceilings() -> Ceilings:
    from ksana_lab.bench._read_kernel import read

    data = torch.randn(1 << 30, device=_DEVICE)
    sums = torch.empty(1 << 16, device=_DEVICE)
    grids = [_num_sms() * n for n in (4, 8, 16)]
    best_us = min(median_us(lambda _, n=n: read(data, sums, n)) for n in grids)  # type: ignore[misc]
    a, b = (_random(8192, 8192) for _ in range(2))
    return Ceilings(data.numel() * 4 / best_us * 1e6, 2 * 8192**3 / median_us(lambda _: a @ b) * 1e6)


def measure(shape: Shape, ceilings: Ceilings, batches: Sequence[int], context: int, prompts: Sequence[int]) -> Iterator[Row]:
    for batch in batches:
        yield from _between(shape, ceilings, batch)
        yield from _linears(shape, ceilings, batch)
        yield from _fp8_linears(shape, ceilings, batch)
        yield _decode(shape, ceilings, batch, context)
        yield _decode(shape, ceilings, batch, context, torch.float8_e4m3fn)
    for length in prompts:
        yield from _between(shape, ceilings, length)
        yield from _fp8_linears(shape, ceilings, length)
        yield from _prefill(shape, ceilings, length)


def _between(shape: Shape, ceilings: Ceilings, tokens: int) -> Iterator[Row]:
    """Norms, rotary embedding with the store, the gate, the maximum. Floors: each input read and each output written once."""
    from ksana_lab.layers import fused

    pdl = _has_dependent_launch()
    copies = _copies(tokens * shape.hidden * 2)
    xs, residuals = ([_random(tokens, shape.hidden) for _ in range(copies)] for _ in range(2))
    weight, head_weight = _random(shape.hidden), _random(shape.head_dim)
    yield Row(f"add_rms_norm {tokens}", median_us(lambda i: fused.add_rms_norm(xs[i], residuals[i], weight, 1e-6, pdl), copies),
              ceilings.bytes_us(4 * tokens * shape.hidden * 2))  # fmt: skip

    copies = _copies(tokens * shape.qkv * 2)
    qkvs = [_random(tokens, shape.qkv) for _ in range(copies)]
    kv_layer, _, slots = _cache(shape, 1, tokens)
    cos_sin = torch.rand(tokens, shape.head_dim, device=_DEVICE)
    kv_bytes = tokens * 2 * shape.num_kv_heads * shape.head_dim * 2
    yield Row(f"qk_norm_rope_store {tokens}",
              median_us(lambda i: fused.qk_norm_rope_store(
                  qkvs[i], shape.num_heads, kv_layer, slots, cos_sin, head_weight, head_weight, 1e-6, pdl), copies),
              ceilings.bytes_us(2 * tokens * shape.qkv * 2 + kv_bytes))  # fmt: skip

    copies = _copies(tokens * 2 * shape.ffn * 2)
    gates = [_random(tokens, 2 * shape.ffn) for _ in range(copies)]
    yield Row(
        f"silu_mul {tokens}", median_us(lambda i: fused.silu_mul(gates[i], pdl), copies), ceilings.bytes_us(3 * tokens * shape.ffn * 2)
    )
    if tokens <= 1024:
        copies = _copies(tokens * shape.vocab * 2)
        logits = [_random(tokens, shape.vocab) for _ in range(copies)]
        yield Row(
            f"argmax {tokens}", median_us(lambda i: fused.argmax(logits[i], pdl), copies), ceilings.bytes_us(tokens * shape.vocab * 2)
        )


def _linears(shape: Shape, ceilings: Ceilings, tokens: int) -> Iterator[Row]:
    """Each product of a layer and the head, by cuBLAS and by the kernel chosen for few rows. Floor: bytes or multiplications."""
    from ksana_lab.layers import few_rows

    products = {
        "qkv": (shape.qkv, shape.hidden, few_rows.PLAIN),
        "o": (shape.hidden, shape.num_heads * shape.head_dim, few_rows.PLAIN),
        "gate_up": (shape.ffn, shape.hidden, few_rows.SILU_MUL),
        "down": (shape.hidden, shape.ffn, few_rows.PLAIN),
        "head": (shape.vocab, shape.hidden, few_rows.PLAIN),
    }
    for name, (n, k, epilogue) in products.items():
        rows = n * (1 + epilogue)
        copies = _copies(rows * k * 2)
        weights = [_random(rows, k) for _ in range(copies)]
        x = _random(tokens, k)
        floor = max(ceilings.bytes_us(rows * k * 2), ceilings.flops_us(2 * tokens * rows * k))
        yield Row(f"linear {name} {tokens} cuBLAS", median_us(lambda i: F.linear(x, weights[i]), copies), floor)  # noqa: B023
        config = few_rows.choose(tokens, n, k, epilogue, _num_sms(), few_rows.has_hopper_kernel())
        if config is not None:
            counters = few_rows.new_counters(n, x.device)
            us = median_us(lambda i: few_rows.linear(x, weights[i], config, counters, epilogue, _has_dependent_launch()), copies)  # noqa: B023
            gate = ", gate in it" if epilogue else ""
            yield Row(f"linear {name} {tokens} {type(config).__name__[:-6].lower()}{gate}", us, floor)


def _fp8_linears(shape: Shape, ceilings: Ceilings, tokens: int) -> Iterator[Row]:
    """A layer's products over weights of 8 bits, with the quantisation of x where that is part of it. Floor: bytes, or multiplications at
    twice the rate of bfloat16's."""
    from ksana_lab.layers.linear_fp8 import FEW_ROWS, fp8_linear, quantize_rows

    products = {
        "qkv": (shape.qkv, shape.hidden),
        "o": (shape.hidden, shape.num_heads * shape.head_dim),
        "gate_up": (2 * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
    }
    for name, (n, k) in products.items():
        copies = _copies(n * k)
        weights = [quantize_rows(_random(n, k)) for _ in range(copies)]
        x = _random(tokens, k)
        floor = max(ceilings.bytes_us(n * k), ceilings.flops_us(tokens * n * k))
        for kernel, few_rows in (("few rows", FEW_ROWS), ("tensor cores", 0)):
            if tokens > FEW_ROWS and few_rows:
                continue
            yield Row(f"linear {name} {tokens} FP8 {kernel}",
                      median_us(lambda i: fp8_linear(x, *weights[i], None, few_rows), copies), floor)  # noqa: B023  # fmt: skip


def _decode(shape: Shape, ceilings: Ceilings, batch: int, context: int, dtype: torch.dtype = torch.bfloat16) -> Row:
    """One layer's attention; the plan, made once a step, is not in it."""
    from ksana_lab.attention.triton_decode import decode_attention, plan_decode

    kv_bytes = batch * context * 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    copies = _copies(kv_bytes)
    caches = [_cache(shape, batch, context, dtype) for _ in range(copies)]
    q = _random(batch, shape.num_heads, shape.head_dim)
    pdl = _has_dependent_launch()
    lens = torch.full((batch,), context, dtype=torch.int32, device=_DEVICE)
    plan = plan_decode(lens, shape.num_heads, shape.num_kv_heads, shape.head_dim, _num_sms(), pdl=pdl)
    scale = shape.head_dim**-0.5
    us = median_us(lambda i: decode_attention(q, caches[i][0], caches[i][1], plan, scale, pdl=pdl), copies)
    return Row(f"decode attention {batch} x {context}{' FP8' if dtype.itemsize == 1 else ''}", us, ceilings.bytes_us(kv_bytes))


def _prefill(shape: Shape, ceilings: Ceilings, length: int) -> Iterator[Row]:
    """Causal attention of one prompt: over pages, and cuDNN's over the step's own keys."""
    from ksana_lab.attention.triton import cudnn_attention
    from ksana_lab.attention.triton_prefill import prefill_attention

    kv_layer, table, _ = _cache(shape, 1, length)
    qkv = _random(length, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    q, k, v = qkv.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), 1)
    starts = torch.tensor([0, length], dtype=torch.int32, device=_DEVICE)
    out = torch.empty(length, shape.num_heads, shape.head_dim, dtype=q.dtype, device=_DEVICE)
    scale = shape.head_dim**-0.5
    floor = ceilings.flops_us(2 * shape.num_heads * shape.head_dim * length**2)
    paged = median_us(lambda _: prefill_attention(q, kv_layer, table, starts, starts[1:], length, scale, out), replays=5)
    yield Row(f"prefill attention {length} paged", paged, floor)
    yield Row(f"prefill attention {length} cuDNN", median_us(lambda _: cudnn_attention(q, k, v, scale, True), replays=5), floor)


def _cache(shape: Shape, num_seqs: int, length: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of a cache, block tables in random order, and the slots of the first sequence's tokens."""
    each = -(-length // _BLOCK)
    kv_layer = _random(num_seqs * each, 2, shape.num_kv_heads, _BLOCK, shape.head_dim).to(dtype)
    tables = torch.randperm(num_seqs * each, device=_DEVICE).to(torch.int32).view(num_seqs, each)
    slots = (tables[0].long()[:, None] * _BLOCK + torch.arange(_BLOCK, device=_DEVICE)).flatten()[:length]
    return kv_layer, tables, slots


def _random(*size: int) -> Tensor:
    return torch.randn(*size, device=_DEVICE, dtype=torch.bfloat16)


def _copies(num_bytes: int) -> int:
    """How many inputs of a size exceed the L2 cache together."""
    return max(1, min(64, _L2_BYTES // max(1, num_bytes) + 1))


def _num_sms() -> int:
    return torch.cuda.get_device_properties(_DEVICE).multi_processor_count


def _has_dependent_launch() -> bool:
    return torch.cuda.get_device_capability()[0] >= 9
