"""One shard of rows: its task, worker and files.

A Task is all that a worker needs, on this machine or on another that sees the same paths; it writes a Part and hands
back only the summary.

    part.json         key, rows read and kept, tallies: the summary that the pipeline goes on with
    examples.parquet  the rows that are still in
    drops.parquet     those that are not
    index.arrow       of each row still in: id, source, locator, split, groups, changes
    sketch-N.arrow    what the N-th SetStep of the pass wants to know of each row

The key is the digest of everything that the content follows from (the input's sha256, the steps and their options, the
verdicts before), so a part that stands under its key is what a worker would make again: an interrupted run goes on
there.
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
class Shard:
    """A part that stands. `summary` is its part.json."""

    path: Path
    summary: dict[str, Any]

    @property
    def row_count(self) -> int:
        """Rows that are still in."""
        return int(self.summary["kept"])

    @cached_property
    def index(self) -> Any:
        """The Arrow table of INDEX, memory-mapped."""
        return read_arrow(self.path / "index.arrow")

    def sketch(self, step_index: int) -> Any:
        """The Arrow table of the sketch at that place, memory-mapped."""
        return read_arrow(self.path / f"sketch-{step_index}.arrow")

    def table(self, columns: list[str] | None = None) -> Any:
        """The rows as an Arrow table in the schema of `parquet_io.EXAMPLES`, or some of its columns."""
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


def find_shard(path: Path, key: str) -> Shard | None:
    """The part at `path` if it is whole and was made under that key."""
    try:
        summary = json.loads((path / "part.json").read_text(encoding="utf-8"))
        sizes = {name: (path / name).stat().st_size for name in summary["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Shard(path, summary) if summary.get("key") == key and sizes == summary["files"] else None


def write_shard(path: Path, key: str, fill: Callable[[Path], dict[str, Any]]) -> Shard:
    """Make the part at `path`, whole or not at all. `fill` fills the directory it gets and returns the summary."""
    with create_directory_atomic(path, replace=True) as temporary:
        summary = fill(temporary)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        summary = {"key": key, **summary, "files": files}
        (temporary / "part.json").write_text(json.dumps(summary), encoding="utf-8")
    return Shard(path, summary)


BATCH_ROWS = 1024


@dataclass(frozen=True)
class InheritedFields:
    """What a row takes over from rows of equal content that were removed."""

    origins: tuple[Origin, ...]
    split: str
    group: str


@dataclass(frozen=True)
class ShardTask:
    """One piece of one pass. Of the first pass `unit` and `source` say what to read, of a later one `before` is the
    part.

    removed_positions, merged: by position in `before`. With `copying`, one CopyStep or none, the part holds the copies
    and not the rows.
    """

    part: Path
    key: str
    folder: Path  # of the whole work: media paths are relative to it
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
    """Make the Part of a task, or find it standing; returns its summary and `was_there`. Raises what steps and readers
    do.
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
    """A step's function, once per process: opening may read a model."""
    return step.open(folder)


class SteppedRow(NamedTuple):
    """A row that came through. `was`: the id that it came with if that is another. `changes`: of a copy, what is
    changed.
    """

    row: Example
    was: str = ""
    changes: str = ""


class _TaskRun:
    """The rows of a task on their way through its steps; what falls off is kept beside."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.functions: list[tuple[str, RowFunction]] = [
            (step.kind, _open_step(step, task.folder)) for step in task.steps
        ]  # type: ignore[arg-type]
        self.counting = {kind: function for kind, function in self.functions if isinstance(function, Counting)}
        for function in self.counting.values():
            function.tally.clear()
        self.drops: list[Drop] = []
        self.read: Counter[str] = Counter()
        self.notes: Counter[tuple[str, str]] = Counter()
        self.row_count = 0

    def rows(self) -> Iterator[SteppedRow]:
        """Rows that came through every step, or the copies of them."""
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
        for item in read_chunk(task.unit, task.source, task.folder / "media", task.strict, self.notes):
            locator = item.locator if isinstance(item, Drop) else item.origins[0].locator
            self.read[locator.rpartition(":")[0]] += 1
            item = item if isinstance(item, Drop) else _in_its_split(item, task.source)
            if isinstance(item, Drop):
                self.drops.append(item)
            else:
                yield item

    def summary(self) -> dict[str, Any]:
        """What the pipeline needs to know of the part."""
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
    """The row in the split that is declared for it. What a machine made is for training alone, whatever is declared:
    held out it would pass for reality.
    """
    if not row.is_synthetic:
        # replace() forgets the id that was computed
        return replace(row, split=source.split) if source.split else row
    if source.split == "eval":
        return drop_of(row, "synthetic_held_out", "a synthetic row is no reality to be measured on", step="split")
    return replace(row, split="train")


def apply_steps(row: Example, functions: Sequence[tuple[str, RowFunction]]) -> Example | Drop:
    """The row after each step in turn, or the Drop of the first that drops it; `steps` notes those that changed it."""
    for kind, function in functions:
        outcome = function(row)
        if isinstance(outcome, Drop):
            return outcome
        if outcome is not row and outcome.id != row.id:
            outcome = replace(outcome, steps=(*row.steps, kind))
        row = outcome
    return row


def with_inherited(row: Example, inherited: InheritedFields) -> Example:
    """The row with the origins of its equals. Of two splits eval wins, so that no held-out row is trained on."""
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
    """The columns of `INDEX`. `group` is what may not straddle the split if the recipe splits by group: the row's own
    group, or where it has none its prompt (a document: itself); `own_group` is the row's own, perhaps empty.
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
