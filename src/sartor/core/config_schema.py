"""JSON Schemas (draft 2020-12) of files that `core/config.py` reads, for editors.

    schema_of(Recipe, title="Tuning recipe")

A schema accepts the forms that `config.load` accepts, shorthands included, and holds the help texts and defaults of
the declarations. Left to `config.load` is what a JSON Schema cannot say: checks in `__post_init__`, such as a fraction
that must be below 1, and the difference between 3 and 3.0, which JSON does not make.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sartor.core.config import dump, first_sentence, has_kind, kind_of, option_key

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_DIGITS = "[0-9](_?[0-9])*"
# Text that Python's float() reads: `2e-4` is a string to YAML 1.1, which knows no number without a point.
_NUMBER_TEXT = (
    rf"^\s*[+-]?(({_DIGITS}\.?({_DIGITS})?|\.{_DIGITS})([eE][+-]?{_DIGITS})?"
    r"|[iI][nN][fF]([iI][nN][iI][tT][yY])?|[nN][aA][nN])\s*$"
)
_NUMBER: Schema = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _NUMBER_TEXT}]}
_NULL: Schema = {"type": "null"}
_SCALARS: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    float: {"$ref": "#/$defs/number"},
    type(None): _NULL,
}
_NO_MAPPING: Schema = {"type": ["array", "boolean", "null", "number", "string"]}
_NO_MAPPING_OR_NULL: Schema = {"type": ["array", "boolean", "number", "string"]}


def schema_of(cls: type, *, title: str) -> Schema:
    """Return the JSON Schema of a file whose options `cls` declares.

    Raises TypeError for a type hint that `config.load` does not build.
    """
    writer = _SchemaWriter()
    body = writer.options_of(cls)
    definitions = {writer.names[member]: schema for member, schema in writer.schemas.items()}
    return {
        "$schema": DRAFT,
        "title": title,
        **body,
        "$defs": {**dict(sorted(definitions.items())), "number": _NUMBER},
    }


class _SchemaWriter:
    """Schemas of classes and type hints; a class is defined once and referred to by its name.

    schemas: definition of each class. names: its name below `$defs`.
    """

    def __init__(self) -> None:
        self.schemas: dict[type, Schema] = {}
        self.names: dict[type, str] = {}

    def options_of(self, cls: Any) -> Schema:
        """Return the schema of a mapping with the options of `cls`, of which `kind` may be left out."""
        hints = get_type_hints(cls)
        properties: dict[str, Schema] = {}
        required: list[str] = []
        for field in dataclasses.fields(cls):
            key = option_key(field.name)
            if key == "kind":
                properties[key] = {"const": kind_of(cls), "description": first_sentence(cls)}
                continue
            text = field.metadata.get("help", "")
            hint = hints[field.name]
            mappings, others = [*self._mappings(hint)], [*self._others(hint)]
            if default_kind := field.metadata.get("default_kind"):  # its options may stand without a kind
                member = next(cls for cls in _classes_by_kind(hint) if kind_of(cls) == default_kind)
                mappings, others = [self._reference(member), *mappings], [*others, *self._shorthands(member)]
            value = _any_of([*mappings, *others])
            properties[key] = {**value, **({"description": text} if text else {}), **_default_of(field)}
            if field.default is dataclasses.MISSING:
                required.append(key)
        return {
            "type": "object",
            "description": first_sentence(cls),
            "properties": properties,
            **({"required": required} if required else {}),
            "additionalProperties": False,
        }

    def _reference(self, cls: Any) -> Schema:
        if cls not in self.names:
            # classes of two packages may have one name
            is_taken = cls.__name__ in self.names.values()
            self.names[cls] = f"{cls.__module__}.{cls.__name__}" if is_taken else cls.__name__
            self.schemas[cls] = self.options_of(cls)  # named before, since a class may hold itself
        return {"$ref": f"#/$defs/{self.names[cls]}"}

    def _mappings(self, hint: Any) -> Iterator[Schema]:
        """Yield the schemas of the mappings that a type hint accepts."""
        if hint is Any:
            yield {"type": "object"}
        elif dataclasses.is_dataclass(hint):
            yield self._reference(hint)
        elif get_origin(hint) is tuple:  # an item stands for a list of one
            yield from self._mappings(get_args(hint)[0])
        elif classes := _classes_by_kind(hint):
            for cls in classes:
                yield {"allOf": [self._reference(cls), {"required": ["kind"]}]}
            for cls in classes:
                yield self._named_mapping(cls)
        elif get_origin(hint) in (Union, types.UnionType):
            for member in get_args(hint):
                yield from self._mappings(member)

    def _named_mapping(self, cls: Any) -> Schema:
        """Return the schema of the shorthand `{length: {min_words: 3}}`, in which the only key is the kind."""
        values = [self._reference(cls), *self._shorthands(cls)]
        # nothing after the name means the defaults, and never that the first option is null
        if not _has_required(cls):
            values.append(_NULL)
        else:
            values = [_NO_MAPPING_OR_NULL if schema == _NO_MAPPING else schema for schema in values if schema != _NULL]
        return {
            "type": "object",
            "properties": {kind_of(cls): {**_any_of(values), "description": first_sentence(cls)}},
            "required": [kind_of(cls)],
            "additionalProperties": False,
        }

    def _others(self, hint: Any) -> Iterator[Schema]:
        """Yield the schemas of the values other than mappings that a type hint accepts."""
        if hint is Any:
            yield _NO_MAPPING
        elif hint in _SCALARS:
            yield _SCALARS[hint]
        elif get_origin(hint) is Literal:
            yield {"enum": list(get_args(hint))}
        elif get_origin(hint) is tuple:
            item = get_args(hint)[0]
            yield {"type": "array", "items": _any_of([*self._mappings(item), *self._others(item)])}
            yield from self._others(item)
        elif dataclasses.is_dataclass(hint):
            yield from self._shorthands(hint)
        elif classes := _classes_by_kind(hint):
            yield from (_kind_alone(cls) for cls in classes if not _has_required(cls))
            if type(None) in get_args(hint):
                yield _NULL
        elif get_origin(hint) in (Union, types.UnionType):
            for member in get_args(hint):
                yield from self._others(member)
        else:
            raise TypeError(f"no JSON Schema for the type {hint}")

    def _shorthands(self, cls: Any) -> Iterator[Schema]:
        """Yield the values that stand for a mapping: the class's kind, or a value of its first option."""
        fields = [field for field in dataclasses.fields(cls) if field.name != "kind"]
        if has_kind(cls) and not _has_required(cls):
            yield _kind_alone(cls)
        if fields and all(field.default is not dataclasses.MISSING for field in fields[1:]):
            yield from self._others(get_type_hints(cls)[fields[0].name])


def _default_of(field: dataclasses.Field[Any]) -> Schema:
    """Return the keyword `default` of a field; nothing for a mapping, which an editor would write out in full."""
    default: Any = field.default
    if default is dataclasses.MISSING or default is None:
        return {}
    items = default if isinstance(default, tuple) else (default,)
    if any(dataclasses.is_dataclass(item) and not has_kind(item) for item in items):
        return {}
    values = [kind_of(item) if dataclasses.is_dataclass(item) else dump(item) for item in items]
    return {"default": values if isinstance(default, tuple) else values[0]}


def _kind_alone(cls: Any) -> Schema:
    return {"const": kind_of(cls), "description": first_sentence(cls)}


def _has_required(cls: Any) -> bool:
    return any(field.default is dataclasses.MISSING for field in dataclasses.fields(cls))


def _classes_by_kind(hint: Any) -> list[Any]:
    """Return the classes of a union of which `kind` selects one; none if the hint is no such union."""
    if get_origin(hint) not in (Union, types.UnionType):
        return []
    classes = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    return classes if any(has_kind(cls) for cls in classes) else []


def _any_of(schemas: Sequence[Schema]) -> Schema:
    """Return the schema of values that at least one of some schemas accepts, without repetitions."""
    unique = [schema for index, schema in enumerate(schemas) if schema not in schemas[:index]]
    return dict(unique[0]) if len(unique) == 1 else {"anyOf": unique}
