"""One tensor-parallel rank: its device, its share of the model, its KV cache, its end of KV transfer. The same in rank 0's process, which
is the engine's, and in the others'. Knows nothing of the scheduler."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from ksana_lab.attention.base import default_backend
from ksana_lab.config.engine import EngineConfig
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.engine.commands import StepCommand
from ksana_lab.engine.host_blocks import HostBlocks
from ksana_lab.engine.kv_cache import allocate_plain, cpu_num_blocks, cuda_num_blocks, make_layer_views
from ksana_lab.engine.layer_timer import LayerTimer
from ksana_lab.engine.model_runner import ModelRunner, PendingTokens
from ksana_lab.errors import ConfigError
from ksana_lab.layers.start_up import choose_kernels
from ksana_lab.layers.tp import TPGroup
from ksana_lab.models.config import ModelConfig
from ksana_lab.models.key_range import fit_keys
from ksana_lab.models.registry import load_model
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer.base import WorkerConnector
from ksana_lab.types import Role

log = logging.getLogger(__name__)

_MIN_PREFILL_GRAPH_TOKENS = 64
_WORKSPACE_MARGIN = 1.1  # fragmentation, and kernels that allocate more at other shapes
_MIN_WORKSPACE_BYTES = 256 << 20  # cuBLAS, NCCL, graphs
# Enqueuing a step takes some tens of milliseconds; more, where the device's queue is full of the step before, which may take half a second.
_SLOW_LAUNCH_S, _STALL_S = 0.25, 0.6
_BY_SIZE_VARIABLE = "SELECT_ALL_REDUCE_BY_SIZE"  # its presence counts, as in the reference


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Prompt + output tokens of one sequence: the configured bound, but not more than the model has positions for."""
    wanted = config.model.max_model_len
    if wanted is not None and wanted > model.max_position_embeddings:
        log.warning("max_token_len %d is cut to the %d positions the model was made for", wanted, model.max_position_embeddings)
    return min(wanted or model.max_position_embeddings, model.max_position_embeddings)


def resolve_device(config: EngineConfig, rank: int) -> torch.device:
    """Raises ConfigError when the GPU is not there."""
    runtime, size = config.runtime, config.parallel.tensor_parallel_size
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device is cuda, but torch sees no GPU here; set device: cpu, or check the driver and CUDA_VISIBLE_DEVICES"
        )
    ids = runtime.device_ids or tuple(range(size))
    if len(ids) < size or max(ids[:size]) >= torch.cuda.device_count():
        raise ConfigError(
            f"{size} GPUs are asked for (device_ids {list(ids)}), but {torch.cuda.device_count()} are visible; lower tensor_para_size"
        )
    return torch.device("cuda", ids[rank])


def resolve_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """``auto``: the checkpoint's on a GPU, float32 on a CPU."""
    automatic = model.dtype if device.type == "cuda" else "float32"
    return getattr(torch, automatic if config.model.dtype == "auto" else config.model.dtype)


def open_connector(
    config: EngineConfig, rank: int, recorder: NullRecorder, wake: Callable[[], None], ipc_dir: str
) -> WorkerConnector | None:
    """This rank's end of KV transfer; None on a mixed node."""
    if not config.connector.role.is_disaggregated:
        return None
    from ksana_lab.transfer.worker_side import make_worker_connector

    size = config.parallel.tensor_parallel_size
    return make_worker_connector(config=config, rank=rank, tp_size=size, recorder=recorder, wake=wake, ipc_dir=ipc_dir)


class Worker:
    """First ``max_num_blocks``, then ``set_cache``, then ``execute`` for every step. ``wake`` is called, from any thread, when ``check``
    would raise."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        *,
        init_method: str = "",
        ipc_dir: str = "",
        recorder: NullRecorder | None = None,
        wake: Callable[[], None] = lambda: None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """``while_waiting``: as in ``TPGroup.connect``."""
        self.config = config
        self.rank = rank
        self.device = resolve_device(config, rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.model_config = ModelConfig.from_dir(config.model.model_dir)
        self.dtype = resolve_dtype(config, self.model_config, self.device)
        self.max_model_len = max_model_len(config, self.model_config)
        _refuse_unsupported(config, self.device)
        self.model_config.check_tensor_parallel(config.parallel.tensor_parallel_size)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        size = config.parallel.tensor_parallel_size
        self.tp = TPGroup.connect(rank, size, init_method, backend=backend, while_waiting=while_waiting)
        self.connector: WorkerConnector | None = None
        self._num_retries = 0  # of the allocator, when last looked at; at first when the engine was ready
        self.host_blocks: HostBlocks | None = None
        try:
            if _BY_SIZE_VARIABLE in os.environ and config.runtime.all_reduce == "by_size":
                self.tp.choose_all_reduce_by_size(self._largest_message(), self.dtype, self.model_config.hidden_size)
            model = load_model(
                self.model_config, config.model.model_dir, dtype=self.dtype, device=self.device, tp=self.tp,
                quant_method=config.model.quant_method,
            )  # fmt: skip
            if config.cache.dtype == "fp8_e4m3":
                fit_keys(model)
            self.runner = ModelRunner(
                model,
                max_num_seqs=config.scheduler.max_num_seqs,
                max_model_len=self.max_model_len,
                block_size=config.cache.block_size,
                backend=default_backend(self.device),
                device=self.device,
                is_sampling_rank=rank == 0,
            )
            recorder = recorder or NullRecorder()
            if recorder.enabled:
                self.runner.layer_timer = LayerTimer(recorder, self.device, rank, self.model_config.num_layers)
            self.connector = open_connector(config, rank, recorder, wake, ipc_dir)
        except BaseException:
            self.close()
            raise

    def layout(self, num_blocks: int) -> KVLayout:
        model = self.model_config
        return KVLayout(
            num_blocks=num_blocks,
            num_layers=model.num_layers,
            num_kv_heads=model.num_local_kv_heads(self.tp.size),
            block_size=self.config.cache.block_size,
            head_dim=model.head_dim,
            dtype="float8_e4m3fn" if self.config.cache.dtype == "fp8_e4m3" else str(self.dtype).removeprefix("torch."),
        )

    def max_num_blocks(self) -> int:
        """What this rank can hold. On CUDA has attention plan, then runs the largest step, to see what it needs besides; all ranks must
        call it together."""
        options, scheduler, block_bytes = self.config.cache, self.config.scheduler, self.layout(1).block_bytes
        if self.device.type == "cpu":
            return cpu_num_blocks(options, block_bytes, scheduler.max_num_seqs, self.max_model_len)
        self._plan_attention()
        return cuda_num_blocks(options, block_bytes, self.device, self._measure_workspace())

    def set_cache(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Allocate ``num_blocks`` blocks, and ``num_host_blocks`` to swap them to; the same numbers on every rank."""
        self.kv_layout = self.layout(num_blocks)
        allocate = allocate_plain if self.connector is None else self.connector.allocate  # type: ignore[attr-defined]
        memory = allocate(self.kv_layout.total_bytes, self.device)
        if num_host_blocks:
            self.host_blocks = HostBlocks(memory, self.kv_layout, num_host_blocks, self.tp)
        if self.connector is not None:
            self.connector.register(memory, self.kv_layout)
        self.runner.set_cache(make_layer_views(memory, self.kv_layout), self.connector, self.host_blocks)
        self.runner.peers_write = self.config.connector.role is Role.DECODE
        if self.device.type == "cuda":
            self._warm_up()
            self._num_retries = self._count_retries()
        log.info("rank %d on %s: %d KV blocks of %d tokens, %d MiB", self.rank, self.device, num_blocks, self.kv_layout.block_size,
                 self.kv_layout.total_bytes >> 20)  # fmt: skip

    def _warm_up(self) -> None:
        """Nothing is compiled or captured once requests come."""
        self.runner.compile_sampling()
        if not self.config.runtime.enable_cuda_graph:
            return
        if torch.cuda.get_allocator_backend() == "cudaMallocAsync":
            log.warning("no CUDA graphs: Triton kernels cannot be captured under PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync; unset it "
                        "in this process, or start the node with ksana_lab.launch, which does")  # fmt: skip
            return
        if self.config.runtime.few_rows_linear:  # only in graphs: step by step the host is the limit, and their launches cost it more
            choose_kernels(self.runner.model, self.tp)
        self.runner.capture_graphs()
        self._capture_prefill()

    def _capture_prefill(self) -> None:
        wanted = self.config.runtime.prefill_graph_tokens
        most = min(wanted, self.config.scheduler.max_num_batched_tokens, self.max_model_len)
        if most >= _MIN_PREFILL_GRAPH_TOKENS and most <= self.kv_layout.num_blocks // 2 * self.kv_layout.block_size:
            self.runner.capture_prefill_graphs(most)
        elif wanted:
            log.info("prefill is not replayed: graphs take %d tokens a step or more, and half of the cache (here %d tokens, %d blocks)",
                     _MIN_PREFILL_GRAPH_TOKENS, most, self.kv_layout.num_blocks)  # fmt: skip

    def _plan_attention(self) -> None:
        """Before the largest step is measured: what is chosen here decides what that step needs."""
        model, scheduler, layout = self.model_config, self.config.scheduler, self.layout(1)
        max_tokens = min(scheduler.max_num_batched_tokens, self.max_model_len, scheduler.prefill_chunk_tokens or self.max_model_len)
        self.runner.backend.warm_up(
            model.num_local_heads(self.tp.size), layout.num_kv_heads, model.head_dim, max_tokens, self.dtype, self.device,
            max_seq_len=self.max_model_len, block_size=layout.block_size, cache_dtype=getattr(torch, layout.dtype),
        )  # fmt: skip

    def execute(self, command: StepCommand) -> PendingTokens:
        begin_s = time.monotonic()
        pending = self.runner.execute(command)
        if self.device.type == "cuda" and (seconds := time.monotonic() - begin_s) > _SLOW_LAUNCH_S:
            num_retries = self._count_retries()
            _explain_slow_launch(command, seconds, num_retries - self._num_retries)
            self._num_retries = num_retries
        return pending

    def _count_retries(self) -> int:
        return torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)

    def check(self) -> None:
        """Raises KsanaLabError when this rank's connector has died (TransferError), or a peer stayed away. Never blocks."""
        self.tp.check()
        if self.connector is not None:
            self.connector.poll()

    def endpoint(self) -> dict[str, Any]:
        """Where peers reach this rank's cache; {} on a mixed node."""
        return {} if self.connector is None else self.connector.endpoint()  # type: ignore[attr-defined]

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def close(self) -> None:
        """May be called twice."""
        if self.connector is not None:
            self.connector.close()
            self.connector = None
        runner, self.runner = getattr(self, "runner", None), None  # type: ignore[assignment]
        if runner is not None:
            runner.close()
        self.tp.close()
        if self.host_blocks is not None:  # waits for the device; leaving the group has ended its waits for other ranks
            self.host_blocks.close()
            self.host_blocks = None

    def _largest_message(self) -> int:
        """Bytes that ranks sum at once: a step's hidden states."""
        scheduler = self.config.scheduler
        num_tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        return num_tokens * self.model_config.hidden_size * self.dtype.itemsize

    def _measure_workspace(self) -> int:
        """Bytes that the largest step allocates beside weights and cache."""
        gc.collect()
        torch.cuda.empty_cache()
        layout = self.layout(1)
        kv_layers = make_layer_views(allocate_plain(layout.total_bytes, self.device), layout)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        scheduler = self.config.scheduler
        num_tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        num_seqs = min(scheduler.max_num_seqs, num_tokens)
        self.runner.run_largest_step(num_tokens, num_seqs, kv_layers)
        chunk = self.runner.backend.peak_chunk()
        if b"yes" in self.tp.exchange(b"no" if chunk is None else b"yes"):  # ranks may have chosen differently, and a step is for all
            max_len, context = chunk or (None, 0)
            self.runner.run_largest_step(num_tokens, num_seqs, kv_layers, max_len=max_len, context=context)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kv_layers
        gc.collect()
        torch.cuda.empty_cache()
        return max(_MIN_WORKSPACE_BYTES, int(peak * _WORKSPACE_MARGIN))


def _refuse_unsupported(config: EngineConfig, device: torch.device) -> None:
    """What was asked for and cannot be done must not pass in silence."""
    if config.cache.dtype == "fp8_e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"an FP8 KV cache needs a GPU of compute capability 8.9 or more, this is {torch.cuda.get_device_name(device)}; "
            "leave quantization_config.kv_cache.dtype auto"
        )


def _explain_slow_launch(command: StepCommand, seconds: float, num_retries: int) -> None:
    """A stall that every request under way has felt, and that no figure of theirs explains."""
    if num_retries:
        why = f"the allocator gave memory back and asked anew {num_retries} times since the last one: raise reserved_device_memory_ratio"
    elif seconds < _STALL_S:
        return
    else:
        why = "no allocation failed, so it was a kernel or a plan made for a shape not seen before, or this processor was taken away"
    log.warning(
        "enqueuing step %d (%d sequences, %d tokens) took %.2f s; %s",
        command.step_id,
        len(command.seq_ids),
        sum(command.num_tokens),
        seconds,
        why,
    )
