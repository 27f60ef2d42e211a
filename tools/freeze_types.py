"""Types, defaults and JSON as texts that hold no module path and no name of a private class."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin

import sartor

# what stands for a class of Sartor that the façade does not name: its own name may change
PRIVATE = "(a class of Sartor)"


def public_names() -> dict[int, str]:
    """Return the façade's classes by id. A class is public under the façade's name, whatever its own is."""
    named = {name: getattr(sartor, name) for name in sartor.__all__}
    return {id(value): name for name, value in named.items() if isinstance(value, type)}


def is_own(cls: Any) -> bool:
    """Return whether a class is defined in Sartor."""
    return str(getattr(cls, "__module__", "")).partition(".")[0] == "sartor"


def type_text(hint: Any) -> str:
    """Return a type hint by short names: `str | None`, `tuple[Example, ...]`, `Literal['a', 'b']`."""
    if hint is None or hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    if isinstance(hint, (str, int)):  # a choice
        return repr(hint)
    if isinstance(hint, list):  # the arguments of a Callable
        return f"[{', '.join(type_text(inner) for inner in hint)}]"
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return type_text(inner[0])
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(member) for member in inner)
    if origin is Literal:
        return f"Literal[{', '.join(repr(choice) for choice in inner)}]"
    if origin is not None:
        name = type_text(origin)
        return f"{name}[{', '.join(type_text(member) for member in inner)}]" if inner else name
    if isinstance(hint, typing.TypeVar):
        return "TypeVar"
    if is_own(hint):
        return public_names().get(id(hint), PRIVATE)
    return str(getattr(hint, "__name__", None) or getattr(hint, "_name", None) or hint).rpartition(".")[2]


def default_value(value: Any) -> Any:
    """Return a default as JSON: options as mappings, paths and enums as texts, functions by kind alone."""
    if value is None or isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {option_key(field): default_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [default_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((default_value(item) for item in value), key=str)
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): default_value(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return f"Path {value.as_posix()}"
    if isinstance(value, enum.Enum):
        return default_value(value.value)
    if isinstance(value, type):
        return type_text(value)
    return "(a function)" if isinstance(value, Callable) else f"({type_text(type(value))})"  # type: ignore[arg-type]


def option_key(field: dataclasses.Field[Any]) -> str:
    """Return the key of an option's field: the one of its metadata, else its name, in which `with_` is `with`."""
    return str(field.metadata.get("key") or field.name.removesuffix("_"))


def shape(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path of each value in JSON with the types that it has there; items of a list are taken together."""
    types: dict[str, set[str]] = {}
    _add_shape(name, value, types)
    yield from ((path, " | ".join(sorted(names))) for path, names in types.items())


def _add_shape(path: str, value: Any, types: dict[str, set[str]]) -> None:
    names = {dict: "object", list: "array", str: "text", bool: "boolean", int: "integer", float: "number"}
    types.setdefault(path, set()).add(names.get(type(value), "null"))
    if isinstance(value, dict):
        for key, inner in value.items():
            _add_shape(f"{path}.{key}", inner, types)
    if isinstance(value, list):
        for inner in value:
            _add_shape(f"{path}[]", inner, types)
