"""Attacks by files of strangers, from rows to the terminal on which a user looks at them.

What was tried and found sound, so that it stays so, stands here too.
"""

from __future__ import annotations

import io
import itertools
import json
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import sartor
from sartor.cli.app import notice
from sartor.cli.tuning import _say
from sartor.core.errors import SartorError, UnavailableError
from sartor.core.records import MalformedRow
from sartor.curate.sources import office_files
from sartor.curate.sources.media_files import store_media
from sartor.quickstart.chat import ServerPartner
from sartor.quickstart.show import show

Parts = dict[str, bytes]
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
LINKS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
ENTITIES = b'<!DOCTYPE x [<!ENTITY a "%s"><!ENTITY b "%s">]>' % (b"X" * 50, b"&a;" * 40)


def sheet(*rows: str, before: bytes = b"", first: int = 1) -> bytes:
    """The XML of a sheet with a cell of text in each row."""
    cells = "".join(
        f'<row r="{number}"><c r="A{number}" t="inlineStr"><is><t>{text}</t></is></c></row>'
        for number, text in enumerate(rows, first)
    )
    return before + f'<worksheet xmlns="{MAIN}"><sheetData>{cells}</sheetData></worksheet>'.encode()


def packed(parts: Parts) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in parts.items():
            package.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def workbook() -> Parts:
    """The parts of a workbook that openpyxl wrote."""
    openpyxl = pytest.importorskip("openpyxl")
    book, out = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["question"])
    book.save(out)
    with zipfile.ZipFile(out) as package:
        return {name: package.read(name) for name in package.namelist()}


def renamed(parts: Parts, name: str, content: bytes) -> Parts:
    """The workbook with its sheet under another name."""
    kept = {part: text for part, text in parts.items() if part != "xl/worksheets/sheet1.xml"}
    new = name.removeprefix("xl/").encode()
    return {**{part: text.replace(b"worksheets/sheet1.xml", new) for part, text in kept.items()}, name: content}


@pytest.mark.parametrize(
    "name",
    ["xl/worksheets/sheet1.xml", "xl/worksheets/sheet1.bin", "xl/worksheets/sheet1.XML", "xl/media/sheet1.svg"],
)
def test_entities_in_any_part_are_refused(workbook: Parts, name: str) -> None:
    """A relationship may name the sheet as it likes; only parts called .xml were looked at."""
    raw = packed(renamed(workbook, name, sheet("question", "&b;", before=ENTITIES)))
    with pytest.raises(MalformedRow) as refused:
        office_files.check_package(raw, "xlsx")
    assert refused.value.reason == "xlsx_bomb"


def test_picture_of_a_document_is_no_bomb(workbook: Parts) -> None:
    """A drawing in SVG may name its document type, which nothing here reads."""
    svg = b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd"><svg/>'
    page = b"<!DOCTYPE html><html></html>"
    others = {"xl/media/image1.svg": svg, "xl/media/a.png": b"\x89PNG", "xl/embeddings/part.htm": page}
    office_files.check_package(packed({**workbook, **others}), "xlsx")


def test_declared_sizes_below_the_true_ones_end_the_file(workbook: Parts) -> None:
    """The directory of the archive says that a part unfolds to little; what is more is not read."""
    raw = packed({**workbook, "xl/worksheets/sheet1.xml": sheet("question", "x" * 50_000_000)})
    directory = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"xl/worksheets/sheet1.xml"))
    lying = raw[: directory + 24] + (100).to_bytes(4, "little") + raw[directory + 28 :]
    began = time.monotonic()
    with pytest.raises(Exception, match=r".") as refused:  # noqa: PT011  (the reader's child makes any of them a Drop)
        office_files.check_package(lying, "xlsx")
        list(office_files.workbook_rows(lying, ""))
    assert not isinstance(refused.value, MemoryError) and time.monotonic() - began < 10


def test_formulas_are_not_computed_or_taken(workbook: Parts) -> None:
    """A formula counts as what Excel last displayed, and a link to another file is not opened."""
    cell = '<c r="A2" t="str"><f>HYPERLINK("http://127.0.0.1:1/x")</f><v>shown</v></c>'
    content = sheet("question").replace(b"</sheetData>", f'<row r="2">{cell}</row></sheetData>'.encode())
    rows = dict(office_files.workbook_rows(packed({**workbook, "xl/worksheets/sheet1.xml": content}), ""))
    assert rows == {2: {"question": "shown"}}


def test_external_parts_are_not_fetched(workbook: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates and pictures that a document names at an address stay there."""
    docx = pytest.importorskip("docx")

    def called(*arguments: object, **options: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket, "socket", called)
    monkeypatch.setattr(socket, "create_connection", called)
    out = io.BytesIO()
    document = docx.Document()
    document.add_paragraph("hello")
    document.save(out)
    with zipfile.ZipFile(out) as package:
        parts = {name: package.read(name) for name in package.namelist()}
    link = (
        f'<Relationship Id="r9" Type="{LINKS}/attachedTemplate" Target="http://127.0.0.1:1/x" TargetMode="External"/>'
    )
    relations = "word/_rels/document.xml.rels"
    parts[relations] = parts[relations].replace(b"</Relationships>", f"{link}</Relationships>".encode())
    raw = packed(parts)
    office_files.check_package(raw, "docx")
    assert office_files.document_text(raw) == "hello"
    external = workbook["xl/_rels/workbook.xml.rels"].replace(
        b"</Relationships>", link.replace("attachedTemplate", "externalLinkPath").encode() + b"</Relationships>"
    )
    assert not [
        row
        for _, row in office_files.workbook_rows(packed({**workbook, "xl/_rels/workbook.xml.rels": external}), "")
        if isinstance(row, dict)
    ]


def test_far_row_of_a_sheet_is_refused_soon(workbook: Parts) -> None:
    raw = packed(
        {
            **workbook,
            "xl/worksheets/sheet1.xml": sheet("question").replace(
                b"</sheetData>",
                sheet("x", first=2_000_000).split(b"<sheetData>")[1].split(b"</sheetData>")[0] + b"</sheetData>",
            ),
        }
    )
    began = time.monotonic()
    (refused,) = (row for _, row in office_files.workbook_rows(raw, ""))
    assert isinstance(refused, MalformedRow) and refused.reason == "oversize_file" and time.monotonic() - began < 10


PATHS = {
    "an absolute path": "/etc/hostname",
    "a home": "~/.ssh/id",
    "above": "../secret.png",
    "above, encoded": "a/%2e%2e/%2e%2e/secret.png",
    "above, encoded twice": "%252e%252e/secret.png",
    "a drive": "C:\\secret.png",
    "a share": "\\\\host\\share\\a.png",
    "an address": "file:///etc/hostname",
    "an address of an export": "http://localhost:8080/data/upload/1/a.png",
    "an export's own": "/data/local-files/?d=../../etc/hostname",
    "a link out": "link.png",
}


@pytest.mark.parametrize("way", PATHS)
def test_media_of_an_export_stay_in_its_folder(way: str, tmp_path: Path) -> None:
    """Label Studio, Argilla and others name their files in the export."""
    (tmp_path / "secret.png").write_bytes(b"\x89PNG secret")
    folder = tmp_path / "export"
    (folder / "a").mkdir(parents=True)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(MalformedRow) as refused:
        store_media("image", PATHS[way], folder, tmp_path / "media")
    assert refused.value.reason in ("bad_media", "missing_media") and not (tmp_path / "media").exists()


# --- the terminal

EVIL = "before\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08after"


def has_commands(text: str) -> bool:
    return any(ord(character) < 32 and character not in "\n\t" or 127 <= ord(character) < 160 for character in text)


def shown_on_a_terminal(draw: Callable[[Any], None]) -> str:
    from rich.console import Console

    file = io.StringIO()
    draw(Console(file=file, force_terminal=False, width=200))
    return file.getvalue()


def test_replies_in_a_chat_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was tuned on rows with escape sequences, or a server that is not yours, says them."""
    for piece in EVIL:
        _say(piece)
    notice(EVIL)
    said = capsys.readouterr()
    assert not has_commands(said.out + said.err) and "before" in said.out and "\\u001b]0;owned" in said.out


def test_rows_that_are_shown_do_not_steer_the_terminal(tmp_path: Path) -> None:
    """Rows, and names of files with control characters or with rich's markup, which ended in a traceback."""
    rows = tmp_path / "source" / "rows[" / "b][link=evil]x.jsonl"  # read as rows[/b][link=evil]x.jsonl
    rows.parent.mkdir(parents=True)
    lines = [{"question": f"{EVIL} {number}", "answer": f"{EVIL} yes"} for number in range(30)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"sources": [{"path": str(tmp_path / "source"), "licence": "own"}]}
    try:
        sartor.curate(recipe, tmp_path / "dataset")
        preview = show(tmp_path / "dataset", rows=3)
    except SartorError as error:
        pytest.fail(f"{error.problem}")
    assert preview.rows
    text = shown_on_a_terminal(preview.draw)
    assert not has_commands(text) and "rows[/b][link=evil]x" in text


def test_errors_and_json_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON has the same value."""
    from sartor.cli import main

    for flags in ((), ("--json",)):
        with pytest.raises(SystemExit):
            main(["show", str(tmp_path / EVIL), *flags])
        said = capsys.readouterr()
        assert not has_commands(said.out + said.err)
        if flags:
            assert EVIL in json.loads(said.out.splitlines()[-1])["error"]["problem"]


ANSWERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "a line without an end": lambda: itertools.repeat(b"data: " + b"a" * 65_536),
    "deep brackets": lambda: iter([b"data: " + b"[" * 200_000 + b"\n"]),
    "a piece that is no text": lambda: iter([b'data: {"choices": [{"delta": {"content": {"a": 1}}}]}\n']),
    "choices that are none": lambda: iter([b'data: {"choices": 7}\n']),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("status", [200, 500])
def test_chat_ends_a_hostile_server_s_answer(answer: str, status: int) -> None:
    """`sartor chat URL` takes a bounded line, and ends in an error that says what to do."""
    partner = ServerPartner("http://127.0.0.1:1", "auto", "", {})

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return ANSWERS[answer]()

    transport = httpx.MockTransport(lambda request: httpx.Response(status, stream=Endless()))
    partner._client = httpx.Client(transport=transport, base_url="http://127.0.0.1:1")
    with pytest.raises(UnavailableError) as refused:
        list(partner.reply([{"role": "user", "content": "hello"}]))
    assert refused.value.remedy


def test_chat_reads_line_separators_within_a_reply() -> None:
    event = json.dumps({"choices": [{"delta": {"content": "one\u2028two"}}]}, ensure_ascii=False)
    partner = ServerPartner("http://127.0.0.1:1", "auto", "", {})
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=f"data: {event}\n\ndata: [DONE]\n"))
    partner._client = httpx.Client(transport=transport, base_url="http://127.0.0.1:1")
    assert "".join(partner.reply([{"role": "user", "content": "hello"}])) == "one\u2028two"


def test_doctor_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user pastes into a bug report."""
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "SARTOR_KEY_PASSPHRASE", "DB_PASSWORD"):
        monkeypatch.setenv(name, "s3cret-of-the-user")
    found = sartor.doctor()
    assert "s3cret-of-the-user" not in json.dumps(found.as_json()) + str(found.table())
