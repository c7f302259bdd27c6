"""One rank's step: inputs, forward pass, sampling. Three separate parts, so that a captured graph can stand in for the middle one.

Nothing here waits for the device but ``PendingTokens.result``. Knows nothing of the scheduler; transfer is told of finished layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ksana_lab.attention.base import AttentionBackend, AttentionMetadata, ForwardContext
from ksana_lab.core.step import StepTokens
from ksana_lab.engine.commands import StepCommand
from ksana_lab.engine.cuda_graph import DecodeGraphs, PrefillGraphs
from ksana_lab.engine.host_blocks import HostBlocks
from ksana_lab.engine.input_batch import InputBatch, StepInputs
from ksana_lab.engine.layer_timer import LayerTimer
from ksana_lab.engine.sampler import PLAIN_GREEDY, Sampled
from ksana_lab.layers import fused
from ksana_lab.models.decoder import Decoder
from ksana_lab.transfer.base import WorkerConnector
from ksana_lab.types import TokenLogprob

log = logging.getLogger(__name__)


class PendingTokens:
    """Tokens on their way to the host. On CUDA the copy is enqueued behind the step; ``result`` waits for it."""

    def __init__(
        self, seq_ids: list[int], num_logprobs: list[int], sampled: Sampled | None, check: Callable[[], None] = lambda: None
    ) -> None:
        """``check``: raises when what the device has computed is worthless."""
        self._seq_ids, self._num_logprobs, self._check = seq_ids, num_logprobs, check
        self._event: torch.cuda.Event | None = None
        self._tensors: list[Tensor] = []
        if sampled is None:
            return
        tensors = [sampled.token_ids]
        if sampled.logprobs is not None:
            tensors += [sampled.logprobs.chosen, sampled.logprobs.top_ids, sampled.logprobs.top]
        if sampled.token_ids.is_cuda:
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tensors = tensors

    @classmethod
    def none_but_wait(cls, device: torch.device) -> PendingTokens:
        """No tokens; ``result`` returns when the device has done all that is enqueued now."""
        pending = cls([], [], None)
        if device.type == "cuda":
            pending._event = torch.cuda.Event()
            pending._event.record()
        return pending

    def result(self) -> StepTokens:
        """The step's tokens. The only place in the engine that waits for the device."""
        if self._event is not None:
            self._event.synchronize()
            self._check()
        if not self._tensors:
            return StepTokens()
        token_ids, *logprobs = [tensor.tolist() for tensor in self._tensors]
        result = StepTokens(dict(zip(self._seq_ids, token_ids, strict=True)))
        if logprobs:
            chosen, top_ids, top = logprobs
            for i, num in enumerate(self._num_logprobs):
                if num >= 0:
                    best = tuple(zip(top_ids[i][:num], top[i][:num], strict=True))
                    result.logprobs[self._seq_ids[i]] = TokenLogprob(token_ids[i], chosen[i], best)
        return result


NO_TOKENS = PendingTokens([], [], None)


class ModelRunner:
    """Owned by one thread. ``set_cache`` before the first ``execute``."""

    def __init__(
        self,
        model: Decoder,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        backend: AttentionBackend,
        device: torch.device,
        is_sampling_rank: bool = True,
    ) -> None:
        self.model = model
        self.device = device
        self.backend = backend
        self.batch = InputBatch(max_num_seqs, max_model_len, block_size, model.config.vocab_size, device)
        self.connector: WorkerConnector | None = None
        self._kv_layers: Sequence[Tensor] = ()
        self._brings_tokens_home = is_sampling_rank
        self._host_blocks: HostBlocks | None = None
        self.peers_write = False  # a decode node: a prefill node writes the cache whenever it likes
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self.layer_timer: LayerTimer | None = None  # only while something records

    def set_cache(self, kv_layers: Sequence[Tensor], connector: WorkerConnector | None, host_blocks: HostBlocks | None = None) -> None:
        """``kv_layers``: per layer [num_blocks, 2, kv_heads, block_size, head_dim]. ``host_blocks``: where they are swapped to."""
        self._kv_layers, self.connector, self._host_blocks = kv_layers, connector, host_blocks

    def close(self) -> None:
        """Let go of the graphs, which hold the communicator that they captured, and of the timer. May be called twice."""
        for graphs in (self._graphs, self._prefill_graphs):
            if graphs is not None:
                graphs.close()
        self._graphs = self._prefill_graphs = None
        if self.layer_timer is not None:
            self.layer_timer.close()
            self.layer_timer = None

    def capture_graphs(self) -> None:
        """Make graphs of the decode steps. CUDA only, after ``set_cache``; all ranks of a group together."""
        graphs = DecodeGraphs(
            self.model, self.backend, self._kv_layers, max_num_seqs=self.batch.max_num_seqs, max_num_blocks=self.batch.max_num_blocks
        )
        graphs.capture()
        self._graphs = graphs

    def compile_sampling(self) -> None:
        """CUDA only: what draws tokens, and for greedy sequences takes the maximum, of the model's logits and of float32 ones."""
        table = self.batch.sampling
        for dtype in {self.model.embedding.weight.dtype, torch.float32}:
            logits = torch.zeros(1, table.vocab_size, dtype=dtype, device=self.device)
            fused.argmax(logits)
            fused.sample(logits, logits.new_ones(1, 1, dtype=torch.float32), logits.new_zeros(1, 2, dtype=torch.int64))

    def capture_prefill_graphs(self, max_num_tokens: int) -> None:
        """The same of prompt chunks of up to so many tokens together, if they prove right."""
        graphs = PrefillGraphs(
            self.model, self.backend, self._kv_layers, max_num_tokens=max_num_tokens, max_num_blocks=self.batch.max_num_blocks
        )
        # All ranks go on, or none: what they prove holds sums over all of them.
        if self._all_ranks(graphs.capture) and self._all_ranks(graphs.prove):
            self._prefill_graphs = graphs
        else:
            graphs.close()

    def _all_ranks(self, do: Callable[[], bool | None]) -> bool:
        """Whether ``do`` worked on every rank, here and elsewhere; what does not run must not keep the node from starting."""
        try:
            is_right = do() is not False
        except Exception as error:
            log.warning("prefill is not replayed: %s: %s", type(error).__name__, error)
            is_right = False
        return all(answer == b"yes" for answer in self.model.tp.exchange(b"yes" if is_right else b"no"))

    @torch.inference_mode()
    def execute(self, command: StepCommand) -> PendingTokens:
        """Enqueue one step; on a CPU it is done on return."""
        self.batch.apply(command)
        if command.swap_out or command.swap_in:
            assert self._host_blocks is not None
            self._host_blocks.copy(command.swap_out, command.swap_in)
        if self.connector is not None:
            self.connector.begin_step(command.transfer)
        if not command.seq_ids:
            return self._end_without_tokens(command)
        inputs = self.batch.prepare(command)
        # A last prompt chunk of one token counts as a decode; if its KV must be sent, somebody wants to hear of every layer.
        is_watched = command.transfer is not None and bool(command.transfer.sends)
        if self._graphs is not None and not is_watched and self._graphs.fits(inputs):
            sampled = self.sample_replayed(*self._graphs.replay(inputs), inputs)
        elif self._prefill_graphs is not None and self._prefill_graphs.fits(inputs):
            logits, greedy = self._prefill_graphs.replay(inputs, self._layer_listener(command.step_id))
            if not inputs.sample_seq_ids:
                return self._end_without_tokens(command)
            sampled = self.sample_replayed(logits, greedy, inputs)
        else:
            hidden = self.forward(inputs, command.step_id)
            if not inputs.sample_seq_ids:
                return self._end_without_tokens(command)
            sampled = self.sample(hidden, inputs)
        if not self._brings_tokens_home:
            return NO_TOKENS
        num_logprobs = [self.batch.sampling.num_logprobs(row) for row in inputs.sample_rows] if sampled.logprobs else []
        return PendingTokens(inputs.sample_seq_ids, num_logprobs, sampled, self.model.tp.check)

    def _end_without_tokens(self, command: StepCommand) -> PendingTokens:
        """Where peers write the cache, the end of a step must be the end of all it does to its blocks, on every rank: they may go to a
        peer then. Elsewhere they go to later steps of the same stream, and nobody need wait."""
        if not self.peers_write:
            return NO_TOKENS
        if not command.seq_ids and self._host_blocks is not None:
            self._host_blocks.meet()
        return PendingTokens.none_but_wait(self.device)

    def forward(self, inputs: StepInputs, step_id: int = -1) -> Tensor:
        """Hidden states [S, hidden] of the tokens that are sampled from."""
        wanted = slice(len(inputs.sample_seq_ids)) if inputs.logits_indices is None else inputs.logits_indices
        on_layer_done = self._layer_listener(step_id)
        context = ForwardContext(inputs.attn, self._kv_layers, self.backend, on_layer_done)
        return self.model(inputs.input_ids, inputs.positions, context, wanted)

    def _layer_listener(self, step_id: int) -> Callable[[int], None] | None:
        tell = None if self.connector is None else self.connector.layer_done
        timer = self.layer_timer
        if timer is None:
            return tell
        timer.begin(step_id)
        if tell is None:
            return timer.layer_done
        told = tell

        def both(layer: int) -> None:
            timer.layer_done(layer)
            told(layer)

        return both

    def sample(self, hidden: Tensor, inputs: StepInputs) -> Sampled:
        """A token for each sequence that samples; every rank comes to the same ones, from the same logits."""
        sampled = self.batch.sampling.sample(self.model.head(hidden), inputs.sampling)
        self.batch.remember(inputs, sampled.token_ids)
        return sampled

    def sample_replayed(self, logits: Tensor, greedy: Tensor, inputs: StepInputs) -> Sampled:
        """The same after a replayed graph, which has the maxima already. Every sequence of such a step samples, in order."""
        is_plain = inputs.sampling is PLAIN_GREEDY
        sampled = Sampled(greedy) if is_plain else self.batch.sampling.sample(logits, inputs.sampling)
        self.batch.remember(inputs, sampled.token_ids)
        return sampled

    @torch.inference_mode()
    def run_largest_step(
        self, num_tokens: int, num_seqs: int, kv_layers: Sequence[Tensor], *, max_len: int | None = None, context: int = 0
    ) -> None:
        """A step of ``num_tokens`` prompt tokens and ``num_seqs`` sampled ones that stores nothing: what it allocates is what a real step
        can need at most. ``max_len``: tokens of one sequence, None = all the model has positions for; ``context``: tokens that each
        sequence has before them. ``kv_layers``: one block suffices, nothing of it is kept."""
        max_len = max_len or min(num_tokens, self.model.config.max_position_embeddings)
        query_lens = [max_len] * (num_tokens // max_len) + ([num_tokens % max_len] if num_tokens % max_len else [])
        loc = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        context_lens = [n + context for n in query_lens]
        num_blocks = -(-(max_len + context) // self.batch.block_size)
        attn = AttentionMetadata(
            num_decodes=0,
            query_start_loc=torch.from_numpy(loc).to(self.device),
            seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=self.device),
            block_tables=torch.zeros(len(query_lens), num_blocks, dtype=torch.int32, device=self.device),
            slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device),
            query_lens=query_lens,
            context_lens=context_lens,
            max_query_len=max_len,
            max_seq_len=max_len + context,
        )
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in query_lens])
        hidden = self.model(ids, positions, ForwardContext(attn, kv_layers, self.backend))
        rows = torch.zeros(num_seqs, dtype=torch.int64, device=self.device)
        self.model.compute_logits(hidden.index_select(0, rows)).softmax(dim=-1).argmax(dim=-1)
