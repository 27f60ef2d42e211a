"""The curation recipe: sources, steps, split, seed. One declaration per option."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.licences import Consent, Use
from sartor.core.spdx import UNKNOWN, checked
from sartor.curate.inbox.terms import InboxTerms
from sartor.curate.sources.forms import iso_date
from sartor.curate.steps import Step, makes_copies
from sartor.curate.steps.exact import ExactDuplicates


@dataclass(frozen=True)
class Owned:
    """Where rows come from, and what their owner allows."""

    path: str = option(REQUIRED, "a file, a folder, a glob pattern, sql:URL#QUERY, asset:NAME/PATH, hub:NAME, or inbox:DIR")
    licence: str = option(UNKNOWN, "SPDX licence expression of this source; LicenseRef-NAME for terms of your own")
    use: tuple[Use, ...] = option((), "what the source may be used for; empty lets the licence alone decide")
    share_alike: bool = option(False, "its owner demands that a derived work carries the same terms")
    non_commercial: bool = option(False, "its owner forbids commercial use, whatever the licence says")
    expires: str = option("", "last day on which it may be used, 2027-12-31; empty is no end")
    consent: Consent = option("", "of the people it is from: given, pending, withdrawn, not-needed; empty is not stated")


@dataclass(frozen=True)
class Source(Owned):
    """A source, and how it is read."""

    split: Literal["", "train", "eval"] = option("", "put every row of this source in one split; empty lets `split` decide")
    rehearsal: bool = option(False, "general talk that keeps the base's manners: never held out, and not what an agent is for")
    date: str = option("", "ISO date of the rows that carry none")
    prompt: str = option("", "the question put to each image or audio file that has a caption")
    captions: Literal["beside", "folder"] = option(
        "beside", "what a media file shows is said by a table or text file beside it, or by its folder's name"
    )
    inbox: InboxTerms = option(InboxTerms(), "of inbox:DIR, what people said of a served team: what is read, whom it trusts")

    def __post_init__(self) -> None:
        if self.date and not iso_date(self.date):
            raise ConfigError(f"date is {self.date!r}; it must be a date in ISO 8601", "date: 2026-01-31")
        if self.rehearsal:
            if self.split == "eval":
                raise ConfigError(f"{self.path} is rehearsal and held out; it cannot be both", "leave out split: eval")
            object.__setattr__(self, "split", "train")
        object.__setattr__(self, "licence", checked(self.licence))  # one spelling, so that equal licences are equal text
        if self.expires:
            object.__setattr__(self, "expires", _day(self.expires))


def _day(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        tomorrow = datetime.date.today() + datetime.timedelta(days=1)
        raise ConfigError(f"expires is {text!r}; it must be a day, year-month-day", f"expires: {tomorrow}") from None


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
    workers: int = option(0, "processes at once; 0 takes one a core. Changes nothing in the Dataset")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; it must be 0 or more", "workers: 2")
        if not self.sources:
            raise ConfigError("the recipe names no source", "sources: [{path: rows.jsonl, licence: CC-BY-4.0}]")
        self._check_copies_are_last()

    def _check_copies_are_last(self) -> None:
        """Copies are made when it is known what is held out, so no step could see them: duplicates they would be to many."""
        kinds: list[str] = [step.kind for step in self.steps]
        copying: list[str] = [step.kind for step in self.steps if makes_copies(step)]
        others: list[str] = [step.kind for step in self.steps if not makes_copies(step)]
        if kinds != others + copying:
            behind = next(kind for kind in kinds[kinds.index(copying[0]) :] if kind not in copying)
            problem = f"steps: {behind} stands behind {copying[0]}, whose copies are made after every other step"
            raise ConfigError(problem, f"put {' and '.join(dict.fromkeys(copying))} last")
        if twice := next((kind for kind in copying if copying.count(kind) > 1), ""):
            raise ConfigError(
                f"steps: {twice} stands twice; its copies are made of the rows, not of copies", "more copies of one"
            )
