"""`--help` shows `kind` of each union that a recipe may hold, with each choice and what it is; flags choose one.

Unions are enumerated by reflection over every module that declares options, so a new one is held to this without a change here.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import sartor
from sartor.cli import RECIPES, main
from sartor.core.config import option

SRC = Path(sartor.__file__).parent
RECIPE = "base: starter\ndata: {path: data/faq}\n"
FLAG_ORDERS = list(itertools.permutations([("--objective.kind", "dpo"), ("--objective.beta", "0.3")]))


def declaring_modules() -> Iterator[str]:
    """Modules that use `option`, by what they import."""
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module == "sartor.core.config"
                and "option" in {a.name for a in node.names}
            ):
                yield ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


def classes_with_kind(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [hint] if any(field.name == "kind" for field in dataclasses.fields(hint)) else []
    return [cls for inner in get_args(hint) for cls in classes_with_kind(inner)]


def kind_of(cls: type) -> str:
    return next(str(field.default) for field in dataclasses.fields(cls) if field.name == "kind")


@functools.cache
def unions() -> list[tuple[str, str, type]]:
    """(declaring class, option, member) of every option whose value has a `kind`."""
    declared = []
    for module_name in declaring_modules():
        for cls in vars(importlib.import_module(module_name)).values():
            if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls.__module__ == module_name:
                hints = get_type_hints(cls)
                members = [(field.name, classes_with_kind(hints[field.name])) for field in dataclasses.fields(cls)]
                declared += [(cls.__qualname__, name, member) for name, found in members for member in found]
    return declared


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The help text with the line breaks of the terminal taken out."""
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help-all"])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err) == (0, "")
    return " ".join(captured.out.replace("│", " ").split())


def test_unions_are_enumerated() -> None:
    names = {name for _, name, _ in unions()}
    assert {"method", "objective", "steps", "ways", "teacher", "engine", "robust", "plans", "check", "join"} <= names


def test_help_shows_each_kind_of_every_union(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # long words of a narrow terminal would be broken
    texts = [help_of(command, capsys) for command in RECIPES]
    absent = [
        f"{declaring}.{name}: {kind_of(member)}"
        for declaring, name, member in unions()
        if not any(_shows(text, name, member) for text in texts)
    ]
    assert absent == []


def _shows(text: str, name: str, member: type) -> bool:
    """Whether a help text has the choice as it is typed, and the first words of what it is."""
    first_words = " ".join((member.__doc__ or "").replace("`", "").split()[:5])
    choices = (f"{name}{item}.kind {kind_of(member)}: {first_words}" for item in ("", "[]"))
    return any(choice in text for choice in choices)


def test_a_planted_union_is_shown() -> None:
    @dataclasses.dataclass(frozen=True)
    class Planted:
        """A planted choice. Not in the help."""

        depth: int = option(3, "how deep")
        kind: str = "planted"

    @dataclasses.dataclass(frozen=True)
    class Other:
        """Another one (Name et al. 2026). More."""

        kind: str = "other"

    Holder = dataclasses.make_dataclass("Holder", [("choice", Planted | Other, option(Other(), "which of them"))])
    assert list(sartor.options(Holder)) == [
        ("choice.kind", "planted | other, default other", "which of them"),
        ("choice.kind planted", "a choice", "A planted choice."),
        ("choice.depth", "whole number, default 3, with kind planted", "how deep"),
        ("choice.kind other", "a choice", "Another one (Name et al. 2026)."),
    ]


def test_every_command_with_recipe_flags_shows_the_recipe() -> None:
    """A command that hands flags on to a recipe is in RECIPES, so that its help can say what flags there are."""
    commands = set()
    for path in (SRC / "cli").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        commands |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and node.args.vararg
            and "Flags" in ast.unparse(node.args.vararg.annotation)
        }
    assert len(commands) > 5
    assert commands <= {command.split()[-1] for command in RECIPES}


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert ended.value.code == 2
    return json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    ("flags", "problem", "remedy"),
    [
        (
            ["--objective.kind", "dop"],
            "objective.kind is 'dop'; it must be one of sft, dpo, kto",
            "--objective.kind dpo",
        ),
        (["--objective", "kot"], "objective.kind is 'kot'; it must be one of sft, dpo, kto", "--objective.kind kto"),
        (["--objective.kind", "ppo-clip-2"], "one of sft, dpo, kto", "one of sft, dpo, kto"),
        (["--objective.kind", "[dpo]"], "one of sft, dpo, kto", "--objective.kind dpo"),
        (["--objective.kind", "["], "--objective.kind is '[', which is not YAML", "quote it"),
        (["--objective.beta", "0.2"], "'beta' is an option of dpo and kto", "objective.kind: dpo"),
        (
            ["--method.kind", "dorra"],
            "method.kind is 'dorra'; it must be one of lora, rslora, dora",
            "--method.kind dora",
        ),
        (["--method.block_size", "8"], "'block_size' is an option of oft", "method.kind: oft"),
        (["--method.rank", "a"], "method.rank is 'a'; it must be a whole number", "--method.rank <whole number>"),
    ],
)
def test_a_wrong_kind_names_the_choices_and_the_closest(
    flags: list[str], problem: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tune.yaml").write_text(RECIPE)
    error = error_of(["tune", str(tmp_path / "tune.yaml"), *flags, "--out", str(tmp_path / "a")], capsys)
    assert problem in error["problem"]
    assert remedy in error["remedy"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["edge", "sync", "URL", "NAME"], "sartor edge sync --help"),
        (["review", "accept"], "sartor review accept --help"),
        (["tune"], "sartor tune --help"),
        (["edge", "snyc"], "sartor edge --help"),
        (["tune", "--bse", "starter"], "sartor tune --help"),
        (["tune", "--base=starter", "tune.yaml"], "sartor tune RECIPE --base VALUE; sartor init DATA writes recipes"),
        (["serve", "--agents.faq.model", "x"], "sartor serve TEAM --agents.faq.model VALUE"),
        (["validate", "--limits.topic", "0.2"], "sartor validate SYNTHETIC --limits.topic VALUE"),
        (["release", "--checks", "x"], "sartor release --help"),
        (["nosuch"], "sartor --help"),
    ],
)
def test_usage_error_names_the_help_of_the_command_or_the_order(
    arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(arguments, capsys)["remedy"] == remedy


@pytest.mark.parametrize("flags", FLAG_ORDERS)
def test_a_kind_flag_takes_the_options_of_its_kind_in_any_order(
    flags: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    (tmp_path / "tune.yaml").write_text(RECIPE)
    recipe = sartor.load_recipe(tmp_path / "tune.yaml", [word for flag in flags for word in flag])
    assert (recipe.objective.kind, recipe.objective.beta) == ("dpo", 0.3)


@pytest.mark.parametrize(
    ("objective", "flags", "expected"),
    [
        ("{dpo: {beta: 0.2}}", ["--objective.sft_weight", "1"], ("dpo", 0.2)),
        ("{kind: dpo, beta: 0.2}", ["--objective.kind", "dpo"], ("dpo", 0.2)),
        ("{kind: dpo, beta: 0.2}", ["--objective.kind", "kto"], ("kto", 0.1)),
        ("{beta: 0.2}", ["--objective.kind", "kto"], ("kto", 0.2)),
        ("dpo", ["--objective.beta", "0.4"], ("dpo", 0.4)),
        ("sft", ["--objective", "dpo", "--objective.beta", "0.4"], ("dpo", 0.4)),
    ],
)
def test_flags_meet_every_form_of_a_union_in_a_file(
    objective: str, flags: list[str], expected: tuple[str, float], tmp_path: Path
) -> None:
    (tmp_path / "tune.yaml").write_text(f"{RECIPE}objective: {objective}\n")
    recipe = sartor.load_recipe(tmp_path / "tune.yaml", flags)
    assert (recipe.objective.kind, recipe.objective.beta) == expected


def test_naming_the_default_kind_keeps_the_files_options(tmp_path: Path) -> None:
    """`--method.kind lora` beside `method: {rank: 8}` once put the rank back to 16."""
    (tmp_path / "tune.yaml").write_text(f"{RECIPE}method: {{rank: 8}}\n")
    assert sartor.load_recipe(tmp_path / "tune.yaml", ["--method.kind", "lora"]).method.rank == 8
    assert sartor.load_recipe(tmp_path / "tune.yaml", ["--method", "lora"]).method.rank == 16
