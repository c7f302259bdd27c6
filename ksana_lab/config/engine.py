"""What one node is told, in the field's words, frozen. KsanaLLM's spelling is known to ``ksana_yaml.py`` alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ksana_lab.types import NodeAddr, Role


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ModelOptions(Frozen):
    model_dir: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the checkpoint's on a GPU, float32 on a CPU
    max_model_len: int | None = Field(None, ge=1)  # prompt + output tokens; None = the checkpoint's own limit
    quant_method: Literal["auto", "fp8_e4m3"] = "auto"


class ParallelOptions(Frozen):
    tensor_parallel_size: int = Field(1, ge=1)


class CacheOptions(Frozen):
    block_size: int = Field(16, ge=1)  # tokens
    num_blocks: int | None = Field(None, ge=2)  # None: what memory allows
    enable_prefix_caching: bool = False
    dtype: Literal["auto", "fp8_e4m3"] = "auto"  # auto: the model's
    reserved_memory_ratio: float = Field(0.05, ge=0.0, lt=1.0)  # of the device, left untouched
    device_memory_ratio: float = Field(-1.0, le=1.0)  # of the device, for KV; < 0 = all that is left
    host_memory_factor: float = Field(0.0, ge=0.0)  # host blocks / device blocks, for swapping


class SchedulerOptions(Frozen):
    max_num_batched_tokens: int = Field(4096, ge=1)  # per step
    max_num_seqs: int = Field(128, ge=1)  # running at once
    max_num_waiting: int = Field(1200, ge=1)  # queue limit; beyond it QueueFull (429)
    waiting_timeout_s: float = Field(600.0, gt=0)  # from arrival to first token, and for a decode node to its KV's arrival
    prefill_chunk_tokens: int = Field(0, ge=0)  # cap per step and sequence; 0 = no cap but max_num_batched_tokens
    prefill_step_tokens: int | None = Field(None, ge=0)  # a step takes more than one prompt up to here; 0 = no such bound; None = by role
    preemption_mode: Literal["swap", "recompute"] = "recompute"  # swap: to cache.host_memory_factor's blocks, recompute when they are full
    admission_spare_blocks: float = Field(1.0, ge=0)  # blocks that stay free for each running sequence when one is admitted
    swap_in_spare_blocks: float = Field(1.0, ge=0)  # the same when one is swapped in
    max_num_pretransfer_seqs: int = Field(64, ge=0)  # decode: sequences whose KV may arrive beyond max_num_seqs


class LinkOptions(Frozen):
    """An emulated link; None = as fast as the hardware. ``shared``: all pairs of this node share the bandwidth."""

    bandwidth_gbps: float | None = Field(None, gt=0)
    latency_us: float = Field(0.0, ge=0)
    shared: bool = False


UNPACKED = ("nixl",)  # transfer backends that cannot carry KV in another dtype than the caches'


class ConnectorOptions(Frozen):
    role: Role = Role.MIXED
    router_addr: NodeAddr | None = None
    inference_addr: NodeAddr | None = None  # where the router reaches this node's HTTP server
    coordinator_addr: NodeAddr | None = None  # an IP of this host; the control socket binds it
    cluster_name: str = ""
    backend: Literal["tcp", "shm", "nccl", "gloo", "cuda_ipc", "nixl", "auto"] = (
        "auto"  # auto: on one host cuda_ipc (GPUs), else shm; else tcp
    )
    heartbeat_interval_s: float = Field(5.0, gt=0)
    connect_timeout_s: float = Field(1800.0, gt=0)  # bound on bringing up a pair
    lease_s: float = Field(60.0, gt=0)  # how long P keeps a finished prompt's blocks for a D that has not heard of it; D waits so for its P
    transfer_mode: Literal["bulk", "chunk", "layer", "auto"] = "layer"
    layers_per_chunk: int = Field(1, ge=1)  # layer mode: layers sent together
    bulk_below_tokens: int | None = Field(None, ge=0)  # shorter prompts go in bulk in every mode; None = 512 under auto, 0 else
    transfer_batch: int = Field(1048576, ge=1)  # most block copies in one backend call
    num_send_threads: int = Field(4, ge=1)
    checksum: bool = False  # CRC-32 per piece, verified on D
    wire_dtype: Literal["auto", "fp8_e4m3"] = "auto"  # of KV on its way, equal on both nodes; auto = the cache's
    link: LinkOptions = LinkOptions()


class RuntimeOptions(Frozen):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_ids: tuple[int, ...] = ()  # () = the first tensor_parallel_size visible GPUs
    enable_cuda_graph: bool = True
    prefill_graph_tokens: int = Field(1024, ge=0, lt=2048)  # prompt chunks up to here are replayed, too; 0 = none
    all_reduce: Literal["by_size", "nccl"] = "by_size"  # by_size: measured at start-up, if SELECT_ALL_REDUCE_BY_SIZE is set
    few_rows_linear: bool = True  # products of a decode step by own kernels, where they prove right and fast at start-up
    num_threads: int = Field(0, ge=0)  # torch CPU threads per rank; 0 = cores / ranks on this host
    seed: int = 0  # of requests that bring none
    trace_dir: str | None = None  # event log (JSONL) of every process goes here; None = off


class TokenizerOptions(Frozen):
    tokenizer_dir: str | None = None  # None = model_dir
    add_special_tokens: bool = True
    skip_special_tokens: bool = True


class EngineConfig(Frozen):
    """One node. Built by ``ksana_yaml.load`` or by hand; never changed afterwards (``model_copy(update=…)`` makes another)."""

    model: ModelOptions
    parallel: ParallelOptions = ParallelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    connector: ConnectorOptions = ConnectorOptions()
    runtime: RuntimeOptions = RuntimeOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
