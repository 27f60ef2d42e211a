"""Page of the public names of the package, with signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import types
from itertools import pairwise
from typing import Any

import sartor
from facade_stub import source_of
from reference_text import in_markdown, page_of, table
from sartor.core.lazy_import import import_module

INTRODUCTION = """\
`import sartor` gives these names. How a verb, a recipe and a result are used: [Python](../python.md). Errors have
[a page of their own](../errors.md). `help(sartor.tune)` shows the same in a notebook.
"""
MAX_LINE = 100


def write_names() -> str:
    """Return the page: functions, then classes, each in the order of the alphabet."""
    functions, classes, values = [], [], []
    for name in sorted(sartor.__all__, key=str.lower):
        value = defined(name)
        if isinstance(value, type):
            classes += describe_class(name, value)
        elif callable(value):
            functions += describe_function(name, value)
        else:
            values.append((f"`sartor.{name}`", in_markdown(type(value).__name__)))
    lines = [INTRODUCTION, "## Functions", "", *functions, "## Classes", "", *classes]
    if values:
        lines += ["## Values", "", *table(("name", "type"), values)]
    return page_of("Python names", "`sartor.__all__` and the docstrings", lines)


def defined(name: str) -> Any:
    """Return what a public name stands for; of a package that is a verb the function."""
    value = getattr(sartor, name)
    if isinstance(value, types.ModuleType):
        module, attribute = source_of(name)
        return getattr(import_module(module), attribute)
    return value


def describe_function(name: str, function: Any) -> list[str]:
    """Return the lines of a function: heading, signature, docstring."""
    return [f"### sartor.{name}", "", *_code(f"sartor.{name}", inspect.signature(function)), *_docstring(function)]


def describe_class(name: str, cls: type) -> list[str]:
    """Return the lines of a class: heading, how it is made, docstring, public methods."""
    lines = [f"### sartor.{name}", ""]
    if not issubclass(cls, BaseException):
        lines += _code(f"sartor.{name}", inspect.signature(cls))
    lines += _docstring(cls)
    methods = []
    for method, member in sorted(vars(cls).items()):
        if method.startswith("_") or not isinstance(member, (property, classmethod, types.FunctionType)):
            continue
        documented = inspect.getdoc(member) or ""
        written = f"`.{method}`" if isinstance(member, property) else f"`.{method}()`"
        methods.append((written, in_markdown(_first_paragraph(documented))))
    return [*lines, *(table(("member", "meaning"), methods) if methods else [])]


def _code(name: str, signature: inspect.Signature) -> list[str]:
    """Return a signature as code: in one line, or a line for each parameter where that would be too long."""
    parameters = [_parameter_text(parameter) for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = signature.return_annotation
    result = "" if returned in (inspect.Signature.empty, None, "None") else f" -> {_annotation_text(returned)}"
    line = f"{name}({', '.join(parameters)}){result}"
    lines = [line] if len(line) <= MAX_LINE else [f"{name}(", *(f"    {text}," for text in parameters), f"){result}"]
    return ["```text", *lines, "```", ""]


def _parameter_text(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation_text(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    default = parameter.default
    is_plain = default is None or isinstance(default, (bool, int, float, str, tuple))
    return f"{text} = {default!r}" if is_plain and len(repr(default)) < MAX_LINE else f"{text} = ..."


def _annotation_text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _docstring(value: Any) -> list[str]:
    """Return a docstring in Markdown; what it says of a parameter or an attribute is an item of a list."""
    names = set(inspect.signature(value).parameters) | set(vars(value).get("__annotations__", ()))
    begins = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(names)))})(?:, \w+)*: ") if names else None
    lines: list[str] = []
    for paragraph in (inspect.getdoc(value) or "").split("\n\n"):
        for line in _statements(" ".join(paragraph.split()), begins):
            name, _, meaning = line.partition(": ")
            if begins is not None and begins.match(line):
                lines.append(f"- `{name}`: {in_markdown(meaning)}")
            else:
                lines += [*([""] if lines and lines[-1] else []), in_markdown(line), ""]
        lines += [""] if lines and lines[-1] else []
    return lines


def _statements(paragraph: str, begins: re.Pattern[str] | None) -> list[str]:
    """Return a paragraph in parts, each of which begins with what it explains, or with what is raised."""
    starts = [match.end() for match in re.finditer(r"(?<=[.;:]) (?=Raises )", paragraph)]
    if begins:
        starts += [match.end() for match in re.finditer(rf"(?:^|(?<=[.;]) )(?={begins.pattern})", paragraph)]
    cuts = sorted({0, *starts, len(paragraph)})
    return [part for start, end in pairwise(cuts) if (part := paragraph[start:end].strip())]


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())
