"""KV in eight bits for the way only: packed on P into a stage, carried by any backend, unpacked on D before the piece counts as arrived.

A *unit* is what lies contiguous in one cell on both sides: K and V of consecutive heads, tokens [first, last) of one block and one layer.
Each of its groups, K or V of one head, gets one scale s = max|x| / 448 (the largest float8_e4m3fn); what travels is

    [num_groups float32 scales, filled up to 16 bytes][x / s of all groups as float8_e4m3fn, filled up to 16 bytes]

and it is never longer than the unit itself. So P writes it over the beginning of the unit's own place in D's cache, and D expands it
there: D needs no memory of its own for what is on the way, no credit has to be given for such memory, and the windows and quarantines
that guard a request's blocks guard this, too. Knows layouts and offsets; no requests."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import TransferError
from ksana_lab.protocol.transfer import Packed
from ksana_lab.transfer.base import Ticket
from ksana_lab.transfer.plan import Copies, HeadSlice, token_parts, within_cell

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
STAGE_BYTES = 4 << 20
DEVICE_STAGE_BYTES = 16 << 20  # on a GPU, where launches cost more than memory
_ALIGNMENT = 16  # bytes: what every backend can move
_STALL_S = 30.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Form:
    """The shape of one unit: ``num_groups`` consecutive heads, tokens [first, last) of a block."""

    layout: KVLayout
    first: int
    last: int
    num_groups: int

    @property
    def group_size(self) -> int:
        """Numbers in one group."""
        return (self.last - self.first) * self.layout.head_dim

    @property
    def unit_bytes(self) -> int:
        """In the cache."""
        return self.num_groups * self.group_size * self.layout.itemsize

    @property
    def header_bytes(self) -> int:
        return _aligned(4 * self.num_groups)

    @property
    def wire_bytes(self) -> int:
        return self.header_bytes + _aligned(self.num_groups * self.group_size)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def check(layout: KVLayout) -> None:
    """Raises TransferError for a cache that cannot be packed."""
    if layout.itemsize < 2:
        raise TransferError(f"the KV cache is {layout.dtype} already: leave ksana_lab.wire_dtype out")
    smallest = Form(layout, 0, 1, 1)
    if smallest.wire_bytes > smallest.unit_bytes:
        raise TransferError(
            f"ksana_lab.wire_dtype: fp8_e4m3 packs one head of one token into {smallest.wire_bytes} bytes, and in the cache it has "
            f"{smallest.unit_bytes} ({layout.head_dim} x {layout.dtype}): leave it out for this model"
        )


def wire_bytes(src: KVLayout, dst: KVLayout, slices: Sequence[HeadSlice], start: int, end: int, num_layers: int) -> int:
    """Of tokens [start, end) of ``num_layers`` layers, scales and filling included."""
    total = 0
    for first, last, blocks in token_parts(start, end, src.block_size):
        runs = np.concatenate([within_cell(src, dst, s, first, last) for s in slices])
        total += len(blocks) * num_layers * sum(_form(src, first, last, nbytes).wire_bytes for nbytes in runs[:, 2].tolist())
    return total


def _form(layout: KVLayout, first: int, last: int, nbytes: int) -> Form:
    return Form(layout, first, last, nbytes // ((last - first) * layout.head_dim * layout.itemsize))


# ---- P ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Units of one form that fit into a stage together."""

    form: Form
    sources: np.ndarray  # int64 [n]: where each unit lies in P's cache
    copies: Copies  # int64 [n, 3]: offset in the stage, offset in D's cache, bytes

    @property
    def wire_bytes(self) -> int:
        return len(self.sources) * self.form.wire_bytes

    def describe(self, shift: int) -> Packed:
        """For the notice: where the units lie in D's cache, each moved by ``shift`` bytes."""
        return Packed(self.form.first, self.form.last, self.form.num_groups, (self.copies[:, 1] + shift).astype("<i8").tobytes())


def batches(layout: KVLayout, cells: Sequence[tuple[int, int, Copies]], most: int = 1 << 20, stage_bytes: int | None = None) -> list[Batch]:
    """What ``plan.cells`` found, in batches of at most ``stage_bytes`` (None: STAGE_BYTES) and at most ``most`` units."""
    out = []
    for first, last, runs in cells:
        for nbytes in np.unique(runs[:, 2]).tolist():
            form = _form(layout, first, last, nbytes)
            same = runs[runs[:, 2] == nbytes]
            room = max(1, min(most, (stage_bytes or STAGE_BYTES) // form.wire_bytes))
            for begin in range(0, len(same), room):
                part = same[begin : begin + room]
                places = np.arange(len(part), dtype=np.int64) * form.wire_bytes
                out.append(Batch(form, part[:, 0].copy(), np.column_stack((places, part[:, 1], np.full(len(part), form.wire_bytes)))))
    return out


class Packer:
    """Two stages in turn: one is filled while the other is carried. For one thread at a time."""

    def __init__(self, cache: torch.Tensor, kernels: Kernels | None = None) -> None:
        self._cache, self._kernels = cache, kernels or TORCH
        self._stages: list[torch.Tensor | None] = [None, None]
        self._tickets: list[Ticket | None] = [None, None]
        self._turn = 0
        self._stream = torch.cuda.Stream(device=cache.device, priority=-1) if cache.is_cuda else None

    def pack(self, batch: Batch, shift: int) -> tuple[torch.Tensor, Any]:
        """(stage, event): ``batch``, each source moved by ``shift`` bytes, packed when ``event`` is over (None = now). The bytes of the
        cache must exist. Hand the ticket of the stage's copy to ``lend``. Raises TransferError when an earlier copy does not end."""
        self._turn = 1 - self._turn
        ticket, self._tickets[self._turn] = self._tickets[self._turn], None
        if ticket is not None and not ticket.wait(_STALL_S):
            raise TransferError(f"an earlier piece was not carried within {_STALL_S:g} s")
        with _on(self._stream), torch.inference_mode():
            stage = self._stages[self._turn]
            if stage is None or len(stage) < batch.wire_bytes:
                nbytes = max(stage_bytes(self._cache.device), batch.wire_bytes)
                stage = self._stages[self._turn] = torch.empty(nbytes, dtype=torch.uint8, device=self._cache.device)
            target = stage[: batch.wire_bytes].view(len(batch.sources), batch.form.wire_bytes)
            self._kernels.quantise(self._cache, batch.form, batch.sources + shift, target)
            if self._stream is None:
                return stage, None
            event = torch.cuda.Event(blocking=True)
            event.record()
            return stage, event

    def lend(self, ticket: Ticket) -> None:
        """The stage filled last is being read until ``ticket`` is done."""
        self._tickets[self._turn] = ticket


def quantise(cache: torch.Tensor, form: Form, sources: np.ndarray, target: torch.Tensor) -> None:
    """Pack the units at ``sources`` (offsets in ``cache``) into ``target``, uint8 [n, wire_bytes]."""
    num, groups, size = len(sources), form.num_groups, form.group_size
    found = _pages(cache, form.layout)[_page_index(form, sources, groups, cache.device), form.first : form.last]
    values = found.to(torch.float32).view(num, groups, size)  # a copy
    low, high = values.aminmax(dim=-1)
    largest = torch.full_like(high, LARGEST)  # on CUDA, torch divides by a number by multiplying: a last bit off
    scales = torch.maximum(-low, high).div_(largest).clamp_min_(_SMALLEST_SCALE)
    packed = values.div_(scales[..., None]).clamp_(-LARGEST, LARGEST).to(FP8)
    header, end = form.header_bytes, form.header_bytes + groups * size
    target[:, : 4 * groups] = scales.view(torch.uint8).view(num, 4 * groups)
    target[:, 4 * groups : header] = 0
    target[:, header:end] = packed.view(torch.uint8).view(num, groups * size)
    target[:, end:] = 0


# ---- D ----------------------------------------------------------------------------------------------------------------


def read(layout: KVLayout, packed: Packed) -> tuple[Form, np.ndarray]:
    """(form, targets: int64 offsets) of a notice. Raises TransferError for units that this cache does not have."""
    first, last, num_groups = packed.first, packed.last, packed.num_groups
    is_whole = last - first == layout.block_size
    if not (first < last <= layout.block_size and 0 < num_groups <= (2 * layout.num_kv_heads if is_whole else 1)):
        raise TransferError(f"{num_groups} heads of tokens [{first}, {last}) of a block are no packed unit of this cache")
    if len(packed.targets) % 8:
        raise TransferError("malformed notice: odd targets")
    form, targets = Form(layout, first, last, num_groups), np.frombuffer(packed.targets, "<i8").astype(np.int64)
    start = targets - first * layout.head_dim * layout.itemsize
    fits = (start >= 0) & (start <= layout.total_bytes - num_groups * layout.head_bytes) & (start % layout.head_bytes == 0)
    if not fits.all():
        raise TransferError("malformed notice: a packed unit outside the cache, or between its heads")
    return form, targets


def expand(cache: torch.Tensor, form: Form, targets: np.ndarray) -> None:
    """Turn the packed units at ``targets`` (offsets in ``cache``) into what they stand for, in their places. On a GPU on the current
    stream."""
    layout = form.layout
    num, groups, size = len(targets), form.num_groups, form.group_size
    before = form.first * layout.head_dim * layout.itemsize
    num_pages = -(-(before + form.wire_bytes) // layout.head_bytes)
    pages = cache.view(-1, layout.head_bytes)[_page_index(form, targets, num_pages, cache.device)]  # a copy
    packed = pages.view(num, num_pages * layout.head_bytes)[:, before : before + form.wire_bytes]
    scales = packed[:, : 4 * groups].contiguous().view(torch.float32)
    header = form.header_bytes
    numbers = packed[:, header : header + groups * size].contiguous().view(FP8).to(torch.float32).view(num, groups, size)
    values = (numbers * scales[..., None]).to(getattr(torch, layout.dtype)).view(num * groups, form.last - form.first, layout.head_dim)
    _pages(cache, layout)[_page_index(form, targets, groups, cache.device), form.first : form.last] = values


def steps(form: Form, targets: np.ndarray, nbytes: int | None = None) -> Iterator[np.ndarray]:
    """``targets`` in parts of at most ``nbytes`` (None: STAGE_BYTES): who wants the blocks back waits for one of them only."""
    room = max(1, (nbytes or STAGE_BYTES) // form.wire_bytes)
    for begin in range(0, len(targets), room):
        yield targets[begin : begin + room]


class Unpacker:
    """D's end of packing. Threads may share it as long as they expand different units."""

    def __init__(self, cache: torch.Tensor, kernels: Kernels | None = None) -> None:
        self._cache, self._kernels = cache, kernels or TORCH
        self._stream = torch.cuda.Stream(device=cache.device, priority=-1) if cache.is_cuda else None

    def expand(self, form: Form, targets: np.ndarray) -> None:
        """The units are in the cache when this returns."""
        with _on(self._stream), torch.inference_mode():
            self._kernels.expand(self._cache, form, targets)
        if self._stream is not None:
            self._stream.synchronize()


# ---- both -------------------------------------------------------------------------------------------------------------


def stage_bytes(device: torch.device) -> int:
    return DEVICE_STAGE_BYTES if device.type == "cuda" else STAGE_BYTES


def _pages(cache: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """[total heads, block_size, head_dim]: K or V of one head in one block and layer is one page."""
    return cache.view(getattr(torch, layout.dtype)).view(-1, layout.block_size, layout.head_dim)


def _page_index(form: Form, offsets: np.ndarray, count: int, device: torch.device) -> torch.Tensor:
    """int64 [n * count]: ``count`` pages from each unit's first on."""
    first = offsets // form.layout.head_bytes
    return torch.from_numpy((first[:, None] + np.arange(count)).reshape(-1)).to(device)


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
        return
    try:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield
    except torch.OutOfMemoryError as error:
        raise TransferError("no GPU memory is left to pack KV in: raise block_manager.reserved_device_memory_ratio") from error


@dataclass(frozen=True)
class Kernels:
    """The arithmetic of both ends; what it does is said at ``quantise`` and ``expand``."""

    name: str
    quantise: Callable[[torch.Tensor, Form, np.ndarray, torch.Tensor], None]
    expand: Callable[[torch.Tensor, Form, np.ndarray], None]


TORCH = Kernels("torch", quantise, expand)


def choose(layout: KVLayout, device: torch.device) -> Kernels:
    """What packs KV of this layout on ``device``, proved there: on a GPU kernels of our own, where they run and are right, else torch's
    operations. Raises TransferError when the layout cannot be packed, or nothing does it right."""
    check(layout)
    if device.type == "cuda" and layout.head_dim % 8 == 0:
        try:
            from ksana_lab.transfer import packing_triton

            kernels = Kernels("triton", packing_triton.quantise, packing_triton.expand)
            prove(layout, device, kernels)
            return kernels
        except Exception as error:  # no compiler, a GPU without this type, or a wrong result
            log.warning("packing KV with torch's operations, which is slower: %s", str(error).partition("\n")[0])
    prove(layout, device, TORCH)
    return TORCH


def prove(layout: KVLayout, device: torch.device, kernels: Kernels = TORCH) -> None:
    """Pack and unpack a few random heads on ``device``. Raises TransferError when they do not come back as eight bits allow."""
    small = KVLayout(2, 2, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.dtype)
    dice = torch.Generator().manual_seed(0)
    numbers = torch.randn(small.total_bytes // small.itemsize, generator=dice).to(getattr(torch, small.dtype))
    cache = numbers.view(torch.uint8).clone().to(device)
    whole = Form(small, 0, small.block_size, 2 * small.num_kv_heads)
    one = Form(small, small.block_size - 1, small.block_size, 1)
    last = small.head_bytes - one.unit_bytes  # of a head's bytes: its last token
    for form, units in ((whole, [small.cell_offset(1, 0), small.cell_offset(0, 1)]), (one, [small.cell_offset(0, 0) + last])):
        places = np.array(units, np.int64)
        target = torch.empty((len(places), form.wire_bytes), dtype=torch.uint8, device=device)
        kernels.quantise(cache, form, places, target)
        for offset, unit in zip(units, target, strict=True):
            cache[offset : offset + form.wire_bytes] = unit
        kernels.expand(cache, form, places)
    back, numbers = cache.cpu().view(numbers.dtype).float(), numbers.float()
    # Three bits behind the point: half a step is 1/16 of the number, or the smallest step there is.
    if not ((back - numbers).abs() <= numbers.abs() * 0.07 + numbers.abs().max() / LARGEST / 512).all():
        raise TransferError(f"KV packed into FP8 by {kernels.name} does not come back right on {device}: leave ksana_lab.wire_dtype out")
