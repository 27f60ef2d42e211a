"""Verb `rethreshold`: another near-duplicate threshold without a new comparison.

It reads the evidence of a Dataset and the rows that were set aside. Rows that come back go through the row steps after
`near_duplicates` in the recipe, and into the split of their group. The decisions of other steps stay.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core import config, parquet_io
from sartor.core.artifacts import Artifact, check_output_free, kind_of, open_artifact
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, drop_of
from sartor.core.splits import held_out_groups, prompt_group, split_group
from sartor.curate.dataset_writer import SET_ASIDE, DatasetWriter, write_dataset
from sartor.curate.dedup import clusters, pair_store
from sartor.curate.dedup import dedup_files as of_files
from sartor.curate.dedup.pair_scoring import METHODS, ScoredPairs
from sartor.curate.pipeline import Curated, load_recipe
from sartor.curate.recipe import CurateRecipe
from sartor.curate.shards import apply_steps
from sartor.curate.step import RowFunction
from sartor.curate.steps import makes_copies, needs_all_rows
from sartor.curate.steps.text_duplicates import ExactDuplicates, NearDuplicates


def rethreshold(
    path: Path | str, out: Path | str, *, threshold: float, replace: bool = False, show: bool = False
) -> Curated | of_files.Deduplicated:
    """Write to `out` what `curate` or `dedup` would have made of `path` at another threshold.

    Raises ConfigError for a threshold below the floor down to which pairs were stored, or if a later step compared
    rows.
    """
    if kind_of(Path(path)) == "duplicates":
        return of_files.rethreshold(path, out, threshold=threshold, replace=replace, show=show)
    began = time.monotonic()
    old = open_artifact(path, "dataset")
    recipe = load_recipe(old.manifest["recipe"])
    step, later = _steps(recipe, old)
    pair_store.check_threshold(threshold, old.manifest["steps"]["near_duplicates"]["rules"]["floor"])
    check_output_free(Path(out).absolute(), replace=replace)
    rebuild = _Rethreshold(old, dataclasses.replace(step, threshold=threshold), recipe, later)
    dataset = write_dataset(Path(out), rebuild.fill, parents=[old], replace=replace)
    return Curated(dataset, 0, time.monotonic() - began)


def _steps(recipe: CurateRecipe, old: Artifact) -> tuple[NearDuplicates, Sequence[Any]]:
    """Return the near-duplicate step and the row steps after it."""
    positions = [index for index, step in enumerate(recipe.steps) if isinstance(step, NearDuplicates)]
    if len(positions) != 1 or not (old.path / "evidence" / "near_duplicates.parquet").is_file():
        raise ConfigError(
            f"{old.path} was not made with near_duplicates, or with several",
            "sartor curate RECIPE --out DATASET --replace, with one step {kind: near_duplicates, threshold: 0.7}",
        )
    later = recipe.steps[positions[0] + 1 :]
    others = [step.kind for step in later if needs_all_rows(step) and not isinstance(step, ExactDuplicates)]
    if others:
        raise ConfigError(
            f"{', '.join(others)} compared the rows that near_duplicates had left",
            f"curate again with --steps in which near_duplicates stands behind {' and '.join(others)}",
        )
    if copying := [step.kind for step in later if makes_copies(step)]:
        problem = f"{' and '.join(copying)} copied the rows that near_duplicates had left"
        raise ConfigError(
            problem, "curate again with the threshold: a line of the recipe, near_duplicates: {threshold: ...}"
        )
    step = recipe.steps[positions[0]]
    assert isinstance(step, NearDuplicates)
    return step, [step for step in later if not needs_all_rows(step)]


class _Rethreshold:
    """The old Dataset and the new decision on its rows.

    Rows are numbered: first the kept rows, then those that were set aside.
    """

    def __init__(self, old: Artifact, step: NearDuplicates, recipe: CurateRecipe, later: Sequence[Any]) -> None:
        self.old, self.step, self.recipe = old, step, recipe
        self.functions: list[tuple[str, RowFunction]] = [(item.kind, item.open(old.path)) for item in later]
        self.kept_table = _read(old, "examples")
        self.aside_table = _read(old, "set_aside")
        ids = self.kept_table["id"].to_pylist() + (
            self.aside_table["was"].to_pylist() if len(self.aside_table) else []
        )
        self.number = {name: index for index, name in enumerate(ids)}
        self.ids = ids
        self._decide()

    def _decide(self) -> None:
        """Compute the rows to remove at the new threshold, and the row kept in place of each."""
        pairs = pl.read_parquet(self.old.path / "evidence" / "near_duplicates.parquet")
        # a row that was neither kept nor set aside was removed by a later step
        pairs = pairs.filter(pl.col("a").is_in(self.ids) & pl.col("b").is_in(self.ids))
        a = np.array([self.number[name] for name in pairs["a"]], np.int64)
        b = np.array([self.number[name] for name in pairs["b"]], np.int64)
        count = len(self.ids)
        rank, order = np.zeros(count), np.arange(count, dtype=np.int64)
        for end, numbers in (("a", a), ("b", b)):
            rank[numbers] = pairs[f"rank_{end}"].to_numpy()
            order[numbers] = pairs[f"place_{end}"].to_numpy()
        # among rows of equal rank the first one read is kept: number the rows in reading order
        read_order = np.argsort(order, kind="stable")
        positions = np.empty(count, np.int64)
        positions[read_order] = np.arange(count)
        low, high = np.minimum(positions[a], positions[b]), np.maximum(positions[a], positions[b])
        measured = (pairs[name].to_numpy() for name in ("jaccard", "containment", "exact"))
        rules = self.step.rules()
        removals = clusters.resolve_clusters(ScoredPairs(low, high, *measured).unique(), rank[read_order], rules)
        sources = []
        for table in (self.kept_table, self.aside_table):
            sources += [origins[0]["source"] for origins in table["origins"].to_pylist()]
        names = sorted(set(sources))
        numbers = np.array([names.index(sources[row]) for row in read_order], np.int64)
        limits = clusters.RemovalLimits(
            self.step.max_source_fraction,
            self.step.max_fraction,
            allow=self.step.allow,
            in_recipe=True,
            rerun="sartor curate RECIPE --out DIR",
        )
        clusters.check_removals(
            removals, numbers, names=names, limits=limits, describe=lambda row: self.ids[read_order[row]]
        )
        self.rules, self.removals = rules, removals
        removal_facts = zip(
            read_order[removals.kept_rows].tolist(), removals.score.tolist(), removals.method.tolist(), strict=True
        )
        self.removed = dict(zip(read_order[removals.rows].tolist(), removal_facts, strict=True))

    def fill(self, writer: DatasetWriter) -> Mapping[str, Any]:
        """Write the files of the new Dataset; return the facts of its manifest."""
        restored, new_drops = self._restored()
        staying_rows = [index for index in range(len(self.kept_table)) if index not in self.removed]
        splits = self._splits(staying_rows, restored)
        restored_rows = [
            dataclasses.replace(row, group=self._group(row), split=splits[self._group(row)]) for row in restored
        ]
        writer.examples(
            [self.kept_table.take(pa.array(staying_rows, pa.int64())), parquet_io.examples_table(restored_rows)]
        )
        writer.set_aside((self.ids[index], self._example(index)) for index in sorted(self.removed))
        old_drops = _read(self.old, "drops").to_pylist()
        other_drops = [Drop(**row) for row in old_drops if row["step"] != self.step.kind]
        writer.drop_file([*other_drops, *new_drops, *self._near_drops()])
        writer.evidence("near_duplicates", self._evidence())
        writer.media(self.old.path / "media")
        steps = [config.dump(self.step if isinstance(step, NearDuplicates) else step) for step in self.recipe.steps]
        read = writer.row_count + writer.dropped.total()
        assert read == self.old.manifest["counts"]["read"], (writer.row_count, writer.dropped)
        return writer.finish(
            recipe={**self.old.manifest["recipe"], "steps": steps},
            sources=writer.sources_with_kept(self.old.manifest["sources"]),
            steps=self._facts(),
            counts={"read": read, "made": 0},
        )

    def _evidence(self) -> Any:
        """Return the table of pairs with score and method under the new threshold."""
        table = pq.read_table(self.old.path / "evidence" / "near_duplicates.parquet")
        numbers = (table[f"place_{end}"].to_numpy() for end in ("a", "b"))
        pairs = ScoredPairs(*numbers, *(table[name].to_numpy() for name in ("jaccard", "containment", "exact")))
        score, method = pair_store.score_pairs(pairs, self.rules)
        for name, column in (("score", pa.array(score)), ("method", pa.array(method.tolist(), pa.string()))):
            table = table.set_column(table.schema.get_field_index(name), name, column)
        return table

    def _example(self, index: int) -> Example:
        kept_count = len(self.kept_table)
        table, offset = (self.kept_table, index) if index < kept_count else (self.aside_table, index - kept_count)
        return parquet_io.example_of(
            {name: column[0] for name, column in table.slice(offset, 1).to_pydict().items() if name != "was"}
        )

    def _restored(self) -> tuple[list[Example], list[Drop]]:
        """Return the rows that are no longer duplicates, and new Drops.

        The rows pass the later row steps first. Rows equal to a kept row or to one another become Drops too.
        """
        restored: dict[str, Example] = {}
        new_drops: list[Drop] = []
        kept_ids = set(self.kept_table["id"].to_pylist())
        for index in range(len(self.kept_table), len(self.ids)):
            if index in self.removed:
                continue
            outcome = apply_steps(self._example(index), self.functions)
            if isinstance(outcome, Example) and (outcome.id in kept_ids or outcome.id in restored):
                outcome = dataclasses.replace(
                    drop_of(
                        outcome, "exact_duplicate", "the same content as a row that stands", step="exact_duplicates"
                    ),
                    kept=outcome.id,
                )
            if isinstance(outcome, Drop):
                new_drops.append(outcome)
            else:
                restored[outcome.id] = outcome
        return list(restored.values()), new_drops

    def _splits(self, staying_rows: Sequence[int], restored: Sequence[Example]) -> dict[str, str]:
        """Return the split of every group.

        Groups of the old Dataset keep their split, and a new group has the one that its rows declare. Of the other
        new groups some are held out for eval by `eval_fraction`.
        """
        groups, splits = self.kept_table["group"].to_pylist(), self.kept_table["split"].to_pylist()
        split_by_group = {groups[index]: splits[index] for index in staying_rows}
        for row in restored:
            if row.split:
                split_by_group.setdefault(self._group(row), row.split)
        new_groups = [self._group(row) for row in restored if self._group(row) not in split_by_group]
        if new_groups:
            held_out = held_out_groups(new_groups, self.recipe.split.eval_fraction, self.recipe.seed)
            for group in new_groups:
                split_by_group[group] = "eval" if group in held_out else "train"
        return split_by_group

    def _group(self, row: Example) -> str:
        """Return the group that the recipe's split keeps together."""
        return split_group(row) if self.recipe.split.by == "group" else prompt_group(row)

    def _near_drops(self) -> Iterator[Drop]:
        for index, (kept_index, score, method) in sorted(self.removed.items()):
            detail = f"{score:.3f} {METHODS[method]} to {self._example(kept_index).origins[0].locator}"
            drop = drop_of(self._example(index), "near_duplicate", detail, step=self.step.kind)
            yield dataclasses.replace(
                drop, id=self.ids[index], kept=self.ids[kept_index], score=round(score, 6), method=METHODS[method]
            )

    def _facts(self) -> dict[str, Any]:
        """Return the facts of the steps, updated for the new threshold."""
        steps = dict(self.old.manifest["steps"])
        counts = {
            "clusters": self.removals.clusters,
            "largest_cluster": self.removals.largest_cluster,
            "removed": self.removals.by_method(),
        }
        steps["near_duplicates"] = {**steps["near_duplicates"], **counts, "rules": dataclasses.asdict(self.rules)}
        return steps


def _read(dataset: Artifact, folder: str) -> Any:
    """Return all tables of one folder of a Dataset as one; an empty table if there are none."""
    files = sorted((dataset.path / folder).glob("*.parquet"))
    if not files:
        return SET_ASIDE.empty_table()
    table = pa.concat_tables(pq.read_table(file) for file in files)
    # messages of an older Dataset have fewer fields: cast to the current types, without adding columns
    fields = [
        parquet_io.EXAMPLES.field(name) if name in parquet_io.EXAMPLES.names else table.field(name)
        for name in table.column_names
    ]
    return table.cast(pa.schema(fields)) if "messages" in table.column_names else table
