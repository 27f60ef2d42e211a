"""Evaluation sets as they are read for `contamination`: files, folders, glob patterns or assets -> items with their texts.

Any form that a source may have is read as a row (its question and its answer are two texts). A row of no known form gives each
of its text fields; a text or Markdown file gives each of its paragraphs. What cannot be read is counted, per set.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.core.errors import ConfigError
from sartor.core.records import Malformed, Origin
from sartor.curate.sources import forms, media, readers
from sartor.curate.sources.places import open_regular
from sartor.curate.sources.tables import Read

_HEAD_ROWS = 50
_MOST_BYTES = 64 << 20


@dataclass
class EvalSet:
    """One named set. `items`: (place such as `test.jsonl:12`, texts). `media`: sha256 of a picture or a recording -> number of
    the first item that names it. `unread` counts what could not be used, by reason.
    """

    name: str
    items: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    media: dict[str, int] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)


def read_set(path: str) -> EvalSet:
    """The set at a path, or `asset:NAME/path inside it`. Raises ConfigError when there is none or nothing in it can be used."""
    found = EvalSet(path)
    for file, name in files_of(path):
        for place, texts, named in _items(file, found.unread):
            for digest in named:
                found.media.setdefault(digest, len(found.items))
            found.items.append((f"{name}:{place}", texts))
    if not found.items:
        why = ", ".join(f"{count} {reason}" for reason, count in found.unread.items()) or "it is empty"
        raise ConfigError(
            f"the evaluation set {path!r} has no item that can be read: {why}", "give JSONL, CSV, Parquet or text"
        )
    return found


def files_of(path: str) -> list[tuple[Path, str]]:
    """(file, name) of every file of a set. Raises ConfigError for a path that names none."""
    if path.startswith("asset:"):
        name, _, inside = path.removeprefix("asset:").partition("/")
        root = assets.install(name) / inside
        if not root.resolve().is_relative_to(assets.entry(name).directory.resolve()):
            raise ConfigError(f"{path!r} leaves the folder of its asset", "against: [asset:NAME/path]")
    else:
        root = Path(path).expanduser()
    if root.is_file():
        return [(root, root.name)]
    if root.is_dir():
        inner = [file for file in sorted(root.rglob("*")) if file.is_file() and file.suffix.lower() in readers.READERS]
    else:
        inner = [Path(name) for name in sorted(glob.glob(str(root), recursive=True)) if Path(name).is_file()]
    if not inner:
        raise ConfigError(f"against: {path!r} names no file", "check the path; it is taken from the current directory")
    return [(file, file.relative_to(root).as_posix() if root.is_dir() else file.name) for file in inner]


def _items(file: Path, unread: Counter[str]) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """(place, texts, sha256 of the media that lie where it says) of each item."""
    rows = readers.read(file, _MOST_BYTES)
    if file.suffix.lower() in (".txt", ".md"):
        yield from _paragraphs(rows, unread)
        return
    head = list(itertools.islice(rows, _HEAD_ROWS))
    counts = Counter(form for _, row in head if isinstance(row, dict) and (form := forms.detect(row)))
    form = counts.most_common(1)[0][0] if counts else ""
    for line, row in itertools.chain(head, rows):
        named: list[str] = []
        try:
            texts = _texts(row, form, partial(_noted, file.parent, named))
        except Malformed as fault:
            unread[fault.reason] += 1
            continue
        if texts:
            yield line, texts, named
        else:
            unread["no_text"] += 1


def _noted(folder: Path, seen: list[str], kind: str, value: str) -> str:
    """Note the digest of a medium; one that is not there is the set's own affair."""
    with contextlib.suppress(Malformed, OSError):
        if value.startswith("data:"):
            seen.append(media.digest_of(media.of_data_url(kind, value)))
        else:
            with open_regular(media.locate(kind, value, folder)) as stream:
                seen.append(media.digest_of(stream))
    return value


def _texts(row: Any, form: str, noted: forms.Media) -> tuple[str, ...]:
    """The texts of a row that count as items of an evaluation. Raises Malformed."""
    if isinstance(row, Malformed):
        raise row
    if not isinstance(row, dict):
        raise Malformed("not_an_object", f"the row is a {type(row).__name__}")
    if form and forms.detect(row) == form:
        try:
            example = forms.parse(row, form, Origin("", ""), noted)
        except Malformed:
            return tuple(_strings(row))  # a test item without an answer is an item all the same
        asked = [message.text for message in example.messages if message.role == "user"]
        return tuple(text for text in (*asked, example.reply) if text.strip())
    return tuple(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _paragraphs(rows: Read, unread: Counter[str]) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    for _, row in rows:
        if isinstance(row, Malformed):
            unread[row.reason] += 1
            continue
        line = 1
        for paragraph in row["text"].split("\n\n"):
            if paragraph.strip():
                yield str(line), (paragraph,), []
            line += paragraph.count("\n") + 2
