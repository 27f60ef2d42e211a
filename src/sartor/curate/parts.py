"""Parts: what one worker made of one piece of the rows, a directory that is whole or absent.

    part.json         key, rows read and kept, tallies: the summary that the pipeline goes on with
    examples.parquet  the rows that are still in
    drops.parquet     those that are not
    index.arrow       of each row still in: id, source, locator, split, groups, changes
    sketch-N.arrow    what the N-th SetStep of the pass wants to know of each row

The key is the digest of everything that the content follows from (the input's sha256, the steps and their options, the
verdicts before), so a part that stands under its key is what a worker would make again: an interrupted run goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core import parquet_io
from sartor.core.filesystem import create_directory_atomic
from sartor.core.records import Example

INDEX = pa.schema(
    [
        ("id", pa.string()),
        ("was", pa.string()),  # the id in the part before, where a step changed it; else empty
        ("source", pa.string()),
        ("locator", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("own_group", pa.string()),
        ("changes", pa.string()),  # of a row that a CopyStep made of `was`, what is changed in it; else empty
    ]
)


@dataclass(frozen=True)
class Part:
    """A part that stands. `summary` is its part.json."""

    path: Path
    summary: dict[str, Any]

    @property
    def kept(self) -> int:
        """Rows that are still in."""
        return int(self.summary["kept"])

    @cached_property
    def index(self) -> Any:
        """The Arrow table of INDEX, memory-mapped."""
        return read_arrow(self.path / "index.arrow")

    def sketch(self, place: int) -> Any:
        """The Arrow table of the sketch at that place, memory-mapped."""
        return read_arrow(self.path / f"sketch-{place}.arrow")

    def table(self, columns: list[str] | None = None) -> Any:
        """The rows as an Arrow table in the schema of `rows.EXAMPLES`, or some of its columns."""
        return pq.read_table(self.path / "examples.parquet", columns=columns)

    def examples(self) -> Iterator[Example]:
        """The rows, in order."""
        with pq.ParquetFile(self.path / "examples.parquet") as file:
            for batch in file.iter_batches(1024):
                yield from map(parquet_io.example_of, batch.to_pylist())


def read_arrow(file: Path) -> Any:
    """An Arrow IPC file as a table whose columns stay on disk until they are read."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def write_arrow(file: Path, tables: Iterable[Any], schema: Any) -> Any:
    """Write tables one after another into an Arrow IPC file; returns it as `read_arrow` does."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return read_arrow(file)


def find(path: Path, key: str) -> Part | None:
    """The part at `path` if it is whole and was made under that key."""
    try:
        summary = json.loads((path / "part.json").read_text(encoding="utf-8"))
        sizes = {name: (path / name).stat().st_size for name in summary["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Part(path, summary) if summary.get("key") == key and sizes == summary["files"] else None


def write(path: Path, key: str, fill: Callable[[Path], dict[str, Any]]) -> Part:
    """Make the part at `path`, whole or not at all. `fill` fills the directory it gets and returns the summary."""
    with create_directory_atomic(path, replace=True) as temporary:
        summary = fill(temporary)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        summary = {"key": key, **summary, "files": files}
        (temporary / "part.json").write_text(json.dumps(summary), encoding="utf-8")
    return Part(path, summary)
