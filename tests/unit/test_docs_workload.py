"""docs/workload.md names every key that a workload may have."""

from pathlib import Path

import pytest

from ksana_lab.workload.spec import Sampling, SharedPrefix, TraceSource, WorkloadSpec
from ksana_lab.workload.traces import BUNDLED, FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "workload.md").read_text()


@pytest.mark.parametrize("model", [WorkloadSpec, TraceSource, SharedPrefix, Sampling])
def test_every_key_is_there(model):
    assert [key for key in model.model_fields if key not in PAGE] == []


def test_every_format_and_sample_is_there():
    assert [name for name in (*FORMATS, *BUNDLED) if f"`{name}`" not in PAGE] == []
