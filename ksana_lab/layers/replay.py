"""Kernels captured in a graph, and timed by its replays without the host between them, as candidates are compared at start-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def capture(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """(graph, what ``run`` returned; every replay writes into the same tensors). ``run`` has run before, so that it is compiled."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay. Waits for it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) * 1e3)
