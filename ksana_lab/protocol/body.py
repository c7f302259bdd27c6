"""Reading a JSON request body: its types, the fields nobody knows, and the ones that are known but not implemented.

Three kinds of field, and none is dropped in silence: a typo or a foreign extension is ignored and logged once; a known field that this
server does not implement is refused unless its value asks for nothing; a known field without effect here (``user``) is left alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import orjson

from ksana_lab.errors import InvalidRequest

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)
_MAX_NAMES_LOGGED = 100  # a client inventing names must not fill the log or the memory
MAX_STOP_STRINGS, MAX_STOP_CHARS = 64, 1024  # a stop string is searched for at every token


@dataclass(frozen=True)
class Unsupported:
    """A field that is known and not implemented. ``harmless`` values ask for nothing and pass (None always does)."""

    advice: str
    harmless: tuple[Any, ...] = ()

    def refuse(self, name: str, value: Any) -> None:
        """Raises InvalidRequest naming the field, unless ``value`` is harmless."""
        if value is None or any(value == h and type(value) is type(h) for h in self.harmless):
            return
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}…"
        raise InvalidRequest(f"{name}={shown} is not supported: {self.advice}", name)


@dataclass
class BodyReader(Generic[T]):
    """Turns bodies into ``kind``. One per route and server: it remembers which unknown names it has logged."""

    kind: type[T]
    unsupported: Mapping[str, Unsupported] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    nested: Mapping[str, BodyReader] = field(default_factory=dict)  # rules for the objects inside
    _logged: set[str] = field(default_factory=set)

    def read(self, body: bytes) -> T:
        """Raises InvalidRequest that names the field at fault."""
        try:
            raw = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise InvalidRequest("the body must be a JSON object")
        self._check_names(raw)
        try:
            return msgspec.convert(raw, self.kind)
        except msgspec.ValidationError as error:
            raise _name_the_field(error) from error

    def _check_names(self, raw: dict[str, Any]) -> None:
        for name, value in raw.items():
            if name in self.unsupported:
                self.unsupported[name].refuse(name, value)
            elif name in self.nested and isinstance(value, dict):
                self.nested[name]._check_names(value)
            elif name not in self.kind.__struct_fields__ and name not in self.without_effect:
                self._log_once(name)

    def _log_once(self, name: str) -> None:
        if name not in self._logged and len(self._logged) < _MAX_NAMES_LOGGED:
            self._logged.add(name)
            log.warning("ignoring the unknown request field %r (said once)", name[:80])


def _name_the_field(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec says "Expected `int`, got `str` - at `$.max_tokens`"."""
    message, _, place = str(error).partition(" - at ")
    path = place.strip("`").removeprefix("$").lstrip(".")
    param = re.split(r"[.\[]", path)[0] or None
    return InvalidRequest(f"{path}: {message}" if path else message, param)


def refused(error: ValueError, names: Mapping[str, str] | None = None) -> InvalidRequest:
    """SamplingParams puts the field's name first. ``names``: what a body calls those that have another name there."""
    rule, got, value = str(error).rpartition(", got ")
    rule = re.sub(r"\w+", lambda word: (names or {}).get(word[0], word[0]), rule)
    return InvalidRequest(rule + got + value, rule.split()[0])


def checked_stop(name: str, stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings of field ``name``. Raises InvalidRequest for an empty, an overlong or one too many."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"{name} has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed", name)
    for string in strings:
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"{name} must have 1..{MAX_STOP_CHARS} characters each, got one of {len(string)}", name)
    return strings
