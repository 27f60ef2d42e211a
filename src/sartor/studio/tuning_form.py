"""Form of a tuning recipe, made of the JSON Schema that its declarations give (`sartor schema tune`).

Each option is a field with its description, default, unit and allowed values. A form becomes a recipe by typed values
of the fields that differ from their defaults; what is wrong with a field is what the recipe itself says of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sartor
from sartor.core.errors import ConfigError, SartorError
from sartor.studio.option_schema import Control, OptionSchema, Schema, choices, text_of, value_of, words

# options that a person sets most often, in the order of the form; the others are below a fold
COMMON = (
    "base.name",
    "objective",
    "budget.epochs",
    "budget.minutes",
    "optimizer.learning_rate",
    "method",
    "method.rank",
    "data.max_length_tokens",
    "weights",
)
# given by the page itself
DATASET = "data.path"
# options that name a folder which a run writes to: below the studio's folder alone
WRITTEN_FOLDERS = ("track.folder",)
# verifiers that run code, of the rows or of this machine's modules; a page starts none
VERIFIER, RUNNING_CODE = "objective.verifier", ("unit_tests", "python")
STARTER = "starter"
_UNITS = {
    "minutes": "min",
    "every_minutes": "min",
    "epochs": "epochs",
    "updates": "updates",
    "tokens": "tokens",
    "rows": "rows",
    "gb": "GB",
    "fraction": "0..1",
}


@dataclass(frozen=True)
class RecipeField:
    """An option of the recipe as a control of the form.

    name: dotted, as flags have it.
    kind, union: for an option of one of several kinds, which, and the option that names the kind (objective); else
        empty.
    default: as the form shows it; empty for none.
    choices: allowed values. allows_auto: whether `auto` stands beside the numbers.
    """

    name: str
    text: str
    control: Control
    default: str = ""
    choices: tuple[Any, ...] = ()
    allows_auto: bool = False
    kind: str = ""
    union: str = ""

    @property
    def key(self) -> str:
        """Name of the control in the form; options of two kinds may have one name."""
        return f"{self.name}@{self.kind}" if self.kind else self.name

    @property
    def choice_texts(self) -> list[str]:
        """The allowed values as the form shows them."""
        return [text_of(choice, self.control) for choice in self.choices]

    @property
    def unit(self) -> str:
        """Unit of a number, from the end of its name; empty without one."""
        last = self.name.rpartition(".")[2]
        return _UNITS.get(last) or _UNITS.get(last.rpartition("_")[2], "") if self.control is Control.NUMBER else ""

    @property
    def group(self) -> str:
        """First part of the name, with the kind."""
        return f"{self.name.partition('.')[0]}{f': {self.kind}' if self.kind else ''}"


@dataclass(frozen=True)
class CheckedForm:
    """A form that was read.

    recipe: mapping of the options that differ from their defaults, without the Dataset.
    errors: what is wrong, by the key of the field; "" for what concerns several.
    """

    recipe: Mapping[str, Any]
    errors: Mapping[str, SartorError]


@functools.cache
def recipe_fields() -> tuple[RecipeField, ...]:
    """Return the fields of the form, as declared. The Dataset is left out."""
    schema = OptionSchema(sartor.schema("tune").schema)
    fields = _fields_of(schema, schema.properties, "", {})
    return tuple(field for field in fields if field.name != DATASET)


def _fields_of(
    schema: OptionSchema, properties: Mapping[str, Schema], prefix: str, facts: Mapping[str, str]
) -> Iterator[RecipeField]:
    """Yield the fields of a mapping of options. facts: their kind and union."""
    for key, option in properties.items():
        name = f"{prefix}{key}"
        members = schema.members(option)
        if key == "kind":
            continue
        if not members:
            yield _field(name, option, schema.control(option), choices(option), **facts)
        elif "" in members:
            short = words(option)
            if len(short) > 1 and option.get("default") in short:
                yield _field(name, option, Control.CHOICE, short, **facts)
            yield from _fields_of(schema, members[""]["properties"], f"{name}.", facts)
        else:
            yield _field(name, option, Control.CHOICE, list(members), **facts)
            for kind, member in members.items():
                yield from _fields_of(schema, member["properties"], f"{name}.", {"kind": kind, "union": name})


def _field(name: str, option: Schema, control: Control, allowed: Sequence[Any], **facts: str) -> RecipeField:
    return RecipeField(
        name,
        option.get("description", ""),
        control,
        default=STARTER if name == "base.name" else text_of(option.get("default"), control),
        choices=tuple(allowed),
        allows_auto=control is Control.NUMBER and "auto" in words(option),
        **facts,
    )


def default_values() -> dict[str, str]:
    """Return the values of an untouched form."""
    return {field.key: field.default for field in recipe_fields()}


def check_form(values: Mapping[str, str], dataset: str) -> CheckedForm:
    """Read a form. values: text of each field by its key. dataset: path of the Dataset.

    Each field is first checked alone, with the defaults of the others, so that an error stands beside its field. What
    is wrong with another field, such as a required one of the same kind, is left to that one.
    """
    names = {field.name for field in recipe_fields()}
    kinds = {field.name: values.get(field.key, "") for field in recipe_fields() if field.control is Control.CHOICE}
    changed = [field for field in recipe_fields() if _is_changed(field, values, kinds)]
    errors: dict[str, SartorError] = {}
    recipe: dict[str, Any] = {}
    for field in changed:
        value = value_of(values.get(field.key, ""), field.control, field.choices)
        parent = field.name.rpartition(".")[0]
        alone: dict[str, Any] = {"base": {"name": STARTER}, "data": {"path": dataset}}
        for union, kind in _kinds_of(field):
            _put(alone, f"{union}.kind", kind)
            _put(recipe, f"{union}.kind", kind)
        try:
            if field.name in WRITTEN_FOLDERS:
                _check_written(field.name, str(value))
            if field.name == VERIFIER and value in RUNNING_CODE:
                problem = f"{VERIFIER}.kind is {value}, which runs code; the studio starts none"
                raise ConfigError(problem, f"sartor tune at a shell, or {VERIFIER}.kind: json_schema")
            if parent != field.union and kinds.get(parent) not in (None, "", "auto"):
                raise ConfigError(f"{parent} is {kinds[parent]}, and {field.name} is given", f"{parent}: auto")
            _put(alone, field.name, value)
            sartor.load_recipe(alone)
        except ConfigError as error:
            if error.option not in names - {field.name}:
                errors[field.key] = error
                continue
        _put(recipe, field.name, value)
    if not errors:
        try:
            sartor.load_recipe({**recipe, "data": {"path": dataset, **recipe.get("data", {})}})
        except ConfigError as error:
            errors[""] = error
    return CheckedForm(recipe, errors)


def _kinds_of(field: RecipeField) -> list[tuple[str, str]]:
    """Return the options that name a kind for this field and the kinds, outermost first; empty for most fields."""
    if not field.kind:
        return []
    outer = next((each for each in recipe_fields() if each.name == field.union), None)
    return [*(_kinds_of(outer) if outer else []), (field.union, field.kind)]


def _is_changed(field: RecipeField, values: Mapping[str, str], kinds: Mapping[str, str]) -> bool:
    """Return whether a field is part of the recipe: its value is no default, and its kind is the chosen one."""
    if field.name == "base.name":
        return True
    if any(kinds.get(union) != kind for union, kind in _kinds_of(field)):
        return False
    value = values.get(field.key, field.default).strip()
    return value != field.default and (bool(value) or field.control is Control.CHOICES)


def _put(recipe: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        inner = recipe.get(name)
        recipe[name] = inner if isinstance(inner, dict) else {"kind": inner} if inner else {}
        recipe = recipe[name]
    recipe[last] = value


def _check_written(name: str, path: str) -> None:
    if path.startswith("/") or "\\" in path or ".." in path.split("/"):
        raise ConfigError(f"{name} is {path!r}; the studio writes below its own folder alone", f"{name}: tracking")
