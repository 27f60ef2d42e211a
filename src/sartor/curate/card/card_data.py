"""Data of a card: the manifest's facts, statistics, drops and evidence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from sartor.core.licences.spdx import UNKNOWN
from sartor.core.records import Drop, count_values
from sartor.curate.card import dataset_statistics
from sartor.curate.card.dataset_statistics import DatasetStatistics, Labels, measure

BATCH = 8192
BY_LOT, LEAST_ALIKE = 12, 2  # candidates to show for each reason: random rows, least alike pairs
REASONS = 60  # reasons with candidates; a rule's name is part of its reason, so there may be many
SCORE_BINS = 50  # bins of 0..1
QUEUE = 10


@dataclass
class Drops:
    """Counts and samples of the removed rows.

    clusters: step -> {number of rows dropped for one survivor: number of such survivors}.
    """

    total: int = 0
    by_step: Counter[tuple[str, str]] = field(default_factory=Counter)  # (step, reason) -> rows
    by_source: Counter[str] = field(default_factory=Counter)
    clusters: dict[str, Counter[int]] = field(default_factory=dict)
    shown: dict[str, list[Drop]] = field(default_factory=dict)  # reason -> candidates, least alike pairs first

    def reasons(self) -> Counter[str]:
        """Return reason -> number of rows."""
        result: Counter[str] = Counter()
        for (_, reason), count in self.by_step.items():
            result[reason] += count
        return result


@dataclass
class PairScores:
    """Verified pairs of one evidence file.

    scores: (SCORE_BINS,) histogram of their scores over 0..1.
    methods: pairs by method.
    """

    total: int = 0
    scores: Any = field(default_factory=lambda: np.zeros(SCORE_BINS, dtype=np.int64))
    methods: Counter[str] = field(default_factory=Counter)


@dataclass
class Evidence:
    """Content of the evidence files, by file name.

    files: number of rows of every file.
    pairs: pairs of the files that hold them.
    queues: the first QUEUE entries of review queues.
    """

    files: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, PairScores] = field(default_factory=dict)
    queues: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_drops(files: Sequence[Path]) -> Drops:
    """Count the Drops and choose candidates to show for each reason.

    Candidates are the least alike pairs, and rows chosen at random by their ids.
    """
    drops, survivors = Drops(), []
    by_lot, least_alike = pl.DataFrame(), pl.DataFrame()
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                table = pl.DataFrame(batch)
                drops.total += len(table)
                drops.by_step.update(
                    {(step, reason): count for step, reason, count in _counts(table, "step", "reason")}
                )
                drops.by_source.update(dict(_counts(table, "source")))
                duplicates = table.filter(pl.col("kept").str.len_bytes() > 0)
                survivors.append(duplicates.select("step", pl.col("kept").hash(0)))
                by_lot = _least(by_lot, _with_lots(table), ("lot", "id", "source", "locator"), BY_LOT)
                least_alike = _least(
                    least_alike, duplicates.filter(pl.col("score") < 1), ("score", "id", "kept"), LEAST_ALIKE
                )
    drops.clusters = _clusters(survivors)
    for row in (*least_alike.iter_rows(named=True), *by_lot.drop("lot", strict=False).iter_rows(named=True)):
        candidates = drops.shown.setdefault(row["reason"], [])
        drop = Drop(**row)
        if drop not in candidates:
            candidates.append(drop)
    return drops


def _with_lots(table: pl.DataFrame) -> pl.DataFrame:
    """Return the table with a random key `lot` for each row: its id, which is a digest.

    A row that could not be read has no id; its key is a digest of source and locator.
    """
    locations = zip(table.get_column("id"), table.get_column("source"), table.get_column("locator"), strict=True)
    lots = [
        key or blake2b(f"{source}\n{locator}".encode(), digest_size=16).hexdigest()
        for key, source, locator in locations
    ]
    return table.with_columns(pl.Series("lot", lots, pl.String))


def _counts(table: pl.DataFrame, *by: str) -> list[tuple[Any, ...]]:
    return table.group_by(*by).len().sort(*by).rows()


def _least(pool: pl.DataFrame, table: pl.DataFrame, keys: Sequence[str], max_rows: int) -> pl.DataFrame:
    """Return the pool joined with the table, cut to the `max_rows` least rows by `keys` of each reason."""
    if table.is_empty():
        return pool
    joined = pl.concat([pool, table]) if len(pool) else table
    joined = joined.sort(*keys).group_by("reason", maintain_order=True).head(max_rows).select(table.columns)
    reasons = joined.get_column("reason").unique().sort()[:REASONS]
    return joined.filter(pl.col("reason").is_in(reasons.implode()))


def _clusters(survivors: Sequence[pl.DataFrame]) -> dict[str, Counter[int]]:
    """Return step -> {number of rows dropped for one survivor: number of such survivors}."""
    if not survivors:
        return {}
    sizes = (
        pl.concat(survivors).group_by("step", "kept").len().group_by("step", "len").len("clusters").sort("step", "len")
    )
    result: dict[str, Counter[int]] = {}
    for step, size, clusters in sizes.iter_rows():
        result.setdefault(step, Counter())[size] = clusters
    return result


def read_evidence(folder: Path) -> Evidence:
    """Read `evidence/*.parquet`.

    A file with columns a, b and score holds pairs; one with rank and id is a queue.
    """
    evidence = Evidence()
    for path in sorted((folder / "evidence").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            evidence.files[path.stem] = file.metadata.num_rows
            columns = set(file.schema_arrow.names)
            if {"a", "b", "score"} <= columns:
                evidence.pairs[path.stem] = _pairs(file, columns)
        if {"rank", "id"} <= columns:
            top = pl.scan_parquet(path).sort("rank", "id").head(QUEUE).collect()
            evidence.queues[path.stem] = top.to_dicts()
    return evidence


def _pairs(file: Any, columns: set[str]) -> PairScores:
    pairs = PairScores()
    for batch in file.iter_batches(1 << 16, columns=sorted({"score", "method"} & columns)):
        scores = batch["score"].to_numpy(zero_copy_only=False)
        pairs.total += len(scores)
        pairs.scores += np.histogram(scores, bins=SCORE_BINS, range=(0, 1))[0]
        if "method" in columns:
            pairs.methods.update(batch["method"].to_pylist())
    return pairs


_LABEL_FIELDS = ("intent", "label", "category", "class", "topic", "sentiment", "answer")
_MOST_LABELS = 200
_GENERIC = ("data", "dataset", "rows", "train", "test", "examples", "part-00000")  # the folder's name is used instead


@dataclass(frozen=True)
class Contents:
    """Facts and measurements of a Dataset. Counts that the facts lack are taken from the files."""

    folder: Path
    facts: Mapping[str, Any]
    rows: DatasetStatistics
    drops: Drops
    evidence: Evidence
    media: Mapping[str, dataset_statistics.MediaFileStats]
    languages: Counter[str] | None = field(default_factory=Counter)

    @property
    def counts(self) -> Mapping[str, Any]:
        """The manifest's counts."""
        return self.facts.get("counts") or {}

    @property
    def rows_kept(self) -> int:
        """Rows kept."""
        return int(self.counts.get("kept", self.rows.row_count))

    @property
    def dropped(self) -> dict[str, int]:
        """Number of rows by reason, most frequent first."""
        by_reason = self.counts.get("dropped")
        return count_values(self.drops.reasons().elements()) if by_reason is None else dict(by_reason)

    @property
    def rows_read(self) -> int:
        """Rows read."""
        return int(self.counts.get("read", self.rows_kept + sum(self.dropped.values())))

    @property
    def made_by(self) -> str:
        """Author of synthetic rows: a teacher's name or "rules alone"; empty for rows written by people."""
        synthetic = self.facts.get("synthetic")
        return str(synthetic["teacher"] or "rules alone") if synthetic else ""

    @property
    def rows_made(self) -> int:
        """Copies that steps made from rows, including those that are Drops."""
        return int(self.counts.get("made", 0))

    @property
    def splits(self) -> dict[str, int]:
        """Number of rows by split, train first."""
        splits = self.counts.get("splits")
        if splits is None:
            splits = self.rows.splits
        return {name: splits[name] for name in sorted(splits, key=lambda name: (name != "train", name))}

    @property
    def sources(self) -> Sequence[Mapping[str, Any]]:
        """One mapping per input file."""
        return self.facts.get("sources") or ()

    @property
    def licence(self) -> str:
        """SPDX expression of the whole Dataset."""
        return str(self.facts.get("licence") or UNKNOWN)

    @property
    def steps(self) -> Mapping[str, Any]:
        """Facts of each step, by kind."""
        return self.facts.get("steps") or {}

    @property
    def step_kinds(self) -> list[str]:
        """Kinds of the recipe's steps in order, each once."""
        kinds = []
        for step in (self.facts.get("recipe") or {}).get("steps") or ():
            if isinstance(step, Mapping):
                kinds.append(str(step["kind"] if "kind" in step else next(iter(step), "?")))
            else:
                kinds.append(str(step))
        return list(dict.fromkeys(kinds))

    @property
    def name(self) -> str:
        """Name of the Dataset: its own, or made from the names of its sources."""
        if self.facts.get("name"):
            return str(self.facts["name"])
        names = list(
            dict.fromkeys(_called(str(file.get("source") or file.get("path") or "rows")) for file in self.sources)
        )
        suffix = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + suffix or "Dataset"

    def stages(self) -> list[tuple[str, int, int]]:
        """Return (step, rows left after it, rows dropped in it) from read to kept.

        Copies that a step made count among the rows left after it.
        """
        lost: Counter[str] = Counter()
        for (step, _), count in self.drops.by_step.items():
            lost[step] += count
        order = list(dict.fromkeys(["read", *self.step_kinds]))
        order += sorted(set(lost) - set(order))
        stages, remaining = [("rows in the sources", self.rows_read, 0)], self.rows_read
        for step in order:
            remaining += int((self.steps.get(step) or {}).get("copies", 0)) - lost[step]
            if step != "read" or lost[step]:
                stages.append(("unusable" if step == "read" else step, remaining, lost[step]))
        return [*stages, ("kept", self.rows_kept, 0)]

    def gaps(self) -> Iterator[str]:
        """Yield a sentence for each mismatch between counts of the manifest and of the files.

        A consistent Dataset has none.
        """
        dropped = sum(self.dropped.values())
        if self.rows_kept != self.rows.row_count:
            yield f"the manifest counts {self.rows_kept:,} rows kept; examples/ holds {self.rows.row_count:,}."
        if dropped != self.drops.total:
            yield f"the manifest counts {dropped:,} rows dropped; drops/ holds {self.drops.total:,}."
        if self.rows_read + self.rows_made != self.rows_kept + dropped:
            made_text = f" and {self.rows_made:,} made" if self.rows_made else ""
            yield (
                f"{self.rows_read:,} rows were read{made_text}, {self.rows_kept:,} kept and {dropped:,} dropped: "
                "these do not add up."
            )

    def labels(self) -> tuple[str, Counter[str]] | None:
        """Return the label field and label -> rows, or None if the rows have no labels.

        The field is a key of JSON replies, or `reply` for whole replies.
        """
        fields: dict[str, Counter[str]] = {}
        for name, labels in self.rows.fields.items():
            values = self._as_labels(labels)
            if values:
                fields[name] = values
        named = (self.steps.get("suspicious_labels") or {}).get("label")
        for key in (named, *_LABEL_FIELDS, *sorted(fields, key=lambda key: (len(fields[key]), key))):
            if key in fields:
                return str(key), fields[key]
        values = self._as_labels(self.rows.replies)
        return ("reply", values) if values else None

    def _as_labels(self, labels: Labels) -> Counter[str] | None:
        """Return the values that repeat, if there are few and they cover half of the rows; else None."""
        repeated = Counter({value: count for value, count in (labels.values or {}).items() if count > 1})
        covers = repeated.total() * 2 >= max(self.rows.row_count, 1)
        return repeated if covers and 2 <= len(repeated) <= _MOST_LABELS else None


def gather(folder: Path, facts: Mapping[str, Any]) -> Contents:
    """Read the files of a Dataset that is being written.

    Memory is bounded: the rows are read once, in batches.
    """
    drops = read_drops(sorted((folder / "drops").glob("*.parquet")))
    evidence = read_evidence(folder)
    wanted_ids = {drop.kept for candidates in drops.shown.values() for drop in candidates if drop.kept}
    wanted_ids |= {str(row["id"]) for queue in evidence.queues.values() for row in queue}
    rows = measure(sorted((folder / "examples").glob("*.parquet")), wanted_ids)
    return Contents(
        folder,
        facts,
        rows=rows,
        drops=drops,
        evidence=evidence,
        media=dataset_statistics.media(folder),
        languages=dataset_statistics.languages(rows.sample),
    )


def short_path(path: str) -> str:
    """Return a path for display; an absolute one is cut to its last two parts.

    The rest of an absolute path belongs to the machine.
    """
    if not (PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()):
        return path
    parts = re.split(r"[\\/]+", path)
    return "/".join(("…", *[part for part in parts if part][-2:]))


def _called(source: str) -> str:
    if source.startswith("sql:"):
        return "sql"
    stem = source.removeprefix("hub:").removeprefix("inbox:").rstrip("/\\")
    parts = [part.split("*")[0] for part in re.split(r"[\\/]+", stem)]
    name = parts[-1].rsplit(".", 1)[0]
    if (not name or name.lower() in _GENERIC) and len(parts) > 1 and parts[-2]:
        return parts[-2]
    return name or source
