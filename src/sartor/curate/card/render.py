"""Renderers of a card: HTML and Markdown.

Markdown shows text from the data in code spans and fenced blocks, with a fence longer than any in the text. There
Markdown, HTML, links, mentions, formulas and autolinks have no effect. Sentences of plain letters and stops need no
protection and are shown as they are. In a table a vertical bar becomes its look-alike U+2223, since renderers split
cells before they parse code spans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sartor.core.html import clipped, escape_control, render_template
from sartor.core.text_differences import TextPiece
from sartor.curate.card.blocks import (
    Block,
    ConversationBlock,
    Dropped,
    Folded,
    Headlines,
    Line,
    Listing,
    Pictures,
    Plot,
    Prose,
    QuotedText,
    Section,
    Table,
)


def render_html(name: str, sections: Sequence[Section]) -> str:
    """Return the card as one HTML page."""
    return render_template(
        "curate/card/card.html.j2",
        title=clipped(name, 120),
        name=QuotedText(name, 120, prose=True),
        sections=sections,
        line_parts=_line_parts,
    )


def _line_parts(line: Line) -> tuple[str | QuotedText, ...]:
    return line if isinstance(line, tuple) else (line,)


_HARMLESS = re.compile(r"[^\W_](?:[^\W_]|[ ,;./%()'+-]|:(?= ))*")
# Patterns that renderers interpret even where punctuation is escaped: addresses, mentions, emoji, issues, formulas,
# tags
_ACTS = re.compile(r"www\.|://|@|:\w|\$|[#<>`\[\]\\{}]|\s\s|\n", re.IGNORECASE)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def render_markdown(name: str, head: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return the card as a Markdown file with a YAML head."""
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=100)
    parts = [f"---\n{front}---", f"# {_markdown_line(QuotedText(name, 120, prose=True))}"]
    for section in sections:
        parts += [f"## {_plain(section.title)}"] if section.title else []
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Prose():
            return ("> **Note:** " if block.kind == "warn" else "") + _markdown_line(block.line)
        case Headlines():
            labels = [_cell(label) for _, label in block.shown]
            values = [f"**{_plain(value)}**" for value, _ in block.shown]
            return "\n".join((_row(labels), _rule(len(labels), frozenset()), _row(values)))
        case Table():
            lines = [_row(list(map(_cell, block.head))), _rule(len(block.head), block.numbers)]
            for row in block.rows:
                lines.append(_row(list(map(_cell, row))))
            return "\n".join(lines)
        case Plot():
            return _picture(block)
        case Pictures():
            return "\n\n".join(map(_picture, block.shown))
        case Listing():
            return _fenced(block.text, block.language)
        case ConversationBlock():
            conversation = "\n".join(f"{role}: {clipped(text, 700)}" for role, text in block.shown)
            return _fenced(conversation, "text") + f"\n\n{_markdown_line(block.note)}"
        case Dropped():
            return _markdown_dropped(block)
        case Folded():
            return f"**{_plain(block.summary)}**\n\n" + "\n\n".join(map(_markdown_block, block.blocks))


def _markdown_dropped(block: Dropped) -> str:
    text = " · ".join(_markdown_line(part) for part in (block.reason, block.where, block.detail) if part.text)
    parts = [f"**dropped** {text}"]
    if block.pieces:
        parts.append(_fenced(_markdown_pieces(block.pieces, "[-", "-]"), "text"))
    if block.kept_title:
        parts.append(_markdown_line(block.kept_title))
    if block.kept_pieces:
        parts.append(_fenced(_markdown_pieces(block.kept_pieces, "{+", "+}"), "text"))
    return "\n\n".join(parts)


def _markdown_pieces(pieces: Sequence[TextPiece], opening: str, closing: str) -> str:
    texts = []
    for piece in pieces:
        if piece.left_out:
            texts.append(f"(… {piece.left_out:,} words …)")
        elif piece.differs:
            texts.append(f"{opening}{piece.text}{closing}")
        else:
            texts.append(piece.text)
    return " ".join(texts)


def _picture(picture: Plot) -> str:
    note = f"\n\n{_plain(picture.note)}" if picture.note else ""
    return f"![{_plain(picture.title)}](card/{picture.name}.svg){note}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(size: int, numbers: frozenset[int]) -> str:
    return _row(["--:" if index in numbers else "---" for index in range(size)])


def _cell(cell: Line) -> str:
    return _markdown_line(cell, bar="∣").replace("\n", " ")


def _markdown_line(line: Line, *, bar: str = "|") -> str:
    result = ""
    for part in _line_parts(line):
        if isinstance(part, QuotedText):
            text = clipped(part.text, part.max_chars)
            result += text if part.prose and _is_harmless(text) else code(text, bar)
        else:
            result += _plain(part)
    return result


def _is_harmless(text: str) -> bool:
    """Return True for letters, digits and stops that form no list item, address or emoji."""
    return bool(_HARMLESS.fullmatch(text)) and "www." not in text.lower() and not re.match(r"\d+[.)]", text)


def code(text: str, bar: str = "|") -> str:
    """Return a code span: one line, delimited by more backticks than occur anywhere in it."""
    text = " ".join(escape_control(text).split()).replace("|", bar)
    if not text:
        return ""
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text[0] in "` " or text[-1] in "`\\ " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(text: str, language: str) -> str:
    text = escape_control(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _plain(text: str) -> str:
    """Return text of the program with Markdown punctuation escaped.

    It may contain the name of a step or a rule. If that would still be interpreted, it becomes a code span.
    """
    return code(text) if _ACTS.search(text) else _SPECIAL.sub(r"\\\1", text)
