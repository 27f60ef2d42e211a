"""Content blocks of a data card, before they are Markdown or HTML.

A `str` is our own wording. Words that came from rows, files or recipes are `Said`, and each renderer shows them as
text and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONG = 300  # characters of a quotation that are shown


@dataclass(frozen=True)
class QuotedText:
    """Words of the data, cut to `max_chars` characters with a note of how many more there are; `prose` where they are
    a sentence.
    """

    text: str
    max_chars: int = LONG
    prose: bool = False


Line = str | QuotedText | tuple[str | QuotedText, ...]


@dataclass(frozen=True)
class Prose:
    """A paragraph. Of kind `warn` where the reader must know it, `soft` where it explains."""

    line: Line
    kind: str = ""


@dataclass(frozen=True)
class Headlines:
    """The big numbers: (value, what it is)."""

    shown: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the columns named in `numbers` stand to the right. `names` says that the first column names the
    rest.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Line]]
    numbers: frozenset[int] = frozenset()
    names: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot: the inside of an SVG of `width` x `height`, its file name in `card/`, and what it shows."""

    name: str
    title: str
    svg: str
    width: int
    height: int
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """Plots beside each other where there is room."""

    shown: Sequence[Plot]


@dataclass(frozen=True)
class Listing:
    """Code, or words of the data that keep their lines. `language` is for highlighting."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class ConversationBlock:
    """A row as a conversation: (role, text) pairs, and what stands below it."""

    shown: Sequence[tuple[str, str]]
    note: Line = ""


@dataclass(frozen=True)
class TextPiece:
    """Some words of a text; `differs` where the other text lacks them, `left_out` counts words that are not shown."""

    text: str
    differs: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class Dropped:
    """A dropped row and why, and the row that stands in its place where there is one, each in pieces."""

    reason: QuotedText
    where: QuotedText
    detail: QuotedText
    pieces: Sequence[TextPiece]
    kept_title: Line = ""
    kept_pieces: Sequence[TextPiece] = ()


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens."""

    summary: str
    blocks: Sequence[Block]


Block = Prose | Headlines | Table | Plot | Pictures | Listing | ConversationBlock | Dropped | Folded


@dataclass
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)
