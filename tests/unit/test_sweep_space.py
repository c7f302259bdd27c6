"""Axes to points, seeds, baselines; what is wrong in a sweep's file is said in one line before anything starts."""

import itertools
import shutil
from pathlib import Path

import pytest
from helpers_sweep import CLUSTER, write_sweep

from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.errors import ConfigError
from ksana_lab.sweep import space as space_module
from ksana_lab.sweep.space import Space, SweepConfig, cluster_text


def space(folder, overrides=(), **changes) -> Space:
    path = write_sweep(folder, **changes)
    return Space(SweepConfig.from_yaml(path, overrides=overrides), source=str(path))


def of(a_space, is_baseline):
    return [setup for setup in a_space.setups if setup.is_baseline is is_baseline]


SPLITS = {"1P2D": {"nodes.prefill.count": 1, "nodes.decode.count": 2}, "2P1D": {"nodes.prefill.count": 2, "nodes.decode.count": 1}}

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,4,4\n2023-11-16 18:15:47.0,4,4\n"


def test_a_product_has_every_combination_and_zip_pairs_them(tmp_path):
    axes = {"rate": [1, 2], "max_batch_size": [4, 8]}
    product = of(space(tmp_path, axes=axes), False)
    assert {(s.labels["rate"], s.labels["max_batch_size"]) for s in product} == {(1, 4), (1, 8), (2, 4), (2, 8)}
    zipped = of(space(tmp_path, axes=axes, combine="zip"), False)
    assert [(s.workload.rate, s.cluster.setting["batch_scheduler"]["max_batch_size"]) for s in zipped] == [(1, 4), (2, 8)]


def test_axes_that_advance_together_are_multiplied_with_the_rest(tmp_path):
    axes = {"prompt_tokens": [16, 16, 32], "max_batch_size": [4, 8], "rate": [1, 2, 1]}
    setups = of(space(tmp_path, axes=axes, combine=[["prompt_tokens", "rate"]]), False)
    pairs = [(16, 1), (16, 2), (32, 1)]
    assert {tuple(s.labels[name] for name in axes) for s in setups} == {(p, batch, rate) for p, rate in pairs for batch in (4, 8)}
    assert len(setups) == 6


def test_repeats_follow_one_start_of_a_cluster_or_go_through_the_clusters_there_and_back(tmp_path):
    axes = {"max_batch_size": [4, 8], "rate": [1, 2]}
    blocks, turns = (
        [(p.setup.system[:3] + str(p.setup.labels.get("max_batch_size", "")), p.setup.labels["rate"], p.repeat) for p in found.points()]
        for found in (space(tmp_path, axes=axes, repeats=3, interleave=way) for way in (False, True))
    )
    order = lambda points: [cluster for cluster, _ in itertools.groupby(points, key=lambda point: point[0])]  # noqa: E731
    assert sorted(blocks) == sorted(turns) and len(order(blocks)) == len(set(order(blocks)))
    there = order(blocks)
    assert order(turns) == [*there, *there[-2::-1], *there[1:]]
    assert [point[1:] for point in turns if point[0] == "dis4"] == [(rate, repeat) for repeat in range(3) for rate in (1, 2)]


def test_interleaving_does_not_go_with_a_search(tmp_path):
    with pytest.raises(ConfigError, match="interleave does not go with search"):
        space(tmp_path, interleave=True, slo={"ttft_s": 1}, search={"low": 1, "high": 2})


def test_a_linked_axis_sets_several_keys_under_one_label(tmp_path):
    a_space = space(tmp_path, axes={"split": SPLITS})
    made = {s.labels["split"]: [g.count for g in s.cluster.nodes.values()] for s in of(a_space, False)}
    assert made == {"1P2D": [1, 2], "2P1D": [2, 1]}


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("nodes.decode.tensor_parallel_size", 2, lambda s: s.cluster.nodes["decode"].tensor_parallel_size),
        ("transfer_mode", "bulk", lambda s: s.cluster.ksana_lab["transfer_mode"]),
        ("transfer_layer_chunk_size", 3, lambda s: s.cluster.setting["batch_scheduler"]["transfer_layer_chunk_size"]),
        ("ksana_lab.link.bandwidth_gbps", 2.5, lambda s: s.cluster.ksana_lab["link"]["bandwidth_gbps"]),
        ("nodes.prefill.max_step_tokens", 64, lambda s: s.cluster.nodes["prefill"].setting["batch_scheduler"]["max_step_tokens"]),
        ("router.policy", "random", lambda s: s.cluster.router.policy),
        ("workload.burstiness", 0.5, lambda s: s.workload.burstiness),
        ("prompt_tokens", {"kind": "uniform", "low": 2, "high": 3}, lambda s: s.workload.prompt_tokens.model_dump()),
        ("trace.path", "azure_llm_2023_conv_sample", lambda s: s.workload.trace.path),
    ],
)
def test_an_axis_may_name_any_key_of_cluster_or_workload(tmp_path, key, value, read):
    assert read(of(space(tmp_path, axes={key: [value]}), False)[0]) == value


def test_a_null_value_unsets_a_key_and_is_labelled(tmp_path):
    setup = of(space(tmp_path, axes={"ksana_lab.link.bandwidth_gbps": [1, None]}), False)[1]
    assert setup.labels["ksana_lab.link.bandwidth_gbps"] == "unset" and "bandwidth_gbps" not in setup.cluster.ksana_lab["link"]


def test_the_baseline_has_as_many_ranks_and_the_same_requests(tmp_path):
    nodes = {"nodes.prefill.count": 2, "nodes.decode.tensor_parallel_size": 2}
    a_space = space(tmp_path, set=nodes)
    (pair,), (mixed,) = of(a_space, False), of(a_space, True)
    assert a_space.columns(mixed)["num_gpus"] == a_space.columns(pair)["num_gpus"] == 4
    assert (a_space.columns(pair)["split"], a_space.columns(mixed)["split"]) == ("2P(TP1) 1D(TP2)", "2 mixed TP2")
    assert a_space.point(mixed, 0).workload == a_space.point(pair, 0).workload


def test_one_baseline_serves_all_points_that_differ_only_in_the_transfer(tmp_path):
    mixed = of(space(tmp_path, axes={"transfer_mode": ["bulk", "chunk", "layer"], "rate": [1, 2]}), True)
    assert [dict(s.labels) for s in mixed] == [{"rate": 1}, {"rate": 2}]


def test_splits_of_one_size_share_their_baseline(tmp_path):
    a_space = space(tmp_path, axes={"split": SPLITS})
    assert [a_space.columns(s)["split"] for s in of(a_space, True)] == ["3 mixed"]


def test_mixed_nodes_take_the_larger_of_two_limits(tmp_path):
    limits = {"nodes.prefill.max_batch_size": 4, "nodes.decode.max_batch_size": 32, "nodes.prefill.max_step_tokens": 2048}
    group = of(space(tmp_path, set=limits), True)[0].cluster.nodes["mixed"]
    assert group.setting["batch_scheduler"] == {"max_batch_size": 32, "max_step_tokens": 2048}


def test_the_baseline_can_be_changed_and_left_out(tmp_path):
    changed = of(space(tmp_path, baseline={"set": {"max_step_tokens": 99}}), True)[0]
    assert changed.cluster.setting["batch_scheduler"]["max_step_tokens"] == 99
    assert of(space(tmp_path, baseline=False), True) == []


def test_a_baseline_keeps_gpus_and_hosts(tmp_path):
    nodes = {"prefill": {"role": "prefill", "device_ids": [3]}, "decode": {"role": "decode", "device_ids": [1]}}
    a_space = space(tmp_path, cluster_file={**CLUSTER, "nodes": nodes, "ksana_lab": {"device": "cuda"}})
    assert of(a_space, True)[0].cluster.nodes["mixed"].device_ids == ((3,), (1,))


def test_repeats_differ_in_seed_and_rates_share_no_prompts(tmp_path):
    points = space(tmp_path, axes={"rate": [1, 2]}, repeats=3, baseline=False).points()
    assert len({point.workload.seed for point in points}) == len(points) == 6


def test_points_are_ordered_so_that_each_cluster_starts_once(tmp_path):
    points = space(tmp_path, axes={"rate": [1, 2], "max_batch_size": [4, 8, 16]}).points()
    keys = [point.cluster_key for point in points]
    assert len(set(keys)) == 1 + sum(a != b for a, b in itertools.pairwise(keys)) == 6


def test_a_run_id_depends_on_configuration_workload_trace_and_code(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    workload = {"trace": {"path": "trace.csv"}}
    ids = [space(tmp_path, workload=workload).points()[0].run_id("a") for _ in range(2)]
    ids.append(space(tmp_path, workload=workload, set={"max_step_tokens": 8}).points()[0].run_id("a"))
    ids.append(space(tmp_path, workload=workload).points()[0].run_id("b"))
    trace.write_text(trace.read_text().replace("47.0,4", "47.0,5"))
    ids.append(space(tmp_path, workload=workload).points()[0].run_id("a"))
    assert ids[0] == ids[1] and len(set(ids)) == 4


def identities(path):
    points = Space(SweepConfig.from_yaml(path), source=str(path)).points()
    return [(point.workload.seed, point.run_id("a")) for point in points]


def test_seeds_and_run_ids_do_not_depend_on_where_the_sweep_lies_and_how_its_path_is_typed(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "trace.csv").write_text(TRACE)
    path = write_sweep(here, workload={"trace": {"path": "trace.csv"}}, axes={"time_scale": [1, 2]})
    shutil.copytree(here, there)
    monkeypatch.chdir(here)
    assert identities(path) == identities("sweep.yaml") == identities(there / "sweep.yaml") == identities("../there/sweep.yaml")


def test_a_trace_is_found_beside_the_sweep_however_it_is_named(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE)
    on_an_axis = space(tmp_path, workload={"num_requests": 2}, axes={"trace.path": ["trace.csv"]})
    in_a_tree = space(tmp_path, workload={"num_requests": 2}, axes={"t": {"key": "trace", "values": [{"path": "trace.csv", "skip": 0}]}})
    overridden = space(tmp_path, overrides=["workload.trace.path=trace.csv"])
    for a_space in (on_an_axis, in_a_tree, overridden):
        assert Path(a_space.setups[0].workload.trace.path) == (tmp_path / "trace.csv").resolve()
    assert on_an_axis.setups[0].labels == {"trace.path": "trace.csv"}


def test_a_tokenizer_lies_beside_the_sweep_and_counts_by_content(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "model").mkdir()
    ids = []
    for text in ("{}", "{}", '{"version": "1.0"}'):
        (tmp_path / "model" / "tokenizer.json").write_text(text)
        a_space = space(tmp_path, workload={"trace": {"path": "trace.csv", "tokenizer_dir": "model"}})
        assert a_space.setups[0].workload.trace.tokenizer_dir == str((tmp_path / "model").resolve())
        ids.append(a_space.points()[0].run_id("a"))
    assert ids[0] == ids[1] != ids[2]


def test_how_a_run_is_measured_is_part_of_its_id_and_not_of_its_requests(tmp_path):
    points = [space(tmp_path, **changes).points()[0] for changes in ({}, {"request_timeout_s": 5}, {"events": True})]
    assert len({point.run_id("a") for point in points}) == 3
    assert len({point.workload.seed for point in points}) == 1


def test_another_way_of_expanding_workloads_gives_other_seeds_and_ids(tmp_path, monkeypatch):
    before = space(tmp_path).points()[0]
    monkeypatch.setattr(space_module, "WORKLOAD_VERSION", space_module.WORKLOAD_VERSION + 1)
    after = space(tmp_path).points()[0]
    assert (before.workload.seed, before.run_id("a")) != (after.workload.seed, after.run_id("a"))


def test_a_checkpoint_counts_by_its_files_and_not_by_its_path(tmp_path):
    weights = bytearray(3 << 20)
    ids = []
    for name, byte in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        weights[-1] = byte
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        ids.append(space(tmp_path, model_dir=str(tmp_path / name)).points()[0].run_id("a"))
    assert ids[0] == ids[1] != ids[2]


def test_a_resolved_cluster_can_be_read_back(tmp_path):
    for setup in space(tmp_path, axes={"split": SPLITS}).setups:
        (tmp_path / "again.yaml").write_text(cluster_text(setup.cluster))
        assert ClusterConfig.from_yaml(tmp_path / "again.yaml") == setup.cluster


def test_a_password_is_not_kept(tmp_path):
    setup = space(tmp_path, set={"router.database_url": "mysql://lab:secret@db/x"}).setups[0]
    assert "secret" not in cluster_text(setup.cluster)


def test_a_duration_sets_the_number_of_requests(tmp_path):
    setups = of(space(tmp_path, axes={"rate": [2, 8]}, duration_s=10), False)
    assert [s.workload.num_requests for s in setups] == [20, 80]


def test_overrides_reach_the_sweep_its_axes_and_its_cluster(tmp_path):
    a_space = space(tmp_path, overrides=["repeats=2", "workload.num_requests=3", "axes.rate=[1]", "max_step_tokens=7", "cluster.seed=5"])
    point = a_space.points()[0]
    assert (len(a_space.points()), point.workload.num_requests, point.workload.rate) == (4, 3, 1)
    assert (point.setup.cluster.setting["batch_scheduler"]["max_step_tokens"], point.setup.cluster.ksana_lab["seed"]) == (7, 5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"axes": {"transfer_mod": ["bulk"]}}, "transfer_mod is not a known key; did you mean ksana_lab.transfer_mode?"),
        ({"axes": {"burstines": [1]}}, "burstines is not a known key; did you mean burstiness?"),
        ({"axes": {"nodes.prefil.count": [1]}}, "did you mean prefill?"),
        ({"set": {"repeat": 3}}, "repeat is not a known key; did you mean repeats?"),  # --set repeat=3
        ({"axes": {"workload.rte": [1]}}, "rte is not a known key; did you mean rate?"),
        ({"axes": {"nodes.prefill.count": [0]}}, "greater than or equal to 1"),
        ({"axes": {"transfer_mode": ["sideways"]}}, "ksana_lab.transfer_mode: must be"),
        ({"axes": {"rate": [-1]}}, "rate"),
        ({"axes": {"rate": []}}, "axes.rate has no values"),
        ({"axes": {"rate": 3}}, "expected a list of values"),
        ({"axes": {"seed": [1, 2]}}, "a column of this name"),
        ({"axes": {"workload.seed": [1, 2]}}, "a column of this name"),
        ({"axes": {"a": {"key": "rate", "values": [1]}, "rate": [2]}}, "axes.a and axes.rate both set rate"),
        ({"axes": {"rate": [1, 2], "max_batch_size": [1]}, "combine": "zip"}, "needs axes of one length"),
        ({"axes": {"rate": [1, 2]}, "combine": [["ratte"]]}, "combine names ratte, which is no axis; did you mean rate?"),
        ({"axes": {"rate": [1, 2]}, "combine": [["rate"], ["rate"]]}, "names an axis twice"),
        ({"slo": {"tfft_s": 1}}, "slo.tfft_s is not a metric an SLO can bound; did you mean ttft_s?"),
        ({"repeat": 3}, "repeat is not a known key; did you mean repeats?"),
        ({"cluster": "none.yaml"}, "cannot read"),
        ({"workload": {"trace": {"path": "none.csv"}}}, "trace 'none.csv' is no file"),
        ({"workload": {"rate": 1, "users": 2}}, "exclude each other"),
        ({"duration_s": 3, "workload": {"users": 1}}, "duration_s needs a finite workload.rate"),
        ({"slo": None, "search": {"low": 1, "high": 2}}, "search needs slo"),
        ({"search": {"low": 2, "high": 1}}, "must be below search.high"),
        ({"search": {"low": 1, "high": 2}, "axes": {"rate": [1]}}, "search tries rates of its own"),
        ({"baseline": {"tensor_parallel_size": 3}}, "does not divide the 2 GPUs of 1P1D"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, changes, says):
    with pytest.raises(ConfigError) as caught:
        space(tmp_path, **changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_are_shipped_are_whole(path):
    a_space = Space(SweepConfig.from_yaml(path), source=str(path))
    sizes = {a_space.columns(setup)["num_gpus"] for setup in a_space.setups}
    assert of(a_space, True) and len(sizes) == 1  # every system has the same number of GPUs
