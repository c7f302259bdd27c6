"""A cluster file: groups, overrides, and what is refused."""

import pytest

from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.errors import ConfigError
from ksana_lab.types import Role

FILE = """
model_dir: /m
router: {port: auto}
nodes:
  prefill: {role: prefill, count: 2, tensor_parallel_size: 2}
  decode: {role: decode, ports: 6890}
setting:
  batch_scheduler: {max_batch_size: 16}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.yaml").write_text(FILE)
    return tmp_path / "c.yaml"


def with_text(path, old, new):
    path.write_text(FILE.replace(old, new))
    return path


def test_groups_router_and_settings(path):
    c = ClusterConfig.from_yaml(path)
    assert c.nodes["prefill"].role is Role.PREFILL and c.nodes["prefill"].count == 2
    assert c.nodes["decode"].ports == (6890,) and c.router.port == 0
    assert c.setting == {"batch_scheduler": {"max_batch_size": 16}} and c.base_dir == str(path.parent)


def test_a_single_value_stands_for_a_list_and_auto_for_an_empty_one(path):
    c = ClusterConfig.from_yaml(path, overrides=["nodes.decode.ports=auto", "nodes.decode.hosts=10.0.0.1", "nodes.decode.device_ids=[3]"])
    decode = c.nodes["decode"]
    assert (decode.ports, decode.hosts, decode.device_ids) == ((), ("10.0.0.1",), ((3,),))


def test_overrides_reach_the_file_and_ksanallms_keys(path):
    changes = ["router.policy=random", "nodes.prefill.count=3", "max_batch_size=7", "nodes.decode.max_token_len=99", "transfer_mode=bulk"]
    c = ClusterConfig.from_yaml(path, overrides=changes)
    assert c.router.policy == "random" and c.nodes["prefill"].count == 3
    assert c.setting["batch_scheduler"]["max_batch_size"] == 7 and c.ksana_lab == {"transfer_mode": "bulk"}
    assert c.nodes["decode"].setting == {"batch_scheduler": {"max_token_len": 99}}


def test_the_model_option_wins_over_every_group(path):
    with_text(path, "role: decode,", "role: decode, model_dir: /group,")
    assert ClusterConfig.from_yaml(path).nodes["decode"].model_dir == "/group"
    c = ClusterConfig.from_yaml(path, model_dir="/option")
    assert c.model_dir == "/option" and c.nodes["decode"].model_dir is None
    assert ClusterConfig.from_yaml(path, overrides=["nodes.decode.model_dir=/d"]).nodes["decode"].model_dir == "/d"


@pytest.mark.parametrize("options", [{}, {"model_dir": "/option"}, {"overrides": ["nodes.mixed.count=2"]}])
@pytest.mark.parametrize("nodes", ["[mixed]", "mixed", "[1]", "1"])
def test_nodes_without_names_are_refused_whatever_is_given_beside_the_file(path, nodes, options):
    path.write_text(f"nodes: {nodes}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: nodes must hold groups by their names, got"):
        ClusterConfig.from_yaml(path, **options)


def test_a_group_called_by_a_number_is_refused_beside_an_override(path):
    path.write_text("nodes: {1: {role: mixed}}\n")
    with pytest.raises(ConfigError, match="the groups are 1"):
        ClusterConfig.from_yaml(path, overrides=["nodes.mixed.count=2"])


def test_role_none_is_a_mixed_group(path):
    c = ClusterConfig.from_yaml(with_text(path, "role: prefill, count: 2", "role: none"), overrides=["nodes.decode.role=mixed"])
    assert {group.role for group in c.nodes.values()} == {Role.MIXED}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count: 2", "cout: 2", r"nodes\.prefill\.cout is not a known key; did you mean count\?"),
        ("router:", "ruter:", r"ruter is not a known key; did you mean router\?"),
        ("{port: auto}", "{polcy: random}", r"router\.polcy is not a known key; did you mean policy\?"),
        ("role: decode", "role: decoder", r"nodes\.decode\.role: .*got 'decoder'"),
        ("role: decode", "role: prefill", "there is no decode node; prefill and decode need each other"),
        ("role: decode", "role: mixed", "there is no decode node"),
        ("ports: 6890", "count: 2, ports: 6890", r"ports: 1 given for 2 nodes"),
        ("ports: 6890", "count: 3, hosts: [10.0.0.1, 10.0.0.2]", r"hosts: 2 given for 3 nodes"),
        ("ports: 6890", "hosts: localhost", "'localhost' is not an IP address"),
        ("ports: 6890", "ports: 70000", r"nodes\.decode\.ports\.0: .*got 70000"),
        ("decode: {", "decode2: {", "'decode2' cannot name a group"),
        ("  prefill: {role: prefill, count: 2, tensor_parallel_size: 2}\n  decode: {role: decode, ports: 6890}\n", "", "nodes is missing"),
    ],
)
def test_a_mistake_names_file_key_and_advice(path, old, new, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ClusterConfig.from_yaml(with_text(path, old, new))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nodes.x.count=1", "the groups are prefill, decode"),
        ("nodes.decode.cnt=1", r"nodes\.decode\.cnt is not a known key; did you mean count\?"),
        ("ruter.policy=random", r"did you mean router\?"),
        ("max_batchsize=1", r"did you mean batch_scheduler\.max_batch_size\?"),
        ("setting.batch_scheduler.max_batchsize=1", r"did you mean max_batch_size\?"),
    ],
)
def test_a_mistaken_override_names_the_nearest_key(path, override, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.from_yaml(path, overrides=[override])
