"""What errors, README and docs tell a person to type exists: extras, commands, flags, assets, files; and nothing that exists is
said to be absent.

Texts of the source are read from its AST, an f-string with X where it holds an expression. Commands in blocks are bound by the
command line's own parser, and not run.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sartor
from sartor.cli import RECIPES, app

ROOT = Path(__file__).parent.parent
SRC = Path(sartor.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
EXTRA = re.compile(r"(?:sartor|(?<=')\.|(?<=\s)\.)\[([a-z_, -]+)\]")
COMMAND = re.compile(r"(?<![\w.'/-])sartor ([a-z][\w-]*)(?: ([a-z][\w-]*))?([^`\n]*)")
FLAG = re.compile(r"(?<![\w<-])--[a-zA-Z][\w.-]*\w")
BLOCK = re.compile(r"^```(?:bash|sh)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
EVERYWHERE = {"--help", "--help-all", "--json", "--quiet", "--verbose", "--version"}
# flags of other programs, which remedies and pages name
FOREIGN = {
    "--head": "ray start",
    "--system": "useradd, groupadd",
    "--voices": "espeak-ng",
    "--insecure": "flower-superlink, flower-supernode",
    "--isolation": "flower-superlink",
    "--database": "flower-superlink",
    "--trusted-entities": "flower-supernode",
    "--superexec-auth-secret-file": "flower-superexec",
    "--lora-modules": "vllm serve",
    "--lora-paths": "SGLang",
    "--extra-index-url": "pip",
    "--force-download": "hf download",
    "--local-dir": "hf download",
    "--gpus": "docker run",
    "--option": "any option, in a remedy",
    "--install-completion": "cyclopts",
    "--output": "cyclopts, of --install-completion",
    "--shell": "the same",
}


@functools.cache
def commands() -> dict[str, App]:
    """Every command by its words, groups among them."""

    def below(group: App, words: tuple[str, ...]) -> Iterator[tuple[str, App]]:
        for name in group:
            if not name.startswith("-"):
                yield " ".join((*words, name)), group[name]
                yield from below(group[name], (*words, name))

    return dict(below(app, ()))


@functools.cache
def flags_of(command: str) -> set[str]:
    """Its own flags, and the options of its recipe that can be flags."""
    own = commands()[command]
    flags = (
        {name for argument in own.assemble_argument_collection() for name in argument.names}
        if own.default_command
        else set()
    )
    if command in RECIPES:
        for name, _, _ in sartor.options(getattr(sartor, RECIPES[command][0])):
            parts = name.split(" ")[0].split(".")
            flags |= {"--" + ".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return flags | EVERYWHERE


@functools.cache
def all_flags() -> set[str]:
    return set().union(*(flags_of(command) for command in commands()))


@functools.cache
def script_flags() -> set[str]:
    """Of the benchmarks and examples, which pages name too."""
    scripts = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.[ps][yh]")]
    return {flag for path in scripts for flag in re.findall(r"--[a-z][\w-]*", path.read_text(encoding="utf-8"))}


def is_flag(flag: str, known: set[str]) -> bool:
    """A recipe's option may be typed with - for _, and an item of a list by its number."""
    declared = re.sub(r"\.\d+(?=\.|$)", "[]", flag)
    return flag in known or "--" + declared[2:].replace("-", "_") in known


def wrong_commands(text: str) -> list[str]:
    """Commands in a text that do not exist, or have a flag that their command lacks."""
    wrong = []
    for match in COMMAND.finditer(text):
        verb, second, rest = match.groups()
        if verb not in commands():
            wrong.append(match[0])
            continue
        command = verb
        for word in (second or "", *rest.split()[:1]):
            if f"{command} {word}" not in commands():
                break
            command = f"{command} {word}"
        is_group = commands()[verb].default_command is None
        if is_group and second and command == verb:
            wrong.append(match[0])
        if not is_group or command != verb:
            arguments = re.split(r"[;|&)]|, | and ", rest)[0]
            wrong += [f"{command} {flag}" for flag in FLAG.findall(arguments) if not is_flag(flag, flags_of(command))]
    return wrong


def wrong_extras(text: str) -> list[str]:
    named = [extra.strip() for match in EXTRA.finditer(text) for extra in match[1].split(",")]
    return [extra for extra in named if extra not in EXTRAS]


def wrong_assets(text: str) -> list[str]:
    named = re.findall(r"assets install ([a-z][\w-]*)", text) + re.findall(r"(?<!\w)asset:([a-z][\w-]*)/", text)
    return [name for name in named if name not in sartor.assets()]


# the source


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    return None


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {
        path.relative_to(SRC).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SRC.rglob("*.py"))
    }


def source_texts() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every string, docstrings among them."""
    for name, tree in trees().items():
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) not in parts and (text := text_of(node)):
                yield f"{name}:{node.lineno}", text


def error_texts() -> Iterator[tuple[str, str]]:
    """(file:line, text) of the arguments of every error that is made."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                yield from ((f"{name}:{node.lineno}", text) for argument in node.args if (text := text_of(argument)))


def needed() -> Iterator[tuple[str, str, str]]:
    """(file:line, package, extra) of every `missing_package(...)`: the remedy names the extra, or else the package."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "missing_package":
                words = [argument.value if isinstance(argument, ast.Constant) else "" for argument in node.args]
                yield f"{name}:{node.lineno}", words[0], words[1] if len(words) > 1 else ""


def test_every_extra_that_an_error_names_exists() -> None:
    from sartor.core.lazy_import import _EXTRAS

    named = [(where, extra) for where, _, extra in needed() if extra]
    assert len(named) > 10
    assert [(where, extra) for where, extra in named if extra not in EXTRAS] == []
    assert {extra for extra in _EXTRAS.values() if extra not in EXTRAS} == set()
    assert [(where, wrong) for where, text in source_texts() for wrong in wrong_extras(text)] == []


def test_packages_named_by_errors_are_plain_dependencies() -> None:
    """A package that an error names without an extra is one of the plain install."""
    plain = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    named = [(where, package) for where, package, extra in needed() if package and not extra]
    assert len(named) > 5
    assert [(where, package) for where, package in named if canonicalize_name(package) not in plain] == []


def test_commands_and_assets_in_the_source_exist() -> None:
    texts = list(source_texts())
    assert sum(bool(COMMAND.search(text)) for _, text in texts) > 100
    assert [(where, wrong) for where, text in texts for wrong in wrong_commands(text)] == []
    assert [(where, wrong) for where, text in texts for wrong in wrong_assets(text)] == []


def test_flags_that_errors_name_exist() -> None:
    flags = [(where, flag) for where, text in error_texts() for flag in FLAG.findall(text)]
    assert len(flags) > 50
    known = all_flags() | set(FOREIGN)
    assert [(where, flag) for where, flag in flags if not is_flag(flag, known) and not flag.endswith("X")] == []


# README, docs and examples


def spans(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```\s*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return SPAN.findall(text)


def block_commands(page: Path) -> Iterator[list[str]]:
    """The words of each `sartor ...` in the page's blocks, without redirections."""
    for body in BLOCK.findall(page.read_text(encoding="utf-8")):
        body = re.sub(r"<<'?(\w+)'?.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        for line in re.sub(r"\$\([^()]*\)", "VALUE", body).splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>()")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # a quoted program of several lines
                continue
            for index, word in enumerate(words):
                if word == "sartor" and not words[max(index - 1, 0)].startswith("-"):  # no user of that name
                    ends = [
                        end for end in range(index, len(words)) if words[end] and set(words[end]) <= set(";|&<>()")
                    ]
                    yield words[index + 1 : min(ends, default=len(words))]


def page_ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = [*spans(page), *re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)]
    assert wrong_extras(text) == []
    assert [wrong for span in spans(page) for wrong in wrong_commands(span)] == []
    assert [wrong for span in code for wrong in wrong_assets(span)] == []
    bare = [flag for span in spans(page) if span.startswith("--") for flag in FLAG.findall(span)]
    assert [flag for flag in bare if not is_flag(flag, all_flags() | script_flags() | set(FOREIGN))] == []
    files = re.findall(r"`((?:src|tests|docs|benchmarks|examples|recipes)/[\w./-]+\w)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_commands_in_a_pages_blocks_can_be_typed(page: Path) -> None:
    """Bound by the parser: the command, its flags, what it requires, and the type of each value."""
    for words in block_commands(page):
        words = [word for word in words if word != "--json"]
        if {"--help", "--version"} & set(words):
            continue
        flags = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        command = next(name for length in (3, 2, 1) if (name := " ".join(words[:length])) in commands())
        assert [flag for flag in flags if not is_flag(flag, flags_of(command))] == [], words
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_install_page_names_extras_and_tour_names_commands() -> None:
    """No extra and no public command is left out."""
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    installed = {extra.strip() for match in EXTRA.finditer(text) for extra in match[1].split(",")}
    assert [extra for extra in EXTRAS if extra not in installed and f"`{extra}`" not in text] == []
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    verbs = {name for name in commands() if " " not in name}
    assert [verb for verb in verbs if not re.search(rf"(sartor |`){verb}\b", text)] == []


ABSENT = re.compile(
    r"not (there|here|built|implemented|possible) yet|nobody has built|is absent|are absent|does not exist|reserved for",
    re.IGNORECASE,
)


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_no_page_denies_what_the_command_line_has(page: Path) -> None:
    known = {*commands(), *(name for name, _, _ in _choices())}
    sentences = re.split(r"(?<=[.:])\s+(?=[A-Z`*-])|\n(?=[|#-])|\n\n", page.read_text(encoding="utf-8"))
    denied = [
        (name, s)
        for s in sentences
        if ABSENT.search(s)
        for name in SPAN.findall(s)
        if name.removeprefix("sartor ") in known
    ]
    assert denied == []


def _choices() -> Iterator[tuple[str, str, str]]:
    for recipe, _ in RECIPES.values():
        for name, declared, text in sartor.options(getattr(sartor, recipe)):
            if declared == "a choice":
                yield name.split(" ")[1], declared, text


def test_page_of_limits_denies_no_feature() -> None:
    """Sentences that once stood there beside the feature."""
    limits = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
    for denied in (
        "`rejected` reply is not used",
        "do not work together",
        "LoRA with supervised fine-tuning,",
        "first cut",
    ):
        assert denied not in " ".join(limits.split())


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install 'sartor[curate]'", ["curate"]),
        ("pip install '.[tune,studoi]'", ["studoi"]),
    ],
)
def test_a_planted_extra_is_found(text: str, wrong: list[str]) -> None:
    assert wrong_extras(text) == wrong


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("sartor stage adapters/faq", 1),
        ("sartor edge fly", 1),
        ("sartor studio user add ada --role owner", 0),
        ("sartor studio user add ada --rank owner", 1),
        ("sartor tune r.yaml --nproc 2", 1),
        ("sartor verify DIR --public-key K", 0),
        ("sartor tune r.yaml --out a --method.rank 8; sartor evaluate a --label x", 0),
        ("sartor assets install nothing", 0),
    ],
)
def test_a_planted_command_is_found(text: str, count: int) -> None:
    assert len(wrong_commands(text)) == count
    assert wrong_assets("sartor assets install nothing") == ["nothing"]


# guarantees: each sentence is in its page, and its test exists


GUARANTEES = ROOT / "docs" / "development" / "guarantees.md"
_ROW = re.compile(r"^\| \[[\w.-]+\]\(([^)]+)\) \| (.+?) \| `(tests/[\w/]+\.py)::(test_\w+)` \|$", re.MULTILINE)
_SECRET = re.compile(r"(?:^|[-_.])(?:password|passphrase|secret|token|api-?key|pin)$")


def plain_text(page: str) -> str:
    """The text of a page without line ends and without the marks of emphasis and of table columns."""
    return " ".join(page.replace("**", "").replace(" | ", " ").split()).lower()


def guarantees() -> list[tuple[str, str, str, str]]:
    """Page, sentence, test file and test of every line of the table."""
    text = GUARANTEES.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    rows = [match.groups() for match in _ROW.finditer(text)]
    assert len(rows) == len(lines), "every line has a page, a sentence and a test"
    return rows  # type: ignore[return-value]


def test_each_guarantee_is_quoted_as_its_page_has_it() -> None:
    wrong = [
        (page, sentence)
        for page, sentence, _, _ in guarantees()
        if plain_text(sentence) not in plain_text((GUARANTEES.parent / page).read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_each_guarantee_has_a_test_that_exists() -> None:
    missing = [
        f"{file}::{name}"
        for _, _, file, name in guarantees()
        if not (ROOT / file).is_file()
        or not re.search(rf"^(?:async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not missing


def test_no_flag_takes_a_secret() -> None:
    """A flag's value is seen by every user of the machine; the name of a variable or a file is none."""
    # what `steps[].entities` does with a kind of finding is no secret itself
    flags = [flag for flag in sorted(all_flags()) if not flag.startswith("--steps[]")]
    assert not [flag for flag in flags if _SECRET.search(flag)]
    assert _SECRET.search("--api-key") and not _SECRET.search("--api-key-env")
