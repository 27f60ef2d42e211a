"""The card as Markdown with the YAML head that the Hugging Face Hub reads.

Words of the data stand in code spans and in fenced blocks, whose fence is longer than any in them: there Markdown, HTML,
links, mentions, formulas and autolinks mean nothing. Sentences of plain letters and stops can mean nothing, and stand as they
are. In a table a vertical bar is shown as its look-alike U+2223, since renderers part cells before they see a code span.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sartor.core.html import clipped, visible
from sartor.curate.card.blocks import (
    Block,
    Dropped,
    Folded,
    Headlines,
    Line,
    Listing,
    Picture,
    Pictures,
    Piece,
    Prose,
    Said,
    Section,
    Table,
    Turns,
)

_HARMLESS = re.compile(r"[^\W_](?:[^\W_]|[ ,;./%()'+-]|:(?= ))*")
# What renderers look for in text even where its punctuation is escaped: addresses, mentions, emoji, issues, formulas, tags
_ACTS = re.compile(r"www\.|://|@|:\w|\$|[#<>`\[\]\\{}]|\s\s|\n", re.IGNORECASE)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def render(name: str, head: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The file."""
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=100)
    parts = [f"---\n{front}---", f"# {_line(Said(name, 120, prose=True))}"]
    for section in sections:
        parts += [f"## {_plain(section.title)}"] if section.title else []
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    match block:
        case Prose():
            return ("> **Note:** " if block.kind == "warn" else "") + _line(block.line)
        case Headlines():
            head = [(label,) for _, label in block.shown]
            values = [f"**{_plain(value)}**" for value, _ in block.shown]
            return "\n".join((_row([_cell(*label) for label in head]), _rule(len(head), frozenset()), _row(values)))
        case Table():
            rows = [_row([_cell(cell) for cell in row]) for row in block.rows]
            return "\n".join((_row([_cell(cell) for cell in block.head]), _rule(len(block.head), block.numbers), *rows))
        case Picture():
            return _picture(block)
        case Pictures():
            return "\n\n".join(map(_picture, block.shown))
        case Listing():
            return _fenced(block.text, block.language)
        case Turns():
            said = "\n".join(f"{role}: {clipped(text, 700)}" for role, text in block.shown)
            return _fenced(said, "text") + f"\n\n{_line(block.note)}"
        case Dropped():
            return _dropped(block)
        case Folded():
            return f"**{_plain(block.summary)}**\n\n" + "\n\n".join(map(_block, block.blocks))


def _dropped(block: Dropped) -> str:
    said = " · ".join(_line(part) for part in (block.reason, block.where, block.detail) if part.text)
    parts = [f"**dropped** {said}"]
    if block.pieces:
        parts.append(_fenced(_pieces(block.pieces, "[-", "-]"), "text"))
    if block.kept_title:
        parts.append(_line(block.kept_title))
    if block.kept:
        parts.append(_fenced(_pieces(block.kept, "{+", "+}"), "text"))
    return "\n\n".join(parts)


def _pieces(pieces: Sequence[Piece], opening: str, closing: str) -> str:
    return " ".join(
        f"(… {piece.left_out:,} words …)"
        if piece.left_out
        else f"{opening}{piece.text}{closing}"
        if piece.differs
        else piece.text
        for piece in pieces
    )


def _picture(picture: Picture) -> str:
    note = f"\n\n{_plain(picture.note)}" if picture.note else ""
    return f"![{_plain(picture.title)}](card/{picture.name}.svg){note}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(size: int, numbers: frozenset[int]) -> str:
    return _row(["--:" if place in numbers else "---" for place in range(size)])


def _cell(cell: Line) -> str:
    return _line(cell, bar="∣").replace("\n", " ")


def _line(line: Line, *, bar: str = "|") -> str:
    parts = line if isinstance(line, tuple) else (line,)
    return "".join(_said(part, bar) if isinstance(part, Said) else _plain(part) for part in parts)


def _said(said: Said, bar: str) -> str:
    text = clipped(said.text, said.most)
    return text if said.prose and _is_harmless(text) else code(text, bar)


def _is_harmless(text: str) -> bool:
    """Letters, digits and stops that neither begin a list nor make an address or an emoji."""
    return bool(_HARMLESS.fullmatch(text)) and "www." not in text.lower() and not re.match(r"\d+[.)]", text)


def code(text: str, bar: str = "|") -> str:
    """A code span: one line, delimited by more backticks than stand in it anywhere."""
    text = " ".join(visible(text).split()).replace("|", bar)
    if not text:
        return ""
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text[0] in "` " or text[-1] in "`\\ " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(text: str, language: str) -> str:
    text = visible(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _plain(text: str) -> str:
    """Our own words, in which punctuation is no markup. A step's or a rule's name may be among them: if it acts, it is code."""
    return code(text) if _ACTS.search(text) else _SPECIAL.sub(r"\\\1", text)
