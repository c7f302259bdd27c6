"""Panels without a browser: what they show as text, what their methods return, what becomes of errors."""

import asyncio
from types import SimpleNamespace

import pandas as pd
import pytest
from helpers_sweep import FakeClusters, FakePlayer, write_sweep

from ksana_lab.cluster.local import Cluster
from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.errors import ConfigError, KsanaLabError
from ksana_lab.notebook.session import config
from ksana_lab.notebook.widgets import ClusterPanel, ConfigForm, Playground, SweepPanel
from ksana_lab.sweep.runner import Sweep
from ksana_lab.types import Role
from ksana_lab.workload.spec import WorkloadSpec
from ksana_lab.workload.stub import StubServer


def running(url: str, *roles: Role) -> SimpleNamespace:
    return SimpleNamespace(is_running=True, url=url, plan=SimpleNamespace(nodes=[SimpleNamespace(role=role) for role in roles]))


# ---- the form


def test_a_form_that_was_not_touched_is_the_configuration_it_was_made_from():
    cluster = ClusterConfig.from_yaml(config("pd_2p2d_cpu.yaml"))
    assert ConfigForm(cluster).value == cluster
    assert ConfigForm(cluster).changes == {}


def test_a_form_changes_nested_keys_lists_and_distributions():
    form = ConfigForm(WorkloadSpec(rate=4, prompt_tokens={"kind": "fixed", "tokens": 9}))
    form.set("sampling.temperature", 0.5)
    form.set("prompt_tokens", {"kind": "uniform", "low": 1, "high": 3})
    form.set("endpoint", "chat")
    assert form.value == WorkloadSpec(
        rate=4, prompt_tokens={"kind": "uniform", "low": 1, "high": 3}, sampling={"temperature": 0.5}, endpoint="chat"
    )
    assert list(form.changes) == ["prompt_tokens", "sampling.temperature", "endpoint"]


def test_an_emptied_field_falls_back_to_the_default():
    form = ConfigForm(WorkloadSpec(users=2, num_requests=7))
    form.set("num_requests", None)
    assert form.value == WorkloadSpec(users=2)


def test_a_bad_value_is_named_beside_the_form_and_raised():
    form = ConfigForm(ClusterConfig.from_yaml(config("pd_1p1d_cpu.yaml")))
    form.set("nodes.prefill.count", 0)
    assert "nodes.prefill.count" in form._verdict.value
    with pytest.raises(ConfigError, match=r"nodes\.prefill\.count: .*greater than or equal to 1"):
        _ = form.value


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean nodes\.prefill\.count"):
        ConfigForm(ClusterConfig.from_yaml(config("pd_1p1d_cpu.yaml"))).set("nodes.prefil.count", 2)


# ---- a cluster


class FakeCluster:
    """Counts; ``broken`` keeps it from starting."""

    def __init__(self, broken: str = "") -> None:
        self.is_running, self.closed, self.broken, self.url = False, 0, broken, "http://127.0.0.1:1"

    def start(self):
        if self.broken:
            raise KsanaLabError(self.broken)
        self.is_running = True

    def close(self):
        self.is_running, self.closed = False, self.closed + 1

    def logs(self, name, lines):
        return f"<log of {name}>"

    def status(self):
        state = "running" if self.is_running else "not started"
        process = {"name": "prefill0", "role": "prefill", "pid": 7, "state": state, "url": "http://127.0.0.1:2", "devices": []}
        load = {"num_running": 3, "num_waiting": 1, "num_free_blocks": 90, "num_blocks": 100}
        node = {"inference_addr": "127.0.0.1:2", "is_online": True, "load": load, "in_flight": 4}
        return {"url": self.url, "processes": [process], "nodes": [node] if self.is_running else [], "pairs": []}


def panel_of(monkeypatch, cluster) -> ClusterPanel:
    monkeypatch.setattr(Cluster, "from_yaml", lambda *args, **options: cluster)
    return ClusterPanel("some.yaml")


async def test_a_cluster_panel_starts_shows_load_and_logs_and_stops(monkeypatch):
    cluster = FakeCluster()
    with panel_of(monkeypatch, cluster) as panel:
        assert "not running" in str(panel)
        assert await panel.start() is cluster
        await panel.refresh()
        row = panel.rows().iloc[0]
        assert (row["running"], row["waiting"], row["free blocks"], row["online"]) == (3, 1, "90 of 100", "yes")
        assert "&lt;log of prefill0&gt;" in panel._log.value
        await panel.stop()
        assert "not running" in str(panel) and cluster.closed == 1
    assert not cluster.is_running


async def test_a_cluster_that_does_not_start_says_why_and_can_be_tried_again(monkeypatch):
    cluster = FakeCluster(broken="prefill0: model_dir <x> does not exist")
    panel = panel_of(monkeypatch, cluster)
    with pytest.raises(KsanaLabError):
        await panel.start()
    assert "model_dir <x> does not exist" in str(panel)
    assert "&lt;x&gt;" in panel._state.value
    assert not panel._start.disabled
    cluster.broken = ""
    await panel.start()
    assert panel.is_running
    panel.close()


# ---- one request


async def test_the_playground_streams_an_answer_and_says_who_made_which_token():
    with StubServer(ttft_s=0.02, gap_s=0.005).serving() as url:
        playground = Playground(running(url, Role.PREFILL, Role.DECODE))
        answer = await playground.ask("hello", max_tokens=5)
    assert answer["token"].tolist() == [1, 2, 3, 4, 5]
    assert answer["node"].tolist() == ["prefill node"] + ["decode node"] * 4
    assert answer["at_s"].is_monotonic_increasing and answer["at_s"].iloc[0] >= 0.02
    assert bytes(playground._image.value[:4]) == b"\x89PNG"
    assert "decode node: 4 tokens" in str(playground)


async def test_a_mixed_node_makes_every_token():
    with StubServer(ttft_s=0.0, gap_s=0.0).serving() as url:
        answer = await Playground(running(url, Role.MIXED)).ask("hello", max_tokens=3)
    assert set(answer["node"]) == {"mixed node"}


async def test_the_playground_shows_the_server_s_refusal():
    with StubServer(status=503).serving() as url:
        playground = Playground(running(url, Role.MIXED))
        with pytest.raises(KsanaLabError, match="503"):
            await playground.ask("hello")
    assert "503" in playground._status.value
    assert not playground._ask.disabled


async def test_without_a_running_cluster_the_playground_says_what_to_do(monkeypatch):
    with pytest.raises(KsanaLabError, match="start it first"):
        await Playground(panel_of(monkeypatch, FakeCluster())).ask("hello")


# ---- a sweep


def sweep_of(tmp_path, **changes) -> Sweep:
    clusters = changes.pop("clusters", FakeClusters())
    path = write_sweep(tmp_path, axes={"rate": [2, 4]}, **changes)
    return Sweep.from_yaml(path, out=tmp_path / "out", make_cluster=clusters, player=FakePlayer())


async def test_a_sweep_panel_returns_the_runs_and_draws_them(tmp_path):
    drawn = []

    def plot(runs: pd.DataFrame):
        drawn.append(len(runs))
        from matplotlib.figure import Figure

        return Figure()

    panel = SweepPanel(sweep_of(tmp_path, baseline=False), plot=plot)
    assert "not started" in str(panel)
    runs = await panel.run()
    assert len(runs) == 2 and drawn == [1, 2]
    assert panel._bar.value == panel._bar.max == 2
    assert "finished" in str(panel)


async def test_a_sweep_panel_lists_what_failed(tmp_path):
    panel = SweepPanel(sweep_of(tmp_path, baseline=False, clusters=FakeClusters(broken=lambda config: True)))
    await panel.run()
    assert "the node cannot find its weights" in str(panel)
    assert "2 failed" in str(panel)


async def test_the_stop_button_ends_a_sweep_and_keeps_what_there_is(tmp_path):
    sweep = sweep_of(tmp_path, baseline=False)
    panel = SweepPanel(sweep)
    is_first_done = asyncio.Event()
    tell = panel._on_progress

    def stop_after_the_first(step):
        tell(step)
        if step.state == "done" and not is_first_done.is_set():
            is_first_done.set()
            panel.stop()

    panel._on_progress = stop_after_the_first
    await panel.run()
    assert "stopped" in str(panel) or "finished" in str(panel)  # the second may have been over already
    assert len(await SweepPanel(sweep_of(tmp_path, baseline=False)).run()) == 2


def test_every_panel_is_text_where_widgets_cannot_be_drawn(tmp_path, monkeypatch):
    panels = [panel_of(monkeypatch, FakeCluster()), SweepPanel(sweep_of(tmp_path)), ConfigForm(WorkloadSpec(rate=1))]
    panels.append(Playground(panels[0]))
    for panel in panels:
        bundle = panel._repr_mimebundle_()
        assert bundle["text/plain"] == str(panel) != ""
        assert "application/vnd.jupyter.widget-view+json" in bundle
