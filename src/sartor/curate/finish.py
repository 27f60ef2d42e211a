"""The last verdicts, the split, and the files of the Dataset: columns moved, no row made anew."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core import rows
from sartor.core.holdout import held_out_groups
from sartor.core.records import Drop, Example
from sartor.curate.parts import Part
from sartor.curate.passes import Removed, State, moved_ids, picked, rewritten, takeovers
from sartor.curate.recipe import CurateRecipe
from sartor.curate.steps.contract import Removal, dropped
from sartor.curate.work import Merged

ROWS_PER_FILE = 100_000
EDITED = "review"  # how the step of an origin ends whose row a person changed
SET_ASIDE = rows.EXAMPLES.append(pa.field("was", pa.string()))


@dataclass(frozen=True)
class Masks:
    """Personal data taken out of what is only evidence: of a Drop's text and detail, and of rows that are set aside."""

    text: Callable[[str], str] = lambda text: text
    row: Callable[[Example], Example] = lambda row: row
    are_none: bool = True


class Outcome:
    """What becomes of every row that the steps left: kept or not, its group, its split.

    gone: the rows that are not kept, by number. merged: what a row takes over from its equals. Groups and splits are lists
    with an entry for each row, kept or not.
    """

    def __init__(self, state: State, recipe: CurateRecipe) -> None:
        self.gone = set(state.gone)
        self.merged: dict[int, Merged] = takeovers(state)
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

    def counts(self, *, copies: int) -> dict[str, Any]:
        """Rows and groups of each split, with this many copies of training rows."""
        splits: Counter[str] = Counter({"train": copies} if copies else {})
        groups: dict[str, set[str]] = {}
        for row in self.living():
            splits[self.splits[row]] += 1
            groups.setdefault(self.splits[row], set()).add(self.groups[row])
        return {"splits": dict(splits.most_common()), "groups": {name: len(some) for name, some in sorted(groups.items())}}


def write_examples(state: State, outcome: Outcome, folder: Path, copies: Iterable[Any]) -> int:
    """`examples/part-*.parquet`, tables of copies last; returns how many rows."""
    tables = (_kept_rows(part, start, outcome) for part, start in zip(state.parts, state.starts, strict=False))
    return write_tables(folder / "examples", rows.EXAMPLES, itertools.chain(tables, copies))


def _kept_rows(part: Part, start: int, outcome: Outcome) -> Any:
    """The part's rows that are kept, with group, split and origins as they came out."""
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
        columns["origins"] = pa.array(origins, rows.EXAMPLES.field("origins").type)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), rows.EXAMPLES.field(name), column)
    return table.cast(rows.EXAMPLES)


def leaks(state: State, outcome: Outcome) -> list[Removed]:
    """The rows that left for their group, as removals."""
    found = []
    for row in outcome.leaked:
        part, place = state.where(row)
        detail = f"its group {outcome.groups[row][:80]!r} is held out for evaluation"
        found.append(Removed(state.parts[part], place, Removal(row, "group_held_out", detail), "split", "", 0, False))
    return found


def write_drops(state: State, removed: Sequence[Removed], folder: Path, masks: Masks) -> Counter[str]:
    """`drops/part-*.parquet` and, for rows set aside, `set_aside/part-*.parquet`; returns rows by reason.

    `masks` take personal data out of both: steps before the one that masks have seen it.
    """
    reasons: Counter[str] = Counter()
    removed = with_last_ids(state, sorted(removed, key=_place))

    def tables() -> Iterator[Any]:
        for file in state.drops:
            yield pq.read_table(file)
        for some in batched(_removed_drops(removed), 4096):
            yield pa.Table.from_pylist([asdict(drop) for drop in some], rows.DROPS)

    def counted() -> Iterator[Any]:
        for table in tables():
            reasons.update(table["reason"].to_pylist())
            yield masked(table, masks)

    write_tables(folder / "drops", rows.DROPS, counted())
    write_set_aside(folder, ((example.id, masks.row(example)) for one, example in _with_examples(removed) if one.set_aside))
    return reasons


def write_set_aside(folder: Path, aside: Iterable[tuple[str, Example]]) -> None:
    """`set_aside/part-*.parquet`, if there is any: rows whole, and in `was` the id by which the evidence knows them."""

    def tables() -> Iterator[Any]:
        for some in batched(aside, 1024):
            was = pa.array([name for name, _ in some], pa.string())
            yield rows.examples_table(example for _, example in some).append_column("was", was)

    coming = tables()
    first = next(coming, None)
    if first is not None:
        write_tables(folder / "set_aside", SET_ASIDE, itertools.chain([first], coming))


# Columns of text that quote no row: ids, places and words of ours.
NO_QUOTES = frozenset(["reason", "source", "locator", "step", "id", "kept", "method", "kind"]) | {
    f"{name}{end}" for name in ("", "source_", "locator_") for end in "ab"
}


class _Quoting:
    """The names of columns that may quote a row: all but those of NO_QUOTES."""

    def __contains__(self, name: object) -> bool:
        return name not in NO_QUOTES


def masked(table: Any, masks: Masks) -> Any:
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
        drop = dropped(example, removal.reason, removal.detail, step=one.step)
        yield replace(drop, kept=one.kept, score=removal.score, method=removal.method)


def with_last_ids(state: State, removed: Sequence[Removed]) -> list[Removed]:
    """The same, with `kept` by the id that the row has in the end."""
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
        found = picked([some[0].part], ((0, one.place) for one in some))
        yield from zip(some, map(rows.example_of, found), strict=True)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size`."""
    source = iter(items)
    while some := list(itertools.islice(source, size)):
        yield some


def write_tables(folder: Path, schema: Any, tables: Iterable[Any]) -> int:
    """Tables one after another as `part-NNNNN.parquet` of ROWS_PER_FILE rows at most and row groups of 4,096; returns rows.

    The files depend on the rows alone, not on how they came in tables. There is always a first file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total, number, room, writer = 0, 0, 0, None
    try:
        for table in regrouped(tables, schema, rows.ROWS_PER_GROUP):
            if writer is None or room < len(table):
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"part-{number:05d}.parquet", schema, compression="zstd")
                number, room = number + 1, ROWS_PER_FILE
            writer.write_table(table, row_group_size=rows.ROWS_PER_GROUP)
            total, room = total + len(table), room - len(table)
    finally:
        if writer is not None:
            writer.close()
    return total


def write_evidence(folder: Path, name: str, table: Any) -> None:
    """`evidence/<name>.parquet`."""
    (folder / "evidence").mkdir(exist_ok=True)
    pq.write_table(table, folder / "evidence" / f"{name}.parquet", compression="zstd")


def regrouped(tables: Iterable[Any], schema: Any, size: int) -> Iterator[Any]:
    """The same rows in tables of exactly `size` rows, the last one of fewer (perhaps none, if there is no row at all)."""
    waiting, count, some = [], 0, False
    for table in tables:
        while len(table):
            taken = table.slice(0, size - count)
            waiting.append(taken)
            count, table = count + len(taken), table.slice(len(taken))
            if count == size:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting, count, some = [], 0, True
    if waiting or not some:
        yield pa.concat_tables(waiting).combine_chunks() if waiting else schema.empty_table()


def kept_by_file(folder: Path) -> Counter[tuple[str, str]]:
    """Rows by (source, file), as the origins of the written Examples say; a row with two origins counts for both, one that was
    made of another row for none, but where a person edited it (it is still its source's) or it was synthesised: those are
    all that a synthetic Dataset has.
    """
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted((folder / "examples").glob("*.parquet")):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(65536, columns=["origins"]):
                origins = batch["origins"].flatten()
                is_read = pc.equal(pc.list_value_length(origins.field("parents")), 0)
                step = origins.field("step")
                is_own = pc.or_(pc.ends_with(step, EDITED), pc.starts_with(step, "synthesize:"))
                origins = origins.filter(pc.or_(is_read, is_own))
                places = pc.replace_substring_regex(origins.field("locator"), pattern=r":[^:]*$", replacement="")
                pairs = pa.table({"source": origins.field("source"), "file": places})
                for row in pairs.group_by(["source", "file"]).aggregate([([], "count_all")]).to_pylist():
                    found[row["source"], row["file"]] += row["count_all"]
    return found


def link_media(work: Path, folder: Path) -> None:
    """The work's media, into a Dataset's directory by hard links: if this is interrupted they are still in the work."""
    for file in sorted((work / "media").glob("*")):
        (folder / "media").mkdir(exist_ok=True)
        try:
            os.link(file, folder / "media" / file.name)
        except OSError:
            shutil.copyfile(file, folder / "media" / file.name)
    drop_unused_media(folder)


def drop_unused_media(folder: Path) -> None:
    """Media of rows that were not kept do not stay."""
    used: set[str] = set()
    for file in sorted((folder / "examples").glob("*.parquet")) + sorted((folder / "set_aside").glob("*.parquet")):
        for name in ("messages", "rejected"):
            content = pq.read_table(file, columns=[name])[name].combine_chunks().flatten().field("content").flatten()
            for kind in ("image", "audio"):
                used.update(value for value in pc.unique(content.field(kind)).to_pylist() if value)
    for file in (folder / "media").glob("*"):
        if f"media/{file.name}" not in used:
            file.unlink()
