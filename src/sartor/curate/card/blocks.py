"""Content blocks of a data card, independent of Markdown and HTML.

A `str` is wording of the program. Text from rows, files or recipes is a `QuotedText`; each renderer shows it as text
and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sartor.core.text_differences import TextPiece

LONG = 300  # characters shown of a quotation


@dataclass(frozen=True)
class QuotedText:
    """Text from the data.

    max_chars: characters shown; a note says how many were cut.
    prose: the text is a sentence.
    """

    text: str
    max_chars: int = LONG
    prose: bool = False


Line = str | QuotedText | tuple[str | QuotedText, ...]


@dataclass(frozen=True)
class Prose:
    """A paragraph.

    kind: "warn" for a warning, "soft" for an explanation, or empty.
    """

    line: Line
    kind: str = ""


@dataclass(frozen=True)
class Headlines:
    """The main numbers: (value, description)."""

    shown: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    numbers: indices of right-aligned columns.
    names: the first column names the others.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Line]]
    numbers: frozenset[int] = frozenset()
    names: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot of `width` x `height` CSS pixels.

    name: file name in `card/`, without the ending.
    svg: the content of the SVG element.
    """

    name: str
    title: str
    svg: str
    width: int
    height: int
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """Plots side by side where there is room."""

    shown: Sequence[Plot]


@dataclass(frozen=True)
class Listing:
    """Code, or text of the data whose line breaks are kept. language: for highlighting."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class ConversationBlock:
    """A row as a conversation: (role, text) pairs, and a note below."""

    shown: Sequence[tuple[str, str]]
    note: Line = ""


@dataclass(frozen=True)
class Dropped:
    """A dropped row with its reason, and the row kept in its place if there is one."""

    reason: QuotedText
    where: QuotedText
    detail: QuotedText
    pieces: Sequence[TextPiece]
    kept_title: Line = ""
    kept_pieces: Sequence[TextPiece] = ()


@dataclass(frozen=True)
class Folded:
    """Blocks that are hidden until the reader opens them."""

    summary: str
    blocks: Sequence[Block]


Block = Prose | Headlines | Table | Plot | Pictures | Listing | ConversationBlock | Dropped | Folded


@dataclass
class Section:
    """A heading and its blocks."""

    title: str
    blocks: list[Block] = field(default_factory=list)
