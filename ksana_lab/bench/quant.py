"""What FP8 does to a model's logits: the same text through the checkpoint as it is and through each way of keeping less of it.

Teacher-forced: every variant is given the text's tokens, not its own, so that position i of all of them answers the same question. Weights,
KV cache and both; besides, where the device does not do it by itself, FP8 weights with activations rounded as a GPU rounds them when it
multiplies many rows; and, where the reference is float32, plain bfloat16, as the yardstick of what is lost anyway.

    python -m ksana_lab.bench quant --model DIR [--tokens 512] [--sequences 2] [--chunk 128] [--text FILE] [--json FILE]"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionMetadata, ForwardContext, default_backend
from ksana_lab.attention.cache_dtype import FP8_MAX
from ksana_lab.errors import InvalidRequest, KsanaLabError
from ksana_lab.layers.linear_fp8 import LINEARS, dequantize_rows, quantize_rows, quantized_bytes
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.decoder import Decoder
from ksana_lab.models.key_range import fit_keys
from ksana_lab.models.registry import load_model
from ksana_lab.server.tokenizing import Tokenizer

_BLOCK = 16
_FP8_MIN_NORMAL = 2.0**-6  # below it a float8_e4m3fn has fewer than 4 digits (binary)
_CORPUS = Path(__file__).parent.parent / "models" / "corpus.txt"


@dataclass(frozen=True)
class Variant:
    name: str
    dtype: torch.dtype
    quant_method: str = "auto"
    has_fp8_cache: bool = False
    rounds_activations: bool = False


@dataclass
class Difference:
    """Of a variant's logits from the reference's, over positions p and vocabulary."""

    variant: str
    max_abs: float
    mean_abs: float
    relative: float  # root mean square of the difference / standard deviation of the reference's logits, both over all
    kl_mean: float  # of softmax(reference) against softmax(variant), nats a position
    kl_p99: float
    top1: float  # share of positions with the same most likely token
    nll: float  # of the text's next token, nats: mean
    nll_reference: float
    parameter_bytes: int
    kv_bytes_per_token: int


@dataclass
class Range:
    """What the reference kept in one layer's cache."""

    layer: int
    key_max: float
    key_rms: float
    key_below_normal: float  # share that is not 0 and so small that FP8 keeps fewer digits
    value_max: float
    value_rms: float
    value_below_normal: float


@dataclass
class Report:
    model: str
    device: str
    dtype: str
    torch: str
    num_sequences: int
    tokens: int  # of each
    chunk: int
    key_divisor: int = 1  # see models/key_range.py
    saturated: int = 0  # keys and values beyond FP8's range, before any division
    differences: list[Difference] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)


def variants(dtype: torch.dtype, device: torch.device) -> list[Variant]:
    yardstick = [Variant("bfloat16", torch.bfloat16)] if dtype == torch.float32 else []
    rounded = [] if device.type == "cuda" else [Variant("FP8 weights, activations rounded too", dtype, "fp8_e4m3", False, True)]
    return [
        *yardstick,
        Variant("FP8 weights", dtype, "fp8_e4m3"),
        *rounded,
        Variant("FP8 KV cache", dtype, "auto", True),
        Variant("FP8 weights and KV cache", dtype, "fp8_e4m3", True),
    ]


class Forcing:
    """A model, a cache, and texts run through it in chunks."""

    def __init__(self, model_dir: str, variant: Variant, device: torch.device, num_tokens: int) -> None:
        config = ModelConfig.from_dir(model_dir)
        self.model: Decoder = load_model(config, model_dir, dtype=variant.dtype, device=device, quant_method=variant.quant_method)
        self.divisor = fit_keys(self.model) if variant.has_fp8_cache else 1
        if variant.rounds_activations:
            round_activations(self.model)
        shape = (-(-num_tokens // _BLOCK), 2, config.num_kv_heads, _BLOCK, config.head_dim)
        dtype = torch.float8_e4m3fn if variant.has_fp8_cache else variant.dtype
        self.kv_layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.device, self.backend = device, default_backend(device)

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(layer[0].nbytes for layer in self.kv_layers) // _BLOCK

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], chunk: int) -> Iterator[Tensor]:
        """float32 [chunk, vocab] on the host, chunk after chunk."""
        for start in range(0, len(tokens), chunk):
            ids = torch.tensor(tokens[start : start + chunk], device=self.device)
            positions = torch.arange(start, start + len(ids), device=self.device)
            context = ForwardContext(self._metadata(start, len(ids)), self.kv_layers, self.backend)
            yield self.model.compute_logits(self.model(ids, positions, context)).cpu()

    def _metadata(self, start: int, count: int) -> AttentionMetadata:
        end = start + count

        def integers(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        blocks = torch.arange(len(self.kv_layers[0]), dtype=torch.int32, device=self.device)[None]
        slots = torch.arange(start, end, device=self.device)
        return AttentionMetadata(0, integers(0, count), integers(end), blocks, slots, [count], [end], count, end)

    def ranges(self, num_tokens: int) -> tuple[list[Range], int]:
        """Of what the cache holds now, and how many numbers FP8 could not hold."""
        found, beyond = [], 0
        for i, layer in enumerate(self.kv_layers):
            kv = layer.float().permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :num_tokens]  # [2, tokens, kv_heads, head_dim]
            beyond += int((kv.abs() > FP8_MAX).sum())
            small = ((kv.abs() < _FP8_MIN_NORMAL) & (kv != 0)).float().mean((1, 2, 3)).tolist()
            largest = kv.abs().amax((1, 2, 3)).tolist()
            rms = kv.square().mean((1, 2, 3)).sqrt().tolist()
            found.append(Range(i, largest[0], rms[0], small[0], largest[1], rms[1], small[1]))
        return found, beyond


def round_activations(model: Decoder) -> None:
    """Have every FP8 product see its input as a GPU's product of many rows does: 8 bits, one scale for each token."""

    def rounded(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (dequantize_rows(*quantize_rows(args[0]), args[0].dtype), *args[1:])

    for module in model.modules():
        if isinstance(module, tuple(vars(LINEARS["fp8_e4m3"]).values())):
            module.register_forward_pre_hook(rounded)


class Comparison:
    """Sums over positions; two logits [n, vocab] and the next tokens at a time."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.num = self.same = 0
        self.largest = self.total = self.squares = 0.0
        self.reference_sum = self.reference_squares = 0.0
        self.nll = self.reference_nll = 0.0
        self.num_next = self.num_logits = 0

    def add(self, reference: Tensor, other: Tensor, next_tokens: Sequence[int]) -> None:
        reference, other = reference.double(), other.double()
        difference = (reference - other).abs_()
        self.largest = max(self.largest, float(difference.max()))
        self.total += float(difference.sum())
        self.squares += float(difference.square().sum())
        self.reference_sum += float(reference.sum())
        self.reference_squares += float(reference.square().sum())
        self.num_logits += reference.numel()
        self.num += len(reference)
        self.same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        a, b = reference.log_softmax(-1), other.log_softmax(-1)
        self.kl.append((a.exp() * (a - b)).sum(-1))
        rows, columns = torch.arange(len(next_tokens)), torch.tensor(next_tokens, dtype=torch.int64)
        self.reference_nll -= float(a[rows, columns].sum())
        self.nll -= float(b[rows, columns].sum())
        self.num_next += len(next_tokens)

    def result(self, variant: str, parameter_bytes: int, kv_bytes_per_token: int) -> Difference:
        mean = self.reference_sum / self.num_logits
        spread = (self.reference_squares / self.num_logits - mean**2) ** 0.5
        kl = torch.cat(self.kl)
        return Difference(
            variant, self.largest, self.total / self.num_logits, (self.squares / self.num_logits) ** 0.5 / spread,
            float(kl.mean()), float(kl.quantile(0.99)), self.same / self.num,
            self.nll / self.num_next, self.reference_nll / self.num_next, parameter_bytes, kv_bytes_per_token,
        )  # fmt: skip


def measure(
    model_dir: str,
    texts: Sequence[Sequence[int]],
    *,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """``texts``: token ids, all of one length of at least 2. The reference's logits are kept on the host, float32."""
    length = len(texts[0])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    report = Report(str(model_dir), name, str(dtype).removeprefix("torch."), torch.__version__, len(texts), length, chunk)
    reference = Forcing(model_dir, Variant("reference", dtype), device, length)
    expected: list[list[Tensor]] = []
    for text in texts:
        expected.append(list(reference.logits(text, chunk)))
        report.ranges, beyond = reference.ranges(length)  # of the last text
        report.saturated += beyond
    plain_bytes = quantized_bytes(reference.model)[0]
    rows = [("reference", plain_bytes, reference.kv_bytes_per_token)]
    del reference
    for variant in variants(dtype, device):
        with _forced(model_dir, variant, device, length) as forcing:
            comparison = Comparison()
            for text, known in zip(texts, expected, strict=True):
                for i, (ours, theirs) in enumerate(zip(known, forcing.logits(text, chunk), strict=True)):
                    comparison.add(ours, theirs, text[i * chunk + 1 : (i + 1) * chunk + 1])
            report.key_divisor = max(report.key_divisor, forcing.divisor)
            rows.append((variant.name, quantized_bytes(forcing.model)[0], forcing.kv_bytes_per_token))
            report.differences.append(comparison.result(*rows[-1]))
        note(f"{variant.name}: done")
    report.differences.insert(0, Difference("reference", 0, 0, 0, 0, 0, 1, report.differences[0].nll_reference,
                                            report.differences[0].nll_reference, *rows[0][1:]))  # fmt: skip
    return report


@contextmanager
def _forced(model_dir: str, variant: Variant, device: torch.device, length: int) -> Iterator[Forcing]:
    forcing = Forcing(model_dir, variant, device, length)
    try:
        yield forcing
    finally:
        del forcing
        if device.type == "cuda":
            torch.cuda.empty_cache()


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        f"{report.model}, {report.dtype} on {report.device}, torch {report.torch}: {report.num_sequences} x {report.tokens} tokens, "
        f"chunks of {report.chunk}",
        "",
        "| logits against the reference | max | mean | relative | KL mean / p99 (nats) | same top token | NLL of the text | weights (MB) "
        "| KV a token (KB) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for d in report.differences:
        lines.append(
            f"| {d.variant} | {d.max_abs:.3g} | {d.mean_abs:.3g} | {d.relative:.2%} | {d.kl_mean:.2e} / {d.kl_p99:.2e} | {d.top1:.2%} "
            f"| {d.nll:.4f} | {d.parameter_bytes / 1e6:.1f} | {d.kv_bytes_per_token / 1e3:.3g} |"
        )
    keys, values = max(report.ranges, key=lambda r: r.key_max), max(report.ranges, key=lambda r: r.value_max)
    small = [max(getattr(r, name) for r in report.ranges) for name in ("key_below_normal", "value_below_normal")]
    lines += [
        "",
        f"Largest key {keys.key_max:.3g} (layer {keys.layer}, rms {keys.key_rms:.3g}), largest value {values.value_max:.3g} "
        f"(layer {values.layer}, rms {values.value_rms:.3g}). FP8 ends at {FP8_MAX:g}: {report.saturated} numbers are beyond it; keys are "
        f"divided by up to {report.key_divisor}. Below 1/64, where FP8 keeps fewer digits: at most {small[0]:.1%} of a layer's keys and "
        f"{small[1]:.1%} of its values.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = ModelConfig.from_dir(args.model)
        dtype = getattr(torch, args.dtype or (config.dtype if device.type == "cuda" else "float32"))
        texts = _texts(args.model, args.text, args.sequences, args.tokens)
        report = measure(args.model, texts, chunk=args.chunk, dtype=dtype, device=device, note=lambda line: print(line, flush=True))
    except KsanaLabError as error:
        print(f"error: {error}")
        return 2
    print(table(report))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return 0


def _texts(model_dir: str, path: Path | None, num: int, length: int) -> list[list[int]]:
    """``num`` pieces of ``length`` tokens, one after the other. Raises InvalidRequest when the text is too short."""
    tokenizer = Tokenizer.load(model_dir)
    try:
        ids = tokenizer.encode((path or _CORPUS).read_text(encoding="utf-8"))
    finally:
        tokenizer.close()
    if len(ids) < num * length:
        raise InvalidRequest(f"the text has {len(ids)} tokens, {num} x {length} are asked for; give a longer --text or lower --tokens")
    return [ids[i * length : (i + 1) * length] for i in range(num)]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench quant", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=512, help="of each piece of text")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=128, help="tokens in a step; on a GPU, 32 or fewer leave activations their 16 bits")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the reference: the checkpoint's on a GPU, float32 on a CPU"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--text", type=Path, help="a file of text; without it a page in English that comes with the package")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.tokens < 2 or args.sequences < 1 or args.chunk < 1:
        parser.error("--tokens must be 2 or more, --sequences and --chunk 1 or more")
    return args
