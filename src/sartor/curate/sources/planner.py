"""Scan of all sources, and their division into input chunks.

Large files become several chunks (`source_files.py`); small ones share a chunk. Media files get their captions here. A
caption is in a table `metadata.*` in the file's folder or one above, in a text or JSON file of the same name beside
it, or is the name of its folder.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from sartor.core import records
from sartor.core.records import Drop, Example, MalformedRow
from sartor.curate.sources import (
    documents,
    encodings,
    feedback_lines,
    file_formats,
    row_formats,
    row_readers,
    source_files,
)
from sartor.curate.sources import feedback_inbox as inbox
from sartor.curate.sources.chunk_reader import InputChunk, InputFile, chunk_of_json, read_chunk
from sartor.curate.sources.row_readers import FilePiece
from sartor.curate.sources.safe_paths import SourceFile, open_regular, safe_name
from sartor.curate.sources.source_files import PIECE_BYTES, FileFacts, survey
from sartor.curate.sources.types import SourceOptions

BATCH_FILES = 200
BATCH_BYTES = 16 << 20
_TABLES = frozenset(
    ("metadata.jsonl", "metadata.ndjson", "metadata.csv", "metadata.tsv", "metadata.parquet", "metadata.json")
)
_TABLE_KINDS = ("jsonl", "json", "csv", "parquet")
_DOCUMENT_KINDS = ("text", "markdown", "html", "pdf", "docx")
_CAPTION_SUFFIXES = (".txt", ".json")


@dataclass
class ReadPlan:
    """Chunks in reading order, and facts of every file that was found, in the same order."""

    chunks: list[InputChunk] = field(default_factory=list)
    files: list[FileFacts] = field(default_factory=list)


def plan_reading(sources: Sequence[SourceOptions], max_row_bytes: int, rows_folder: Path | None = None) -> ReadPlan:
    """Scan every source and cut it into chunks.

    rows_folder: where rows given from Python were written.
    Raises ConfigError, MissingError or HubError for a source that does not exist.
    """
    plan = ReadPlan()
    for index, source in enumerate(map(source_files.with_licence, sources)):
        if source_files.scheme(source.path) in ("sql", "hub"):
            facts = source_files.query_facts(source)
            head = list(source_files.query_rows(source, max_row_bytes, source_files.HEAD_ROWS))
            form = source_files.form_of(head, source, source.path)
            plan.files.append(replace(facts, form=form or "unknown"))
            plan.chunks.append(
                InputChunk(len(plan.chunks), index, asked=_rows_digest(source), form=form, most_bytes=max_row_bytes)
            )
            continue
        if source_files.scheme(source.path) == "inbox":
            files = tuple(_inbox_file(source_file, max_row_bytes) for source_file in source_files.files_of(source))
            plan.files += [_facts(source, file) for file in files]
            known_digest = feedback_lines.gold_replies_digest(source.inbox.known)
            rows_digest = records.digest([_rows_digest(source), asdict(source.inbox), known_digest])[:16]
            plan.chunks.append(
                InputChunk(
                    len(plan.chunks), index, asked=rows_digest, form=inbox.FORM, most_bytes=max_row_bytes, files=files
                )
            )
            continue
        cutter = _Cutter(plan, index, _rows_digest(source), max_row_bytes)
        for file, pieces in _surveyed(source, max_row_bytes, rows_folder):
            plan.files.append(_facts(source, file))
            if file.caption is not None:
                plan.files.append(_facts(source, file.caption))
            cutter.add(file, pieces)
        cutter.flush()
    return plan


def _inbox_file(source_file: SourceFile, most_bytes: int) -> InputFile:
    """Return a file of an inbox with its present size; a server may append to it later."""
    file, _ = _inspect(source_file, "jsonl", most_bytes, of_media=False)
    if not file.refusal[0] and not source_file.path.endswith(".jsonl"):
        file = replace(file, refusal=("not_feedback", "an inbox holds files feedback-DAY.jsonl, and nothing else"))
    return replace(file, kind=inbox.FORM, form=inbox.FORM)


def _rows_digest(source: SourceOptions) -> str:
    """Return the digest of the options of a source that affect its rows, such as licence and question."""
    facts: list[Any] = [source.path, source.licence, source.date, source.prompt, source.captions]
    # without these options the digest equals that of versions that did not have them
    if source.system or source.encoding or source.fields.by_name():
        facts.append([source.system, source.encoding, source.fields.by_name()])
    return records.digest(facts)[:16]


def _facts(source: SourceOptions, file: InputFile) -> FileFacts:
    form = file.form or "unknown"
    return FileFacts(
        source.path,
        file.name,
        sha256=file.sha256,
        bytes=file.bytes,
        licence=source.licence,
        use=source.use,
        form=form,
        encoding=file.encoding,
    )


@dataclass
class _Cutter:
    """Division of the files of a source into chunks, in their order."""

    plan: ReadPlan
    source: int
    rows_digest: str
    most_bytes: int
    waiting: list[InputFile] = field(default_factory=list)
    waiting_bytes: int = 0

    def add(self, file: InputFile, pieces: Sequence[FilePiece]) -> None:
        if pieces and pieces[-1].start + pieces[-1].length > PIECE_BYTES and file.kind in _TABLE_KINDS:
            self.flush()
            for piece in pieces:
                self._add_chunk((file,), piece)
            return
        if len(self.waiting) >= BATCH_FILES or (self.waiting and self.waiting_bytes + file.bytes > BATCH_BYTES):
            self.flush()
        self.waiting.append(file)
        self.waiting_bytes += file.bytes

    def flush(self) -> None:
        if self.waiting:
            self._add_chunk(tuple(self.waiting))
        self.waiting, self.waiting_bytes = [], 0

    def _add_chunk(self, files: tuple[InputFile, ...], piece: FilePiece | None = None) -> None:
        form = files[0].form if piece else ""
        self.plan.chunks.append(
            InputChunk(
                len(self.plan.chunks),
                self.source,
                asked=self.rows_digest,
                form=form,
                most_bytes=self.most_bytes,
                files=files,
                piece=piece,
            )
        )


def _surveyed(
    source: SourceOptions, most_bytes: int, rows_folder: Path | None = None
) -> Iterator[tuple[InputFile, list[FilePiece]]]:
    """Yield every file of a source that is read or refused, with its pieces; captions come with their media file."""
    files = source_files.files_of(source, rows_folder)
    tables, table_media = _tables(files, most_bytes)
    captions = _captions(files, table_media) if source.captions == "beside" else {}
    caption_paths = {path for paths in captions.values() for path in paths[:1]}
    by_path = {file.path: file for file in files}
    for file in files:
        kind = file_formats.kind_of(file.path)
        if file.path in caption_paths:
            continue
        if kind not in file_formats.MEDIA_KINDS or file.refusal[0]:
            yield _inspect(file, kind, most_bytes, of_media=file.path in tables, source=source)
        elif file.path not in table_media:
            caption_files = []
            for path in captions.get(file.path, ()):
                # a caption that the source does not list has the name of a file beside its media file
                name = file.name[: file.name.rfind("/") + 1] + safe_name(os.path.basename(path))
                caption_files.append(by_path.get(path) or SourceFile(path, name))
            yield _with_caption(file, kind, source, caption_files), []


def _inspect(
    source_file: SourceFile, kind: str, most_bytes: int, *, of_media: bool, source: SourceOptions | None = None
) -> tuple[InputFile, list[FilePiece]]:
    """Return a non-media file with digest, encoding, format and pieces, or with a refusal.

    source: gives the columns and the encoding. Raises ConfigError if the first rows lack a column that it names.
    """
    sheet = source_files.sheet_of(source.path)[1] if source is not None else ""
    name = f"{source_file.name}#{sheet}" if sheet else source_file.name
    file = InputFile(source_file.path, name, kind, refusal=source_file.refusal, sheet=sheet)
    refusal = source_file.refusal if source_file.refusal[0] else file_formats.format_refusal(source_file.path)
    if refusal:
        return replace(file, bytes=_size(source_file), refusal=refusal), []
    try:
        with open_regular(source_file.path) as stream:
            stated = source.encoding if source is not None else ""
            if (fault := row_readers.head_fault(stream, source_file.path, kind, stated)) is not None:
                raise fault
            sha256, size, pieces = survey(stream, kind)
            file = replace(file, sha256=sha256, bytes=size, encoding=_encoding(stream, kind, source))
            if kind not in (*_TABLE_KINDS, "xlsx"):
                return replace(file, form="text"), []
            if file.encoding or (source is not None and source.fields.conversation):
                pieces = [FilePiece(0, size, 1, -1)]  # a piece must not end within a conversation
            head = _head_rows(stream, file, pieces, most_bytes)
            return replace(file, form=source_files.form_of(head, source, file.name, of_media=of_media)), pieces
    except MalformedRow as problem:
        return replace(file, bytes=_size(source_file), refusal=(problem.reason, problem.detail)), []
    except OSError as error:
        return replace(file, bytes=_size(source_file), refusal=("unreadable_file", f"{error.strerror or error}")), []


def tables_of(files: Sequence[FileFacts]) -> list[FileFacts]:
    """Return the files whose rows have columns: all but documents, whose form is always `text`."""
    return [file for file in files if file_formats.kind_of(file.path) not in _DOCUMENT_KINDS]


def first_rows(source: SourceOptions, most_bytes: int) -> list[dict[str, Any]]:
    """Return the first rows of the first readable table of a source; empty if there is none."""
    for file, pieces in _surveyed(source, most_bytes):
        if file.refusal[0] or file.kind not in (*_TABLE_KINDS, "xlsx"):
            continue
        with open_regular(file.path) as stream:
            head = _head_rows(stream, file, pieces, most_bytes)
        return [row for _, row in head if isinstance(row, dict)]
    return []


def _head_rows(
    stream: BinaryIO, file: InputFile, pieces: Sequence[FilePiece], most_bytes: int
) -> list[tuple[str, Any]]:
    """Return the first rows of a table, from which its format is found."""
    if file.kind == "xlsx":
        with documents.DocumentReader() as reader:
            rows = reader.read(file.path, file.sha256, kind=file.kind, most_bytes=most_bytes, sheet=file.sheet)
            return list(itertools.islice(rows, source_files.HEAD_ROWS))
    pieces_rows = (
        row_readers.encoded_rows(stream, file.kind, piece=piece, most_bytes=most_bytes, encoding=file.encoding)
        for piece in pieces
    )
    return list(itertools.islice(itertools.chain.from_iterable(pieces_rows), source_files.HEAD_ROWS))


def _encoding(stream: BinaryIO, kind: str, source: SourceOptions | None) -> str:
    """Return the encoding of a text file, empty for UTF-8: that of its source's options, or the detected one.

    An option names the code page of a folder's files that are in one: UTF-8 and UTF-16 are read as what they are.
    """
    if kind not in (*_TABLE_KINDS, "text", "markdown") or kind == "parquet":
        return ""
    if source is not None and source.encoding:
        encoding = encodings.certain_encoding(stream) or source.encoding
        return "" if encoding == encodings.UTF8 else encoding
    return encodings.detect_encoding(stream)


def _size(source_file: SourceFile) -> int:
    """Return the size in bytes of a file that is not read; 0 if it is unknown or no regular file."""
    try:
        file_status = os.stat(source_file.path, follow_symlinks=False)
    except (OSError, ValueError):
        return 0
    return file_status.st_size if stat.S_ISREG(file_status.st_mode) else 0


def _tables(files: Sequence[SourceFile], most_bytes: int) -> tuple[set[str], set[str]]:
    """Return (paths of the tables of media, paths of the media files that they name)."""
    media_paths = {
        os.path.normpath(file.path) for file in files if file_formats.kind_of(file.path) in file_formats.MEDIA_KINDS
    }
    tables, named_paths = set(), set()
    for file in files:
        if os.path.basename(file.path).lower() not in _TABLES or file.refusal[0]:
            continue
        table_file, _ = _inspect(file, file_formats.kind_of(file.path), most_bytes, of_media=True)
        if table_file.form != row_formats.CAPTIONED:
            continue
        tables.add(file.path)
        folder = os.path.dirname(file.path)
        with open_regular(file.path) as stream:
            whole = FilePiece(0, table_file.bytes, 1, -1)
            for _, row in row_readers.encoded_rows(
                stream, table_file.kind, piece=whole, most_bytes=most_bytes, encoding=table_file.encoding
            ):
                name = row.get("file_name") if isinstance(row, dict) else None
                path = os.path.normpath(os.path.join(folder, name)) if isinstance(name, str) else ""
                if path in media_paths:
                    named_paths.add(path)
    return tables, {file.path for file in files if os.path.normpath(file.path) in named_paths}


def _captions(files: Sequence[SourceFile], table_media: set[str]) -> dict[str, list[str]]:
    """Return media file -> text or JSON files of its name beside it, the preferred one first."""
    captions: dict[str, list[str]] = {}
    for file in files:
        if (
            file_formats.kind_of(file.path) not in file_formats.MEDIA_KINDS
            or file.path in table_media
            or file.refusal[0]
        ):
            continue
        stem = os.path.splitext(file.path)[0]
        names = [f"{start}{suffix}" for suffix in _CAPTION_SUFFIXES for start in (stem, file.path)]
        caption_paths = [name for name in names if os.path.lexists(name)]
        if caption_paths:
            captions[file.path] = caption_paths
    return captions


def _with_caption(
    source_file: SourceFile, kind: str, source: SourceOptions, caption_files: Sequence[SourceFile]
) -> InputFile:
    """Return a media file that no table names, with its caption or a refusal."""
    file = InputFile(source_file.path, source_file.name, kind, form=row_formats.CAPTIONED)
    try:
        with open_regular(source_file.path) as stream:
            fault = row_readers.head_fault(stream, source_file.path, kind)
            if fault is not None:
                raise fault
            sha256, size, _ = survey(stream, kind)
        file = replace(file, sha256=sha256, bytes=size)
        if caption_files:
            return replace(file, caption=_caption(caption_files[0]))
    except MalformedRow as problem:
        return replace(file, bytes=_size(source_file), refusal=(problem.reason, problem.detail))
    except OSError as error:
        return replace(file, bytes=_size(source_file), refusal=("unreadable_file", f"{error.strerror or error}"))
    if source.captions == "folder" and (label := Path(source_file.path).absolute().parent.name):
        return replace(file, label=label)
    remedy = (
        "name it in a metadata.csv with file_name and text, put a .txt of its name beside it, or declare captions: "
        "folder"
    )
    return replace(file, refusal=("no_caption", f"nothing says what the {kind} holds; {remedy}"))


def _caption(source_file: SourceFile) -> InputFile:
    """Return the text or JSON file that is a caption.

    Raises MalformedRow if it may not be read, OSError if it cannot be.
    """
    if source_file.refusal[0]:
        raise MalformedRow(source_file.refusal[0], f"the caption {source_file.name!r}: {source_file.refusal[1]}")
    kind = file_formats.kind_of(source_file.path)
    with open_regular(source_file.path) as stream:
        if (fault := row_readers.head_fault(stream, source_file.path, kind)) is not None:
            raise MalformedRow(fault.reason, f"the caption {source_file.name!r}: {fault.detail}")
        sha256, size, _ = survey(stream, kind)
        encoding = encodings.detect_encoding(stream)
    return InputFile(
        source_file.path, source_file.name, kind=kind, sha256=sha256, bytes=size, form="caption", encoding=encoding
    )


__all__ = [
    "FileFacts",
    "InputFile",
    "ReadPlan",
    "InputChunk",
    "plan_reading",
    "tables_of",
    "read_chunk",
    "read_all",
    "chunk_of_json",
]


def read_all(source: SourceOptions, max_row_bytes: int, media_folder: Path) -> Iterator[Example | Drop]:
    """Yield every row of one source, read in this process.

    Raises as `plan_reading` and `read_chunk` do.
    """
    for chunk in plan_reading([source], max_row_bytes).chunks:
        yield from read_chunk(chunk, source, media_folder)
