"""What a process finds in its environment: the three required variables, proxies, GPUs. Knows nothing of configuration files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from ksana_lab.errors import ConfigError

if TYPE_CHECKING:
    from ksana_lab.config.engine import RuntimeOptions

# Name -> value, and what the reference does with it (docs/pd_startup.md).
REQUIRED_VARIABLES: dict[str, str] = {
    "SELECT_ALL_REDUCE_BY_SIZE": "1",  # all-reduce chosen by message size
    "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",  # no stream synchronisation around each all-reduce
    "ENABLE_LAYER_TRACKER": "1",  # without it a prefill node never sends a layer
}

ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"

INSTALL_NIXL = "pip install 'nixl>=1.5'"  # the optional transfer backend's package

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "ws_proxy", "wss_proxy")


def missing_variables(env: Mapping[str, str]) -> list[str]:
    """The required variables that ``env`` lacks, or holds with a value that does not do what is required."""
    return [name for name, value in REQUIRED_VARIABLES.items() if not _does_the_job(name, env.get(name), value)]


def _does_the_job(name: str, found: str | None, required: str) -> bool:
    if found is None:
        return False
    if name == "SELECT_ALL_REDUCE_BY_SIZE":
        return True  # the reference asks for its presence only, whatever the value
    if name == ALLOCATOR_VARIABLE:
        return required in found
    return found == required


def explain_missing(name: str, env: Mapping[str, str]) -> str:
    """One line that names the variable and shows the export."""
    found = env.get(name)
    state = "is not set" if found is None else f"is {found!r}"
    return f"environment variable {name} {state}; run: export {name}={REQUIRED_VARIABLES[name]}"


def require_variables(env: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first missing variable; one line, so the others come on the next attempt or from ``doctor``."""
    missing = missing_variables(env)
    if missing:
        more = f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""
        raise ConfigError(explain_missing(missing[0], env) + more)


def child_environment(env: Mapping[str, str], extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A copy of ``env`` for a child process: required variables set, proxies gone, the rest (NCCL_*, CUDA_VISIBLE_DEVICES) as found."""
    child = {name: value for name, value in env.items() if not is_proxy(name)}
    for name in missing_variables(env):
        child[name] = REQUIRED_VARIABLES[name]
    child["no_proxy"] = child["NO_PROXY"] = "*"
    child["PYTHONUNBUFFERED"] = "1"
    return {**child, **(extra or {})}


def has_cuda_graphs(runtime: RuntimeOptions) -> bool:
    """Whether an engine so configured captures CUDA graphs, here."""
    return runtime.enable_cuda_graph and runtime.device != "cpu" and visible_gpus() > 0


def engine_environment(env: Mapping[str, str], *, has_cuda_graphs: bool) -> dict[str, str]:
    """``child_environment`` for an engine. With CUDA graphs the allocator's backend is torch's own after all: what is allocated during a
    capture under cudaMallocAsync has no memory behind it yet, and Triton (3.6) refuses such pointers (docs/LOG.md, 2026-11-22)."""
    child = child_environment(env)
    if has_cuda_graphs:
        options = child[ALLOCATOR_VARIABLE].split(",")
        child[ALLOCATOR_VARIABLE] = ",".join(option for option in options if not option.strip().startswith("backend:"))
    return child


def is_proxy(name: str) -> bool:
    return name.lower() in PROXY_VARIABLES


def drop_proxies(env: MutableMapping[str, str]) -> list[str]:
    """Remove the proxy variables from ``env`` and return their names. An entry point does this to ``os.environ``: nodes, router and
    clients of one cluster talk to each other directly or not at all."""
    dropped = [name for name in env if is_proxy(name)]
    for name in dropped:
        del env[name]
    env["no_proxy"] = env["NO_PROXY"] = "*"
    return dropped


def visible_gpus(env: Mapping[str, str] | None = None) -> int:
    """How many GPUs a process with this environment can use, without importing torch. 0 when there is no driver."""
    env = os.environ if env is None else env
    installed = _installed_gpus()
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or installed == 0:
        return installed
    # CUDA stops at the first entry it does not know.
    count = 0
    for entry in chosen.split(","):
        entry = entry.strip()
        if (entry.isdecimal() and int(entry) >= installed) or not entry or entry.startswith("-"):
            break
        count += 1
    return count


def _installed_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            listed = None
        if listed is not None and listed.returncode == 0:
            return len(re.findall(r"^GPU \d+:", listed.stdout, flags=re.MULTILINE))
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0
