"""Dataclass options read from YAML and flags, and written to help texts and manifests.

    @dataclass(frozen=True)
    class Split:
        eval_fraction: float = option(0.1, "fraction of the rows held out")

`load` reads YAML and flag overrides into such a class, `dump` writes one back, `describe` lists its options for a help
text. The `kind` field selects a class of a union. Two shorthands keep YAML short: a scalar or list stands for the
first field that is not `kind` (`base: starter`), and in a union `{length: {min_words: 3}}` or just `length` names the
kind. Values are not coerced, with three exceptions: where a float is declared, an int, and text such as `2e-4`, which
YAML reads as a string; where text is declared, a path object (os.PathLike).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import re
import shlex
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sartor.core.errors import ConfigError, about_option

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING
SUFFIXES_OF_ROWS = (".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx", ".parquet")
_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z`])")  # skips the full stop in "et al. 2023"


def option(default: Any, text: str, *, default_kind: str = "") -> Any:
    """Return a dataclass field with its help text.

    default: a tuple for list-like options; REQUIRED if there is none. default_kind: the kind of a union whose options
    may stand without one, as they did while there was no other kind.
    """
    return dataclasses.field(default=default, metadata={"help": text, "default_kind": default_kind})


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """YAML loader that refuses duplicate keys; PyYAML silently keeps the last of two."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice",
                    f"delete that line, or the earlier `{key}:`",
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


# Dates stay text, as in JSON: YAML would read `expires: 2027-12-31` as a date, which no manifest can hold.
_UniqueKeys.yaml_implicit_resolvers = {}
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _UniqueKeys.yaml_implicit_resolvers[_first] = [
        (tag, pattern) for tag, pattern in _resolvers if tag != "tag:yaml.org,2002:timestamp"
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ConfigError with the line where it does not parse."""
    if path.suffix.lower() in SUFFIXES_OF_ROWS and path.is_file():
        problem = f"{path} is a file of rows, not a recipe"
        raise ConfigError(problem, f"sartor init {shlex.quote(str(path))} writes recipes for these rows")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file at {path}",
            f"ls {shlex.quote(str(path.parent))} shows what is there; sartor init DATA writes recipes, and sartor "
            "schema tells of a team's file and the others",
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", "the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as text: {error}",
            f"ls -l {shlex.quote(str(path))}; of another encoding: iconv -f CP1252 -t UTF-8 "
            f"{shlex.quote(str(path))} > recipe.yaml",
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Return the mapping in a YAML text. Raises ConfigError with the line where it does not parse.

    name: of the text, for its errors.
    """
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[{" else -1
        if depth > _MOST_NESTED:  # PyYAML's time grows with the square of it
            raise ConfigError(
                f"{name} has more than {_MOST_NESTED} brackets open at once",
                "close them, or write lists and mappings by lines and indentation",
            )
    try:
        data = yaml.load(text, _UniqueKeys)  # based on SafeLoader: builds plain values only
    except ConfigError as error:
        raise ConfigError(f"{name}, {error.problem}", error.remedy) from None
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        position = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{name}{position} is not YAML: {getattr(error, 'problem', error)}",
            "write it as `key: value`, indented by spaces; quote a value that holds `: `, ` #` or begins with a sign",
        ) from None
    if not isinstance(data, dict):
        description = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{name} holds {description}, not a mapping of options", "write `key: value` lines")
    if _written_out(data, {}) > _MOST_VALUES:
        raise ConfigError(
            f"{name} holds more than {_MOST_VALUES:,} values once its aliases (*NAME) are written out",
            "write the values out where they are needed, without aliases of aliases",
        )
    return data


# A tag that does not fit its value (`!!int x`, `!!bool x`, `!!map [a]`) and numbers such as `0x_` end PyYAML's
# constructors in plain errors of Python.
_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError, AttributeError, OverflowError)
_MOST_VALUES = 1_000_000
_BRACKET = re.compile(r"[\[\]{}]")
_MOST_NESTED = 1000


def _written_out(value: Any, sizes: dict[int, int]) -> int:
    """Return the number of values without aliases; infinite ones count as too many.

    sizes: by the id of a container; 0 while it is counted, so that one that holds itself is found.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) in sizes:
        return sizes[id(value)] or _MOST_VALUES + 1
    sizes[id(value)] = 0
    parts = value.values() if isinstance(value, dict) else value
    sizes[id(value)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(value)]


def load(cls: type[T], data: Mapping[str, Any], flags: Sequence[str] = ()) -> T:
    """Build an instance of `cls` from a mapping, then apply flags.

    data: a key may be dotted (`method.rank: 8`), as the remedies of errors have it.
    flags: `--method.rank 8` or `--method.rank=8`.
    Raises ConfigError naming the option and the closest valid one.
    """
    flag_names = []
    dotted = _dotted_keys(cls, data)
    if flags or dotted:
        # flags may supply required options, so the file alone may be incomplete; its shorthands are expanded first
        expanded = _expanded(cls, {key: value for key, value in data.items() if key not in dotted})
        for key in sorted(dotted, key=_depth):
            if _is_set(expanded, key):
                raise ConfigError(f"{key!r} stands twice, also under {key.split('.')[0]!r}", "remove one of the two")
            _set(expanded, key, data[key], is_flag=False)
            expanded = _expanded(cls, expanded)
        # wherever they stand on the command line, a flag comes before those below it, and a kind before its options
        for key, text in sorted(_flag_pairs(flags), key=lambda pair: _depth(pair[0])):
            try:
                value = yaml.load(text, _UniqueKeys) if text else text
            except yaml.YAMLError:
                problem = f"--{key} is {text!r}, which is not YAML"
                raise ConfigError(problem, f"quote it: --{key} \"'...'\"") from None
            _set(expanded, key, value, is_flag=True)
            flag_names.append(_DOTTED_INDEX.sub(r"[\1]", key))  # as errors name it
            expanded = _expanded(cls, expanded)  # `--objective dpo --objective.beta 0.2`
        data = expanded
    try:
        return _build(cls, data, "")
    except ConfigError as error:
        option = f"{error.option}."
        if any(option.startswith(f"{key}.") or f"{key}.".startswith(option) for key in flag_names):
            raise about_option(ConfigError(error.problem, _flag_remedy(error)), error.option) from None
        raise


def _dotted_keys(cls: Any, data: Mapping[str, Any]) -> list[str]:
    """Return the keys of a mapping that name an option below one of `cls`."""
    names = {option_key(field.name) for field in dataclasses.fields(cls)}
    dotted = [key for key in data if isinstance(key, str) and _DOTTED.fullmatch(key)]
    return [key for key in dotted if re.split(r"[.\[]", key)[0] in names]


_DOTTED = re.compile(r"\w+(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)+")


def _is_set(options: Any, key: str) -> bool:
    """Return whether a mapping has a value for a dotted key."""
    for part in key.split("."):
        options = options.get(part) if isinstance(options, Mapping) else None
    return options is not None


def _depth(key: str) -> tuple[int, bool]:
    """Return the sort key of a dotted option: by depth, and the kind before its options."""
    return key.count("."), not key.endswith(".kind")


_DOTTED_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def _flag_remedy(error: ConfigError) -> str:
    """Return the remedy of an error of an option that a flag set: `rank: 16` as `--method.rank 16`."""
    if meant := re.fullmatch(r"([\w.\[\]]+): \.\.\.", error.remedy):
        return f"--{meant[1]} VALUE"
    name = error.option.rpartition(".")[2]
    # one word or a placeholder, as a shell takes it
    line = re.fullmatch(rf"(?:{re.escape(error.option)}|{re.escape(name)}): ([\w.+-]+|<[\w ]+>)", error.remedy)
    return f"--{error.option} {line[1]}" if line else error.remedy


def load_any(cls: type[T], recipe: T | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> T:
    """Build `cls` from any form that a verb takes: an instance, a mapping, or the path of a YAML file."""
    if isinstance(recipe, cls):
        return load(cls, dump(recipe), flags)
    return load(cls, recipe if isinstance(recipe, Mapping) else read_yaml(Path(str(recipe))), flags)


def dump(value: Any) -> Any:
    """Return the plain mapping that `load` turns back into an equal value, for manifests and YAML."""
    if dataclasses.is_dataclass(value):
        return {option_key(f.name): dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    return value


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted option, type and default, help text) of every option below `cls`, as declared.

    The options of a class with a `kind` follow a line `NAME.kind` with its choices. A line `NAME.kind CHOICE` with the
    first sentence of the class's docstring introduces each choice. Equal options within lists are described once.
    """
    yield from ((line.name, line.declared, line.text) for line in _describe(cls, prefix, {}))


class _Described(NamedTuple):
    """One line of `describe`.

    states_kind: whether the line is a choice of kind, or already names the kind that it belongs to.
    """

    name: str
    declared: str
    text: str
    states_kind: bool = False


def _describe(cls: type, prefix: str, seen: dict[tuple[type, ...], str]) -> Iterator[_Described]:
    """Yield the lines of `describe`.

    seen: classes of an option below a list -> the option under which they were described.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name == "kind":
            continue
        name, hint = f"{prefix}{option_key(field.name)}", hints[field.name]
        members, text = _classes(hint), field.metadata.get("help", "")
        declared = f"{_describe_type(hint)}, {_default_text(field)}"
        if "[]" in prefix and tuple(members) in seen:
            yield _Described(name, f"{declared}, options as of {seen[tuple(members)]}", text)
            continue
        if not members or _is_list(hint) or (field.default == "auto" and "auto" in _literals(hint)):
            yield _Described(name, declared, text)
        dotted_name = f"{name}[]" if _is_list(hint) else name
        if members and "[]" in prefix:
            seen[tuple(members)] = dotted_name
        if any(has_kind(member) for member in members):
            choices = " | ".join(kind_of(member) for member in members)
            yield _Described(
                f"{dotted_name}.kind", f"{choices}, {'required' if _is_list(hint) else _default_text(field)}", text
            )
        for member in members:
            yield from _describe_member(member, dotted_name, len(members) > 1, seen)


def _describe_member(
    member: type, dotted_name: str, is_one_of_several: bool, seen: dict[tuple[type, ...], str]
) -> Iterator[_Described]:
    if has_kind(member):
        yield _Described(f"{dotted_name}.kind {kind_of(member)}", "a choice", first_sentence(member), states_kind=True)
    for line in _describe(member, f"{dotted_name}.", seen):
        if is_one_of_several and not line.states_kind:
            line = line._replace(declared=f"{line.declared}, with kind {kind_of(member)}", states_kind=True)
        yield line


def first_sentence(cls: type) -> str:
    """Return the first sentence of a class's docstring, which explains its `kind`."""
    paragraph = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph)[0]
    return sentence if sentence.endswith(".") else f"{sentence}."


def choices_text(classes: Iterable[type]) -> str:
    """Return `kind: first sentence` of each class, for an option that names a kind as text."""
    return " ".join(f"{kind_of(cls)}: {first_sentence(cls)}" for cls in classes)


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(field.default) and has_kind(field.default):
        return f"default {kind_of(type(field.default))}"
    default: Any = field.default
    if isinstance(default, tuple) and default and all(dataclasses.is_dataclass(item) for item in default):
        return f"default [{', '.join(kind_of(type(item)) for item in default)}]"  # as a recipe would write it
    return f"default {dump(default)!r}"


def _flag_pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    remaining = list(flags)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} stands where an option is expected", "write --option VALUE")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise ConfigError(f"--{key} has no value", f"write --{key} VALUE")
            text = remaining.pop(0)
        yield key.replace("-", "_"), text


def _set(data: dict[str, Any], option: str, value: Any, *, is_flag: bool) -> None:
    """Set an option by its dotted name: `method.rank`; of a list `sources[0].path`, as errors do, or `sources.0.path`.

    is_flag: how errors write it.
    Raises ConfigError where it is below a value without options, or of an item that a list does not have.
    """
    path = option.replace("[", ".[").split(".")
    written = f"--{option}" if is_flag else option
    form = "--{} '{}'" if is_flag else "{}: {}"
    options: Any = data
    for depth, part in enumerate(path, start=1):
        name, above = ".".join(path[:depth]).replace(".[", "["), ".".join(path[: depth - 1]).replace(".[", "[")
        key: Any = part
        if isinstance(options, list):
            key = int(part.strip("[]"))
            if key >= len(options):
                problem = f"{written} is item {key} of {above!r}, counted from 0; it has {len(options)}"
                raise ConfigError(problem, form.format(above, "[...]"))
        if depth == len(path):
            if part == "kind" and options.get("kind", value) != value:
                options.clear()  # options of another kind do not apply
            options[key] = value
            return
        inner = options[key] if isinstance(options, list) else options.get(key)
        below = path[depth]
        if inner in (None, "auto"):
            if below.startswith("["):
                raise ConfigError(f"{written} is an item of {name!r}, which is not given", form.format(name, "[...]"))
            inner = {}
        if isinstance(inner, (list, tuple)):
            if not re.fullmatch(r"\[\d+\]|\d+", below):
                remedy = form.format(f"{name}.0.{below}".replace(".[", "["), "...")
                raise ConfigError(f"{written} goes below the list {name!r}; an item is named by its number", remedy)
            inner = list(inner)
        elif isinstance(inner, dict):
            inner = dict(inner)
        else:
            raise ConfigError(f"{written} goes below {name!r}, which is {inner!r}", form.format(name, "{...}"))
        options[key] = inner  # a copy, since the mapping may be the caller's
        options = inner


def _expanded(cls: Any, data: Any) -> Any:
    """Return `data` with its shorthands expanded, so that flags can address the options below them."""
    data = dict(data)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        members = _classes(hints[field.name])
        if members and not _is_list(hints[field.name]) and data.get(field.name) is not None:
            value = data[field.name]
            if value in _literals(hints[field.name]):
                continue  # `budget: auto` is a literal, not a shorthand
            if len(members) > 1:
                value = _with_kind({kind_of(member): member for member in members}, value)
                value = _with_default_kind(field, members, value)
                data[field.name] = dict(value) if isinstance(value, Mapping) else {"kind": value}
                continue
            value = value if isinstance(value, Mapping) else _from_shorthand(members[0], value)
            data[field.name] = _expanded(members[0], value)
    return data


def _build(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint and build it.

    where: dotted path of the option, for messages.
    """
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build_class(hint, value, where)
    if origin in (Union, types.UnionType):
        return _build_union(hint, value, where)
    if origin is Literal:
        if value in get_args(hint) and type(value) in {type(choice) for choice in get_args(hint)}:
            return value
        raise _invalid_value(where, value, _describe_type(hint), _closest_name(value, get_args(hint)))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_build(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if hint is str and isinstance(value, os.PathLike):  # from Python: a Path, or an opened Dataset
        value = os.fspath(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _invalid_value(where, value, "a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _invalid_value(where, value, "a number below 1.8e308") from None
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise _invalid_value(where, value, _describe_type(hint))


def _build_union(hint: Any, value: Any, where: str) -> Any:
    members = get_args(hint)
    classes = [member for member in members if dataclasses.is_dataclass(member)]
    if value is None and type(None) in members:
        return None
    if len(classes) > 1 or (classes and has_kind(classes[0])):
        return _build_class(*_by_kind(classes, value, where), where)
    failure: ConfigError | None = None
    for member in members:
        if member is not type(None):
            try:
                return _build(member, value, where)
            except ConfigError as error:
                # for a mapping keep the last error, which names an option inside it; otherwise the first
                failure = failure if failure and not isinstance(value, Mapping) else error
    assert failure is not None
    if isinstance(value, Mapping):
        raise failure
    raise _invalid_value(where, value, _describe_type(hint))


def _by_kind(classes: Sequence[Any], value: Any, where: str) -> tuple[Any, Any]:
    """Return the member of a union that `value` selects, and the mapping for it."""
    kinds = {kind_of(cls): cls for cls in classes}
    value = _with_kind(kinds, value)
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(kind, str) or kind not in kinds:
        key_or_kind = next(iter(value), None) if isinstance(value, Mapping) and kind is None else kind
        having = []  # kinds with an option of that name
        for name, cls in kinds.items():
            if kind is None and any(option_key(field.name) == key_or_kind for field in dataclasses.fields(cls)):
                having.append(name)
        if having:
            problem = (
                f"{where} has {key_or_kind!r} and no kind; {key_or_kind!r} is an option of {' and '.join(having)}"
            )
            raise about_option(ConfigError(problem, f"{where}.kind: {having[0]}"), where)
        raise _invalid_value(
            f"{where}.kind".lstrip("."),
            key_or_kind,
            f"one of {', '.join(kinds)}",
            _closest_name(key_or_kind, list(kinds)),
        )
    return kinds[kind], value


def _with_kind(kinds: Mapping[str, Any], value: Any) -> Any:
    """Expand the shorthands `length` and `{length: {min_words: 3}}` of a union to a mapping with `kind`."""
    if isinstance(value, str):
        return {"kind": value}
    if not isinstance(value, Mapping) or "kind" in value or len(value) != 1:
        return value
    ((kind, options),) = value.items()
    if kind not in kinds:
        return value
    options = {} if options is None else options
    return {"kind": kind, **(options if isinstance(options, Mapping) else _from_shorthand(kinds[kind], options))}


def _with_default_kind(field: dataclasses.Field[Any], members: Sequence[Any], value: Any) -> Any:
    """Return the options of a union with the field's default kind, if they name none and are options of that kind."""
    default_kind = field.metadata.get("default_kind")
    if not default_kind:
        return value
    kinds = {kind_of(member): member for member in members}
    value = _with_kind(kinds, value)
    if not isinstance(value, Mapping):
        return {"kind": default_kind, **_from_shorthand(kinds[default_kind], value)}
    names = {kind: {option_key(item.name) for item in dataclasses.fields(member)} for kind, member in kinds.items()}
    # options of other kinds alone: `_by_kind` names the kinds that have them
    is_foreign = not set(value) <= names[default_kind] and any(set(value) <= others for others in names.values())
    return value if "kind" in value or is_foreign else {"kind": default_kind, **value}


def _build_class(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        value = _from_shorthand(cls, value)
    fields = {option_key(field.name): field for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            path, suggestion = f"{where}.{key}".lstrip("."), _name_below(cls, key) or _closest_name(key, list(fields))
            names = ", ".join(name for name in fields if name != "kind")
            problem, remedy = f"there is no option {path!r}", f"leave {path} out"
            if suggestion:
                problem += f"; {suggestion!r} was probably meant"
                remedy = f"{where}.{suggestion}: ...".lstrip(".")
            elif names:
                remedy = f"one of {names}"
            raise about_option(ConfigError(problem, remedy), path)
    hints = get_type_hints(cls)
    built = {}
    for name, field in fields.items():
        path = f"{where}.{name}".lstrip(".")
        if name in value:
            hint = hints[field.name]
            built[field.name] = _build(hint, _with_default_kind(field, _classes(hint), value[name]), path)
        elif field.default is dataclasses.MISSING:
            problem = f"the option {path!r} is missing: {field.metadata.get('help', '')}"
            raise about_option(ConfigError(problem, f"{path}: ..."), path)
    try:
        return cls(**built)
    except ConfigError as error:
        prefix = f"{where}: " if where else ""
        # by convention a class's own check begins with the option's name, or its remedy is the line to write
        first_words = (text.replace(".", " ").replace(":", " ").split()[:1] for text in (error.problem, error.remedy))
        name = next((word for words in first_words for word in words if word in fields), "")
        path = ".".join(part for part in (where, name) if part)
        raise about_option(ConfigError(f"{prefix}{error.problem}", error.remedy), path) from None


def _name_below(cls: Any, name: Any) -> str:
    """Return the dotted name of the option below `cls` that ends with `name`, the shortest; empty where none does."""
    options = [option for option in _option_names(cls) if option.endswith(f".{name}")]
    return min(options, key=lambda option: option.count("."), default="")


@functools.cache
def _option_names(cls: Any) -> tuple[str, ...]:
    """Return the dotted names of the options below a class, without those of the items of lists."""
    return tuple(option for option, _, _ in describe(cls) if "[]" not in option)


def _from_shorthand(cls: Any, value: Any) -> dict[str, Any]:
    if has_kind(cls) and value == kind_of(cls):
        return {"kind": value}
    first = next((option_key(field.name) for field in dataclasses.fields(cls) if field.name != "kind"), None)
    if first is None:
        kind = kind_of(cls)
        raise ConfigError(f"{kind} has no options, and {value!r:.100} was given", f"write {kind} alone")
    return {first: value}


def option_key(name: str) -> str:
    """Return the option name of a field: `with_` becomes `with`, a keyword in Python."""
    return name.removesuffix("_")


def kind_of(cls: Any) -> str:
    """Return the `kind` of a class of options, or of an instance."""
    return next(str(field.default) for field in dataclasses.fields(cls) if field.name == "kind")


def has_kind(cls: Any) -> bool:
    """Return whether a class of options, or an instance, has a `kind`."""
    return any(field.name == "kind" for field in dataclasses.fields(cls))


def _classes(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for member in get_args(hint) for cls in _classes(member)]


def _literals(hint: Any) -> list[Any]:
    """Return the literal values that a hint allows beside its classes, such as `auto`."""
    choices: list[Any] = []
    for member in get_args(hint):
        if get_origin(member) is Literal:
            choices += get_args(member)
    return choices


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _closest_name(value: Any, choices: Sequence[Any]) -> str:
    # names are short; a long text would be compared letter by letter
    close = difflib.get_close_matches(str(value)[:100], [str(name) for name in choices], n=1, cutoff=0.5)
    return close[0] if close else ""


_MOST_SHOWN = 1_000  # characters of a value in an error


def _invalid_value(where: str, value: Any, expected: str, suggestion: str = "") -> ConfigError:
    shown = repr(value) if len(repr(value)) <= _MOST_SHOWN else f"{repr(value)[:_MOST_SHOWN]}..."
    article = "a " if expected in ("whole number", "number") else ""
    text = f"{where} is {shown}; it must be {article}{expected}" if where else f"{shown} is not {article}{expected}"
    remedy = f"{where}: {suggestion}" if suggestion else f"{where}: <{expected}>"
    return about_option(ConfigError(text, remedy), where)


def _describe_type(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return kind_of(hint) if has_kind(hint) else "a mapping"
    origin = get_origin(hint)
    if origin is Literal:
        return " | ".join(str(choice) or "''" for choice in get_args(hint))
    if origin is tuple:
        return f"a list of {_describe_type(get_args(hint)[0])}"
    if origin in (Union, types.UnionType):
        return " | ".join(_describe_type(member) for member in get_args(hint) if member is not type(None))
    names = {str: "text", int: "whole number", float: "number", bool: "true | false", Any: "anything"}
    return names.get(hint, str(hint))


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


def is_valid_name(text: object) -> bool:
    """Return whether a value may be the name or the version of a release."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None
