"""All-reduce by size and algorithm on the GPUs of this host: what ranks measure when they start, as a table.

Every algorithm is compared with the expected sums to the bit before it is timed. Microseconds are medians of calls in a captured graph.

    python -m ksana_lab.bench allreduce [--tp 2] [--max-mib 64] [--dtype bfloat16] [--json FILE]"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ksana_lab.errors import KsanaLabError
from ksana_lab.layers import all_reduce
from ksana_lab.layers.all_reduce_plan import Report
from ksana_lab.layers.tp import TPGroup

_TIMEOUT_S = 240.0


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    try:
        report = measure(args.tp, args.max_mib << 20, args.dtype)
    except KsanaLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = f"{args.tp} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {report.dtype}"
    print(machine)
    print("\n".join(report.lines()))
    print(f"chosen: {report.table.describe()}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, **json.loads(report.to_json())}, indent=1) + "\n", encoding="utf-8")
    return 1 if any(report.wrong.values()) else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.bench allreduce", description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="ranks, one for each GPU")
    parser.add_argument("--max-mib", type=int, default=64, help="largest message")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write sizes, times and the table there")
    args = parser.parse_args(argv)
    if args.tp < 2 or args.max_mib < 1:
        parser.error("--tp starts at 2, --max-mib at 1")
    return args


def measure(num_ranks: int, max_bytes: int, dtype: str) -> Report:
    """In processes of their own, so that nothing is left behind. Raises KsanaLabError that says why there is nothing to compare."""
    is_cuda = torch.cuda.is_available()
    if is_cuda and torch.cuda.device_count() < num_ranks:
        raise KsanaLabError(f"{num_ranks} ranks need {num_ranks} GPUs, and torch sees {torch.cuda.device_count()}")
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, num_ranks, is_cuda, f"file://{folder}/meeting", max_bytes, dtype, answers))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            text, error = answers.get(timeout=_TIMEOUT_S)
            for process in ranks:
                process.join(10)
        except queue.Empty:
            raise KsanaLabError(f"the ranks had no result within {_TIMEOUT_S:g} s") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()
    if error is not None:
        raise KsanaLabError(f"nothing to compare: {error}")
    return Report.from_json(text)


def _rank(rank: int, size: int, is_cuda: bool, meeting: str, max_bytes: int, dtype: str, answers: Any) -> None:
    try:
        if is_cuda:
            torch.cuda.set_device(rank)
        tp = TPGroup.connect(rank, size, meeting, backend="nccl" if is_cuda else "gloo", timeout_s=60.0)
        try:
            answer = _measure(tp, max_bytes, getattr(torch, dtype))
        finally:
            tp.close()
    except Exception as error:  # the parent must hear of it, whatever it is; it says so and ends
        answer = (None, f"rank {rank}: {type(error).__name__}: {error}")
    if rank == 0 or answer[1] is not None:
        answers.put(answer)


def _measure(tp: TPGroup, max_bytes: int, dtype: torch.dtype) -> tuple[str | None, str | None]:
    memory, reason = all_reduce.map_peers(tp, max_bytes)
    try:
        if memory is None:
            return None, reason
        memory.compile(dtype)
        return all_reduce.measure(tp, memory, dtype).to_json(), None
    finally:
        tp.exchange(b"")  # nobody's memory goes while another may still write there
        if memory is not None:
            memory.close()
        tp.exchange(b"")
