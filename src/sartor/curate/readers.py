"""Files -> raw rows with their line: JSONL, JSON, CSV, Parquet, text. Nothing a file holds ends in a traceback.

A reader yields (line, row) for what it could read and (line, Malformed) for what it could not. Memory is bounded by the
longest row allowed, but for a `.json` file, which is one value and is read whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.curate.forms import Malformed

Read = Iterator[tuple[str, Any]]
_SPACE = " \t\r\n,"


def read(file: Path, most_bytes: int) -> Read:
    """Rows of a file by its extension; a file of a kind that has none yields one Malformed."""
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        known = " ".join(READERS)
        yield (
            "1",
            Malformed(
                "unsupported_file", f"files of the kind {file.suffix or 'without extension'} are not read; known: {known}"
            ),
        )
        return
    try:
        if reader is not _parquet and (problem := _not_text(file)):
            yield "1", problem
            return
        yield from reader(file, most_bytes)
    except OSError as error:
        yield "1", Malformed("unreadable_file", f"{error.strerror or error}")


def _not_text(file: Path) -> Malformed | None:
    """Whether the head of a file shows that it is no text at all (one bad line alone does not)."""
    with file.open("rb") as stream:
        head = stream.read(8192)
    if not head:
        return Malformed("empty_file", "the file is empty")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Malformed("not_utf8", "the file is UTF-16; save it as UTF-8")
    control = sum(byte < 32 and byte not in b"\t\n\r\f\b\x1b" for byte in head)
    if control > len(head) // 10 or head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"%PDF", b"\x89PNG", b"\x7fELF")):
        return Malformed(
            "binary_file", f"{control} of the first {len(head)} bytes are control characters; this is no text file"
        )
    return None


def _lines(file: Path, most_bytes: int) -> Iterator[tuple[int, str | Malformed]]:
    """(line number, text without its end) of every line that is not blank; never holds more than `most_bytes` of one."""
    with file.open("rb") as stream:
        number = 0
        while raw := stream.readline(most_bytes + 1):
            number += 1
            if len(raw) > most_bytes:
                size = len(raw)
                while not raw.endswith(b"\n") and (raw := stream.readline(1 << 20)):
                    size += len(raw)
                yield (
                    number,
                    Malformed("oversize_row", f"the row has {size:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"),
                )
                continue
            if number == 1:
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


def _jsonl(file: Path, most_bytes: int) -> Read:
    for number, line in _lines(file, most_bytes):
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


def _json(file: Path, most_bytes: int) -> Read:
    """One JSON value: a list of rows, an object that holds one list, or rows one after another. Rows before a fault stay."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield "1", Malformed("not_utf8", f"byte {error.start + 1} of the file is not UTF-8")
        return
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        try:
            whole = json.loads(text, parse_constant=_no_constant)
            lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
            is_row = not lists or any(key in whole for key in ("messages", "conversations"))
            rows = [whole] if is_row else lists[0]
            for place, row in enumerate(rows, 1):
                yield str(place), row
            return
        except (ValueError, RecursionError):
            pass  # perhaps JSON Lines under another name: read value by value below
    else:
        start += text[start : start + 1] == "["
    yield from _values(text, start, most_bytes)


def _values(text: str, at: int, most_bytes: int) -> Read:
    """JSON values one after another from `at` on, with the line on which each begins."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    line, counted = 1, 0
    while True:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        if at >= len(text) or text[at:].strip() == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            rest = text.count("\n", at)
            yield str(line), Malformed("bad_json", f"not JSON from here on ({rest} more lines are not read): {error}")
            return
        if "\0" in text[at:end] or "\\u0000" in text[at:end]:
            yield str(line), Malformed("nul_bytes", "the row holds NUL characters")
        elif end - at > most_bytes:
            yield str(line), Malformed("oversize_row", f"the row has {end - at:,} characters; the limit is {most_bytes:,}")
        else:
            yield str(line), row
        at = end


def _csv(file: Path, most_bytes: int) -> Read:
    csv.field_size_limit(most_bytes)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        header = stream.readline()
        stream.seek(0)
        delimiter = max(",;\t|", key=header.count)
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield _span(first, rows.line_num), Malformed("bad_csv", f"{error}")
                continue
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            if names is None:
                names = [name.strip() for name in row]
                continue
            yield _span(first, rows.line_num), _csv_row(names, row)


def _csv_row(names: list[str], row: list[str]) -> Any:
    whole = "".join(row)
    if len(row) != len(names):
        return Malformed("field_count", f"the row has {len(row)} fields, the header {len(names)}")
    if "\0" in whole:
        return Malformed("nul_bytes", f"the row holds {whole.count(chr(0))} NUL bytes")
    if any("\udc80" <= character <= "\udcff" for character in whole):
        return Malformed("not_utf8", "the row is not UTF-8")
    # an empty cell is an absent field: CSV has no other way to say so
    return {name: value for name, value in zip(names, row, strict=True) if name and value != ""}


def _span(first: int, last: int) -> str:
    return str(first) if last <= first else f"{first}-{last}"


def _parquet(file: Path, most_bytes: int) -> Read:
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield str(number), _drop_nulls(row)
    except (pa.ArrowException, OSError) as error:
        yield str(number + 1), Malformed("unreadable_file", f"not whole Parquet: {str(error).splitlines()[0][:200]}")


def _drop_nulls(value: Any) -> Any:
    """Parquet structs carry every field of their type; an absent one is null."""
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _document(file: Path, most_bytes: int) -> Read:
    """A text file is one document."""
    if file.stat().st_size > most_bytes:
        yield (
            "1",
            Malformed(
                "oversize_row", f"the file has {file.stat().st_size:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
            ),
        )
        return
    raw = file.read_bytes()
    if b"\0" in raw:
        yield "1", Malformed("nul_bytes", f"the file holds {raw.count(0)} NUL bytes")
        return
    try:
        yield "1", {"text": raw.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield "1", Malformed("not_utf8", f"byte {error.start + 1} of the file is not UTF-8")


READERS: dict[str, Callable[[Path, int], Read]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _document,
    ".md": _document,
}
