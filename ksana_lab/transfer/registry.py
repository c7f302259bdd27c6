"""Backends by name: which ones a node offers, and which one a pair uses. Imports only what is asked for."""

from __future__ import annotations

import importlib
import logging
import socket
from pathlib import Path
from typing import Any

from ksana_lab.errors import TransferError
from ksana_lab.transfer.base import TransferBackend

log = logging.getLogger(__name__)

_BACKENDS = {
    "shm": "ksana_lab.transfer.backends.shm:ShmBackend",
    "tcp": "ksana_lab.transfer.backends.tcp:TcpBackend",
}
_NEEDS_CUDA = ("cuda_ipc", "nccl", "nixl")


def make_backend(name: str, host: str) -> TransferBackend:
    """Raises TransferError for a backend that this machine or this version does not have."""
    if name in _NEEDS_CUDA:
        raise TransferError(f"transfer backend {name!r} needs CUDA, and this node runs on the CPU; choose tcp, shm or auto")
    module, _, attribute = _BACKENDS[name].partition(":")
    cls: Any = getattr(importlib.import_module(module), attribute)
    return cls(host) if name == "tcp" else cls()


def make_backends(option: str, host: str) -> list[TransferBackend]:
    """The backends of a node whose YAML says ``option``, best first. ``auto`` on CPUs: shm and tcp; a pair on one host then uses shm."""
    if option != "auto":
        return [make_backend(option, host)]
    backends = []
    for name in ("shm", "tcp"):
        try:
            backends.append(make_backend(name, host))
        except TransferError as error:
            log.info("not offering %s: %s", name, error)
    return backends


def host_id() -> str:
    """Equal for two processes that share a kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
