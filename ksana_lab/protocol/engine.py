"""Messages between a node's API process and its engine process, msgpack over zmq. Nothing here is pickled.

The API process binds, the engine connects (ipc). API -> engine: ``ToEngine`` (tagged union). Engine -> API: ``FromEngine``.
Times are ``time.monotonic_ns()`` of the writing host; the two processes share the host, so they compare."""

from __future__ import annotations

import msgspec

from ksana_lab.types import FinishReason, SamplingParams, TokenLogprob


class TransferKey(msgspec.Struct, frozen=True, array_like=True):
    """Names one sequence's KV transfer on both sides. ``index`` tells the ``n`` samples of one request apart."""

    comm_key: str  # "<P inference_addr>__<D inference_addr>"
    comm_request_id: int  # from the router
    index: int = 0

    def __str__(self) -> str:
        return f"{self.comm_request_id}.{self.index}"


# ---- API -> engine ---------------------------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, tag=True):
    """One sequence to run. The API process has already expanded ``n`` and checked lengths against ``EngineReady``."""

    request_id: str  # unique within this engine, e.g. "<id>:<index>"
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_ns: int
    eos_token_ids: tuple[int, ...] = ()
    transfer: TransferKey | None = None  # None on a mixed node, and on P or D for a request that bypasses disaggregation


class AbortRequest(msgspec.Struct, tag=True):
    request_id: str
    reason: str = "client disconnected"


class DeclineRequest(msgspec.Struct, tag=True):
    """This node does not take its part of a pair's request, and never will: its peer is told. Nothing runs, nobody is answered."""

    transfer: TransferKey
    reason: str


class PeerUpdate(msgspec.Struct, tag=True):
    """What the router's last heartbeat answer said of one pair this node belongs to. The whole set is sent every time it changes."""

    class Pair(msgspec.Struct):
        comm_key: str
        comm_id: str
        addresses: list[tuple[int, int, str]]  # (node_rank, device_id, coordinator_addr), prefill's first

    pairs: list[Pair]


class GetStatus(msgspec.Struct, tag=True):
    """Ask for one ``EngineStatus`` now."""

    token: int


class Profile(msgspec.Struct, tag=True):
    """Start or stop a torch.profiler window (``/start_profile``, ``/stop_profile``)."""

    start: bool


class Shutdown(msgspec.Struct, tag=True):
    pass


ToEngine = AddRequest | AbortRequest | DeclineRequest | PeerUpdate | GetStatus | Profile | Shutdown


# ---- engine -> API ---------------------------------------------------------------------------------------------------


class EngineReady(msgspec.Struct, tag=True):
    """The engine has loaded its model and sized its cache. Sent once, before anything else."""

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str
    devices: list[tuple[int, str]]  # (device_id, device_type) per TP rank, for RegisterNode
    max_num_seqs: int


class SequenceUpdate(msgspec.Struct, array_like=True):
    """News of one sequence after one step. ``finish`` set: the last one for this request_id."""

    request_id: str
    new_token_ids: list[int]
    finish: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that ended it
    logprobs: list[TokenLogprob] | None = None  # one per new token, if asked for
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    error_type: str | None = None  # with finish ABORT/ERROR: a key of errors.REQUEST_ERRORS
    error: str | None = None
    # Phases, sent with the first token and with the finish (0 = not reached); monotonic ns.
    scheduled_ns: int = 0  # first step that ran any of it, or blocks announced (decode node)
    prefill_end_ns: int = 0
    first_token_ns: int = 0
    transfer_start_ns: int = 0
    transfer_end_ns: int = 0
    num_preemptions: int = 0


class StepUpdates(msgspec.Struct, tag=True):
    """All the news of one step."""

    updates: list[SequenceUpdate]
    num_waiting: int
    num_running: int


class EngineStatus(msgspec.Struct, tag=True):
    """Counters for /metrics and /health; sent as the answer to GetStatus, and every second while anything runs."""

    token: int  # GetStatus.token, or -1 when unasked
    num_waiting: int
    num_running: int
    num_waiting_kv: int  # decode: blocks allocated, KV on its way
    num_held: int  # prefill: finished, blocks kept for a decode node
    num_blocks: int
    num_free_blocks: int  # includes cached, evictable ones
    num_leaked_blocks: int  # self-check: total - free - used - held; anything but 0 is a bug and is logged
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    connected: list[str]  # comm keys whose two sides are connected
    transfer: dict[str, float]  # counters of the connector, by metric name
    now_ns: int
    num_swapped: int = 0  # of those waiting: preempted, KV in host blocks
    num_swap_outs: int = 0
    num_swap_ins: int = 0
    num_host_blocks: int = 0
    num_free_host_blocks: int = 0


class EngineFailed(msgspec.Struct, tag=True):
    """The engine cannot go on; the process ends after this."""

    error: str


FromEngine = EngineReady | StepUpdates | EngineStatus | EngineFailed
