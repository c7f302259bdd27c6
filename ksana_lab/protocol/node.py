"""The router's HTTP protocol, field for field as KsanaLLM's router and nodes speak it (python/simple_router), and what we add.

Additions are optional fields that the reference ignores, and one route, UnregisterNode, that it answers with 404: a node that lacks them is
served as the reference would serve it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ksana_lab.types import NodeAddr

# Headers the router stamps on both requests of a pair.
COMM_KEY_HEADER = "kv-comm-group-key"  # "<P inference_addr>__<D inference_addr>"
COMM_REQUEST_ID_HEADER = "kv-comm-request-id"  # decimal, 1 .. 2**31 - 1 (the reference narrows it to int32)
REQUEST_ID_HEADER = "x-request-id"
# Ours. Router -> both: "the first token of a stream is forwarded from P; D, do not repeat it"; and the stream's creation time.
# D -> router, as a response header: "understood". Without that answer the router forwards D's stream whole, as the reference does.
FIRST_TOKEN_HEADER = "x-ksana-lab-first-token"
FIRST_TOKEN_FROM_PREFILL = "prefill"
CREATED_HEADER = "x-ksana-lab-created"


def comm_key(prefill_addr: NodeAddr | str, decode_addr: NodeAddr | str) -> str:
    return f"{prefill_addr}__{decode_addr}"


def split_comm_key(key: str) -> tuple[str, str]:
    """(prefill inference_addr, decode inference_addr). Raises ValueError without ``__``."""
    prefill, sep, decode = key.partition("__")
    if not sep or not prefill or not decode:
        raise ValueError(f"comm_key {key!r} is not <prefill>__<decode>")
    return prefill, decode


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


# What a router keeps has to fit the columns of its database. A bounded length also refuses half a surrogate pair, which no column holds.
_Count = Annotated[int, Field(lt=2**31)]
_Address = Annotated[str, Field(max_length=127), AfterValidator(_without_nul)]  # two of them make a comm key
_NodeId = Annotated[str, Field(max_length=64), AfterValidator(_without_nul)]
_Text = Annotated[str, Field(max_length=256), AfterValidator(_without_nul)]
_Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # GET /nodes is JSON, which has neither
_CommId = Annotated[str, Field(max_length=4096), AfterValidator(_without_nul)]  # the reference's: 172


class Device(BaseModel):
    model_config = ConfigDict(extra="ignore")
    device_id: int
    device_ip: str = ""
    device_type: str | None = None


class RegisterNode(BaseModel):
    """POST /RegisterNode -> 201."""

    model_config = ConfigDict(extra="ignore")
    inference_addr: _Address
    cluster_name: _Text | None = None
    group_role: Literal["prefill", "decode", "mixed"]  # "mixed" is ours: an aggregated node behind the same router
    node_rank: _Count = Field(ge=0)
    coordinator_addr: _Address | None = None
    world_size: _Count | None = Field(None, gt=0)  # devices in the group
    devices: list[Device] | None = None
    hostname: _Text | None = None
    job_id: _Text | None = None
    start_time: _Text | None = None
    comm_id: str | None = None
    node_id: _NodeId | None = None
    heartbeat_interval_s: float | None = Field(None, gt=0, allow_inf_nan=False)  # ours
    incarnation: _Text | None = None  # ours: new for every start of a node process; falls back to job_id


class UnregisterNode(BaseModel):
    """Ours. POST /UnregisterNode -> 200, of a node that ends in order. A router without this route learns it from the node's silence."""

    model_config = ConfigDict(extra="ignore")
    node_id: str


class RegisterNodeAnswer(BaseModel):
    model_config = ConfigDict(extra="ignore")
    node_id: str
    is_online: bool
    last_heartbeat: str


class NodeLoad(BaseModel):
    """Ours: what a node says of itself with each heartbeat."""

    model_config = ConfigDict(extra="ignore")
    num_running: int = Field(0, ge=0)
    num_waiting: int = Field(0, ge=0)
    num_free_blocks: int = Field(0, ge=0)
    num_blocks: int = Field(0, ge=0)
    # A prefill node with a pair: what its slowest KV link showed when it was connected.
    link_bytes_per_s: _Figure | None = None
    link_round_trip_s: _Figure | None = None
    link_share_of_expected: _Figure | None = None  # of what the hardware should give


class Heartbeat(BaseModel):
    """POST /Heartbeat -> 200, or 404 for a node_id the router does not know: the node must register again."""

    model_config = ConfigDict(extra="ignore")
    node_id: str
    connected_comm_keys: list[str] | None = None  # ours: pairs whose peer this node has shaken hands with; None = node does not say
    load: NodeLoad | None = None  # ours
    is_serving: bool | None = None  # ours; False: the API process lives but its engine does not answer; None = node does not say


class HeartbeatAnswer(BaseModel):
    model_config = ConfigDict(extra="ignore")
    node_id: str
    is_online: bool
    group_ready: bool
    coordinator_addr: str | None = None
    node_role: str | None = None
    timestamp: str | None = None
    comm_group_to_address: dict[str, list[tuple[int, int, str]]] = {}
    comm_group_to_id: dict[str, str] = {}


class RegisterCommId(BaseModel):
    """POST /RegisterCommId -> 200; only prefill rank 0, only for its own pairs (else 403)."""

    model_config = ConfigDict(extra="ignore")
    node_id: str
    comm_key: _Text
    comm_id: _CommId
