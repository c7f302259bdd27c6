"""Running, failing, stopping and resuming a sweep, with a cluster and a player that are no processes."""

import asyncio
import json
import logging
import threading
from pathlib import Path

import pytest
from helpers_sweep import FakeClusters, FakePlayer, fake_sweep, write_sweep

from ksana_lab.errors import ConfigError
from ksana_lab.metrics.export import load_records
from ksana_lab.sweep import runner
from ksana_lab.sweep.report import load_requests
from ksana_lab.sweep.runner import LoadPlayer, Stopped, Sweep
from ksana_lab.workload.spec import WorkloadSpec
from ksana_lab.workload.stub import StubServer

RATES = {"rate": [1, 2, 8]}
TWO_RATES = {"rate": [1, 2]}


async def test_every_point_becomes_a_row(tmp_path):
    steps = []
    runs = await fake_sweep(tmp_path, axes=RATES, repeats=2).run(on_progress=steps.append)
    assert len(runs) == 3 * 2 * 2 and runs["run_id"].is_unique
    assert set(runs["system"]) == {"disaggregated", "aggregated"} and set(runs["split"]) == {"1P1D", "2 mixed"}
    assert dict(runs.groupby("rate")["slo_attainment"].mean()) == {1: 1.0, 2: 1.0, 8: 0.0}
    assert [step.state for step in steps if step.state not in ("starting", "measuring")] == ["done"] * 12
    assert (steps[-1].num_done, steps[-1].total) == (12, 12) and steps[-1].row["ttft_s_p50"] > 0


def test_a_cluster_is_started_once_for_all_its_points_and_closed(tmp_path):
    clusters = FakeClusters()
    fake_sweep(tmp_path, clusters=clusters, axes={**RATES, "max_batch_size": [4, 8]}, baseline=False).run_sync()
    assert len(clusters.started) == 2 and clusters.open == 0


def test_a_runs_folder_holds_all_of_it(tmp_path):
    row = fake_sweep(tmp_path, baseline=False).run_sync().iloc[0]
    folder = tmp_path / "out" / "runs" / row["run_id"]
    names = {"cluster.yaml", "workload.yaml", "environment.json", "records.jsonl", "report.json", "summary.json", "vllm.json", "point.json"}
    assert names <= {path.name for path in folder.iterdir()}
    environment, vllm = (json.loads((folder / name).read_text()) for name in ("environment.json", "vllm.json"))
    assert {"git_commit", "git_dirty", "versions", "host", "cpu", "gpus", "variables", "code_version"} <= environment.keys()
    assert (vllm["num_prompts"], vllm["completed"], vllm["request_rate"]) == (5, 5, 4.0)
    assert WorkloadSpec.from_yaml(folder / "workload.yaml").seed == row["seed"]
    assert len(load_records(folder / "records.jsonl")) == 5
    assert json.loads((folder / "report.json").read_text())["is_trustworthy"] is True


def test_what_is_finished_is_not_made_again(tmp_path):
    fake_sweep(tmp_path, axes={"rate": [1, 2]}).run_sync()
    clusters, player = FakeClusters(), FakePlayer()
    runs = fake_sweep(tmp_path, axes=RATES, clusters=clusters, player=player).run_sync()
    assert [spec.rate for spec in player.played] == [8, 8] and len(runs) == 6
    assert fake_sweep(tmp_path, axes={"rate": [1]}).run_sync()["rate"].tolist() == [1, 1]  # the others are no part of it now


def test_a_changed_timeout_is_measured_anew(tmp_path):
    fake_sweep(tmp_path, baseline=False).run_sync()
    player = FakePlayer()
    runs = fake_sweep(tmp_path, baseline=False, request_timeout_s=5, player=player).run_sync()
    assert len(player.played) == len(runs) == 1


def test_kept_runs_get_the_columns_of_the_sweep_as_it_is_now(tmp_path):
    for size in (4, 8):
        fake_sweep(tmp_path, axes=TWO_RATES, set={"max_batch_size": size}, baseline=False).run_sync()
    player = FakePlayer()
    sweep = fake_sweep(tmp_path, axes={"max_batch_size": [4, 8], **TWO_RATES}, baseline=False, player=player)
    runs = sweep.run_sync()
    assert player.played == [] and sorted(zip(runs["max_batch_size"], runs["rate"], strict=True)) == [(4, 1), (4, 2), (8, 1), (8, 2)]
    table = (sweep.folder / "results.md").read_text().splitlines()
    assert "| max_batch_size |" in table[2] and [line for line in table if "1P1D | 8 | 2 | 1 |" in line]
    requests = load_requests(sweep.folder)
    assert requests.groupby("max_batch_size")["run_id"].nunique().to_dict() == {4: 2, 8: 2}


def test_an_axis_of_another_name_leaves_no_column_of_the_former(tmp_path):
    for name in ("batch", "limit"):
        runs = fake_sweep(tmp_path, axes={name: {"key": "max_batch_size", "values": [4, 8]}}, baseline=False).run_sync()
    assert len(runs) == 2 and "batch" not in runs and runs["limit"].tolist() == [4, 8]
    requests = load_requests(tmp_path / "out")
    assert "batch" not in requests and requests.groupby("limit")["run_id"].nunique().tolist() == [1, 1]


def test_labels_that_changed_places_are_those_of_the_file(tmp_path):
    sizes, steps = {"low": 4, "high": 8}, []
    fake_sweep(tmp_path, axes={"size": {name: {"max_batch_size": size} for name, size in sizes.items()}}, baseline=False).run_sync()
    swapped = {"high": {"max_batch_size": 4}, "low": {"max_batch_size": 8}}
    runs = fake_sweep(tmp_path, axes={"size": swapped}, baseline=False).run_sync(on_progress=steps.append)
    assert [step.state for step in steps] == ["kept", "kept"] and [step.row["size"] for step in steps] == ["high", "low"]
    assert runs["size"].tolist() == ["high", "low"]
    assert ["max_batch_size: 4" in (Path(folder) / "cluster.yaml").read_text() for folder in runs["folder"]] == [True, False]


def test_runs_of_a_former_definition_are_counted_and_come_back_with_it(tmp_path):
    fake_sweep(tmp_path, axes=TWO_RATES, baseline=False).run_sync()
    shorter = fake_sweep(tmp_path, axes={"rate": [2]}, baseline=False)
    assert len(shorter.run_sync()) == 1 and "and 1 other runs" in shorter.describe()
    assert "holds 1 other finished runs" in (tmp_path / "out" / "results.md").read_text()
    player = FakePlayer()
    assert len(fake_sweep(tmp_path, axes=TWO_RATES, baseline=False, player=player).run_sync()) == 2 and player.played == []
    assert "other finished runs" not in (tmp_path / "out" / "results.md").read_text()


def test_a_folder_of_several_environments_says_so(tmp_path, caplog):
    (first,) = fake_sweep(tmp_path, axes={"rate": [1]}, baseline=False).run_sync()["run_id"]
    path = tmp_path / "out" / "runs" / first / "environment.json"
    environment = json.loads(path.read_text())
    elsewhere = {"gpus": ["NVIDIA X9, 81920 MiB, 1.2"], "versions": {**environment["versions"], "torch": "0.0.1"}}
    path.write_text(json.dumps(environment | elsewhere))
    with caplog.at_level(logging.WARNING, runner.__name__):
        fake_sweep(tmp_path, axes=TWO_RATES, baseline=False).run_sync()
    (warning,) = [record.getMessage() for record in caplog.records if "another environment" in record.getMessage()]
    table = (tmp_path / "out" / "results.md").read_text()
    for said in (warning, table):
        assert "torch" in said and "0.0.1" in said and "1 × NVIDIA X9" in said and "host" not in said


def test_a_failed_point_is_recorded_the_rest_goes_on_and_it_is_tried_again(tmp_path):
    clusters = FakeClusters()
    player = FakePlayer(fault=lambda spec: "503: no" if spec.rate == 2 else None)
    sweep = fake_sweep(tmp_path, axes=RATES, baseline=False, clusters=clusters, player=player)
    assert sweep.run_sync()["rate"].tolist() == [1, 8]
    assert [failure["error"] for failure in sweep.failures] == ["KsanaLabError: no request completed; the first said: 503: no"]
    assert len(clusters.started) == 2  # nobody knows in what state the first was
    again = fake_sweep(tmp_path, axes=RATES, baseline=False)
    assert len(again.run_sync()) == 3 and again.failures == []


def test_a_cluster_that_does_not_start_fails_its_points_once(tmp_path):
    clusters = FakeClusters(broken=lambda config: "mixed" in config.nodes)
    sweep = fake_sweep(tmp_path, axes=RATES, clusters=clusters)
    assert set(sweep.run_sync()["system"]) == {"disaggregated"} and len(clusters.started) == 1
    errors = [failure["error"] for failure in sweep.failures]
    assert len(errors) == 3 and all("cannot find its weights" in error for error in errors)


def test_a_run_made_after_the_source_was_edited_is_kept_as_one_of_the_new_code(tmp_path, monkeypatch):
    sweep = fake_sweep(tmp_path, baseline=False)
    monkeypatch.setattr(runner, "code_version", lambda: "edited")
    assert sweep.run_sync()["code_version"].tolist() == ["edited"]
    player = FakePlayer()
    assert len(fake_sweep(tmp_path, baseline=False, player=player).run_sync()) == 1 and player.played == []


async def test_cancelling_keeps_what_is_finished_and_closes_the_cluster(tmp_path):
    waits, clusters, released = threading.Event(), FakeClusters(), threading.Event()

    class Slow(FakePlayer):
        def play(self, url, spec, **options):
            if spec.rate == 2:
                waits.set()
                assert released.wait(10)
                raise asyncio.CancelledError
            return super().play(url, spec, **options)

        def cancel(self):
            released.set()

    sweep = fake_sweep(tmp_path, axes=RATES, baseline=False, clusters=clusters, player=Slow())
    task = asyncio.ensure_future(sweep.run())
    await asyncio.get_running_loop().run_in_executor(None, waits.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sweep.results["rate"].tolist() == [1] and sweep.failures == [] and clusters.open == 0


def test_stop_ends_run_sync(tmp_path):
    sweep = fake_sweep(tmp_path, axes=RATES, player=FakePlayer(fault=lambda spec: sweep.stop()))
    with pytest.raises(Stopped, match="run it again"):
        sweep.run_sync()
    assert len(sweep.results) == 1


def test_a_search_finds_the_rate_and_is_resumed(tmp_path):
    options = {"search": {"low": 1, "high": 32, "tolerance": 0.05, "max_rates": 9}}
    first, second = FakePlayer(), FakePlayer()
    first.fault = lambda spec: "503: no" if len(first.played) == 4 else None
    fake_sweep(tmp_path, player=first, **options).run_sync()
    runs = fake_sweep(tmp_path, player=second, **options).run_sync()
    done = [spec for i, spec in enumerate(first.played) if i != 4]
    assert len(done) > 4 and not [spec for spec in second.played if spec in done[:4]]
    met = runs[(runs["slo_attainment"] >= 0.9) & (runs["system"] == "disaggregated")]["rate"].max()
    assert 4.75 <= met <= 5.0  # TTFT is rate / 10, its bound 0.5 s
    assert (tmp_path / "out" / "goodput.csv").exists()


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(tmp_path):
    text = fake_sweep(tmp_path, axes=RATES, repeats=2).describe()
    assert "12 runs, 2 cluster starts, 0 finished before" in text and "estimate: about" in text
    assert "12 runs, 3 cluster starts" in fake_sweep(tmp_path, axes=RATES, repeats=2, interleave=True).describe()
    assert "slo: ttft_s <= 0.5 s, for 90%" in text  # with its unit: who meant milliseconds sees it
    assert " requests/s" in next(line for line in text.splitlines() if line.startswith("lengths: "))
    assert not (tmp_path / "out").exists()
    sweep = fake_sweep(tmp_path, axes=RATES, repeats=2)
    sweep.run_sync()
    assert "12 runs, 0 cluster starts, 12 finished before" in fake_sweep(tmp_path, axes=RATES, repeats=2).describe()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    fake_sweep(tmp_path, name="one").run_sync()
    with pytest.raises(ConfigError, match="holds the sweep 'one', not 'two'; choose another --out"):
        fake_sweep(tmp_path, name="two")
    sweep = fake_sweep(tmp_path, name="one")
    with sweep._store, pytest.raises(ConfigError, match="another process runs the sweep"):
        fake_sweep(tmp_path, name="one").run_sync()


def test_bad_input_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "bad.csv").write_text("TIMESTAMP,ContextTokens\n")
    clusters = FakeClusters()
    with pytest.raises(ConfigError, match=r"columns .* are neither"):
        fake_sweep(tmp_path, clusters=clusters, workload={"trace": {"path": "bad.csv"}})
    assert clusters.started == []


def test_preflight_of_every_cluster_comes_before_the_first_start(tmp_path):
    sweep = Sweep.from_yaml(write_sweep(tmp_path), out=tmp_path / "out")  # the real cluster: its checkpoint does not exist
    with pytest.raises(ConfigError, match="/models/none"):
        sweep.run_sync()
    assert sweep.failures == []


def test_the_real_player_can_be_cancelled_from_another_thread():
    player, spec = LoadPlayer(), WorkloadSpec.from_dict({"rate": 50, "num_requests": 1, "vocab_size": 9})
    with StubServer(ttft_s=60, gap_s=1).serving() as url:
        timer = threading.Timer(0.2, player.cancel)
        timer.start()
        with pytest.raises(asyncio.CancelledError):
            player.play(url, spec, timeout_s=60, labels={})
        timer.join()
