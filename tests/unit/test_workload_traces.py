"""Each format read from a small file, and each fault told in one line with file, line and field."""

import json

import pytest

from ksana_lab.errors import ConfigError
from ksana_lab.workload.traces import BUNDLED, read_trace

BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_samples_read(name):
    trace = read_trace(name)
    assert len(trace.rows) >= 100
    assert trace.rows[0].at_s == 0.0 and trace.rows[-1].at_s > 10


def test_azure_keeps_sub_second_times_and_reads_the_zone_of_2024(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.250000+00:00,10,2\n2024-05-10 00:00:01.5+00:00,11,3\n"
    rows = read_trace(write(tmp_path, "a.csv", text)).rows
    assert rows[1].at_s == pytest.approx(1.25)
    assert (rows[1].prompt_tokens, rows[1].output_tokens) == (11, 3)


def test_burstgpt_is_read_by_name_and_leaves_failures_out(tmp_path):
    path = write(tmp_path, "b.csv", "Model,Response tokens,Timestamp,Request tokens\nChatGPT,5,1,7\nGPT-4,0,2,9\n")
    trace = read_trace(path)
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in trace.rows] == [(1.0, 7, 5)]
    assert trace.num_dropped == 1


def test_mooncake_times_are_milliseconds(tmp_path):
    row = {"timestamp": 1500, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]}
    trace = read_trace(write(tmp_path, "m.jsonl", json.dumps(row) + "\n"))
    assert (trace.rows[0].at_s, trace.rows[0].hash_ids, trace.block_tokens) == (1.5, (1, 2), 512)


def test_sharegpt_takes_the_first_exchange(tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e"}]
    path = write(tmp_path, "s.json", json.dumps([{"conversations": turns}, {"conversations": turns[:2]}]))
    trace = read_trace(path, encode=lambda text: [ord(word) for word in text.split()])
    assert (trace.rows[0].prompt_token_ids, trace.rows[0].output_tokens) == ((97, 98, 99), 2)
    assert trace.num_dropped == 1 and not trace.has_timestamps


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("x.csv", "TIMESTAMP,ContextTokens\n", "are neither Azure's .* name them so"),
        ("x.jsonl", '{"timestamp": "noon", "input_length": 6, "output_length": 2}\n', r"\(milliseconds\) must be a number, got 'n"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: TIMESTAMP 'yesterday'"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-5,1\n", "line 2: ContextTokens must not be negative"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,1\n", "ContextTokens must be a number, got 'many'"),
        ("x.csv", BURST + "1,ChatGPT,2.5,1,3,x\n", "Request tokens must be a whole number"),
        ("x.csv", BURST + "1,ChatGPT,2,0,2,x\n", "holds no usable request"),
        ("x.jsonl", "{not json}\n", "line 1: not JSON"),
        ("x.jsonl", '{"timestamp": 1, "output_length": 2}\n', "field 'input_length' is missing"),
        ("x.jsonl", '{"timestamp": 1, "input_length": 600, "output_length": 2, "hash_ids": [1]}\n', "do not cover input_length 600"),
        ("x.json", "{}", "set trace.tokenizer_dir"),
    ],
)
def test_a_bad_trace_is_one_clear_line(tmp_path, name, text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        read_trace(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_when_the_format_is(tmp_path):
    with pytest.raises(ConfigError, match="column 'Response tokens' is missing"):
        read_trace(write(tmp_path, "b.csv", "Timestamp,Request tokens\n"), "burstgpt")


def test_no_such_trace_names_the_bundled_ones():
    with pytest.raises(ConfigError, match="azure_llm_2023_conv_sample"):
        read_trace("nowhere.csv")
