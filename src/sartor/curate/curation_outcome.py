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
from sartor.core.splits import held_out_groups
from sartor.curate.dataset_writer import batched
from sartor.curate.passes import PassState, Removed, inherited_fields, moved_ids, rewritten, take_rows
from sartor.curate.recipe import CurateRecipe
from sartor.curate.shards import Shard, TakenOver
from sartor.curate.step import Removal


@dataclass(frozen=True)
class Masks:
    """Personal data taken out of what is only evidence: of a Drop's text and detail, and of rows that are set aside."""

    text: Callable[[str], str] = lambda text: text
    row: Callable[[Example], Example] = lambda row: row
    are_none: bool = True


class SplitDecision:
    """What becomes of every row that the steps left: kept or not, its group, its split.

    gone: the rows that are not kept, by number. merged: what a row takes over from its equals. Groups and splits are lists
    with an entry for each row, kept or not.
    """

    def __init__(self, state: PassState, recipe: CurateRecipe) -> None:
        self.gone = set(state.gone)
        self.merged: dict[int, TakenOver] = inherited_fields(state)
        index = pa.concat_tables(part.index for part in state.parts)
        self.splits: list[str] = index["split"].to_pylist()
        own: list[str] = index["own_group"].to_pylist()
        self.groups: list[str] = index["group"].to_pylist()
        for row, more in self.merged.items():
            self.splits[row], own[row] = more.split, more.group
        if recipe.split.by == "group":
            self.groups = [mine or prompt for mine, prompt in zip(own, self.groups, strict=True)]
        self._hold_out(recipe)
        self.leaked = self._keep_groups_whole()

    def living(self) -> Iterator[int]:
        """The rows that are kept, by number."""
        return (row for row in range(len(self.groups)) if row not in self.gone)

    def _hold_out(self, recipe: CurateRecipe) -> None:
        """Fill in each split; whole groups are held out until `eval_fraction` of the rows is reached."""
        undecided = [row for row in self.living() if not self.splits[row]]
        held_out = held_out_groups((self.groups[row] for row in undecided), recipe.split.eval_fraction, recipe.seed)
        for row in undecided:
            self.splits[row] = "eval" if self.groups[row] in held_out else "train"

    def _keep_groups_whole(self) -> list[int]:
        """The check that no group straddles the split: training rows whose group is held out. They are removed.

        Only sources with a declared split can bring that about; a group that the recipe splits is whole by construction.
        """
        held_out = {self.groups[row] for row in self.living() if self.splits[row] == "eval"}
        leaked = [row for row in self.living() if self.splits[row] == "train" and self.groups[row] in held_out]
        self.gone.update(leaked)
        return leaked


def kept_tables(state: PassState, outcome: SplitDecision) -> Iterator[Any]:
    """Yield the rows that are kept, part by part, with group, split and origins as they came out."""
    for part, start in zip(state.parts, state.starts, strict=False):
        yield _kept_rows(part, start, outcome)


def _kept_rows(part: Shard, start: int, outcome: SplitDecision) -> Any:
    living = [place for place in range(part.kept) if start + place not in outcome.gone]
    table = part.table().take(pa.array(living, pa.int64()))
    columns = {
        "group": pa.array([outcome.groups[start + place] for place in living], pa.string()),
        "split": pa.array([outcome.splits[start + place] for place in living], pa.string()),
    }
    if any(start + place in outcome.merged for place in living):
        origins = table["origins"].to_pylist()
        for at, place in enumerate(living):
            if more := outcome.merged.get(start + place):
                origins[at] = origins[at] + [asdict(origin) for origin in more.origins]
        columns["origins"] = pa.array(origins, parquet_io.EXAMPLES.field("origins").type)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), parquet_io.EXAMPLES.field(name), column)
    return table.cast(parquet_io.EXAMPLES)


def leaks(state: PassState, outcome: SplitDecision) -> list[Removed]:
    """The rows that left for their group, as removals."""
    found = []
    for row in outcome.leaked:
        part, place = state.where(row)
        detail = f"its group {outcome.groups[row][:80]!r} is held out for evaluation"
        found.append(Removed(state.parts[part], place, Removal(row, "group_held_out", detail), "split", "", 0, False))
    return found


def drop_tables(state: PassState, removed: Sequence[Removed], masks: Masks) -> Iterator[Any]:
    """Yield the Drops of reading and of steps, then those of rows removed (`with_last_ids`), without personal data."""
    for file in state.drops:
        yield mask_quotes(pq.read_table(file), masks)
    for drops in batched(_removed_drops(removed), 4096):
        yield mask_quotes(pa.Table.from_pylist([asdict(drop) for drop in drops], parquet_io.DROPS), masks)


def set_aside_rows(removed: Sequence[Removed], masks: Masks) -> Iterator[tuple[str, Example]]:
    """Yield the removed rows that are set aside: the id by which the evidence has each, and the row without personal data."""
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
    for one, example in _with_examples(removed):
        removal = one.removal
        drop = drop_of(example, removal.reason, removal.detail, step=one.step)
        yield replace(drop, kept=one.kept, score=removal.score, method=removal.method)


def with_last_ids(state: PassState, removed: Sequence[Removed]) -> list[Removed]:
    """Return the same in the order of parts, with `kept` by the id that the row has in the end."""
    removed = sorted(removed, key=_place)
    made: dict[int, str] = {}
    for known in {one.known for one in removed}:
        places = [place for place, one in enumerate(removed) if one.known == known and one.kept]
        made.update(zip(places, moved_ids(state, known, [removed[place].kept for place in places]), strict=True))
    return [replace(one, kept=made.get(place, "")) for place, one in enumerate(removed)]


def _place(one: Removed) -> tuple[str, int]:
    return str(one.part.path), one.place


def _with_examples(removed: Sequence[Removed]) -> Iterator[tuple[Removed, Example]]:
    """Each with its row, part by part."""
    for _, run in itertools.groupby(removed, lambda one: one.part.path):
        some = list(run)
        found = take_rows([some[0].part], ((0, one.place) for one in some))
        yield from zip(some, map(parquet_io.example_of, found), strict=True)
