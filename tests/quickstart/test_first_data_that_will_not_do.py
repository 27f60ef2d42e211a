"""What a first file may be like that will not do: said before time is spent on tuning, with what would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sartor
from release_fixtures import probe_rows
from sartor.core.errors import SartorError
from sartor.evaluate.audit import probes
from sartor.quickstart import tailor as verb


class TuningBegunError(Exception):
    """Nothing held it up."""


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: Any, **__: Any) -> Any:
        raise TuningBegunError

    monkeypatch.setattr(verb, "tune", begun)
    monkeypatch.setattr(verb, "_ASSETS", ("small-talk",))
    monkeypatch.setattr(probes, "chitchat_rows", probe_rows)


def said_before_tuning(file: Path, base: Path, **options: Any) -> str:
    """Every line that is said until the tuning begins, or the error that ends it before."""
    lines: list[str] = []
    arguments = {
        "name": "faq",
        "out": file.parent / "faq",
        "licence": "own",
        "base": str(base),
        "show": False,
        **options,
    }
    try:
        sartor.tailor(file, notice=lines.append, **arguments)
    except TuningBegunError:
        pass
    except SartorError as error:
        assert error.remedy
        lines += [error.problem, error.remedy]
    return "\n".join(lines)


def csv(folder: Path, rows: list[tuple[str, str]]) -> Path:
    file = folder / "rows.csv"
    file.write_text(
        "prompt,completion\n" + "".join(f'"{prompt}","{reply}"\n' for prompt, reply in rows), encoding="utf-8"
    )
    return file


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(f"Question {n}?", f"Answer {n}.") for n in range(2)], "none of the 2 rows can be held out to measure on"),
        ([(f"Question {n}?", f"Answer {n}.") for n in range(5)], "5 rows of 5 groups cannot both teach and measure"),
        ([(f"Question {n}?", "refund") for n in range(60)], "all 60 replies are 'refund'"),
        (
            [(f"Question {n}?", ("Refund", "refund")[n % 2]) for n in range(60)],
            "1 label stands in more than one spelling",
        ),
        ([("Lorem ipsum dolor sit amet " * 600, f"Answer {n % 4}.") for n in range(60)], "--data.max_length_tokens "),
    ],
    ids=["two-rows", "five-rows", "one-class", "two-spellings", "too-long"],
)
def test_rows_that_will_not_do(rows: list[tuple[str, str]], problem: str, tmp_path: Path, tiny_base: Path) -> None:
    rows = [(f"{number}: {prompt}", reply) for number, (prompt, reply) in enumerate(rows)]
    assert problem in said_before_tuning(csv(tmp_path, rows), tiny_base)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "encrypted"),
        (b"PK\x03\x04 no workbook", "not a whole .xlsx file"),
    ],
    ids=["empty", "encrypted", "damaged"],
)
def test_workbook_that_will_not_do(content: bytes, problem: str, tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("openpyxl")
    file = tmp_path / "rows.xlsx"
    file.write_bytes(content)
    assert problem in said_before_tuning(file, tiny_base).lower()


def test_file_that_is_not_there(tmp_path: Path, tiny_base: Path) -> None:
    said = said_before_tuning(tmp_path / "none.csv", tiny_base)
    assert "none.csv" in said
