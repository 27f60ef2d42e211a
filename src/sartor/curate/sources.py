"""Sources -> Examples with Origin and licence. The form is found per file and stated; what does not fit is a Drop."""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core import records
from sartor.core.artifacts import file_digest
from sartor.core.errors import ConfigError, ExtraError, HubError, SourceError, need
from sartor.core.records import Drop, Example, Origin
from sartor.curate import forms, readers
from sartor.curate.forms import Malformed
from sartor.curate.recipe import Source

# Rows looked at to find a file's form: the commonest one among them is the file's.
HEAD_ROWS = 50
_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/mpeg": ".mp3",
    "audio/flac": ".flac",
    "audio/ogg": ".ogg",
}


@dataclass
class FileFacts:
    """What the manifest says of one input file."""

    source: str
    path: str
    sha256: str
    bytes: int
    licence: str
    use: tuple[str, ...]
    form: str = ""
    read: int = 0


@dataclass
class Reader:
    """Reads every source of a recipe; gathers facts of the files, and copies media into `media_folder`.

    `strict` turns the first row that cannot be used into a SourceError.
    """

    max_row_bytes: int
    media_folder: Path
    strict: bool = False
    files: list[FileFacts] = field(default_factory=list)

    def read(self, source: Source) -> Iterator[Example | Drop]:
        """Examples and Drops of a source, in file order. Raises ConfigError when the path names nothing."""
        if source.path.startswith("hub:"):
            yield from self._read_hub(source)
            return
        for file, name in _files(source.path):
            facts = FileFacts(source.path, name, file_digest(file), file.stat().st_size, source.licence, source.use)
            self.files.append(facts)
            yield from self._read_rows(source, facts, readers.read(file, self.max_row_bytes), file.parent)

    def _read_rows(self, source: Source, facts: FileFacts, rows: readers.Read, folder: Path) -> Iterator[Example | Drop]:
        head = list(itertools.islice(rows, HEAD_ROWS))
        found = Counter(form for _, row in head if isinstance(row, dict) and (form := forms.detect(row)))
        form = found.most_common(1)[0][0] if found else ""
        facts.form = form or "unknown"
        for line, row in itertools.chain(head, rows):
            facts.read += 1
            origin = Origin(source.path, f"{facts.path}:{line}", source.licence)
            try:
                if isinstance(row, Malformed):
                    raise row
                if not form:
                    raise Malformed("unknown_form", f"no known form has these fields: {_fields(row)}")
                example = forms.parse(row, form, origin, lambda kind, value: self._media(kind, value, folder))
                _check_text(example)
            except Malformed as fault:
                yield self._drop(fault, origin, row)
                continue
            yield example

    def _drop(self, fault: Malformed, origin: Origin, row: Any) -> Drop:
        if self.strict:
            raise SourceError(f"{origin.locator}: {fault.reason}: {fault.detail}", "mend the row, or run without --strict")
        text = "" if isinstance(row, Malformed) else records.canonical_text(row)[:2000]
        return Drop(fault.reason, origin.source, origin.locator, fault.detail, text=text)

    def _media(self, kind: str, value: str, folder: Path) -> str:
        """Copy a media file or data URL into the dataset under its digest; returns its path there."""
        if value.startswith("data:"):
            head, _, body = value.partition(",")
            mime = head.removeprefix("data:").partition(";")[0]
            try:
                content = base64.b64decode(body, validate=True)
            except (binascii.Error, ValueError):
                raise Malformed("bad_media", f"the {kind} data URL is not base64") from None
            suffix = _SUFFIXES.get(mime, "")
        elif re.match(r"[a-z]+://", value):
            raise Malformed("bad_media", f"the {kind} is an address to fetch ({value[:60]}); give a path or a data URL")
        else:
            file = folder / value
            if not file.resolve().is_relative_to(folder.resolve()):
                raise Malformed("bad_media", f"the {kind} path {value!r} leaves the folder of its source")
            if not file.is_file():
                raise Malformed("missing_media", f"there is no {kind} at {value!r} beside the file")
            content, suffix = file.read_bytes(), file.suffix.lower()
        name = f"{hashlib.sha256(content).hexdigest()}{suffix}"
        self.media_folder.mkdir(exist_ok=True)
        (self.media_folder / name).write_bytes(content)
        return f"{self.media_folder.name}/{name}"

    def _read_hub(self, source: Source) -> Iterator[Example | Drop]:
        """`hub:owner/name` or `hub:owner/name:split`, by the `datasets` library."""
        try:
            import datasets
        except ImportError:
            raise need("datasets", "hub") from None
        name, _, split = source.path.removeprefix("hub:").partition(":")
        try:
            rows = datasets.load_dataset(name, split=split or "train")
        except ExtraError:
            raise
        except Exception as error:  # the library raises many kinds: offline, gated, absent, bad config
            raise HubError(
                f"the dataset {name!r} could not be fetched: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                "check the name and the network, or download it elsewhere and give its Parquet files",
            ) from None
        facts = FileFacts(
            source.path, source.path, str(rows._fingerprint), int(rows.dataset_size or 0), source.licence, source.use
        )
        self.files.append(facts)
        numbered = ((str(number), readers._drop_nulls(dict(row))) for number, row in enumerate(rows, 1))
        yield from self._read_rows(source, facts, numbered, Path())


def _files(path: str) -> Iterator[tuple[Path, str]]:
    """(file, name for locators) of a file, folder or glob pattern, sorted. Hidden files are not read."""
    root = Path(path).expanduser()
    if root.is_file():
        yield root, root.name
        return
    if root.is_dir():
        found = [file for file in sorted(root.rglob("*")) if file.is_file() and not _is_hidden(file, root)]
        named = [(file, file.relative_to(root).as_posix()) for file in found]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(root), recursive=True)) if Path(name).is_file()]
        named = [(file, str(file)) for file in found]
    if not named:
        what = "is an empty folder" if root.is_dir() else "names no file"
        raise ConfigError(f"the source {path!r} {what}", "check the path; it is taken from the current directory")
    yield from named


def _check_text(example: Example) -> None:
    """What JSON can spell and a file of text cannot hold: lone surrogates and NUL characters."""
    try:
        assert example.id  # digests the content as UTF-8
    except UnicodeEncodeError:
        raise Malformed("not_utf8", "the row holds a lone surrogate (half of a character)") from None
    texts = [part.text for message in example.messages + example.rejected for part in message.content]
    if any("\0" in text for text in [*texts, example.group]):
        raise Malformed("nul_bytes", "the row holds NUL characters")


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _fields(row: Any) -> str:
    return ", ".join(sorted(map(str, row))[:8]) if isinstance(row, dict) else type(row).__name__
