"""Record files, and the fields that are compared.

Each format yields blocks of rows. A row is kept as it stands in the file: bytes of JSON Lines and CSV, the object of
JSON and Parquet. A row that cannot be read is a BadRecord in its place, so that both readings count alike.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core.errors import ConfigError, SourceError
from sartor.curate.sources import row_formats, row_readers

# Fields that identify a row: no two rows share a value, however similar they are. They are left out if no field was
# named, and the output lists them.
_NAMES = {
    "",
    "id",
    "_id",
    "uuid",
    "guid",
    "index",
    "idx",
    "row",
    "row_id",
    "rec_id",
    "record_id",
    "__index_level_0__",
    "unnamed: 0",
}
# Keys of a message or content part that may hold its text.
_TEXTS = ("content", "value", "text")


@dataclass(frozen=True)
class ComparedFields:
    """Fields whose text is compared, in order.

    joined: no field was named and no form was recognised. All fields with text or numbers are compared, except
    `left_out`, and so are further fields of later rows.
    reason: explanation for the output.
    """

    fields: tuple[str, ...]
    joined: bool = False
    left_out: tuple[str, ...] = ()
    reason: str = ""


def choose(sample: Sequence[Mapping[str, Any]], text_field: str = "") -> ComparedFields:
    """Return the fields to compare in a file, from its first rows.

    text_field: one or several fields, separated by commas; dots reach into objects.

    Raises ConfigError if a named field is in none of the rows.
    """
    field_names = list(dict.fromkeys(str(name) for row in sample for name in row))
    if text_field:
        fields = tuple(part.strip() for part in text_field.split(",") if part.strip())
        for field in fields:
            path = field.split(".")
            if sample and not any(field in row or next(_at(row, path), None) is not None for row in sample):
                raise ConfigError(
                    f"there is no field {field!r} in the first {len(sample)} rows; they have "
                    f"{', '.join(field_names) or 'none'}",
                    "name one of these; a.b goes into an object, and several are separated by commas",
                )
        return ComparedFields(fields, reason="as asked")
    forms = [row_formats.detect_row_format(row) for row in sample]
    forms_found = [form for form in forms if form and form != "text"]
    if len(forms_found) * 2 > len(sample):
        form = max(set(forms_found), key=forms_found.count)
        names = tuple(row_formats.FORMS[form])
        if form == "alpaca":
            names = (*names, "input")
        if form in row_formats.QUESTION_FORMS:  # the same question about another passage is another row
            names = (*names, *(name for name in field_names if name.casefold() in row_formats.CONTEXTS))
        return ComparedFields(names, reason=f"the rows have the form {form}")
    if sum("text" in row for row in sample) * 2 > len(sample):
        return ComparedFields(("text",), reason="the rows have a field `text`")
    fields = tuple(name for name in field_names if any(isinstance(row.get(name), (str, int, float)) for row in sample))
    left_out = tuple(name for name in fields if name.strip().lower() in _NAMES and _names_rows(sample, name))
    if len(left_out) == len(fields):
        left_out = ()
    compared = tuple(name for name in fields if name not in left_out)
    reason = "there is no field `text` and no known form: all fields joined"
    return ComparedFields(compared, joined=True, left_out=left_out, reason=reason)


def _names_rows(sample: Sequence[Mapping[str, Any]], field: str) -> bool:
    values = [str(row[field]) for row in sample if row.get(field) is not None]
    return len(set(values)) == len(values)


def text_of(row: Mapping[str, Any], choice: ComparedFields) -> str | None:
    """Return the text of a record, or None if every chosen field is absent."""
    if choice.joined:
        further = [name for name in row if name not in choice.fields and name not in choice.left_out]
        values = [row.get(name) for name in (*choice.fields, *further)]
        values = [value for value in values if value is not None]
    else:
        values = []
        for field in choice.fields:
            if field in row:
                values.append(row[field])
            elif "." in field:
                values.extend(_at(row, field.split(".")))
        values = [value for value in values if value is not None]
        if len(values) == 1 and isinstance(values[0], str) and not values[0].startswith("["):
            return values[0]
    if not values:
        return None
    return "\n".join(text for value in values for text in _texts(value))


def _at(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """Yield the values at a dotted path.

    Names reach into objects and numbers into lists. Other names reach into every item of a list.
    """
    if not path:
        yield value
    elif isinstance(value, Mapping):
        if path[0] in value:
            yield from _at(value[path[0]], path[1:])
    elif isinstance(value, list):
        if path[0].lstrip("-").isdigit():
            for item in value[int(path[0]) :][:1]:
                yield from _at(item, path[1:])
        else:
            for item in value:
                yield from _at(item, path)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value: the content of messages and content parts, every field of other objects."""
    if isinstance(value, str):
        if value.startswith(("[{", "[ {")):  # a list kept as JSON text, as CSV files do
            try:
                yield from _texts(json.loads(value))
                return
            except (ValueError, RecursionError):
                pass
        yield value
    elif isinstance(value, bool):
        return
    elif isinstance(value, (int, float)):
        yield str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        texts = [value[name] for name in _TEXTS if name in value]
        for inner in texts or value.values():
            yield from _texts(inner)
    elif value is not None:
        yield str(value)


BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 2048


class BadRecord(NamedTuple):
    """A row that cannot be used.

    reason: the word under which it is counted. detail: a sentence.
    start, size: its byte range in the file, if it is too long.
    """

    reason: str
    detail: str
    start: int = 0
    size: int = 0


@dataclass(frozen=True)
class RecordBlock:
    """Consecutive rows of a file.

    lines: line of each row. rows: the rows as they stand in the file, or BadRecords.
    gaps: bytes before the row at that index; the index after the last stands for bytes at the end.
    """

    lines: list[int]
    rows: list[Any]
    gaps: dict[int, bytes] = field(default_factory=dict)


def format_of(path: Path) -> str:
    """Return jsonl, csv, json or parquet, by the extension.

    Raises ConfigError for another extension and for a path that is not a file.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not there"
        raise ConfigError(f"the file {path} {problem}", "give one or more files; the shell expands *.jsonl")
    kinds = {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "json",
        ".csv": "csv",
        ".tsv": "csv",
        ".parquet": "parquet",
    }
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path} is of no kind that is read here", f"convert it to one of {' '.join(kinds)}")
    if kind == "json" and _is_json_lines(path):
        return "jsonl"
    return kind


def _is_json_lines(path: Path) -> bool:
    """Return True if a `.json` file holds one object a line.

    Its first line must be a whole object, with more bytes after it.
    """
    with path.open("rb") as stream:
        first = stream.readline(BLOCK_BYTES).strip()
        next_byte = stream.read(1)
    if not (first.startswith(b"{") and first.endswith(b"}") and next_byte):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def blocks(path: Path, kind: str, max_row_bytes: int) -> Iterator[RecordBlock]:
    """Yield the rows of a file, in blocks.

    Raises SourceError for a file that cannot be opened, and for an invalid Parquet or JSON file.
    """
    try:
        if kind == "jsonl":
            yield from _json_lines(path, max_row_bytes)
        elif kind == "csv":
            yield from _csv(path, max_row_bytes)
        elif kind == "json":
            yield from _json(path)
        else:
            yield from _parquet(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise SourceError(
            f"{path} cannot be read: {reason}", f"ls -l {path}; file {path} says what it holds"
        ) from None


def lines(path: Path, max_row_bytes: int) -> Iterator[list[tuple[int, bytes | BadRecord]]]:
    """Yield (number, line with its end) in blocks; never holds more than about `max_row_bytes` of a line."""
    number, start, partial_line = 0, 0, b""
    with path.open("rb") as stream:
        while chunk := stream.read(BLOCK_BYTES):
            pieces = (partial_line + chunk).split(b"\n")
            partial_line = pieces.pop()
            results: list[tuple[int, bytes | BadRecord]] = []
            for piece in pieces:
                number += 1
                if len(piece) <= max_row_bytes:
                    results.append((number, piece + b"\n"))
                else:
                    results.append((number, _too_long(start, len(piece) + 1, max_row_bytes)))
                start += len(piece) + 1
            if len(partial_line) > max_row_bytes:
                size = len(partial_line) + _skip_line(stream)
                number += 1
                results.append((number, _too_long(start, size, max_row_bytes)))
                start, partial_line = start + size, b""
            yield results
        if len(partial_line) > max_row_bytes:
            yield [(number + 1, _too_long(start, len(partial_line), max_row_bytes))]
        elif partial_line:
            yield [(number + 1, partial_line)]


def _skip_line(stream: Any) -> int:
    """Read on to the end of the line; return the number of bytes."""
    size = 0
    while piece := stream.readline(BLOCK_BYTES):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _too_long(start: int, size: int, max_row_bytes: int) -> BadRecord:
    return BadRecord(
        "too_long", f"the row has {size:,} bytes; the limit is {max_row_bytes:,} (max_row_bytes)", start, size
    )


def _json_lines(path: Path, max_row_bytes: int) -> Iterator[RecordBlock]:
    for batch in lines(path, max_row_bytes):
        block = RecordBlock([], [])
        for number, line in batch:
            if isinstance(line, bytes) and not line.strip():  # blank, or a byte-order mark alone
                block.gaps[len(block.rows)] = block.gaps.get(len(block.rows), b"") + line
            else:
                block.lines.append(number)
                block.rows.append(line)
        yield block


def parse_line(line: bytes, choice: ComparedFields | None) -> Any:
    """Return the text of a line of JSON Lines, or a BadRecord.

    choice: the compared fields; None returns the object itself.
    """
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError as error:
        return BadRecord("not_utf8", f"byte {error.start + 1} of the row is not UTF-8")
    except RecursionError:
        return BadRecord("not_json", "the row is nested too deeply")
    except ValueError as error:
        return BadRecord("not_json", f"the row is not JSON: {error}")
    return parsed(row, choice)


def parsed(row: Any, choice: ComparedFields | None) -> Any:
    """Return the text of a record, or a BadRecord.

    choice: the compared fields; None returns the record itself.
    """
    if isinstance(row, BadRecord):
        return row
    if not isinstance(row, dict):
        return BadRecord("not_an_object", f"the row is a {type(row).__name__}, not an object with fields")
    if choice is None:
        return row
    text = text_of(row, choice)
    if text is None:
        return BadRecord("missing_field", f"the row has no {' and no '.join(choice.fields)}")
    return text


class _Lines:
    """Lines of a CSV file as text for `csv.reader`, which also collects the bytes of each record."""

    def __init__(self, path: Path, max_row_bytes: int) -> None:
        self._lines = (line for batch in lines(path, max_row_bytes) for line in batch)
        self.raw_lines: list[bytes] = []
        self.too_long: BadRecord | None = None
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.number = number
            if isinstance(line, BadRecord):
                self.too_long = line
                yield "\n"
                continue
            self.raw_lines.append(line)
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")

    def take(self) -> bytes:
        raw = b"".join(self.raw_lines)
        self.raw_lines.clear()
        return raw


# how a file of another code page is made one that can be read; `dedup` copies rows byte for byte and recodes none
_AS_UTF8 = "iconv -f CP1252 -t UTF-8 '{path}' > utf8.csv, and give utf8.csv"


class CsvRow(NamedTuple):
    """A record of a CSV file: its bytes, and its fields by name or a BadRecord."""

    raw: bytes
    fields: dict[str, str] | BadRecord


def _csv(path: Path, max_row_bytes: int) -> Iterator[RecordBlock]:
    """Yield the rows of a CSV file. The header is gap 0 of the first block, with a line `sep=;` before it."""
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    source = _Lines(path, max_row_bytes)
    with path.open("rb") as stream:
        delimiter, is_stated = row_readers.delimiter_of(stream.read(row_readers.CSV_HEAD_BYTES))
    reader = csv.reader(source, delimiter=delimiter)
    names: list[str] | None = None
    block, size, first_line = RecordBlock([], []), 0, 1
    while True:
        first_line = source.number + 1
        try:
            values = next(reader)
            problem = None
        except StopIteration:
            break
        except csv.Error as error:
            values, problem = [], BadRecord("bad_csv", str(error))
        raw = source.take()
        if source.too_long:
            values, problem, source.too_long = [], source.too_long, None
        if is_stated and first_line == 1:
            block.gaps[0] = raw
        elif problem is None and not "".join(values).strip():
            block.gaps[len(block.rows)] = block.gaps.get(len(block.rows), b"") + raw
        elif problem is None and names is None:
            names = [name.strip() for name in values]
            if not row_readers.is_utf8(names):
                raise SourceError(f"the first line of {path} is not UTF-8", _AS_UTF8.format(path=path))
            block.gaps[0] = block.gaps.get(0, b"") + raw
        else:
            block.lines.append(first_line)
            block.rows.append(CsvRow(raw, problem or _csv_fields(names or [], values)))
            size += len(raw)
        if size > BLOCK_BYTES:
            yield block
            block, size = RecordBlock([], []), 0
    yield block


def _csv_fields(names: list[str], values: list[str]) -> dict[str, str] | BadRecord:
    if len(values) != len(names):
        return BadRecord("field_count", f"the row has {len(values)} fields, the header {len(names)}")
    if not row_readers.is_utf8(values):
        return BadRecord("not_utf8", "the row is not UTF-8")
    return dict(zip(names, values, strict=True))


def _json(path: Path) -> Iterator[RecordBlock]:
    rows = json_rows(json_value(path))
    for first in range(0, len(rows), _PARQUET_ROWS):
        chunk = rows[first : first + _PARQUET_ROWS]
        yield RecordBlock(list(range(first + 1, first + 1 + len(chunk))), chunk)


def json_value(path: Path) -> Any:
    """Return the value in a JSON file. Raises SourceError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not JSON: {error}",
            f"python3 -m json.tool {path} shows where; one object a line goes into a .jsonl file",
        ) from None


def json_rows(value: Any) -> list[Any]:
    """Return the rows in a JSON value: a list, the only list in an object, or that object itself."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
            return lists[0]
    return [value]


def _parquet(path: Path) -> Iterator[RecordBlock]:
    done = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_PARQUET_ROWS):
            yield RecordBlock(list(range(done + 1, done + 1 + len(batch))), batch.to_pylist())
            done += len(batch)
