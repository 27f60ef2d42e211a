"""Final removals and splits of a curation, and the tables made from them."""

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
    """Functions that mask personal data in evidence: in texts and details of Drops, and in rows that are set aside."""

    text: Callable[[str], str] = lambda text: text
    row: Callable[[Example], Example] = lambda row: row
    are_none: bool = True


class SplitDecision:
    """Final decision on every row that the steps left: kept or removed, its group and its split.

    removed_rows: numbers of the rows that are not kept.
    merged: row number -> fields inherited from removed rows of equal content.
    groups, splits: one entry for each row, kept or not.
    leaked: numbers of the training rows that were removed because their group is held out.
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
        """Return an iterator over the numbers of the kept rows."""
        return (row for row in range(len(self.groups)) if row not in self.removed_rows)

    def _hold_out(self, recipe: CurateRecipe) -> None:
        """Set the split of each row that has none declared.

        Whole groups are held out until `test_fraction`, then `eval_fraction`, of the rows is reached. The test split
        is drawn first and with a seed of its own, so another `eval_fraction` does not move its rows.
        """
        undecided = [row for row in self.kept_row_numbers() if not self.splits[row]]
        undecided = self._draw_test(recipe, undecided)
        test_count = sum(self.splits[row] == TEST for row in self.kept_row_numbers())
        # the fraction of the undecided rows that equals `eval_fraction` of undecided and test rows
        fraction = recipe.split.eval_fraction * (len(undecided) + test_count) / max(len(undecided), 1)
        held_out = held_out_groups((self.groups[row] for row in undecided), fraction, recipe.seed)
        for row in undecided:
            self.splits[row] = "eval" if self.groups[row] in held_out else "train"

    def _draw_test(self, recipe: CurateRecipe, undecided: list[int]) -> list[int]:
        """Put whole groups into the test split; return the rows still without a split.

        Groups with a declared split are not drawn.
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

    def _keep_groups_whole(self) -> list[int]:
        """Remove training rows whose group is held out in the eval split; return their numbers.

        Only sources with a declared split can cause this. A group that the recipe splits is whole by construction.
        """
        held_out = {self.groups[row] for row in self.kept_row_numbers() if self.splits[row] == "eval"}
        leaked = [
            row for row in self.kept_row_numbers() if self.splits[row] == "train" and self.groups[row] in held_out
        ]
        self.removed_rows.update(leaked)
        return leaked


def kept_tables(state: PassState, outcome: SplitDecision) -> Iterator[Any]:
    """Yield the kept rows, shard by shard, with their final group, split and origins."""
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
            inherited = outcome.merged.get(start + position)
            if inherited is not None:
                origins[index] = origins[index] + [asdict(origin) for origin in inherited.origins]
        columns["origins"] = pa.array(origins, parquet_io.EXAMPLES.field("origins").type)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), parquet_io.EXAMPLES.field(name), column)
    return table.cast(parquet_io.EXAMPLES)


def leaks(state: PassState, outcome: SplitDecision) -> list[Removed]:
    """Return the training rows removed because their group is held out, as Removed."""
    result = []
    for row in outcome.leaked:
        part_index, position = state.locate(row)
        detail = f"its group {outcome.groups[row][:80]!r} is held out for evaluation"
        result.append(
            Removed(
                state.parts[part_index],
                position,
                removal=Removal(row, "group_held_out", detail),
                step="split",
                kept_id="",
                pass_count=0,
                set_aside=False,
            )
        )
    return result


def drop_tables(state: PassState, removed: Sequence[Removed], masks: Masks) -> Iterator[Any]:
    """Yield the Drops of reading and of steps, then those of `removed`, without personal data.

    removed: in the order of `with_last_ids`.
    """
    for file in state.drops:
        yield mask_quotes(pq.read_table(file), masks)
    for drops in batched(_removed_drops(removed), 4096):
        yield mask_quotes(pa.Table.from_pylist([asdict(drop) for drop in drops], parquet_io.DROPS), masks)


def set_aside_rows(removed: Sequence[Removed], masks: Masks) -> Iterator[tuple[str, Example]]:
    """Yield each removed row that is set aside: its id in the evidence, and the row without personal data."""
    for removal, example in _with_examples(removed):
        if removal.set_aside:
            yield example.id, masks.row(example)


# Text columns that never quote a row: ids, positions, reasons and other fixed words.
NO_QUOTES = frozenset(
    ["reason", "source", "locator", "step", "id", "kept", "method", "kind"]
    + ["a", "b", "source_a", "source_b", "locator_a", "locator_b"]
)


class _Quoting:
    """Set of the column names that may quote a row: all names outside NO_QUOTES."""

    def __contains__(self, name: object) -> bool:
        return name not in NO_QUOTES


def mask_quotes(table: Any, masks: Masks) -> Any:
    """Return a table of drops or evidence with personal data masked in all quoted texts."""
    return table if masks.are_none else rewritten(table, _Quoting(), masks.text)


def masked_facts(facts: Any, masks: Masks) -> Any:
    """Return the facts of the steps with personal data masked. Facts may quote a line that many rows share."""
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
    """Return the removals sorted by shard and position, with `kept_id` replaced by the row's final id."""
    removed = sorted(removed, key=lambda entry: (str(entry.part.path), entry.position))
    last_ids: dict[int, str] = {}
    for pass_count in {entry.pass_count for entry in removed}:
        indices = [index for index, entry in enumerate(removed) if entry.pass_count == pass_count and entry.kept_id]
        ids = moved_ids(state, pass_count, [removed[index].kept_id for index in indices])
        last_ids.update(zip(indices, ids, strict=True))
    return [replace(entry, kept_id=last_ids.get(index, "")) for index, entry in enumerate(removed)]


def _with_examples(removed: Sequence[Removed]) -> Iterator[tuple[Removed, Example]]:
    """Yield each removal with its row, shard by shard."""
    for _, run in itertools.groupby(removed, lambda entry: entry.part.path):
        entries = list(run)
        rows = take_rows([entries[0].part], ((0, item.position) for item in entries))
        yield from zip(entries, map(parquet_io.example_of, rows), strict=True)
