"""What a result depends on besides its configuration: code, versions, machine, variables. Reads; changes nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import ksana_lab

PACKAGE = Path(ksana_lab.__file__).resolve().parent
# Parts that read results, or only decide which runs to make: changing them makes no run another one.
_UNMEASURED = ("sweep", "notebook", "bench", "sim")
_PACKAGES = ("ksana_lab", "torch", "numpy", "triton", "transformers", "tokenizers", "aiohttp", "uvicorn", "pyzmq", "msgspec", "pandas")
_VARIABLES = ("CUDA_", "NCCL_", "NVSHMEM_", "UCX_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "TRITON_", "KSANA_LAB_")


def code_version() -> str:
    """12 digits of a hash over the package's source as far as it takes part in a run: independent of commits that change something else,
    and true where files were edited without one."""
    digest = hashlib.sha256()
    for path in sorted(_sources()):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    return (path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in _UNMEASURED)


def capture() -> dict[str, Any]:
    """For a run's folder: JSON types only. Of the variables, those that steer libraries; never a credential."""
    return {
        **_git(),
        "command": sys.argv,
        "python": sys.version.split()[0],
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def differences(environments: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Machines and software that one would not average over, where they are not the same in all: ``{"torch": {"2.5.1": 6, "2.6.0": 2}}``,
    values in the order in which they were first seen. Takes what ``capture`` gives, and ``code_version`` beside it."""
    seen: dict[str, Counter[str]] = {}
    for environment in environments:
        for name, value in _traits(environment).items():
            seen.setdefault(name, Counter())[value] += 1
    return {name: values for name, values in seen.items() if len(values) > 1}


def _traits(environment: Mapping[str, Any]) -> dict[str, str]:
    gpus = [[part.strip() for part in line.split(",")] for line in environment.get("gpus") or []]
    counts = Counter(name for name, *_ in gpus)
    changed = " with changes" if environment.get("git_dirty") else ""
    return {
        "GPUs": ", ".join(f"{count} × {name}" for name, count in counts.items()) or "none",
        "driver": ", ".join(dict.fromkeys(line[-1] for line in gpus)) or "none",
        "torch": str(environment.get("versions", {}).get("torch")),
        "host": str(environment.get("host")),
        "CPU": f"{environment.get('cpu')}, {environment.get('num_usable_cores')} cores",
        "source": str(environment.get("code_version")),
        "commit": f"{str(environment.get('git_commit'))[:10]}{changed}",
    }


def _git() -> dict[str, Any]:
    """None where the package is installed from elsewhere than a clone."""
    commit = _output("git", "-C", str(PACKAGE), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(PACKAGE), "status", "--porcelain", "--", str(PACKAGE))
    return {"git_commit": commit or None, "git_dirty": bool(changed) if commit else None}


def _gpus() -> list[str]:
    """One line per GPU: name, memory, driver."""
    query = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return query.splitlines() if query else []


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """Empty when the program is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
