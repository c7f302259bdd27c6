"""Every figure that docs/results holds, in one command on a GPU machine, for as long as there is time.

    python -m ksana_lab.bench figures --out docs/results [--only engine,allreduce] [--seconds 540] [--list]

Each tool runs in a process of its own, with a bound; its whole output goes to OUT/NAME.log and its last lines to the terminal. What fails,
is too slow or needs more GPUs than there are is named at the end, and the rest runs. A JSON that exists keeps its rows of other names."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_SHOWN = 30  # lines of each tool's output


@dataclass(frozen=True)
class Figure:
    """``seconds``: bound of one run, about twice what it should take."""

    name: str
    num_gpus: int
    seconds: int
    command: str  # module and arguments; {out} is the folder

    def argv(self, out: Path) -> list[str]:
        return [sys.executable, "-m", *shlex.split(self.command.replace("{out}", shlex.quote(str(out))))]


_TRANSFER = "ksana_lab.bench transfer --json {out}/transfer.json "
FIGURES = (
    Figure("engine", 1, 300, "ksana_lab.bench engine --json {out}/engine.json"),
    Figure("tp2", 2, 150, "ksana_lab.bench engine --models qwen3-8b --parts decode --tp 2 --json {out}/engine.json"),
    Figure("allreduce", 2, 60, "ksana_lab.bench allreduce --tp 2 --json {out}/allreduce.json"),
    Figure("pairs", 2, 240, _TRANSFER + "--parts '' --end-to-end --tokens 512,2048,8192,16384 --rounds 5"),
    Figure("link", 2, 90, _TRANSFER + "--parts link --mode bulk,chunk,layer --tokens 1024,8192"),
    Figure(
        "overlap", 2, 200,
        _TRANSFER + "--parts overlap --mode bulk,chunk,layer,auto --gbps none,400,200,100,25 --tokens 64,256,512,1024,2048,8192 "
        "--rounds 4 --csv {out}/exposed.csv --figure {out}/exposed.png",
    ),
    Figure("fp8_wire", 2, 60, _TRANSFER + "--parts fp8"),
    Figure("kernels", 1, 90, "ksana_lab.bench kernels --json {out}/kernels.json"),
    Figure("preempt", 1, 180, "ksana_lab.bench preempt --json {out}/preempt.json"),
)  # fmt: skip


def chosen(only: str | None) -> list[Figure]:
    """In the order of ``only``. Raises ValueError for a name that is none."""
    if only is None:
        return list(FIGURES)
    by_name = {figure.name: figure for figure in FIGURES}
    names = only.split(",")
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"--only names {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def make(figures: Sequence[Figure], out: Path, seconds: float, num_gpus: int) -> list[str]:
    """Run what fits; returns one line for each that gave no figures, with the reason."""
    out.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + seconds
    missing = []
    for figure in figures:
        left_s = end_s - time.monotonic()
        if num_gpus < figure.num_gpus:
            missing.append(f"{figure.name}: needs {figure.num_gpus} GPUs, here are {num_gpus}")
        elif left_s < figure.seconds / 2:
            missing.append(f"{figure.name}: {left_s:.0f} s were left of {seconds:g}, it may take {figure.seconds}")
        elif why := _run(figure, out, min(figure.seconds, left_s)):
            missing.append(f"{figure.name}: {why}; see {out / figure.name}.log")
    return missing


def _run(figure: Figure, out: Path, limit_s: float) -> str:
    print(f"== {figure.name}: python -m {figure.command}", flush=True)
    log, begin_s, why = out / f"{figure.name}.log", time.monotonic(), ""
    with log.open("wb") as file:
        try:
            status = subprocess.run(figure.argv(out), stdout=file, stderr=subprocess.STDOUT, timeout=limit_s, check=False).returncode
            why = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            why = f"took more than {limit_s:.0f} s"
    for line in log.read_text(errors="replace").splitlines()[-NUM_SHOWN:]:
        print("  " + line)
    print(f"== {figure.name}: {why or 'done'}, {time.monotonic() - begin_s:.0f} s", flush=True)
    return why


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ksana_lab.bench figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--only", metavar="NAMES", help="of " + ", ".join(figure.name for figure in FIGURES))
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all together")
    parser.add_argument("--list", action="store_true", help="what would run, and on how many GPUs")
    args = parser.parse_args(argv)
    try:
        figures = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for figure in figures:
            print(f"{figure.name:<10} {figure.num_gpus} GPU  {figure.seconds:>4} s  python -m {figure.command}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("error: these figures are of GPUs, and torch finds none here; --list shows the commands", file=sys.stderr)
        return 2
    missing = make(figures, args.out, args.seconds, torch.cuda.device_count())
    for line in missing:
        print(f"no figures of {line}")
    return 1 if missing else 0
