"""File of verified pairs, for decisions at other thresholds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv

from sartor.core.artifacts import SCHEMA
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.filesystem import write_file_atomic
from sartor.curate.dedup.clusters import components
from sartor.curate.dedup.pair_scoring import METHODS, DuplicateRules, ScoredPairs
from sartor.curate.dedup.shingles import F32, F64, I64

# Largest class of equal rows of which every pair is listed; in a larger class each row is paired with the first only.
LISTED = 32
_SCHEMA = pa.schema(
    [
        ("a", pa.int64()),
        ("b", pa.int64()),
        ("score", pa.float32()),
        ("method", pa.string()),
        ("jaccard", pa.float32()),
        ("containment", pa.float32()),
        ("rank_a", pa.float64()),
        ("rank_b", pa.float64()),
    ],
    metadata={b"sartor.schema": str(SCHEMA).encode()},
)


def write_pairs(file: Path, pairs: ScoredPairs, rank: NDArray[Any], rules: DuplicateRules) -> None:
    """Write all pairs down to the floor, with both measures and both rows' ranks.

    rank: (N,) rank of each row. This suffices to decide anew without the rows.
    """
    score, methods = score_pairs(pairs, rules)
    rank = np.asarray(rank, np.float64)
    columns = [pairs.a, pairs.b, score, methods, pairs.jaccard, pairs.containment, rank[pairs.a], rank[pairs.b]]
    pq.write_table(pa.table(columns, schema=_SCHEMA), file, compression="zstd")


def score_pairs(pairs: ScoredPairs, rules: DuplicateRules) -> tuple[F32, NDArray[Any]]:
    """Return (P,) score and (P,) method of every pair.

    The method is the measure by which a pair is a duplicate. Other pairs have method `below` and their Jaccard
    similarity.
    """
    is_duplicate = pairs.is_judged(rules.threshold, rules.contained)
    methods = np.where(is_duplicate, np.array(METHODS)[pairs.method(rules.threshold)], "below")
    return np.where(is_duplicate, pairs.score(rules.threshold), pairs.jaccard), methods


def read_pairs(file: Path, count: int) -> tuple[ScoredPairs, F64]:
    """Return the P pairs of a file of pairs, and (N,) the rank of each row.

    count: the number of rows N. Rows in no pair have rank 0, since nothing competes with them.

    Raises ArtifactError for a file that does not hold valid pairs.
    """
    try:
        table = pq.read_table(file, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{file} is no ledger of pairs: {str(error).splitlines()[0][:200]}",
            f"sartor dedup FILE... --out {file.parent} --replace",
        ) from None
    columns = {name: table[name].to_numpy() for name in ("a", "b", "jaccard", "containment", "rank_a", "rank_b")}
    exact = np.asarray(table["method"].to_numpy() == METHODS[0], bool)
    pairs = ScoredPairs(
        columns["a"], columns["b"], jaccard=columns["jaccard"], containment=columns["containment"], exact=exact
    )
    if len(pairs.a) and (pairs.a.min() < 0 or max(pairs.a.max(), pairs.b.max()) >= count):
        raise ArtifactError(
            f"{file} names rows that are not there", f"sartor dedup FILE... --out {file.parent} --replace"
        )
    rank = np.zeros(count)
    rank[pairs.a], rank[pairs.b] = columns["rank_a"], columns["rank_b"]
    return pairs, rank


def check_threshold(threshold: float, floor: float) -> None:
    """Raise ConfigError for a threshold outside the range of the stored pairs."""
    if not floor <= threshold <= 1:
        raise ConfigError(
            f"the threshold {threshold:g} is out of range: the ledger holds pairs from {floor:g} up",
            f"a threshold from {floor:g} to 1; for a lower one, de-duplicate again",
        )


def duplicates_at(pairs: ScoredPairs, count: int, rules: DuplicateRules) -> ScoredPairs:
    """Return the duplicates at the threshold, with the pairs of equal rows listed as LISTED says."""
    duplicates = pairs.judged(rules.threshold, rules.contained)
    exact_pairs = duplicates.select(duplicates.exact)
    if not len(exact_pairs.a):
        return duplicates
    labels = components(count, exact_pairs.a, exact_pairs.b)
    members = _members(labels, np.unique(labels[exact_pairs.b]))
    results = []
    for rows in members.values():
        if len(rows) <= LISTED:
            left, right = np.triu_indices(len(rows), 1)
        else:
            left, right = np.zeros(len(rows) - 1, int), np.arange(1, len(rows))
        results.append(ScoredPairs.of_exact(rows[left], rows[right]))
    near_pairs = duplicates.select(~duplicates.exact)
    has_equals = np.isin(labels[near_pairs.a], list(members)) | np.isin(labels[near_pairs.b], list(members))
    results.append(near_pairs.select(~has_equals))
    for index in np.flatnonzero(has_equals).tolist():
        # the pair stands for every pair of a row that equals its first end and one that equals its second
        equals = []
        for end in (near_pairs.a, near_pairs.b):
            rows = members.get(int(labels[end[index]]), end[index : index + 1])
            equals.append(rows[:LISTED])
        a, b = (grid.ravel() for grid in np.meshgrid(*equals))
        copies = near_pairs.select(np.full(len(a), index))
        results.append(replace(copies, a=np.minimum(a, b), b=np.maximum(a, b)))
    return ScoredPairs.joined(results).unique()


def _members(labels: I64, wanted: I64) -> dict[int, I64]:
    """Return the rows of each wanted label, ascending."""
    rows = np.flatnonzero(np.isin(labels, wanted))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(labels[rows])) + 1
    return {int(labels[cluster[0]]): cluster for cluster in np.split(rows, cuts) if len(cluster)}


def export(file: Path, pairs: ScoredPairs, rules: DuplicateRules) -> None:
    """Write (a, b, score, method) as .csv, .jsonl or .parquet, by the extension.

    Call `check_export` first.
    """
    score = pairs.score(rules.threshold).astype(np.float64).round(4)
    methods = pa.array(np.array(METHODS)[pairs.method(rules.threshold)].tolist(), pa.string())
    table = pa.table({"a": pairs.a, "b": pairs.b, "score": score, "method": methods})
    extension = file.suffix.lower()

    def write(stream: BinaryIO) -> None:
        if extension == ".csv":
            stream.write(b"a,b,score,method\n")
            csv.write_csv(table, stream, csv.WriteOptions(include_header=False, quoting_style="none"))
        elif extension == ".parquet":
            pq.write_table(table, stream)
        else:
            stream.writelines(f"{json.dumps(row)}\n".encode() for row in table.to_pylist())

    write_file_atomic(file, write)


def check_export(file: Path) -> None:
    """Raise ConfigError if pairs cannot be written to this file."""
    if file.suffix.lower() not in (".csv", ".jsonl", ".ndjson", ".parquet"):
        raise ConfigError(
            f"pairs are not written as {file.suffix or 'a file without extension'}",
            "--pairs FILE.csv, .jsonl or .parquet",
        )
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{file} is a folder, or its folder is not there", "choose another --pairs")
