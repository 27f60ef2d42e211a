"""Files of rows -> raw rows: `read` of a whole file, `rows` of a piece of an open one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from sartor.core.records import Malformed
from sartor.curate.sources import formats, parquet, tables
from sartor.curate.sources.places import open_regular
from sartor.curate.sources.survey import Piece
from sartor.curate.sources.tables import Read

# the extensions that `read` takes
READERS = tuple(
    suffix for suffix, kind in formats.KINDS.items() if kind in ("jsonl", "json", "csv", "parquet", "text", "markdown")
)


def read(file: Path, most_bytes: int) -> Read:
    """Rows of a file by its extension; a text file is one row. A file that cannot be used yields one Malformed."""
    kind = formats.kind_of(file.name)
    if file.suffix.lower() not in READERS:
        yield "1", Malformed("unsupported_file", f"{file.suffix or 'no extension'}; known here: {' '.join(READERS)}")
        return
    try:
        with open_regular(file) as stream:
            if (fault := head_fault(stream, file.name, kind)) is not None:
                yield "1", fault
            elif kind in ("text", "markdown"):
                found = tables.document(stream, most_bytes)
                yield "1", found if isinstance(found, Malformed) else {"text": found[0]}
            else:
                yield from rows(stream, kind, Piece(0, stream.seek(0, os.SEEK_END), 1, -1), most_bytes)
    except Malformed as fault:
        yield "1", fault
    except OSError as error:
        yield "1", Malformed("unreadable_file", f"{error.strerror or error}")


def rows(stream: BinaryIO, kind: str, piece: Piece, most_bytes: int) -> Read:
    """Rows of a piece of a table: JSON Lines, JSON, CSV or Parquet."""
    if kind == "parquet":
        yield from parquet.read(stream, piece.first, piece.groups, most_bytes)
        return
    stream.seek(piece.start)
    if kind == "jsonl":
        yield from tables.jsonl(stream, piece.start + piece.length, piece.first, most_bytes)
    elif kind == "json":
        yield from tables.whole_json(stream, most_bytes)
    else:
        yield from tables.delimited(stream, most_bytes)


def head_fault(stream: BinaryIO, name: str, kind: str) -> Malformed | None:
    """Why an open file is not read, by its first bytes, and in Parquet by its footer. Leaves the stream at its start."""
    stream.seek(0)
    head = stream.read(formats.HEAD_BYTES)
    fault = formats.must_be(name, head) if head else None
    if fault is None and kind in formats.TEXT_KINDS:
        fault = formats.not_text(head)
    if fault is None and kind in ("pdf", *formats.MEDIA_KINDS) and not head:
        fault = Malformed("empty_file", "the file is empty")
    if fault is None and kind == "parquet":
        fault = parquet.fault(stream, stream.seek(0, os.SEEK_END))
    stream.seek(0)
    return fault
