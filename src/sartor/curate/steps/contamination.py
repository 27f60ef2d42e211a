"""`contamination`: rows that overlap with named evaluation sets go, so that a score on those sets means something.

Word n-grams, as in Brown et al. 2020 (arXiv:2005.14165, appendix C), there 13 words. A text of an item counts as found in a
row when at least `threshold` of its n-grams stand in the row; one of fewer than two times `ngram` words is looked for by
shorter n-grams (half its words, at least 5). Passages that many items share, such as an instruction before each question, are
no part of an item: those of 5 words or more in over 10 items and over 1 % of them. An item of which fewer than 8 words in a
row are left is found only whole: a turn of the user that is one of its texts, of 4 words or more, or a row whose texts are all
of the item's.

Of a row with pictures or recordings its texts say little, since many such rows ask the same: it goes where an item names one of
its files, by the files' digests.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.steps.contract import Gathered, Removal, Verdicts
from sartor.curate.steps.evalsets import EvalSet, files_of, read_set
from sartor.curate.steps.grams import Index, WordHashes, built
from sartor.curate.steps.images import media_of
from sartor.text.example_text import texts


@dataclass(frozen=True)
class Contamination:
    """Drop rows that hold an item of an evaluation set."""

    against: tuple[str, ...] = option(REQUIRED, "evaluation sets: files, folders, glob patterns, or asset:NAME/path")
    ngram: int = option(13, "words of an n-gram; shorter items are looked for by shorter ones")
    threshold: float = option(0.5, "fraction of a text's n-grams that must stand in a row, above 0 up to 1")
    kind: Literal["contamination"] = "contamination"

    def __post_init__(self) -> None:
        if not self.against:
            raise ConfigError("against names no evaluation set", "against: [test.jsonl]")
        if not 5 <= self.ngram <= 100:
            raise ConfigError(f"ngram is {self.ngram}; it must be 5 to 100 words", "ngram: 13")
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}; it must be above 0, at most 1", "threshold: 0.5")

    def files(self) -> Sequence[Path]:
        """See Reading."""
        return [file for path in self.against for file, _ in files_of(path)]

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep: the number of the item that a row holds most of (-1: none), and how much of it."""
        index = _index(self.against, self.ngram, _stamp(self.against))
        media = [_media_of(example) for example in examples]
        said = [
            ([], []) if names else (texts(example, "prompt"), texts(example, "replies"))
            for example, names in zip(examples, media, strict=True)
        ]
        found = [index.of_media(names) or best for names, best in zip(media, index.grams.best(said), strict=True)]
        return pa.table(
            {
                "item": pa.array([item for item, _ in found], pa.int64()),
                "overlap": pa.array([overlap for _, overlap in found], pa.float32()),
                "is_file": pa.array([bool(names) for names in media], pa.bool_()),
            }
        )

    def decide(self, gathered: Gathered) -> Verdicts:
        """See SetStep. Raises ConfigError where a set cannot be read."""
        index = _index(self.against, self.ngram, _stamp(self.against))
        items = gathered.table["item"].to_numpy()
        overlaps = gathered.table["overlap"].to_numpy()
        is_file = gathered.table["is_file"].to_pylist()
        removals, counts = [], Counter[str]()
        for row in np.flatnonzero((items >= 0) & (overlaps >= np.float32(self.threshold))):
            name, place = index.names[int(items[row])]
            counts[name] += 1
            overlap = float(overlaps[row])
            detail = f"{overlap:.0%} of {place} of the evaluation set {name} stands in it"
            method = f"word {self.ngram}-grams"
            if is_file[row]:
                detail, method = f"{place} of the evaluation set {name} names a file of it", "equal file"
            removals.append(Removal(int(row), "contamination", detail, score=overlap, method=method))
        facts = {
            "sets": [
                {
                    "name": each.name,
                    "items": len(each.items),
                    "found_only_whole": index.too_short[each.name],
                    "unread": dict(each.unread),
                    "rows": counts[each.name],
                }
                for each in index.sets
            ]
        }
        return Verdicts(removals, facts=facts)


def _media_of(example: Example) -> list[str]:
    """sha256 of a row's pictures and recordings: they lie under it in a Dataset."""
    return [PurePath(name).stem for kind in ("image", "audio") for name in media_of(example, kind)]


def _stamp(paths: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells one state of the files from another, so that a process that lives on reads a changed file anew."""
    return tuple(_file_stamp(path) for path in paths)


def _file_stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(Path(path).expanduser())
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


@dataclass(frozen=True)
class _Index:
    """Evaluation sets, ready to be looked for."""

    sets: list[EvalSet]
    grams: Index
    names: list[tuple[str, str]]  # of each item: its set, its place
    too_short: Counter[str]  # items of a set that can only be found whole
    media: dict[str, int]  # sha256 of a file -> number of the first item that names it

    def of_media(self, digests: Sequence[str]) -> tuple[int, float] | None:
        """(item, 1) of the first file that an item names."""
        return next(((self.media[one], 1.0) for one in digests if one in self.media), None)


@cache
def _index(paths: tuple[str, ...], ngram: int, stamp: tuple[Any, ...]) -> _Index:
    sets = [read_set(path) for path in paths]
    names = [(each.name, place) for each in sets for place, _ in each.items]
    grams, short = built([texts for each in sets for _, texts in each.items], ngram, WordHashes())
    starts = itertools.accumulate((len(each.items) for each in sets), initial=0)
    media = {digest: start + item for start, each in zip(starts, sets, strict=False) for digest, item in each.media.items()}
    return _Index(sets, grams, names, Counter(names[item][0] for item in short), media)
