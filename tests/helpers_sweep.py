"""A sweep without processes: a cluster that only counts its starts, and a player that answers from the workload alone."""

from pathlib import Path
from types import SimpleNamespace

import yaml

from ksana_lab.metrics.record import RequestRecord
from ksana_lab.sweep.runner import Sweep
from ksana_lab.workload.loadgen import LoadReport

CLUSTER = {
    "model_dir": "/models/none",
    "router": {"port": "auto"},
    "nodes": {"prefill": {"role": "prefill"}, "decode": {"role": "decode"}},
    "setting": {"batch_scheduler": {"max_step_tokens": 512}},
    "ksana_lab": {"device": "cpu", "transfer_mode": "layer"},
}
SWEEP = {
    "cluster": "cluster.yaml",
    "workload": {"rate": 4, "num_requests": 5, "prompt_tokens": 16, "output_tokens": 4},
    "slo": {"ttft_s": 0.5},
    "events": False,
}


def write_sweep(folder: Path, cluster_file: dict | None = None, **changes) -> Path:
    """sweep.yaml with cluster.yaml beside it; None takes a key out."""
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_file or CLUSTER, sort_keys=False))
    content = {key: value for key, value in {**SWEEP, **changes}.items() if value is not None}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class FakeClusters:
    """``make_cluster`` of a Sweep. ``broken``: says of a ClusterConfig whether it does not start."""

    def __init__(self, broken=lambda config: False):
        self.broken, self.started, self.open = broken, [], 0

    def __call__(self, config, trace_dir, log_dir):
        return SimpleNamespace(
            url="http://fake",
            plan=SimpleNamespace(nodes=[]),
            preflight=list,
            start=lambda: self._start(config),
            check=lambda: None,
            close=self._close,
        )

    def _start(self, config):
        if self.broken(config):
            raise RuntimeError("the node cannot find its weights")
        self.started.append(config)
        self.open += 1

    def _close(self):
        self.open = 0


class FakePlayer:
    """TTFT is rate / 10 seconds. ``fault(spec)`` may raise, or return an error that every request then has."""

    def __init__(self, fault=lambda spec: None):
        self.fault, self.played = fault, []

    def play(self, url, spec, *, timeout_s, labels):
        error = self.fault(spec)
        self.played.append(spec)
        workload = spec.build()
        records = [self._record(request, spec.rate / 10, error, labels) for request in workload.requests]
        return LoadReport(records, workload.lengths, 0.0, 1.0, 0.001, 0.002, 0.001)

    def _record(self, request, ttft_s, error, labels):
        times = [] if error else [request.at_s + ttft_s + 0.01 * k for k in range(request.max_tokens)]
        return RequestRecord(
            f"r{request.index}",
            request.num_prompt_tokens,
            len(times),
            sent_s=request.at_s,
            token_times_s=times,
            token_counts=[1] * len(times),
            finished_s=request.at_s + ttft_s + 1,
            error=error,
            labels=dict(labels),
        )

    def cancel(self):
        pass


def fake_sweep(folder: Path, *, clusters=None, player=None, overrides=(), **changes) -> Sweep:
    path = write_sweep(folder, **changes)
    clusters, player = clusters or FakeClusters(), player or FakePlayer()
    return Sweep.from_yaml(path, overrides=overrides, out=folder / "out", make_cluster=clusters, player=player)
