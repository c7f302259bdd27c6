"""The attention backend of a GPU: Triton kernels over pages, and cuDNN for long prompt chunks.

Decodes take triton_decode.py. A long prefill chunk of a sequence without earlier context needs no pages: its keys and values are this
step's tensors, and cuDNN's causal attention runs on them a quarter faster than any other kernel of this torch. But cuDNN plans for 40 ms
whenever it meets a new length (measured), so lengths are rounded up to a few, which ``warm_up`` plans before the first request. A long
chunk after long context is cut into parts of such lengths (after_context.py), where ``warm_up`` found that right and faster. All other
chunks take triton_prefill.py, many sequences in one launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ksana_lab.attention.after_context import AfterContext, Kernels, Shape
from ksana_lab.attention.base import AttentionMetadata
from ksana_lab.attention.store_kv import store_kv
from ksana_lab.attention.triton_decode import DecodePlan, decode_attention, plan_decode
from ksana_lab.attention.triton_prefill import FEW_SEQS, gather_kv, merge_attention, prefill_attention

# New tokens from which cuDNN beats triton_prefill.py by enough. At 2,048 it gains 0.2 ms of a prompt's 48 on the device, and the host then
# takes 1.1 ms to launch a layer (docs/LOG.md): the threads of a prefill node that share it have no time left.
_CUDNN_MIN = 4096
_CUDNN_STEP = 512  # its lengths are multiples of this


class TritonBackend:
    name = "triton"

    def __init__(self, pdl: bool | None = None) -> None:
        """``pdl``: let kernels start while their predecessors drain; None = where the GPU can."""
        self.pdl = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9 if pdl is None else pdl
        self._step_kv: tuple[int, Tensor, Tensor] | None = None
        self._after_context: AfterContext | None = None

    def store(self, k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
        """Write k, v [T, kv_heads, head_dim] to their slots; a slot of -1 is skipped."""
        store_kv(k, v, kv_layer, slot_mapping, self.pdl)
        self.remember(k, v, kv_layer)

    def remember(self, k: Tensor, v: Tensor, kv_layer: Tensor) -> None:
        """This step's keys and values of a layer that another kernel has stored; ``attend`` may read them instead of pages."""
        self._step_kv = (kv_layer.data_ptr(), k, v)

    def warm_up(
        self, num_heads: int, num_kv_heads: int, head_dim: int, max_tokens: int, dtype: torch.dtype, device: torch.device,
        *, max_seq_len: int, block_size: int, cache_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Compile what only some steps need, and have cuDNN plan for every length it may be asked for, up to ``max_tokens`` of a sequence
        in a step: both take up to a second, which every request under way would wait for."""
        kv_layer = torch.zeros(1, 2, num_kv_heads, block_size, head_dim, dtype=cache_dtype, device=device)
        _attend_to_many(num_heads, kv_layer, dtype)
        if dtype.itemsize != 2:
            return
        for length in range(_CUDNN_MIN, _padded(max_tokens) + 1, _CUDNN_STEP):
            heads = torch.zeros(length, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
            q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
            cudnn_attention(q, k, v, head_dim**-0.5, is_causal=True)
            if length > _CUDNN_MIN:  # what is padded to it is laid out otherwise, and that is another plan
                cudnn_attention(q.contiguous(), k.contiguous(), v.contiguous(), head_dim**-0.5, is_causal=True)
        self._after_context = AfterContext(KERNELS, max_tokens, max_seq_len)
        self._after_context.prove(Shape(num_heads, num_kv_heads, head_dim, block_size, dtype, cache_dtype), device)

    def peak_chunk(self) -> tuple[int, int] | None:
        """New tokens and earlier context of the chunk that gathers most; None where none is gathered."""
        return None if self._after_context is None else self._after_context.peak()

    def attend(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        """q [T, heads, head_dim] -> [T, heads, head_dim], causal within each sequence, GQA by heads // kv_heads.

        Rows of padding are zero among decodes (seq_lens 0) and undefined after the last prefill token."""
        try:
            return self._attend(q, kv_layer, meta, scale)
        finally:
            self._step_kv = None  # a captured graph owns its memory: nothing of it may outlive the capture

    def _attend(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        num_decodes = meta.num_decodes
        if num_decodes == 0 and len(meta.query_lens) == 1 and self._is_whole(meta, 0, q.dtype):
            return self._attend_whole(q, kv_layer, meta, 0, 0, scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if num_decodes:
            if meta.plan is None:
                meta.plan = self._plan(q, kv_layer, meta)
            plan: DecodePlan = meta.plan
            decode_attention(q[:num_decodes], kv_layer, meta.block_tables, plan, scale, out[:num_decodes], self.pdl)
        start = num_decodes
        for kernel, members in groupby(range(num_decodes, len(meta.query_lens)), key=lambda i: self._kernel_for(meta, i, q.dtype)):
            run = list(members)
            if kernel == "pages":
                chosen = slice(run[0], run[-1] + 1)
                starts = meta.query_start_loc[run[0] : run[-1] + 2]
                num_tokens = sum(meta.query_lens[i] for i in run)
                prefill_attention(q, kv_layer, meta.block_tables[chosen], starts, meta.seq_lens[chosen], num_tokens, scale, out)
                start += num_tokens
                continue
            for i in run:
                end = start + meta.query_lens[i]
                if kernel == "whole":
                    out[start:end] = self._attend_whole(q[start:end], kv_layer, meta, i, start, scale)
                else:
                    assert self._after_context is not None
                    num_keys = meta.context_lens[i]
                    self._after_context.attend(q[start:end], kv_layer, meta.block_tables[i], num_keys, scale, out[start:end])
                start = end
        return out

    def _kernel_for(self, meta: AttentionMetadata, i: int, dtype: torch.dtype) -> str:
        if self._is_whole(meta, i, dtype):
            return "whole"
        if self._after_context is not None and self._after_context.takes(meta.query_lens[i], meta.context_lens[i]):
            return "after context"
        return "pages"

    def _plan(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata) -> DecodePlan:
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        return plan_decode(meta.seq_lens[: meta.num_decodes], q.shape[1], kv_layer.shape[2], q.shape[2], num_sms, pdl=self.pdl)

    def _is_whole(self, meta: AttentionMetadata, i: int, dtype: torch.dtype) -> bool:
        """cuDNN's case: 16-bit, long, every key of this step."""
        return dtype.itemsize == 2 and meta.query_lens[i] == meta.context_lens[i] and meta.query_lens[i] >= _CUDNN_MIN

    def _attend_whole(self, q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, i: int, start: int, scale: float) -> Tensor:
        """One sequence whose every key is of this step. q [n, heads, head_dim] -> [n, heads, head_dim]."""
        length = meta.query_lens[i]
        if self._step_kv is not None and self._step_kv[0] == kv_layer.data_ptr():
            k, v = (x[start : start + length] for x in self._step_kv[1:])
        else:
            k, v = gather_kv(kv_layer, meta.block_tables[i], length, q.dtype)
        # Causal: the zeros behind the last token reach nobody before them.
        padding = (0, 0, 0, 0, 0, _padded(length) - length)
        q, k, v = (x if padding[-1] == 0 else F.pad(x, padding) for x in (q[:length], k, v))
        return cudnn_attention(q, k, v, scale, is_causal=True)[0][:length]


def _attend_to_many(num_heads: int, kv_layer: Tensor, dtype: torch.dtype) -> None:
    """A step of more prompts than most have, of one token each."""
    num, device = FEW_SEQS + 1, kv_layer.device
    q = torch.zeros(num, num_heads, kv_layer.shape[-1], dtype=dtype, device=device)
    starts = torch.arange(num + 1, dtype=torch.int32, device=device)
    tables, lengths = torch.zeros(num, 1, dtype=torch.int32, device=device), torch.ones(num, dtype=torch.int32, device=device)
    prefill_attention(q, kv_layer, tables, starts, lengths, num, 1.0, torch.empty_like(q))


def _padded(length: int) -> int:
    return -(-length // _CUDNN_STEP) * _CUDNN_STEP


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, with_lse: bool = False) -> tuple[Tensor, Tensor]:
    """q [n, heads, head_dim], k, v [m, kv_heads, head_dim] (any strides but the last) -> [n, heads, head_dim], lse [heads, n] float32.

    Called past F.scaled_dot_product_attention, whose choice of a backend is a process-wide setting."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], None, with_lse, 0.0, is_causal, False, scale=scale
    )
    lse = result[1]
    if with_lse:  # [1, heads, n] and, in some versions of torch, a last axis of one
        lse = lse.reshape(q.shape[1], q.shape[0])
    return result[0][0].transpose(0, 1), lse


def _paged(q: Tensor, kv_layer: Tensor, block_table: Tensor, num_keys: int, scale: float) -> Tensor:
    """triton_prefill.py's for one sequence, of which q [n, heads, head_dim] are the last tokens."""
    n = q.shape[0]
    starts = torch.arange(0, n + 1, n, dtype=torch.int32, device=q.device)  # made on the device: it is timed, and a copy would wait
    seq_lens = torch.full((1,), num_keys, dtype=torch.int32, device=q.device)
    return prefill_attention(q, kv_layer, block_table[None], starts, seq_lens, n, scale, torch.empty_like(q))


def _time_us(run: Callable[[], object]) -> float:
    """Median microseconds on the device, of three in a row, so that the host is ahead."""
    times = []
    for _ in range(4):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 3)
    return statistics.median(times[1:])


KERNELS = Kernels(
    dense=lambda q, k, v, scale, is_causal: cudnn_attention(q, k, v, scale, is_causal, with_lse=True),
    gather=lambda kv_layer, table, first, num_tokens, padded, dtype: gather_kv(kv_layer, table, num_tokens, dtype, first, padded),
    merge=merge_attention,
    paged=_paged,
    time_us=_time_us,
)
