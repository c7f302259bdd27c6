"""Control messages of KV transfer: between a prefill node and a decode node, and between an engine and its own ranks.

A frame is one version byte and one msgpack-encoded, tagged struct. Everything is length- and range-checked while it is decoded; what does
not fit raises ``BadMessage``. Nothing is unpickled. Bulk bytes (the KV itself) never travel here."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ksana_lab.protocol.engine import TransferKey
from ksana_lab.types import TokenLogprob

VERSION = 1
MAX_MESSAGE_BYTES = 8 << 20

Text = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Id = Annotated[int, Meta(ge=0, lt=2**63 - 1)]  # sessions and windows: random or counted, 0 = none
Hash = Annotated[bytes, Meta(max_length=8)]
Blocks = Annotated[list[Count], Meta(max_length=1 << 20)]


def hash_prompt(token_ids: Sequence[int]) -> bytes:
    """8 bytes that tell two prompts of one length apart. Not against intent: both come from nodes of one operator."""
    return hashlib.blake2b(array("q", token_ids), digest_size=8).digest()


class BadMessage(ValueError):
    """A frame that is no message of this protocol version."""


class Shape(msgspec.Struct, frozen=True):
    """A node's KV cache as its peer must know it, and how its KV travels. All but ``order``, ``num_blocks`` and ``tp_size`` must be equal
    on both sides."""

    dtype: Text
    num_layers: Annotated[int, Meta(ge=1, le=4096)]
    num_kv_heads: Annotated[int, Meta(ge=1, le=65536)]  # of the model, not of a rank
    head_dim: Annotated[int, Meta(ge=1, le=65536)]
    block_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_blocks: Count
    order: Text
    tp_size: Annotated[int, Meta(ge=1, le=4096)]
    wire_dtype: Text = "auto"  # of KV on its way; auto = dtype


class Endpoint(msgspec.Struct):
    """Where one decode rank's cache is reached, by backend name. The dicts are the backends' own."""

    rank: Count
    host_id: Text
    backends: Annotated[dict[Text, dict[str, Any]], Meta(max_length=16)]


# ---- P <-> D: a session -----------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag=True):
    """D -> P, first on a new connection."""

    comm_key: Text
    comm_id: Text
    incarnation: Text  # new for every start of the engine process
    shape: Shape
    endpoints: Annotated[list[Endpoint], Meta(max_length=4096)]
    checksum: bool = False  # D wants every piece checked; P may want it, too


class Welcome(msgspec.Struct, tag=True):
    """P -> D: accepted; every later message carries ``session``. P's ranks connect to D's now."""

    comm_key: Text
    session: Id
    incarnation: Text
    shape: Shape


class Refuse(msgspec.Struct, tag=True):
    """Either: no session (any more). ``retry``: asking again later may help without anybody changing a configuration."""

    comm_key: Text
    session: Id
    reason: Text
    retry: bool


class Connected(msgspec.Struct, tag=True):
    """P -> D: every P rank reaches every D rank it feeds."""

    session: Id


class Ping(msgspec.Struct, tag=True):
    session: Id
    sent_ns: int = 0  # on the sender's monotonic clock


class Pong(msgspec.Struct, tag=True):
    session: Id
    ping_ns: int = 0  # ``sent_ns`` of the ping that this answers
    now_ns: int = 0  # on the answering node's monotonic clock
    clock_domain: Text = ""  # which clock that is


class Bye(msgspec.Struct, tag=True):
    """Either: this side ends the session."""

    session: Id
    reason: Text


# ---- P <-> D: a request -----------------------------------------------------------------------------------------------


class Announce(msgspec.Struct, tag=True):
    """D -> P: where the KV of ``key`` goes. ``window`` is D's number for this right to write; it ends with the request."""

    session: Id
    key: TransferKey
    window: Id
    blocks: Blocks  # of every D rank alike
    num_tokens: Count
    num_cached_tokens: Count  # whole blocks that D has already; not to be sent
    prompt_hash: Hash = b""  # ``hash_prompt`` of the ids that D has; b"" = not said


class Begun(msgspec.Struct, tag=True):
    """P -> D, for a prompt that D has not announced: P has blocks for it and will finish it by itself, or has given it up already (the
    announcement is then answered by ``Failed``). Either way D need not fear to wait for it in vain."""

    session: Id
    key: TransferKey


class Queued(msgspec.Struct, tag=True):
    """D -> P, the answer to ``Begun``: D has the request and will announce it when it has room, or cancel it."""

    session: Id
    key: TransferKey


class FirstToken(msgspec.Struct, tag=True):
    """P -> D: what the prompt's last logits gave."""

    session: Id
    key: TransferKey
    window: Id
    token_id: Count
    logprob: TokenLogprob | None = None


class Failed(msgspec.Struct, tag=True):
    """P -> D: the KV will never be complete. P may still be writing until ``CancelDone``."""

    session: Id
    key: TransferKey
    window: Id
    reason: Text


class Cancel(msgspec.Struct, tag=True):
    """D -> P: not wanted any more; stop writing and say so. ``window`` 0: it was never announced."""

    session: Id
    key: TransferKey
    window: Id
    reason: Text


class CancelDone(msgspec.Struct, tag=True):
    """P -> D: no rank of P writes into ``window`` now or later."""

    session: Id
    key: TransferKey
    window: Id


ToPrefill = Hello | Queued | Announce | Cancel | Ping | Bye
ToDecode = Welcome | Refuse | Connected | Begun | FirstToken | Failed | CancelDone | Pong | Bye


# ---- engine -> its ranks ----------------------------------------------------------------------------------------------


class ConnectPeer(msgspec.Struct, tag=True):
    """P: connect to the ranks of D that this rank feeds, in the background; answer ``PeerConnected`` or ``PeerLost``."""

    session: Id
    peer: Text  # D's name for logs and events
    shape: Shape
    endpoints: list[Endpoint]
    checksum: bool
    timeout_s: float


class ClosePeer(msgspec.Struct, tag=True):
    """Both: the session is over. P: stop writing, close the links. D: refuse its writers."""

    session: Id


class Target(msgspec.Struct, tag=True):
    """P: an announcement; what is computed of ``key`` may go."""

    key: TransferKey
    session: Id
    window: Id
    blocks: Blocks
    num_tokens: Count
    num_cached_tokens: Count


class Expect(msgspec.Struct, tag=True):
    """D: open ``window`` for ``key``; answer ``Armed``, later ``RankReceived``."""

    key: TransferKey
    session: Id
    window: Id
    peer: Text
    num_tokens: Count
    num_cached_tokens: Count
    peer_tp_size: Count
    num_kv_heads: Count  # of the model


class Drop(msgspec.Struct, tag=True):
    """Stop touching the blocks of ``key``; answer ``Dropped`` when that is certain. P: every attempt up to ``serial``; D: ``window``.

    ``is_writer_stopped``: D's peer has confirmed that it writes no more."""

    key: TransferKey
    serial: Id = 0
    window: Id = 0
    is_writer_stopped: bool = False


# ---- a rank -> its engine ---------------------------------------------------------------------------------------------


class PeerConnected(msgspec.Struct, tag=True):
    rank: Count
    session: Id


class PeerLost(msgspec.Struct, tag=True):
    rank: Count
    session: Id
    reason: Text


class Armed(msgspec.Struct, tag=True):
    rank: Count
    key: TransferKey
    window: Id


class RankSent(msgspec.Struct, tag=True):
    """P: every byte this rank owes was acknowledged."""

    rank: Count
    key: TransferKey
    serial: Id  # as in SendStep


class RankReceived(msgspec.Struct, tag=True):
    """D: every byte this rank expects is here and verified."""

    rank: Count
    key: TransferKey
    window: Id


class RankFailed(msgspec.Struct, tag=True):
    """The transfer cannot complete on this rank; a ``Drop`` is expected."""

    rank: Count
    key: TransferKey
    window: Id
    reason: Text


class Dropped(msgspec.Struct, tag=True):
    rank: Count
    key: TransferKey
    serial: Id
    window: Id


class RankStats(msgspec.Struct, tag=True):
    rank: Count
    counters: dict[str, float]


ToRank = ConnectPeer | ClosePeer | Target | Expect | Drop
FromRank = PeerConnected | PeerLost | Armed | RankSent | RankReceived | RankFailed | Dropped | RankStats


# ---- a notice: rides behind the bytes, from a P rank to a D rank --------------------------------------------------------


class Packed(msgspec.Struct, array_like=True):
    """Units of one form (transfer/packing.py) that lie packed in the receiver's cache."""

    first: Count  # tokens [first, last) of a block
    last: Count
    num_groups: Count
    targets: bytes  # little-endian int64 offsets in the receiver's cache


class Notice(msgspec.Struct, array_like=True):
    """A rectangle of one prompt's KV is in place: tokens [start, end) of layers [first_layer, first_layer + num_layers)."""

    key: TransferKey
    window: Id
    serial: Id
    attempt: Count
    rank: Count  # of the sender
    start: Count
    end: Count
    first_layer: Count
    num_layers: Count
    nbytes: Id  # in the caches
    num_copies: Count
    chunk: Count  # which prefill chunk of the prompt
    ready_ns: int  # sender's clock
    crc: Annotated[int, Meta(ge=0, lt=2**32)] | None = None  # CRC-32 of the bytes, in the order of ``spans``
    spans: bytes = b""  # with crc: little-endian int64 pairs (offset in the receiver's cache, bytes); empty when packed
    wire_bytes: Id = 0  # on their way; 0 = nbytes
    packed: list[Packed] = []  # to be expanded before the piece counts; the crc is of the packed bytes


# ---- coding -----------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_PREFIX = bytes([VERSION])


def encode(message: msgspec.Struct) -> bytes:
    """Raises BadMessage above MAX_MESSAGE_BYTES."""
    data = _PREFIX + _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"{type(message).__name__} takes {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return data


def clip(text: str) -> str:
    """A reason that fits into ``Text``."""
    return text if len(text) <= 1000 else text[:1000] + "…"


class Decoder:
    """Decodes one direction's union."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    def decode(self, data: bytes | memoryview) -> Any:
        """Raises BadMessage for another version, an oversized frame, an unknown tag, or a field out of range."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise BadMessage(f"frame of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
        if len(data) < 2 or data[0] != VERSION:
            raise BadMessage(f"protocol version {data[0] if len(data) else 'none'}; this side speaks {VERSION}")
        try:
            return self._decoder.decode(data[1:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage(str(error)) from error
