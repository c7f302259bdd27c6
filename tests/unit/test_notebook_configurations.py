"""Which rows are repeats of one configuration, and what it is called."""

import pandas as pd

from ksana_lab.notebook.configurations import groups


def rows(*columns, **more) -> pd.DataFrame:
    return pd.DataFrame([{"split": "1P1D", "rate": 2, "repeat": 0, **own} for own in columns]).assign(**more)


def names(frame, by="split", **options):
    return [name for name, _ in groups(frame, by, without=("rate",), **options)]


def test_repeats_are_one_configuration_and_axes_tell_configurations_apart():
    frame = rows({"link": 1}, {"link": 1, "repeat": 1}, {"link": 10})
    assert [(name, len(group)) for name, group in groups(frame, "split")] == [("1P1D · link=1", 2), ("1P1D · link=10", 1)]


def test_what_was_measured_tells_nothing_apart():
    measured = {"run_id": ["a", "b"], "ttft_s_p90": [0.1, 0.2], "loop_lag_p99_s": [1.0, 2.0], "num_failed": [0, 1], "seed": [5, 6]}
    also = {"is_trustworthy": [True, False], "goodput_rps_per_gpu_low": [1, 2], "drift": [0.12345678, 0.2]}
    assert names(rows({}, {"repeat": 1}, **measured, **also)) == ["1P1D"]


def test_a_column_that_says_what_another_said_is_not_repeated():
    frame = rows({"mode": "bulk", "transfer_mode": "bulk"}, {"mode": "layer", "transfer_mode": "layer"}, system="disaggregated")
    assert names(frame) == ["1P1D · bulk", "1P1D · layer"]
    assert names(frame, by="system") == ["disaggregated · bulk", "disaggregated · layer"]


def test_mixed_nodes_have_no_name_for_what_only_a_pair_has():
    frame = rows(
        {"link": 1.5, "transfer_mode": "bulk"}, {"link": 3.0, "transfer_mode": "bulk"}, {"split": "2 mixed", "transfer_mode": "none"}
    )
    assert names(frame) == ["1P1D · link=1.5", "1P1D · link=3", "2 mixed"]


def test_the_axes_that_are_given_are_all_there_are():
    frame = rows({"link": 1, "colour": "red"}, {"link": 1, "colour": "blue"})
    assert names(frame, sweep_axes=["link"]) == ["1P1D"]


def test_of_requests_only_what_their_whole_run_shares_counts():
    frame = rows({"request_id": "a", "part": 1}, {"request_id": "b", "part": 2}, run_id="x")
    assert names(frame) == ["1P1D"]
    assert names(frame.assign(run_id=["x", "y"])) == ["1P1D · part=1", "1P1D · part=2"]
