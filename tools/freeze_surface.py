"""What is seen of Sartor without running it: commands, flags, options, public names, errors, constant names.

Facts are found through the façade, the application of `sartor.cli`, and the text of the sources: never by the path of
a private module, so that the record is the same before and after a module moves.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from cyclopts import App

import sartor
from freeze_types import PRIVATE, default_value, is_own, option_key, public_names, type_text

Facts = dict[str, Any]
SOURCES = Path(sartor.__file__).parent
# verbs that freeze_runs.py does not run, which take minutes or need peers: the keys of their JSON are read from the
# sources
NOT_RUN = ("demo", "federate_client", "prove", "replay_plans", "retrain", "tune_personal")
# texts in the sources that others read: headers, variables of the environment, metrics, keys of MCP's `_meta`
CONSTANTS = {
    "header": re.compile(r"x-[a-z0-9]+(-[a-z0-9]+)*"),
    "environment": re.compile(r"SARTOR_[A-Z0-9_]+"),
    "gen_ai attribute": re.compile(r"gen_ai\.[a-z_.]+"),
}
# functions whose first constant argument names something that others subscribe to
NAMING_CALLS = {"getLogger": "logger", "get_tracer": "tracer", "start_span": "span", "get_meter": "meter"}


def surface_facts() -> Facts:
    """Return every fact of this module."""
    facts: Facts = {}
    for collect in (command_facts, option_facts, public_facts, error_facts, constant_facts):
        for name, value in collect():
            if name in facts:
                raise ValueError(f"two facts have the name {name!r}")
            facts[name] = value
    return facts


# commands


def commands() -> Iterator[tuple[str, App]]:
    """Yield (command with its words, application), groups included."""
    entry = importlib.import_module("sartor.cli")
    yield from _commands("sartor", entry.app)


def _commands(name: str, app: App) -> Iterator[tuple[str, App]]:
    yield name, app
    for word in sorted(app):
        if not word.startswith("-"):
            yield from _commands(f"{name} {word}", app[word])


def command_facts() -> Iterator[tuple[str, Any]]:
    """Yield what each command takes."""
    for name, app in commands():
        flags = sorted(word for word in app if word.startswith("-"))
        yield f"command {name}", {"is_group": app.default_command is None, "flags": flags}
        if app.default_command is None:
            continue
        for position, argument in enumerate(app.assemble_argument_collection()):
            field = argument.field_info
            fact: Facts = {
                "names": sorted(argument.names),
                "type": type_text(argument.hint),
                "takes": field.kind.description,
                "required": bool(argument.required),
                "shown": argument.parameter.show is not False,
                "negative": sorted(argument.negatives),
            }
            if field.kind not in (field.KEYWORD_ONLY, field.VAR_KEYWORD):
                fact["position"] = position
            if not argument.required and field.default is not field.empty:
                fact["default"] = default_value(field.default)
            yield f"flag {name} {min(argument.names, key=len)}", fact


# options of recipes


def option_facts() -> Iterator[tuple[str, Any]]:
    """Yield type and default of each option of each class of options that the façade names, and the whole of its
    defaults.
    """
    for name in sartor.__all__:
        cls = getattr(sartor, name)
        if not is_options(cls):
            continue
        for option, declared, _ in sartor.options(cls):
            declared, _, kind = declared.partition(", with kind ")
            yield f"option {name} {option}{kind and f' with kind {kind}'}", declared
        for path, fact in _declared(cls, "", ()):
            yield f"option field {name} {path}", fact


def is_options(cls: Any) -> bool:
    """Return whether a class declares options: fields that carry their help."""
    return (
        isinstance(cls, type)
        and dataclasses.is_dataclass(cls)
        and any("help" in f.metadata for f in dataclasses.fields(cls))
    )


def _declared(cls: type, prefix: str, above: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a class and of those below it; a choice of several is told apart by its `kind`."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, members = f"{prefix}{option_key(field)}", _dataclasses_in(hints[field.name])
        fact: Facts = {"type": type_text(hints[field.name]).replace(PRIVATE, "options")}
        if field.default is not dataclasses.MISSING:
            fact["default"] = default_value(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            fact["default"] = default_value(field.default_factory())
        else:
            fact["required"] = True
        yield path, fact
        for member in members:
            if member not in above:
                kind = f"({_kind(member)})" if _kind(member) else ""
                yield from _declared(member, f"{path}{kind}.", (*above, member))


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for inner in getattr(hint, "__args__", ()) for cls in _dataclasses_in(inner)]


def _kind(cls: type) -> str:
    return next((str(field.default) for field in dataclasses.fields(cls) if field.name == "kind"), "")


# public names


def public_facts() -> Iterator[tuple[str, Any]]:
    """Yield each public name with the parameters that it takes, and what can be read of what it gives."""
    yield "public __version__", sartor.__version__
    for name in sartor.__all__:
        value = getattr(sartor, name)
        if isinstance(value, type):
            yield f"public {name}", "class"
            yield from _parameters(f"public {name}", value)
            yield from _members(f"public {name}", value, has_methods=False)
            continue
        function = verb_function(name, value) if isinstance(value, types.ModuleType) else value
        yield f"public {name}", "function"
        yield from _parameters(f"public {name}", function)
        given = get_type_hints(function).get("return")
        yield f"public {name}() gives", type_text(given)
        if is_own(given) and isinstance(given, type) and id(given) not in public_names():
            yield from _members(f"public {name}()", given, has_methods=True)
        if name in NOT_RUN:
            yield f"json {name}", sorted(returned_keys(getattr(given, "as_json", function)))


def verb_function(name: str, package: types.ModuleType) -> Any:
    """Return the function behind a package that can be called: the one of its name that a module of the package
    defines.
    """
    [module] = [
        ".".join(file.relative_to(SOURCES.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted(Path(package.__path__[0]).rglob("*.py"))
        if any(isinstance(node, ast.FunctionDef) and node.name == name for node in parsed(file).body)
    ]
    return getattr(importlib.import_module(module), name)


def _parameters(prefix: str, function: Any) -> Iterator[tuple[str, Any]]:
    owner = function.__init__ if isinstance(function, type) else function
    hints = get_type_hints(owner) if isinstance(owner, types.FunctionType) else {}
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    for position, parameter in enumerate(parameters):
        fact: Facts = {"takes": parameter.kind.description, "type": type_text(hints.get(parameter.name, Any))}
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            fact["position"] = position
        if parameter.default is not parameter.empty:
            fact["default"] = default_value(parameter.default)
        yield f"{prefix}({parameter.name})", fact


def _members(prefix: str, cls: type, *, has_methods: bool) -> Iterator[tuple[str, Any]]:
    """Yield what can be read of an object of a class, and what makes one.

    has_methods: also what can be called: of what a verb gives. Methods of options and records are called by Sartor.
    """
    hints = get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for name in sorted(fields | {name for name in dir(cls) if not name.startswith("_")}):
        if name in fields:
            yield f"{prefix}.{name}", {"attribute": type_text(hints[name])}
            continue
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        if not is_own(owner):  # of Exception and the like
            continue
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            yield f"{prefix}.{name}", {"attribute": type_text(get_type_hints(member.fget).get("return"))}
        elif isinstance(member, (classmethod, staticmethod, types.FunctionType)):
            bound = getattr(cls, name)
            if isinstance(member, types.FunctionType) and not has_methods:
                continue
            yield f"{prefix}.{name}()", {"gives": type_text(get_type_hints(bound).get("return"))}
            yield from _parameters(f"{prefix}.{name}", bound)
        else:
            yield f"{prefix}.{name}", {"attribute": type_text(hints.get(name, type(member)))}


def returned_keys(function: Any) -> set[str]:
    """Return the keys of the mappings that a function gives, dotted where they are nested, as its source spells them.

    A mapping is followed through a local name and through a function that is called in `return`.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    local = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    keys: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            keys |= _keys_of(node.value, local, function.__globals__)
    return keys


def _keys_of(node: ast.expr, local: Mapping[str, ast.expr], names: Mapping[str, Any]) -> set[str]:
    if isinstance(node, ast.Name) and node.id in local:
        return _keys_of(local[node.id], {name: value for name, value in local.items() if name != node.id}, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and is_own(names.get(node.func.id)):
        called = names[node.func.id]
        return returned_keys(called) if isinstance(called, types.FunctionType) else set()
    if isinstance(node, ast.ListComp):
        return {f"[].{key}" for key in _keys_of(node.elt, local, names)}
    if not isinstance(node, ast.Dict):
        return set()
    keys: set[str] = set()
    for key, value in zip(node.keys, node.values, strict=True):
        below = _keys_of(value, local, names)
        if isinstance(key, ast.Constant):
            keys |= {str(key.value), *(f"{key.value}.{inner}" for inner in below)}
        elif key is None:
            keys |= below
    return keys


# errors


def public_errors() -> list[type[Any]]:
    """Return the error tree that scripts know: SartorError and what stands beside it in its module."""
    root = sartor.SartorError
    return [
        cls for cls in vars(sys.modules[root.__module__]).values() if isinstance(cls, type) and issubclass(cls, root)
    ]


def error_facts() -> Iterator[tuple[str, Any]]:
    """Yield each kind of error with its parent, exit code, and what it carries."""
    for cls in public_errors():
        parameters = [name for name in inspect.signature(cls).parameters]
        yield f"error {cls.__name__}", {"parent": cls.__base__.__name__, "exit": cls.exit_code, "carries": parameters}


# constants of the sources


def parsed(file: Path) -> ast.Module:
    """Return a source file's tree."""
    return ast.parse(file.read_text(encoding="utf-8"))


def constant_facts() -> Iterator[tuple[str, Any]]:
    """Yield names that stand as texts in the sources and are read outside: of headers, variables, loggers, tracers,
    spans.
    """
    names: set[str] = set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {
                    f"{kind} {node.value}" for kind, pattern in CONSTANTS.items() if pattern.fullmatch(node.value)
                }
            if isinstance(node, ast.Call):
                names |= _named(node)
    yield from ((name, True) for name in sorted(names))


def _named(call: ast.Call) -> set[str]:
    """Return the fact of a call that names a logger, tracer or span; a name that is computed is shown as `{}`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function in NAMING_CALLS and call.args and isinstance(call.args[0], ast.Constant):
        return {f"{NAMING_CALLS[function]} {call.args[0].value}"}
    if function == "update_name" and call.args and isinstance(call.args[0], ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in call.args[0].values]
        return {f"span {''.join(parts)}"}
    return set()
