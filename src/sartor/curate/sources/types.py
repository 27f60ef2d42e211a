"""Options of a source and of a feedback inbox."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, fields
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.licences.compliance import Consent, Use
from sartor.core.licences.spdx import UNKNOWN, checked
from sartor.curate.sources.encodings import UTF8, canonical_name
from sartor.curate.sources.row_formats import iso_date


@dataclass(frozen=True)
class InboxTerms:
    """Selection of the feedback that is read, and limits on the trust in one key."""

    agent: str = option(
        "", "that of this agent alone: faq, or one version faq@1.2; all of it is looked at to judge keys"
    )
    consent: Literal["assumed", "given"] = option(
        "assumed", "given: only where a client said so; assumed: also where nobody asked"
    )
    most_rows: int = option(20, "a key may give so many rows in any case")
    most_fraction: float = option(
        0.25, "of the rows that one key, or one user, may give; twice the even share where few speak"
    )
    disagreement: float = option(
        0.33, "of its ratings a key may contradict the others', or what is known; with more it is distrusted"
    )
    alpha: float = option(0.01, "how probable it may be that an honest key is set aside, of all keys together")
    known: str = option(
        "", "file of rows whose replies are known to be right, or wrong (`rejected`): keys are held against it too"
    )
    seed: int = option(0, "of the draw among the rows of a key that gives too many")

    def __post_init__(self) -> None:
        for name, low, high in (("most_fraction", 0.0, 1.0), ("disagreement", 0.0, 0.9), ("alpha", 1e-9, 0.5)):
            value = getattr(self, name)
            if not low <= value <= high:
                default = next(item.default for item in fields(self) if item.name == name)
                raise ConfigError(
                    f"inbox.{name} is {value:g}; it must be from {low:g} to {high:g}", f"{name}: {default:g}"
                )
        if self.most_rows < 0:
            raise ConfigError(f"inbox.most_rows is {self.most_rows}; it must be 0 or more", "most_rows: 20")


@dataclass(frozen=True)
class Columns:
    """Columns of a table whose names differ from Sartor's; empty for equal names. Other columns keep their names."""

    prompt: str = option("", "column of what is asked, Frage")
    completion: str = option("", "column of the answer that is learnt, Antwort")
    system: str = option("", "column of the system prompt")
    chosen: str = option("", "column of the better of two answers")
    rejected: str = option("", "column of the worse of two answers")
    messages: str = option("", "column of a whole conversation, a list of turns as JSON")
    text: str = option("", "column of a text that is learnt without a question")
    conversation: str = option(
        "", "column of a conversation's number, in a table with one row a turn; with role and content"
    )
    role: str = option("", "column of who speaks, in a table with one row a turn")
    content: str = option("", "column of what is said, in a table with one row a turn")
    group: str = option("", "column of what belongs together and is held out together: a customer, a document")
    rating: str = option("", "column of the rating of an answer, from -1 to 1")
    weight: str = option("", "column of the weight of a row")
    date: str = option("", "column of the date of a row")

    def __post_init__(self) -> None:
        columns = [column for column in self.by_name().values()]
        if repeated := next((column for column in columns if columns.count(column) > 1), ""):
            raise ConfigError(f"fields: the column {repeated!r} is named for two fields", "name it for one of them")
        if 0 < sum(map(bool, (self.conversation, self.role, self.content))) < 3:
            raise ConfigError(
                "fields: a table with one row a turn needs conversation, role and content",
                "fields: {conversation: id, role: sender, content: text}",
            )

    def by_name(self) -> dict[str, str]:
        """Return Sartor's field -> column, for the columns that are named."""
        return {field.name: column for field in fields(self) if (column := getattr(self, field.name))}


@dataclass(frozen=True)
class Owned:
    """Origin of rows, and the terms of their owner."""

    path: str = option(
        REQUIRED,
        "a file, a folder, a glob pattern, FILE.xlsx#SHEET, sql:URL#QUERY, asset:NAME/PATH, hub:NAME, or inbox:DIR",
    )
    licence: str = option(
        UNKNOWN, "own for rows that are yours; else the SPDX licence expression of this source, or LicenseRef-NAME"
    )
    use: tuple[Use, ...] = option((), "what the source may be used for; empty lets the licence alone decide")
    share_alike: bool = option(False, "its owner demands that a derived work carries the same terms")
    non_commercial: bool = option(False, "its owner forbids commercial use, whatever the licence says")
    expires: str = option("", "last day on which it may be used, 2027-12-31; empty is no end")
    consent: Consent = option(
        "", "of the people it is from: given, pending, withdrawn, not-needed; empty is not stated"
    )


@dataclass(frozen=True)
class SourceOptions(Owned):
    """Source of rows, and the way it is read."""

    split: Literal["", "train", "eval"] = option(
        "", "put every row of this source in one split; empty lets `split` decide"
    )
    rehearsal: bool = option(
        False, "general talk that keeps the base's manners: never held out, and not what an agent is for"
    )
    date: str = option("", "ISO date of the rows that carry none")
    prompt: str = option("", "the question put to each image or audio file that has a caption")
    fields: Columns = option(Columns(), "of a table whose columns have other names: which column holds what")
    system: str = option("", "system prompt of each row that has none")
    encoding: str = option(
        "", "of text that is not UTF-8: cp1252, utf-16; empty finds it, or reads nothing where it is unsure"
    )
    captions: Literal["beside", "folder"] = option(
        "beside", "what a media file shows is said by a table or text file beside it, or by its folder's name"
    )
    inbox: InboxTerms = option(
        InboxTerms(), "of inbox:DIR, what people said of a served team: what is read, whom it trusts"
    )

    def __post_init__(self) -> None:
        if self.date and not iso_date(self.date):
            raise ConfigError(f"date is {self.date!r}; it must be a date in ISO 8601", "date: 2026-01-31")
        if self.encoding:
            try:
                object.__setattr__(self, "encoding", canonical_name(self.encoding))
            except LookupError:
                raise ConfigError(f"there is no encoding {self.encoding!r}", f"encoding: cp1252, or {UTF8}") from None
        if self.rehearsal:
            if self.split == "eval":
                raise ConfigError(f"{self.path} is rehearsal and held out; it cannot be both", "leave out split: eval")
            object.__setattr__(self, "split", "train")
        object.__setattr__(
            self, "licence", checked(self.licence)
        )  # canonical spelling, so that equal licences compare equal
        if self.expires:
            try:
                last_day = datetime.date.fromisoformat(self.expires)
            except ValueError:
                tomorrow = datetime.date.today() + datetime.timedelta(days=1)
                problem = f"expires is {self.expires!r}; it must be a day, year-month-day"
                raise ConfigError(problem, f"expires: {tomorrow}") from None
            object.__setattr__(self, "expires", last_day.isoformat())
