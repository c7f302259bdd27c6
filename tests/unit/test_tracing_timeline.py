"""A run of known numbers, joined."""

import itertools
from dataclasses import replace

import pandas as pd
import pytest
from helpers_trace import FakeRun, record_minus_timeline

from ksana_lab.errors import ConfigError
from ksana_lab.metrics import latency
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.tracing import perfetto
from ksana_lab.tracing.events import read_logs
from ksana_lab.tracing.figures import FIGURES, GROUPS
from ksana_lab.tracing.phases import add_phases
from ksana_lab.tracing.timeline import PHASES, load
from ksana_lab.tracing.transfers import request_transfers


def joined(tmp_path, **numbers):
    fake = FakeRun(**numbers)
    return load(fake.write(tmp_path), client=fake.client)


def ok(run):
    return dict(zip(run.checks()["name"], run.checks()["is_ok"], strict=True))


def test_every_check_of_a_clean_run_holds(tmp_path):
    run = joined(tmp_path)
    assert all(ok(run).values()), run.checks()
    assert len(run.measured) == 3 and set(run.measured["route"]) == {"prefill+decode"}


def test_phases_add_up_to_what_the_client_saw(tmp_path):
    run = joined(tmp_path)
    total = run.breakdown.groupby("request_id")["seconds"].sum()
    first = run.breakdown[run.breakdown["is_ttft"]].groupby("request_id")["seconds"].sum()
    requests = run.requests.set_index("request_id")
    assert (total - requests["e2e_s"]).abs().max() < 1e-6
    assert (first - requests["ttft_s"]).abs().max() < 1e-6


def test_phases_have_the_lengths_that_were_put_in(tmp_path):
    run = joined(tmp_path, looks_after_ms=2.0, queueing_ms=7.0, compute_ms=5.0)
    mean = run.breakdown.groupby("phase")["seconds"].mean() * 1e3
    assert mean["tokenising"] == pytest.approx(0.1, abs=1e-3)
    assert mean["queueing"] == pytest.approx(2.0 + 7.0, abs=1e-3)  # the step under way counts
    assert mean["prefill"] == pytest.approx(20.0, abs=1e-3)
    assert mean["decode"] == pytest.approx(20.0, abs=1e-3)


def test_one_name_is_one_number_in_records_and_timeline(tmp_path):
    fake = FakeRun(looks_after_ms=16.0, sampling_ms=2.0, wire_ms=3.0)
    run = load(fake.write(tmp_path), client=fake.client)
    add_phases(fake.client, tmp_path)
    difference = record_minus_timeline(fake.client, run)
    assert {"ttft_s", "e2e_s", "queueing_s", "prefill_s", "exposed_transfer_s", "transfer_s"} <= set(difference)
    assert (difference.abs() < 1e-6).all(axis=None), difference.to_string()


def test_phases_up_to_the_first_token_are_the_records_parts(tmp_path):
    fake = FakeRun(num_requests=1, looks_after_ms=16.0, sampling_ms=2.0)
    run = load(fake.write(tmp_path), client=fake.client)
    add_phases(fake.client, tmp_path)
    phases = run.breakdown[run.breakdown["is_ttft"]].set_index("phase")["seconds"]
    parts = [phases[:"tokenising"].sum(), phases["queueing"], phases["prefill"], phases["detokenising":].sum()]
    assert parts == pytest.approx([latency.PER_REQUEST[name](fake.client[0]) for name in latency.TTFT_PARTS], abs=1e-6)


def test_without_the_api_process_log_queueing_begins_when_the_engine_looks(tmp_path):
    fake = FakeRun(looks_after_ms=16.0, queueing_ms=7.0)
    fake.write(tmp_path)
    next(tmp_path.glob("prefill-api*")).unlink()
    run = load(tmp_path, client=fake.client)
    queueing = run.breakdown.loc[run.breakdown["phase"] == "queueing", "seconds"]
    assert [*queueing, *run.requests["queueing_s"]] == pytest.approx([7e-3] * 6, abs=1e-6)


def test_what_a_request_waits_for_is_counted_from_the_end_of_prefill(tmp_path):
    """The last piece leaves when its layer is computed, and its first milliseconds pass while the token is sampled."""
    run = joined(tmp_path, num_requests=1, wire_ms=5.0, sampling_ms=2.0)
    assert run.requests["exposed_transfer_s"].iloc[0] == pytest.approx(3e-3)
    assert run.requests["after_last_layer_s"].iloc[0] == pytest.approx(5e-3)


def test_hidden_and_exposed_of_layerwise_transfer(tmp_path):
    run = joined(tmp_path, num_requests=1, compute_ms=5.0, wire_ms=1.0)
    layers = run.layers.set_index("layer")
    assert layers["exposed_s"].tolist() == pytest.approx([0, 0, 0, 1e-3], abs=1e-6)
    assert (layers["hidden_s"] + layers["exposed_s"]).tolist() == pytest.approx([1e-3] * 4)
    assert layers["compute_s"].tolist() == pytest.approx([5e-3] * 4)


def test_hidden_and_exposed_of_a_slow_link(tmp_path):
    """t > c: layers queue up; what is exposed is the sum of t less what computing hides."""
    run = joined(tmp_path, num_requests=1, compute_ms=2.0, wire_ms=3.0)
    assert run.requests["exposed_transfer_s"].iloc[0] == pytest.approx(4 * 3e-3 - 3 * 2e-3)
    assert run.layers["hidden_s"].sum() == pytest.approx(6e-3)


def test_pieces_that_wait_for_one_another_count_once_in_their_requests_wire_time():
    """Both are on the wire at once for 3 s; the layers are computed at 3 s. The other rank's link is another wire."""
    piece = {"request_id": "r", "src_rank": 0, "dst_rank": 0, "bytes": 1, "copies": 1, "compute_end_s": 3.0}
    spans = [(0.0, 4.0, 0), (1.0, 5.0, 0), (2.0, 4.0, 1)]
    rows = [{**piece, "src_rank": rank, "wire_start_s": start, "end_s": end} for start, end, rank in spans]
    request = request_transfers(pd.DataFrame(rows)).loc["r"]
    assert (request["wire_s"], request["hidden_s"], request["exposed_wire_s"]) == (5.0 + 2.0, 3.0 + 1.0, 2.0 + 1.0)


def test_a_piece_of_all_layers_is_shared_out_evenly(tmp_path):
    run = joined(tmp_path, mode="bulk")
    assert len(run.transfers) == 3 and len(run.layers) == 12
    assert run.layers["hidden_s"].sum() == 0 and ok(run)["hidden + exposed = wire"]
    assert ok(run)["layer sends"]


def test_every_rank_sends_its_share(tmp_path):
    """Two ranks send pieces of the same layers and tokens."""
    run = joined(tmp_path, num_ranks=2)
    assert len(run.transfers) == 3 * 4 * 2 and run.transfers["recv_end_s"].notna().all()
    assert (run.requests["kv_bytes"] == 2 * 4 * (1 << 20)).all() and all(ok(run).values())


def test_layers_of_a_second_rank_are_those_of_its_own_node(tmp_path):
    """Two nodes number their steps alike, and only rank 0 writes which requests it runs."""
    run = joined(tmp_path, num_prefills=2, num_ranks=2, num_requests=6)
    assert sorted(run.processes.loc[run.processes["process"] == "prefill.tp1", "node"]) == ["prefill0", "prefill1"]
    assert len(run.layers) == 6 * 4 * 2 and run.layers["bytes"].sum() == run.requests["kv_bytes"].sum()
    assert (run.layers["compute_end_s"] - run.layers["ready_s"]).abs().max() < 1e-6


def test_a_lost_send_is_noticed(tmp_path):
    fake = FakeRun()
    fake.write(tmp_path)
    path = next(tmp_path.glob("prefill.tp0*"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not ('"send"' in line and '"layer": 2' in line)) + "\n")
    found = ok(load(tmp_path, client=fake.client))
    assert not found["layer sends"] and not found["KV sent once"] and not found["written = read"]


def test_what_a_request_that_did_not_complete_lacks_is_no_lost_send(tmp_path):
    fake = FakeRun()
    fake.write(tmp_path)
    fake.client[1].error = "cancelled by the client"
    path = next(tmp_path.glob("prefill.tp0*"))
    lines = path.read_text().splitlines()
    lost = ('"send"', '"request": "1.0"', '"layer": 3')
    path.write_text("\n".join(line for line in lines if not all(part in line for part in lost)) + "\n")
    found = ok(load(tmp_path, client=fake.client))
    assert found["layer sends"] and found["KV sent once"]


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(dict(num_decodes=0, wire_ms=20.0), id="an answer of one token is over before its KV has arrived"),
        pytest.param(dict(ack_late_ms=80.0), id="P hears of the arrival after the answer's end"),
    ],
)
def test_what_an_answer_does_not_wait_for_contradicts_no_mark(tmp_path, numbers):
    run = joined(tmp_path, **numbers)
    assert all(ok(run).values()), run.checks()


def test_a_log_cut_in_a_line_is_read_as_far_as_it_goes(tmp_path):
    fake = FakeRun()
    fake.write(tmp_path)
    path = next(tmp_path.glob("decode.tp0*"))
    path.write_text(path.read_text()[:-200])
    run = load(tmp_path, client=fake.client)
    assert not ok(run)["logs closed"] and len(run.requests) == 3


def test_no_log_says_how_to_make_one(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="trace_dir"):
        read_logs(tmp_path)


def test_arrows_lead_from_each_send_to_its_receive(tmp_path):
    run = joined(tmp_path)
    trace = perfetto.to_chrome(run)
    arrows = perfetto.flows(trace)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert len(arrows) == 12
    for start, end in arrows:
        assert start["ts"] <= end["ts"]
        assert names[start["pid"], start["tid"]].startswith("send") and names[end["pid"], end["tid"]].startswith("receive")
    assert {"C", "X", "s", "f"} <= {e["ph"] for e in trace["traceEvents"]}


def test_spans_of_one_track_do_not_cross(tmp_path):
    run = joined(tmp_path, compute_ms=1.0, wire_ms=3.0)
    tracks = {}
    for e in perfetto.to_chrome(run)["traceEvents"]:
        if e["ph"] == "X":
            tracks.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(a_end <= b_start + 1e-2 for (_, a_end), (b_start, _) in itertools.pairwise(spans))


def test_steps_of_two_hosts_hold_their_own_requests_though_processes_have_one_number(tmp_path):
    """Containers count their processes alike."""
    fake = FakeRun(num_requests=1)
    path = next(fake.write(tmp_path).glob("decode.tp0*"))
    path.write_text(path.read_text().replace('"pid": 104', '"pid": 102'))
    run = load(tmp_path, client=fake.client)
    steps = [e for e in perfetto.to_chrome(run)["traceEvents"] if e.get("cat") == "step" and e["ph"] == "X"]
    assert set(run.steps["pid"]) == {102} and [e["args"]["requests"] for e in steps] == [["r-0"]] * 6


def test_every_phase_is_drawn_and_none_that_is_not():
    drawn = [phase for phases, _, _ in GROUPS.values() for phase in phases]
    assert sorted(drawn) == sorted(PHASES)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_draw(tmp_path, name):
    figure = FIGURES[name](joined(tmp_path))
    assert any(axes.patches or axes.collections for axes in figure.axes)


def test_link_use_integrates_to_the_bytes_sent(tmp_path):
    run = joined(tmp_path, compute_ms=1.0, wire_ms=3.0)
    use = perfetto.link_use(run)
    seconds = use["at_s"].diff().shift(-1).fillna(0.0)
    assert (use["bytes_per_s"] * seconds).sum() == pytest.approx(run.transfers["bytes"].sum(), rel=1e-6)


def test_two_prefill_nodes_have_a_link_each_to_one_decode_node(tmp_path):
    run = joined(tmp_path, num_prefills=2, num_requests=4)
    use = perfetto.link_use(run)
    assert sorted(use["link"].unique()) == ["p:1 → d:1, rank 0 → 0", "p:2 → d:1, rank 0 → 0"]
    assert not len(perfetto.link_use(replace(run, transfers=run.transfers.iloc[:0])))


def test_records_get_their_phases_on_the_clients_clock(tmp_path):
    fake = FakeRun(queueing_ms=7.0)
    fake.write(tmp_path)
    assert add_phases(fake.client, tmp_path) == 3
    for record in fake.client:
        parts = [latency.PER_REQUEST[name](record) for name in ("router_path_s", "queueing_s", "prefill_s", "first_token_path_s")]
        assert parts == pytest.approx([0.00055, 0.0071, 0.020, 0.0005], abs=1e-5)  # the engine looked 0.1 ms after it was told
        assert sum(parts) == pytest.approx(latency.ttft_s(record), abs=1e-6)
        assert latency.exposed_transfer_s(record) == pytest.approx(0.001, abs=1e-5)


def test_records_get_what_was_sent_of_their_kv(tmp_path):
    fake = FakeRun(compute_ms=5.0, wire_ms=2.0)
    fake.write(tmp_path)
    add_phases(fake.client, tmp_path)
    for record in fake.client:
        assert [record.transfer[name] for name in ("kv_bytes", "num_pieces", "num_copies")] == [4 << 20, 4, 16]
        seconds = [record.transfer[name] for name in ("wire_s", "hidden_s", "exposed_wire_s", "after_last_layer_s")]
        assert seconds == pytest.approx([0.008, 0.006, 0.002, 0.002], abs=1e-5)  # of four layers the last is seen
        assert latency.hidden_fraction(record) == pytest.approx(0.75, abs=1e-3)


def test_a_request_that_the_log_does_not_know_keeps_none(tmp_path):
    fake = FakeRun()
    fake.write(tmp_path)
    stranger = RequestRecord("stranger", 8, 1, sent_s=1.0, token_times_s=[1.1], token_counts=[1], finished_s=1.1)
    assert add_phases([*fake.client, stranger], tmp_path) == 3 and stranger.phases == stranger.transfer == {}
    assert latency.router_path_s(stranger) is None and latency.first_token_path_s(stranger) is None
