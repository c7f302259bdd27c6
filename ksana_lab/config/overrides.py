"""``a.b.c=value``: dotted paths into a nested mapping. Knows no key; who calls says which paths exist."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ksana_lab.config.yaml_file import parse_scalar
from ksana_lab.errors import ConfigError


class Override(NamedTuple):
    path: tuple[str, ...]
    value: Any  # None: as if the key were absent


def parse_override(text: str) -> Override:
    """``"batch_scheduler.max_batch_size=8"``; the value is read as YAML, ``key=`` unsets. Raises ConfigError."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: expected key=value, for example batch_scheduler.max_batch_size=8")
    if value.startswith("{") and value.partition("}")[0][1:].replace("_", "").isalnum():
        return Override(path, value)  # {ROUTER_IP}:9080 is a placeholder, not a YAML mapping
    if re.fullmatch(r"\[[0-9A-Fa-f:.]+\]:\d+", value):
        return Override(path, value)  # [fd00::2]:8067 is an address, not a YAML list
    try:
        return Override(path, parse_scalar(value))
    except ConfigError as error:
        raise ConfigError(f"--set {text!r}: {error}") from None


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set one leaf, making the mappings above it. Raises ConfigError when something above it is a value."""
    here = tree
    for depth, part in enumerate(path[:-1]):
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
        if not isinstance(here, dict):
            raise ConfigError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a section")
    here[path[-1]] = value


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``base`` with ``extra`` laid over it: mappings merge, everything else is replaced."""
    merged = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in extra.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, Mapping):
            merged[key] = merge(before, value)
        elif not (isinstance(before, dict) and value is None):  # an empty section changes nothing
            merged[key] = copy.deepcopy(value)
    return merged


def leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every (path, value) whose value is not a mapping; an empty mapping is a leaf."""
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, path)
        else:
            yield path, value
