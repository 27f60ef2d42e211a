"""Last verdicts, the split and the tables that follow from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core import parquet_io
from sartor.core.records import Drop, Example, drop_of
from sartor.core.splits import TEST, held_out_groups
from sartor.curate.dataset_writer import batched
from sartor.curate.passes import PassState, Removed, inherited_fields, moved_ids, rewritten, take_rows
from sartor.curate.recipe import CurateRecipe
from sartor.curate.shards import InheritedFields, Shard
from sartor.curate.step import Removal


@dataclass(frozen=True)
class Masks:
    """Personal data taken out of what is only evidence: of a Drop's text and detail, and of rows that are set
    aside.
    """

    text: Callable[[str], str] = lambda text: text
    row: Callable[[Example], Example] = lambda row: row
    are_none: bool = True


class SplitDecision:
    """What becomes of every row that the steps left: kept or not, its group, its split.

    removed_rows: the rows that are not kept, by number. merged: what a row takes over from its equals. Groups and
    splits are lists with an entry for each row, kept or not.
    """

    def __init__(self, state: PassState, recipe: CurateRecipe) -> None:
        self.removed_rows = set(state.open_removals)
        self.merged: dict[int, InheritedFields] = inherited_fields(state)
        index = pa.concat_tables(part.index for part in state.parts)
        self.splits: list[str] = index["split"].to_pylist()
        own_groups: list[str] = index["own_group"].to_pylist()
        self.groups: list[str] = index["group"].to_pylist()
        for row, inherited in self.merged.items():
            self.splits[row], own_groups[row] = inherited.split, inherited.group
        if recipe.split.by == "group":
            self.groups = [own_group or prompt for own_group, prompt in zip(own_groups, self.groups, strict=True)]
        self._hold_out(recipe)
        self.leaked = self._keep_groups_whole()

    def kept_row_numbers(self) -> Iterator[int]:
        """The rows that are kept, by number."""
        return (row for row in range(len(self.groups)) if row not in self.removed_rows)

    def _hold_out(self, recipe: CurateRecipe) -> None:
        """Fill in each split; whole groups are held out until `test_fraction`, then `eval_fraction`, of the rows is
        reached.

        The test split is drawn first and by a seed of its own, so that another `eval_fraction` does not move its rows.
        """
        undecided = [row for row in self.kept_row_numbers() if not self.splits[row]]
        undecided = self._draw_test(recipe, undecided)
        held_out = held_out_groups(
            (self.groups[row] for row in undecided), self._eval_fraction(recipe, undecided), recipe.seed
        )
        for row in undecided:
            self.splits[row] = "eval" if self.groups[row] in held_out else "train"

    def _draw_test(self, recipe: CurateRecipe, undecided: list[int]) -> list[int]:
        """Put whole groups into the test split; return the rows that are left. A group with a declared split is not
        drawn.
        """
        fraction = recipe.split.test_fraction
        if not fraction:
            return undecided
        declared = {self.groups[row] for row in self.kept_row_numbers() if self.splits[row]}
        free_rows = [row for row in undecided if self.groups[row] not in declared]
        if not free_rows:
            return undecided
        share = min(fraction * len(undecided) / len(free_rows), 1.0)
        test_groups = held_out_groups((self.groups[row] for row in free_rows), share, f"{TEST}:{recipe.seed}")
        for row in free_rows:
            if self.groups[row] in test_groups:
                self.splits[row] = TEST
        return [row for row in undecided if not self.splits[row]]

    def _eval_fraction(self, recipe: CurateRecipe, undecided: Sequence[int]) -> float:
        """The fraction of the rows that the test split left which makes `eval_fraction` of all."""
        test_count = sum(self.splits[row] == TEST for row in self.kept_row_numbers())
        return recipe.split.eval_fraction * (len(undecided) + test_count) / max(len(undecided), 1)

    def _keep_groups_whole(self) -> list[int]:
        """The check that no group straddles the split: training rows whose group is held out. They are removed.

        Only sources with a declared split can bring that about; a group that the recipe splits is whole by
        construction.
        """
        held_out = {self.groups[row] for row in self.kept_row_numbers() if self.splits[row] == "eval"}
        leaked = [
            row for row in self.kept_row_numbers() if self.splits[row] == "train" and self.groups[row] in held_out
        ]
        self.removed_rows.update(leaked)
        return leaked


def kept_tables(state: PassState, outcome: SplitDecision) -> Iterator[Any]:
    """Yield the rows that are kept, part by part, with group, split and origins as they came out."""
    for part, start in zip(state.parts, state.starts, strict=False):
        yield _kept_rows(part, start, outcome)


def _kept_rows(part: Shard, start: int, outcome: SplitDecision) -> Any:
    positions = [index for index in range(part.row_count) if start + index not in outcome.removed_rows]
    table = part.table().take(pa.array(positions, pa.int64()))
    columns = {
        "group": pa.array([outcome.groups[start + position] for position in positions], pa.string()),
        "split": pa.array([outcome.splits[start + position] for position in positions], pa.string()),
    }
    if any(start + position in outcome.merged for position in positions):
        origins = table["origins"].to_pylist()
        for index, position in enumerate(positions):
            if inherited := outcome.merged.get(start + position):
                origins[index] = origins[index] + [asdict(origin) for origin in inherited.origins]
        columns["origins"] = pa.array(origins, parquet_io.EXAMPLES.field("origins").type)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), parquet_io.EXAMPLES.field(name), column)
    return table.cast(parquet_io.EXAMPLES)


def leaks(state: PassState, outcome: SplitDecision) -> list[Removed]:
    """The rows that left for their group, as removals."""
    result = []
    for row in outcome.leaked:
        part_index, position = state.locate(row)
        detail = f"its group {outcome.groups[row][:80]!r} is held out for evaluation"
        result.append(
            Removed(state.parts[part_index], position, Removal(row, "group_held_out", detail), "split", "", 0, False)
        )
    return result


def drop_tables(state: PassState, removed: Sequence[Removed], masks: Masks) -> Iterator[Any]:
    """Yield the Drops of reading and of steps, then those of rows removed (`with_last_ids`), without personal data."""
    for file in state.drops:
        yield mask_quotes(pq.read_table(file), masks)
    for drops in batched(_removed_drops(removed), 4096):
        yield mask_quotes(pa.Table.from_pylist([asdict(drop) for drop in drops], parquet_io.DROPS), masks)


def set_aside_rows(removed: Sequence[Removed], masks: Masks) -> Iterator[tuple[str, Example]]:
    """Yield the removed rows that are set aside: the id by which the evidence has each, and the row without personal
    data.
    """
    for removal, example in _with_examples(removed):
        if removal.set_aside:
            yield example.id, masks.row(example)


# Columns of text that quote no row: ids, places and words of ours.
NO_QUOTES = frozenset(["reason", "source", "locator", "step", "id", "kept", "method", "kind"]) | {
    f"{name}{end}" for name in ("", "source_", "locator_") for end in "ab"
}


class _Quoting:
    """The names of columns that may quote a row: all but those of NO_QUOTES."""

    def __contains__(self, name: object) -> bool:
        return name not in NO_QUOTES


def mask_quotes(table: Any, masks: Masks) -> Any:
    """A table of drops or evidence whose quoted texts hold no personal data."""
    return table if masks.are_none else rewritten(table, _Quoting(), masks.text)


def masked_facts(facts: Any, masks: Masks) -> Any:
    """What steps say of themselves, which may quote a line that many rows share."""
    if masks.are_none or isinstance(facts, (int, float, bool, type(None))):
        return facts
    if isinstance(facts, str):
        return masks.text(facts)
    if isinstance(facts, dict):
        return {masks.text(name): masked_facts(value, masks) for name, value in facts.items()}
    return [masked_facts(value, masks) for value in facts]


def _removed_drops(removed: Sequence[Removed]) -> Iterator[Drop]:
    for entry, example in _with_examples(removed):
        removal = entry.removal
        drop = drop_of(example, removal.reason, removal.detail, step=entry.step)
        yield replace(drop, kept=entry.kept_id, score=removal.score, method=removal.method)


def with_last_ids(state: PassState, removed: Sequence[Removed]) -> list[Removed]:
    """Return the same in the order of parts, with `kept` by the id that the row has in the end."""
    removed = sorted(removed, key=_sort_key)
    kept_ids: dict[int, str] = {}
    for pass_count in {item.pass_count for item in removed}:
        indices = [index for index, entry in enumerate(removed) if entry.pass_count == pass_count and entry.kept_id]
        kept_ids.update(
            zip(indices, moved_ids(state, pass_count, [removed[index].kept_id for index in indices]), strict=True)
        )
    return [replace(entry, kept_id=kept_ids.get(index, "")) for index, entry in enumerate(removed)]


def _sort_key(entry: Removed) -> tuple[str, int]:
    return str(entry.part.path), entry.position


def _with_examples(removed: Sequence[Removed]) -> Iterator[tuple[Removed, Example]]:
    """Each with its row, part by part."""
    for _, run in itertools.groupby(removed, lambda entry: entry.part.path):
        entries = list(run)
        rows = take_rows([entries[0].part], ((0, item.position) for item in entries))
        yield from zip(entries, map(parquet_io.example_of, rows), strict=True)
