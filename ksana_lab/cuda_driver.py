"""The few CUDA driver calls that torch does not offer: plain allocations, their export to another process, host memory that processes
share pinned, and copies by address.

Why not torch's own: with ``PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync``, which the configuration requires, the framework's memory
cannot be exported (``shareIpcHandle`` is not supported); memory from plain ``cuMemAlloc`` can. The driver library is part of every CUDA
machine, so nothing has to be compiled or installed. Loaded when first used; on a machine without it ``driver()`` raises TransferError."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ksana_lab.errors import TransferError

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED

_PORTABLE, _DEVICE_MAP = 1, 2  # CU_MEMHOSTREGISTER_…

_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BESIDE_COMPUTE = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE

_ptr = ctypes.c_uint64


class IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes; the places are hints for managed memory."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source_place", ctypes.c_int * 2),
        ("target_place", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class Driver:
    """Thin, checked calls. Every method works in the primary context of ``device`` (torch's own), on whichever thread calls."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        self._call("cuInit", 0)
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            raise TransferError(f"{name} failed with {code}: {(text.value or b'unknown error').decode()}")

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """The device's primary context is current on this thread."""
        context = self._contexts.get(device)
        if context is None:
            handle, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(handle), device)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self._contexts[device] = context
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def alloc(self, nbytes: int, device: int) -> int:
        """Address of ``nbytes`` of plain device memory, zeroed."""
        address = _ptr()
        with self.on(device):
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
            self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
            self._call("cuCtxSynchronize")
        return address.value

    def free(self, address: int, device: int) -> None:
        with self.on(device):
            self._call("cuMemFree_v2", _ptr(address))

    def export(self, address: int, device: int) -> bytes:
        """A handle (64 bytes) that another process of this host opens. ``address`` must come from ``alloc``."""
        handle = IpcHandle()
        with self.on(device):
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), _ptr(address))
        return bytes(handle)

    def open(self, exported: bytes, device: int) -> int:
        """Map another process's memory for use by ``device``; peer access is enabled as needed. Raises TransferError."""
        if len(exported) != HANDLE_BYTES:
            raise TransferError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, got {len(exported)}")
        handle, address = IpcHandle.from_buffer_copy(exported), _ptr()
        with self.on(device):
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return address.value

    def close(self, address: int, device: int) -> None:
        """Unmap what ``open`` mapped. No copy into it may be under way."""
        with self.on(device):
            self._call("cuIpcCloseMemHandle", _ptr(address))

    def has_peer_atomics(self, device: int, peer: int) -> bool:
        """Whether ``device`` has native atomics on ``peer``'s memory: over NVLink it has."""
        value = ctypes.c_int()
        with self.on(device):
            self._call("cuDeviceGetP2PAttribute", ctypes.byref(value), _NATIVE_ATOMICS, device, peer)
        return bool(value.value)

    def copy_async(self, dst: int, src: int, nbytes: int, stream: int, device: int) -> None:
        with self.on(device):
            self._call("cuMemcpyAsync", _ptr(dst), _ptr(src), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def pin(self, address: int, nbytes: int, device: int) -> None:
        """Lock host memory, also such as processes share, so that ``device`` reads and writes it at the same address. Raises
        TransferError."""
        mapped = _ptr()
        with self.on(device):
            flags = ctypes.c_uint(_PORTABLE | _DEVICE_MAP)
            self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)
            try:
                self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), ctypes.c_void_p(address), ctypes.c_uint(0))
                if mapped.value != address:
                    raise TransferError("this GPU sees pinned host memory at another address; use communication_type tcp")
            except TransferError:
                self.unpin(address, device)
                raise

    def unpin(self, address: int, device: int) -> None:
        """What ``pin`` locked. The device must be done with it."""
        with self.on(device):
            self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    @property
    def has_batch(self) -> bool:
        """Whether ``copy_batch_async`` works: CUDA 13 and newer."""
        return hasattr(self._lib, "cuMemcpyBatchAsync_v2")

    def copy_batch_async(self, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray, stream: int, device: int) -> None:
        """Enqueue many copies at once for the copy engines; uint64 arrays of addresses and bytes, which may go when this returns.
        ``stream`` is not the default one."""
        assert dsts.dtype == srcs.dtype == sizes.dtype == np.uint64 and len(dsts) == len(srcs) == len(sizes)
        attributes, first = _CopyAttributes(order=_STREAM_ORDER, flags=_BESIDE_COMPUTE), ctypes.c_size_t(0)
        with self.on(device):
            self._call(
                "cuMemcpyBatchAsync_v2", _address(dsts), _address(srcs), _address(sizes), ctypes.c_size_t(len(sizes)),
                ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1), ctypes.c_void_p(stream),
            )  # fmt: skip


@functools.cache
def driver() -> Driver:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise TransferError("libcuda.so.1 is not on this machine: CUDA backends need an NVIDIA driver; use tcp or shm") from None
    return Driver(library)


class _Span:
    """Lets torch see memory it did not allocate; frees it when the last tensor over it is gone."""

    def __init__(self, address: int, nbytes: int, device: int) -> None:
        self._address, self._device = address, device
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    def __del__(self) -> None:
        driver().free(self._address, self._device)


def alloc_tensor(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes], zeroed, from plain device memory (exportable); freed with its last view."""
    index = device.index or 0
    torch.cuda.synchronize(device)  # makes torch's context before ours is asked for
    return torch.as_tensor(_Span(driver().alloc(nbytes, index), nbytes, index), device=device)
