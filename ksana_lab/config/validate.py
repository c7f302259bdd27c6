"""From plain dictionaries to frozen models, with errors a user can act on. Knows no key of its own."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ksana_lab.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean x?``, or an empty string when nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"; did you mean {found[0]}?" if found else ""


def build(model: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """``model.model_validate(data)``; all faults in one ConfigError that names ``source``, the keys, their values and the nearest keys."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, fault) for fault in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _explain(model: type[BaseModel], fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"{key} is not a known key{nearest(path[-1], _fields_at(model, path[:-1]))}"
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
    return f"{key}: {message[:1].lower()}{message[1:]}{got}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that are known where ``path`` leads, walking nested models, mappings and lists of models."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return []
        field = current.model_fields.get(part)
        if field is not None:
            current = _model_in(field.annotation)
        # otherwise the part is a mapping's key or a list's index: the model stays the same
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model inside ``annotation``: ``X``, ``X | None``, ``dict[str, X]``, ``tuple[X, …]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        found = _model_in(part)
        if found is not None:
            return found
    return None
