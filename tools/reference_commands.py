"""Page of every command with its usage, arguments, flags, types and defaults, from the application itself."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App
from cyclopts.argument import Argument

from freeze_surface import commands
from reference_files import SCHEMA_PAGES, file_anchor
from reference_text import anchor_of, in_markdown, page_of, table
from sartor.cli import GROUPS, RECIPES, app
from sartor.quickstart.yaml_schemas import FILES

INTRODUCTION = """\
How commands read recipes, print and end is on [one page of its own](../command-line.md). `--json`, `-q`, `-v`,
`--help` and `--help-all` are taken by every command and not repeated here. A required argument has no default.
"""
COMPLETION = "sartor --install-completion"
VALUES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "switch",
    Path: "path",
    Any: "text or file",
    type(None): "",
}


def write_commands() -> str:
    """Return the page, in the groups and the order of `sartor --help`."""
    applications = dict(commands())
    lines = [INTRODUCTION]
    for title, (_, verbs) in GROUPS.items():
        links = ", ".join(f"[`{verb}`](#{anchor_of(f'sartor {verb}')})" for verb in verbs)
        lines.append(f"- **{title}**: {links}")
    lines += [f"- **Shell**: [`--install-completion`](#{anchor_of(COMPLETION)})", ""]
    for title, (example, verbs) in GROUPS.items():
        lines += [f"## {title}", "", "```text", example, "```", ""]
        for verb in verbs:
            for name, application in applications.items():
                if f"{name} ".startswith(f"sartor {verb} "):
                    lines += describe_command(name, application)
    lines += ["## Shell", "", *describe_command(COMPLETION, app["--install-completion"])]
    return page_of("Commands", "the commands of `src/sartor/cli/`", lines)


def describe_command(name: str, application: App) -> list[str]:
    """Return the lines of one command, or of a group of commands."""
    summary, _, rest = inspect.cleandoc(str(application.help)).partition("\n\n")
    lines = [f"### {name}", "", in_markdown(" ".join(summary.split())), ""]
    if application.default_command is None:
        words = [word for word in sorted(application) if not word.startswith("-")]
        links = ", ".join(f"[`{word}`](#{anchor_of(f'{name} {word}')})" for word in words)
        return [*lines, f"Commands: {links}.", ""]
    arguments = [
        argument
        for argument in application.assemble_argument_collection(parse_docstring=True)
        if argument.parameter.show is not False
    ]
    detail = rest.partition("Args:")[0].strip()
    lines += ["```text", usage_of(name, arguments), "```", "", *([in_markdown(detail), ""] if detail else [])]
    if arguments:
        rows = [describe_argument(argument) for argument in arguments]
        lines += table(("argument", "type", "default", "meaning"), rows)
    if recipe := _recipe_of(name.removeprefix("sartor ")):
        lines += [f"Options of its YAML file, which are flags too: {recipe}.", ""]
    return lines


def usage_of(name: str, arguments: list[Argument]) -> str:
    """Return the line that is typed: arguments, flags that are required, and whether there are others."""
    words = [name, *(_typed(argument) for argument in arguments if is_positional(argument))]
    flags = [argument for argument in arguments if not is_positional(argument)]
    words += [f"{_longest(argument)} {_placeholder(argument)}" for argument in flags if argument.required]
    return " ".join([*words, *(["[FLAGS]"] if any(not argument.required for argument in flags) else [])])


def describe_argument(argument: Argument) -> tuple[str, str, str, str]:
    """Return the cells of one argument: how it is written, its type, its default, what it means."""
    if is_positional(argument):
        written = f"`{_placeholder(argument)}`"
    else:
        written = ", ".join(f"`{flag}`" for flag in dict.fromkeys((*argument.names, *argument.negatives)))
    return written, value_name(argument.hint), _default_text(argument), in_markdown(argument.parameter.help or "")


def is_positional(argument: Argument) -> bool:
    """Return whether an argument is given by its place."""
    field = argument.field_info
    return field.kind not in (field.KEYWORD_ONLY, field.VAR_KEYWORD)


def value_name(hint: Any) -> str:
    """Return the type of a flag in a word or two: `path`, `whole number`, `eval | test`, `text, several times`."""
    if hint in VALUES:
        return VALUES[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return value_name(inner[0])
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(name for member in inner if (name := value_name(member))))
    if origin in (tuple, list):
        return f"{value_name(inner[0])}, several"
    if origin is dict or hint is dict:
        return "NAME=VALUE, several"
    return str(getattr(hint, "__name__", hint))


def _default_text(argument: Argument) -> str:
    default = argument.field_info.default
    if argument.required or default in (argument.field_info.empty, None, "", (), False):
        return ""
    return "yes" if default is True else f"`{default}`"


def _typed(argument: Argument) -> str:
    name = _placeholder(argument)
    if argument.field_info.kind is argument.field_info.VAR_POSITIONAL or get_origin(argument.hint) in (tuple, list):
        name = f"{name}..."
    return name if argument.required else f"[{name}]"


def _placeholder(argument: Argument) -> str:
    return _longest(argument).lstrip("-").upper().replace("-", "_")


def _longest(argument: Argument) -> str:
    return max(argument.names, key=len)


def _recipe_of(command: str) -> str:
    """Return a link to the options of a command's recipe; empty if it has none."""
    if command not in RECIPES:
        return ""
    return next(
        f"[{SCHEMA_PAGES[name]}]({SCHEMA_PAGES[name]}#{file_anchor(name)})"
        for name, file in FILES.items()
        if file.options.endswith(f":{RECIPES[command][0]}")
    )
