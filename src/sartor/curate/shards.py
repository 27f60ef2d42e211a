"""Shard of rows: its task, its worker and its files.

A ShardTask is all that a worker needs, on this machine or on another that sees the same paths. The worker writes a
Shard and returns only the summary.

    part.json         key, rows read and kept, tallies: the summary that the pipeline uses
    examples.parquet  the remaining rows
    drops.parquet     the dropped rows
    index.arrow       for each remaining row: id, source, locator, split, groups, changes
    sketch-N.arrow    columns that the N-th SetStep of the pass needs of each row

The key is a digest of everything that the content depends on: the input's sha256, the steps with their options, and
the removals before. A shard with the expected key is therefore what a worker would make again, so an interrupted run
resumes from it.
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core import parquet_io
from sartor.core.filesystem import create_directory_atomic
from sartor.core.records import Drop, Example, Origin, drop_of
from sartor.core.splits import prompt_group
from sartor.curate.sources.chunk_reader import InputChunk, read_chunk
from sartor.curate.sources.types import SourceOptions
from sartor.curate.step import AugmentedRow, AugmentStep, Counting, RowFunction, RowStep, SetStep

INDEX = pa.schema(
    [
        ("id", pa.string()),
        ("was", pa.string()),  # the id in the shard before, if a step changed it; else empty
        ("source", pa.string()),
        ("locator", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("own_group", pa.string()),
        ("changes", pa.string()),  # for a copy that an AugmentStep made from `was`: its change; else empty
    ]
)


@dataclass(frozen=True)
class Shard:
    """A finished shard. summary: the content of its part.json."""

    path: Path
    summary: dict[str, Any]

    @property
    def row_count(self) -> int:
        """Number of remaining rows."""
        return int(self.summary["kept"])

    @cached_property
    def index(self) -> Any:
        """The Arrow table of INDEX, memory-mapped."""
        return read_arrow(self.path / "index.arrow")

    def sketch(self, step_index: int) -> Any:
        """Return the Arrow table of the sketch with that index, memory-mapped."""
        return read_arrow(self.path / f"sketch-{step_index}.arrow")

    def table(self, columns: list[str] | None = None) -> Any:
        """Return the rows as an Arrow table in the schema of `parquet_io.EXAMPLES`, or some of its columns."""
        return pq.read_table(self.path / "examples.parquet", columns=columns)

    def examples(self) -> Iterator[Example]:
        """Yield the rows as Examples, in order."""
        with pq.ParquetFile(self.path / "examples.parquet") as file:
            for batch in file.iter_batches(1024):
                yield from map(parquet_io.example_of, batch.to_pylist())


def read_arrow(file: Path) -> Any:
    """Return an Arrow IPC file as a memory-mapped table; columns are read from disk on access."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def write_arrow(file: Path, tables: Iterable[Any], schema: Any) -> Any:
    """Write tables one after another to an Arrow IPC file; return it as `read_arrow` does."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return read_arrow(file)


def find_shard(path: Path, key: str) -> Shard | None:
    """Return the shard at `path` if it is complete and has that key, else None.

    Complete means that every file has the size recorded in part.json.
    """
    try:
        summary = json.loads((path / "part.json").read_text(encoding="utf-8"))
        sizes = {name: (path / name).stat().st_size for name in summary["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Shard(path, summary) if summary.get("key") == key and sizes == summary["files"] else None


def write_shard(path: Path, key: str, fill: Callable[[Path], dict[str, Any]]) -> Shard:
    """Make the shard at `path`, whole or not at all.

    fill: fills the directory that it gets and returns the summary.
    """
    with create_directory_atomic(path, replace=True) as temporary:
        summary = fill(temporary)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        summary = {"key": key, **summary, "files": files}
        (temporary / "part.json").write_text(json.dumps(summary), encoding="utf-8")
    return Shard(path, summary)


BATCH_ROWS = 1024


@dataclass(frozen=True)
class InheritedFields:
    """Fields that a row takes over from removed rows of equal content."""

    origins: tuple[Origin, ...]
    split: str
    group: str


@dataclass(frozen=True)
class ShardTask:
    """One piece of one pass.

    unit, source: the input of a task of the first pass.
    before: the input shard of a task of a later pass.
    removed_positions, merged: by position in `before`.
    copying: at most one AugmentStep. With it the shard holds the copies and not the rows.
    """

    part: Path
    key: str
    folder: Path  # the work directory: media paths are relative to it
    steps: tuple[RowStep, ...]
    sets: tuple[SetStep, ...]
    unit: InputChunk | None = None
    source: SourceOptions | None = None
    strict: bool = False
    before: Path | None = None
    removed_positions: frozenset[int] = frozenset()
    merged: Mapping[int, InheritedFields] = field(default_factory=dict)
    copying: tuple[AugmentStep, ...] = ()


def execute(task: ShardTask) -> dict[str, Any]:
    """Make the shard of a task unless it exists; return its summary with `was_there`.

    Raises the errors of steps and readers.
    """
    if shard := find_shard(task.part, task.key):
        return {**shard.summary, "was_there": True}
    began = time.monotonic()

    def fill(folder: Path) -> dict[str, Any]:
        run = _TaskRun(task)
        _write(run, folder)
        summary = run.summary()
        return {**summary, "wall_s": round(time.monotonic() - began, 3)}

    return {**write_shard(task.part, task.key, fill).summary, "was_there": False}


@functools.lru_cache(maxsize=32)
def _open_step(step: Any, folder: Path) -> Any:
    """Open a step once per process, since opening may load a model."""
    return step.open(folder)


class SteppedRow(NamedTuple):
    """A row that passed all steps.

    was: the id before the steps, if they changed it.
    changes: description of the change, for a copy.
    """

    row: Example
    was: str = ""
    changes: str = ""


class _TaskRun:
    """Rows of one task on their way through its steps. Dropped rows are collected in `drops`."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.functions: list[tuple[str, RowFunction]] = [
            (step.kind, _open_step(step, task.folder))  # type: ignore[arg-type]
            for step in task.steps
        ]
        self.counting = {kind: function for kind, function in self.functions if isinstance(function, Counting)}
        for function in self.counting.values():
            function.tally.clear()
        self.drops: list[Drop] = []
        self.read: Counter[str] = Counter()
        self.notes: Counter[tuple[str, str]] = Counter()
        self.row_count = 0

    def rows(self) -> Iterator[SteppedRow]:
        """Yield the rows that passed every step, or the copies made from them."""
        for row in self._incoming():
            for outcome in self._outcomes(row):
                if isinstance(outcome, Drop):
                    self.drops.append(outcome)
                    continue
                self.row_count += 1
                if isinstance(outcome, AugmentedRow):
                    yield SteppedRow(outcome.row, row.id, outcome.changes)
                else:
                    yield SteppedRow(outcome, "" if outcome.id == row.id else row.id)

    def _outcomes(self, row: Example) -> Iterator[Example | AugmentedRow | Drop]:
        if not self.task.copying:
            yield apply_steps(row, self.functions)
        for step in self.task.copying:
            yield from _open_step(step, self.task.folder)(row)  # type: ignore[arg-type]

    def _incoming(self) -> Iterator[Example]:
        task = self.task
        if task.before is not None:
            for position, row in enumerate(Shard(task.before, {}).examples()):
                if position not in task.removed_positions:
                    inherited = task.merged.get(position)
                    yield with_inherited(row, inherited) if inherited else row
            return
        assert task.unit is not None and task.source is not None
        for item in read_chunk(
            task.unit, task.source, media_folder=task.folder / "media", strict=task.strict, notes=self.notes
        ):
            locator = item.locator if isinstance(item, Drop) else item.origins[0].locator
            self.read[locator.rpartition(":")[0]] += 1
            item = item if isinstance(item, Drop) else _in_its_split(item, task.source)
            if isinstance(item, Drop):
                self.drops.append(item)
            else:
                yield item

    def summary(self) -> dict[str, Any]:
        """Return the counts that the pipeline needs of the shard."""
        tally = {kind: dict(function.tally) for kind, function in self.counting.items()}
        notes = [[*note, count] for note, count in self.notes.items()]
        return {
            "read": dict(self.read),
            "notes": notes,
            "kept": self.row_count,
            "dropped": len(self.drops),
            "tally": tally,
        }


def _in_its_split(row: Example, source: SourceOptions) -> Example | Drop:
    """Return the row with the split declared for its source.

    A synthetic row is used for training only, since held out it would pass for real data. It is dropped if its source
    is declared as eval.
    """
    if not row.is_synthetic:
        # replace() would discard the cached id, so it is called only if the split changes
        return replace(row, split=source.split) if source.split else row
    if source.split == "eval":
        return drop_of(row, "synthetic_held_out", "a synthetic row is no reality to be measured on", step="split")
    return replace(row, split="train")


def apply_steps(row: Example, functions: Sequence[tuple[str, RowFunction]]) -> Example | Drop:
    """Return the row after all steps, or the Drop of the first step that drops it.

    `steps` of the row lists the steps that changed its id.
    """
    for kind, function in functions:
        outcome = function(row)
        if isinstance(outcome, Drop):
            return outcome
        if outcome is not row and outcome.id != row.id:
            outcome = replace(outcome, steps=(*row.steps, kind))
        row = outcome
    return row


def with_inherited(row: Example, inherited: InheritedFields) -> Example:
    """Return the row with its equals' origins and the merged split and group."""
    return replace(row, origins=row.origins + inherited.origins, split=inherited.split, group=inherited.group)


def _write(run: _TaskRun, folder: Path) -> None:
    rows, sets = run.rows(), run.task.sets
    with ExitStack() as stack:
        writer = stack.enter_context(
            pq.ParquetWriter(folder / "examples.parquet", parquet_io.EXAMPLES, compression="zstd")
        )
        index = _arrow(stack, folder / "index.arrow", INDEX)
        files: list[Any] = []
        while True:
            stepped_rows = list(islice(rows, BATCH_ROWS))
            batch = [item.row for item in stepped_rows]
            tables = [step.sketch(batch, run.task.folder) for step in sets]
            files = files or [
                _arrow(stack, folder / f"sketch-{n}.arrow", table.schema) for n, table in enumerate(tables)
            ]
            if batch:
                writer.write_table(parquet_io.examples_table(batch))
                index.write_table(index_table(stepped_rows))
                for file, table in zip(files, tables, strict=True):
                    file.write_table(table)
            if len(batch) < BATCH_ROWS:
                break
    parquet_io.write_drops(folder / "drops.parquet", run.drops)


def _arrow(stack: ExitStack, file: Path, schema: Any) -> Any:
    return stack.enter_context(pa.ipc.new_file(stack.enter_context(pa.OSFile(str(file), "wb")), schema))


def index_table(stepped_rows: Sequence[SteppedRow]) -> Any:
    """Return the columns of `INDEX`.

    group: the row's prompt group (a document: its id).
    own_group: the group that the row itself states; may be empty.
    """
    batch = [item.row for item in stepped_rows]
    return pa.table(
        {
            "id": [row.id for row in batch],
            "was": [item.was for item in stepped_rows],
            "source": [row.origins[0].source for row in batch],
            "locator": [row.origins[0].locator for row in batch],
            "split": [row.split for row in batch],
            "group": [prompt_group(row) for row in batch],
            "own_group": [row.group for row in batch],
            "changes": [item.changes for item in stepped_rows],
        },
        schema=INDEX,
    )
