"""Required variables, proxies, GPUs."""

import pytest

from ksana_lab.config import environment
from ksana_lab.config.environment import (
    REQUIRED_VARIABLES,
    child_environment,
    drop_proxies,
    missing_variables,
    require_variables,
    visible_gpus,
)
from ksana_lab.errors import ConfigError


def test_the_three_variables_of_the_reference_are_required():
    assert missing_variables({}) == ["SELECT_ALL_REDUCE_BY_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "ENABLE_LAYER_TRACKER"]
    assert missing_variables(REQUIRED_VARIABLES) == []


@pytest.mark.parametrize(
    ("name", "value", "is_missing"),
    [
        ("SELECT_ALL_REDUCE_BY_SIZE", "0", False),  # its presence counts
        ("ENABLE_LAYER_TRACKER", "true", True),  # only "1" counts
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", True),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,backend:cudaMallocAsync", False),
    ],
)
def test_a_value_that_does_not_do_the_job_counts_as_missing(name, value, is_missing):
    assert (missing_variables({**REQUIRED_VARIABLES, name: value}) == [name]) is is_missing


def test_the_message_is_one_line_with_the_export():
    with pytest.raises(ConfigError) as caught:
        require_variables({**REQUIRED_VARIABLES, "ENABLE_LAYER_TRACKER": "0"})
    assert str(caught.value) == "environment variable ENABLE_LAYER_TRACKER is '0'; run: export ENABLE_LAYER_TRACKER=1"


def test_a_child_gets_the_variables_and_no_proxy_and_keeps_the_rest():
    found = {"HTTP_PROXY": "http://p", "https_proxy": "http://p", "NCCL_NVLS_ENABLE": "0", "PATH": "/bin", "no_proxy": "x"}
    child = child_environment(found, {"EXTRA": "1"})
    assert missing_variables(child) == [] and child["EXTRA"] == "1"
    assert "HTTP_PROXY" not in child and "https_proxy" not in child and child["no_proxy"] == "*"
    assert child["NCCL_NVLS_ENABLE"] == "0" and child["PATH"] == "/bin"
    assert found["HTTP_PROXY"] == "http://p"  # the caller's own environment is left alone


def test_a_childs_good_value_is_kept():
    conf = "backend:cudaMallocAsync,release_threshold:1"
    assert child_environment({"PYTORCH_CUDA_ALLOC_CONF": conf})["PYTORCH_CUDA_ALLOC_CONF"] == conf


def test_an_entry_point_drops_its_proxies():
    env = {"ALL_PROXY": "socks5://p", "HOME": "/"}
    assert drop_proxies(env) == ["ALL_PROXY"]
    assert env == {"HOME": "/", "no_proxy": "*", "NO_PROXY": "*"}


@pytest.mark.parametrize(("chosen", "visible"), [(None, 4), ("", 0), ("1", 1), ("0,3", 2), ("0,9,1", 1), ("-1", 0), ("GPU-abc,1", 2)])
def test_visible_gpus_follow_cuda_visible_devices(monkeypatch, chosen, visible):
    monkeypatch.setattr(environment, "_installed_gpus", lambda: 4)
    assert visible_gpus({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}) == visible


def test_gpus_are_counted_from_nvidia_smi(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert visible_gpus({}) == 2


def test_an_engine_with_graphs_keeps_every_allocator_option_but_the_backend():
    env = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync,expandable_segments:True"}
    name = environment.ALLOCATOR_VARIABLE
    assert environment.engine_environment(env, has_cuda_graphs=True)[name] == "expandable_segments:True"
    assert environment.engine_environment(env, has_cuda_graphs=False)[name] == env[name]
