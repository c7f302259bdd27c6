"""Who a request is: the id, creation time and P/D pair that its headers name. Knows headers, not bodies."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ksana_lab.errors import InvalidRequest
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.protocol.node import (
    COMM_KEY_HEADER,
    COMM_REQUEST_ID_HEADER,
    CREATED_HEADER,
    FIRST_TOKEN_FROM_PREFILL,
    FIRST_TOKEN_HEADER,
    REQUEST_ID_HEADER,
    split_comm_key,
)
from ksana_lab.types import NodeAddr, Role

_GOOD_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_COMM_REQUEST_ID = 2**31 - 1


class Leg(Enum):
    """Which part of a request this node serves. A P or D node without pair headers serves the whole, as a mixed node would."""

    WHOLE = "whole"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class RequestContext:
    """``splits_first_token``: the router forwards token 1 from P, so P ends its stream after it and D leaves it out."""

    request_id: str
    created: int  # unix seconds
    arrival_ns: int
    leg: Leg = Leg.WHOLE
    comm_key: str = ""
    comm_request_id: int = 0
    splits_first_token: bool = False

    @property
    def is_prefill(self) -> bool:
        return self.leg is Leg.PREFILL

    @property
    def hides_first_token(self) -> bool:
        return self.splits_first_token and self.leg is Leg.DECODE

    def transfer_key(self, index: int) -> TransferKey | None:
        return None if self.leg is Leg.WHOLE else TransferKey(self.comm_key, self.comm_request_id, index)

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(REQUEST_ID_HEADER.encode(), self.request_id.encode())]
        if self.hides_first_token:
            headers.append((FIRST_TOKEN_HEADER.encode(), FIRST_TOKEN_FROM_PREFILL.encode()))
        return headers


def read_context(headers: Iterable[tuple[bytes, bytes]], role: Role, inference_addr: NodeAddr | None) -> RequestContext:
    """From raw ASGI headers. Raises InvalidRequest for pair headers that are malformed or name another node: to wait for a peer that
    was never told would hang."""
    named = {name.decode("latin-1").lower(): value.decode("latin-1").strip() for name, value in headers}
    request_id = named.get(REQUEST_ID_HEADER, "")
    created = named.get(CREATED_HEADER, "")
    comm_key, comm_request_id = _read_pair(named, role, inference_addr)
    leg = Leg(role.value) if comm_key else Leg.WHOLE
    return RequestContext(
        request_id=request_id if _GOOD_REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex,
        created=int(created) if created.isdecimal() and len(created) <= 12 else int(time.time()),
        arrival_ns=time.monotonic_ns(),
        leg=leg,
        comm_key=comm_key,
        comm_request_id=comm_request_id,
        splits_first_token=leg is not Leg.WHOLE and named.get(FIRST_TOKEN_HEADER) == FIRST_TOKEN_FROM_PREFILL,
    )


def _read_pair(named: dict[str, str], role: Role, inference_addr: NodeAddr | None) -> tuple[str, int]:
    """(comm_key, comm_request_id), or ("", 0) for a request that this node serves alone."""
    key, number = named.get(COMM_KEY_HEADER, ""), named.get(COMM_REQUEST_ID_HEADER, "")
    if not role.is_disaggregated or not (key or number):
        return "", 0
    if not (key and number):
        raise InvalidRequest(f"headers {COMM_KEY_HEADER} and {COMM_REQUEST_ID_HEADER} come together or not at all", COMM_KEY_HEADER)
    if not number.isdecimal() or not 1 <= int(number) <= _MAX_COMM_REQUEST_ID:
        raise InvalidRequest(f"{COMM_REQUEST_ID_HEADER} must be in 1..{_MAX_COMM_REQUEST_ID}, got {number!r}", COMM_REQUEST_ID_HEADER)
    try:
        prefill, decode = split_comm_key(key)
    except ValueError as error:
        raise InvalidRequest(f"header {COMM_KEY_HEADER}: {error}", COMM_KEY_HEADER) from error
    own = prefill if role is Role.PREFILL else decode
    if inference_addr is not None and own != str(inference_addr):
        raise InvalidRequest(
            f"{COMM_KEY_HEADER} {key!r} names {own} as the {role.value} node; this one is {inference_addr}", COMM_KEY_HEADER
        )
    return key, int(number)
