"""docs/development/file-map.md is what tools/file_map.py writes; a change of a docstring, a file or a level shows."""

from __future__ import annotations

from pathlib import Path

import pytest

import file_map

TREE = {
    "tests/test_architecture.py": 'ORDER = (("low",), ("high", "top"))\n',
    "src/sartor/low/__init__.py": '"""What lies below. More."""\n',
    "src/sartor/low/b.py": '"""Reader of `b.json` | files.\n\nMore.\n"""\n',
    "src/sartor/low/deep/__init__.py": '"""Deep."""\n',
    "src/sartor/low/deep/a.toml": "# Words of a list. Lower case.\n# More.\n",
    "src/sartor/top.py": '"""Top."""\n',
    "src/sartor/data.jsonl": "{}\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_page_is_what_the_docstrings_say() -> None:
    assert file_map.main(["--check"]) == 0, "run python tools/file_map.py"


def test_levels_are_those_of_the_architecture_test() -> None:
    levels = file_map.read_levels(file_map.ROOT)
    assert (levels[0], levels[-1]) == (("core",), ("__main__",))
    packages = {
        path.stem for path in (file_map.ROOT / file_map.SOURCE).iterdir() if path.is_dir() or path.suffix == ".py"
    }
    assert packages - {"__pycache__"} <= {package for level in levels for package in level}


def test_every_file_of_the_package_is_on_the_page() -> None:
    page = (file_map.ROOT / file_map.PAGE).read_text(encoding="utf-8")
    source = file_map.ROOT / file_map.SOURCE
    names = [
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    assert len(names) > 400
    assert [name for name in names if f"[`{name}`](" not in page] == []


def test_rows_stand_by_level_folder_and_name(tree: Path) -> None:
    rows = [line for line in file_map.write_page(tree).splitlines() if line.startswith(("## ", "| ["))]
    assert [row.partition("`](")[0] for row in rows] == [
        "## Level 1: `low`",
        "| [`low/__init__.py",
        "| [`low/b.py",
        "| [`low/deep/__init__.py",
        "| [`low/deep/a.toml",
        "## Level 2: `top.py`",
        "| [`top.py",
        "## Data beside the packages",
        "| [`data.jsonl",
    ]
    assert [row.rpartition(") | ")[2] for row in rows[1:5]] == [
        "What lies below. |",
        "Reader of `b.json` \\| files. |",
        "Deep. |",
        "Words of a list. |",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("low/b.py", '"""Writer of files."""\n'),
        ("low/c.py", '"""New."""\n'),
        ("../../tests/test_architecture.py", 'ORDER = (("top",), ("low",))\n'),
    ],
)
def test_check_finds_a_stale_page(tree: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert file_map.main(["--root", str(tree)]) == 0
    assert file_map.main(["--root", str(tree), "--check"]) == 0
    (tree / "src/sartor" / name).write_text(text, encoding="utf-8")
    assert file_map.main(["--root", str(tree), "--check"]) == 1
    assert "run python tools/file_map.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fault"), [("x = 1\n", "has no docstring"), (f'"""{"long " * 20}sentence."""\n', "109 characters")]
)
def test_a_docstring_without_a_short_sentence_is_a_fault(
    tree: Path, text: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "src/sartor/low/b.py").write_text(text, encoding="utf-8")
    assert file_map.main(["--root", str(tree)]) == 1
    assert fault in capsys.readouterr().err
