"""A scheduler and its workers, one turn at a time: what both the engine process and ``LLM`` drive. Knows no sockets of the API and no text.

On CUDA the next step is scheduled and enqueued while the last one runs (pipeline depth 1): its tokens are read one turn later."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import zmq

from ksana_lab.config.engine import EngineConfig
from ksana_lab.core.block_manager import BlockManager
from ksana_lab.core.connector import NoTransfer
from ksana_lab.core.scheduler import Scheduler
from ksana_lab.core.sequence import Sequence
from ksana_lab.core.step import SchedulerOutput
from ksana_lab.engine.executor import Executor
from ksana_lab.engine.model_runner import PendingTokens
from ksana_lab.engine.wakeup import Wakeup
from ksana_lab.errors import RequestError, ServiceUnavailable
from ksana_lab.protocol.engine import AddRequest, EngineReady, EngineStatus, PeerUpdate, SequenceUpdate, TransferKey
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.types import FinishReason

log = logging.getLogger(__name__)


class Engine:
    """Owned by one thread. ``step`` while ``is_busy``, else wait for ``pollables`` and new requests and step again."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        recorder: NullRecorder | None = None,
        pipeline_depth: int | None = None,
        private_dir: Path | None = None,
    ) -> None:
        """``pipeline_depth``: steps under way when the next is scheduled, 0 or 1; None = 1 on CUDA, 0 on a CPU, which computes on the
        calling thread. ``private_dir``: its folder of sockets is made there, so that it goes with it when the engine is killed."""
        self.config = config
        self._pipeline_depth = pipeline_depth
        self._recorder = recorder or NullRecorder()
        # mode 0700: sockets of the ranks and of the transfer's control
        self._ipc_dir = tempfile.mkdtemp(prefix="ksana-lab-" if private_dir is None else "e-", dir=private_dir)
        self._inflight: deque[tuple[SchedulerOutput, PendingTokens, int]] = deque()
        self._next_seq_id = 0
        self._num_steps = 0
        self._was_idle = True
        self.is_busy = False  # the last turn ran something: take the next one without waiting
        self._num_leaked = 0
        self._profiler: Any = None
        self._transfer: Any = None
        self._executor: Executor | None = None
        self.wakeup = Wakeup()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        config = self.config
        self._executor = executor = Executor(config, ipc_dir=self._ipc_dir, recorder=self._recorder, wake=self.wakeup.ring)
        assert executor.worker is not None
        self._model = executor.worker.model_config
        self._device = executor.worker.device
        self._depth = int(self._device.type == "cuda") if self._pipeline_depth is None else self._pipeline_depth
        if config.connector.role.is_disaggregated:
            from ksana_lab.transfer.scheduler_side import make_scheduler_connector

            self._transfer = make_scheduler_connector(
                config=config,
                layout=executor.layout,
                tp_size=config.parallel.tensor_parallel_size,
                total_kv_heads=self._model.num_kv_heads,
                worker_endpoints=executor.endpoints,
                recorder=self._recorder,
                wake=self.wakeup.ring,
                ipc_dir=self._ipc_dir,
            )
            assert executor.worker.connector is not None
            executor.worker.connector.on_first_layer = self._transfer.release
        cache = config.cache
        self.scheduler = Scheduler(
            config.scheduler,
            BlockManager(
                executor.layout.num_blocks,
                cache.block_size,
                enable_prefix_caching=cache.enable_prefix_caching,
                num_host_blocks=executor.num_host_blocks,
            ),
            max_model_len=executor.worker.max_model_len,
            vocab_size=self._model.vocab_size,
            role=config.connector.role,
            connector=self._transfer or NoTransfer(),
            events=self._recorder,
        )

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: AddRequest) -> SequenceUpdate | None:
        """Queue a request; the answer, if there is one, refuses it."""
        seq = Sequence(
            self._next_seq_id,
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            request.arrival_ns,
            frozenset(request.eos_token_ids),
            request.transfer,
        )
        self._next_seq_id += 1
        self._was_idle = False
        try:
            self.scheduler.add(seq)
        except RequestError as error:
            return SequenceUpdate(request.request_id, [], finish=FinishReason.ERROR, error_type=error.type, error=str(error))
        return None

    def abort(self, request_id: str, reason: str) -> None:
        self.scheduler.abort(request_id, reason, time.monotonic_ns())

    def decline(self, key: TransferKey, reason: str) -> None:
        """This node does not take its part of ``key``, which it has never queued: the peer is told."""
        if self._transfer is None:
            log.warning("asked to decline request %s on a node that has no peers", key)
        else:
            self._transfer.decline(key, reason)

    def fail_all(self, why: str) -> list[SequenceUpdate]:
        """End every request with an error towards its client."""
        self.scheduler.fail_all(ServiceUnavailable.type, why, time.monotonic_ns())
        return self.scheduler.take_updates()

    def update_peers(self, update: PeerUpdate) -> None:
        if self._transfer is not None:
            self._transfer.handle_peer_update(update)
        elif update.pairs:  # a mixed node is told that it has none
            log.warning("heard of peers on a node that has none")

    # ---- the step ----------------------------------------------------------------------------------------------------

    def step(self) -> list[SequenceUpdate]:
        """One turn: hear of transfers, schedule, enqueue, read what is due. Blocks for the device only. Hand on what it returns, then
        ``flush``. Raises EngineDead."""
        assert self._executor is not None
        self.wakeup.clear()
        self._executor.check()
        self._hold()
        out = self.scheduler.schedule(time.monotonic_ns())
        if out.is_empty:
            self._executor.skip(out)
        else:
            self._inflight.append(self._submit(out))
        self.flush()  # before waiting for the device
        self.is_busy = bool(self._inflight)
        if self._inflight and (out.is_empty or len(self._inflight) > self._depth):
            self._finish_step()
        self._check_when_idle()
        updates = self.scheduler.take_updates()
        if not updates:
            self.flush()
        return updates

    def _hold(self) -> None:
        """Peers and ranks hear of this turn when the device has its first layer to compute, and of its tokens when the client has them:
        control threads would take the interpreter from this one just when a prompt waits for it."""
        if self._transfer is not None:
            self._transfer.hold()

    def flush(self) -> None:
        """What the turn has to say to peers and ranks goes now."""
        if self._transfer is not None:
            self._transfer.release()

    def _submit(self, out: SchedulerOutput) -> tuple[SchedulerOutput, PendingTokens, int]:
        assert self._executor is not None
        start_ns = time.monotonic_ns()
        if not self._recorder.annotates:
            return out, self._executor.submit(out), start_ns
        self._recorder.push("step", "step", step=out.step_id, num_tokens=out.num_tokens, num_decodes=out.num_decodes)
        try:
            return out, self._executor.submit(out), start_ns
        finally:
            self._recorder.pop()

    def _finish_step(self) -> None:
        out, pending, start_ns = self._inflight.popleft()
        assert self._executor is not None
        tokens = self._executor.result(pending)
        now_ns = time.monotonic_ns()
        self._hold()
        self.scheduler.update(out, tokens, now_ns)
        if out.scheduled:
            self._num_steps += 1
            if self._recorder.enabled:
                seqs = [[item.seq.seq_id, item.start, item.num_tokens] for item in out.scheduled]
                lengths = [length for _, _, length in seqs]
                self._recorder.span(
                    "step", "step", start_ns, now_ns,
                    step=out.step_id, num_tokens=sum(lengths), num_seqs=len(seqs), num_decodes=lengths.count(1), seqs=seqs,
                )  # fmt: skip
                self._recorder.counter("blocks", "step", free=self.scheduler.blocks.num_free, held=len(self.scheduler.held))

    @property
    def is_idle(self) -> bool:
        return not self._inflight and self.scheduler.is_idle

    @property
    def pollables(self) -> list[zmq.Socket | int]:
        """What to wait on when there is nothing to run: news of transfers, and of other ranks."""
        assert self._executor is not None
        return [self.wakeup.fileno(), *self._executor.sockets]

    def wait_bound_s(self, now_ns: int) -> float:
        """How long at most to wait: time-outs are kept to the millisecond, a connector is looked at once a second."""
        bound_s = 1.0 if self.scheduler.connector.has_pending else 10.0
        deadline = self.scheduler.next_deadline_ns
        return bound_s if deadline is None else min(bound_s, max(0.0, (deadline - now_ns) / 1e9))

    def _check_when_idle(self) -> None:
        """Free + used = total, every time the work runs out."""
        is_idle = self.is_idle
        if is_idle and not self._was_idle:
            self._num_leaked = self.scheduler.check()
            if self._num_leaked:
                log.error("%d KV blocks leaked: neither free nor owned by any sequence", self._num_leaked)
        self._was_idle = is_idle

    # ---- what others may ask -----------------------------------------------------------------------------------------

    def ready(self) -> EngineReady:
        assert self._executor is not None
        return EngineReady(
            max_model_len=self.scheduler.max_model_len,
            num_blocks=self.scheduler.blocks.num_blocks,
            block_size=self.scheduler.blocks.block_size,
            vocab_size=self._model.vocab_size,
            device=str(self._device),
            devices=self._executor.devices,
            max_num_seqs=self.scheduler.max_num_seqs,
        )

    def status(self, token: int = -1) -> EngineStatus:
        assert self._executor is not None
        scheduler = self.scheduler
        return EngineStatus(
            token=token,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_waiting_kv=len(scheduler.waiting_kv),
            num_held=len(scheduler.held),
            num_blocks=scheduler.blocks.num_blocks,
            num_free_blocks=scheduler.blocks.num_free,
            num_leaked_blocks=self._num_leaked,
            num_preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            steps=self._num_steps,
            connected=self._transfer.connected() if self._transfer is not None else [],
            transfer=self._transfer_stats(),
            now_ns=time.monotonic_ns(),
            num_swapped=scheduler.num_swapped,
            num_swap_outs=scheduler.num_swap_outs,
            num_swap_ins=scheduler.num_swap_ins,
            num_host_blocks=scheduler.blocks.host_pool.num_blocks,
            num_free_host_blocks=scheduler.blocks.host_pool.num_free,
        )

    def _transfer_stats(self) -> dict[str, float]:
        if self._transfer is None:
            return {}
        held = sum(len(seq.block_table) for seq in list(self.scheduler.held.values()))
        return {**self._transfer.stats(), "held_blocks": float(held)}

    @property
    def transfer_worker(self) -> Any:
        """Rank 0's end of KV transfer (None on a mixed node): what measuring tools look at and switch."""
        assert self._executor is not None and self._executor.worker is not None
        return self._executor.worker.connector

    def profile(self, start: bool) -> None:
        """Open or close a torch.profiler window over rank 0; the trace goes to ``trace_dir``, or to the working directory."""
        if start and self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif not start and self._profiler is not None:
            self._profiler.stop()
            path = f"{self.config.runtime.trace_dir or '.'}/kineto-{self.config.connector.role.value}-{time.time_ns()}.json"
            self._profiler.export_chrome_trace(path)
            self._profiler = None
            log.info("torch profile written to %s", path)

    def close(self) -> None:
        """End the other ranks and all transfers. May be called twice."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        if self._executor is not None:
            self._executor.close()
            self._executor = None
        self.wakeup.close()
        shutil.rmtree(self._ipc_dir, ignore_errors=True)
