"""Passes of a curation: row steps and set steps, executed pass by pass.

Row steps run in the workers. The SetSteps that follow them decide in this process.

A pass reads the output of the pass before; the first reads the sources. It applies the removals that are still open,
runs its row steps, and sketches the rows for each SetStep that ends it. The removals of the last pass are left open:
writing the Dataset applies them without making an Example of every row again.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from sartor.core import config, parquet_io
from sartor.core.filesystem import file_digest
from sartor.core.records import Example, digest
from sartor.curate import shards
from sartor.curate.shards import InheritedFields, Shard, ShardTask
from sartor.curate.step import ReadsFiles, Removal, RowStep, SetStep, StepInput, StepResult
from sartor.curate.steps import needs_all_rows
from sartor.curate.steps.text_duplicates import ExactDuplicates

Run = Callable[[str, Sequence[ShardTask]], list[Shard]]
# Increased when workers make different shards from the same input; shards of older versions are then made again.
FORMAT = 4
GUARDS = ("allow", "max_fraction", "max_source_fraction")


@dataclass(frozen=True)
class Removed:
    """A Removal as recorded in the drops: position of the removed row, and id of the row kept instead.

    pass_count: number of passes done when `kept_id` was read; `moved_ids` needs it.
    """

    part: Shard
    position: int
    removal: Removal
    step: str
    kept_id: str
    pass_count: int
    set_aside: bool


@dataclass
class PassState:
    """Current state of the rows: the shards of the last pass, and the removals not yet applied to them."""

    parts: list[Shard]
    starts: list[int] = field(
        default_factory=list
    )  # row number at which each shard starts; the last entry is the number of rows
    open_removals: dict[int, Removal] = field(default_factory=dict)
    merged_rows: dict[int, list[int]] = field(default_factory=dict)  # kept row -> removed rows of equal content
    then: list[RowStep] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    drops: list[Path] = field(default_factory=list)  # drops.parquet of every shard of every pass
    evidence: dict[str, Any] = field(default_factory=dict)
    moves: list[Any] = field(
        default_factory=list
    )  # one table for each pass: (was, id) of the rows whose id it changed
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.set_parts(self.parts)

    def set_parts(self, parts: list[Shard]) -> None:
        """Set the shards that hold the rows now; no removal on them is open."""
        self.parts, self.starts = parts, list(itertools.accumulate((part.row_count for part in parts), initial=0))
        self.open_removals, self.merged_rows, self.then = {}, {}, []
        self.drops += [part.path / "drops.parquet" for part in parts]
        changed = [part.index.filter(pc.not_equal(part.index["was"], "")).select(["was", "id"]) for part in parts]
        self.moves.append(pl.concat([pl.DataFrame(table) for table in changed]))

    def locate(self, row: int) -> tuple[int, int]:
        """Return the shard index of a row and its position in that shard."""
        part_index = bisect.bisect_right(self.starts, row) - 1
        return part_index, row - self.starts[part_index]


class Passes:
    """Executor of steps, pass by pass.

    folder: the work directory.
    run: executes named tasks on an engine and returns their shards.
    """

    def __init__(self, folder: Path, run: Run, workers: int, notice: Callable[[str], None]) -> None:
        self.folder, self.run, self.workers, self.notice = folder, run, workers, notice
        self.number = 0

    def first(self, tasks: Sequence[ShardTask], steps: Sequence[Any]) -> PassState:
        """Run all steps, starting from tasks that read the sources."""
        row_steps, sets, remaining_steps = split(steps)
        state = PassState(self._execute([dataclasses.replace(task, steps=row_steps, sets=sets) for task in tasks]))
        remaining_steps = self._decide(state, sets) + remaining_steps
        while remaining_steps or state.then:
            row_steps, sets, remaining_steps = split(remaining_steps)
            self._run_next_pass(state, (*state.then, *row_steps), sets)
            remaining_steps = self._decide(state, sets) + remaining_steps
        return state

    def copies(self, state: PassState, tasks: Sequence[ShardTask]) -> list[Shard]:
        """Run tasks that copy rows of the last pass; return their shards.

        The copies do not become rows of `state`. Copies that could not be made are added to its drops.
        """
        result = self._execute(tasks)
        state.drops += [part.path / "drops.parquet" for part in result]
        return result

    def _execute(self, tasks: Sequence[ShardTask]) -> list[Shard]:
        steps: list[list[dict[str, Any]]] = []
        if tasks:
            for group in (tasks[0].steps, tasks[0].sets, tasks[0].copying):
                steps.append([_step_options(step) for step in group])
        self.number += 1
        keyed_tasks = []
        for number, task in enumerate(tasks):
            merged = [(position, config.dump(inherited)) for position, inherited in sorted(task.merged.items())]
            key = digest([FORMAT, task.key, steps, sorted(task.removed_positions), merged])
            part = self.folder / f"pass-{self.number}" / f"{number:06d}"
            keyed_tasks.append(dataclasses.replace(task, key=key, part=part, folder=self.folder))
        return self.run(f"pass {self.number}", keyed_tasks)

    def _run_next_pass(self, state: PassState, row_steps: tuple[RowStep, ...], sets: tuple[SetStep, ...]) -> None:
        """Apply the open removals and run the next row steps, in the workers."""
        removed: dict[int, set[int]] = {}
        for row in state.open_removals:
            part_index, position = state.locate(row)
            removed.setdefault(part_index, set()).add(position)
        merged: dict[int, dict[int, InheritedFields]] = {}
        for row, inherited in inherited_fields(state).items():
            part_index, position = state.locate(row)
            merged.setdefault(part_index, {})[position] = inherited
        tasks = [
            ShardTask(
                part=part.path,
                key=part.summary["key"],
                folder=self.folder,
                steps=row_steps,
                sets=sets,
                before=part.path,
                removed_positions=frozenset(removed.get(number, ())),
                merged=merged.get(number, {}),
            )
            for number, part in enumerate(state.parts)
        ]
        state.set_parts(self._execute(tasks))

    def _decide(self, state: PassState, sets: tuple[SetStep, ...]) -> list[Any]:
        """Let each SetStep decide; return the steps that must see the rows again.

        These are the steps after the first one whose result asks for a row step (`then`).
        """
        for index, step in enumerate(sets):
            remaining_rows, table = self._remaining_rows(state, index)
            verdicts = step.decide(self._step_input(state, remaining_rows, table))
            record(state, step, remaining_rows, verdicts)
            if verdicts.then is not None:
                state.then.append(verdicts.then)
                return list(sets[index + 1 :])
        return []

    def _remaining_rows(self, state: PassState, step_index: int) -> tuple[Sequence[int], Any]:
        """Return the numbers of the rows that no open removal removes, and their sketch joined to the index."""
        table = pa.concat_tables(hstack_tables(part.index, part.sketch(step_index)) for part in state.parts)
        if not state.open_removals:
            return range(len(table)), table
        remaining_rows = [row for row in range(len(table)) if row not in state.open_removals]
        # written to disk and memory-mapped: a copy of the sketches in memory could be as large as all rows
        chunks = (
            table.take(pa.array(remaining_rows[start : start + 65536]))
            for start in range(0, max(len(remaining_rows), 1), 65536)
        )
        return remaining_rows, shards.write_arrow(
            self.folder / f"living-{self.number}-{step_index}.arrow", chunks, table.schema
        )

    def _step_input(self, state: PassState, remaining_rows: Sequence[int], table: Any) -> StepInput:
        encoded = pc.dictionary_encode(table["source"]).combine_chunks()
        encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) and encoded.num_chunks else encoded
        names = encoded.dictionary.to_pylist() if len(table) else []
        numbers = encoded.indices if len(table) else pa.array([], pa.int32())
        table = table.set_column(table.schema.get_field_index("source"), "source", pa.chunked_array([numbers]))

        def fetch(rows: Sequence[int]) -> list[Example]:
            return examples_of(state, [remaining_rows[row] for row in rows])

        return StepInput(table, names, examples=fetch, folder=self.folder, workers=self.workers, notice=self.notice)


def _step_options(step: Any) -> dict[str, Any]:
    """Return the options that the content of a shard depends on.

    Guards are left out, so that a run stopped by a guard can resume after the guard is changed.
    """
    fields = {name: value for name, value in config.dump(step).items() if name not in GUARDS}
    if isinstance(step, ReadsFiles):
        fields["files"] = [file_digest(file) for file in step.files()]
    return fields


def split(steps: Sequence[Any]) -> tuple[tuple[RowStep, ...], tuple[SetStep, ...], list[Any]]:
    """Return (leading row steps, the SetSteps after them, the rest)."""
    row_steps = tuple(itertools.takewhile(lambda step: not needs_all_rows(step), steps))
    sets = tuple(itertools.takewhile(needs_all_rows, steps[len(row_steps) :]))
    return row_steps, sets, list(steps[len(row_steps) + len(sets) :])


def with_final_dedup(steps: Sequence[Any]) -> list[Any]:
    """Return the steps, with `exact_duplicates` appended if equal rows could remain.

    Ids are unique in a Dataset.
    """
    last = max((index for index, step in enumerate(steps) if isinstance(step, ExactDuplicates)), default=-1)
    unique = last >= 0 and all(needs_all_rows(step) for step in steps[last:])
    return list(steps) if unique else [*steps, ExactDuplicates()]


def hstack_tables(index: Any, sketch: Any) -> Any:
    """Return one table with the columns of both."""
    for name in sketch.column_names:
        index = index.append_column(name, sketch[name])
    return index


def record(state: PassState, step: SetStep, remaining_rows: Sequence[int], verdicts: StepResult) -> None:
    """Add the result of a SetStep to the state. Its row numbers index `remaining_rows`."""
    ids = RowIds(state)
    for removal in verdicts.removals:
        row = remaining_rows[removal.row]
        kept_row = remaining_rows[removal.kept_row] if removal.kept_row >= 0 else -1
        assert row not in state.open_removals and kept_row != row, removal
        part_index, position = state.locate(row)
        state.open_removals[row] = removal
        kept_id = ids[kept_row] if kept_row >= 0 else ""
        state.removed.append(
            Removed(
                state.parts[part_index],
                position,
                removal=removal,
                step=step.kind,
                kept_id=kept_id,
                pass_count=len(state.moves),
                set_aside=verdicts.set_aside,
            )
        )
        if removal.merge:
            state.merged_rows.setdefault(kept_row, []).extend([row, *state.merged_rows.pop(row, [])])
    state.evidence.update({name: (len(state.moves), table) for name, table in verdicts.evidence.items()})
    if verdicts.facts:
        state.facts[step.kind] = verdicts.facts


class RowIds:
    """Ids of the rows by row number."""

    def __init__(self, state: PassState) -> None:
        self._columns = [part.index["id"] for part in state.parts]
        self._state = state

    def __getitem__(self, row: int) -> str:
        part_index, position = self._state.locate(row)
        return str(self._columns[part_index][position].as_py())


def inherited_fields(state: PassState) -> dict[int, InheritedFields]:
    """Return kept row -> fields merged from the removed rows that equal it.

    Origins: those of the equals, in reading order. Split: "eval" if any has it. Group: the row's own before that of an
    equal.
    """
    row_numbers = sorted({row for kept_row, others in state.merged_rows.items() for row in (kept_row, *others)})
    columns = ["origins", "split", "group"]
    fields_by_row = dict(
        zip(row_numbers, take_rows(state.parts, map(state.locate, row_numbers), columns), strict=True)
    )
    result = {}
    for kept_row, others in state.merged_rows.items():
        equal_rows = [fields_by_row[row] for row in (kept_row, *sorted(others))]
        origins = tuple(origin for row in equal_rows[1:] for origin in map(parquet_io.origin_of, row["origins"]))
        splits = [row["split"] for row in equal_rows if row["split"]]
        split_name = "eval" if "eval" in splits else next(iter(splits), "")
        result[kept_row] = InheritedFields(
            origins, split_name, next((row["group"] for row in equal_rows if row["group"]), "")
        )
    return result


ID_COLUMNS = ("id", "a", "b")


def evidence_of(state: PassState) -> Iterator[tuple[str, Any]]:
    """Yield (name, Arrow table) of the steps' evidence, with the final ids of the rows."""
    for name, (pass_count, table) in state.evidence.items():
        ids: list[str] = []
        rewritten(table, ID_COLUMNS, ids.append)
        last_ids = dict(zip(ids, moved_ids(state, pass_count, ids), strict=True))
        yield name, rewritten(table, ID_COLUMNS, last_ids.__getitem__)


def rewritten(table: Any, names: Container[str], change: Callable[[str], Any]) -> Any:
    """Return an Arrow table with `change` applied to the texts of columns and nested fields in `names`."""

    def inside(value: Any) -> Any:
        if isinstance(value, list):
            return [inside(item) for item in value]
        if isinstance(value, dict):
            return {
                name: change(inner) if isinstance(inner, str) and name in names else inside(inner)
                for name, inner in value.items()
            }
        return value

    for index, column in enumerate(table.schema):
        is_named = column.type == pa.string() and column.name in names
        if is_named or pa.types.is_nested(column.type):
            change_value = change if is_named else inside
            values = table[column.name].to_pylist()
            changed = [None if value is None else change_value(value) for value in values]
            if not all(value is None for value in changed):
                table = table.set_column(index, column, pa.array(changed, column.type))
    return table


def moved_ids(state: PassState, pass_count: int, ids: Sequence[str]) -> list[str]:
    """Return the final ids of rows, given their ids after `pass_count` passes."""
    frame = pl.DataFrame({"id": ids}, schema={"id": pl.String})
    for moves in state.moves[pass_count:]:
        joined = frame.join(
            moves.rename({"id": "now"}).unique("was"), left_on="id", right_on="was", how="left", maintain_order="left"
        )
        frame = joined.select(pl.coalesce("now", "id").alias("id"))
    return frame["id"].to_list()


def take_rows(
    parts: Sequence[Shard], wanted: Iterable[tuple[int, int]], columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield rows by (shard index, position), in the order wanted.

    A run of consecutive rows from one shard reads that shard once.
    """
    for part_index, run in itertools.groupby(wanted, lambda item: item[0]):
        positions = pa.array([position for _, position in run], pa.int64())
        yield from parts[part_index].table(columns).take(positions).to_pylist()


def examples_of(state: PassState, wanted: Sequence[int]) -> list[Example]:
    """Return the Examples with these row numbers, in the order given."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    rows = take_rows(state.parts, (state.locate(wanted[index]) for index in order))
    examples = {index: parquet_io.example_of(row) for index, row in zip(order, rows, strict=True)}
    return [examples[index] for index in range(len(wanted))]
