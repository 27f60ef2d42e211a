"""Sketches of rows on disk: a 16-bit matrix, written row by row and usable after a kill.

    FOLDER/
      header.json      schema, ids' digest, numbers of a row, what the caller adds (seed, names of factors)
      ids.txt          id of each row's Example, in order
      sketches.f16     (N, K) fp16
      scales.f32       (N,) factor of each row; 0 for a row that is not written

A row's numbers are divided by the largest, since those of gradients lie far below fp16's least number. A row's factor
is written after its numbers, so a row that has one is whole. Everything is for its owner alone (trace_store.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import records
from sartor.core.errors import ArtifactError, MissingError
from sartor.core.filesystem import DISK_FULL, touch_private
from sartor.core.trace_store import read_trace_json, write_trace_file

SCHEMA = 1
HEADER, IDS, SKETCHES, SCALES = "header.json", "ids.txt", "sketches.f16", "scales.f32"
# rows that are widened to fp32 at once
PIECE_ROWS = 512
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class SketchMatrix:
    """Sketches of N rows, K numbers each, in a folder of the trace store.

    header: what `create` was given, beside schema and digest. ids: (N,) Example ids.
    """

    folder: Path
    header: dict[str, Any]
    ids: list[str]

    def __post_init__(self) -> None:
        count, size = len(self.ids), int(self.header["size"])
        for name, row_bytes in ((SKETCHES, 2 * size), (SCALES, 4)):  # a mapping would fill a short file up with zeros
            file, stated = self.folder / name, count * row_bytes
            found = file.stat().st_size if file.is_file() else 0
            if found != stated:
                raise ArtifactError(
                    f"the sketches in {self.folder} are damaged: {name} has {found:,} bytes of {stated:,}",
                    f"rm -r {self.folder}; they are computed again",
                )
        self._sketches: Any = np.memmap(self.folder / SKETCHES, np.float16, "r+", shape=(count, size))
        self._scales: Any = np.memmap(self.folder / SCALES, np.float32, "r+", shape=(count,))

    @classmethod
    def create(cls, folder: Path, ids: Sequence[str], size: int, fields: Mapping[str, Any]) -> SketchMatrix:
        """Create an empty matrix, or open the one that is there if it has the same rows and fields.

        size: numbers of a row, K, above 0. ids: (N,), at least one. fields: of the header, as JSON.
        Raises MissingError if the disk cannot hold it.
        """
        header = {"schema": SCHEMA, "size": size, "ids": records.digest(list(ids)), **fields}
        header = json.loads(json.dumps(header))
        if read_trace_json(folder / HEADER) == header:
            return cls(folder, header, list(ids))
        (folder / HEADER).unlink(missing_ok=True)  # so that no reader takes new numbers for old ones
        write_trace_file(folder / IDS, "".join(f"{id}\n" for id in ids).encode())
        for name, row_bytes in ((SKETCHES, 2 * size), (SCALES, 4)):
            _reserve(folder / name, len(ids) * row_bytes)
        write_trace_file(folder / HEADER, json.dumps(header).encode())
        return cls(folder, header, list(ids))

    @classmethod
    def open(cls, folder: Path) -> SketchMatrix | None:
        """Return the matrix in a folder; None if there is none. Raises ArtifactError if it is damaged."""
        header = read_trace_json(folder / HEADER)
        if header is None:
            return None
        remedy = f"rm -r {folder}; it is computed again"
        if header.get("schema") != SCHEMA:
            raise ArtifactError(f"{folder} has the schema {header.get('schema')}, not {SCHEMA}", remedy)
        try:
            ids = (folder / IDS).read_text(encoding="utf-8").splitlines()
            if records.digest(ids) != header["ids"]:
                raise ValueError("its rows are not those of its header")
            return cls(folder, header, ids)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"the sketches in {folder} are damaged: {error}", remedy) from None

    @property
    def size(self) -> int:
        """Numbers of a row, K."""
        return int(self.header["size"])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return 2 * self.size + 4

    def written(self) -> Array:
        """Return (N,) booleans: whether each row is written."""
        return np.asarray(self._scales > 0)

    def write(self, indices: Sequence[int], values: Array) -> None:
        """Write rows, then mark them as written. indices: (n,). values: (n, K) finite numbers."""
        values = np.asarray(values, np.float32)
        largest = np.abs(values).max(1)
        scales = np.where(largest > 0, largest, 1.0).astype(np.float32)
        self._sketches[indices] = (values / scales[:, None]).astype(np.float16)
        self._scales[indices] = scales

    def flush(self) -> None:
        """Make the written rows survive a power cut, their numbers before their factors."""
        self._sketches.flush()
        self._scales.flush()

    def add(self, indices: Sequence[int], values: Array) -> None:
        """Add to rows; one that is not written counts as 0. indices: (n,), each once. values: (n, K)."""
        self.write(indices, self.read(indices) + np.asarray(values, np.float32))

    def read(self, indices: Sequence[int] | slice) -> Array:
        """Return rows, (n, K) fp32; zeros for those that are not written."""
        return np.asarray(self._sketches[indices], np.float32) * self._scales[indices][:, None]

    @property
    def is_removed(self) -> bool:
        """Whether the folder was removed since it was opened, by an erasure or by hand."""
        return not (self.folder / HEADER).is_file()

    def pieces(self) -> Iterator[tuple[slice, Array]]:
        """Yield consecutive rows as (slice, (n, K) fp32), at most PIECE_ROWS at once."""
        for start in range(0, len(self.ids), PIECE_ROWS):
            piece = slice(start, min(start + PIECE_ROWS, len(self.ids)))
            yield piece, self.read(piece)


def _reserve(file: Path, size_bytes: int) -> None:
    """Create a file of zeros and reserve its blocks: a mapped write to a full disk would end the process."""
    file.unlink(missing_ok=True)
    touch_private(file)
    try:
        with file.open("r+b") as stream:
            stream.truncate(size_bytes)
            if hasattr(os, "posix_fallocate") and size_bytes:
                os.posix_fallocate(stream.fileno(), 0, size_bytes)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        file.unlink(missing_ok=True)
        raise MissingError(
            f"the disk is full: {size_bytes:,} bytes of sketches do not fit into {file.parent}",
            f"df -h {file.parent} shows the disk: remove something there, or set SARTOR_HOME to another one",
        ) from error
