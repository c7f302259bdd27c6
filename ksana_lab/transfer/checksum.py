"""CRC-32 of scattered bytes of a cache, wherever it lies. Slow on a GPU, whose bytes come to the host for it: made for tests and doubts."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def crc_of(cache: torch.Tensor, spans: np.ndarray, crc: int = 0) -> int:
    """``spans``: int64 [n, 2] (offset, bytes), in order, behind what ``crc`` is of. The bytes must exist; nothing else on the device is
    waited for."""
    if not cache.is_cuda:
        view = memoryview(cache.numpy())  # type: ignore[arg-type]
        for offset, nbytes in spans.tolist():
            crc = zlib.crc32(view[offset : offset + nbytes], crc)
        return crc
    with torch.cuda.device(cache.device), torch.cuda.stream(torch.cuda.Stream()):
        for offset, nbytes in spans.tolist():
            crc = zlib.crc32(memoryview(cache[offset : offset + nbytes].cpu().numpy()), crc)  # type: ignore[arg-type]
    return crc


def crc_text(memory: torch.Tensor) -> str:
    """CRC-32 of all of ``memory``, uint8 on any device, as a message carries it."""
    return f"{zlib.crc32(memoryview(memory.cpu().numpy())):08x}"  # type: ignore[arg-type]
