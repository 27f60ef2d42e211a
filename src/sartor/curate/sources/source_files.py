"""Files, digests and pieces of a source.

A piece of JSON Lines is about PIECE_BYTES long and ends at a line's end; a piece of Parquet is one or more row groups;
every other file is one piece. A piece stores the CRC-32 of its bytes, so a later reader can check that it is unchanged
without reading the whole file.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from sartor.core import assets
from sartor.core.errors import ConfigError, ExtraError, HubError, missing_package
from sartor.core.licences.spdx import UNKNOWN
from sartor.curate.sources import row_formats, row_readers, safe_paths, sql
from sartor.curate.sources.column_options import fields_flag, fields_option
from sartor.curate.sources.row_readers import FilePiece, Read, drop_nulls
from sartor.curate.sources.safe_paths import SourceFile
from sartor.curate.sources.types import SourceOptions

# Rows that are examined to find a file's format, which is the most frequent one among them.
HEAD_ROWS = 50
FEEDBACK = "LicenseRef-feedback"
ROWS = "rows:"  # how the path of a source of rows from Python begins
_SHEET = re.compile(r"(.+\.xls[xm])#(.+)", re.IGNORECASE | re.DOTALL)


@dataclass
class FileFacts:
    """Facts of one input file for the manifest.

    encoding: encoding of text that is not UTF-8.
    read: number of rows read.
    notes: observation -> count, for observations that are no reason for a Drop.
    """

    source: str
    path: str
    sha256: str
    bytes: int
    licence: str
    use: tuple[str, ...]
    form: str = "unknown"
    encoding: str = ""
    read: int = 0
    notes: dict[str, int] = field(default_factory=dict)


def scheme(path: str) -> str:
    """Return `sql`, `hub`, `asset`, `inbox` or `rows` for a source's path; empty for files."""
    return next((name for name in ("sql", "hub", "asset", "inbox", "rows") if path.startswith(f"{name}:")), "")


def with_licence(source: SourceOptions) -> SourceOptions:
    """Return the source with a licence if it states none: that of its asset, or LicenseRef-feedback for an inbox.

    No general licence covers what people told a server; the option `use` says what it may be used for.
    """
    if source.licence != UNKNOWN:
        return source
    if scheme(source.path) == "inbox":
        return replace(source, licence=FEEDBACK)
    return (
        replace(source, licence=assets.entry(_asset(source.path)[0]).licence)
        if scheme(source.path) == "asset"
        else source
    )


def sheet_of(path: str) -> tuple[str, str]:
    """Split `file.xlsx#Sheet` into (path, name of the sheet); the name is empty if there is none."""
    found = _SHEET.fullmatch(path)
    return (found[1], found[2]) if found else (path, "")


def files_of(source: SourceOptions, rows_folder: Path | None = None) -> list[SourceFile]:
    """Return the files of a source; an asset is installed first.

    rows_folder: where rows given from Python were written (python_rows.py).
    Raises ConfigError, AssetError.
    """
    if scheme(source.path) == "rows":
        name = source.path.removeprefix(ROWS) or "rows"
        if rows_folder is None:
            raise ConfigError(
                f"the source {source.path!r} means rows that were given from Python, and none are given here",
                "sartor.curate(recipe, out, rows=rows) in Python; or the path of a file",
            )
        return [SourceFile(str(rows_folder / f"{name}.jsonl"), name)]
    if scheme(source.path) != "asset":
        return safe_paths.find_files(sheet_of(source.path.removeprefix("inbox:"))[0])
    name, inner = _asset(source.path)
    folder = assets.install(name)
    if inner.startswith("/") or ".." in Path(inner).parts:
        raise ConfigError(
            f"the source {source.path!r} leads out of the asset", f"asset:{name}/PATH, of a file in {folder}"
        )
    files = safe_paths.find_files(str(folder / inner))
    # a pattern gives full paths; locators of rows must not depend on this machine's folder of assets
    return [replace(file, name=file.name.removeprefix(f"{folder}/")) for file in files]


def _asset(path: str) -> tuple[str, str]:
    name, _, inner = path.removeprefix("asset:").partition("/")
    return name, inner


def query_rows(source: SourceOptions, most_bytes: int, most_rows: int = 0) -> Read:
    """Yield the rows of a `sql:` or `hub:` source; only the first `most_rows` unless that is 0."""
    if scheme(source.path) == "sql":
        yield from sql.rows(source.path, most_bytes, most_rows)
        return
    for number, row in enumerate(_hub(source), 1):
        yield str(number), drop_nulls(dict(row))
        if number == most_rows:
            return


def query_facts(source: SourceOptions) -> FileFacts:
    """Return the facts of a `sql:` or `hub:` source that are known before its rows are read."""
    if scheme(source.path) == "sql":
        sql.split(source.path)
        return FileFacts(source.path, "query", sha256="", bytes=0, licence=source.licence, use=source.use)
    dataset = _hub(source)
    return FileFacts(
        source.path,
        source.path,
        sha256=str(dataset._fingerprint),
        bytes=int(dataset.dataset_size or 0),
        licence=source.licence,
        use=source.use,
    )


def _hub(source: SourceOptions) -> Any:
    """Load `hub:owner/name` or `hub:owner/name:split` with the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "hub") from None
    name, _, split = source.path.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except ExtraError:
        raise
    except Exception as error:  # the library raises many types: offline, gated, absent, bad config
        check = "check the name, the split and the network"
        if not split:
            check = f"check the name and the network; hub:{name}:SPLIT if it has no split train"
        raise HubError(
            f"the dataset {name!r} could not be fetched: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            f"{check}; or download it elsewhere and give its Parquet files",
        ) from None


def _check_columns(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], table: str) -> None:
    """Raise ConfigError if no row at the start of a table has a column that its source names.

    A column that occurs more than once is refused too.
    """
    known = list(dict.fromkeys(str(key) for row in rows for key in row))
    for name, column in columns.items():
        if f"{column} (2)" in known:
            problem = f"fields.{name}: {table} has the column {column!r} more than once; one would hide the other"
            raise ConfigError(problem, "give each of them a name of its own")
        if column in known or not known:
            continue
        closest = difflib.get_close_matches(column, known, 1) or difflib.get_close_matches(
            column.casefold(), [key.casefold() for key in known], 1
        )
        prompt, completion = row_formats.suggest_columns(rows)
        likeliest = {"prompt": prompt, "completion": completion}.get(name, known[0])
        suggestion = next((key for key in known if closest and key.casefold() == closest[0].casefold()), likeliest)
        typed = {name: suggestion}
        raise ConfigError(
            f"fields.{name}: {table} has no column {column!r}; its columns are {', '.join(map(repr, known[:12]))}",
            f"{fields_option(**typed)} in a recipe; {fields_flag(**typed)} of `sartor tailor`",
        )


def form_of(
    head: Iterable[tuple[str, Any]], source: SourceOptions | None, table: str, *, of_media: bool = False
) -> str:
    """Return the most frequent format among the first rows of a table; empty if none has a known format.

    Columns are renamed as the source says. If no row has values for a format, that of the columns counts: each row
    without a value is then dropped for what it lacks. Raises ConfigError if a column that it names is missing or
    occurs twice.
    """
    columns = source.fields.by_name() if source is not None else {}
    rows = list(head)
    _check_columns(columns, [row for _, row in rows if isinstance(row, dict)], table)
    renamed = [row for _, row in row_formats.renamed_rows(iter(rows), columns) if isinstance(row, dict)]
    counts = Counter(form for row in renamed if (form := row_formats.detect_row_format(row, of_media=of_media)))
    if not counts:
        filled = [{name: "" if value is None else value for name, value in row.items()} for row in renamed]
        counts = Counter(form for row in filled if (form := row_formats.detect_row_format(row)))
    return counts.most_common(1)[0][0] if counts else ""


PIECE_BYTES = 8 << 20
BLOCK_BYTES = 1 << 20


def survey(stream: BinaryIO, kind: str) -> tuple[str, int, list[FilePiece]]:
    """Return (SHA-256 in hex, bytes, pieces) of a file.

    Memory use is that of one block, however long a line is.
    """
    if kind == "jsonl":
        return _survey_lines(stream)
    digest, crc, size = hashlib.sha256(), 0, 0
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        crc, size = zlib.crc32(block, crc), size + len(block)
    if kind == "parquet" and size > PIECE_BYTES and (spans := list(row_readers.pieces(stream))):
        pieces = [
            FilePiece(start, length, first=row, crc=checksum(stream, start, length), groups=(begin, last))
            for start, length, row, begin, last in spans
        ]
        return digest.hexdigest(), size, pieces
    return digest.hexdigest(), size, [FilePiece(0, size, 1, crc)]


def _survey_lines(stream: BinaryIO) -> tuple[str, int, list[FilePiece]]:
    digest, pieces = hashlib.sha256(), []
    start, line, crc, position, lines = 0, 1, 0, 0, 0
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        block_start = 0
        while (cut := block.find(b"\n", max(block_start, start + PIECE_BYTES - position - 1)) + 1) > 0:
            crc, lines = zlib.crc32(block[block_start:cut], crc), lines + block.count(b"\n", block_start, cut)
            pieces.append(FilePiece(start, position + cut - start, line, crc))
            start, line, crc, block_start = position + cut, line + lines, 0, cut
            lines = 0
        crc, lines = zlib.crc32(block[block_start:], crc), lines + block.count(b"\n", block_start)
        position += len(block)
    if position > start or not pieces:
        pieces.append(FilePiece(start, position - start, line, crc))
    return digest.hexdigest(), position, pieces


def checksum(stream: BinaryIO, start: int, length: int) -> int:
    """Return the CRC-32 of a piece of a file."""
    stream.seek(start)
    crc = 0
    while length > 0 and (block := stream.read(min(BLOCK_BYTES, length))):
        length -= len(block)
        crc = zlib.crc32(block, crc)
    return crc
