"""Writes the Dataset that reviewers decided on.

What was made of a row that goes or changes (copies, variants) goes with it, since it says what the row said; `keep_derived`
leaves it. Items that nobody has decided, and conflicts, come along in the new `review.jsonl`, beside every decision; what was
done stands in `evidence/review.jsonl` too, which the manifest lists, so that nobody can change it later.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ConfigError, ConflictError, SourceError
from sartor.core.lineage import origin_index
from sartor.core.parquet_io import to_string_array
from sartor.core.records import Drop, Example, drop_of
from sartor.core.splits import split_group
from sartor.curate.dataset_writer import DatasetWriter, write_dataset
from sartor.curate.review import review_file
from sartor.curate.review.review_items import Decision, ReviewItem
from sartor.curate.review.review_store import ReviewEntry, View
from sartor.curate.review.row_edits import STEP, apply_edit, rows_of

# what is written anew; everything else of the old Dataset comes along as it is
WRITTEN = ("examples/", "drops/", "lineage/", "card/", "card.", "croissant.json", review_file.FILE)


@dataclass
class ReviewChanges:
    """What is to be done: rows that go (id -> its Drop), rows that change (id -> the new one), rows that join."""

    going: dict[str, Drop] = field(default_factory=dict)
    changing: dict[str, Example] = field(default_factory=dict)
    joining: list[Example] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def is_empty(self) -> bool:
        """Whether the new Dataset would be the old one."""
        return not (self.going or self.changing or self.joining)


def apply(view: View, out: Path, *, replace: bool = False, keep_derived: bool = False) -> tuple[Artifact, dict[str, Any]]:
    """Write the new Dataset; returns it and what was done. Raises ConfigError where nothing is decided, ConflictError where two
    decided edits of a row differ, SourceError where no row would be left.
    """
    old = open_artifact(view.dataset.path, "dataset")
    entries = view.all_entries()
    plan = _plan(view, [entry for entry in entries if entry.standing.state == "decided"], keep_derived)
    work = _Applying(view, entries, plan)
    dataset = write_dataset(out, work.fill, parents=[old], replace=replace)
    assert old.id == view.dataset.id
    return dataset, work.said()


def _plan(view: View, decided: Sequence[ReviewEntry], keep_derived: bool) -> ReviewChanges:
    plan = ReviewChanges()
    if not decided:
        problem = f"nothing is decided about {view.dataset.path.name}"
        raise ConfigError(problem, "sartor review list DATASET, then accept, edit or reject")
    concerned = {one for entry in decided for one in entry.item.examples}
    standing = rows_of(view.dataset, concerned)
    private = {one for entry in view.items.values() if entry.kind == "personal" for one in entry.examples}
    done = _done(view.dataset)
    for entry in decided:
        decision = entry.standing.decision
        assert decision is not None
        plan.counts[decision.verdict] += 1
        proposed = entry.item.proposed
        if proposed is not None and proposed.id not in view.ids and proposed.id not in done:
            standing[proposed.id] = proposed
            _join(plan, proposed, entry.item, decision, view)
        elif decision.verdict == "reject":
            for one in entry.item.examples:
                if one in view.ids:
                    plan.going.setdefault(one, _drop(standing[one], entry.item, decision, is_private=one in private))
    for one, edits in _edits(decided, view.ids).items():
        if one not in plan.going:
            plan.changing[one] = _edited(standing[one], edits)
    if not keep_derived:
        _take_along(plan, view.dataset)
    return plan


def _join(plan: ReviewChanges, row: Example, item: ReviewItem, decision: Decision, view: View) -> None:
    """A row that was proposed joins, edited or as it is, or is a Drop."""
    if decision.verdict == "reject":
        plan.going[row.id] = _drop(row, item, decision)
        plan.counts["proposed_rejected"] += 1
        return
    plan.joining.append(apply_edit(row, decision.change) if decision.verdict == "edit" else row)


def _edits(decided: Sequence[ReviewEntry], ids: frozenset[str]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Of each row that stands, the edits that were decided, each once."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for entry in decided:
        decision = entry.standing.decision
        if decision is not None and decision.verdict == "edit" and entry.item.examples[0] in ids:
            known = found.setdefault(entry.item.examples[0], [])
            if all(change != decision.change for _, change in known):
                known.append((entry.item.id, decision.change))
    return found


def _edited(row: Example, edits: Sequence[tuple[str, Mapping[str, Any]]]) -> Example:
    """The row with all of its edits done; masking comes last."""
    merged: dict[str, Any] = {}
    for item, change in edits:
        for name, value in change.items():
            said = merged.setdefault(name, value)
            if said != value or {"reply", "value"} <= set(merged):
                items = " and ".join(one for one, _ in edits)
                raise ConflictError(f"edits of row {row.id} differ: items {items}", f"sartor review accept DATASET {item}")
    return apply_edit(row, merged)


def _drop(row: Example, item: ReviewItem, decision: Decision, *, is_private: bool = False) -> Drop:
    """With who, when and why; of a row that holds personal data without its text."""
    why = decision.reason or "no reason given"
    detail = f"rejected by {decision.by} at {decision.at}: {why} ({item.kind} {item.reason}, item {item.id})"
    drop = drop_of(row, STEP, detail, step=STEP)
    return replace(drop, text="") if is_private or item.kind == "personal" else drop


def _take_along(plan: ReviewChanges, dataset: Artifact) -> None:
    """What was made of a row that goes or changes, and of that, goes too."""
    index = origin_index.read(dataset, ["id", "parents"])
    above: dict[str, set[str]] = {}
    for one, parents in zip(index["id"].to_pylist(), index["parents"].to_pylist(), strict=True):
        for parent in parents:
            above.setdefault(parent, set()).add(one)
    waiting = [*plan.going, *(one for one, row in plan.changing.items() if row.id != one)]  # another weight is no other row
    cause = {one: one for one in waiting}
    while waiting:
        parent = waiting.pop()
        for child in above.get(parent, ()):
            if child not in cause:
                cause[child] = cause[parent]
                waiting.append(child)
    derived = [one for one in cause if one not in plan.going and one not in plan.changing]
    found = rows_of(dataset, derived)
    for one in derived:
        word = "changed" if cause[one] in plan.changing else "rejected"
        detail = f"made of row {cause[one]}, which was {word} in review"
        text = "" if word == "rejected" and not plan.going[cause[one]].text else None
        drop = drop_of(found[one], STEP, detail, step=STEP)
        plan.going[one] = drop if text is None else replace(drop, text=text)
        plan.counts["derived"] += 1


def _done(dataset: Artifact) -> set[str]:
    """Rows that an earlier review rejected."""
    tables = (pq.read_table(file, columns=["id", "step"]) for file in origin_index.example_files(dataset, "drops/"))
    return {one for table in tables for one in table.filter(pc.equal(table["step"], STEP))["id"].to_pylist()}


class _Applying:
    """The new Dataset's files, one after another."""

    def __init__(self, view: View, entries: Sequence[ReviewEntry], plan: ReviewChanges) -> None:
        self.view, self.old, self.entries, self.plan = view, view.dataset, entries, plan
        self.equal: list[Drop] = []
        self.joined = 0

    def fill(self, writer: DatasetWriter) -> Mapping[str, Any]:
        """Write everything; returns what the manifest says."""
        self._bring_along(writer.folder)
        before = self.old.manifest.get("counts", {})
        writer.dropped.update(before.get("dropped", {}))
        writer.examples(self._tables())
        if not writer.kept:
            raise SourceError("no row would be left", "accept some rows, or take other sources")
        if drops := [*self.plan.going.values(), *self.equal]:
            writer.drop_file(drops)
        self._write_review(writer.folder)
        added = len(self.plan.joining) + self.plan.counts["proposed_rejected"]
        return writer.finish(
            sources=writer.sources_with_kept(self.old.manifest.get("sources", [])),
            steps={
                **self.old.manifest.get("steps", {}),
                STEP: {**self.said(), **({"copies": added} if added else {})},
            },
            counts={**before, "made": int(before.get("made", 0)) + added},
            inherits=True,
        )

    def said(self) -> dict[str, Any]:
        """What was done, and what is left to decide."""
        counts = self.plan.counts
        left = [entry for entry in self.entries if entry.is_open and self.view.concerns(entry.item)]
        return {
            **{name: counts[verdict] for name, verdict in (("accepted", "accept"), ("edited", "edit"), ("rejected", "reject"))},
            "rows_changed": len(self.plan.changing),
            "rows_dropped": len(self.plan.going) - counts["derived"],
            "rows_dropped_with_their_parent": counts["derived"],
            "rows_equal_to_others": len(self.equal),
            "rows_added": self.joined,
            "open": len(left),
        }

    def _bring_along(self, folder: Path) -> None:
        for name in self.old.manifest["files"]:
            if name.startswith("drops/") or not name.startswith(WRITTEN):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.old.path / name, folder / name)

    def _tables(self) -> Iterator[Any]:
        """The rows that stay, changed ones in their places, then those that join."""
        self.splits = self._groups()
        seen = set(self.view.ids) - set(self.plan.going) - set(self.plan.changing)
        touched = to_string_array(sorted({*self.plan.going, *self.plan.changing}))
        for file in origin_index.example_files(self.old):
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(parquet_io.ROWS_PER_GROUP):
                    yield from self._changed(pa.Table.from_batches([batch]), touched, seen)
        joining = [self._placed(row, "train") for row in self.plan.joining]
        fresh = [row for row in joining if self._is_new(row, seen)]
        self.joined = len(fresh)
        yield parquet_io.examples_table(fresh)

    def _changed(self, table: Any, touched: Any, seen: set[str]) -> Iterator[Any]:
        table = _in_form(table)
        places = [place for place, hit in enumerate(pc.is_in(table["id"], value_set=touched).to_pylist()) if hit]
        start = 0
        for place in places:
            if start < place:
                yield table.slice(start, place - start)
            start = place + 1
            one = table["id"][place].as_py()
            if one in self.plan.changing and one not in self.plan.going:
                row = self._placed(self.plan.changing[one], "")
                if self._is_new(row, seen):
                    yield parquet_io.examples_table([row])
        if start < len(table):
            yield table.slice(start)

    def _is_new(self, row: Example, seen: set[str]) -> bool:
        """Whether no other row says the same; else it is a Drop for that one."""
        if row.id in seen:
            drop = drop_of(row, "exact_duplicate", "after review it says the same as a row that stands", step=STEP)
            self.equal.append(replace(drop, kept=row.id))
            return False
        seen.add(row.id)
        return True

    def _placed(self, row: Example, split: str) -> Example:
        """In a group, whole on one side of the split: an edited question joins the rows that ask the same."""
        group = split_group(row)
        where = self.splits.setdefault(group, split or row.split or "train")
        return replace(row, group=group, split=where)

    def _groups(self) -> dict[str, str]:
        """group -> split, of the rows that stay as they are."""
        found: dict[str, str] = {}
        for file in origin_index.example_files(self.old):
            table = pq.read_table(file, columns=["group", "split"]).group_by(["group", "split"]).aggregate([])
            for row in table.to_pylist():
                if found.setdefault(row["group"], row["split"]) != row["split"]:
                    found[row["group"]] = "eval"
        return found

    def _write_review(self, folder: Path) -> None:
        decisions = [decision for entry in self.entries for decision in entry.decisions]
        samples = [*self.view.lines.samples, *({"dataset": self.old.id, **plan} for plan in self.view.samples)]
        review_file.write_review_file(folder / review_file.FILE, (entry.item for entry in self.entries), decisions, samples)
        done = [entry for entry in self.entries if entry.standing.state == "decided"]
        (folder / "evidence").mkdir(exist_ok=True)
        said = [decision for entry in done for decision in entry.decisions]
        review_file.write_review_file(folder / "evidence" / review_file.FILE, (entry.item for entry in done), said, samples)


def _in_form(table: Any) -> Any:
    """A table of a Dataset of an older schema with the columns of today."""
    if "steps" not in table.column_names:
        empty = pa.array([[]] * len(table), pa.list_(pa.string()))
        table = table.append_column("steps", empty)
    if "rating" not in table.column_names:
        table = table.append_column("rating", pa.array([0.0] * len(table), pa.float64()))
    return table.select(parquet_io.EXAMPLES.names).cast(parquet_io.EXAMPLES)
