"""Readers of JSON Lines, JSON, CSV and Parquet rows.

A reader yields (line, row), or (line, MalformedRow) for a row that cannot be read; no file content ends in a
traceback. Memory is bounded by the longest row allowed, except for a `.json` file: it is one value, is read whole, and
has a size limit of its own.

A Parquet file can unpack to far more than its size: one value in a dictionary page, or one run of nulls, stands for
any number of rows. `parquet_error` compares the sizes declared in the footer with the file's size at planning. The
longest dictionary value, read before the rows are unpacked, limits the number of rows in a batch.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.records import MalformedRow
from sartor.curate.sources import encodings, file_formats, row_formats
from sartor.curate.sources.safe_paths import open_regular, read_at_most

Read = Iterator[tuple[str, Any]]
_SPACE = " \t\r\n,"
MOST_JSON_BYTES = 256 << 20
# Cells that a spreadsheet would run (OWASP "CSV injection"): = before an operand; @, + or - before a call; DDE. A sign
# before a space begins an item of a list in notes: then = needs an operator, a bracket or a cell (A1) behind it, and
# the other signs one of the functions that do harm
_FORMULA = re.compile(
    r"""=(?=\S|.*(?:[+\-*/^&=<>()\[\]{}|!]|\b[A-Za-z]{1,3}\$?[0-9]))[\s(+\-@]*[\w"'{$\[\\.#] |
        [@+\-]+[A-Z][A-Z0-9_.]*\( |
        [@+\-=].*[\w)]\|.*! |
        [@+\-][\s+\-]*(?i:hyperlink|webservice|import\w+|image|dde|rtd|call|register|exec|cmd|system|sum|indirect|filterxml)\(""",
    re.VERBOSE | re.DOTALL,
)


class OverlongError(Exception):
    """Error for a CSV row of more bytes than allowed, raised by the line iterator given to the csv module."""


def numbered_lines(
    stream: BinaryIO, end: int, first: int, most_bytes: int
) -> Iterator[tuple[int, str | MalformedRow]]:
    """Yield (line number, text without its end) of every non-blank line up to the byte `end`.

    Starts at the stream's position, which is line `first`. Never holds more than `most_bytes` of one line.
    """
    position, number = stream.tell(), first - 1
    while position < end and (raw := stream.readline(most_bytes + 1)):
        number += 1
        if len(raw) > most_bytes:
            size = len(raw) + _skip_line(stream, raw)
            position += size
            problem = f"the row has {size:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
            yield number, MalformedRow("oversize_row", problem)
            continue
        raw = raw[: end - position]  # ignores what was appended since planning
        is_first, position = position == 0, position + len(raw)
        if is_first:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in raw:
            yield number, MalformedRow("nul_bytes", f"the row holds {raw.count(0)} NUL bytes")
            continue
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, MalformedRow("not_utf8", f"byte {error.start + 1} of the row is not UTF-8")
            continue
        if text:
            yield number, text


def _skip_line(stream: BinaryIO, raw: bytes) -> int:
    """Skip the rest of the line that `raw` begins; return its number of bytes."""
    size = 0
    while not raw.endswith(b"\n") and (raw := stream.readline(1 << 20)):
        size += len(raw)
    return size


def jsonl(stream: BinaryIO, end: int, first: int, most_bytes: int) -> Read:
    """Yield one JSON value a line."""
    for number, line in numbered_lines(stream, end, first, most_bytes):
        if isinstance(line, MalformedRow):
            yield str(number), line
            continue
        try:
            yield str(number), json.loads(line, parse_constant=_no_constant)
        except RecursionError:
            yield str(number), MalformedRow("bad_json", "the row is nested too deeply")
        except ValueError as error:
            yield str(number), MalformedRow("bad_json", f"the row is not JSON: {error}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def whole_json(stream: BinaryIO, most_bytes: int) -> Read:
    """Yield the rows of a JSON file: a list of rows, an object that holds one list, or values one after another.

    Rows before a fault are kept.
    """
    raw = read_at_most(stream, MOST_JSON_BYTES)
    if len(raw) > MOST_JSON_BYTES:
        detail = (
            f"a .json file is read whole, and the limit is {MOST_JSON_BYTES:,} bytes; save it as JSON Lines: jq -c "
            "'.[]'"
        )
        yield "1", MalformedRow("oversize_file", detail)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield "1", MalformedRow("not_utf8", f"byte {error.start + 1} of the file is not UTF-8")
        return
    del raw
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        try:
            whole = json.loads(text, parse_constant=_no_constant)
            yield from _rows_of_object(whole)
            return
        except (ValueError, RecursionError):
            pass  # may be JSON Lines with the extension .json; read value by value below
    else:
        start += text[start : start + 1] == "["
    yield from _values(text, start, most_bytes)


def _rows_of_object(whole: dict[str, Any]) -> Read:
    """Yield the rows of an object: those of its list, its values if all are objects ({id: row}), or itself.

    Of several lists the first is read, and a MalformedRow names each other one.
    """
    lists = {
        key: value for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    if any(key in whole for key in ("messages", "conversations")):
        lists = {}
    elif not lists and len(whole) > 1 and all(isinstance(value, dict) for value in whole.values()):
        lists = {"": list(whole.values())}  # {id: row}
    if not lists:
        yield "1", whole
        return
    (name, rows), *others = lists.items()
    for index, row in enumerate(rows, 1):
        yield str(index), row
    for other, unread in others:
        detail = (
            f"the object holds several lists; {name[:40]!r} is read, the {len(unread):,} entries of {other[:40]!r} "
            "are not"
        )
        yield str(len(rows) + 1), MalformedRow("unread_list", detail)


def _values(text: str, position: int, most_bytes: int) -> Read:
    """Yield JSON values one after another from `position` on, with the line on which each begins."""
    constants: list[str] = []  # NaN, Infinity and -Infinity of the value at `position`
    decoder = json.JSONDecoder(parse_constant=constants.append)
    line, counted = 1, 0
    while True:
        while position < len(text) and text[position] in _SPACE:
            position += 1
        if position >= len(text) or (text[position] == "]" and not text[position + 1 :].strip()):
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            more_lines = text.count("\n", position)
            unread = f"{more_lines:,} more lines" if more_lines else f"{len(text) - position:,} characters"
            problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            detail = f"not JSON from here on ({unread} are not read): {problem}"
            yield str(line), MalformedRow("bad_json", detail)
            return
        yield str(line), _value_fault(text[position:end], constants, most_bytes) or row
        constants.clear()
        position = end


def _value_fault(text: str, constants: Sequence[str], most_bytes: int) -> MalformedRow | None:
    """Return the reason why a JSON value is no row, from its text and the constants in it; None for a row.

    Python's json module writes constants that JSON does not have. Only their row is lost, since its end is known.
    """
    if constants:
        detail = f"the row is not JSON: {constants[0]} is not JSON; write null ({len(text):,} characters are not read)"
        return MalformedRow("bad_json", detail)
    if "\0" in text or "\\u0000" in text:
        return MalformedRow("nul_bytes", "the row holds NUL characters")
    if len(text) > most_bytes:
        return MalformedRow("oversize_row", f"the row has {len(text):,} characters; the limit is {most_bytes:,}")
    return None


class _RowLines:
    """Line iterator for the csv module with a limit on the length of a line and of a row.

    The csv module alone would read a line of any length. row_bytes: bytes of the current row so far.
    """

    def __init__(self, stream: BinaryIO, most_bytes: int) -> None:
        self.stream, self.max_bytes, self.row_bytes, self.number = stream, most_bytes, 0, 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        raw = self.stream.readline(self.max_bytes + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        self.row_bytes += len(raw)
        if len(raw) > self.max_bytes:
            self.row_bytes += _skip_line(self.stream, raw)
        if self.row_bytes > self.max_bytes:
            raise OverlongError
        return raw.decode("utf-8", "surrogateescape")


def delimited(stream: BinaryIO, most_bytes: int) -> Read:
    """Yield the rows of a CSV file with a header.

    The delimiter is the one of , ; tab | that splits the first rows into as many fields as the header. If several do,
    or none, it is the most frequent one in the header. A first line `sep=;`, as Excel writes it, overrides both.
    """
    csv.field_size_limit(most_bytes)
    delimiter, is_stated = delimiter_of(stream.read(CSV_HEAD_BYTES))
    stream.seek(0)
    source = _RowLines(stream, most_bytes)
    if is_stated:
        next(source)
    rows = csv.reader(source, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        first, source.row_bytes = source.number + 1, 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except OverlongError:
            detail = f"the row has {source.row_bytes:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
            yield _span(first, source.number), MalformedRow("oversize_row", detail)
            continue
        except csv.Error as error:
            yield _span(first, source.number), _bad_csv(error, source.number - first + 1)
            continue
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if names is None:
            names = [name.strip() for name in row]
            if not is_utf8(names):
                yield _span(first, source.number), MalformedRow("not_utf8", "the header is not UTF-8; no row is read")
                return
            if repeated := sorted(name for name in row_formats.FIELDS if names.count(name) > 1):
                detail = (
                    f"the header names {', '.join(map(repr, repeated[:5]))} more than once; one would hide the other"
                )
                yield _span(first, source.number), MalformedRow("duplicate_columns", f"{detail}; no row is read")
                return
            names = _numbered(names)
            continue
        yield _span(first, source.number), _csv_row(names, row)


CSV_HEAD_BYTES, _HEAD_ROWS, _DELIMITERS = 64 << 10, 20, ",;\t|"
_STATED_DELIMITER = re.compile(rb"(?:\xef\xbb\xbf)?sep=([,;\t|])\r?\n")


def delimiter_of(head: bytes) -> tuple[str, bool]:
    """Return the delimiter of a CSV file, and whether its first line states it (`sep=;`).

    A header such as `Frage;Antwort (kurz, klar)` contains others too. head: the first CSV_HEAD_BYTES.
    """
    if stated := _STATED_DELIMITER.match(head):
        return stated[1].decode(), True
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    counts = {mark: text.partition("\n")[0].count(mark) for mark in _DELIMITERS}
    is_cut = len(head) == CSV_HEAD_BYTES
    return max(_DELIMITERS, key=lambda mark: (_parts_evenly(text, mark, is_cut=is_cut), counts[mark])), False


def _parts_evenly(text: str, mark: str, *, is_cut: bool) -> bool:
    """Return whether the first rows have as many fields as the header, and more than one.

    is_cut: whether the last row may be incomplete.
    """
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=not is_cut)
    try:
        rows = list(itertools.islice(lines, _HEAD_ROWS))
    except csv.Error:
        return False
    lengths = [len(row) for row in (rows[:-1] if is_cut and len(rows) < _HEAD_ROWS else rows) if row]
    return len(lengths) > 1 and lengths[0] > 1 and set(lengths) == {lengths[0]}


def _numbered(names: Sequence[str]) -> list[str]:
    """Return the names of a header; a repeated name gets its count appended, so that none hides another."""
    counts: Counter[str] = Counter()
    numbered = []
    for name in names:
        counts[name] += 1
        numbered.append(f"{name} ({counts[name]})" if name and counts[name] > 1 else name)
    return numbered


def _bad_csv(error: csv.Error, count: int) -> MalformedRow:
    hint = (
        f"; a quote that does not close took {count:,} lines for one row, and none of them is read"
        if count > 1
        else ""
    )
    return MalformedRow("bad_csv", f"{error}{hint}")


def _csv_row(names: list[str], row: list[str]) -> Any:
    whole = "".join(row)
    if len(row) != len(names):
        return MalformedRow("field_count", f"the row has {len(row)} fields, the header {len(names)}")
    if "\0" in whole:
        return MalformedRow("nul_bytes", f"the row holds {whole.count(chr(0))} NUL bytes")
    if not is_utf8(row):
        return MalformedRow("not_utf8", "the row is not UTF-8")
    for name, value in zip(names, row, strict=True):
        if is_formula(value):
            text = f"a spreadsheet would run the cell {name[:40]!r}: {value.strip()[:60]!r}"
            return MalformedRow("csv_formula", f"{text}; if it is meant as text, save the rows as JSON Lines")
    # CSV cannot express an absent value otherwise, so an empty cell is one: null, as in JSON
    return {name: value or None for name, value in zip(names, row, strict=True) if name}


def is_utf8(cells: Sequence[str]) -> bool:
    """Return whether the bytes of cells were UTF-8: others were decoded as surrogates."""
    return not any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell)


def is_formula(cell: str) -> bool:
    """Return whether a spreadsheet would run a cell instead of showing it.

    A leading +, - or @ of a plain text, number or name is no formula.
    """
    start = cell.lstrip()[:2000]
    if start[:1] in ("＝", "＋", "－", "＠"):  # full-width forms, which some spreadsheets treat as the ASCII ones
        start = unicodedata.normalize("NFKC", start)
    return start[:1] in ("=", "+", "-", "@") and _FORMULA.match(start) is not None


def _span(first: int, last: int) -> str:
    return str(first) if last <= first else f"{first}-{last}"


def read_document(stream: BinaryIO, most_bytes: int, encoding: str = "") -> tuple[str, bytes] | MalformedRow:
    """Return the text of a whole file, and the bytes that it was read from.

    encoding: encoding of text that is not UTF-8.
    """
    raw = read_at_most(stream, most_bytes)
    if len(raw) > most_bytes:
        size = stream.seek(0, io.SEEK_END)
        return MalformedRow(
            "oversize_row", f"the file has {size:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
        )
    try:
        text = raw.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        return MalformedRow("not_utf8", f"byte {error.start + 1} of the file is not {encoding or 'UTF-8'}")
    if "\0" in text:
        return MalformedRow("nul_bytes", f"the file holds {text.count(chr(0))} NUL bytes")
    return text, raw


BATCH_ROWS = 1024
MOST_BATCH_BYTES = 64 << 20  # of an unpacked batch
MOST_ROWS_PER_BYTE = 64  # rows per byte of the file; a row of text takes at least a few bits
MOST_UNFOLDED, MOST_RATIO = 1 << 30, 200  # unpacked bytes of a row group, and per file byte; above both is a bomb
MOST_OVERSIZE_RUN = 100  # successive rows over the limit, after which the rest of a row group is skipped
PIECE_BYTES = 32 << 20  # unpacked bytes of the row groups in one piece


def parquet_error(stream: BinaryIO, size: int) -> MalformedRow | None:
    """Return the reason why a Parquet file is not read, from its footer; None for a usable file."""
    try:
        metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        return _not_whole(error)
    if metadata.num_rows > 100_000 + MOST_ROWS_PER_BYTE * size:
        return MalformedRow("parquet_bomb", f"{size:,} bytes that claim to hold {metadata.num_rows:,} rows")
    for number in range(metadata.num_row_groups):
        unfolded = sum(column.total_uncompressed_size for column in _columns(metadata.row_group(number)))
        if unfolded > MOST_UNFOLDED and unfolded > MOST_RATIO * size:
            return MalformedRow(
                "parquet_bomb", f"row group {number + 1} of {size:,} bytes unfolds to {unfolded:,} bytes"
            )
    return None


def pieces(stream: BinaryIO) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (first byte, length, first row, first group, last group) of row groups that form one piece."""
    metadata = pq.ParquetFile(stream).metadata
    begin, row, unfolded, rows = 0, 1, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        unfolded, rows = unfolded + group.total_byte_size, rows + group.num_rows
        if unfolded >= PIECE_BYTES or number == metadata.num_row_groups - 1:
            spans = [
                _parquet_span(column)
                for index in range(begin, number + 1)
                for column in _columns(metadata.row_group(index))
            ]
            start = max(0, min((first for first, _ in spans), default=0))
            yield start, max(0, max((last for _, last in spans), default=0) - start), row, begin, number
            begin, row, unfolded, rows = number + 1, row + rows, 0, 0


def read_parquet(stream: BinaryIO, first: int, groups: tuple[int, int] | None, most_bytes: int) -> Read:
    """Yield the rows of the row groups from the first to the last of `groups`, or of all.

    first: number of the first row.
    """
    number = first
    try:
        metadata = pq.ParquetFile(stream).metadata
        begin, last = groups or (0, metadata.num_row_groups - 1)
        for group in range(begin, last + 1):
            expected = number + metadata.row_group(group).num_rows
            for row_number, row in _group(stream, group, number, most_bytes):
                number = row_number
                yield str(row_number), row
            number = expected
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # KeyError: a footer that names columns twice
        yield str(number), _not_whole(error)


def _group(stream: BinaryIO, group: int, number: int, most_bytes: int) -> Iterator[tuple[int, Any]]:
    batch_rows, run = _batch_rows(stream, group), 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_rows, row_groups=[group]):
        if batch.nbytes <= most_bytes:  # then no row can be over the limit
            for row in batch.to_pylist():
                yield number, drop_nulls(row)
                number += 1
            continue
        for index in range(batch.num_rows):
            row_slice = batch.slice(index, 1)
            run = run + 1 if row_slice.nbytes > most_bytes else 0
            if not run:
                yield number, drop_nulls(row_slice.to_pylist()[0])
            elif run <= MOST_OVERSIZE_RUN:
                detail = f"the row has {row_slice.nbytes:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
                yield number, MalformedRow("oversize_row", detail)
            else:
                detail = (
                    f"{run} rows in succession are longer than {most_bytes:,} bytes; the rest of row group {group + 1}"
                )
                yield number, MalformedRow("parquet_bomb", f"{detail} is not read")
                return
            number += 1


def _batch_rows(stream: BinaryIO, group: int) -> int:
    """Return the number of rows to unpack at once.

    Each of them may then hold the longest value of a dictionary page without exceeding MOST_BATCH_BYTES.
    """
    metadata = pq.ParquetFile(stream).metadata
    leaves = [
        column.path_in_schema
        for column in _columns(metadata.row_group(group))
        if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
    ]
    if not leaves or not metadata.row_group(group).num_rows:
        return BATCH_ROWS
    batch = next(pq.ParquetFile(stream, read_dictionary=leaves).iter_batches(1, row_groups=[group]), None)
    if batch is None:  # fewer rows than the footer says
        return BATCH_ROWS
    longest = max((_longest(column) for column in batch.columns), default=0)
    return max(1, min(BATCH_ROWS, MOST_BATCH_BYTES // max(1, longest)))


def _longest(array: Any) -> int:
    """Return the bytes of the longest value in the dictionaries of an array, at any depth."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.max(lengths).as_py() or 0)
    if pa.types.is_struct(array.type):
        return max((_longest(array.field(index)) for index in range(array.type.num_fields)), default=0)
    if pa.types.is_map(array.type):
        return max(_longest(array.keys), _longest(array.items))
    nested = (
        pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    )
    return _longest(array.values) if nested else 0


def drop_nulls(value: Any) -> Any:
    """Return the value without fields that are null; Parquet structs hold every field of their type."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _columns(group: Any) -> list[Any]:
    return [group.column(index) for index in range(group.num_columns)]


def _parquet_span(column: Any) -> tuple[int, int]:
    start = column.data_page_offset
    if column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


def _not_whole(error: Exception) -> MalformedRow:
    return MalformedRow("unreadable_file", f"not whole Parquet: {(str(error).splitlines() or [''])[0][:200]}")


@dataclass(frozen=True, slots=True)
class FilePiece:
    """Byte range of a file.

    first: number of the first line or row.
    crc: CRC-32 of the bytes; negative for a whole file.
    groups: first and last row group of a Parquet file.
    """

    start: int
    length: int
    first: int
    crc: int
    groups: tuple[int, int] | None = None


# extensions that `read_rows` accepts
READERS = tuple(
    suffix
    for suffix, kind in file_formats.KINDS.items()
    if kind in ("jsonl", "json", "csv", "parquet", "text", "markdown")
)


def read_rows(file: Path, most_bytes: int) -> Read:
    """Yield the rows of a file by its extension; a text file is one row.

    A file that cannot be used yields one MalformedRow.
    """
    kind = file_formats.kind_of(file.name)
    if file.suffix.lower() not in READERS:
        yield (
            "1",
            MalformedRow("unsupported_file", f"{file.suffix or 'no extension'}; known here: {' '.join(READERS)}"),
        )
        return
    try:
        with open_regular(file) as stream:
            if (fault := head_fault(stream, file.name, kind)) is not None:
                yield "1", fault
                return
            encoding = "" if kind == "parquet" else encodings.detect_encoding(stream)
            if kind in ("text", "markdown"):
                document = read_document(stream, most_bytes, encoding)
                yield "1", document if isinstance(document, MalformedRow) else {"text": document[0]}
            else:
                piece = FilePiece(0, encodings.size_of(stream), 1, -1)
                yield from encoded_rows(stream, kind, piece=piece, most_bytes=most_bytes, encoding=encoding)
    except MalformedRow as fault:
        yield "1", fault
    except OSError as error:
        yield "1", MalformedRow("unreadable_file", f"{error.strerror or error}")


def encoded_rows(stream: BinaryIO, kind: str, piece: FilePiece, most_bytes: int, encoding: str) -> Read:
    """Yield the rows of a file in an encoding other than UTF-8, as `rows` does.

    encoding: empty for UTF-8.
    """
    if not encoding:
        yield from rows(stream, kind, piece, most_bytes)
        return
    with encodings.as_utf8(stream, encoding) as recoded:
        yield from rows(recoded, kind, FilePiece(0, encodings.size_of(recoded), 1, -1), most_bytes)


def rows(stream: BinaryIO, kind: str, piece: FilePiece, most_bytes: int) -> Read:
    """Yield the rows of a piece of a table: JSON Lines, JSON, CSV or Parquet."""
    if kind == "parquet":
        yield from read_parquet(stream, piece.first, piece.groups, most_bytes)
        return
    stream.seek(piece.start)
    if kind == "jsonl":
        yield from jsonl(stream, piece.start + piece.length, piece.first, most_bytes)
    elif kind == "json":
        yield from whole_json(stream, most_bytes)
    else:
        with encodings.with_line_feeds(stream) as lines:
            yield from delimited(lines, most_bytes)


def head_fault(stream: BinaryIO, name: str, kind: str, encoding: str = "") -> MalformedRow | None:
    """Return the reason why an open file is not read, or None.

    encoding: that its source states; half of the bytes of UTF-16 may be zeros, which no other text holds.
    Looks at the first bytes, and at the footer of a Parquet file. Leaves the stream at its start.
    """
    stream.seek(0)
    head = stream.read(file_formats.HEAD_BYTES)
    fault = file_formats.must_be(name, head) if head else None
    if fault is None and kind in file_formats.TEXT_KINDS:
        fault = file_formats.not_text(head)
        if fault is not None and encoding:
            fault = file_formats.not_text(head.decode(encoding, "ignore").encode("utf-8", "ignore"))
    if fault is None and kind in ("pdf", "xlsx", "docx", *file_formats.MEDIA_KINDS) and not head:
        fault = MalformedRow("empty_file", "the file is empty")
    if fault is None and kind == "parquet":
        fault = parquet_error(stream, stream.seek(0, os.SEEK_END))
    stream.seek(0)
    return fault
