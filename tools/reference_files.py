"""Pages of every option of the YAML files that users write, from the declarations that `sartor schema` reads."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import yaml

from reference_text import anchor_of, in_markdown, page_of, table
from sartor.core.config import describe, first_sentence
from sartor.core.lazy_import import import_module
from sartor.quickstart.yaml_schemas import FILES

# name of a schema -> the page that has its options
SCHEMA_PAGES = {
    name: "team-yaml.md" if name == "team" else "federate-yaml.md" if name.startswith("federate") else "recipes.md"
    for name in FILES
}
NOTES = """\
A name with dots is a key below a key: `method.rank` is `method: {{rank: ...}}`. `[]` stands for each item of a list.
Shorthands, and how flags override a file: [recipes]({guide}). `sartor schema {schema}` prints the same as a JSON
Schema.
"""
DECLARED = re.compile(
    r"(?P<type>.*?), (?:default (?P<default>.*?)|required)"
    r"(?:, options as of (?P<alike>.*?))?(?:, with kind (?P<kind>.*))?"
)


class Option(NamedTuple):
    """One line of `sartor.options`, taken apart.

    default: as it is written; "required" if there is none. kind: the choice of the `kind` to which the option belongs.
    """

    name: str
    type: str
    default: str
    kind: str
    text: str


def write_recipes() -> str:
    """Return the page of the recipes, and of the files that `release` and `validate` read."""
    return _write_page("Recipes", "recipes.md", "../recipes.md")


def write_team_file() -> str:
    """Return the page of TEAM.yaml."""
    return _write_page("TEAM.yaml", "team-yaml.md", "../recipes.md")


def write_federate_files() -> str:
    """Return the page of the files of a federation."""
    return _write_page("federate.yaml", "federate-yaml.md", "../recipes.md")


def file_anchor(schema: str) -> str:
    """Return the anchor of a file's heading."""
    return anchor_of(_title(schema))


def _title(schema: str) -> str:
    name, _, reader = FILES[schema].title.partition(": ")
    return f"{name} ({schema}, {reader})"


def _write_page(title: str, page: str, guide: str) -> str:
    schemas = [name for name, owner in SCHEMA_PAGES.items() if owner == page]
    lines = [NOTES.format(guide=guide, schema=schemas[0] if len(schemas) == 1 else "NAME")]
    if len(schemas) > 1:
        lines += [*(f"- [{_title(name)}](#{file_anchor(name)})" for name in schemas), ""]
    for name in schemas:
        lines += list(_describe_file(name))
    return page_of(title, "the declarations that `sartor schema` reads", lines)


def _describe_file(schema: str) -> Iterator[str]:
    module, _, cls_name = FILES[schema].options.partition(":")
    cls = getattr(import_module(module), cls_name)
    yield from (f"## {_title(schema)}", "", in_markdown(first_sentence(cls)), "")
    options = [read_option(*line) for line in describe(cls)]
    if schema == "curate":  # each step has a heading with its options on the page of the steps
        options = [
            option for option in options if not option.name.startswith("steps[].") or option.name == "steps[].kind"
        ]
        yield from ("Options of each step: [steps of a curation recipe](../steps.md).", "")
    single, nested = _by_section(options)
    if single:
        yield from table(("option", "type", "default", "meaning"), map(_cells, single))
    for section, members in nested.items():
        yield from (f"### {schema}: {section}", "")
        yield from table(("option", "type", "default", "of kind", "meaning"), map(_cells_of_kinds, members))


def _by_section(options: list[Option]) -> tuple[list[Option], dict[str, list[Option]]]:
    """Return the options that stand alone, and those of each section, by the first part of their names."""
    single: list[Option] = []
    nested: dict[str, list[Option]] = {}
    for section, members in groupby(options, lambda option: re.split(r"[.\[ ]", option.name)[0]):
        listed = list(members)
        if len(listed) == 1:
            single += listed
        else:
            nested.setdefault(section, []).extend(listed)
    return single, nested


def read_option(name: str, declared: str, text: str) -> Option:
    """Return one line of `describe` with its type, default and kind apart.

    Raises ValueError if the declaration has a form that this page does not know.
    """
    if declared == "a choice":
        return Option(name, "a choice", "", "", text)
    match = DECLARED.fullmatch(declared)
    if match is None:
        raise ValueError(f"{name}: {declared!r}")
    alike = f" (as `{match['alike']}`)" if match["alike"] else ""
    default = "required" if match["default"] is None else f"`{_in_yaml(match['default'])}`"
    kind_of_value = match["type"].replace("a list of a mapping", "list of mappings").replace("a list of", "list of")
    return Option(name, f"{kind_of_value}{alike}", default, match["kind"] or "", text)


def _in_yaml(default: str) -> str:
    """Return a default as a recipe would write it. default: as Python writes it, or names of kinds."""
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return default
    written = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return written.removesuffix("...\n").strip()


def _cells(option: Option) -> tuple[str, ...]:
    return f"`{option.name}`", option.type, option.default, in_markdown(option.text)


def _cells_of_kinds(option: Option) -> tuple[str, ...]:
    return f"`{option.name}`", option.type, option.default, option.kind, in_markdown(option.text)
