"""A form for any configuration, made from its pydantic schema: a widget per key, checked as a whole whenever one changes.

    form = ConfigForm(ClusterConfig.from_yaml(config("pd_1p1d_cpu.yaml")))    # shows what there is, changes nothing
    with Cluster(form.value) as cluster: ...

Knows no key: a switch for a boolean, a list for a choice, else a line of YAML. What is not valid says so beside the form, in the words
that the same mistake in a file would get."""

from __future__ import annotations

import copy
import html
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import ipywidgets as ipw
import yaml
from pydantic import BaseModel

from ksana_lab.config import validate, yaml_file
from ksana_lab.config.overrides import leaves, put
from ksana_lab.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Schema = Mapping[str, Any]
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}", "ge": "≥ {}", "le": "≤ {}"}


class ConfigForm(Generic[Model]):
    """``value``: the configuration as the form stands. ``changes``: what differs from the one it was made with."""

    def __init__(self, model: Model) -> None:
        self._type, self._start = type(model), model
        self._tree: dict[str, Any] = model.model_dump(mode="json")
        schema = self._type.model_json_schema()
        self._fields = {field.path: field for field in _fields(schema, schema.get("$defs", {}), self._tree, ())}
        self._verdict = ipw.HTML()
        for field in self._fields.values():
            field.widget.observe(lambda _: self._check(), "value")
        self.box = ipw.VBox([_sections(list(self._fields.values())), self._verdict])
        self._check()

    @property
    def value(self) -> Model:
        """Raises ConfigError that names the key, as for a file."""
        tree = copy.deepcopy(self._tree)
        for path, setting in self._changed():
            put(tree, path, setting)
        return validate.build(self._type, _without_none(tree), "the form")

    @property
    def changes(self) -> dict[str, Any]:
        """Dotted key -> new value. Raises ConfigError for a value that is no YAML."""
        return {".".join(path): setting for path, setting in self._changed()}

    def set(self, key: str, value: Any) -> None:
        """Fill in one field, ``"nodes.prefill.count"``. Raises ConfigError for a key that the form does not have."""
        names = {".".join(path): field for path, field in self._fields.items()}
        if key not in names:
            raise ConfigError(f"{key} is not in this form{validate.nearest(key, names)}")
        names[key].write(value)

    def _changed(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        for path, field in self._fields.items():
            setting = field.read()
            if setting != field.start:
                yield path, setting

    def _check(self) -> None:
        try:
            changed = [f"{name}: {_line(setting)}" for name, setting in self.changes.items()]
            self.value  # noqa: B018  (raises)
            self._verdict.value = html.escape("changed: " + ", ".join(changed) if changed else "as in the file")
        except ConfigError as error:
            self._verdict.value = f'<span style="color: #B00020">{html.escape(str(error))}</span>'

    def text(self) -> str:
        """One line per key."""
        return "\n".join(f"{'.'.join(path)}: {field.widget.value}" for path, field in self._fields.items())

    def __str__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**self.box._repr_mimebundle_(**options), "text/plain": self.text()}


class _Field:
    """One key: its widget, and its value in types that YAML knows."""

    def __init__(self, path: tuple[str, ...], schema: Schema, start: Any) -> None:
        self.path, self.start = path, start
        self.widget = self._make(schema)
        self.widget.tooltip = ".".join(path)
        self.widget.layout = ipw.Layout(width="auto", min_width="16em")

    def _make(self, schema: Schema) -> Any:
        choices = schema.get("enum")
        if schema.get("type") == "boolean" and isinstance(self.start, bool):
            return ipw.Checkbox(self.start, indent=False)
        if choices and self.start in choices:
            return ipw.Dropdown(options=choices, value=self.start)
        return ipw.Text(_line(self.start), placeholder=_expected(schema), continuous_update=False)

    def read(self) -> Any:
        """Raises ConfigError."""
        shown = self.widget.value
        if not isinstance(self.widget, ipw.Text):
            return shown
        if shown == _line(self.start):
            return self.start
        try:
            return yaml_file.parse_scalar(shown)
        except ConfigError as error:
            raise ConfigError(f"{'.'.join(self.path)}: {error}") from None

    def write(self, value: Any) -> None:
        self.widget.value = _line(value) if isinstance(self.widget, ipw.Text) else value


def _fields(schema: Schema, defs: Schema, tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[_Field]:
    """One per leaf. Sections: nested models, mappings of models by name, and what a free mapping holds now."""
    for name, value in tree.items():
        inner = _resolved(schema.get("properties", {}).get(name) or _of_mapping(schema), defs)
        here = (*path, name)
        has_keys_of_its_own = "properties" in inner or (value and isinstance(inner.get("additionalProperties"), dict))
        if isinstance(value, dict) and has_keys_of_its_own:
            yield from _fields(inner, defs, value, here)
        elif isinstance(value, dict) and value and not _is_union(inner):
            yield from (_Field((*here, *sub), {}, leaf) for sub, leaf in leaves(value))
        else:
            yield _Field(here, inner, value)


def _of_mapping(schema: Schema) -> Schema:
    extra = schema.get("additionalProperties")
    return extra if isinstance(extra, dict) else {}


def _is_union(schema: Schema) -> bool:
    return "anyOf" in schema or "oneOf" in schema


def _resolved(schema: Schema, defs: Schema) -> Schema:
    """What a ``$ref`` points to; of ``X | None`` the X, as far as it is one thing."""
    if "$ref" in schema:
        return {**defs[schema["$ref"].rpartition("/")[2]], **{k: v for k, v in schema.items() if k != "$ref"}}
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if len(options) == 1 and "$ref" in options[0]:
        return _resolved(options[0], defs)
    return {**schema, **options[0], "enum": None} if len(options) == 1 and not _is_union(options[0]) else schema


def _expected(schema: Schema) -> str:
    """``integer ≥ 1``, as a hint in an empty line."""
    bounds = [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    return " ".join([str(schema.get("type", "YAML")), *bounds])


def _sections(fields: list[_Field]) -> ipw.Widget:
    """Keys of the top first, then a closed fold per section: ``router``, ``nodes.prefill``, ``setting``."""
    groups: dict[str, list[_Field]] = {}
    for field in fields:
        depth = 2 if field.path[0] == "nodes" else 1
        groups.setdefault(".".join(field.path[:depth]) if len(field.path) > depth else "", []).append(field)
    top = _grid(groups.pop("", []), 0)
    folds = ipw.Accordion([_grid(group, len(name.split("."))) for name, group in groups.items()], titles=tuple(groups))
    return ipw.VBox([top, folds]) if groups else top


def _grid(fields: list[_Field], depth: int) -> ipw.GridBox:
    cells: list[ipw.Widget] = []
    for field in fields:
        cells += [ipw.HTML(f"<code>{html.escape('.'.join(field.path[depth:]))}</code>"), field.widget]
    return ipw.GridBox(cells, layout=ipw.Layout(grid_template_columns="max-content minmax(16em, 32em)", grid_gap="0 1em"))


def _line(value: Any) -> str:
    """YAML on one line; nothing for None."""
    return "" if value is None else yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_none(value) if isinstance(value, dict) else value for key, value in tree.items() if value is not None}
