"""What all tests share: GPU tests are skipped with a reason where there is no GPU, no test reaches a proxy, and children hear Ctrl-C."""

import os
import signal

import pytest

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it, and so would its children


def pytest_collection_modifyitems(items):
    needs = {item: 2 if item.get_closest_marker("multi_gpu") else 1 for item in items if _is_gpu_test(item)}
    num_gpus = _num_gpus() if needs else 0
    for item, needed in needs.items():
        if num_gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {num_gpus}"))


def _is_gpu_test(item) -> bool:
    return any(item.get_closest_marker(name) for name in ("gpu", "multi_gpu"))


def _num_gpus() -> int:
    import torch  # only when a GPU test was collected: it takes seconds

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
