"""Tables and files that leave the project: their columns and keys are promises."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from ksana_lab.errors import ConfigError
from ksana_lab.metrics import export
from ksana_lab.metrics.export import gaps_frame, load_records, save_records, summary_row, to_frame, vllm_result, write_csv
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.metrics.summary import CANCELLED, SLO, summarize


def records() -> list[RequestRecord]:
    good = RequestRecord("a", 4, 3, sent_s=1.0, token_times_s=[1.5, 1.6, 1.8], token_counts=[1] * 3, labels={"rate": 4}, finished_s=1.8)
    return [good, RequestRecord("b", 4, sent_s=1.0, finished_s=1.1, error="503: unavailable")]


def test_frame_has_a_row_per_request_with_metrics_and_labels(tmp_path):
    frame = pd.read_csv(write_csv(to_frame(records(), split="1P1D"), tmp_path / "deep" / "r.csv"))
    assert frame.ttft_s[0] == pytest.approx(0.5)
    assert list(frame.is_ok) == [True, False]
    assert (frame["rate"][0], frame["split"][0]) == (4, "1P1D")


def test_what_was_sent_of_a_request_is_in_its_row_where_it_is_known():
    sent = replace(records()[0], transfer={"kv_bytes": 4096.0, "wire_s": 0.004, "hidden_s": 0.003})
    frame = to_frame([sent, records()[1]])
    assert (frame.kv_bytes[0], frame.hidden_fraction[0]) == (4096, 0.75) and frame.kv_bytes.isna()[1]
    assert "kv_bytes" not in to_frame(records())


def test_gaps_frame_has_a_row_per_gap():
    assert list(gaps_frame(records()).itl_s) == pytest.approx([0.1, 0.2])
    assert gaps_frame([]).empty


def test_records_survive_a_file(tmp_path):
    assert load_records(save_records(records(), tmp_path / "r.jsonl")) == records()


def test_records_of_another_version_are_refused_in_one_line(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps({"ksana_lab_records": 0}) + "\n")
    with pytest.raises(ConfigError, match="version 0; this ksana_lab reads version 1"):
        load_records(path)


def test_a_file_that_holds_no_records_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="not a records file"):
        load_records(path)


def test_vllm_result_has_vllms_keys_in_milliseconds():
    result = vllm_result(records(), summarize(records(), slo=SLO(ttft_s=1.0)))
    for kind in ("mean", "median", "std", "p99"):
        assert {f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")} <= result.keys()
    assert result["mean_ttft_ms"] == pytest.approx(500)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 1, 3)
    assert result["errors"] == ["", "503: unavailable"]
    json.dumps(result, allow_nan=False)


def test_vllm_result_counts_no_tokens_of_a_request_that_did_not_complete():
    cut_off = RequestRecord("c", 4, 2, sent_s=1.0, token_times_s=[1.5, 1.6], token_counts=[1] * 2, finished_s=1.7, error="closed")
    result = vllm_result([*records(), cut_off], summarize([*records(), cut_off]))
    assert result["num_prompts"] == 3 and result["output_lens"] == [3, 0, 0]
    assert sum(result["output_lens"]) == result["total_output_tokens"]


def test_vllm_result_knows_no_cancelling():
    given_up = replace(records()[1], error="cancelled", finish_reason=CANCELLED)
    result = vllm_result([*records(), given_up], summary := summarize([*records(), given_up]))
    assert summary.num_cancelled == 1 and result["completed"] + result["failed"] == result["num_prompts"] == 3


def test_vllm_result_has_a_text_for_each_request():
    said = [replace(records()[0], text="hello"), records()[1]]
    assert vllm_result(said, summarize(said))["generated_texts"] == ["hello", ""]


def test_summary_row_is_flat_and_names_its_units():
    row = summary_row(summarize(records(), slo=SLO(ttft_s=1.0)), rate=4, seed=0)
    assert row["ttft_s_p50"] == pytest.approx(0.5)
    assert (row["slo_attainment"], row["num_failed"], row["rate"]) == (0.5, 1, 4)
    assert all(isinstance(value, (int, float)) for value in row.values())


def test_a_column_of_numbers_and_words_goes_into_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"link": [1, "unset", None], "rate": [1.0, 2.0, None]})
    back = pd.read_parquet(export.write_parquet(frame, tmp_path / "r.parquet"))
    assert back["link"].tolist()[:2] == ["1", "unset"] and back["link"].isna()[2] and back["rate"].tolist()[:2] == [1.0, 2.0]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "has_parquet", lambda: False)
    with pytest.raises(ConfigError, match=r"ksana_lab\[parquet\]"):
        export.write_parquet(pd.DataFrame({"a": [1]}), tmp_path / "r.parquet")
