"""The rows of both sides, what is left out of them and why, and the units that are drawn together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sartor.core import parquet_io, records
from sartor.core.artifacts import kind_of, open_artifact
from sartor.core.errors import SourceError
from sartor.core.records import Drop, Example
from sartor.core.splits import group_of, split_group
from sartor.curate.sources.planner import read_all
from sartor.curate.sources.types import Source

I64 = NDArray[np.int64]
FEWEST_ROWS = 20
_ROW_BYTES = 4 << 20


@dataclass(frozen=True)
class Sides:
    """Synthetic rows, real rows that the generator did not see, and those that it did. left_out: reason -> rows.

    cited: of a synthetic row by its id, which characters of its parent's text it cites.
    """

    synthetic: list[Example]
    real: list[Example]
    seeds: list[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    cited: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def opened(synthetic: Path, reality: Path, seeds: Path | None) -> Sides:
    """The rows of the three. A path is a Dataset, or a file or folder in any form that `curate` reads.

    Of reality the held-out rows are taken where it holds out any, and its training rows are the seeds where none are named. A
    real row that is a seed, is a parent of a synthetic row, or is in the group of one, is left out: the generator knew it.
    Raises SourceError where fewer than FEWEST_ROWS are left of a side.
    """
    made, dropped = _rows_of(synthetic)
    made = [row for row in made if row.is_synthetic] or made  # of a Dataset in which both stand
    everything, more = _rows_of(reality)
    real = [row for row in everything if not row.is_synthetic]
    more += ["synthetic"] * (len(everything) - len(real))
    known = _rows_of(seeds)[0] if seeds else [row for row in real if row.split == "train"]
    if any(row.split == "eval" for row in real):
        real = [row for row in real if row.split == "eval"]
    elif not seeds:
        known = []  # nothing is held out: every row is reality
    left_out = records.tally([*dropped, *more])
    unseen = _unseen(real, made, known)
    if len(unseen) < len(real):
        left_out["seen_by_the_generator"] = len(real) - len(unseen)
    for name, path, some in (("synthetic", synthetic, made), ("held-out real", reality, unseen)):
        if len(some) < FEWEST_ROWS:
            raise SourceError(
                f"{len(some)} {name} rows are left of {path} ({left_out or 'nothing was left out'}); "
                f"with under {FEWEST_ROWS} nothing can be told",
                f"give {FEWEST_ROWS} {name} rows or more" + (" that no seed is in a group with" if name != "synthetic" else ""),
            )
    return Sides(made, unseen, known, left_out, _cited(synthetic))


def _cited(synthetic: Path) -> dict[str, tuple[int, int]]:
    """What `sartor synthesize` wrote down of the spans that its rows cite."""
    file = synthetic / "evidence" / "synthetic.parquet"
    if not file.is_file():
        return {}
    told = parquet_io.read_file(file)
    return {row["id"]: (row["span_start"], row["span_end"]) for row in told if row.get("span_start") is not None}


def _rows_of(path: Path) -> tuple[list[Example], list[str]]:
    """The rows of a Dataset, a file or a folder, and the reasons of those that cannot be read."""
    if kind_of(path) is not None:
        return list(parquet_io.read_examples(open_artifact(path, "dataset"))), []
    if not path.exists():
        raise SourceError(f"there is nothing at {path}", "give a Dataset, or a file of rows")
    with tempfile.TemporaryDirectory() as media:
        found = list(read_all(Source(str(path)), _ROW_BYTES, Path(media)))
    return [row for row in found if isinstance(row, Example)], [row.reason for row in found if isinstance(row, Drop)]


def _unseen(real: Sequence[Example], made: Sequence[Example], seeds: Sequence[Example]) -> list[Example]:
    parents = {parent for row in made for origin in row.origins for parent in origin.parents}
    seen = parents | {row.id for row in seeds}
    groups = {split_group(row) for row in seeds} | {split_group(row) for row in real if row.id in seen}
    return [row for row in real if row.id not in seen and split_group(row) not in groups]


def unit_of(row: Example) -> str:
    """Synthetic rows of one seed are drawn together too: they are as like as their seed makes them."""
    parents = sorted(parent for origin in row.origins for parent in origin.parents)
    return f"parent:{parents[0]}" if parents else group_of(row)


@dataclass(frozen=True)
class Pool:
    """Both sides together, of each at most so many rows. is_synthetic, units: (n,); real rows come last."""

    rows: list[Example]
    is_synthetic: NDArray[np.bool_]
    units: I64
    sampled: bool

    @property
    def count(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def synthetic(self) -> list[Example]:
        """The synthetic ones."""
        return self.rows[: int(self.is_synthetic.sum())]

    def units_of(self, *, synthetic: bool) -> int:
        """How many units a side has."""
        return len(np.unique(self.units[self.is_synthetic == synthetic]))


def pooled(sides: Sides, most: int, seed: int) -> Pool:
    """Both sides in one list, each cut to about `most` rows by whole units, drawn by seed."""
    rng = np.random.default_rng(seed)
    made, made_units = _drawn(sides.synthetic, [unit_of(row) for row in sides.synthetic], most, rng)
    real, real_units = _drawn(sides.real, [group_of(row) for row in sides.real], most, rng)
    names = [f"synthetic {name}" for name in made_units] + [f"real {name}" for name in real_units]
    units = np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)
    flags = np.arange(len(names)) < len(made)
    return Pool([*made, *real], flags, units, len(names) < len(sides.synthetic) + len(sides.real))


def _drawn(
    some: Sequence[Example], units: Sequence[str], most: int, rng: np.random.Generator
) -> tuple[list[Example], list[str]]:
    if len(some) <= most:
        return list(some), list(units)
    names, member = np.unique(np.array(units), return_inverse=True)
    order = rng.permutation(len(names))
    sizes = np.bincount(member)[order]
    # at least one unit, and no more than `most` rows where units are small enough for that
    taken = set(order[: max(1, int(np.searchsorted(sizes.cumsum(), most, side="right")))].tolist())
    places = [place for place, name in enumerate(member.tolist()) if name in taken]
    return [some[place] for place in places], [units[place] for place in places]
