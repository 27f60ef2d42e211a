"""Augmentation of training rows by the copying steps of a recipe.

A copy has the group, the split and the origins of its row. It therefore never straddles the split, and revoking the
row or its source reaches it. Copies equal to a kept row or to an earlier copy become Drops, since ids are unique in a
Dataset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.curate.curation_outcome import SplitDecision
from sartor.curate.passes import Passes, PassState, Removed
from sartor.curate.recipe import CurateRecipe
from sartor.curate.shards import InheritedFields, Shard, ShardTask
from sartor.curate.step import AugmentStep, Removal
from sartor.curate.steps import makes_copies

EVIDENCE = pa.schema([("id", pa.string()), ("parent", pa.string()), ("step", pa.string()), ("changes", pa.string())])


@dataclass
class AugmentedShards:
    """Shards that hold copies, each with the step that made it.

    removed: copies that equal another row.
    """

    steps: list[AugmentStep] = field(default_factory=list)
    parts: list[tuple[AugmentStep, Shard]] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of copies made, including those that are Drops."""
        return sum(part.row_count + int(part.summary["dropped"]) for _, part in self.parts)

    def tables(self) -> Iterator[Any]:
        """Yield the kept copies, shard by shard, in the schema of `parquet_io.EXAMPLES`."""
        for _, part in self.parts:
            yield self._without_removed(part, part.table())

    def evidence(self) -> Any:
        """Return a table (id, parent, step, changes) with one row for each kept copy."""
        tables = [EVIDENCE.empty_table()]
        for step, part in self.parts:
            index = self._without_removed(part, part.index)
            kinds = pa.array([step.kind] * len(index), pa.string())
            tables.append(pa.table([index["id"], index["was"], kinds, index["changes"]], schema=EVIDENCE))
        return pa.concat_tables(tables)

    def facts(self) -> dict[str, dict[str, int]]:
        """Return the counts of each step: rows copied, copies made, and Drops among the copies."""
        result = {step.kind: {"rows": 0, "copies": 0, "dropped": 0} for step in self.steps}
        for step, part in self.parts:
            counts = result[step.kind]
            counts["rows"] += len(part.index["was"].unique())
            counts["copies"] += part.row_count + int(part.summary["dropped"])
            counts["dropped"] += int(part.summary["dropped"])
        for item in self.removed:
            result[item.step]["dropped"] += 1
        return result

    def _without_removed(self, part: Shard, table: Any) -> Any:
        removed_positions = {item.position for item in self.removed if item.part.path == part.path}
        if not removed_positions:
            return table
        kept_positions = [index for index in range(len(table)) if index not in removed_positions]
        return table.take(pa.array(kept_positions, pa.int64()))


def run_augmentation(
    passes: Passes, state: PassState, outcome: SplitDecision, recipe: CurateRecipe
) -> AugmentedShards:
    """Run the copying steps of a recipe over the training rows.

    Rows of rehearsal sources are copied only by steps with `rehearsal` set.
    """
    rehearsal = {source.path for source in recipe.sources if source.rehearsal}
    copies = AugmentedShards([step for step in recipe.steps if makes_copies(step)])
    for step in copies.steps:
        tasks = _tasks(state, outcome, step, excluded_sources=set() if step.rehearsal else rehearsal)
        copies.parts += [(step, part) for part in passes.copies(state, tasks)]
    if copies.steps:
        copies.removed = _equal(state, outcome, copies)
    return copies


def _tasks(state: PassState, outcome: SplitDecision, step: AugmentStep, excluded_sources: set[str]) -> list[ShardTask]:
    """Return a task for each shard, over its final training rows outside `excluded_sources`.

    The work directory (`folder`) is filled in when the tasks are run.
    """
    training_rows: list[dict[int, InheritedFields]] = [{} for _ in state.parts]
    sources = [part.index["source"].to_pylist() for part in state.parts]
    for row in outcome.kept_row_numbers():
        part_index, position = state.locate(row)
        if outcome.splits[row] == "train" and sources[part_index][position] not in excluded_sources:
            inherited = outcome.merged.get(row, InheritedFields((), "", ""))
            training_rows[part_index][position] = dataclasses.replace(
                inherited, split="train", group=outcome.groups[row]
            )
    return [
        ShardTask(
            part=part.path,
            key=part.summary["key"],
            folder=Path(),
            steps=(),
            sets=(),
            before=part.path,
            removed_positions=frozenset(range(part.row_count)) - rows.keys(),
            merged=rows,
            copying=(step,),
        )
        for part, rows in zip(state.parts, training_rows, strict=True)
    ]


def _equal(state: PassState, outcome: SplitDecision, copies: AugmentedShards) -> list[Removed]:
    """Return the copies whose content equals a kept row or an earlier copy."""
    ids = pa.chunked_array([chunk for part in state.parts for chunk in part.index["id"].chunks], pa.string())
    known_ids = set(ids.take(pa.array(list(outcome.kept_row_numbers()), pa.int64())).to_pylist())
    removed = []
    for step, part in copies.parts:
        parents = part.index["was"].to_pylist()
        for index, copy in enumerate(part.index["id"].to_pylist()):
            if copy in known_ids:
                detail = f"a copy of {parents[index]} with the same content"
                removed.append(
                    Removed(
                        part,
                        position=index,
                        removal=Removal(index, "exact_duplicate", detail, method="equal content"),
                        step=step.kind,
                        kept_id=copy,
                        pass_count=len(state.moves),
                        set_aside=False,
                    )
                )
            known_ids.add(copy)
    return removed
