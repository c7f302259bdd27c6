"""Who runs where: ports, GPUs, addresses, settings, and what overlaps."""

import itertools
from contextlib import closing
from pathlib import Path

import pytest

from ksana_lab.cluster.local import Cluster
from ksana_lab.cluster.topology import plan, refuse_contradictions
from ksana_lab.config import ksana_yaml, yaml_file
from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.config.router import RouterConfig
from ksana_lab.errors import ConfigError
from ksana_lab.types import NodeAddr, Role

CONFIGS = Path(__file__).parents[2] / "configs"


def lay_out(nodes, *, num_gpus=0, num_cores=8, trace_dir=None, **cluster):
    numbers = itertools.count(40000)
    config = ClusterConfig.model_validate({"model_dir": "/m", "nodes": nodes, **cluster})
    return plan(
        config, choose_port=lambda host: next(numbers), num_gpus=num_gpus, num_cores=num_cores, trace_dir=trace_dir, source="c.yaml"
    )


def xpyd(x=1, y=1, **decode):
    return {"p": {"role": "prefill", "count": x}, "d": {"role": "decode", "count": y, **decode}}


def test_every_process_has_a_name_a_role_and_ports_of_its_own():
    laid = lay_out(xpyd(2, 1), router={"port": "auto"})
    assert [p.name for p in laid.processes] == ["router", "p0", "p1", "d0"]
    ports = [port for process in laid.processes for port in process.ports.values()]
    assert len(ports) == len(set(ports)) == 7
    assert [(p.name, d.name) for p, d in laid.pairs()] == [("p0", "d0"), ("p1", "d0")]


def test_a_nodes_file_says_what_its_plan_says():
    laid = lay_out(xpyd(), router={"cluster_name": "lab"})
    node = laid.nodes[1]
    written = ksana_yaml.translate(yaml_file.parse(node.config_text(), "f"), "f", num_gpus=0).config
    assert written == node.config
    assert written.connector.role is Role.DECODE and written.connector.cluster_name == "lab"
    assert written.connector.router_addr == laid.router.advertised == NodeAddr("127.0.0.1", 9080)
    assert node.arguments(Path("f.yaml"))[:3] == ["decode", "--config_file", "f.yaml"]


def test_the_routers_file_says_what_its_plan_says(tmp_path):
    spec = lay_out(xpyd(), router={"policy": "random", "heartbeat_timeout_s": 3}).router
    (tmp_path / "r.yaml").write_text(spec.config_text())
    assert RouterConfig.from_file(tmp_path / "r.yaml")[0] == spec.config


def test_the_router_runs_on_the_clusters_host_unless_it_names_its_own():
    nodes = {"m": {"role": "mixed", "hosts": "10.0.0.2", "ports": 8080, "coordinator_ports": 13569}}
    laid = lay_out(nodes, host="10.0.0.1")
    assert laid.router.host == "10.0.0.1" and laid.nodes[0].config.connector.router_addr.host == "10.0.0.1"
    assert lay_out(nodes, host="10.0.0.1", router={"host": "127.0.0.1"}).router.host == "127.0.0.1"


def test_settings_of_file_cluster_and_group_lie_over_each_other(tmp_path):
    (tmp_path / "base.yaml").write_text("setting: {batch_scheduler: {max_batch_size: 1, max_step_tokens: 1, max_waiting_queue_len: 1}}\n")
    group = {"config_file": "base.yaml", "setting": {"batch_scheduler": {"max_batch_size": 3}}}
    common = {"batch_scheduler": {"max_batch_size": 2, "max_step_tokens": 2}}
    scheduler = lay_out(xpyd(**group), setting=common, base_dir=str(tmp_path)).nodes[1].config.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.max_num_waiting) == (3, 2, 1)


def test_a_base_file_of_the_reference_needs_no_placeholder():
    example = Path(__file__).parents[1] / "data" / "ksana_examples" / "ksana_llm_disaggregating_decode.yaml"
    node = lay_out(xpyd(config_file=str(example), tensor_parallel_size=1)).nodes[1]
    assert node.coordinator_addr.host == "127.0.0.1" and node.config.scheduler.max_num_seqs == 768


def test_given_gpus_are_kept_and_the_others_are_dealt_out_around_them():
    nodes = {"p": {"role": "prefill", "count": 2}, "d": {"role": "decode", "tensor_parallel_size": 2, "device_ids": [0, 2]}}
    laid = lay_out(nodes, num_gpus=4)
    assert {n.name: n.device_ids for n in laid.nodes} == {"p0": (1,), "p1": (3,), "d0": (0, 2)}
    assert yaml_file.parse(laid.nodes[2].config_text(), "f")["ksana_lab"]["device_ids"] == [0, 2]


def test_hosts_have_gpus_and_ports_of_their_own():
    nodes = {
        "p": {"role": "prefill", "hosts": "10.0.0.1", "ports": 8067, "coordinator_ports": 13569},
        "d": {"role": "decode", "hosts": "10.0.0.2", "ports": 8067, "coordinator_ports": 13569},
    }
    laid = lay_out(nodes, ksana_lab={"device": "cuda"}, host="10.0.0.1")
    assert [n.device_ids for n in laid.nodes] == [(0,), (0,)]
    assert [str(n.inference_addr) for n in laid.nodes] == ["10.0.0.1:8067", "10.0.0.2:8067"]


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (xpyd(ports=9080), {}, r"port 9080 of 127\.0\.0\.1 is given to both router and d0 \(HTTP\)"),
        (xpyd(ports=7000, coordinator_ports=7000), {}, r"both d0 \(HTTP\) and d0 \(coordinator\)"),
        (xpyd(y=2, coordinator_ports=[7000, 7000]), {}, r"both d0 \(coordinator\) and d1 \(coordinator\)"),
        (xpyd(ports=9080), {"router": {"host": "0.0.0.0"}}, "port 9080"),
        (xpyd(y=2, device_ids=[[0], [0]]), {"num_gpus": 2}, r"GPU 0 of 127\.0\.0\.1 is given to both d0 and d1; .*allow_shared_gpus"),
        (xpyd(device_ids=[0, 1]), {"num_gpus": 2}, r"nodes\.d0: device_ids \[0, 1\] for a tensor parallel size of 1"),
        (xpyd(setting={"global": {"tensor_para_siz": 1}}), {}, r"did you mean global\.tensor_para_size\?|did you mean tensor_para_size\?"),
        (xpyd(setting={"batch_scheduler": {"max_batch_size": "x"}}), {}, r"must be an integer.*c\.yaml: nodes\.d"),
        (xpyd(config_file="absent.yaml"), {}, "cannot read .*absent.yaml"),
    ],
)
def test_overlaps_and_mistakes_are_refused(nodes, options, message):
    with pytest.raises(ConfigError, match=message):
        lay_out(nodes, **options)


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("group_role", r"nodes\.d\.role"),
        ("router_addr", r"router\.host and router\.port"),
        ("inference_addr", r"nodes\.d\.hosts and nodes\.d\.ports"),
        ("coordinator_addr", r"nodes\.d\.coordinator_ports"),
        ("cluster_name", r"router\.cluster_name"),
    ],
)
def test_what_the_cluster_works_out_itself_cannot_be_asked_for(key, instead):
    with pytest.raises(ConfigError, match=rf"connector\.{key} is worked out .* give .*{instead}"):
        lay_out(xpyd(setting={"connector": {key: "127.0.0.1:1"}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tensor_para_size=16", r"nodes\.prefill: tensor_parallel_size is 1 but global\.tensor_para_size is 16; .*=16"),
        ("nodes.decode.tensor_para_size=2", r"nodes\.decode: tensor_parallel_size is 1 but .* 2; .*nodes\.decode\.tensor_parallel_size=2"),
        ("cluster_name=lab", r"give router\.cluster_name instead"),
    ],
)
def test_an_override_that_would_have_no_effect_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        Cluster.from_yaml(CONFIGS / "pd_1p1d_cpu.yaml", overrides=[override])


def test_gpus_given_twice_are_refused():
    nodes = {"m": {"role": "mixed", "device_ids": [0], "ksana_lab": {"device_ids": [1]}}}
    with pytest.raises(ConfigError, match=r"nodes\.m: its device_ids are given, and ksana_lab\.device_ids \[1\]"):
        refuse_contradictions(ClusterConfig.model_validate({"model_dir": "/m", "nodes": nodes}), "c.yaml")


def test_a_size_said_twice_alike_is_no_contradiction():
    with closing(Cluster.from_yaml(CONFIGS / "pd_1p1d_cpu.yaml", overrides=["tensor_para_size=1"])) as cluster:
        assert {node.config.parallel.tensor_parallel_size for node in cluster.plan.nodes} == {1}


def test_two_nodes_may_share_a_gpu_when_told_so():
    laid = lay_out(
        {"p": {"role": "prefill", "device_ids": [0]}, "d": {"role": "decode", "device_ids": [0]}}, num_gpus=1, allow_shared_gpus=True
    )
    assert [n.device_ids for n in laid.nodes] == [(0,), (0,)]


def test_ranks_on_one_cpu_share_its_cores():
    laid = lay_out({"p": {"role": "prefill", "tensor_parallel_size": 2}, "d": {"role": "decode"}}, num_cores=7, ksana_lab={"device": "cpu"})
    assert [n.config.runtime.num_threads for n in laid.nodes] == [2, 2]


def test_tracing_reaches_every_process(tmp_path):
    laid = lay_out(xpyd(), trace_dir=str(tmp_path))
    assert laid.router.config.trace_dir == str(tmp_path)
    assert {n.config.runtime.trace_dir for n in laid.nodes} == {str(tmp_path)}


def test_a_warning_is_said_once_for_a_group():
    laid = lay_out(xpyd(2, 2), setting={"batch_scheduler": {"mtp_step_num": 2}})
    assert len(laid.warnings) == 2 and all("mtp_step_num" in warning for warning in laid.warnings)


@pytest.mark.parametrize(("name", "roles"), [("pd_1p1d_cpu", "pd"), ("pd_2p2d_cpu", "ppdd"), ("mixed_cpu", "m"), ("pd_1p1d_h200", "pd")])
def test_our_cluster_files_lay_out_without_a_warning(name, roles):
    config = ClusterConfig.from_yaml(CONFIGS / f"{name}.yaml")
    numbers = itertools.count(40000)
    laid = plan(config, choose_port=lambda host: next(numbers), num_gpus=2)
    assert "".join(n.role.value[0] for n in laid.nodes) == roles and laid.warnings == []


def test_the_table_shows_process_ports_and_gpus():
    table = lay_out(xpyd(device_ids=[1]), num_gpus=2).table().splitlines()
    assert table[0].split() == ["process", "role", "host", "ports", "ranks", "devices"]
    assert "9080" in table[1] and "GPU 1" in table[3] and "decode" in table[3]
