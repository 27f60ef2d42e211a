"""Form of a curation recipe, generated from its JSON Schema, and the recipe that a filled form says.

    sources[0].path, sources[0].fields.prompt, steps[1].kind, steps[1].min_words, split.eval_fraction, seed

A field's name is the dotted path of its option, as the recipe's own errors give it (ConfigError.option), so each error
stands beside its field. A field that is left empty keeps the option's default. What is no scalar or list of scalars is
one field of YAML.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

import sartor
from sartor.core.config import parse_yaml
from sartor.core.errors import ConfigError, SartorError
from sartor.studio.option_schema import Control, OptionSchema, Schema, choices, is_list, text_of, value_of

# errors that a page shows at once, and groups of a list
MAX_ERRORS, MAX_GROUPS = 12, 40
# of a kind that there is not
_UNKNOWN: Schema = {"properties": {}}
_PATH = re.compile(r"([A-Za-z_]\w*)|\[(\d+)\]")


@dataclass(frozen=True)
class FormField:
    """A field of the form.

    name: path of its option. label: the option's own name. text: its help. default: shown while nothing is entered.
    error: what is wrong with it; None if nothing is known to be.
    """

    name: str
    label: str
    control: Control
    text: str
    default: str
    value: str
    choices: Sequence[str] = ()
    is_required: bool = False
    error: SartorError | None = None


@dataclass(frozen=True)
class FormGroup:
    """Fields of one source, one step, or another mapping of the recipe.

    name: path of the mapping; empty for the recipe's own options. kind: of a step; empty for others.
    nested: groups that are folded within it. is_last: of its list.
    """

    name: str
    kind: str
    text: str
    fields: Sequence[FormField]
    nested: Sequence[FormGroup] = ()
    error: SartorError | None = None
    is_last: bool = False


@dataclass(frozen=True)
class FilledForm:
    """A recipe as a form.

    lists: {option: groups} of the lists of mappings, sources and steps. others: the other groups.
    problems: errors that belong to no field.
    """

    lists: Mapping[str, Sequence[FormGroup]]
    others: Sequence[FormGroup]
    problems: Sequence[SartorError] = ()


@dataclass
class _Errors:
    """Errors by the option that they are of. `placed` are those that a field or a group has shown."""

    by_option: Mapping[str, SartorError]
    placed: set[str] = field(default_factory=set)

    def take(self, option: str) -> SartorError | None:
        if option in self.by_option:
            self.placed.add(option)
        return self.by_option.get(option)


class RecipeForm:
    """The form of a kind of recipe. schema: as `sartor.schema` returns it."""

    def __init__(self, schema: Schema) -> None:
        self._schema = OptionSchema(schema)

    def step_kinds(self) -> dict[str, str]:
        """Return the kinds of steps, each with a sentence on it."""
        members = self._schema.members(self._schema.properties["steps"])
        return {kind: str(definition.get("description", "")) for kind, definition in members.items()}

    def fill(self, recipe: Mapping[str, Any], errors: Sequence[SartorError] = ()) -> FilledForm:
        """Return the form with the values of a recipe, which need not be valid, and its errors."""
        known = _Errors({error.option: error for error in reversed(errors) if error.option})
        lists: dict[str, Sequence[FormGroup]] = {}
        others: list[FormGroup] = []
        own: list[FormField] = []
        for key, schema in self._schema.properties.items():
            members, value = self._schema.members(schema), recipe.get(key)
            if members and is_list(schema):
                items = value if isinstance(value, list) else [] if value is None else [value]
                lists[key] = [
                    self._group(f"{key}[{index}]", members, item, known, is_last=index == len(items) - 1)
                    for index, item in enumerate(items[:MAX_GROUPS])
                ]
            elif members:
                others.append(self._group(key, members, {} if value is None else value, known))
            else:
                own.append(self._field(key, key, schema, value, known))
        others.append(FormGroup("", "", "", own))
        left = [error for error in errors if error.option not in known.placed]
        return FilledForm(lists, others, left)

    def _group(
        self, name: str, members: Mapping[str, Schema], value: Any, errors: _Errors, *, is_last: bool = False
    ) -> FormGroup:
        kind, definition, fields = _chosen(members, value)
        leaves: list[FormField] = []
        nested: list[FormGroup] = []
        for key, schema in definition["properties"].items():
            if key == "kind":
                continue
            inner = self._schema.members(schema)
            path = f"{name}.{key}"
            if list(inner) == [""] and not is_list(schema):
                nested.append(self._group(path, inner, fields.get(key) or {}, errors))
            else:
                is_required = key in definition.get("required", ())
                leaves.append(self._field(path, key, schema, fields.get(key), errors, is_required=is_required))
        error = errors.take(name) or errors.take(f"{name}.kind")
        return FormGroup(name, kind, str(definition.get("description", "")), leaves, nested, error, is_last)

    def _field(
        self, name: str, label: str, schema: Schema, value: Any, errors: _Errors, *, is_required: bool = False
    ) -> FormField:
        control = self._schema.control(schema)
        default = schema.get("default")
        return FormField(
            name=name,
            label=label,
            control=control,
            text=str(schema.get("description", "")),
            default=text_of(default, control) if default not in (None, "", []) else "",
            value=text_of(value, control),
            choices=[text_of(choice, control) for choice in choices(schema)],
            is_required=is_required,
            error=errors.take(name),
        )

    def without_defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return a recipe, such as that of a manifest, without options that are at their defaults."""
        filled = self.fill(recipe)
        waiting = [*(group for groups in filled.lists.values() for group in groups), *filled.others]
        fields: dict[str, str] = {}
        while waiting:
            group = waiting.pop(0)
            waiting += group.nested
            fields |= {f"{group.name}.kind": group.kind} if group.kind else {}
            fields |= {item.name: item.value for item in group.fields if item.value != item.default}
        return self.read(fields)

    def read(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return the recipe that a filled form says. Raises ConfigError for a field of YAML that is none."""
        recipe: dict[str, Any] = {}
        for key, schema in self._schema.properties.items():
            members = self._schema.members(schema)
            if members and is_list(schema):
                recipe[key] = [self._read_group(f"{key}[{index}]", members, fields) for index in _indices(key, fields)]
            elif members:
                if value := self._read_group(key, members, fields):
                    recipe[key] = value
            elif (text := fields.get(key, "").strip()) != "":
                recipe[key] = self._parsed(key, text, schema)
        return recipe

    def _read_group(self, name: str, members: Mapping[str, Schema], fields: Mapping[str, str]) -> dict[str, Any]:
        kind = fields.get(f"{name}.kind", "")
        result: dict[str, Any] = {"kind": kind} if kind else {}
        _, definition, _ = _chosen(members, result)
        for key, schema in definition["properties"].items():
            if key == "kind":
                continue
            inner, path = self._schema.members(schema), f"{name}.{key}"
            if list(inner) == [""] and not is_list(schema):
                if value := self._read_group(path, inner, fields):
                    result[key] = value
            elif (text := fields.get(path, "").strip()) != "":
                result[key] = self._parsed(path, text, schema)
        return result

    def _parsed(self, name: str, text: str, schema: Schema) -> Any:
        control = self._schema.control(schema)
        text = text.replace("\r\n", "\n")  # as browsers end the lines of a text area
        if control is not Control.YAML:
            return value_of(text, control, choices(schema))
        try:
            return parse_yaml(f"value:\n{textwrap.indent(text, '  ')}", name)["value"]
        except ConfigError as error:
            error.option = name
            raise


def check_recipe(recipe: Mapping[str, Any]) -> list[SartorError]:
    """Return the errors of a recipe, the first of each option; none if it can be run.

    An option with an error is left out for the next look, so that the errors after it are found too.
    """
    errors: list[SartorError] = []
    remaining = copy.deepcopy(dict(recipe))
    while len(errors) < MAX_ERRORS:
        try:
            sartor.load_curate_recipe(remaining)
        except SartorError as error:
            errors.append(error)
            if not _remove(remaining, error.option):
                return errors
        else:
            return errors
    return errors


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=110)


def _remove(recipe: Any, option: str) -> bool:
    """Take an option out of a recipe; return whether it was there."""
    keys: list[str | int] = [int(index) if index else name for name, index in _PATH.findall(option)]
    if not keys or isinstance(keys[-1], int):
        return False
    try:
        for key in keys[:-1]:
            recipe = recipe[key]
        del recipe[keys[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _chosen(members: Mapping[str, Schema], value: Any) -> tuple[str, Schema, Mapping[str, Any]]:
    """Return kind, definition and options of a mapping, with the shorthands of `core/config.py` written out."""
    if isinstance(value, str) and value in members:
        value = {"kind": value}
    if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in members and "kind" not in value:
        ((kind, options),) = value.items()
        options = {} if options is None else options
        _, definition, fields = _chosen({"": members[kind]}, options)
        return kind, definition, fields
    is_union = "" not in members
    if not isinstance(value, Mapping):
        if is_union:
            return str(value)[:100], _UNKNOWN, {}
        value = {next(name for name in members[""]["properties"] if name != "kind"): value}
    kind = str(value.get("kind", ""))[:100] if is_union else ""
    return kind, members.get(kind, _UNKNOWN), value


def _indices(key: str, fields: Mapping[str, str]) -> Iterator[int]:
    """Yield the numbers of the groups of a list that a form has, in order."""
    found = set()
    for name in fields:
        match = re.match(rf"{re.escape(key)}\[(\d{{1,3}})\]", name)
        if match:
            found.add(int(match[1]))
    yield from sorted(found)[:MAX_GROUPS]
