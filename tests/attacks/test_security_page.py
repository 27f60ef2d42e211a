"""docs/security.md: each guarantee names tests, and every test that it names exists and is run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
BOUNDARIES = {
    "HTTP",
    "Studio",
    "Tokens",
    "Artefacts",
    "Installation",
    "Signatures",
    "Updates",
    "Federation",
    "Feedback",
    "Personal data",
}


def guarantees() -> list[tuple[str, list[str]]]:
    """(boundary, cells of a row) of each guarantee."""
    rows, boundary, is_table = [], "", False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            boundary, is_table = line.lstrip("# "), False
        elif line.startswith("| guarantee |"):
            is_table = True
        elif is_table and line.startswith("|") and not line.startswith("|---"):
            rows.append((boundary, [cell.strip() for cell in line.strip().strip("|").split("|")]))
        elif not line.startswith("|"):
            is_table = False
    return rows


def named_tests() -> list[tuple[str, str]]:
    return sorted(set(NAMED.findall(PAGE.read_text(encoding="utf-8"))))


def test_each_boundary_has_guarantees_with_a_test() -> None:
    rows = guarantees()
    assert {boundary for boundary, _ in rows} == BOUNDARIES
    for boundary, cells in rows:
        assert len(cells) == 4, f"{boundary}: {cells[0]} has {len(cells)} cells"
        assert NAMED.search(cells[2]), f"{boundary}: {cells[0]!r} names no test"


@pytest.mark.parametrize(("file", "name"), named_tests(), ids=lambda value: value.rpartition("/")[2])
def test_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions, f"{file} has no {name}: mend docs/security.md"


@pytest.mark.services
def test_named_tests_are_collected() -> None:
    """pytest finds each one: none is left out by its file's name, or by a condition at import."""
    files = sorted({file for file, _ in named_tests()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {f"{file}::{name}" for file, name in named_tests()} <= collected


def test_attack_tests_stand_on_the_page() -> None:
    """A file of tests/attacks that the page does not name guards a guarantee that nobody reads."""
    files = {f"tests/attacks/{file.name}" for file in Path(__file__).parent.glob("test_*.py")}
    assert files - {f"tests/attacks/{Path(__file__).name}"} <= {file for file, _ in named_tests()}
