"""Drawings, tables and counts in README and docs that the code can be asked about."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import sartor
from sartor.cli import GROUPS, app
from sartor.cli.old_spellings import _RENAMED
from sartor.core import artifacts, errors
from sartor.core.licences import licence_families

ROOT = Path(__file__).parent.parent
SRC = Path(sartor.__file__).parent
SOURCE_MAP = (ROOT / "docs/development/source-map.md").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs/install.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
ERRORS = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


def block_with(text: str, first: str) -> str:
    return next(
        body for body in re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if body.startswith(first)
    )


def parents_in(drawing: str) -> dict[str, str]:
    """Error -> its parent, by the indentation of a drawn tree."""
    above: list[tuple[int, str]] = []
    parents = {}
    for line in drawing.splitlines():
        if not (match := re.search(r"[A-Z]\w+Error", line)):
            continue
        above = [(depth, name) for depth, name in above if depth < match.start()]
        parents[match[0]] = above[-1][1] if above else ""
        above.append((match.start(), match[0]))
    return parents


def error_classes() -> dict[str, str]:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.SartorError)]
    return {cls.__name__: cls.__base__.__name__ if cls is not errors.SartorError else "" for cls in classes}


@pytest.mark.parametrize("drawing", [errors.__doc__, block_with(ERRORS, "SartorError")], ids=["docstring", "page"])
def test_error_tree_is_the_class_tree(drawing: str) -> None:
    assert parents_in(drawing.partition("An error is a value")[0]) == error_classes()


def test_errors_page_counts_the_children_of_each_parent() -> None:
    counts = re.findall(r"^## (\w+)\n\n(?:(?!^## ).)*?[Pp]arent of the next (\w+)", ERRORS, re.DOTALL | re.MULTILINE)
    counted = {name: NUMBERS[word] for name, word in counts if word in NUMBERS}
    assert len(counted) >= 2
    for name, count in counted.items():
        below = [
            cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, getattr(errors, name))
        ]
        assert len(below) - 1 == count, name


def test_verb_table_has_every_command() -> None:
    table = ARCHITECTURE.partition("| verb | reads |")[2].partition("\n\n")[0]
    cells = " ".join(line.split("|")[1] for line in table.splitlines()[1:] if line.count("|") > 3)
    verbs = [name for name in app if not name.startswith("-")]
    assert [verb for verb in verbs if not re.search(rf"\b{verb}\b", cells)] == []


def test_gate_table_has_every_check() -> None:
    """The checks are the keys of dicts of Check in what returns `dict[str, Check]`."""
    made = set()
    for name in ("release/release.py", "release/gate.py", "evaluate/limits.py"):
        for function in ast.walk(ast.parse((SRC / name).read_text(encoding="utf-8"))):
            if (
                isinstance(function, ast.FunctionDef)
                and function.returns
                and ast.unparse(function.returns) == "dict[str, Check]"
            ):
                dicts = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
                made |= {key.value for node in dicts for key in node.keys if isinstance(key, ast.Constant)}
    table = ARCHITECTURE.partition("| check | passes when |")[2].partition("\n\n")[0]
    written = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)", line.split("|")[1] if "|" in line else "")
    }
    assert {"gain", "licence", "privacy", "review"} <= made
    assert made <= written


def test_kinds_of_artefacts_are_named_with_their_manifests() -> None:
    for kind, manifest in artifacts.MANIFESTS.items():
        assert f"`{kind}`" in FORMATS
        assert f"`{manifest}`" in FORMATS


def test_source_map_has_every_package_and_no_file_that_is_gone() -> None:
    drawn = block_with(SOURCE_MAP, "src/sartor/")
    parts = [
        path.name
        for path in SRC.iterdir()
        if path.suffix in ("", ".py", ".toml", ".jsonl") and path.name != "__pycache__"
    ]
    assert [part for part in parts if not re.search(rf"^  {re.escape(part)}/?\s", drawn, re.MULTILINE)] == []
    known = {path.name for folder in ("src", "tests", "tools") for path in (ROOT / folder).rglob("*")}
    named = set(re.findall(r"\b\w+\.(?:py|toml)\b", drawn))
    assert sorted(named - known) == []


def test_readme_leads_to_the_index_and_is_read_in_one_sitting() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/README.md)" in text and len(text.splitlines()) <= 150


def test_index_leads_to_every_page() -> None:
    folder = ROOT / "docs"
    pages = [path.relative_to(folder).as_posix() for path in (*folder.glob("*.md"), *folder.glob("development/*.md"))]
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [page for page in pages if page != "README.md" and f"]({page})" not in index] == []


def cells(page: str, head: str) -> list[list[str]]:
    """Rows of a page's table, by how its head begins."""
    table = (ROOT / page).read_text(encoding="utf-8").partition(head)[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_licence_page_has_the_families_and_duties_of_the_code() -> None:
    written = [
        (row[0], row[-3], row[-2], tuple(re.findall(r"`([^`]+)`", row[-1])))
        for row in cells("docs/licences.md", "| family | covers |")
    ]
    families = [
        (family.name, "yes" if family.commercial else "no", family.derived, family.duties)
        for family in licence_families.FAMILIES
    ]
    assert written == families
    assert {row[0].strip("`"): row[1] for row in cells("docs/licences.md", "| duty | what")} == licence_families.DUTIES


def test_command_line_page_lists_groups_and_renamed_flags() -> None:
    """The tables equal GROUPS and _RENAMED of the code."""
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    for title, (_, commands) in GROUPS.items():
        assert f"| {title} | {', '.join(f'`{command}`' for command in commands)} |" in page
    lines = {tuple(re.split(r"  +", line)[:3]) for line in block_with(page, "command ").splitlines()[1:]}
    renamed = {
        (command.replace("agents", "agents (every command)") if command == "agents" else command, old, new)
        for command, flags in _RENAMED.items()
        for old, new in flags.items()
    }
    assert lines == renamed | {("export", "--key", "--public-key")}


def test_installation_page_has_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for row in cells("docs/install.md", "| extra | brings") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(extras) - {"all"}


def test_tokens_of_a_picture_are_those_that_are_charged() -> None:
    from sartor.models.towers.vision_towers import GRID, EfficientNetLite0, EfficientNetTower

    tower = EfficientNetTower(
        SimpleNamespace(name="e", digest="0", licence="MIT", modality="image"), EfficientNetLite0(), "cpu"
    )
    tokens = GRID * GRID // tower.stack
    serving = re.search(
        r"(\d+) a picture by `efficientnet-lite0`", (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    )
    multimodal = re.search(
        r"`efficientnet-lite0` \((\d+) tokens an image", (ROOT / "docs/multimodal.md").read_text(encoding="utf-8")
    )
    assert (int(serving[1]), int(multimodal[1])) == (tokens, tokens)


def test_extras_that_all_leaves_out_are_said() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    everything = set(re.fullmatch(r"sartor\[(.+)\]", extras["all"][0])[1].split(","))
    said = re.search(r"`all` is every\s+extra but ([^.]+)\.", INSTALL)[1]
    assert set(re.findall(r"`(\w+)`", said)) == set(extras) - everything - {"all"}
