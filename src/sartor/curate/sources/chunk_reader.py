"""Reading of one input chunk into Examples and Drops.

`planner.plan_reading` scans all sources once and cuts them into chunks; `read_chunk` yields the Examples and Drops of
one. A file that is not read (an archive, a link out of the folder, an image without a caption) was found at planning.
It is a refusal in its chunk, and so becomes a counted Drop at its position.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from sartor.core import records
from sartor.core.errors import SourceError
from sartor.core.records import Drop, Example, MalformedRow, Message, Origin, SkippedRow
from sartor.core.splits import conversation_group
from sartor.curate.sources import documents, file_formats, media_files, row_formats, row_readers, source_files
from sartor.curate.sources import feedback_inbox as inbox
from sartor.curate.sources.row_readers import FilePiece, Read
from sartor.curate.sources.safe_paths import open_regular
from sartor.curate.sources.source_files import checksum
from sartor.curate.sources.types import SourceOptions


@dataclass(frozen=True, slots=True)
class InputFile:
    """File as it was when the run was planned.

    caption: text file beside an image or recording.
    label: caption that is already known.
    refusal: (reason, detail); if set, the file is one Drop.
    encoding: encoding of text that is not UTF-8.
    sheet: sheet of a workbook that the source names.
    """

    path: str
    name: str
    kind: str
    sha256: str = ""
    bytes: int = 0
    form: str = ""
    caption: InputFile | None = None
    label: str = ""
    refusal: tuple[str, str] = ("", "")
    encoding: str = ""
    sheet: str = ""


@dataclass(frozen=True, slots=True)
class InputChunk:
    """Piece of one large file (`piece`), several small files, or a query (`files` is empty).

    source: index of the source.
    asked: digest of the source's options that affect its rows.
    """

    number: int
    source: int
    asked: str
    form: str
    most_bytes: int
    files: tuple[InputFile, ...] = ()
    piece: FilePiece | None = None

    def as_json(self) -> dict[str, Any]:
        """Return JSON that `chunk_of_json` parses.

        A path that is not UTF-8 holds lone surrogates; dump the result as ASCII.
        """
        return asdict(self)

    @property
    def bytes(self) -> int:
        """Bytes to read, for a progress line; 0 for a query."""
        return self.piece.length if self.piece else sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """Digest of the chunk's input: file names, digests, format and byte range, independent of the files' paths."""
        return records.digest({**_without_paths(asdict(self)), "number": 0})


def chunk_of_json(value: dict[str, Any]) -> InputChunk:
    """Return the chunk that `InputChunk.as_json` wrote."""
    piece = value["piece"]
    if piece is not None:
        piece = FilePiece(**{**piece, "groups": piece["groups"] and tuple(piece["groups"])})
    return InputChunk(**{**value, "files": tuple(_file_of_json(file) for file in value["files"]), "piece": piece})


def _file_of_json(value: dict[str, Any]) -> InputFile:
    caption = value["caption"]
    return InputFile(**{**value, "caption": caption and _file_of_json(caption), "refusal": tuple(value["refusal"])})


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):  # empty `encoding` and `sheet` are left out, so older digests stay valid
        return {
            key: _without_paths(inner)
            for key, inner in value.items()
            if key != "path" and not (key in ("encoding", "sheet") and inner == "")
        }
    return [_without_paths(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def read_chunk(
    chunk: InputChunk,
    source: SourceOptions,
    media_folder: Path,
    strict: bool = False,
    notes: Counter[tuple[str, str]] | None = None,
) -> Iterator[Example | Drop]:
    """Yield the Examples and Drops of a chunk in file order; media are copied into `media_folder`.

    strict: raise SourceError at the first row that cannot be used.
    notes: (file name, observation) -> count, updated for observations that are no reason for a Drop.
    """
    note_counts: Counter[tuple[str, str]] = Counter() if notes is None else notes
    reader = _ChunkReader(
        chunk, source_files.with_licence(source), media_folder=media_folder, strict=strict, notes=note_counts
    )
    if not chunk.files:
        name = "query" if source_files.scheme(source.path) == "sql" else source.path
        yield from reader.rows(
            InputFile("", name, "query", form=chunk.form), source_files.query_rows(source, chunk.most_bytes)
        )
        return
    if chunk.form == inbox.FORM:
        yield from _read_inbox(chunk, source, reader)
        return
    with ExitStack() as stack:
        document_reader = stack.enter_context(documents.DocumentReader())
        for file in chunk.files:
            yield from reader.rows(file, _raw(chunk, file, document_reader, note_counts))


def _read_inbox(chunk: InputChunk, source: SourceOptions, reader: _ChunkReader) -> Iterator[Example | Drop]:
    """Read a whole inbox; trust in a rater depends on all of its lines together."""
    files = [inbox.InboxFile(index, file.path, file.bytes, file.sha256) for index, file in enumerate(chunk.files)]
    feedback_inbox = inbox.FeedbackInbox(
        [file for file, input_file in zip(files, chunk.files, strict=True) if not input_file.refusal[0]],
        source.inbox,
        chunk.most_bytes,
    )
    for file, input_file in zip(files, chunk.files, strict=True):
        yield from reader.rows(input_file, _feedback_rows(feedback_inbox, file, input_file, reader.notes))


def _feedback_rows(
    feedback_inbox: inbox.FeedbackInbox, file: inbox.InboxFile, input_file: InputFile, notes: Counter[tuple[str, str]]
) -> Read:
    if input_file.refusal[0]:
        yield "1", MalformedRow(*input_file.refusal)
        return
    try:
        for line, row in feedback_inbox.rows(file):
            if isinstance(row, SkippedRow) and row.reason == inbox.DISTRUSTED:
                notes[input_file.name, row.detail] += 1
            yield line, row
    except MalformedRow as fault:
        yield "1", fault
    except OSError as error:
        yield "1", MalformedRow("unreadable_file", f"{error.strerror or error}")


def _raw(
    chunk: InputChunk, file: InputFile, document_reader: documents.DocumentReader, notes: Counter[tuple[str, str]]
) -> Read:
    """Yield the raw rows of a file of a chunk; an operating system error becomes a MalformedRow."""
    if file.refusal[0]:
        yield "1", MalformedRow(*file.refusal)
        return
    try:
        if file.kind in file_formats.MEDIA_KINDS:
            yield "1", _captioned(file, chunk.most_bytes)
        elif file.kind in documents.MODULES:
            yield from document_reader.read(
                file.path, file.sha256, kind=file.kind, most_bytes=chunk.most_bytes, sheet=file.sheet
            )
        elif file.kind in ("text", "markdown"):
            note_counts: Counter[str] = Counter()
            yield from documents.read_text_document(
                file.path,
                file.sha256,
                kind=file.kind,
                most_bytes=chunk.most_bytes,
                notes=note_counts,
                encoding=file.encoding,
            )
            notes.update({(file.name, note): count for note, count in note_counts.items()})
        else:
            with open_regular(file.path) as stream:
                piece = chunk.piece or FilePiece(0, file.bytes, 1, -1)
                _check_unchanged(stream, file, piece)
                yield from row_readers.encoded_rows(
                    stream, file.kind, piece=piece, most_bytes=chunk.most_bytes, encoding=file.encoding
                )
    except MalformedRow as fault:
        yield "1", fault
    except OSError as error:
        yield "1", MalformedRow("unreadable_file", f"{error.strerror or error}")


def _check_unchanged(stream: BinaryIO, file: InputFile, piece: FilePiece) -> None:
    """Raise MalformedRow unless the bytes to read are those that were planned."""
    is_whole = piece.crc < 0
    size = stream.seek(0, 2)
    stream.seek(0)
    is_unchanged = size == file.bytes and (
        media_files.digest_of(stream) == file.sha256
        if is_whole
        else checksum(stream, piece.start, piece.length) == piece.crc
    )
    if not is_unchanged:
        raise MalformedRow("changed_file", "the file was changed after the run began; nothing of this piece is read")


def _captioned(file: InputFile, most_bytes: int) -> Any:
    """Return the row that a media file and its caption make."""
    row: dict[str, Any] = {"file_name": PurePath(file.path).name, "text": file.label}
    if file.caption is None:
        return row
    with open_regular(file.caption.path) as stream:
        document = row_readers.read_document(stream, most_bytes, file.caption.encoding)
    if isinstance(document, MalformedRow):
        return MalformedRow(document.reason, f"the caption {file.caption.name!r}: {document.detail}")
    text, raw = document
    if media_files.digest_of(raw) != file.caption.sha256:
        return MalformedRow("changed_file", f"the caption {file.caption.name!r} was changed after the run began")
    if file.caption.kind == "text":
        return {**row, "text": text.strip()}
    caption = next((value for _, value in row_readers.whole_json(io.BytesIO(raw), most_bytes)), None)
    if isinstance(caption, MalformedRow):
        return MalformedRow(caption.reason, f"the caption {file.caption.name!r}: {caption.detail}")
    if not isinstance(caption, dict) or not row_formats.caption_field(caption):
        fields = ", ".join(row_formats.CAPTIONS)
        return MalformedRow("no_caption", f"{file.caption.name!r} holds no object with one of the fields {fields}")
    return {**caption, "file_name": row["file_name"]}


@dataclass(frozen=True)
class _ChunkReader:
    """Reader that converts raw rows of a chunk to Examples and Drops."""

    chunk: InputChunk
    source: SourceOptions
    media_folder: Path
    strict: bool
    notes: Counter[tuple[str, str]]

    def rows(self, file: InputFile, rows: Read) -> Iterator[Example | Drop]:
        form = file.form
        group = file.name if file.kind == "pdf" else ""
        store_media, date = partial(self._store_media, file), row_formats.iso_date(self.source.date)
        if columns := self.source.fields.by_name():
            rows = row_formats.renamed_rows(rows, columns)
        for line, row in rows:
            origin = Origin(self.source.path, f"{file.name}:{line}", self.source.licence, date=date)
            try:
                if isinstance(row, MalformedRow):
                    raise row
                if file.kind == inbox.FORM:
                    form = row_formats.detect_row_format(row) or ""
                if not form:
                    raise row_formats.unknown_form(row)
                if form == row_formats.CAPTIONED and self.source.prompt:
                    row = {"prompt": self.source.prompt, **row} if isinstance(row, dict) else row
                example = row_formats.parse_row(row, form, origin, store_media)
                if self.source.system and form != "text" and example.messages[0].role != "system":
                    system = Message.of("system", self.source.system)
                    example = replace(example, messages=(system, *example.messages))
                _check_text(example)
            except MalformedRow as fault:
                # feedback is not copied into a Drop: people may withdraw it from the inbox
                yield self._drop(fault, origin, None if file.kind == inbox.FORM else row)
                continue
            except RecursionError:
                yield self._drop(MalformedRow("bad_json", "the row is nested too deeply"), origin, None)
                continue
            self._note(file, form, row)
            if file.kind == inbox.FORM:
                example = replace(example, group=conversation_group(example))
            yield replace(example, group=group) if group and not example.group else example

    def _note(self, file: InputFile, form: str, row: Mapping[str, Any]) -> None:
        """Count what is not read of a row that is kept."""
        if field := row_formats.date_of(row)[1]:
            self.notes[file.name, f"`{field}` is no date"] += 1
        if form == "text" and not self.source.fields.text and (label := row_formats.unread_label(row)):
            self.notes[file.name, row_formats.UNREAD_LABEL + label] += 1
        # whoever names the columns has chosen those that are read
        if not self.source.fields.prompt and (context := row_formats.unread_context(row, form)):
            self.notes[file.name, row_formats.UNREAD_CONTEXT + context] += 1

    def _store_media(self, file: InputFile, kind: str, value: str) -> str:
        if file.kind in file_formats.MEDIA_KINDS:  # the row is the media file itself
            return media_files.copy_file(Path(file.path), self.media_folder, file.sha256)
        return media_files.store_media(kind, value, Path(file.path).parent if file.path else None, self.media_folder)

    def _drop(self, fault: MalformedRow, origin: Origin, row: Any) -> Drop:
        detail = _storable(fault.detail)
        if self.strict and not isinstance(fault, SkippedRow):
            raise SourceError(f"{origin.locator}: {fault.reason}: {detail}", "mend the row, or run without --strict")
        text = "" if row is None or isinstance(row, MalformedRow) else records.canonical_text(row)[:2000]
        return Drop(fault.reason, origin.source, origin.locator, detail, text=_storable(text))


def _storable(text: str) -> str:
    """Return the text with lone surrogates and NUL characters escaped, so that any file can hold it."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _check_text(example: Example) -> None:
    """Raise MalformedRow for lone surrogates and NUL characters.

    JSON can encode them, but a text file cannot hold them.
    """
    try:
        assert example.id  # digests the content as UTF-8
        example.group.encode()
    except UnicodeEncodeError:
        raise MalformedRow("not_utf8", "the row holds a lone surrogate (half of a character)") from None
    messages = example.messages + example.rejected
    texts = [part.text for message in messages for part in message.content]
    texts += [message.reasoning_content for message in messages]
    if any("\0" in text for text in [*texts, example.group]):
        raise MalformedRow("nul_bytes", "the row holds NUL characters")
