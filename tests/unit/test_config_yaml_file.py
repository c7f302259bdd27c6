"""YAML 1.2 scalars, duplicate keys, and text that survives a round trip."""

import pytest

from ksana_lab.config import yaml_file
from ksana_lab.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1:30", "1:30"),
        ("on", "on"),
        ("010", 10),
        ("0x10", 16),
        ("-1.0", -1.0),
        (".5", 0.5),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ('"8"', "8"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = yaml_file.parse_scalar(text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_key_that_occurs_twice_is_an_error_with_its_line():
    with pytest.raises(ConfigError, match=r"f\.yaml .*line 3: the key 'a' occurs twice"):
        yaml_file.parse("a: 1\nb: 2\na: 3\n", "f.yaml")


def test_merge_keys_work_more_than_once():
    data = yaml_file.parse("x: &x {a: 1}\ny: &y {b: 2}\nz:\n  <<: [*x, *y]\n  c: 3\n", "f")
    assert data["z"] == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words"])
def test_a_file_must_hold_a_mapping(text):
    with pytest.raises(ConfigError, match="expected a mapping"):
        yaml_file.parse(text, "f")


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        yaml_file.read(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"binary\.yaml: it is not UTF-8"):
        yaml_file.read(tmp_path / "binary.yaml")


def test_dump_reads_back_the_same_with_the_same_types():
    data = {"a": 1e-05, "b": "1e-3", "c": "on", "d": None, "e": (1, 2), "f": {"g": "模型"}, "h": "1:30", "i": float("inf"), "j": 3.0}
    back = yaml_file.parse(yaml_file.dump(data), "f")
    assert back == {**data, "e": [1, 2]}
    assert type(back["a"]) is type(back["j"]) is float
