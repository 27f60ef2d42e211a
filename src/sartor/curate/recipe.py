"""The curation recipe: sources, steps, split, seed. One declaration per option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.lineage import UNKNOWN
from sartor.curate.forms import iso_date
from sartor.curate.steps import ExactDuplicates, Step

Use = Literal["commercial", "non-commercial", "research", "internal"]


@dataclass(frozen=True)
class Source:
    """Where rows come from, and what its licence allows."""

    path: str = option(REQUIRED, "a file, a folder, a glob pattern, sql:URL#QUERY, asset:NAME/PATH, or hub:NAME")
    licence: str = option(UNKNOWN, "SPDX licence expression of this source")
    use: tuple[Use, ...] = option((), "what the source is declared to be for")
    split: Literal["", "train", "eval"] = option("", "put every row of this source in one split; empty lets `split` decide")
    date: str = option("", "ISO date of the rows that carry none")
    prompt: str = option("", "the question put to each image or audio file that has a caption")
    captions: Literal["beside", "folder"] = option(
        "beside", "what a media file shows is said by a table or text file beside it, or by its folder's name"
    )

    def __post_init__(self) -> None:
        if self.date and not iso_date(self.date):
            raise ConfigError(f"date is {self.date!r}; it must be a date in ISO 8601", "date: 2026-01-31")


@dataclass(frozen=True)
class Split:
    """How rows are held out. A group never straddles the split."""

    eval_fraction: float = option(0.1, "fraction of the rows held out, 0..1")
    by: Literal["group", "prompt"] = option("group", "the row's `group` field (its prompt where it has none), or the prompt")

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1", "eval_fraction: 0.1")


@dataclass(frozen=True)
class CurateRecipe:
    """Sources -> Dataset."""

    sources: tuple[Source, ...] = option(REQUIRED, "where rows come from")
    steps: tuple[Step, ...] = option((ExactDuplicates(),), "what is done to each row, in order")
    split: Split = option(Split(), "how rows are held out")
    seed: int = option(0, "seed of the split")
    max_row_bytes: int = option(4 << 20, "a longer row is dropped, not read")

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("the recipe names no source", "sources: [{path: rows.jsonl, licence: CC-BY-4.0}]")
