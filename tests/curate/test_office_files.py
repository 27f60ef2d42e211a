"""Workbooks and documents of Office: what is read of them, and files that are made to harm."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path
from typing import Any

import docx
import openpyxl
import pytest

import sartor
from sartor.core.errors import ConfigError, ExtraError
from sartor.core.installation import install_command
from sartor.core.records import Drop, Example
from sartor.curate.sources import documents
from sartor.curate.sources.planner import plan_reading, read_all
from sartor.curate.sources.types import Columns, SourceOptions

FIELDS = Columns(prompt="Frage", completion="Antwort")


def workbook(file: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(file)
    return file


def rows_of(path: Path | str, **options: Any) -> list[Example | Drop]:
    return list(read_all(SourceOptions(path=str(path), **options), 1 << 20, Path(str(path)).parent / "media"))


def reasons(path: Path | str, **options: Any) -> list[str]:
    return [row.reason for row in rows_of(path, **options) if isinstance(row, Drop)]


def changed(file: Path, name: str, change: Any) -> None:
    """Rewrite a member of a package."""
    with zipfile.ZipFile(file) as package:
        members = {info.filename: package.read(info) for info in package.infolist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as package:
        for member, content in members.items():
            package.writestr(member, content)


def test_cells_are_what_the_sheet_shows(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 31)
    rows = [
        ["Frage", "Antwort", "Tag", "Nr", None],
        ["Wie öffne ich ein Konto?", "Über die App.\nZweite Zeile", day, 7.0],
        [],
        ["Was kostet es?", 12, None, "7"],
    ]
    file = workbook(tmp_path / "faq.xlsx", Fragen=rows)
    first, second = rows_of(file, fields=Columns(prompt="Frage", completion="Antwort", date="Tag", group="Nr"))
    assert isinstance(first, Example) and isinstance(second, Example)
    assert (first.messages[0].text, first.reply, first.group) == (rows[1][0], rows[1][1], "7")
    assert first.origins[0].date == "2026-01-31" and first.origins[0].locator == "faq.xlsx:2"
    assert (second.reply, second.group, second.origins[0].locator) == ("12", "7", "faq.xlsx:4")


def test_sheet_is_named_and_no_other_is_left_out_unseen(tmp_path: Path) -> None:
    known = [["question", "answer"], ["a", "b"]]
    file = workbook(tmp_path / "two.xlsx", Leer=[], Erste=[["Frage", "Antwort"], ["x", "y"]], Zweite=known)
    found = rows_of(f"{file}#Zweite")
    assert [row.reply for row in found if isinstance(row, Example)] == ["b"] and len(found) == 1
    example, drop = rows_of(file, fields=FIELDS)
    assert isinstance(example, Example) and example.reply == "y"
    assert isinstance(drop, Drop) and drop.reason == "unread_sheet" and "FILE.xlsx#Zweite" in drop.detail
    (drop,) = rows_of(f"{file}#Dritte")
    assert isinstance(drop, Drop) and drop.reason == "no_sheet" and "'Leer', 'Erste', 'Zweite'" in drop.detail


def test_merged_cell_has_its_value_in_each_row(tmp_path: Path) -> None:
    """A group over three rows of which one is empty, a question with two answers, and cells merged side by side."""
    rows = [["group", "question", "answer", None], ["North", "A?", "a"], [None, None, "b"], [], [None, "C?", "c"]]
    book = openpyxl.load_workbook(workbook(tmp_path / "a.xlsx", Fragen=[*rows, [None, "D?", "d"]]))
    for cells in ("A2:A5", "B2:B3", "C6:D6"):
        book.active.merge_cells(cells)
    book.save(tmp_path / "a.xlsx")
    found = [row for row in rows_of(tmp_path / "a.xlsx") if isinstance(row, Example)]
    assert [(row.group, row.messages[0].text, row.reply) for row in found] == [
        ("North", "A?", "a"),
        ("North", "A?", "b"),
        ("North", "C?", "c"),
        ("", "D?", "d"),
    ]


def test_header_merged_over_rows_is_no_row(tmp_path: Path) -> None:
    book = openpyxl.load_workbook(workbook(tmp_path / "a.xlsx", S=[["question", "answer"], [], ["A?", "a"]]))
    for cells in ("A1:A2", "B1:B2"):
        book.active.merge_cells(cells)
    book.save(tmp_path / "a.xlsx")
    (row,) = rows_of(tmp_path / "a.xlsx")
    assert isinstance(row, Example) and row.reply == "a"


def test_unknown_column_is_refused_at_planning(tmp_path: Path) -> None:
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["Frage", "Antwort"], ["x", "y"]])
    with pytest.raises(ConfigError, match="no column 'Fragen'"):
        plan_reading([SourceOptions(path=str(file), fields=Columns(prompt="Fragen"))], 1 << 20)


def test_formula_is_its_value_and_never_run(tmp_path: Path) -> None:
    """A formula that Excel has not computed yet has no value: the cell is empty. An error of a formula is no text to learn."""
    rows = [["Frage", "Antwort"], ["a", "=1+1"], ["b", "#DIV/0!"], ["c", "so"]]
    file = workbook(tmp_path / "faq.xlsx", Fragen=rows)
    found = rows_of(file, fields=FIELDS)
    assert [row.reason if isinstance(row, Drop) else row.reply for row in found] == [
        "missing_field",
        "cell_error",
        "so",
    ]


def test_cell_without_a_column_name_is_said(tmp_path: Path) -> None:
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["Frage", "Antwort"], ["a", "b", "c"], ["d", "e"]])
    assert [type(row) for row in rows_of(file, fields=FIELDS)] == [Drop, Example]


def test_text_of_a_document_with_its_tables(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_paragraph("Erster Absatz")
    cells = document.add_table(1, 2).rows[0].cells
    cells[0].text, cells[1].text = "links", "rechts"
    document.add_paragraph("Letzter Absatz")
    document.save(str(tmp_path / "brief.docx"))
    (row,) = rows_of(tmp_path / "brief.docx")
    assert isinstance(row, Example) and row.reply == "Erster Absatz\nlinks\trechts\nLetzter Absatz"


@pytest.mark.parametrize("name", ["faq.xlsx", "brief.docx"])
def test_empty_broken_or_locked_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    assert reasons(file) == ["empty_file"]
    file.write_bytes(b"PK\x03\x04 and no more")
    assert reasons(file) == [f"bad_{name[-4:]}"]
    file.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))  # what Excel and Word write with a password
    (drop,) = rows_of(file)
    assert isinstance(drop, Drop) and drop.reason == "encrypted" and "password" in drop.detail
    file.write_text("Frage;Antwort\n")
    assert reasons(file) == ["format_mismatch"]
    lock = tmp_path / f"~${name}"
    lock.write_bytes(b"\x05Ada" + bytes(161))
    assert reasons(lock) == ["lock_file"]
    with zipfile.ZipFile(file, "w") as package:
        package.writestr("hello.txt", "no Office file")
    assert reasons(file) == [f"bad_{name[-4:]}"]


def test_workbook_without_a_cell_is_empty(tmp_path: Path) -> None:
    assert reasons(workbook(tmp_path / "faq.xlsx", Fragen=[], Andere=[])) == ["empty_file"]


def test_package_that_unfolds_beyond_its_limits_is_refused(tmp_path: Path) -> None:
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["Frage", "Antwort"], ["a", "b"]])
    changed(file, "xl/worksheets/sheet1.xml", lambda content: content + b" " * (200 << 20))
    assert reasons(file, fields=FIELDS) == ["xlsx_bomb"]
    many = tmp_path / "many.xlsx"
    with zipfile.ZipFile(many, "w") as package:
        for number in range(10_001):
            package.writestr(f"{number}", "")
    assert reasons(many) == ["xlsx_bomb"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("part", ["xl/worksheets/sheet1.xml", "xl/workbook.xml", "xl/_rels/workbook.xml.rels"])
def test_entities_are_refused_before_a_parser_sees_them(part: str, encoding: str, tmp_path: Path) -> None:
    """Billion laughs, and a file of this machine by an external entity."""
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["Frage", "Antwort"], ["a", "b"]])
    dtd = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd"><!ENTITY b "&a;&a;">]>'
    changed(file, part, lambda content: (dtd + content.decode().split("?>", 1)[-1]).encode(encoding))
    assert reasons(file, fields=FIELDS) == ["xlsx_bomb"]


def test_row_longer_than_allowed_is_dropped_alone(tmp_path: Path) -> None:
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["Frage", "Antwort"], ["a", "x" * 30_000], ["b", "so"]])
    found = list(read_all(SourceOptions(path=str(file), fields=FIELDS), 10_000, tmp_path / "media"))
    assert [row.reason if isinstance(row, Drop) else row.reply for row in found] == ["oversize_row", "so"]


def test_workbook_dataset_depends_on_the_chosen_sheet(tmp_path: Path) -> None:
    """The manifest names the workbook with its sheet."""
    rows = [["Frage", "Antwort"], *([f"Wie öffne ich {number}?", f"Über Weg {number}."] for number in range(30))]
    other = [["Frage", "Antwort"], *([f"Was kostet {number}?", f"Es kostet {number}."] for number in range(30))]
    file = workbook(tmp_path / "faq.xlsx", Eins=rows, Zwei=other)
    made = {}
    for sheet in ("Eins", "Zwei"):
        source = {
            "path": f"{file}#{sheet}",
            "licence": "CC-BY-4.0",
            "fields": {"prompt": "Frage", "completion": "Antwort"},
        }
        made[sheet] = sartor.curate({"sources": [source]}, tmp_path / sheet).dataset
    assert made["Eins"].manifest["digest"] != made["Zwei"].manifest["digest"]
    (facts,) = made["Eins"].manifest["sources"]
    assert (facts["path"], facts["form"], facts["read"]) == ("faq.xlsx#Eins", "prompt_completion", 30)


@pytest.mark.parametrize(("name", "package"), [("faq.xlsx", "openpyxl"), ("brief.docx", "python-docx")])
def test_without_the_extra_it_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workbook(tmp_path / "faq.xlsx", Fragen=[["question", "answer"], ["a", "b"]])
    document = docx.Document()
    document.add_paragraph("so")
    document.save(str(tmp_path / "brief.docx"))
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ExtraError, match=package) as caught:
        rows_of(tmp_path / name)
    assert caught.value.remedy == install_command("office")


def test_a_stream_is_read_from_memory_alone(tmp_path: Path) -> None:
    """The file is read once and compared with its digest: what is parsed is what was planned."""
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["question", "answer"], ["a", "b"]])
    plan = plan_reading([SourceOptions(path=str(file))], 1 << 20)
    workbook(file, Fragen=[["question", "answer"], ["a", "c"]])
    with documents.DocumentReader() as reader:
        (found,) = [row for _, row in reader.read(str(file), plan.files[0].sha256, "xlsx", 1 << 20)]
    assert found.reason == "changed_file"


def test_size_that_a_sheet_states_wrongly_hides_no_row(tmp_path: Path) -> None:
    """Some exports write A1 of every sheet."""
    rows = [["Frage", "Antwort"], *([f"Was kostet {number}?", f"{number} Euro"] for number in range(5))]
    file = workbook(tmp_path / "faq.xlsx", Fragen=rows)
    changed(file, "xl/worksheets/sheet1.xml", lambda content: content.replace(b'ref="A1:B6"', b'ref="A1"'))
    found = rows_of(file, fields=FIELDS)
    assert [row.reply for row in found if isinstance(row, Example)] == [f"{number} Euro" for number in range(5)]


@pytest.mark.parametrize(
    "before",
    [b"<!--" + b" " * 70_000 + b"-->", b"<!-- <x -->" + b" " * 70_000, b"<?x <x ?>" + b" " * 70_000],
    ids=["comment", "element-in-a-comment", "element-in-an-instruction"],
)
def test_entities_behind_a_long_beginning_are_refused(before: bytes, tmp_path: Path) -> None:
    file = workbook(tmp_path / "faq.xlsx", Fragen=[["Frage", "Antwort"], ["a", "b"]])
    dtd = b'<?xml version="1.0"?>' + before + b'<!DOCTYPE x [<!ENTITY a "b">]>'
    changed(file, "xl/worksheets/sheet1.xml", lambda content: dtd + content.split(b"?>", 1)[-1])
    assert reasons(file, fields=FIELDS) == ["xlsx_bomb"]
