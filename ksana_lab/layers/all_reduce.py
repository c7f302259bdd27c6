"""All-reduce chosen by the size of the message: own kernels over the GPUs' shared memory (all_reduce_triton.py), NCCL for the rest.

Nothing is believed: when the ranks start they map each other's memory, compare every algorithm's sums with the expected ones to the bit,
time it against NCCL, and agree on one table, rank 0's. Where a step fails on any rank, all stay with NCCL, and the log says why. The
kernel that sums few rows and normalises them at once has to prove itself in the same way against a sum and a norm behind it.

The memory is a plain allocation exported with CUDA IPC (the framework's own cannot be exported under ``backend:cudaMallocAsync``, and
torch's symmetric memory does not work there). NVLink multicast is not used."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksana_lab import cuda_driver
from ksana_lab.errors import KsanaLabError, TransferError
from ksana_lab.layers import all_reduce_plan as plan
from ksana_lab.layers import fused
from ksana_lab.layers.all_reduce_plan import LL, NCCL, NORM_ROWS, OURS, PROGRAMS, Areas, Report, SizeTable, ladder
from ksana_lab.layers.replay import capture, replay_us

if TYPE_CHECKING:
    from ksana_lab.layers.tp import TPGroup

log = logging.getLogger(__name__)

# Looks at a flag before a rank gives up on its peers: a look takes a few tenths of a microsecond.
_LOOKS_AT_START = 1 << 23  # seconds
_LOOKS = 1 << 28  # a minute or more: NCCL's bound is two
_NUM_CHECKED = 4  # messages back to back, so that the second comes before a slow peer has read the first
_NUM_TIMED = 8
_EPS = 1e-6  # of the norms that are compared
_REPLAYS = 11  # odd, and many: a rank whose host is held up for a while holds all others up

RUNNING, GAVE_UP, CLOSED = 0, 1, 2  # the word between kernels and host


class PeerMemory:
    """This rank's memory for messages and its view of the others'. Made by ``map_peers``; tests make it over shared CPU memory."""

    def __init__(self, rank: int, areas: Areas, own: Tensor, addresses: list[int], word: Tensor, unmap: Callable[[], None]) -> None:
        """``own``: uint8 [areas.nbytes]. ``addresses``: of all ranks' memory as this rank sees it. ``word``: int32 [1] that the host reads
        and writes while kernels do (pinned)."""
        self.rank, self.areas, self.word = rank, areas, word
        self._own, self._unmap, self._is_mapped = own, unmap, True
        self.table = torch.tensor([*addresses, word.data_ptr()], dtype=torch.int64).to(own.device)
        self.epochs = torch.zeros(len(OURS) + 1, PROGRAMS, dtype=torch.int32, device=own.device).unbind()  # the last: ll_norm's
        self.pdl = own.is_cuda and torch.cuda.get_device_capability(own.device)[0] >= 9
        word.fill_(RUNNING)

    def run(self, algorithm: str, x: Tensor, looks: int = _LOOKS) -> None:
        """Sum ``x`` in place over the ranks; all of them call it with the same size, in the same order. ``takes`` it first."""
        _launch(self, algorithm, x, looks)

    def takes(self, algorithm: str, x: Tensor) -> bool:
        num_bytes = x.numel() * x.element_size()
        unit = 4 if algorithm == LL else x.element_size()
        fits = 0 < num_bytes <= self.areas.limit(algorithm) and num_bytes % (unit * plan.ALIGNMENT) == 0
        return fits and x.element_size() in (2, 4) and x.is_contiguous() and x.data_ptr() % 16 == 0

    def compile(self, dtype: torch.dtype) -> None:
        """All kernels that a message of ``dtype`` may take, without running any."""
        for algorithm in OURS:
            for size in (self.areas.limit(algorithm) // dtype.itemsize, 2 * plan.ALIGNMENT):
                _launch(self, algorithm, torch.empty(size, dtype=dtype, device=self._own.device), 1, is_dry=True)

    def run_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, looks: int = _LOOKS) -> Tensor:
        """residual += the sum of ``x`` over the ranks, in place; returns its norm. All of them call it with the same number of rows, in the
        same order. ``takes_norm`` it first. ``x`` stays as it is."""
        out = torch.empty_like(residual)
        _launch_norm(self, x, residual, weight, out, eps, looks)
        return out

    def takes_norm(self, x: Tensor, residual: Tensor) -> bool:
        fits = x.dim() == 2 and 0 < x.shape[0] <= PROGRAMS and x.shape[1] == self.areas.norm_width and x.element_size() == 2
        same = residual.shape == x.shape and residual.dtype == x.dtype
        return fits and same and x.is_contiguous() and residual.is_contiguous() and x.data_ptr() % 16 == 0

    def compile_norm(self, dtype: torch.dtype) -> None:
        """As ``compile``, for ``run_norm``; and the norm that it is compared with, which runs."""
        x, residual, weight = torch.zeros(3, 1, self.areas.norm_width, dtype=dtype, device=self._own.device)
        _launch_norm(self, x, residual, weight, torch.empty_like(x), _EPS, 1, is_dry=True)
        fused.add_rms_norm(x, residual, weight[0], _EPS, self.pdl)

    @property
    def has_given_up(self) -> bool:
        return int(self.word[0]) == GAVE_UP

    def forgive(self) -> None:
        """Of what was given up on nothing is kept. Once no rank's kernel runs any more."""
        if self.has_given_up:
            self.word.fill_(RUNNING)

    def abort(self) -> None:
        """Kernels that wait for a peer stop waiting. From any thread; memory stays mapped, for kernels still write there."""
        self.word.fill_(CLOSED)

    def close(self) -> None:
        """Also unmap the peers' memory. Own memory lives as long as this object: peers may have it mapped. May be called twice."""
        self.abort()
        if self._is_mapped:
            self._is_mapped = False
            self._unmap()


def _launch(memory: PeerMemory, algorithm: str, x: Tensor, looks: int, is_dry: bool = False) -> None:
    from ksana_lab.layers import all_reduce_triton

    options: dict[str, Any] = {"RANK": memory.rank, "WORLD": memory.areas.world, "PDL": memory.pdl}
    item_bytes = x.element_size()
    if algorithm == LL:
        options["DTYPE"] = all_reduce_triton.TYPES[x.dtype]
        x, item_bytes = x.view(-1).view(torch.int32), 8  # each word with its epoch
    area, region = memory.areas.place(algorithm)
    shape = plan.launch(algorithm, x.numel(), memory.areas.world)
    kernel = all_reduce_triton.KERNELS[algorithm]
    args = (x, memory.table, memory.epochs[OURS.index(algorithm)], x.numel(), shape.share, area, region // item_bytes, looks)
    _start(kernel, shape.programs, args, {**options, "TILE": shape.tile, "num_warps": shape.num_warps}, is_dry)


def _launch_norm(
    memory: PeerMemory, x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, looks: int, is_dry: bool = False
) -> None:
    from ksana_lab.layers import all_reduce_triton

    rows, width = x.shape
    block, num_warps = plan.norm_launch(width)
    args = (
        x.view(torch.int32), residual, weight, out, memory.table, memory.epochs[-1], width, width // 2, eps,
        memory.areas.norm_area, memory.areas.norm_region // 8, looks,
    )  # fmt: skip
    options: dict[str, Any] = {
        "RANK": memory.rank, "WORLD": memory.areas.world, "PDL": memory.pdl, "DTYPE": all_reduce_triton.TYPES[x.dtype],
        "BLOCK": block, "num_warps": num_warps,
    }  # fmt: skip
    _start(all_reduce_triton.ll_norm, rows, args, options, is_dry)


def _start(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any], is_dry: bool) -> None:
    """``is_dry``: compile only."""
    if options["PDL"]:
        options = {**options, "launch_pdl": True}
    if is_dry:
        kernel.warmup(*args, grid=(programs,), **options)
    else:
        kernel[(programs,)](*args, **options)


class AllReduceBySize:
    """What a TPGroup asks before it turns to NCCL."""

    norm_rows = 0  # up to so many rows are summed and normalised at once

    def __init__(self, memory: PeerMemory, report: Report, dtype: torch.dtype) -> None:
        self.memory, self.report, self._dtype = memory, report, dtype

    def reduce(self, x: Tensor) -> bool:
        """Whether ``x`` was summed; the decision depends on its size, type and layout alone, which all ranks share."""
        algorithm = self.report.table.choose(x.numel() * x.element_size())
        if algorithm == NCCL or x.dtype != self._dtype or not self.memory.takes(algorithm, x):
            return False
        self.memory.run(algorithm, x)
        return True

    def reduce_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        """norm(residual + the sum of ``x``), the first of which takes the residual's place; None: nothing was done. Decided as above."""
        if x.shape[0] > self.norm_rows or x.dtype != self._dtype or not self.memory.takes_norm(x, residual):
            return None
        return self.memory.run_norm(x, residual, weight, eps)

    def check(self) -> None:
        """Raises KsanaLabError when a kernel has waited in vain: everything computed since is worthless."""
        if self.memory.has_given_up:
            raise KsanaLabError(f"tensor-parallel rank {self.memory.rank}: a peer did not come to an all-reduce; its sums are worthless")


# ---- start-up: every function here is called by all ranks together ---------------------------------------------------------------------


def connect(tp: TPGroup, max_bytes: int, dtype: torch.dtype, hidden_size: int = 0) -> AllReduceBySize | None:
    """Map, check, time, agree. ``max_bytes``: the largest message there will be. ``hidden_size``: of rows that are normalised once they
    are summed. None: NCCL for everything; the log has the reason."""
    memory, reason = map_peers(tp, max_bytes, plan.norm_width(hidden_size, dtype.itemsize))
    if memory is None:
        log.info("all-reduce is not chosen by size: %s", reason)
        return None
    report = None
    try:
        reason = _agree(tp, _complaint(lambda: memory.compile(dtype)))
        if reason is None:
            found: list[Report] = []
            reason = _agree(tp, _complaint(lambda: found.append(measure(tp, memory, dtype))))
            report = found[0] if reason is None else None
            reason = reason or (None if found[0].table.steps else "nothing else was right and faster")
    finally:
        if report is None or reason is not None:
            memory.close()
    if report is None or reason is not None:
        tp.exchange(b"")  # own memory goes after the others have let go of it
        log.info("all-reduce is not chosen by size: %s", reason)
        return None
    if tp.rank == 0:
        log.info("all-reduce of %d ranks by size: %s", tp.size, report.table.describe())
        for line in report.lines():
            log.info("all-reduce | %s", line)
    by_size = AllReduceBySize(memory, report, dtype)
    if hidden_size:
        by_size.norm_rows = fuse_norm(tp, by_size, dtype)
    return by_size


def map_peers(tp: TPGroup, max_bytes: int, norm_width: int = 0) -> tuple[PeerMemory | None, str | None]:
    """(this rank's view of all ranks' memory, None), or (None, the first reason why there is none)."""
    if tp.size not in plan.WORLD_SIZES:
        return None, f"{tp.size} ranks; the kernels are for {', '.join(map(str, plan.WORLD_SIZES))}"
    if tp.device.type != "cuda":
        return None, "the ranks are not on GPUs"
    device, areas = tp.device.index or 0, Areas.of(tp.size, max_bytes, norm_width)
    own: list[Tensor] = []
    offer = {"host": _host(), "pid": os.getpid(), "gpu": _uuid(device), "handle": "", "error": None}

    def allocate() -> None:
        own.append(cuda_driver.alloc_tensor(areas.nbytes, tp.device))
        offer["handle"] = cuda_driver.driver().export(own[0].data_ptr(), device).hex()

    offer["error"] = _complaint(allocate)
    offers = [json.loads(message) for message in tp.exchange(json.dumps(offer).encode())]
    reason = next((f"rank {rank}: {o['error']}" for rank, o in enumerate(offers) if o["error"]), None) or why_apart(offers)
    if reason is not None:
        return None, reason
    mapped: dict[int, int] = {}
    made: list[PeerMemory] = []

    def map_all() -> None:
        for rank, other in enumerate(offers):
            if rank != tp.rank:
                _require_nvlink(device, other["gpu"])
                mapped[rank] = cuda_driver.driver().open(bytes.fromhex(other["handle"]), device)
        word = torch.zeros(1, dtype=torch.int32).pin_memory()
        addresses = [own[0].data_ptr() if rank == tp.rank else mapped[rank] for rank in range(tp.size)]
        made.append(PeerMemory(tp.rank, areas, own[0], addresses, word, unmap))

    def unmap() -> None:
        torch.cuda.synchronize(device)  # no kernel of ours writes there any more; the closed word lets none wait
        for address in mapped.values():
            cuda_driver.driver().close(address, device)
        mapped.clear()

    reason = _agree(tp, _complaint(map_all))
    if reason is not None:
        unmap()
        tp.exchange(b"")  # own memory goes after the others have let go of it
        return None, reason
    return made[0], None


def why_apart(offers: list[dict[str, Any]]) -> str | None:
    """Why ranks cannot map each other's memory; None when they should."""
    if len({offer["host"] for offer in offers}) > 1:
        return "the ranks are on different hosts"
    if len({offer["pid"] for offer in offers}) < len(offers):
        return "two ranks live in one process"
    if len({offer["gpu"] for offer in offers}) < len(offers):
        return "two ranks share a GPU"
    return None


def measure(tp: TPGroup, memory: PeerMemory, dtype: torch.dtype) -> Report:
    """Check both algorithms against the expected sums, time what was right on every rank, and take rank 0's figures for all."""
    sizes = ladder(memory.areas.two_shot_limit)
    wrong: dict[str, list[int]] = {}
    for name in OURS:
        bad = [size for size in sizes if size <= memory.areas.limit(name) and not is_right(tp, memory, name, size, dtype)]
        if memory.has_given_up:
            bad = sizes
        wrong[name] = _of_any_rank(tp, bad)
        if wrong[name]:
            log.warning("rank %d: all-reduce %s gave wrong sums at %s bytes and is not used there", tp.rank, name, wrong[name])
    times: dict[int, dict[str, float]] = {}
    for size in sizes:
        x = _random(size, dtype, tp.device, seed=size)
        times[size] = {NCCL: _median_us(tp.all_reduce_nccl, x)}
        for name in OURS:
            if size <= memory.areas.limit(name) and not wrong[name]:  # wrong once is wrong
                times[size][name] = _median_us(lambda x, name=name: memory.run(name, x, _LOOKS_AT_START), x)  # type: ignore[misc]
    trusted = {size: {name: us for name, us in row.items() if name not in plan.STALLS} for size, row in times.items()}
    report = Report(tp.size, str(dtype).removeprefix("torch."), times, wrong, plan.fastest(trusted))
    agreed = Report.from_json(tp.exchange(report.to_json().encode())[0].decode())
    return agreed if _agree(tp, "a wait was in vain" if memory.has_given_up else None) is None else _without_ours(agreed)


def is_right(tp: TPGroup, memory: PeerMemory, name: str, size: int, dtype: torch.dtype) -> bool:
    """Messages back to back in a replayed graph, against the sum in rank order of what NCCL gathers, to the bit."""
    inputs = [_random(size, dtype, tp.device, seed=1000 * i + tp.rank) for i in range(_NUM_CHECKED)]
    expected = [sum_in_rank_order(tp.gather(x)) for x in inputs]

    def run() -> list[Tensor]:
        outputs = [x.clone() for x in inputs]
        for out in outputs:
            memory.run(name, out, _LOOKS_AT_START)
        return outputs

    return _gives(run, expected)


def fuse_norm(tp: TPGroup, by_size: AllReduceBySize, dtype: torch.dtype) -> int:
    """Rows up to which one kernel sums and normalises, the same on every rank. 0: none; the log has the reason."""
    memory = by_size.memory
    found: list[dict[int, tuple[float, float]]] = []
    reason = None if memory.areas.norm_width else "there is a kernel for 16 bits and few widths only"
    reason = reason or _agree(tp, _complaint(lambda: memory.compile_norm(dtype)))
    reason = reason or _agree(tp, _complaint(lambda: found.append(measure_norm(tp, by_size, dtype))))
    reason = reason or _agree(tp, "a wait was in vain" if memory.has_given_up else None)
    if reason is not None:
        memory.forgive()
        log.info("all-reduce and norm stay apart: %s", reason)
        return 0
    if tp.rank == 0:
        for line in plan.describe_norm(found[0]):
            log.info("all-reduce + norm | %s", line)
    return plan.fused_rows(found[0])


def measure_norm(tp: TPGroup, by_size: AllReduceBySize, dtype: torch.dtype) -> dict[int, tuple[float, float]]:
    """Rows -> microseconds (fused, apart), rank 0's. Raises KsanaLabError on all ranks when a result was wrong on one."""
    memory = by_size.memory
    bad = [rows for rows in NORM_ROWS if not is_norm_right(tp, memory, rows, dtype) or memory.has_given_up]
    if wrong := _of_any_rank(tp, bad):
        raise KsanaLabError(f"its results are WRONG at {', '.join(map(str, wrong))} rows")
    times = {}
    for rows in NORM_ROWS:
        x, residual, weight = _rows_to_norm(tp, memory, rows, dtype, seed=rows)

        def at_once(x: Tensor, residual: Tensor = residual, weight: Tensor = weight) -> None:
            memory.run_norm(x, residual, weight, _EPS, _LOOKS_AT_START)

        def apart(x: Tensor, residual: Tensor = residual, weight: Tensor = weight) -> None:
            if not by_size.reduce(x):
                tp.all_reduce_nccl(x)
            fused.add_rms_norm(x, residual, weight, _EPS, memory.pdl)

        times[rows] = (_median_us(at_once, x), _median_us(apart, x))
    agreed = json.loads(tp.exchange(json.dumps(list(times.items())).encode())[0])
    return {rows: (fused_us, apart_us) for rows, (fused_us, apart_us) in agreed}


def is_norm_right(tp: TPGroup, memory: PeerMemory, rows: int, dtype: torch.dtype) -> bool:
    """As ``is_right``, against the norm of the sum in rank order."""
    inputs = [_rows_to_norm(tp, memory, rows, dtype, seed=1000 * i) for i in range(_NUM_CHECKED)]
    expected = []
    for x, before, weight in inputs:
        after = before.clone()
        expected += [fused.add_rms_norm(sum_in_rank_order(tp.gather(x)), after, weight, _EPS, memory.pdl), after]

    def run() -> list[Tensor]:
        residuals = [before.clone() for _, before, _ in inputs]
        outputs = []
        for (x, _, weight), residual in zip(inputs, residuals, strict=True):
            outputs += [memory.run_norm(x, residual, weight, _EPS, _LOOKS_AT_START), residual]
        return outputs

    return _gives(run, expected)


def _gives(run: Callable[[], list[Tensor]], expected: list[Tensor]) -> bool:
    """Whether ``run`` does, to the bit, launched one by one and in a graph replayed twice."""
    good = all(map(torch.equal, run(), expected))
    graph, outputs = capture(run)
    for _ in range(2):
        for out in outputs:
            out.fill_(float("nan"))
        graph.replay()
        good = good and all(map(torch.equal, outputs, expected))
    return good


def sum_in_rank_order(gathered: Tensor) -> Tensor:
    """[ranks, …] -> […]: added in float32, rounded once, as the kernels do."""
    total = torch.zeros_like(gathered[0], dtype=torch.float32)
    for part in gathered:
        total += part
    return total.to(gathered.dtype)


def _without_ours(report: Report) -> Report:
    return Report(report.world, report.dtype, report.times_us, report.wrong, SizeTable())


def _of_any_rank(tp: TPGroup, mine: list[int]) -> list[int]:
    """What is in any rank's list, ascending, the same on every rank."""
    return sorted({item for message in tp.exchange(json.dumps(mine).encode()) for item in json.loads(message)})


def _agree(tp: TPGroup, complaint: str | None) -> str | None:
    """The first rank's complaint, the same on every rank; None when there is none."""
    for rank, message in enumerate(tp.exchange((complaint or "").encode()[:1000])):
        if message:
            return f"rank {rank}: {message.decode(errors='replace')}"
    return None


def _complaint(work: Callable[[], None]) -> str | None:
    """What went wrong, as text: the other ranks must hear of it before anybody stops."""
    try:
        work()
    except Exception as error:  # whatever it is (Triton has a tree of its own)
        return f"{type(error).__name__}: {error}"
    return None


def _median_us(reduce: Callable[[Tensor], object], source: Tensor) -> float:
    """Microseconds a call in a captured graph, median over replays; small numbers, so that repeated sums stay finite."""
    x = source * 1e-4
    reduce(x)

    def run() -> None:
        for _ in range(_NUM_TIMED):
            reduce(x)

    graph, _ = capture(run)
    times = []
    for _ in range(_REPLAYS + 1):
        x.copy_(source).mul_(1e-4)
        times.append(replay_us(graph) / _NUM_TIMED)
    return round(statistics.median(times[1:]), 2)


def _random(num_bytes: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(num_bytes // dtype.itemsize, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _rows_to_norm(tp: TPGroup, memory: PeerMemory, rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(this rank's term [rows, width], residual [rows, width], weight [width]), the last two the same on every rank."""
    width = memory.areas.norm_width
    num_bytes = width * dtype.itemsize
    x = _random(rows * num_bytes, dtype, tp.device, seed + 1 + tp.rank).view(rows, width)
    return x, _random(rows * num_bytes, dtype, tp.device, seed + 101).view(rows, width), _random(num_bytes, dtype, tp.device, seed + 102)


def _host() -> str:
    """The same text for two processes only if they are on one host, in one boot."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else os.uname().nodename


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _require_nvlink(device: int, peer_uuid: str) -> None:
    """Raises TransferError: the kernels need the peer's memory within reach, and native atomics on it, which PCIe has not."""
    for other in range(torch.cuda.device_count()):
        if _uuid(other) == peer_uuid:
            if not torch.cuda.can_device_access_peer(device, other):
                raise TransferError(f"GPU {device} has no peer access to GPU {other}")
            if not cuda_driver.driver().has_peer_atomics(device, other):
                raise TransferError(f"GPU {device} reaches GPU {other} without native atomics (PCIe)")
            return
    raise TransferError(f"GPU {device} does not see the peer's GPU {peer_uuid}")
