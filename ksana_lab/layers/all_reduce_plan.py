"""Which all-reduce a message takes, and where its bytes lie in the ranks' memory. Plain arithmetic, no GPU needed."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

NCCL, LL, ONE_SHOT, TWO_SHOT = "nccl", "ll", "one_shot", "two_shot"
OURS = (LL, ONE_SHOT, TWO_SHOT)
# Measured and shown, not chosen: in five of six processes on two H200s one_shot stalled at one size or another, 0.35 to 0.65 ms a call for
# calls on end, and then ran in 6 to 9 µs (docs/LOG.md, 2026-11-22). Why is not known; two_shot never did.
STALLS = (ONE_SHOT,)
NORM_ROWS = (1, 8, 32, 64)  # at which the sum that normalises (ll_norm) is compared with a sum and a norm behind it

PROGRAMS = 64  # most in a launch; each has its places in memory whether it runs or not
TILE = 4096  # elements that 512 threads move at a time: 16 bytes each at 16 bits
LL_TILE = 1024  # words of 32 bits, all that a program of ll takes
NUM_FLAG_SETS = 3  # the meeting of one_shot, the two of two_shot
FLAG_BYTES = 128  # a program's flags, in a cache line that no other program looks at
WORLD_SIZES = (2, 4, 8)  # flags are looked at as a vector, whose size is a power of two
ALIGNMENT = 16  # elements; a message of any other length is NCCL's
_WIDEST_NORM = 8192  # numbers in a row, which one program of ll_norm holds whole

_LL_LARGEST = PROGRAMS * LL_TILE * 4
_SMALLEST = 8 << 10
_LARGEST = 64 << 20
_ONE_SHOT_LARGEST = {2: 16 << 20, 4: 4 << 20, 8: 2 << 20}  # each rank sends world - 1 times the message
_MIN_REGION = 4 * TILE  # bytes; a launch of few programs gives each at most a tile


def ladder(max_bytes: int) -> list[int]:
    """Sizes to measure: powers of two from 8 KiB to 64 MiB, up to the first that holds the largest message."""
    sizes = [_SMALLEST]
    while sizes[-1] < min(max_bytes, _LARGEST):
        sizes.append(2 * sizes[-1])
    return sizes


@dataclass(frozen=True)
class Areas:
    """Offsets and sizes in bytes, the same in every rank's memory. Flags [NUM_FLAG_SETS, PROGRAMS] of FLAG_BYTES, world int32
    each, come first."""

    world: int
    ll_limit: int  # largest message
    one_shot_limit: int
    two_shot_limit: int
    norm_width: int = 0  # numbers of 16 bits in a row of ll_norm; 0: it does not run

    @classmethod
    def of(cls, world: int, max_bytes: int, norm_width: int = 0) -> Areas:
        limit = ladder(max_bytes)[-1]
        return cls(world, min(limit, _LL_LARGEST), min(limit, _ONE_SHOT_LARGEST[world]), limit, norm_width)

    @property
    def ll_region(self) -> int:
        """What one sender may put down for one program: each word with its epoch."""
        return 8 * LL_TILE

    @property
    def one_shot_region(self) -> int:
        return max(_MIN_REGION, _round_up(-(-self.one_shot_limit // PROGRAMS), 256))

    @property
    def two_shot_region(self) -> int:
        return max(_MIN_REGION, _round_up(-(-self.two_shot_limit // (PROGRAMS * self.world)), 256))

    @property
    def norm_region(self) -> int:
        """What one sender may put down for one row: each word with its epoch."""
        return _round_up(8 * (self.norm_width // 2), 256)

    @property
    def ll_area(self) -> int:
        return _round_up(NUM_FLAG_SETS * PROGRAMS * FLAG_BYTES, 4096)

    @property
    def one_shot_area(self) -> int:
        return self.ll_area + 2 * (self.world - 1) * PROGRAMS * self.ll_region

    @property
    def two_shot_area(self) -> int:
        return self.one_shot_area + 2 * (self.world - 1) * PROGRAMS * self.one_shot_region

    @property
    def norm_area(self) -> int:
        return self.two_shot_area + 2 * 2 * self.world * PROGRAMS * self.two_shot_region

    @property
    def nbytes(self) -> int:
        return self.norm_area + 2 * (self.world - 1) * PROGRAMS * self.norm_region

    def limit(self, algorithm: str) -> int:
        return {LL: self.ll_limit, ONE_SHOT: self.one_shot_limit, TWO_SHOT: self.two_shot_limit}[algorithm]

    def place(self, algorithm: str) -> tuple[int, int]:
        """(offset of the algorithm's area, bytes of a region in it)"""
        return {
            LL: (self.ll_area, self.ll_region),
            ONE_SHOT: (self.one_shot_area, self.one_shot_region),
            TWO_SHOT: (self.two_shot_area, self.two_shot_region),
        }[algorithm]


@dataclass(frozen=True)
class Launch:
    programs: int
    share: int  # elements (ll: words): a program's chunk, or what it sums for all ranks (two_shot, whose chunk is world shares)
    tile: int
    num_warps: int


def launch(algorithm: str, num_elements: int, world: int) -> Launch:
    """``num_elements``: of ll, words of 32 bits."""
    if algorithm == LL:
        programs = -(-num_elements // LL_TILE)
        return Launch(programs, _round_up(-(-num_elements // programs), ALIGNMENT), LL_TILE, 8)
    programs = min(PROGRAMS, -(-num_elements // TILE))
    parts = programs if algorithm == ONE_SHOT else programs * world
    share = _round_up(-(-num_elements // parts), ALIGNMENT)
    return Launch(programs, share, TILE if share <= TILE else 4 * TILE, 16)


def norm_width(hidden_size: int, itemsize: int) -> int:
    """``hidden_size`` where ll_norm takes such rows, else 0."""
    fits = itemsize == 2 and 0 < hidden_size <= _WIDEST_NORM and hidden_size % (2 * ALIGNMENT) == 0
    return hidden_size if fits else 0


def norm_launch(width: int) -> tuple[int, int]:
    """(numbers in a tile, warps) of ll_norm. As fused_triton.add_rms_norm has them: the order in which a row is summed hangs on both."""
    block = 1 << (width - 1).bit_length()
    return block, min(8, max(1, block // 512))


def fused_rows(times_us: Mapping[int, tuple[float, float]]) -> int:
    """``times_us``: rows -> (ll_norm, sum and norm apart). The most rows up to which ll_norm is always faster, 0 if at none."""
    faster = takewhile(lambda rows: times_us[rows][0] < times_us[rows][1], sorted(times_us))
    return max(faster, default=0)


def describe_norm(times_us: Mapping[int, tuple[float, float]]) -> list[str]:
    limit = fused_rows(times_us)
    return [
        f"{rows} row{'s' * (rows > 1)}: {fused:.1f} µs fused, {apart:.1f} apart → {'fused' if rows <= limit else 'apart'}"
        for rows, (fused, apart) in sorted(times_us.items())
    ]


@dataclass(frozen=True)
class SizeTable:
    """``steps``: (largest bytes, algorithm), ascending; what is larger than the last is NCCL's."""

    steps: tuple[tuple[int, str], ...] = ()

    def choose(self, num_bytes: int) -> str:
        at = bisect_left(self.steps, (num_bytes, ""))
        return self.steps[at][1] if at < len(self.steps) else NCCL

    def describe(self) -> str:
        if not self.steps:
            return "NCCL for every size"
        return ", ".join(f"{name} up to {_size(limit)}" for limit, name in self.steps) + ", nccl above"


def fastest(times_us: Mapping[int, Mapping[str, float]]) -> SizeTable:
    """``times_us``: size -> algorithm -> microseconds, of what was found right. A message takes what won at the next larger size."""
    steps: list[tuple[int, str]] = []
    for size in sorted(times_us):
        best = min(times_us[size], key=lambda name: (times_us[size][name], name != NCCL))
        if steps and steps[-1][1] == best:
            steps.pop()
        steps.append((size, best))
    if steps and steps[-1][1] == NCCL:
        steps.pop()
    return SizeTable(tuple(steps))


@dataclass(frozen=True)
class Report:
    """What the ranks found at start-up, and agreed on."""

    world: int
    dtype: str
    times_us: dict[int, dict[str, float]]
    wrong: dict[str, list[int]]  # algorithm -> sizes at which its result was not the expected one
    table: SizeTable

    def to_json(self) -> str:
        times = {str(size): by_name for size, by_name in self.times_us.items()}
        return json.dumps({"world": self.world, "dtype": self.dtype, "us": times, "wrong": self.wrong, "table": self.table.steps})

    @classmethod
    def from_json(cls, text: str) -> Report:
        data = json.loads(text)
        times = {int(size): by_name for size, by_name in data["us"].items()}
        table = SizeTable(tuple((size, name) for size, name in data["table"]))
        return cls(data["world"], data["dtype"], times, data["wrong"], table)

    def lines(self) -> list[str]:
        """The table for people."""
        names = [name for name in (NCCL, *OURS) if any(name in row for row in self.times_us.values())]
        lines = [f"{'size':>9}" + "".join(f"{name:>11}" for name in names) + "   µs, best last"]
        for size in sorted(self.times_us):
            row = self.times_us[size]
            cells = "".join(f"{row[name]:11.1f}" if name in row else f"{'–':>11}" for name in names)
            lines.append(f"{_size(size):>9}{cells}   {self.table.choose(size)}")
        lines += [f"WRONG RESULTS: {name} at {', '.join(map(_size, sizes))}" for name, sizes in self.wrong.items() if sizes]
        return lines


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes % (1 << 20) == 0 else f"{num_bytes / 1024:g} KiB"
