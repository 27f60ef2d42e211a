"""The first reading: every row's text as a shingle set on disk, and what else is remembered of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sartor.core.errors import ConfigError, SourceError
from sartor.core.processes import Means
from sartor.curate.dedup import shingles
from sartor.curate.dedup.arrays import I32, I64, U8, U32, offsets_of
from sartor.curate.dedup.fields import Choice, choose, text_of
from sartor.curate.dedup.inputs import Fault, blocks, format_of, parse_line, parsed
from sartor.curate.dedup.outputs import Rows
from sartor.curate.dedup.shingles import Shingling, Sketches

# Rows of each file that decide which fields are compared and how they are cut.
SAMPLE = 500


@dataclass(frozen=True)
class FileOfRows:
    """An input file: its format, the fields that are compared, its name in the output, its size and time of change at first."""

    path: Path
    kind: str
    choice: Choice
    name: str
    stamp: tuple[int, int]

    def check_unchanged(self) -> None:
        """Raise SourceError if the file is no longer what the first reading saw."""
        if stamp_of(self.path) != self.stamp:
            raise SourceError(f"{self.path} was changed while it was read", "run again when nobody writes it")


def look(paths: Sequence[Path], text_field: str, unit: Any, size: int, most_bytes: int) -> tuple[list[FileOfRows], Shingling]:
    """The files and their fields, and how rows are cut, from the first rows of each. Raises ConfigError, SourceError."""
    if not paths:
        raise ConfigError("no file was named", "sartor dedup FILE... --out DIR")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("a file is named twice: every row of it would be its own duplicate", "name each file once")
    files: list[FileOfRows] = []
    texts: list[str] = []
    joined = 0
    for path in paths:
        kind = format_of(path)
        sample = _sample(path, kind, most_bytes)
        choice = choose(sample, text_field)
        joined = max(joined, len(choice.fields) * choice.joined)
        texts.extend(text_of(row, choice) or "" for row in sample)
        name = path.name if path.name not in {file.name for file in files} else f"{path.stem}-{len(files) + 1}{path.suffix}"
        files.append(FileOfRows(path, kind, choice, name, stamp_of(path)))
    return files, shingles.resolve(unit, size, texts, joined_fields=joined)


def _sample(path: Path, kind: str, most_bytes: int) -> list[dict[str, Any]]:
    rows = (_record(row, kind) for block in blocks(path, kind, most_bytes) for row in block.rows)
    return [row for row in itertools.islice(rows, SAMPLE) if isinstance(row, dict)]


def _record(row: Any, kind: str) -> Any:
    if isinstance(row, bytes):
        return parse_line(row, None)
    return row.fields if kind == "csv" and not isinstance(row, Fault) else row


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of change of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@dataclass
class Reading:
    """What the first reading remembers of N rows; `shingles` are memory-mapped."""

    rows: Rows
    shingles: U32
    offsets: I64
    digests: U8
    lengths: I64  # characters of each row's text
    counts: list[int] = field(default_factory=list)  # rows of each file


def read(files: Sequence[FileOfRows], how: Shingling, store: Path, most_bytes: int, means: Means) -> Reading:
    """Read every row of the files; shingles go to the file `store`."""
    of_file: list[I32] = []
    lines: list[I64] = []
    sizes, digests, lengths = [np.empty(0, np.int64)], [np.empty((0, 16), np.uint8)], [np.empty(0, np.int64)]
    faults: dict[int, Fault] = {}
    counts, done, total = [0] * len(files), 0, sum(file.stamp[0] for file in files)
    places: list[tuple[int, list[int], int]] = []

    def items() -> Iterator[tuple[Any, ...]]:
        for number, file in enumerate(files):
            for block, size in _sized(file, most_bytes):
                places.append((number, block.lines, size))
                yield block.rows, file.choice, file.kind, how

    with store.open("wb") as stream:
        for place, (sketches, text_lengths, found) in enumerate(means.spread(sketch_rows, items())):
            number, at, size = places[place]
            first = sum(counts)
            _append(stream, sketches)
            of_file.append(np.full(len(at), number, np.int32))
            lines.append(np.array(at, np.int64))
            sizes.append(np.diff(sketches.offsets))
            digests.append(sketches.digests)
            lengths.append(text_lengths)
            faults.update((first + row, fault) for row, fault in found)
            counts[number] += len(at)
            done += size
            means.show("reading", done, total)
    whole = np.memmap(store, np.uint32, "r") if store.stat().st_size else np.empty(0, np.uint32)
    rows = Rows(
        [str(file.path) for file in files],
        np.concatenate([np.empty(0, np.int32), *of_file]),
        np.concatenate([np.empty(0, np.int64), *lines]),
        faults,
    )
    return Reading(rows, whole, offsets_of(np.concatenate(sizes)), np.concatenate(digests), np.concatenate(lengths), counts)


def _sized(file: FileOfRows, most_bytes: int) -> Iterator[tuple[Any, int]]:
    """Blocks of a file, and about how many of its bytes each took."""
    for block in blocks(file.path, file.kind, most_bytes):
        raw = [row if isinstance(row, bytes) else getattr(row, "raw", b"") for row in block.rows]
        yield block, sum(map(len, raw))


def _append(stream: BinaryIO, sketches: Sketches) -> None:
    stream.write(sketches.shingles.tobytes())


def sketch_rows(rows: list[Any], choice: Choice, kind: str, how: Shingling) -> tuple[Sketches, I64, list[tuple[int, Fault]]]:
    """Sketches of a block's rows as `inputs.blocks` yields them, the lengths of their texts, and by place the Faults.

    A row that cannot be used has an empty set.
    """
    texts, faults = [], []
    for place, row in enumerate(rows):
        if isinstance(row, bytes):
            text = parse_line(row, choice)
        else:
            text = parsed(row if kind != "csv" or isinstance(row, Fault) else row.fields, choice)
        if isinstance(text, Fault):
            faults.append((place, text))
            text = ""
        texts.append(text)
    return shingles.sketch(texts, how), np.fromiter(map(len, texts), np.int64, len(texts)), faults
