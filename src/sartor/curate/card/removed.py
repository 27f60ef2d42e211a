"""What stands in `drops/*.parquet` and `evidence/*.parquet`: counts, clusters, scores, and rows to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from sartor.core.records import Drop

BATCH = 8192
BY_LOT, LEAST_ALIKE = 12, 2  # rows per reason that are held as candidates to be shown
REASONS = 60  # reasons of which rows are held; a rule's name is part of its reason, so there may be many
SCORE_BINS = 50  # of 0..1
QUEUE = 10


@dataclass
class Drops:
    """Rows removed. `clusters[step][n]` counts the surviving rows that n rows were dropped for."""

    total: int = 0
    by_step: Counter[tuple[str, str]] = field(default_factory=Counter)  # (step, reason) -> rows
    by_source: Counter[str] = field(default_factory=Counter)
    clusters: dict[str, Counter[int]] = field(default_factory=dict)
    shown: dict[str, list[Drop]] = field(default_factory=dict)  # reason -> candidates, the most telling first

    def reasons(self) -> Counter[str]:
        """reason -> rows."""
        found: Counter[str] = Counter()
        for (_, reason), count in self.by_step.items():
            found[reason] += count
        return found


@dataclass
class Pairs:
    """Verified pairs of one evidence file: a histogram of their scores over 0..1, and how many by which method."""

    total: int = 0
    scores: Any = field(default_factory=lambda: np.zeros(SCORE_BINS, dtype=np.int64))
    methods: Counter[str] = field(default_factory=Counter)


@dataclass
class Evidence:
    """What the evidence files hold: pairs and queues by file name; of every file its number of rows."""

    files: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, Pairs] = field(default_factory=dict)
    queues: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_drops(files: Sequence[Path]) -> Drops:
    """Count the Drops and pick candidates to show: per reason the least alike pairs, and some by lot (by their ids)."""
    drops, survivors = Drops(), []
    lot, unlike = pl.DataFrame(), pl.DataFrame()
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                table = pl.DataFrame(batch)
                drops.total += len(table)
                drops.by_step.update({(step, reason): count for step, reason, count in _counts(table, "step", "reason")})
                drops.by_source.update(dict(_counts(table, "source")))
                merged = table.filter(pl.col("kept").str.len_bytes() > 0)
                survivors.append(merged.select("step", pl.col("kept").hash(0)))
                lot = _least(lot, _drawn(table), ("lot", "id", "source", "locator"), BY_LOT)
                unlike = _least(unlike, merged.filter(pl.col("score") < 1), ("score", "id", "kept"), LEAST_ALIKE)
    drops.clusters = _clusters(survivors)
    for row in (*unlike.iter_rows(named=True), *lot.drop("lot", strict=False).iter_rows(named=True)):
        held = drops.shown.setdefault(row["reason"], [])
        if (drop := Drop(**row)) not in held:
            held.append(drop)
    return drops


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """The table with each row's lot: its id, which is a digest; where a row could not be read and has none, its place's."""
    places = zip(table.get_column("id"), table.get_column("source"), table.get_column("locator"), strict=True)
    lots = [key or blake2b(f"{source}\n{locator}".encode(), digest_size=16).hexdigest() for key, source, locator in places]
    return table.with_columns(pl.Series("lot", lots, pl.String))


def _counts(table: pl.DataFrame, *by: str) -> list[tuple[Any, ...]]:
    return table.group_by(*by).len().sort(*by).rows()


def _least(pool: pl.DataFrame, table: pl.DataFrame, keys: Sequence[str], most: int) -> pl.DataFrame:
    """The pool with the table's rows in it, of each reason the `most` least by `keys`."""
    if table.is_empty():
        return pool
    joined = pl.concat([pool, table]) if len(pool) else table
    joined = joined.sort(*keys).group_by("reason", maintain_order=True).head(most).select(table.columns)
    reasons = joined.get_column("reason").unique().sort()[:REASONS]
    return joined.filter(pl.col("reason").is_in(reasons.implode()))


def _clusters(survivors: Sequence[pl.DataFrame]) -> dict[str, Counter[int]]:
    """step -> (rows dropped for one survivor -> such survivors)."""
    if not survivors:
        return {}
    sizes = pl.concat(survivors).group_by("step", "kept").len().group_by("step", "len").len("clusters").sort("step", "len")
    found: dict[str, Counter[int]] = {}
    for step, size, clusters in sizes.iter_rows():
        found.setdefault(step, Counter())[size] = clusters
    return found


def read_evidence(folder: Path) -> Evidence:
    """What `evidence/*.parquet` holds. A file with a, b and score holds pairs; one with rank and id is a queue."""
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


def _pairs(file: Any, columns: set[str]) -> Pairs:
    pairs = Pairs()
    for batch in file.iter_batches(1 << 16, columns=sorted({"score", "method"} & columns)):
        scores = batch["score"].to_numpy(zero_copy_only=False)
        pairs.total += len(scores)
        pairs.scores += np.histogram(scores, bins=SCORE_BINS, range=(0, 1))[0]
        if "method" in columns:
            pairs.methods.update(batch["method"].to_pylist())
    return pairs
