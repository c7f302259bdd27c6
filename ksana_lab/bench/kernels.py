"""What each kernel of a step takes, and what its bytes or multiplications would: time, floor, ratio, on one GPU.

Ceilings are measured first, on random data: the bandwidth of a plain read, and the rate of a large bf16 product. Every kernel runs many
times in a captured graph, over inputs that together exceed the L2 cache; the median replay counts. Needs torch and Triton only.

    python -m ksana_lab.bench kernels [--shape qwen3-8b] [--batch 1,8,32,128,256] [--context 1016] [--prompt 512,2048,8192] [--json FILE]
    python -m ksana_lab.bench kernels --only fp8     # 8-bit weights times few rows, in several cuts: which to keep"""

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

from ksana_lab.layers import few_rows
from ksana_lab.layers.few_rows import PLAIN, ROW_CLASSES, SILU_MUL, TileConfig

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
        print(f"{'kernel':50} {'us':>9} {'floor':>9} {'ratio':>6}")
        rows = []
        if args.only == "fp8":
            measured = _fp8_few_rows(shape, ceilings, ROW_CLASSES, all_cuts=True)
        else:
            measured = measure(shape, ceilings, args.batch, args.context, args.prompt)
        for row in measured:
            print(f"{row.name:50} {row.us:9.2f} {row.floor_us:9.2f} {row.ratio:6.2f}", flush=True)
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
    parser.add_argument("--only", choices=["fp8"], help="products of 1, 8, 16 and 32 rows with 8-bit weights")
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
    a, b = (_random(8192, 8192) for _ in range(2))
    return Ceilings(read_bytes_per_s(), 2 * 8192**3 / median_us(lambda _: a @ b) * 1e6)


def read_bytes_per_s() -> float:
    """Of 4 GiB by a kernel that only reads, in the best of three grids."""
    from ksana_lab.bench._read_kernel import read

    data = torch.randn(1 << 30, device=_DEVICE)
    sums = torch.empty(1 << 16, device=_DEVICE)
    grids = [_num_sms() * n for n in (4, 8, 16)]
    best_us = min(median_us(lambda _, n=n: read(data, sums, n)) for n in grids)  # type: ignore[misc]
    return data.numel() * 4 / best_us * 1e6


def measure(shape: Shape, ceilings: Ceilings, batches: Sequence[int], context: int, prompts: Sequence[int]) -> Iterator[Row]:
    yield from _fp8_few_rows(shape, ceilings, [batch for batch in batches if batch <= ROW_CLASSES[-1]])
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
    products = {**_products(shape), "head": (shape.vocab, shape.hidden, PLAIN)}
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


def _products(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """A layer's: columns of the result, K, epilogue."""
    return {
        "qkv": (shape.qkv, shape.hidden, PLAIN),
        "o": (shape.hidden, shape.num_heads * shape.head_dim, PLAIN),
        "gate_up": (shape.ffn, shape.hidden, SILU_MUL),
        "down": (shape.hidden, shape.ffn, PLAIN),
    }


def _fp8_linears(shape: Shape, ceilings: Ceilings, tokens: int) -> Iterator[Row]:
    """A layer's products by tensor cores of 8 bits, with the quantisation of x. Floor: bytes, or multiplications at twice bfloat16's
    rate."""
    from ksana_lab.layers.linear_fp8 import fp8_linear, quantize_rows

    for name, (columns, k, epilogue) in _products(shape).items():
        n = columns * (1 + epilogue)
        copies = _copies(n * k)
        weights = [quantize_rows(_random(n, k)) for _ in range(copies)]
        x = _random(tokens, k)
        floor = max(ceilings.bytes_us(n * k), ceilings.flops_us(tokens * n * k))
        us = median_us(lambda i: fp8_linear(x, *weights[i], None, 0), copies)  # noqa: B023
        yield Row(f"linear {name} {tokens} FP8 tensor cores", us, floor)


def _fp8_few_rows(shape: Shape, ceilings: Ceilings, batches: Sequence[int], all_cuts: bool = False) -> Iterator[Row]:
    """8-bit weights times few rows, each product behind a norm as in a decode step, in the cut that few_rows.choose_fp8 takes (*) and, if
    asked, in others, beside cuBLAS over bfloat16 weights. Floor: the bytes of 8-bit weights; that of cuBLAS: twice as many. The norm alone
    is the last row of a shape; what it takes is in the others, as far as it does not overlap."""
    from ksana_lab.layers import fused, linear_fp8_triton
    from ksana_lab.layers.linear_fp8 import quantize_rows

    pdl = _has_dependent_launch()
    for name, (n, k, epilogue) in _products(shape).items():
        rows, copies = n * (1 + epilogue), _copies(n * (1 + epilogue) * k)
        wide = [_random(rows, k) for _ in range(copies)]
        narrow = [quantize_rows(weight) for weight in wide]
        ones, counters = torch.ones(k, dtype=torch.bfloat16, device=_DEVICE), few_rows.new_counters(n, torch.device(_DEVICE))
        floor = ceilings.bytes_us(rows * k)
        for tokens in batches:
            x = _random(tokens, k)

            def behind_norm(multiply: Callable[[Tensor, int], Tensor]) -> float:
                return median_us(lambda i: multiply(fused.rms_norm(x, ones, 1e-6, pdl), i), copies)  # noqa: B023

            def cublas(h: Tensor, i: int) -> Tensor:
                y = F.linear(h, wide[i])  # noqa: B023
                return fused.silu_mul(y, pdl) if epilogue == SILU_MUL else y  # noqa: B023

            yield Row(f"{name} {tokens} bf16 cuBLAS", behind_norm(cublas), 2 * floor)
            for at, config in enumerate(_fp8_cuts(tokens, n, k, epilogue)[: None if all_cuts else 1]):

                def ours(h: Tensor, i: int, config: TileConfig = config) -> Tensor:
                    return linear_fp8_triton.few_rows_linear(h, *narrow[i], config, counters, epilogue, pdl)  # noqa: B023

                cut = f"{config.block_n}x{config.block_k} split {config.split_k} stages {config.stages} warps {config.num_warps}"
                yield Row(f"{name} {tokens} FP8 {cut}{'' if at else ' *'}", behind_norm(ours), floor)
            yield Row(f"norm before {name} {tokens}", behind_norm(lambda h, _: h), ceilings.bytes_us(4 * tokens * k))


def _fp8_cuts(tokens: int, n: int, k: int, epilogue: int) -> list[TileConfig]:
    """The chosen one first. By turns: larger or narrower tiles, eight warps; as many programs as stay on the SMs together."""
    num_sms = _num_sms()
    chosen = few_rows.choose_fp8(tokens, n, k, epilogue, num_sms)
    rows = chosen.rows
    if rows > 16:
        others = [(TileConfig(rows, 32, 256, 1, 4), 3), (TileConfig(rows, 64, 128, 1, 5), 2)]
        others = [(TileConfig(rows, 32, 256, 1, 3), 3)] if epilogue == SILU_MUL else others
    elif epilogue == SILU_MUL:
        others = [(TileConfig(rows, 64, 128, 1, 4), 3), (TileConfig(rows, 64, 256, 1, 3, 8), 2)]
    else:
        wider_or_narrower = TileConfig(rows, 128, 256, 1, 3) if rows == 8 else TileConfig(rows, 32, 512, 1, 3)
        others = [(TileConfig(rows, 64, 512, 1, 3, 8), 2), (wider_or_narrower, 3)]
    cuts = [chosen, *(few_rows.cut_evenly(config, n, k, each * num_sms) for config, each in others)]
    return list(dict.fromkeys(cuts))


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
