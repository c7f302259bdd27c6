"""When which layers of a prompt go: the modes, and what ``auto`` makes of measured computing and link speed. Pure arithmetic.

A schedule is the layers after which a piece ends, ascending; the last is the number of layers. Equal groups are the plain way. But what
stays exposed is the last piece alone, as long as each piece is over before the next begins; so on a link that is faster than computing,
pieces may grow towards the front, each as large as what is sent while the next one's layers are computed. A fast link needs two, and
leaves as little exposed as one piece a layer does, which is many copies, and a link that is awake all the time (docs/LOG.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

Mode = Literal["bulk", "chunk", "layer"]
Schedule = tuple[int, ...]

# ``auto``: below this many tokens the handling of pieces costs more than it hides (the crossovers reported for layer-wise transfer
# lie between 256 and 512 tokens); above it a piece should be large enough to be carried at the wire's speed.
AUTO_BULK_TOKENS = 512
AUTO_PIECE_BYTES = 1 << 20
_LAST_PIECES = (1, 2, 4, 8, 16)  # layers in the last piece
_HANDLING = 0.1  # of computing: what handling its pieces may take, since the same processor feeds the device
# What pieces beside a prefill cost it, whatever is in them: a link that wakes for them takes power from the SMs. Of the computing, with the
# link awake all the time, and how many pieces keep it so; fitted to 2, 4, 9 and 36 pieces of 2,048 to 16,384 tokens on H200s (docs/LOG.md).
_AWAKE, _PIECES_AWAKE = 0.016, 4
_IN_TIME = 0.7  # of the computing time at hand is counted on


@dataclass(frozen=True)
class Speeds:
    """What was measured of a link and of the prefill that it serves."""

    bandwidth: float  # bytes/s, an emulated link's included
    piece_s: float  # handling of one piece beside its bytes
    layer_s: float  # computing one layer of this prompt


def equal(num_layers: int, group: int) -> Schedule:
    """Pieces of ``group`` layers; the last may be shorter."""
    return (*range(group, num_layers, group), num_layers)


def growing(num_layers: int, last: int, layer_bytes: int, speeds: Speeds) -> Schedule:
    """``last`` layers in the last piece, and from the back in each one before it as many as can be sent while the next one's layers are
    computed; where that is fewer, because computing is faster than the link, as many as in the next."""
    sizes = [last]
    while (left := num_layers - sum(sizes)) > 0:
        if len(sizes) > 1 and left <= sizes[-1] // 4:  # not worth a piece: _IN_TIME has room for it
            sizes[-1] += left
            break
        sent = (_IN_TIME * sizes[-1] * speeds.layer_s - speeds.piece_s) * speeds.bandwidth / max(1, layer_bytes)
        sizes.append(min(left, max(int(sent), sizes[-1])))
    return tuple(accumulate(reversed(sizes)))


def exposed_s(layer_bytes: int, schedule: Schedule, speeds: Speeds) -> float:
    """What a prompt's transfer takes after its last layer is computed: the largest backlog, over all pieces j, of the pieces from j on
    less the computing after j. One piece is bulk."""
    backlog = 0.0
    for first, end in pairwise((0, *schedule)):
        computing = (end - first) * speeds.layer_s if first else 0.0  # while this piece was computed, earlier ones were sent
        backlog = max(0.0, backlog - computing) + (end - first) * layer_bytes / speeds.bandwidth + speeds.piece_s
    return backlog


def beside_s(num_pieces: int, computing_s: float) -> float:
    """By how much sending pieces lengthens a prefill of ``computing_s``; bulk, one piece behind it, by nothing."""
    return _AWAKE * computing_s * (1 - math.exp(-(num_pieces - 1) / _PIECES_AWAKE))


def bulk_minimum(option: str, bulk_below: int | None) -> int:
    """Tokens below which a prompt goes in bulk; None: AUTO_BULK_TOKENS under ``auto``, no minimum else."""
    return (AUTO_BULK_TOKENS if option == "auto" else 0) if bulk_below is None else bulk_below


def choose_mode(
    option: str,
    layers_per_chunk: int,
    num_tokens: int,
    layer_bytes: int,
    *,
    num_layers: int = 1,
    speeds: Speeds | None = None,
    bulk_below: int | None = None,
) -> tuple[Mode, Schedule]:
    """(mode, schedule) for a prompt of which ``num_tokens`` are to be sent, ``layer_bytes`` per layer.

    Shorter than ``bulk_minimum`` goes in bulk in every mode. ``layer`` sends equal groups of ``layers_per_chunk``. ``auto`` takes, of bulk
    and the growing schedules whose pieces can be handled in 10% of the computing, the one that makes the prompt late by least, exposed
    time and ``beside_s`` together; without measurements, groups of at least AUTO_PIECE_BYTES."""
    bulk: tuple[Mode, Schedule] = ("bulk", (num_layers,))
    if num_tokens < bulk_minimum(option, bulk_below) or option == "bulk":
        return bulk
    if option != "auto":
        return ("layer", equal(num_layers, layers_per_chunk)) if option == "layer" else ("chunk", (num_layers,))
    if speeds is None:
        return "layer", equal(num_layers, max(layers_per_chunk, -(-AUTO_PIECE_BYTES // max(1, layer_bytes))))
    tails = sorted({max(layers_per_chunk, last) for last in _LAST_PIECES})
    schedules = [growing(num_layers, last, layer_bytes, speeds) for last in tails if last <= num_layers // 2]
    computing_s = num_layers * speeds.layer_s
    schedules = [(num_layers,), *(schedule for schedule in schedules if len(schedule) * speeds.piece_s <= _HANDLING * computing_s)]
    best = min(schedules, key=lambda schedule: exposed_s(layer_bytes, schedule, speeds) + beside_s(len(schedule), computing_s))
    return bulk if len(best) == 1 else ("layer", best)
