"""Two passes over record files: sketch the rows, then write them."""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core.artifacts import SCHEMA
from sartor.core.errors import ConfigError, SourceError
from sartor.core.processes import Executor
from sartor.core.records import canonical_text
from sartor.curate.dedup import shingles
from sartor.curate.dedup.clusters import Removals
from sartor.curate.dedup.pair_scoring import METHODS
from sartor.curate.dedup.record_files import (
    BadRecord,
    ComparedFields,
    CsvRow,
    RecordBlock,
    blocks,
    choose,
    format_of,
    json_rows,
    json_value,
    parse_line,
    parsed,
    text_of,
)
from sartor.curate.dedup.shingles import I32, I64, U8, U32, Mask, Shingling, Sketches, offsets_of

_COPY_BYTES = 1 << 20
_DROPPED = pa.schema(
    [
        ("row", pa.int64()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("kept_row", pa.int64()),
        ("kept_file", pa.string()),
        ("kept_line", pa.int64()),
        ("score", pa.float32()),
        ("method", pa.string()),
        ("content", pa.binary()),
    ],
    metadata={b"sartor.schema": str(SCHEMA).encode()},
)


@dataclass(frozen=True)
class RecordLocations:
    """Locations of the N rows of a run.

    names: paths of the files. file: (N,) index into `names`. line: (N,) line of each row.
    faults: rows that cannot be used, by row number.
    """

    names: list[str]
    file: I32
    line: I64
    faults: dict[int, BadRecord]

    def describe(self, row: int) -> str:
        """Return a row's location as "file:line"."""
        return f"{self.names[self.file[row]]}:{self.line[row]}"


class Writer:
    """Writer of `kept/` and `dropped.parquet` below a folder; a context manager."""

    def __init__(self, folder: Path, rows: RecordLocations, removals: Removals) -> None:
        self.folder, self.rows, self.removals = folder, rows, removals
        count = len(rows.line)
        self._removal = np.full(count, -1, np.int64)
        self._removal[removals.rows] = np.arange(len(removals.rows))
        self.keep = self._removal < 0
        self.keep[list(rows.faults)] = False
        (folder / "kept").mkdir()
        self._dropped = pq.ParquetWriter(folder / "dropped.parquet", _DROPPED, compression="zstd")
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()
        self._dropped.close()

    def write(self, source: Path, kind: str, first: int, name: str, max_row_bytes: int) -> int:
        """Divide the rows of one file into kept and dropped; return the number of rows.

        first: row number of the file's first row.
        """
        count = 0
        target = self.folder / "kept" / name
        with _open_target(kind, source, target) as out:
            for block in blocks(source, kind, max_row_bytes):
                numbers = slice(first + count, first + count + len(block.rows))
                keep = self.keep[numbers]
                out.write(block, keep)
                for index in np.flatnonzero(~keep).tolist():
                    self._drop(first + count + index, block.rows[index], source)
                count += len(block.rows)
        return count

    def _drop(self, row: int, raw: Any, source: Path) -> None:
        removal_index, fault = self._removal[row], self.rows.faults.get(row)
        fields: dict[str, Any] = {
            "row": row,
            "file": self.rows.names[self.rows.file[row]],
            "line": int(self.rows.line[row]),
        }
        if fault is not None:
            fields |= {"reason": fault.reason, "detail": fault.detail, "content": self._content(raw, source)}
        else:
            kept_row = int(self.removals.kept_rows[removal_index])
            method = METHODS[self.removals.method[removal_index]]
            fields |= {
                "reason": f"{method}_duplicate" if method != "contained" else method,
                "detail": f"{method} of {self.rows.describe(kept_row)}, score "
                f"{self.removals.score[removal_index]:.3f}",
                "kept_row": kept_row,
                "kept_file": self.rows.names[self.rows.file[kept_row]],
                "kept_line": int(self.rows.line[kept_row]),
                "score": float(self.removals.score[removal_index]),
                "method": method,
                "content": self._content(raw, source),
            }
        self._waiting.append(fields)
        self._bytes += len(fields["content"])
        if self._bytes > 16 << 20 or len(self._waiting) >= 20_000:
            self._flush()

    def _content(self, raw: Any, source: Path) -> bytes:
        """Return the row as bytes. A row that is too long is copied in pieces to `too_long/` instead."""
        if isinstance(raw, BadRecord):
            self._copy(raw, source)
            return b""
        if isinstance(raw, CsvRow):
            if isinstance(raw.fields, BadRecord) and raw.fields.size:
                self._copy(raw.fields, source)
            return raw.raw
        return raw if isinstance(raw, bytes) else canonical_text(raw).encode()

    def _copy(self, fault: BadRecord, source: Path) -> None:
        folder = self.folder / "too_long"
        folder.mkdir(exist_ok=True)
        with source.open("rb") as stream, (folder / source.name).open("ab") as out:
            stream.seek(fault.start)
            remaining = fault.size
            while remaining and (piece := stream.read(min(remaining, _COPY_BYTES))):
                out.write(piece)
                remaining -= len(piece)

    def _flush(self) -> None:
        if self._waiting:
            self._dropped.write_table(pa.Table.from_pylist(self._waiting, _DROPPED))
        self._waiting, self._bytes = [], 0


class _Target(ABC):
    """Output for the kept rows of a file. `write` gets each block with the mask of its kept rows."""

    def __enter__(self) -> _Target:
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: B027
        pass

    @abstractmethod
    def write(self, block: RecordBlock, keep: Mask) -> None: ...


def _open_target(kind: str, source: Path, target: Path) -> _Target:
    if kind == "parquet":
        return _ParquetTarget(source, target)
    if kind == "json":
        return _JsonTarget(source, target)
    return _LinesTarget(target)


class _LinesTarget(_Target):
    """JSON Lines and CSV: the bytes of each kept row, and of everything between rows (header, blank lines)."""

    def __init__(self, target: Path) -> None:
        self._out = target.open("wb")

    def __exit__(self, *exception: object) -> None:
        self._out.close()

    def write(self, block: RecordBlock, keep: Mask) -> None:
        self._out.write(b"".join(_pieces(block, keep)))


def _pieces(block: RecordBlock, keep: Mask) -> Iterator[bytes]:
    for index, (row, stays) in enumerate(zip(block.rows, keep.tolist(), strict=True)):
        if index in block.gaps:
            yield block.gaps[index]
        if stays:
            yield row if isinstance(row, bytes) else row.raw
    if len(block.rows) in block.gaps:
        yield block.gaps[len(block.rows)]


class _JsonTarget(_Target):
    """A JSON file: the same list, or the same object around it, without the dropped rows."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._kept_rows: list[Any] = []

    def write(self, block: RecordBlock, keep: Mask) -> None:
        self._kept_rows.extend(row for row, stays in zip(block.rows, keep.tolist(), strict=True) if stays)

    def __exit__(self, *exception: object) -> None:
        value = json_value(self._source)
        rows = json_rows(value)
        content: Any = self._kept_rows
        if isinstance(value, dict):
            content = {name: self._kept_rows if inner is rows else inner for name, inner in value.items()}
            if rows and rows[0] is value:
                content = self._kept_rows
        self._target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _ParquetTarget(_Target):
    """A Parquet file of the same schema. Dropped rows go to `dropped/` under the same name, with their types."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = pq.ParquetFile(source)
        self._batches = self._source.iter_batches(2048)
        schema = self._source.schema_arrow
        self._out = pq.ParquetWriter(target, schema, compression="zstd")
        dropped_path = target.parent.parent / "dropped" / target.name
        dropped_path.parent.mkdir(exist_ok=True)
        self._dropped = pq.ParquetWriter(dropped_path, schema, compression="zstd")

    def write(self, block: RecordBlock, keep: Mask) -> None:
        table = pa.Table.from_batches([next(self._batches)])
        self._out.write_table(table.filter(pa.array(keep)))
        self._dropped.write_table(table.filter(pa.array(~keep)))

    def __exit__(self, *exception: object) -> None:
        self._out.close()
        self._dropped.close()
        self._source.close()


# First rows of each file, from which the compared fields and the shingling are chosen.
SAMPLE = 500


@dataclass(frozen=True)
class FileOfRows:
    """An input file.

    kind: its format. choice: the fields that are compared. name: its name in the output.
    stamp: size in bytes and modification time (ns) at the first reading.
    """

    path: Path
    kind: str
    choice: ComparedFields
    name: str
    stamp: tuple[int, int]

    def check_unchanged(self) -> None:
        """Raise SourceError if the file has changed since the first reading."""
        if stamp_of(self.path) != self.stamp:
            raise SourceError(f"{self.path} was changed while it was read", "run again when nobody writes it")


def inspect_files(
    paths: Sequence[Path], text_field: str, unit: Any, size: int, max_row_bytes: int
) -> tuple[list[FileOfRows], Shingling]:
    """Return the files with their compared fields, and the shingling, from the first rows of each file.

    Raises ConfigError, SourceError.
    """
    if not paths:
        raise ConfigError("no file was named", "sartor dedup FILE... --out DIR")
    by_resolved_path = {path.resolve(): path for path in paths}
    if len(by_resolved_path) < len(paths):
        raise ConfigError(
            "a file is named twice: every row of it would be its own duplicate",
            f"sartor dedup {' '.join(map(str, by_resolved_path.values()))} --out DIR",
        )
    files: list[FileOfRows] = []
    texts: list[str] = []
    joined = 0
    for path in paths:
        kind = format_of(path)
        rows = (row for block in blocks(path, kind, max_row_bytes) for row in block.rows)
        sample = [row for row in map(_object_of, itertools.islice(rows, SAMPLE)) if isinstance(row, dict)]
        choice = choose(sample, text_field)
        joined = max(joined, len(choice.fields) * choice.joined)
        texts.extend(text_of(row, choice) or "" for row in sample)
        name = path.name
        if any(file.name == name for file in files):
            name = f"{path.stem}-{len(files) + 1}{path.suffix}"
        files.append(FileOfRows(path, kind=kind, choice=choice, name=name, stamp=stamp_of(path)))
    return files, shingles.resolve(unit, size, texts, joined_fields=joined)


def _object_of(row: Any) -> Any:
    """Return a row as an object with fields; anything else for a row that is none."""
    if isinstance(row, bytes):
        return parse_line(row, None)
    if isinstance(row, CsvRow):
        return row.fields
    return row


def stamp_of(path: Path) -> tuple[int, int]:
    """Return size in bytes and modification time (ns) of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@dataclass
class SketchedRows:
    """Result of the first reading of N rows, in the layout of `Sketches`.

    shingles: memory-mapped.
    lengths: (N,) characters of each row's text.
    counts: rows of each file.
    """

    rows: RecordLocations
    shingles: U32
    offsets: I64
    digests: U8
    lengths: I64
    counts: list[int] = field(default_factory=list)


def sketch_files(
    files: Sequence[FileOfRows], shingling: Shingling, store: Path, max_row_bytes: int, executor: Executor
) -> SketchedRows:
    """Read every row of the files and sketch it. The shingles are written to the file `store`."""
    of_file: list[I32] = []
    lines: list[I64] = []
    sizes, digests, lengths = [np.empty(0, np.int64)], [np.empty((0, 16), np.uint8)], [np.empty(0, np.int64)]
    faults: dict[int, BadRecord] = {}
    counts = [0] * len(files)
    done, total = 0, sum(file.stamp[0] for file in files)
    block_facts: list[tuple[int, list[int], int]] = []

    def items() -> Iterator[tuple[Any, ...]]:
        for number, file in enumerate(files):
            for block in blocks(file.path, file.kind, max_row_bytes):
                # approximate: other rows than bytes and CSV rows count as empty
                raw = [row if isinstance(row, bytes) else getattr(row, "raw", b"") for row in block.rows]
                block_facts.append((number, block.lines, sum(map(len, raw))))
                yield block.rows, file.choice, file.kind, shingling

    with store.open("wb") as stream:
        for index, (sketches, text_lengths, block_faults) in enumerate(executor.spread(sketch_rows, items())):
            number, block_lines, size = block_facts[index]
            first = sum(counts)
            stream.write(sketches.shingles.tobytes())
            of_file.append(np.full(len(block_lines), number, np.int32))
            lines.append(np.array(block_lines, np.int64))
            sizes.append(np.diff(sketches.offsets))
            digests.append(sketches.digests)
            lengths.append(text_lengths)
            faults.update((first + row, fault) for row, fault in block_faults)
            counts[number] += len(block_lines)
            done += size
            executor.show("reading", done, total)
    all_shingles = np.memmap(store, np.uint32, "r") if store.stat().st_size else np.empty(0, np.uint32)
    rows = RecordLocations(
        [str(file.path) for file in files],
        np.concatenate([np.empty(0, np.int32), *of_file]),
        np.concatenate([np.empty(0, np.int64), *lines]),
        faults,
    )
    return SketchedRows(
        rows,
        shingles=all_shingles,
        offsets=offsets_of(np.concatenate(sizes)),
        digests=np.concatenate(digests),
        lengths=np.concatenate(lengths),
        counts=counts,
    )


def sketch_rows(
    rows: list[Any], choice: ComparedFields, kind: str, shingling: Shingling
) -> tuple[Sketches, I64, list[tuple[int, BadRecord]]]:
    """Return the sketches of a block's N rows, (N,) text lengths, and the bad records by position.

    rows: as `record_files.blocks` yields them. A row that cannot be used has an empty set.
    """
    texts, faults = [], []
    for index, row in enumerate(rows):
        if isinstance(row, bytes):
            text = parse_line(row, choice)
        else:
            text = parsed(row if kind != "csv" or isinstance(row, BadRecord) else row.fields, choice)
        if isinstance(text, BadRecord):
            faults.append((index, text))
            text = ""
        texts.append(text)
    return shingles.sketch(texts, shingling), np.fromiter(map(len, texts), np.int64, len(texts)), faults
