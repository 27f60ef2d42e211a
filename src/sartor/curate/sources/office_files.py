"""Rows of workbooks (.xlsx) and text of documents (.docx), with limits.

Both are zip archives of XML (ECMA-376). Before a parser sees a file, its members are counted and their unpacked size
is compared with the file's size. A document type, which could declare entities, is refused: Office writes none.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.parsers import expat

from sartor.core.records import MalformedRow

MOST_MEMBERS = 10_000
MOST_UNFOLDED = 1 << 30  # bytes of all members
MOST_RATIO = 200  # unpacked bytes per byte of the file; sheets of repeated text reach 40
MOST_ROWS = 1_048_576  # of a sheet, Excel's own limit
_HEAD_BYTES = 64 << 10
_ASIDE = re.compile(rb"<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z)", re.DOTALL)
_PLAIN_TYPE = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*<!DOCTYPE[^\[>]*>\s*<[A-Za-z_:\x80-\xff]", re.I)
_BEGINS_AS_MARKUP = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*<")
_BEGINS_WITH_AN_ELEMENT = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*<[A-Za-z_:\x80-\xff]")


def check_package(raw: bytes, kind: str) -> None:
    """Raise MalformedRow unless a zip archive is an Office file, not encrypted, and within the limits."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as package:
            members = package.infolist()
            unfolded = sum(member.file_size for member in members)
            if (
                len(members) > MOST_MEMBERS
                or unfolded > MOST_UNFOLDED
                or unfolded > MOST_RATIO * max(len(raw), 1 << 16)
            ):
                detail = f"{len(members):,} members that unfold to {unfolded:,} bytes, of a file of {len(raw):,}"
                raise MalformedRow(f"{kind}_bomb", detail)
            if any(member.flag_bits & 1 for member in members):
                raise MalformedRow("encrypted", "the file asks for a password; save it without one")
            part = "xl/workbook.xml" if kind == "xlsx" else "word/document.xml"
            if part not in package.namelist():
                raise MalformedRow(f"bad_{kind}", f"the archive has no {part}: it is no .{kind} file")
            for member in members:
                if _declares_a_type(package, member):
                    detail = (
                        f"{member.filename} declares a document type, or begins with no element; Office writes neither"
                    )
                    raise MalformedRow(f"{kind}_bomb", detail)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise MalformedRow(f"bad_{kind}", f"not a whole .{kind} file: {error}") from None


def _declares_a_type(package: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Return whether a file of the archive could define entities, which may expand without end.

    A document type precedes the first element. The first element must therefore begin within the head, preceded only
    by comments and processing instructions. A relationship may name a part as it likes, so each file that begins as
    markup is one of XML; a document type without declarations, as of a picture in SVG or a page, is left to those.
    """
    with package.open(member) as stream:
        head = stream.read(_HEAD_BYTES).replace(b"\0", b"")  # makes ASCII of UTF-16 markup
    name = member.filename.lower()
    if not name.endswith((".xml", ".rels")) and not _BEGINS_AS_MARKUP.match(head):
        return False
    prolog = _ASIDE.sub(b"", head)
    if not name.endswith((".xml", ".rels")) and _PLAIN_TYPE.match(prolog):
        return False
    return bool(head) and not _BEGINS_WITH_AN_ELEMENT.match(prolog)


def workbook_rows(raw: bytes, sheet: str) -> Iterator[tuple[int, dict[str, Any] | MalformedRow]]:
    """Yield (row number from 1, cells by column name) of a sheet of a workbook.

    sheet: name of the sheet; the first non-empty one if empty. The first row with cells holds the column names. Cells
    are the values that Excel last displayed, never formulas; dates are ISO 8601. A cell merged over several rows has
    its value in each of them. Without `sheet`, each other non-empty sheet yields a MalformedRow, so that no sheet is
    skipped silently.
    """
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # styles and extensions that openpyxl does not know
        workbook = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True, keep_links=False)
    sheets = workbook.worksheets
    for one in sheets:
        # the size stored in a sheet can be wrong: some exporters always write A1
        one.reset_dimensions()
    names = [one.title for one in sheets]
    if sheet and sheet not in names:
        yield (
            1,
            MalformedRow(
                "no_sheet", f"the workbook has no sheet {sheet!r}; it has {', '.join(map(repr, names[:12]))}"
            ),
        )
        return
    filled = [one for one in sheets if next(_filled_rows(one), None) is not None]
    if not filled:
        yield 1, MalformedRow("empty_file", "no sheet of the workbook holds a cell")
        return
    chosen = workbook[sheet] if sheet else filled[0]
    rows = _filled_rows(chosen)
    _, names_of_columns = next(rows, (0, ()))
    header = _header(names_of_columns)
    for number, cells in _repeat_merged(rows, _merged_cells(chosen)):
        if number > MOST_ROWS:
            yield number, MalformedRow("oversize_file", f"more than {MOST_ROWS:,} rows; the rest is not read")
            return
        yield number, _row(header, cells)
    for other in filled if not sheet else ():
        if other.title != chosen.title:
            detail = f"the sheet {chosen.title!r} is read, {other.title!r} is not; name it: FILE.xlsx#{other.title}"
            yield 1, MalformedRow("unread_sheet", detail)


def _filled_rows(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        if any(cell is not None and cell != "" for cell in cells):
            yield number, cells


def _merged_cells(sheet: Any) -> dict[int, list[tuple[int, int]]]:
    """Return first row -> (column from 0, last row) of the cells that are merged over several rows.

    openpyxl leaves merged cells out of a sheet that it reads row by row; they follow the rows in the sheet's XML.
    """
    from openpyxl.utils import range_boundaries

    merged: dict[int, list[tuple[int, int]]] = {}

    def on_start(name: str, attributes: Mapping[str, str]) -> None:
        if name.rpartition(":")[2] != "mergeCell":
            return
        with contextlib.suppress(ValueError, TypeError):  # a reference that is none, or without a row
            column, first, _, last = range_boundaries(attributes.get("ref", ""))
            if last > first:
                merged.setdefault(first, []).append((column - 1, last))

    parser = expat.ParserCreate()
    parser.StartElementHandler = on_start
    with contextlib.suppress(expat.ExpatError), sheet.parent._archive.open(sheet._worksheet_path) as stream:
        parser.ParseFile(stream)  # the reading of the rows names a fault
    return merged


def _repeat_merged(
    rows: Iterable[tuple[int, Sequence[Any]]], merged: Mapping[int, Sequence[tuple[int, int]]]
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield rows with the value of each merged cell in all of its rows; a sheet stores it in the first one alone."""
    current: dict[int, tuple[int, Any]] = {}  # column -> (last row, value)
    for number, cells in rows:
        current = {column: (last, value) for column, (last, value) in current.items() if number <= last}
        filled = [*cells, *[None] * (max(current, default=-1) + 1 - len(cells))]
        for column, (_, value) in current.items():
            filled[column] = value
        for column, last in merged.get(number, ()):
            if column < len(cells):
                current[column] = last, cells[column]
        yield number, filled


def _header(cells: Sequence[Any]) -> list[str]:
    """Return the column names; a repeated name gets its count appended, as in a CSV file."""
    counts: Counter[str] = Counter()
    names = []
    for cell in cells:
        name = str(_cell(cell)).strip()
        counts[name] += 1
        names.append(f"{name} ({counts[name]})" if name and counts[name] > 1 else name)
    return names


def _row(header: Sequence[str], cells: Sequence[Any]) -> dict[str, Any] | MalformedRow:
    row: dict[str, Any] = {name: None for name in header if name}  # an empty cell is null, as in a CSV file
    for index, cell in enumerate(cells):
        value = _cell(cell)
        if value == "":
            continue
        name = header[index] if index < len(header) else ""
        if not name:
            return MalformedRow("field_count", f"column {index + 1} has a cell, and the first row no name for it")
        if cell in _ERRORS:
            return MalformedRow("cell_error", f"the cell of {name[:40]!r} shows {cell}, an error of its formula")
        row[name] = value
    return row


_ERRORS = ("#DIV/0!", "#N/A", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!")


def _cell(value: Any) -> str:
    """Return a cell as text, as a spreadsheet shows it without number formats."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        is_day = isinstance(value, datetime.datetime) and value.time() == datetime.time()
        return value.date().isoformat() if is_day and isinstance(value, datetime.datetime) else value.isoformat()
    return str(value).replace("\r\n", "\n").replace("_x000D_", "")


def document_text(raw: bytes) -> str:
    """Return paragraphs and tables of a document in order: a line each, with tabs between the cells of a table row."""
    import docx

    document = docx.Document(io.BytesIO(raw))
    lines = []
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                lines.append("\t".join(cell.text.strip() for cell in row.cells))
        else:
            lines.append(block.text)
    text = "\n".join(lines).strip()
    if not text:
        raise MalformedRow("no_text", "the document holds no text, perhaps a picture of one")
    return text
