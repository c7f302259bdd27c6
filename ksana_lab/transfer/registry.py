"""Backends by name: which ones a node offers, and which one a pair uses. Imports only what is asked for."""

from __future__ import annotations

import importlib
import logging
import socket
from pathlib import Path
from typing import Any

from ksana_lab.config.engine import UNPACKED
from ksana_lab.errors import TransferError
from ksana_lab.transfer.base import TransferBackend

log = logging.getLogger(__name__)

_BACKENDS = {
    "cuda_ipc": "ksana_lab.transfer.backends.cuda_ipc:CudaIpcBackend",
    "shm": "ksana_lab.transfer.backends.shm:ShmBackend",
    "tcp": "ksana_lab.transfer.backends.tcp:TcpBackend",
    "nixl": "ksana_lab.transfer.backends.nixl:NixlBackend",  # an optional extra; ``auto`` never takes it
    "nccl": "ksana_lab.transfer.backends.nccl:NcclBackend",  # ``auto`` never takes it
    "gloo": "ksana_lab.transfer.backends.nccl:GlooBackend",  # the same between CPUs
}
_ON_GPU = {"shm": "ksana_lab.transfer.backends.staged_shm:StagedShmBackend"}  # another class where the cache lies on a GPU
_IS_FOR_CUDA = {"cuda_ipc": True, "nccl": True, "gloo": False}  # the others take either kind of memory
_HAVE_ADDRESS = ("tcp", "nixl", "nccl", "gloo")
_REGISTER_SOURCE = ("nixl",)
_ONE_HOST = ("cuda_ipc", "shm")
_PACKS = tuple(name for name in _BACKENDS if name not in UNPACKED)  # can carry KV that was packed on the way (``wire_dtype``)
AUTO = {True: ("cuda_ipc", "shm", "tcp"), False: ("shm", "tcp")}  # on a GPU or not: what ``auto`` stands for, best first


def make_backend(name: str, host: str, *, on_gpu: bool = False) -> TransferBackend:
    """``on_gpu``: the cache lies on a GPU. Raises TransferError for a backend that this machine, this version or this memory does not
    have."""
    if name not in _BACKENDS:
        raise TransferError(f"transfer backend {name!r} is not in this version; choose {', '.join(_BACKENDS)} or auto")
    if _IS_FOR_CUDA.get(name, on_gpu) != on_gpu:
        if on_gpu:
            raise TransferError(f"transfer backend {name!r} keeps the cache in host memory; on a GPU choose cuda_ipc, shm, tcp or auto")
        raise TransferError(f"transfer backend {name!r} needs CUDA, and this node runs on the CPU; choose tcp, shm or auto")
    module, _, attribute = (_ON_GPU.get(name, _BACKENDS[name]) if on_gpu else _BACKENDS[name]).partition(":")
    cls: Any = getattr(importlib.import_module(module), attribute)
    return cls(host) if name in _HAVE_ADDRESS else cls()


def make_backends(option: str, host: str, *, on_gpu: bool = False, is_packed: bool = False) -> list[TransferBackend]:
    """The backends of a node whose YAML says ``option``, best first. ``auto`` on GPUs: cuda_ipc, shm and tcp; on CPUs: shm and tcp. A pair
    uses the first that both have and that reaches: on one host one of the former, else tcp. ``is_packed``: KV travels in another dtype."""
    if is_packed and option not in (*_PACKS, "auto"):
        raise TransferError(f"ksana_lab.wire_dtype: fp8_e4m3 needs communication_type {', '.join(_PACKS)} or auto, not {option}")
    if option != "auto":
        return [make_backend(option, host, on_gpu=on_gpu)]
    backends = []
    for name in AUTO[on_gpu]:
        try:
            backends.append(make_backend(name, host, on_gpu=on_gpu))
        except TransferError as error:
            log.info("not offering %s: %s", name, error)
    return backends


def needs_one_host(name: str) -> bool:
    return name in _ONE_HOST


def registers_source(name: str) -> bool:
    """Whether the cache on P, too, must be memory that the backend allocates."""
    return name in _REGISTER_SOURCE


def host_id() -> str:
    """Equal for two processes that share a kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
