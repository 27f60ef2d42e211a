"""The second reading: rows that stay go to `kept/`, as they stood in their file; the others to `dropped.parquet`, whole."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core.artifacts import SCHEMA
from sartor.core.records import canonical_text
from sartor.curate.dedup.arrays import I32, I64, Mask
from sartor.curate.dedup.clusters import Removals
from sartor.curate.dedup.inputs import Block, CsvRow, Fault, blocks, json_rows, json_value
from sartor.curate.dedup.pairs import METHODS

_COPY_BYTES = 1 << 20
_DROPPED = pa.schema(
    [
        ("row", pa.int64()), ("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("detail", pa.string()),
        ("kept_row", pa.int64()), ("kept_file", pa.string()), ("kept_line", pa.int64()), ("score", pa.float32()),
        ("method", pa.string()), ("content", pa.binary()),
    ],
    metadata={b"sartor.schema": str(SCHEMA).encode()},
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Where the N rows of a run stand: `names` of the files, (N,) the `file` of each and its `line`; `faults` by row."""

    names: list[str]
    file: I32
    line: I64
    faults: dict[int, Fault]

    def say(self, row: int) -> str:
        """A row as a person finds it."""
        return f"{self.names[self.file[row]]}:{self.line[row]}"


class Writer:
    """Writes `kept/` and `dropped.parquet` below a folder; a context manager."""

    def __init__(self, folder: Path, rows: Rows, removals: Removals) -> None:
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

    def write(self, source: Path, kind: str, first: int, name: str, most_bytes: int) -> int:
        """Part the rows of one file, whose first row has the number `first`; returns how many there were."""
        count = 0
        target = self.folder / "kept" / name
        with _open_target(kind, source, target) as out:
            for block in blocks(source, kind, most_bytes):
                numbers = slice(first + count, first + count + len(block.rows))
                keep = self.keep[numbers]
                out.write(block, keep)
                for place in np.flatnonzero(~keep).tolist():
                    self._drop(first + count + place, block.rows[place], source)
                count += len(block.rows)
        return count

    def _drop(self, row: int, raw: Any, source: Path) -> None:
        at, fault = self._removal[row], self.rows.faults.get(row)
        told: dict[str, Any] = {"row": row, "file": self.rows.names[self.rows.file[row]], "line": int(self.rows.line[row])}
        if fault is not None:
            told |= {"reason": fault.reason, "detail": fault.detail, "content": self._content(raw, source)}
        else:
            kept, method = int(self.removals.kept[at]), METHODS[self.removals.method[at]]
            told |= {
                "reason": f"{method}_duplicate" if method != "contained" else method,
                "detail": f"{method} of {self.rows.say(kept)}, score {self.removals.score[at]:.3f}",
                "kept_row": kept,
                "kept_file": self.rows.names[self.rows.file[kept]],
                "kept_line": int(self.rows.line[kept]),
                "score": float(self.removals.score[at]),
                "method": method,
                "content": self._content(raw, source),
            }
        self._waiting.append(told)
        self._bytes += len(told["content"])
        if self._bytes > 16 << 20 or len(self._waiting) >= 20_000:
            self._flush()

    def _content(self, raw: Any, source: Path) -> bytes:
        """The row as bytes. One too long to hold is copied to `too_long/` in pieces."""
        if isinstance(raw, Fault):
            self._copy(raw, source)
            return b""
        if isinstance(raw, CsvRow):
            if isinstance(raw.fields, Fault) and raw.fields.size:
                self._copy(raw.fields, source)
            return raw.raw
        return raw if isinstance(raw, bytes) else canonical_text(raw).encode()

    def _copy(self, fault: Fault, source: Path) -> None:
        folder = self.folder / "too_long"
        folder.mkdir(exist_ok=True)
        with source.open("rb") as stream, (folder / source.name).open("ab") as out:
            stream.seek(fault.start)
            left = fault.size
            while left and (piece := stream.read(min(left, _COPY_BYTES))):
                out.write(piece)
                left -= len(piece)

    def _flush(self) -> None:
        if self._waiting:
            self._dropped.write_table(pa.Table.from_pylist(self._waiting, _DROPPED))
        self._waiting, self._bytes = [], 0


class _Target(ABC):
    """Where the kept rows of a file go; `write` gets each block with the mask of its rows."""

    def __enter__(self) -> _Target:
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: B027
        pass

    @abstractmethod
    def write(self, block: Block, keep: Mask) -> None: ...


def _open_target(kind: str, source: Path, target: Path) -> _Target:
    if kind == "parquet":
        return _ParquetTarget(source, target)
    return _JsonTarget(source, target) if kind == "json" else _LinesTarget(target)


class _LinesTarget(_Target):
    """JSON Lines and CSV: the bytes of every row, and what stood between rows (the header, blank lines)."""

    def __init__(self, target: Path) -> None:
        self._out = target.open("wb")

    def __exit__(self, *exception: object) -> None:
        self._out.close()

    def write(self, block: Block, keep: Mask) -> None:
        self._out.write(b"".join(_pieces(block, keep)))


def _pieces(block: Block, keep: Mask) -> Iterator[bytes]:
    for place, (row, stays) in enumerate(zip(block.rows, keep.tolist(), strict=True)):
        if place in block.gaps:
            yield block.gaps[place]
        if stays:
            yield row if isinstance(row, bytes) else row.raw
    if len(block.rows) in block.gaps:
        yield block.gaps[len(block.rows)]


class _JsonTarget(_Target):
    """A JSON file: the same list, or the same object around it, without the rows that go."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._kept: list[Any] = []

    def write(self, block: Block, keep: Mask) -> None:
        self._kept.extend(row for row, stays in zip(block.rows, keep.tolist(), strict=True) if stays)

    def __exit__(self, *exception: object) -> None:
        value = json_value(self._source)
        rows = json_rows(value)
        kept: Any = self._kept
        if isinstance(value, dict):
            kept = {name: self._kept if inner is rows else inner for name, inner in value.items()}
            if rows and rows[0] is value:
                kept = self._kept
        self._target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


class _ParquetTarget(_Target):
    """A Parquet file of the same schema; rows that go are in `dropped/` under the same name, with their types."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = pq.ParquetFile(source)
        self._batches = self._source.iter_batches(2048)
        schema = self._source.schema_arrow
        self._out = pq.ParquetWriter(target, schema, compression="zstd")
        gone = target.parent.parent / "dropped" / target.name
        gone.parent.mkdir(exist_ok=True)
        self._gone = pq.ParquetWriter(gone, schema, compression="zstd")

    def write(self, block: Block, keep: Mask) -> None:
        table = pa.Table.from_batches([next(self._batches)])
        self._out.write_table(table.filter(pa.array(keep)))
        self._gone.write_table(table.filter(pa.array(~keep)))

    def __exit__(self, *exception: object) -> None:
        self._out.close()
        self._gone.close()
        self._source.close()
