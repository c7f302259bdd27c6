"""What a step's error is blamed on."""

import pytest

from ksana_lab.engine import executor
from ksana_lab.engine.executor import Executor
from ksana_lab.errors import EngineDead, KsanaLabError


class Child:
    def __init__(self, is_alive: bool) -> None:
        self.is_alive = is_alive

    def describe_end(self) -> EngineDead:
        return EngineDead("tensor-parallel rank 1 ended with status -9", "its last line")


class Pending:
    def result(self):
        raise KsanaLabError("a peer did not come to an all-reduce")


@pytest.mark.parametrize(("is_alive", "error", "text"), [(False, EngineDead, "rank 1 ended"), (True, KsanaLabError, "did not come")])
def test_a_dead_rank_explains_worthless_tokens(monkeypatch, is_alive, error, text):
    monkeypatch.setattr(executor, "_DEATH_NOTICE_S", 0.0)
    runner = Executor.__new__(Executor)
    runner._children = [Child(is_alive)]
    with pytest.raises(KsanaLabError, match=text) as caught:
        runner.result(Pending())
    assert type(caught.value) is error
