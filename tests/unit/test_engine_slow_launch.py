"""A step whose enqueuing takes long says why."""

from types import SimpleNamespace

import pytest
import torch

from ksana_lab.engine import worker as module
from ksana_lab.engine.commands import StepCommand
from ksana_lab.engine.worker import Worker

COMMAND = StepCommand(7, [], [], {}, [1, 2], [0, 0], [1149, 996], [True, True])


@pytest.mark.parametrize(
    ("seconds", "retries", "says"),
    [
        (0.8, 3, "3 times since the last one: raise reserved_device_memory_ratio"),
        (0.8, 0, "a shape not seen before"),
        (0.3, 3, "3 times"),
        (0.3, 0, None),
        (0.03, 3, None),
    ],
)
def test_a_slow_launch_is_explained(monkeypatch, caplog, seconds, retries, says):
    times = iter([10.0, 10.0 + seconds])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": retries})
    worker = Worker.__new__(Worker)
    worker.device, worker._num_retries = torch.device("cuda"), 0
    worker.runner = SimpleNamespace(execute=lambda command: "tokens")
    assert worker.execute(COMMAND) == "tokens"
    said = [record.getMessage() for record in caplog.records if "enqueuing step 7 (2 sequences, 2145 tokens)" in record.getMessage()]
    assert [says in line for line in said] == ([True] if says else [])
