"""Real and synthetic samples, and their embeddings."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sartor.core import parquet_io, records
from sartor.core.artifacts import kind_of, open_artifact
from sartor.core.errors import SourceError
from sartor.core.records import Drop, Example
from sartor.core.splits import HELD_OUT_SPLITS, group_of, split_group
from sartor.curate.sources.planner import read_all
from sartor.curate.sources.types import SourceOptions
from sartor.text.encoders import MOST_CHARACTERS, ChosenEncoder, prompt_text

I64 = NDArray[np.int64]
FEWEST_ROWS = 20
_ROW_BYTES = 4 << 20


@dataclass(frozen=True)
class ValidationSamples:
    """Rows of a validation.

    synthetic: synthetic rows. real: real rows that the generator did not see. seeds: rows that it saw.
    left_out: reason -> number of rows.
    cited: synthetic row id -> cited characters of its parent's text.
    """

    synthetic: list[Example]
    real: list[Example]
    seeds: list[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    cited: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def open_samples(synthetic: Path, reality: Path, seeds: Path | None) -> ValidationSamples:
    """Read synthetic rows, real rows and seeds.

    A path is a Dataset, or a file or folder in any form that `curate` reads. If reality has rows of the splits eval
    or test, only these are used, and its training rows are the seeds unless seeds are named. A real row is left out if
    it is a seed, a parent of a synthetic row, or in the group of one, since the generator knew it.

    Raises SourceError if fewer than FEWEST_ROWS rows are left on a side.
    """
    synthetic_rows, dropped = _rows_of(synthetic)
    synthetic_rows = [
        row for row in synthetic_rows if row.is_synthetic
    ] or synthetic_rows  # a Dataset may contain both kinds
    reality_rows, drop_reasons = _rows_of(reality)
    real = [row for row in reality_rows if not row.is_synthetic]
    drop_reasons += ["synthetic"] * (len(reality_rows) - len(real))
    seed_rows = _rows_of(seeds)[0] if seeds else [row for row in real if row.split == "train"]
    if any(row.split in HELD_OUT_SPLITS for row in real):
        real = [row for row in real if row.split in HELD_OUT_SPLITS]
    elif not seeds:
        seed_rows = []  # nothing is held out: every row counts as reality
    left_out = records.count_values([*dropped, *drop_reasons])
    unseen = _unseen(real, synthetic_rows, seed_rows)
    if len(unseen) < len(real):
        left_out["seen_by_the_generator"] = len(real) - len(unseen)
    for name, path, side_rows in (("synthetic", synthetic, synthetic_rows), ("held-out real", reality, unseen)):
        if len(side_rows) < FEWEST_ROWS:
            reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
            raise SourceError(
                f"{len(side_rows)} {name} rows are left of {path} (left out: {reasons or 'none'}); "
                f"with under {FEWEST_ROWS} nothing can be told",
                f"give {FEWEST_ROWS} {name} rows or more"
                + (" that no seed is in a group with" if name != "synthetic" else "")
                + (", with columns that are known: `sartor init` names them" if "unknown_form" in left_out else ""),
            )
    cited: dict[str, tuple[int, int]] = {}  # spans that `sartor synthesize` recorded, by row id
    evidence_file = synthetic / "evidence" / "synthetic.parquet"
    if evidence_file.is_file():
        for entry in parquet_io.read_file(evidence_file):
            if entry.get("span_start") is not None:
                cited[entry["id"]] = (entry["span_start"], entry["span_end"])
    return ValidationSamples(synthetic_rows, unseen, seeds=seed_rows, left_out=left_out, cited=cited)


def _rows_of(path: Path) -> tuple[list[Example], list[str]]:
    """Return the rows of a Dataset, a file or a folder, and the reasons of unreadable rows."""
    if kind_of(path) is not None:
        return list(parquet_io.read_examples(open_artifact(path, "dataset"))), []
    if not path.exists():
        raise SourceError(f"there is nothing at {path}", "give a Dataset, or a file of rows")
    with tempfile.TemporaryDirectory() as media:
        rows = list(read_all(SourceOptions(str(path)), _ROW_BYTES, Path(media)))
    return [row for row in rows if isinstance(row, Example)], [row.reason for row in rows if isinstance(row, Drop)]


def _unseen(real: Sequence[Example], synthetic_rows: Sequence[Example], seeds: Sequence[Example]) -> list[Example]:
    parents = {parent for row in synthetic_rows for origin in row.origins for parent in origin.parents}
    seen_ids = parents | {row.id for row in seeds}
    groups = {split_group(row) for row in seeds} | {split_group(row) for row in real if row.id in seen_ids}
    return [row for row in real if row.id not in seen_ids and split_group(row) not in groups]


def unit_of(row: Example) -> str:
    """Return the unit of a synthetic row: its first parent, or else its group.

    Synthetic rows of one seed are as similar as their seed makes them, so they are drawn together.
    """
    parents = sorted(parent for origin in row.origins for parent in origin.parents)
    return f"parent:{parents[0]}" if parents else group_of(row)


@dataclass(frozen=True)
class Pool:
    """Rows of both sides in one list, synthetic rows first.

    is_synthetic: (n,). units: (n,) unit number of each row.
    sampled: whether rows were left out to limit the number.
    """

    rows: list[Example]
    is_synthetic: NDArray[np.bool_]
    units: I64
    sampled: bool

    @property
    def count(self) -> int:
        """Number of rows n."""
        return len(self.rows)

    @property
    def synthetic(self) -> list[Example]:
        """The synthetic rows."""
        return self.rows[: int(self.is_synthetic.sum())]

    def units_of(self, *, synthetic: bool) -> int:
        """Return the number of units of a side."""
        return len(np.unique(self.units[self.is_synthetic == synthetic]))


def pooled(sides: ValidationSamples, max_rows: int, seed: int) -> Pool:
    """Return both sides in one pool, each cut to about `max_rows` rows by whole units, drawn by seed."""
    rng = np.random.default_rng(seed)
    synthetic, synthetic_units = _drawn(sides.synthetic, [unit_of(row) for row in sides.synthetic], max_rows, rng)
    real, real_units = _drawn(sides.real, [group_of(row) for row in sides.real], max_rows, rng)
    names = [f"synthetic {name}" for name in synthetic_units] + [f"real {name}" for name in real_units]
    units = np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)
    flags = np.arange(len(names)) < len(synthetic)
    return Pool([*synthetic, *real], flags, units, len(names) < len(sides.synthetic) + len(sides.real))


def _drawn(
    rows: Sequence[Example], units: Sequence[str], max_rows: int, rng: np.random.Generator
) -> tuple[list[Example], list[str]]:
    if len(rows) <= max_rows:
        return list(rows), list(units)
    names, member = np.unique(np.array(units), return_inverse=True)
    order = rng.permutation(len(names))
    sizes = np.bincount(member)[order]
    # at least one unit, and at most `max_rows` rows if the first unit is small enough
    selected_units = set(order[: max(1, int(np.searchsorted(sizes.cumsum(), max_rows, side="right")))].tolist())
    indices = [index for index, name in enumerate(member.tolist()) if name in selected_units]
    return [rows[index] for index in indices], [units[index] for index in indices]


F32 = NDArray[np.float32]
_TOPICS = (8, 16, 32)
_ROWS_PER_TOPIC = 8
_DRAWS = 3  # clusterings of each size, since the result of k-means depends on its start
_DIRECTIONS = 40


@dataclass(frozen=True)
class EmbeddedSamples:
    """Rows as (N, D) unit vectors.

    replies_at: column at which the reply's part begins; 0 if rows have one part only.
    cut: number of texts that were cut.
    """

    vectors: F32
    replies_at: int
    cut: int


def encoded(chosen: ChosenEncoder, rows: Sequence[Example]) -> EmbeddedSamples:
    """Return prompt and reply of each row as concatenated vectors, so that neither dominates.

    If only one of the two parts has any text, only that part is encoded.
    """
    texts = ([prompt_text(row) for row in rows], [row.reply[:MOST_CHARACTERS] for row in rows])
    parts = [part for part in texts if any(text.strip() for text in part)]
    if not parts:
        return EmbeddedSamples(np.zeros((len(rows), 1), np.float32), 0, 0)
    # encoded together, so that a word has the same vector in prompts and replies
    encodings = np.asarray(chosen.encoder.encode([text for part in parts for text in part]), np.float32)
    vectors = np.concatenate(np.split(encodings, len(parts)), axis=1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    replies_at = encodings.shape[1] if len(parts) == 2 else 0
    return EmbeddedSamples(
        np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32), replies_at, chosen.encoder.cut
    )


@dataclass(frozen=True)
class SampleSpace:
    """n rows of a pool as (n, D) unit vectors.

    replies_at: column at which the reply's part begins; 0 if rows have one part only.
    """

    pool: Pool
    vectors: F32
    seed: int
    replies_at: int = 0

    @cached_property
    def cosines(self) -> F32:
        """Cosine of each pair of rows, (n, n)."""
        return np.asarray(self.vectors @ self.vectors.T)

    @cached_property
    def kernel(self) -> F32:
        """Gaussian kernel of the rows, (n, n).

        Its width is the median distance of two rows (Gretton et al. 2012, section 8).
        """
        # k(x, y) = exp(-|x - y|^2 / w), with w the median of |x - y|^2 = 2 - 2 cos(x, y) over distinct rows
        squared = np.maximum(2 - 2 * self.cosines, 0)
        above = squared[np.triu_indices(len(squared), 1)]
        width = float(np.median(above[above > 1e-6])) if (above > 1e-6).any() else 1.0
        return np.exp(-squared / width).astype(np.float32)

    @cached_property
    def _order(self) -> I64:
        return self._by_likeness(self.cosines)

    @cached_property
    def _coarse_order(self) -> I64:
        lengths = np.linalg.norm(self._about, axis=1, keepdims=True)
        unit = np.asarray(self._about / np.where(lengths > 0, lengths, 1), np.float32)
        return self._by_likeness(unit @ unit.T)

    def _by_likeness(self, cosines: F32) -> I64:
        """Return (n, n) row numbers by similarity to each row, rows of the same unit last. cosines: (n, n)."""
        likeness = cosines.copy()
        likeness[self.pool.units[:, None] == self.pool.units[None, :]] = -2
        # ties are in random order: in order of number all synthetic rows would come first
        shuffled = np.random.default_rng([self.seed, 2]).permutation(len(likeness))
        return shuffled[np.argsort(-likeness[:, shuffled], axis=1, kind="stable")]

    def neighbours(self, count: int, *, coarse: bool = False) -> Any:
        """Return an (n, n) sparse 0/1 matrix: row i marks its `count` nearest rows of other units.

        coarse: measure nearness in the reduced space of topics instead of by single words.
        """
        nearest = (self._coarse_order if coarse else self._order)[:, :count]
        rows = np.repeat(np.arange(len(nearest)), nearest.shape[1])
        return sparse.csr_matrix(
            (np.ones(nearest.size, np.float32), (rows, nearest.ravel())), shape=self.cosines.shape
        )

    @cached_property
    def topics(self) -> list[I64]:
        """Clusterings of the rows by k-means over both sides, (n,) cluster numbers each.

        They go from coarse to fine, several draws for each size, since a drift may concern few topics or many.
        """
        from sklearn.cluster import KMeans

        counts = [count for count in _TOPICS if count * _ROWS_PER_TOPIC <= len(self.vectors)] or [2]
        draws = [(count, _DRAWS * self.seed + draw) for count in counts for draw in range(_DRAWS)]
        clusterings = (KMeans(count, n_init=1, random_state=seed).fit_predict(self._about) for count, seed in draws)
        return [np.asarray(labels, np.int64) for labels in clusterings]

    @cached_property
    def _about(self) -> F32:
        """Topic coordinates of the rows, (n, up to _DIRECTIONS): directions in which they differ most.

        Prompt and reply are added. Latent semantic analysis (Deerwester et al. 1990): the directions left out contain
        the words of single rows.
        """
        vectors = self.vectors
        if self.replies_at:
            vectors = vectors[:, : self.replies_at] + vectors[:, self.replies_at :]
        # centred X (n, D):  X X^T = U diag(l) U^T;  coordinates = U_top diag(sqrt(l_top))
        centred = vectors - vectors.mean(0)
        values, directions = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        top = slice(-_DIRECTIONS, None)
        return np.asarray(directions[:, top] * np.sqrt(np.maximum(values[top], 0)), np.float32)
