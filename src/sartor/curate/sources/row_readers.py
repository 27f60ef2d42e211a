"""Open files -> raw rows with their line: JSONL, JSON, CSV, text.

A reader yields (line, row) for what it could read and (line, Malformed) for what it could not; nothing a file holds ends in
a traceback. Memory is bounded by the longest row allowed, but for a `.json` file, which is one value and is read whole: its
size has a limit of its own.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from sartor.core.records import Malformed

Read = Iterator[tuple[str, Any]]
_SPACE = " \t\r\n,"
MOST_JSON_BYTES = 256 << 20
# What a spreadsheet would run (OWASP "CSV injection"): = before an operand; @, + or - before a function's call; DDE.
_FORMULA = re.compile(
    r"""=[\s(+\-@]*[\w"'{$\[\\.#] |
        [@+\-][\s+\-]*[A-Z][A-Z0-9_.]*\( |
        [@+\-=].*[\w)]\|.*! |
        [@+\-][\s+\-]*(?i:hyperlink|webservice|import\w+|image|dde|rtd|call|register|exec|cmd|system|sum|indirect|filterxml)\(""",
    re.VERBOSE | re.DOTALL,
)


class OverlongError(Exception):
    """A CSV row of more bytes than allowed; raised by the lines that the csv module is given."""


def lines(stream: BinaryIO, end: int, first: int, most_bytes: int) -> Iterator[tuple[int, str | Malformed]]:
    """(line number, text without its end) of every line that is not blank, up to the byte `end`.

    Begins where `stream` stands, at line `first`; never holds more than `most_bytes` of one line.
    """
    at, number = stream.tell(), first - 1
    while at < end and (raw := stream.readline(most_bytes + 1)):
        number += 1
        if len(raw) > most_bytes:
            size = len(raw) + _skip_line(stream, raw)
            at += size
            problem = f"the row has {size:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
            yield number, Malformed("oversize_row", problem)
            continue
        raw = raw[: end - at]  # of a file that grows meanwhile, what was there
        begins, at = at == 0, at + len(raw)
        if begins:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in raw:
            yield number, Malformed("nul_bytes", f"the row holds {raw.count(0)} NUL bytes")
            continue
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, Malformed("not_utf8", f"byte {error.start + 1} of the row is not UTF-8")
            continue
        if text:
            yield number, text


def _skip_line(stream: BinaryIO, raw: bytes) -> int:
    """Read to the end of the line that `raw` begins; returns how many bytes that was."""
    size = 0
    while not raw.endswith(b"\n") and (raw := stream.readline(1 << 20)):
        size += len(raw)
    return size


def jsonl(stream: BinaryIO, end: int, first: int, most_bytes: int) -> Read:
    """One JSON value a line."""
    for number, line in lines(stream, end, first, most_bytes):
        if isinstance(line, Malformed):
            yield str(number), line
            continue
        try:
            yield str(number), json.loads(line, parse_constant=_no_constant)
        except RecursionError:
            yield str(number), Malformed("bad_json", "the row is nested too deeply")
        except ValueError as error:
            yield str(number), Malformed("bad_json", f"the row is not JSON: {error}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def whole_json(stream: BinaryIO, most_bytes: int) -> Read:
    """One JSON value: a list of rows, an object that holds one list, or rows one after another. Rows before a fault stay."""
    raw = stream.read(MOST_JSON_BYTES + 1)
    if len(raw) > MOST_JSON_BYTES:
        detail = f"a .json file is read whole, and the limit is {MOST_JSON_BYTES:,} bytes; save it as JSON Lines: jq -c '.[]'"
        yield "1", Malformed("oversize_file", detail)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield "1", Malformed("not_utf8", f"byte {error.start + 1} of the file is not UTF-8")
        return
    del raw
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        try:
            whole = json.loads(text, parse_constant=_no_constant)
            yield from _rows_of_object(whole)
            return
        except (ValueError, RecursionError):
            pass  # perhaps JSON Lines under another name: read value by value below
    else:
        start += text[start : start + 1] == "["
    yield from _values(text, start, most_bytes)


def _rows_of_object(whole: dict[str, Any]) -> Read:
    """The rows of an object: those of a list in it, its own values if all are objects ({id: row}), or itself.

    Of two lists the first is read, and the others are named.
    """
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    if any(key in whole for key in ("messages", "conversations")):
        lists = {}
    elif not lists and len(whole) > 1 and all(isinstance(value, dict) for value in whole.values()):
        lists = {"": list(whole.values())}  # {id: row}
    if not lists:
        yield "1", whole
        return
    (name, rows), *others = lists.items()
    for place, row in enumerate(rows, 1):
        yield str(place), row
    for other, unread in others:
        detail = f"the object holds several lists; {name[:40]!r} is read, the {len(unread):,} entries of {other[:40]!r} are not"
        yield str(len(rows) + 1), Malformed("unread_list", detail)


def _values(text: str, at: int, most_bytes: int) -> Read:
    """JSON values one after another from `at` on, with the line on which each begins."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    line, counted = 1, 0
    while True:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        if at >= len(text) or (text[at] == "]" and not text[at + 1 :].strip()):
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            rest = text.count("\n", at)
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            yield str(line), Malformed("bad_json", f"not JSON from here on ({rest} more lines are not read): {said}")
            return
        if "\0" in text[at:end] or "\\u0000" in text[at:end]:
            yield str(line), Malformed("nul_bytes", "the row holds NUL characters")
        elif end - at > most_bytes:
            yield str(line), Malformed("oversize_row", f"the row has {end - at:,} characters; the limit is {most_bytes:,}")
        else:
            yield str(line), row
        at = end


class _RowLines:
    """Lines for the csv module, which would take a line of any length whole; counts the characters of the row at hand."""

    def __init__(self, stream: BinaryIO, most_bytes: int) -> None:
        self.stream, self.most, self.row, self.number = stream, most_bytes, 0, 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        raw = self.stream.readline(self.most + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        self.row += len(raw)
        if len(raw) > self.most:
            self.row += _skip_line(self.stream, raw)
        if self.row > self.most:
            raise OverlongError
        return raw.decode("utf-8", "surrogateescape")


def delimited(stream: BinaryIO, most_bytes: int) -> Read:
    """CSV with a header. The delimiter is the commonest of , ; tab | in the header."""
    csv.field_size_limit(most_bytes)
    head = stream.readline(min(most_bytes, 1 << 20))
    stream.seek(0)
    source = _RowLines(stream, most_bytes)
    rows = csv.reader(source, delimiter=max(",;\t|", key=lambda mark: head.count(mark.encode())), strict=True)
    names: list[str] | None = None
    while True:
        first, source.row = source.number + 1, 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except OverlongError:
            detail = f"the row has {source.row:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
            yield _span(first, source.number), Malformed("oversize_row", detail)
            continue
        except csv.Error as error:
            yield _span(first, source.number), _bad_csv(error, source.number - first + 1)
            continue
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if names is None:
            names = [name.strip() for name in row]
            if twice := sorted(name for name, count in Counter(names).items() if count > 1 and name):
                detail = f"the header names {', '.join(map(repr, twice[:5]))} more than once; one would hide the other"
                yield _span(first, source.number), Malformed("duplicate_columns", f"{detail}; no row is read")
                return
            continue
        yield _span(first, source.number), _csv_row(names, row)


def _bad_csv(error: csv.Error, count: int) -> Malformed:
    taken = f"; a quote that does not close took {count:,} lines for one row, and none of them is read" if count > 1 else ""
    return Malformed("bad_csv", f"{error}{taken}")


def _csv_row(names: list[str], row: list[str]) -> Any:
    whole = "".join(row)
    if len(row) != len(names):
        return Malformed("field_count", f"the row has {len(row)} fields, the header {len(names)}")
    if "\0" in whole:
        return Malformed("nul_bytes", f"the row holds {whole.count(chr(0))} NUL bytes")
    if not whole.isascii() and any("\udc80" <= character <= "\udcff" for character in whole):
        return Malformed("not_utf8", "the row is not UTF-8")
    for name, value in zip(names, row, strict=True):
        if is_formula(value):
            said = f"a spreadsheet would run the cell {name[:40]!r}: {value.strip()[:60]!r}"
            return Malformed("csv_formula", f"{said}; if it is meant as text, save the rows as JSON Lines")
    # an empty cell is an absent field: CSV has no other way to say so
    return {name: value for name, value in zip(names, row, strict=True) if name and value != ""}


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet would run a cell rather than show it. A leading + - or @ of a text, number or name is none."""
    start = cell.lstrip()[:2000]
    if start[:1] in ("＝", "＋", "－", "＠"):  # full width: some spreadsheets take them for the plain ones
        start = unicodedata.normalize("NFKC", start)
    return start[:1] in ("=", "+", "-", "@") and _FORMULA.match(start) is not None


def _span(first: int, last: int) -> str:
    return str(first) if last <= first else f"{first}-{last}"


def document(stream: BinaryIO, most_bytes: int) -> tuple[str, bytes] | Malformed:
    """The text of a whole file and the bytes it was read from."""
    raw = stream.read(most_bytes + 1)
    if len(raw) > most_bytes:
        size = stream.seek(0, io.SEEK_END)
        return Malformed("oversize_row", f"the file has {size:,} bytes; the limit is {most_bytes:,} (max_row_bytes)")
    if b"\0" in raw:
        return Malformed("nul_bytes", f"the file holds {raw.count(0)} NUL bytes")
    try:
        return raw.decode("utf-8-sig"), raw
    except UnicodeDecodeError as error:
        return Malformed("not_utf8", f"byte {error.start + 1} of the file is not UTF-8")
