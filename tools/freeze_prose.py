"""Prose of Sartor, which may change: help, descriptions, texts of errors, and names of components.

Each text is a fact whose name says where it stands. What a text puts in (`{name}` of an f-string) is shown as `{}`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import sartor
from freeze_surface import SOURCES, Facts, commands, is_options, parsed, public_errors


def prose_facts() -> Facts:
    """Return every text."""
    facts: Facts = {}
    for collect in (command_texts, option_texts, public_texts, error_texts, source_texts):
        for name, text in collect():
            facts[name] = text
    return facts


def command_texts() -> Iterator[tuple[str, str]]:
    """Yield the help of each command and flag."""
    for name, app in commands():
        yield f"help {name}", app.help or ""
        if app.default_command is not None:
            for argument in app.assemble_argument_collection(parse_docstring=True):
                yield f"help {name} {min(argument.names, key=len)}", argument.parameter.help or ""


def option_texts() -> Iterator[tuple[str, str]]:
    """Yield the help of each option, and how its type is told."""
    for name in sartor.__all__:
        if is_options(getattr(sartor, name)):
            for option, declared, text in sartor.options(getattr(sartor, name)):
                kind = declared.partition(", with kind ")[2]
                yield f"option {name} {option}{kind and f' with kind {kind}'}", text


def public_texts() -> Iterator[tuple[str, str]]:
    """Yield the docstrings of public names."""
    yield "public sartor", inspect.getdoc(sartor) or ""
    yield from ((f"public {name}", inspect.getdoc(getattr(sartor, name)) or "") for name in sartor.__all__)


def error_texts() -> Iterator[tuple[str, str]]:
    """Yield the docstrings of the kinds of errors."""
    yield from ((f"error {cls.__name__}", inspect.getdoc(cls) or "") for cls in public_errors())


def source_texts() -> Iterator[tuple[str, str]]:
    """Yield the texts of raised errors and of their remedies, and those of metrics, by their content: modules move."""
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and _called(node).endswith("Error"):
                texts = [text for argument in node.args if (text := _text(argument))]
                if texts:
                    yield f"error text {texts[0]}", " | try: ".join(texts[1:])


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else str(getattr(call.func, "id", ""))


def _text(node: ast.AST) -> str:
    """Return a text of the sources with `{}` for what is put in; empty if the node is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts: list[Any] = node.values
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
    return ""
