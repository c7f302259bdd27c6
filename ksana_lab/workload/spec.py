"""What a run sends, as data: a frozen, YAML-able WorkloadSpec and the requests it stands for.

Same spec and vocabulary, same requests: every random choice comes from ``seed`` through a stream of its own, so that asking for more
requests, or for a warm-up, leaves the tokens of the first ones as they were (a stratified trace's rows are chosen anew). Knows nothing of
HTTP or of time passing: see client.py, loadgen.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ksana_lab.config import validate, yaml_file
from ksana_lab.errors import ConfigError
from ksana_lab.workload import arrivals
from ksana_lab.workload.lengths import Fixed, Lengths
from ksana_lab.workload.traces import Encode, Trace, TraceRow, read_trace

DEFAULT_VOCAB_SIZE = 256  # a byte-level vocabulary has at least these, so the ids are good on any node that does not say its size
DEFAULT_PROMPT, DEFAULT_OUTPUT = Fixed(tokens=128), Fixed(tokens=32)

# Names of the random streams derived from the seed. The numbers are part of "same spec, same requests": never renumber.
_ARRIVALS, _PROMPT_LENGTHS, _OUTPUT_LENGTHS, _TOKENS, _PREFIX, _GROUPS, _CANCEL, _BLOCKS, _WARMUP, _ROWS = range(10)

Endpoint = Literal["generate", "completions", "chat"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SharedPrefix(_Frozen):
    """A ``share`` of the requests begin with one of ``num_groups`` prefixes of ``tokens`` tokens (part of the prompt's length, not on top
    of it; a prompt that is not longer keeps one token of its own)."""

    num_groups: int = Field(1, ge=1)
    tokens: int = Field(ge=1)
    share: float = Field(1.0, gt=0, le=1)


class TraceSource(_Frozen):
    """Where recorded requests come from: ``path`` is a file or the name of a bundled sample (traces.BUNDLED)."""

    path: str
    format: Literal["azure", "mooncake", "burstgpt", "sharegpt"] | None = None  # None: from the file
    skip: int = Field(0, ge=0)  # rows before the first one used
    cycle: bool = False  # begin again when more requests are asked for than there are; for rate and users, which have times of their own
    # recorded: the first rows. stratified: rows from everywhere, one by chance from each of num_requests equal parts of the rows sorted by
    # prompt, in random order: few requests are then like the whole trace, at every rate, and each seed takes others. For rate and users.
    order: Literal["recorded", "stratified"] = "recorded"
    tokenizer_dir: str | None = None  # sharegpt only: a model directory with tokenizer.json


class Sampling(_Frozen):
    """Greedy to the full length by default: latencies then compare between systems, and tokens too."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0 = off
    ignore_eos: bool = True


class WorkloadSpec(_Frozen):
    """``WorkloadSpec(rate=4, num_requests=200, seed=0)``.

    When requests are sent, one of: ``rate`` (requests per second; gamma gaps; ``ramp_to`` makes it a ramp; ``.inf`` all at once),
    ``users`` (closed loop: each sends its next request ``think_time_s`` after the last one ended), or the times of ``trace``."""

    num_requests: int | None = Field(None, ge=1)  # None: the whole trace, or 100
    seed: int = Field(0, ge=0)

    rate: float | None = Field(None, gt=0)
    burstiness: float = Field(1.0, gt=0)  # shape of the gamma: 1 = Poisson, .inf = constant gaps
    ramp_to: float | None = Field(None, gt=0)
    users: int | None = Field(None, ge=1)
    think_time_s: float = Field(0.0, ge=0)
    time_scale: float = Field(1.0, gt=0)  # of a trace's times: 2 = half the rate

    prompt_tokens: Lengths | None = None  # None: the trace's, or 128
    output_tokens: Lengths | None = None  # None: the trace's, or 32
    prompt_scale: float = Field(1.0, gt=0)  # of a trace's lengths, rounded up
    output_scale: float = Field(1.0, gt=0)
    max_prompt_tokens: int | None = Field(None, ge=1)  # longer ones are cut and counted
    max_output_tokens: int | None = Field(None, ge=1)
    max_total_tokens: int | None = Field(None, ge=2)  # prompt + output, as a model's limit is; the output is cut first, down to 1

    shared_prefix: SharedPrefix | None = None
    trace: TraceSource | None = None
    vocab_size: int | None = Field(None, ge=2)  # prompts draw ids from 0 .. vocab_size - 1; None: ask the node
    sampling: Sampling = Sampling()
    endpoint: Endpoint = "generate"
    model: str | None = None  # OpenAI endpoints: the name to ask for; None: the first of /v1/models
    extra_body: dict[str, Any] = Field(default_factory=dict)  # laid over every request's JSON; null takes a field out
    num_warmup: int = Field(0, ge=0)  # sent and finished before the clock starts; in no result
    cancel_share: float = Field(0.0, ge=0, le=1)  # of the requests, cut off by the client part-way

    @model_validator(mode="after")
    def _consistent(self) -> WorkloadSpec:
        if self.rate is not None and self.users is not None:
            raise ValueError("rate (open loop) and users (closed loop) exclude each other")
        if self.rate is None and self.users is None and self.trace is None:
            raise ValueError("say when requests are sent: rate=..., users=... or trace=...")
        if self.trace is not None and self.trace.cycle and self.rate is None and self.users is None:
            raise ValueError("trace.cycle needs rate or users: a trace's times happen once")
        if self.trace is not None and self.trace.order != "recorded" and self.rate is None and self.users is None:
            raise ValueError("trace.order: stratified needs rate or users: a trace's times are those of its own order")
        if self.ramp_to is not None and (self.rate is None or math.isinf(self.rate) or math.isinf(self.ramp_to)):
            raise ValueError("ramp_to needs a finite rate to start from, and must be finite")
        if self.time_scale != 1.0 and (self.trace is None or self.rate is not None or self.users is not None):
            raise ValueError("time_scale stretches a trace's own times: it needs trace, without rate or users")
        if self.think_time_s and self.users is None:
            raise ValueError("think_time_s is of a closed loop: it needs users")
        if self.trace is None and (self.prompt_scale != 1.0 or self.output_scale != 1.0):
            raise ValueError("prompt_scale and output_scale are of a trace's lengths: they need trace")
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "workload") -> WorkloadSpec:
        """Raises ConfigError: one line that names ``source``, each faulty field and the nearest known one."""
        return validate.build(cls, data, source)

    @classmethod
    def from_yaml(cls, path: str | Path) -> WorkloadSpec:
        """Raises ConfigError: no such file, no YAML, or a bad field. A relative ``trace.path`` is looked for beside the YAML file too."""
        spec = cls.from_dict(yaml_file.read(path), source=str(path))
        if spec.trace is None or not (beside := Path(path).parent / spec.trace.path).is_file():
            return spec
        return spec.model_copy(update={"trace": spec.trace.model_copy(update={"path": str(beside)})})

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, in types that YAML and JSON know. ``from_dict`` of it is equal to this."""
        return self.model_dump(mode="python", exclude_defaults=True) | self._kinds()

    def _kinds(self) -> dict[str, Any]:
        """``kind`` is a default of its own class, but tells the classes apart."""
        return {name: value.model_dump() for name in ("prompt_tokens", "output_tokens") if (value := getattr(self, name)) is not None}

    @property
    def is_closed_loop(self) -> bool:
        return self.users is not None

    def build(self, vocab_size: int | None = None) -> Workload:
        """The requests. ``vocab_size`` is the node's, used where the spec names none. Raises ConfigError for a bad trace."""
        return _build(self, self.vocab_size or vocab_size or DEFAULT_VOCAB_SIZE)


@dataclass(frozen=True)
class WorkloadRequest:
    """One request to send."""

    index: int
    at_s: float | None  # offset from the start of the run; None in a closed loop
    prompt_token_ids: np.ndarray  # [num_prompt_tokens] int32
    max_tokens: int
    seed: int
    cancel_after_messages: int | None = None  # the client hangs up after so many (0: as soon as the answer begins)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(frozen=True)
class LengthReport:
    """What became of the lengths asked for, so that no scaling or cutting goes unsaid."""

    num_requests: int
    prompt_scale: float
    output_scale: float
    num_prompts_clipped: int
    num_outputs_clipped: int
    prompt_tokens_lost: int
    output_tokens_lost: int
    num_outputs_raised: int  # empty answers of a trace, asked for as one token: there is no request for none
    mean_prompt_tokens: float
    mean_output_tokens: float

    @property
    def is_changed(self) -> bool:
        num_changed = self.num_prompts_clipped + self.num_outputs_clipped + self.num_outputs_raised
        return num_changed > 0 or (self.prompt_scale, self.output_scale) != (1.0, 1.0)

    def __str__(self) -> str:
        parts = [f"{self.num_requests} requests, mean {self.mean_prompt_tokens:.0f} prompt + {self.mean_output_tokens:.0f} output tokens"]
        if (self.prompt_scale, self.output_scale) != (1.0, 1.0):
            parts.append(f"trace lengths scaled: prompts x {self.prompt_scale:g}, outputs x {self.output_scale:g}")
        for what, count, lost in (
            ("prompts", self.num_prompts_clipped, self.prompt_tokens_lost),
            ("outputs", self.num_outputs_clipped, self.output_tokens_lost),
        ):
            if count:
                parts.append(f"{count} {what} clipped by {lost} tokens in all")
        if self.num_outputs_raised:
            parts.append(f"{self.num_outputs_raised} empty outputs sent as 1 token")
        return "; ".join(parts)


@dataclass(frozen=True)
class Workload:
    spec: WorkloadSpec
    vocab_size: int
    requests: list[WorkloadRequest]
    lengths: LengthReport
    warmup: list[WorkloadRequest] = field(default_factory=list)
    trace_rows_dropped: int = 0


# ---- building --------------------------------------------------------------------------------------------------------


def _build(spec: WorkloadSpec, vocab_size: int) -> Workload:
    trace, rows, turns = _trace_rows(spec)
    count = len(rows) if trace else spec.num_requests or 100
    prompts, outputs = _asked_lengths(spec, trace, rows, count)
    lengths = _clip(spec, prompts, outputs)
    times = _times(spec, trace, rows, count)
    prompt_ids = _prompts(spec, trace, rows, turns, lengths.prompt, vocab_size)
    cancels = _cancels(spec, lengths.output)
    requests = [
        WorkloadRequest(i, None if times is None else float(times[i]), prompt_ids[i], int(lengths.output[i]), spec.seed + i, cancels[i])
        for i in range(count)
    ]
    warmup = _warmup(spec, lengths, vocab_size)
    return Workload(spec, vocab_size, requests, lengths.report, warmup, trace.num_dropped if trace else 0)


def _rng(spec: WorkloadSpec, *stream: int) -> np.random.Generator:
    return np.random.default_rng((spec.seed, *stream))


def _trace_rows(spec: WorkloadSpec) -> tuple[Trace | None, list[TraceRow], list[int]]:
    """The trace, its rows in the order of the requests, and how often each was taken before."""
    if spec.trace is None:
        return None, [], []
    source = spec.trace
    trace = read_trace(source.path, source.format, encode=_encoder(source.tokenizer_dir))
    available = trace.rows[source.skip :]
    wanted = len(available) if spec.num_requests is None else spec.num_requests
    if not available or (len(available) < wanted and not source.cycle):
        again = "; with rate or users, trace.cycle: true begins again" if available and not source.cycle else ""
        raise ConfigError(
            f"trace {source.path} has {len(trace.rows)} requests: cannot take {max(1, wanted)} after skipping {source.skip}{again}"
        )
    if not trace.has_timestamps and spec.rate is None and spec.users is None:
        raise ConfigError(f"trace {source.path} has no times: say rate=... or users=...")
    picked: list[tuple[TraceRow, int]] = []
    while len(picked) < wanted:
        turn, count = len(picked) // len(available), min(len(available), wanted - len(picked))
        rows = available[:count] if source.order == "recorded" else _stratified(available, count, _rng(spec, _ROWS, turn))
        picked += [(row, turn) for row in rows]
    return trace, [row for row, _ in picked], [turn for _, turn in picked]


def _stratified(rows: list[TraceRow], count: int, rng: np.random.Generator) -> list[TraceRow]:
    """``count`` different rows, one from each of ``count`` equal parts of them by the length of the prompt, in random order."""
    by_length = sorted(rows, key=lambda row: row.prompt_tokens)
    edges = np.arange(count + 1) * len(rows) // count
    chosen = edges[:-1] + (rng.random(count) * np.diff(edges)).astype(np.int64)
    return [by_length[i] for i in rng.permutation(chosen)]


def _encoder(tokenizer_dir: str | None) -> Encode | None:
    if tokenizer_dir is None:
        return None
    from tokenizers import Tokenizer

    file = Path(tokenizer_dir).expanduser() / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"trace.tokenizer_dir: {file} is missing")
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _asked_lengths(spec: WorkloadSpec, trace: Trace | None, rows: list[TraceRow], count: int) -> tuple[np.ndarray, np.ndarray]:
    """([count] prompt, [count] output) int64 before clipping; a trace's are scaled and rounded up."""
    asked = []
    for own, default, stream, name, scale in (
        (spec.prompt_tokens, DEFAULT_PROMPT, _PROMPT_LENGTHS, "prompt_tokens", spec.prompt_scale),
        (spec.output_tokens, DEFAULT_OUTPUT, _OUTPUT_LENGTHS, "output_tokens", spec.output_scale),
    ):
        if own is None and trace is not None:
            recorded = np.array([getattr(row, name) for row in rows], dtype=np.float64)
            asked.append(np.ceil(recorded * scale).astype(np.int64))
        else:
            asked.append((own or default).sample(count, _rng(spec, stream)))
    return asked[0], asked[1]


@dataclass(frozen=True)
class _Clipped:
    prompt: np.ndarray  # [count] int64
    output: np.ndarray  # [count] int64
    report: LengthReport


def _clip(spec: WorkloadSpec, prompts: np.ndarray, outputs: np.ndarray) -> _Clipped:
    num_raised = int((outputs == 0).sum())
    outputs = np.maximum(1, outputs)
    prompt = np.minimum(prompts, spec.max_prompt_tokens or prompts)
    output = np.minimum(outputs, spec.max_output_tokens or outputs)
    if spec.max_total_tokens is not None:
        prompt = np.minimum(prompt, spec.max_total_tokens - 1)
        output = np.minimum(output, spec.max_total_tokens - prompt)
    report = LengthReport(
        num_requests=len(prompt),
        prompt_scale=spec.prompt_scale,
        output_scale=spec.output_scale,
        num_prompts_clipped=int((prompt < prompts).sum()),
        num_outputs_clipped=int((output < outputs).sum()),
        prompt_tokens_lost=int((prompts - prompt).sum()),
        output_tokens_lost=int((outputs - output).sum()),
        num_outputs_raised=num_raised,
        mean_prompt_tokens=float(prompt.mean()),
        mean_output_tokens=float(output.mean()),
    )
    return _Clipped(prompt, output, report)


def _times(spec: WorkloadSpec, trace: Trace | None, rows: list[TraceRow], count: int) -> np.ndarray | None:
    rng = _rng(spec, _ARRIVALS)
    if spec.is_closed_loop:
        return None
    if spec.rate is None:
        assert trace is not None, "checked by WorkloadSpec"
        return arrivals.replay(np.array([row.at_s for row in rows]), spec.time_scale)
    if spec.ramp_to is not None:
        return arrivals.ramp(count, spec.rate, spec.ramp_to, spec.burstiness, rng)
    return arrivals.steady(count, spec.rate, spec.burstiness, rng)


def _prompts(
    spec: WorkloadSpec, trace: Trace | None, rows: list[TraceRow], turns: list[int], lengths: np.ndarray, vocab_size: int
) -> list[np.ndarray]:
    """One [length] int32 per request, exactly that long."""
    groups = _prefix_groups(spec, len(lengths))
    block = math.ceil(trace.block_tokens * spec.prompt_scale) if trace else 0
    prompts = []
    for i, length in enumerate(int(n) for n in lengths):
        row = rows[i] if trace and spec.prompt_tokens is None else None
        if row is not None and row.prompt_token_ids is not None:
            prompts.append(_from_text(spec, row.prompt_token_ids, length, vocab_size))
        elif row is not None and row.hash_ids:
            prompts.append(_from_blocks(spec, row.hash_ids, turns[i], block, length, vocab_size))
        else:
            prompts.append(_random_prompt(spec, i, length, groups[i], vocab_size))
    return prompts


def _draw(rng: np.random.Generator, count: int, vocab_size: int) -> np.ndarray:
    return rng.integers(0, vocab_size, size=count, dtype=np.int32)


def _random_prompt(spec: WorkloadSpec, index: int, length: int, group: int | None, vocab_size: int) -> np.ndarray:
    ids = _draw(_rng(spec, _TOKENS, index), length, vocab_size)
    if group is not None and spec.shared_prefix is not None:
        shared = min(spec.shared_prefix.tokens, length - 1)
        ids[:shared] = _draw(_rng(spec, _PREFIX, group), spec.shared_prefix.tokens, vocab_size)[:shared]
    return ids


def _prefix_groups(spec: WorkloadSpec, count: int) -> list[int | None]:
    if spec.shared_prefix is None:
        return [None] * count
    rng = _rng(spec, _GROUPS)
    shares = rng.random(count) < spec.shared_prefix.share
    groups = rng.integers(0, spec.shared_prefix.num_groups, size=count)
    return [int(group) if is_in else None for group, is_in in zip(groups, shares, strict=True)]


def _from_blocks(spec: WorkloadSpec, hash_ids: tuple[int, ...], turn: int, block: int, length: int, vocab_size: int) -> np.ndarray:
    """Equal hash ids give equal tokens, but not in a trace's second turn: else a prefix cache would know all of it. Scaling the lengths
    scales the blocks, so that what was shared stays shared."""
    again = (turn,) if turn else ()
    ids = np.concatenate([_draw(_rng(spec, _BLOCKS, hash_id, *again), block, vocab_size) for hash_id in hash_ids])
    assert len(ids) >= length, (len(ids), length)
    return ids[:length]


def _from_text(spec: WorkloadSpec, ids: tuple[int, ...], length: int, vocab_size: int) -> np.ndarray:
    if max(ids) >= vocab_size and spec.vocab_size is not None:
        raise ConfigError(
            f"trace.tokenizer_dir makes token {max(ids)}, outside vocab_size {vocab_size}: is it the served model's tokenizer?"
        )
    repeats = math.ceil(length / len(ids))  # prompt_scale above 1 asks for more than the text holds
    return np.tile(np.array(ids, dtype=np.int32), repeats)[:length]


def _cancels(spec: WorkloadSpec, outputs: np.ndarray) -> list[int | None]:
    """For the chosen share a point uniform in the answer, from before its first token to before its last."""
    if not spec.cancel_share:
        return [None] * len(outputs)
    rng = _rng(spec, _CANCEL)
    chosen, points = rng.random(len(outputs)) < spec.cancel_share, rng.random(len(outputs))
    return [int(point * n) if is_chosen else None for is_chosen, point, n in zip(chosen, points, outputs, strict=True)]


def _warmup(spec: WorkloadSpec, lengths: _Clipped, vocab_size: int) -> list[WorkloadRequest]:
    """As long as the first requests, but other tokens: a warm prefix cache would be no warm-up but an answer sheet."""
    requests = []
    for i in range(spec.num_warmup):
        ids = _draw(_rng(spec, _WARMUP, i), int(lengths.prompt[i % len(lengths.prompt)]), vocab_size)
        requests.append(WorkloadRequest(i, None, ids, int(lengths.output[i % len(lengths.output)]), spec.seed + i))
    return requests
