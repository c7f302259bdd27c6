"""All-reduce chosen by the size of the message: own kernels over the GPUs' shared memory (all_reduce_triton.py), NCCL for the rest.

Nothing is believed: when the ranks start they map each other's memory, compare every algorithm's sums with the expected ones to the bit,
time it against NCCL, and agree on one table, rank 0's. Where a step fails on any rank, all stay with NCCL, and the log says why.

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
from ksana_lab.layers.all_reduce_plan import LL, NCCL, OURS, PROGRAMS, Areas, Report, SizeTable, ladder
from ksana_lab.layers.replay import capture, replay_us

if TYPE_CHECKING:
    from ksana_lab.layers.tp import TPGroup

log = logging.getLogger(__name__)

# Looks at a flag before a rank gives up on its peers: a look takes a few tenths of a microsecond.
_LOOKS_AT_START = 1 << 23  # seconds
_LOOKS = 1 << 28  # a minute or more: NCCL's bound is two
_NUM_CHECKED = 4  # messages back to back, so that the second comes before a slow peer has read the first
_NUM_TIMED = 8
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
        self.epochs = torch.zeros(len(OURS), PROGRAMS, dtype=torch.int32, device=own.device).unbind()
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

    @property
    def has_given_up(self) -> bool:
        return int(self.word[0]) == GAVE_UP

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
    options |= {"TILE": shape.tile, "num_warps": shape.num_warps, **({"launch_pdl": True} if memory.pdl else {})}
    if is_dry:
        kernel.warmup(*args, grid=(shape.programs,), **options)
    else:
        kernel[(shape.programs,)](*args, **options)


class AllReduceBySize:
    """What a TPGroup asks before it turns to NCCL."""

    def __init__(self, memory: PeerMemory, report: Report, dtype: torch.dtype) -> None:
        self.memory, self.report, self._dtype = memory, report, dtype

    def reduce(self, x: Tensor) -> bool:
        """Whether ``x`` was summed; the decision depends on its size, type and layout alone, which all ranks share."""
        algorithm = self.report.table.choose(x.numel() * x.element_size())
        if algorithm == NCCL or x.dtype != self._dtype or not self.memory.takes(algorithm, x):
            return False
        self.memory.run(algorithm, x)
        return True

    def check(self) -> None:
        """Raises KsanaLabError when a kernel has waited in vain: everything computed since is worthless."""
        if self.memory.has_given_up:
            raise KsanaLabError(f"tensor-parallel rank {self.memory.rank}: a peer did not come to an all-reduce; its sums are worthless")


# ---- start-up: every function here is called by all ranks together ---------------------------------------------------------------------


def connect(tp: TPGroup, max_bytes: int, dtype: torch.dtype) -> AllReduceBySize | None:
    """Map, check, time, agree. ``max_bytes``: the largest message there will be. None: NCCL for everything; the log has the reason."""
    memory, reason = map_peers(tp, max_bytes)
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
    return AllReduceBySize(memory, report, dtype)


def map_peers(tp: TPGroup, max_bytes: int) -> tuple[PeerMemory | None, str | None]:
    """(this rank's view of all ranks' memory, None), or (None, the first reason why there is none)."""
    if tp.size not in plan.WORLD_SIZES:
        return None, f"{tp.size} ranks; the kernels are for {', '.join(map(str, plan.WORLD_SIZES))}"
    if tp.device.type != "cuda":
        return None, "the ranks are not on GPUs"
    device, areas = tp.device.index or 0, Areas.of(tp.size, max_bytes)
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
        wrong[name] = sorted({size for message in tp.exchange(json.dumps(bad).encode()) for size in json.loads(message)})
        if wrong[name]:
            log.warning("rank %d: all-reduce %s gave wrong sums at %s bytes and is not used there", tp.rank, name, wrong[name])
    times: dict[int, dict[str, float]] = {}
    for size in sizes:
        x = _random(size, dtype, tp.device, seed=size)
        times[size] = {NCCL: _median_us(tp.all_reduce_nccl, x)}
        for name in OURS:
            if size <= memory.areas.limit(name) and not wrong[name]:  # wrong once is wrong
                times[size][name] = _median_us(lambda x, name=name: memory.run(name, x, _LOOKS_AT_START), x)  # type: ignore[misc]
    report = Report(tp.size, str(dtype).removeprefix("torch."), times, wrong, plan.fastest(times))
    agreed = Report.from_json(tp.exchange(report.to_json().encode())[0].decode())
    return agreed if _agree(tp, "a wait was in vain" if memory.has_given_up else None) is None else _without_ours(agreed)


def is_right(tp: TPGroup, memory: PeerMemory, name: str, size: int, dtype: torch.dtype) -> bool:
    """Messages back to back in a replayed graph, against the sum in rank order of what NCCL gathers, to the bit."""
    inputs = [_random(size, dtype, tp.device, seed=1000 * i + tp.rank) for i in range(_NUM_CHECKED)]
    expected = [sum_in_rank_order(tp.gather(x)) for x in inputs]
    outputs = [torch.empty_like(x) for x in inputs]

    def run() -> None:
        for x, out in zip(inputs, outputs, strict=True):
            out.copy_(x)
        for out in outputs:
            memory.run(name, out, _LOOKS_AT_START)

    run()
    good = all(torch.equal(out, want) for out, want in zip(outputs, expected, strict=True))
    graph, _ = capture(run)
    for _ in range(2):
        for out in outputs:
            out.fill_(float("nan"))
        graph.replay()
        good = good and all(torch.equal(out, want) for out, want in zip(outputs, expected, strict=True))
    return good


def sum_in_rank_order(gathered: Tensor) -> Tensor:
    """[ranks, …] -> […]: added in float32, rounded once, as the kernels do."""
    total = torch.zeros_like(gathered[0], dtype=torch.float32)
    for part in gathered:
        total += part
    return total.to(gathered.dtype)


def _without_ours(report: Report) -> Report:
    return Report(report.world, report.dtype, report.times_us, report.wrong, SizeTable())


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
