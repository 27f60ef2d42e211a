"""Writing of the Dataset that follows from the reviewers' decisions.

Rows derived from a row that is dropped or changed (copies, variants) are dropped too, since they repeat its content;
`keep_derived` keeps them. Open items and conflicts are carried over to the new `review.jsonl`, with every decision.
The applied decisions are also written to `evidence/review.jsonl`. The manifest lists that file, so a later change
would be noticed.
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
from sartor.core.splits import TEST, split_group
from sartor.curate.dataset_writer import DatasetWriter, write_dataset
from sartor.curate.review import review_file
from sartor.curate.review.review_items import Decision, ReviewItem
from sartor.curate.review.review_store import ReviewEntry, View
from sartor.curate.review.row_edits import STEP, apply_edit, rows_of

# files that are rewritten; all other files of the old Dataset are copied unchanged
WRITTEN = ("examples/", "drops/", "lineage/", "card/", "card.", "croissant.json", review_file.FILE)


@dataclass
class ReviewChanges:
    """Changes to apply.

    drops: id of a row to drop -> its Drop.
    edited: id of a row to change -> the changed row.
    added: rows to add.
    """

    drops: dict[str, Drop] = field(default_factory=dict)
    edited: dict[str, Example] = field(default_factory=dict)
    added: list[Example] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def is_empty(self) -> bool:
        """Whether the new Dataset would equal the old one."""
        return not (self.drops or self.edited or self.added)


def apply(
    view: View, out: Path, *, replace: bool = False, keep_derived: bool = False
) -> tuple[Artifact, dict[str, Any]]:
    """Write the new Dataset; return it and a summary of the changes.

    Raises ConfigError if nothing is decided, ConflictError if two decided edits of a row differ, SourceError if no row
    would be left.
    """
    old = open_artifact(view.dataset.path, "dataset")
    entries = view.all_entries()
    plan = _plan(view, [entry for entry in entries if entry.standing.state == "decided"], keep_derived)
    writer = _ReviewWriter(view, entries, plan)
    dataset = write_dataset(out, writer.fill, parents=[old], replace=replace)
    assert old.id == view.dataset.id
    return dataset, writer.summary()


def _plan(view: View, decided: Sequence[ReviewEntry], keep_derived: bool) -> ReviewChanges:
    plan = ReviewChanges()
    if not decided:
        problem = f"nothing is decided about {view.dataset.path.name}"
        raise ConfigError(problem, "sartor review list DATASET, then accept, edit or reject")
    example_ids = {example for entry in decided for example in entry.item.examples}
    rows = rows_of(view.dataset, example_ids)
    private_ids = {row_id for entry in view.items.values() if entry.kind == "personal" for row_id in entry.examples}
    rejected_ids: set[str] = set()  # of rows that an earlier review rejected
    for file in origin_index.example_files(view.dataset, "drops/"):
        table = pq.read_table(file, columns=["id", "step"])
        rejected_ids.update(table.filter(pc.equal(table["step"], STEP))["id"].to_pylist())
    for entry in decided:
        decision = entry.standing.decision
        assert decision is not None
        plan.counts[decision.verdict] += 1
        proposed = entry.item.proposed
        if proposed is not None and proposed.id not in view.ids and proposed.id not in rejected_ids:
            rows[proposed.id] = proposed
            if decision.verdict == "reject":
                plan.drops[proposed.id] = _drop(proposed, entry.item, decision)
                plan.counts["proposed_rejected"] += 1
            else:
                is_edit = decision.verdict == "edit"
                plan.added.append(apply_edit(proposed, decision.change) if is_edit else proposed)
        elif decision.verdict == "reject":
            for row_id in entry.item.examples:
                if row_id in view.ids:
                    plan.drops.setdefault(
                        row_id, _drop(rows[row_id], entry.item, decision, is_private=row_id in private_ids)
                    )
    for row_id, edits in _edits(decided, view.ids).items():
        if row_id not in plan.drops and not _is_weighed(rows[row_id], edits):
            plan.edited[row_id] = _apply_edits(rows[row_id], edits)
    if not keep_derived:
        _drop_derived(plan, view.dataset)
    return plan


def _edits(decided: Sequence[ReviewEntry], ids: frozenset[str]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Group the decided edits by row of the Dataset, each distinct change once."""
    result: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for entry in decided:
        decision = entry.standing.decision
        if decision is not None and decision.verdict == "edit" and entry.item.examples[0] in ids:
            row_edits = result.setdefault(entry.item.examples[0], [])
            if all(change != decision.change for _, change in row_edits):
                row_edits.append((entry.item.id, decision.change))
    return result


def _is_weighed(row: Example, edits: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Return whether an earlier review gave the row these weights: an edit of the weight alone leaves the row's id."""
    return STEP in row.steps and all(change == {"weight": row.weight} for _, change in edits)


def _apply_edits(row: Example, edits: Sequence[tuple[str, Mapping[str, Any]]]) -> Example:
    """Return the row with all of its edits applied as one change.

    Raises ConflictError if two edits differ.
    """
    merged: dict[str, Any] = {}
    for item, change in edits:
        for name, value in change.items():
            earlier = merged.setdefault(name, value)
            if earlier != value or {"reply", "value"} <= set(merged):
                items = " and ".join(item_id for item_id, _ in edits)
                raise ConflictError(
                    f"edits of row {row.id} differ: items {items}", f"sartor review accept DATASET {item} --by NAME"
                )
    return apply_edit(row, merged)


def _drop(row: Example, item: ReviewItem, decision: Decision, *, is_private: bool = False) -> Drop:
    """Return the Drop of a rejected row, with reviewer, time and reason.

    The text of a row with personal data is left out.
    """
    reason = decision.reason or "no reason given"
    detail = f"rejected by {decision.by} at {decision.at}: {reason} ({item.kind} {item.reason}, item {item.id})"
    drop = drop_of(row, STEP, detail, step=STEP)
    return replace(drop, text="") if is_private or item.kind == "personal" else drop


def _drop_derived(plan: ReviewChanges, dataset: Artifact) -> None:
    """Drop every row derived, directly or indirectly, from a dropped or changed row."""
    index = origin_index.read(dataset, ["id", "parents"])
    children: dict[str, set[str]] = {}
    for row_id, parents in zip(index["id"].to_pylist(), index["parents"].to_pylist(), strict=True):
        for parent in parents:
            children.setdefault(parent, set()).add(row_id)
    waiting = [
        *plan.drops,
        *(row_id for row_id, row in plan.edited.items() if row.id != row_id),
    ]  # an edit of the weight alone leaves the row's id, and so its derived rows
    cause = {item: item for item in waiting}
    while waiting:
        parent = waiting.pop()
        for child in children.get(parent, ()):
            if child not in cause:
                cause[child] = cause[parent]
                waiting.append(child)
    derived = [row_id for row_id in cause if row_id not in plan.drops and row_id not in plan.edited]
    rows = rows_of(dataset, derived)
    for row_id in derived:
        word = "changed" if cause[row_id] in plan.edited else "rejected"
        detail = f"made of row {cause[row_id]}, which was {word} in review"
        text = "" if word == "rejected" and not plan.drops[cause[row_id]].text else None
        drop = drop_of(rows[row_id], STEP, detail, step=STEP)
        plan.drops[row_id] = drop if text is None else replace(drop, text=text)
        plan.counts["derived"] += 1


class _ReviewWriter:
    """Writer of the new Dataset's files, in order."""

    def __init__(self, view: View, entries: Sequence[ReviewEntry], plan: ReviewChanges) -> None:
        self.view, self.old, self.entries, self.plan = view, view.dataset, entries, plan
        self.equal: list[Drop] = []
        self.joined = 0

    def fill(self, writer: DatasetWriter) -> Mapping[str, Any]:
        """Write all files; return the fields of the manifest."""
        for name in self.old.manifest["files"]:
            if name.startswith("drops/") or not name.startswith(WRITTEN):
                (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.old.path / name, writer.folder / name)
        old_counts = self.old.manifest.get("counts", {})
        writer.dropped.update(old_counts.get("dropped", {}))
        writer.examples(self._tables())
        if not writer.row_count:
            raise SourceError("no row would be left", "accept some rows, or take other sources")
        if drops := [*self.plan.drops.values(), *self.equal]:
            writer.drop_file(drops)
        self._write_review(writer.folder)
        added = len(self.plan.added) + self.plan.counts["proposed_rejected"]
        return writer.finish(
            sources=writer.sources_with_kept(self.old.manifest.get("sources", [])),
            steps={
                **self.old.manifest.get("steps", {}),
                STEP: {**self.summary(), **({"copies": added} if added else {})},
            },
            counts={**old_counts, "made": int(old_counts.get("made", 0)) + added},
            inherits=True,
        )

    def summary(self) -> dict[str, Any]:
        """Return counts of the changes, and of the items that are still open."""
        counts = self.plan.counts
        open_entries = [entry for entry in self.entries if entry.is_open and self.view.concerns(entry.item)]
        return {
            "accepted": counts["accept"],
            "edited": counts["edit"],
            "rejected": counts["reject"],
            "rows_changed": len(self.plan.edited),
            "rows_dropped": len(self.plan.drops) - counts["derived"],
            "rows_dropped_with_their_parent": counts["derived"],
            "rows_equal_to_others": len(self.equal),
            "rows_added": self.joined,
            "open": len(open_entries),
        }

    def _tables(self) -> Iterator[Any]:
        """Yield the remaining rows, with changed ones at their positions, then the added ones."""
        self.splits = self._groups()
        known_ids = set(self.view.ids) - set(self.plan.drops) - set(self.plan.edited)
        changed_ids = to_string_array(sorted({*self.plan.drops, *self.plan.edited}))
        for file in origin_index.example_files(self.old):
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(parquet_io.ROWS_PER_GROUP):
                    yield from self._changed(pa.Table.from_batches([batch]), changed_ids, known_ids)
        added = [self._placed(row, "train") for row in self.plan.added]
        new_rows = [row for row in added if self._is_new(row, known_ids)]
        self.joined = len(new_rows)
        yield parquet_io.examples_table(new_rows)

    def _changed(self, table: Any, changed_ids: Any, known_ids: set[str]) -> Iterator[Any]:
        table = _in_form(table)
        is_changed = pc.is_in(table["id"], value_set=changed_ids).to_pylist()
        positions = [index for index, hit in enumerate(is_changed) if hit]
        start = 0
        for position in positions:
            if start < position:
                yield table.slice(start, position - start)
            start = position + 1
            row_id = table["id"][position].as_py()
            if row_id in self.plan.edited and row_id not in self.plan.drops:
                row = self._placed(self.plan.edited[row_id], "")
                if self._is_new(row, known_ids):
                    yield parquet_io.examples_table([row])
        if start < len(table):
            yield table.slice(start)

    def _is_new(self, row: Example, known_ids: set[str]) -> bool:
        """Return whether no other row has the same content; otherwise record a Drop as its duplicate."""
        if row.id in known_ids:
            drop = drop_of(row, "exact_duplicate", "after review it says the same as a row that stands", step=STEP)
            self.equal.append(replace(drop, kept=row.id))
            return False
        known_ids.add(row.id)
        return True

    def _placed(self, row: Example, split: str) -> Example:
        """Return the row with its group, and with the split that its group has.

        An edited question joins the group of the rows that ask the same. A group is never divided between splits.
        """
        group = split_group(row)
        group_split = self.splits.setdefault(group, split or row.split or "train")
        return replace(row, group=group, split=group_split)

    def _groups(self) -> dict[str, str]:
        """Return group -> split for the rows of the old Dataset."""
        result: dict[str, str] = {}
        for file in origin_index.example_files(self.old):
            table = pq.read_table(file, columns=["group", "split"]).group_by(["group", "split"]).aggregate([])
            for row in table.to_pylist():
                split = result.setdefault(row["group"], row["split"])
                if split != row["split"]:
                    result[row["group"]] = TEST if TEST in (split, row["split"]) else "eval"
        return result

    def _write_review(self, folder: Path) -> None:
        decisions = [decision for entry in self.entries for decision in entry.decisions]
        samples = [*self.view.lines.samples, *({"dataset": self.old.id, **plan} for plan in self.view.samples)]
        review_file.write_review_file(
            folder / review_file.FILE, (entry.item for entry in self.entries), decisions, samples
        )
        decided = [entry for entry in self.entries if entry.standing.state == "decided"]
        (folder / "evidence").mkdir(exist_ok=True)
        done_decisions = [decision for entry in decided for decision in entry.decisions]
        review_file.write_review_file(
            folder / "evidence" / review_file.FILE, (entry.item for entry in decided), done_decisions, samples
        )


def _in_form(table: Any) -> Any:
    """Convert a table of an older Dataset schema to the current columns."""
    if "steps" not in table.column_names:
        empty = pa.array([[]] * len(table), pa.list_(pa.string()))
        table = table.append_column("steps", empty)
    if "rating" not in table.column_names:
        table = table.append_column("rating", pa.array([0.0] * len(table), pa.float64()))
    return table.select(parquet_io.EXAMPLES.names).cast(parquet_io.EXAMPLES)
