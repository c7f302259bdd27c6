"""key=value, and laying one mapping over another."""

import pytest

from ksana_lab.config.overrides import leaves, merge, parse_override, put
from ksana_lab.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b=8", ("a", "b"), 8),
        ("a=1e-3", ("a",), 0.001),
        ("a=x=y", ("a",), "x=y"),
        ("a=", ("a",), None),
        ("a=[0, 1]", ("a",), [0, 1]),
        ("a={b: 1}", ("a",), {"b": 1}),
        ("a={DECODE_IP}:13571", ("a",), "{DECODE_IP}:13571"),
        ("a=10.0.0.1:9080", ("a",), "10.0.0.1:9080"),
    ],
)
def test_values_are_read_as_yaml(text, path, value):
    assert parse_override(text) == (path, value)


def test_an_ipv6_address_needs_no_quotes():
    assert parse_override("connector.router_addr=[fd00::1]:9080").value == "[fd00::1]:9080"


@pytest.mark.parametrize("text", ["novalue", "=1", "a..b=1", "a=[1"])
def test_a_malformed_override_is_named(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_override(text)


def test_put_makes_sections_and_refuses_to_pass_through_a_value():
    tree = {"a": None, "v": 1}
    put(tree, ("a", "b", "c"), 5)
    assert tree["a"] == {"b": {"c": 5}}
    with pytest.raises(ConfigError, match=r"v is a value, not a section"):
        put(tree, ("v", "x"), 1)


def test_merge_lays_over_without_touching_either():
    base, extra = {"s": {"a": 1, "b": [1]}, "t": 1}, {"s": {"b": [2], "c": 3}, "u": {}}
    merged = merge(base, extra)
    merged["s"]["b"].append(9)
    assert merged == {"s": {"a": 1, "b": [2, 9], "c": 3}, "t": 1, "u": {}}
    assert base == {"s": {"a": 1, "b": [1]}, "t": 1} and extra["s"]["b"] == [2]


def test_an_empty_section_over_a_full_one_changes_nothing():
    assert merge({"s": {"a": 1}}, {"s": None}) == {"s": {"a": 1}}


def test_leaves_name_every_value_and_every_empty_section():
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": None})) == {("a", "b"): 1, ("a", "c"): {}, ("d",): None}
