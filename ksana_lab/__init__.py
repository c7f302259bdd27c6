"""ksana_lab: a research toolkit for prefill/decode disaggregation of LLM inference. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "ksana_lab.engine.llm",
    "Cluster": "ksana_lab.cluster.local",
    "SamplingParams": "ksana_lab.types",
    "WorkloadSpec": "ksana_lab.workload.spec",
    "RequestRecord": "ksana_lab.metrics.record",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ksana_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
