"""Renderers of a card: HTML and Markdown.

Markdown shows text from the data in code spans and fenced blocks, with a fence longer than any in the text. There
Markdown, HTML, links, mentions, formulas and autolinks have no effect. Sentences of plain letters and stops need no
protection and are shown as they are. In a table a vertical bar becomes its look-alike U+2223, since renderers split
cells before they parse code spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from sartor.core.html import clipped, document, escape, escape_control, headlines
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
    TextPiece,
)
from sartor.curate.card.plots import COLOURS, inline

_HEAD = (
    "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; img-src "
    'data:">'
)
_SHORT = 20  # longest name, in characters, that is kept on one line
_TURN = 500  # characters shown of a turn
_STYLE = (
    COLOURS
    + """
:root { --wash: color-mix(in srgb, var(--ink) 5%, var(--paper)); }
h2 { font-size: 1.25rem; margin: 2.4rem 0 1rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .6rem; } p { margin: .6rem 0; } .soft { color: var(--soft); }
.warn { border-left: 4px solid var(--red); background: color-mix(in srgb, var(--red) 9%, var(--paper));
  padding: .6rem .9rem; border-radius: 0 4px 4px 0; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 2rem;
  margin: 1.2rem 0 1.6rem; }
figure { margin: 0; break-inside: avoid; } figcaption { color: var(--soft); font-size: .84rem; margin-top: .3rem; }
table { margin: 1rem 0; } td { overflow-wrap: break-word; } .scroll { overflow-x: auto; }
.wide, .alone figure { min-width: 40rem; }
.said { font: .86em/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden;
  unicode-bidi: isolate; }
pre { background: var(--wash); padding: .8rem 1rem; border-radius: 6px; overflow: auto; max-height: 40rem; margin: .6rem 0;
  font: .84rem/1.5 ui-monospace, monospace; }
.row { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: .8rem 0; break-inside: avoid; }
.row > .note { color: var(--soft); font-size: .82rem; margin-top: .5rem; }
.turn { display: grid; grid-template-columns: 5.2rem 1fr; gap: .6rem; margin: .25rem 0; }
.turn > b { color: var(--soft); font-weight: 500; font-size: .82rem; padding-top: .1rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.4rem; }
.pair h4 { font-size: .82rem; font-weight: 500; color: var(--soft); margin: 0 0 .4rem; overflow-wrap: anywhere; }
td .short { white-space: nowrap; } .row .said { font-size: .84rem; }
.why { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .84rem;
  margin-bottom: .6rem; color: var(--soft); overflow-wrap: anywhere; align-items: baseline; }
.why b { color: var(--red); font-weight: 600; }
.names td:first-child, .names th:first-child { width: 13rem; } .big { margin: 1.6rem 0; } .lead { margin-bottom: 0; }
mark { color: inherit; border-radius: 3px; padding: 0 .15em; background: color-mix(in srgb, var(--green) 28%, transparent); }
.gone mark { background: color-mix(in srgb, var(--red) 26%, transparent); } i.cut { color: var(--soft); font-style: italic; }
summary { cursor: pointer; color: var(--blue); }
@media print { :root { color-scheme: light; --ink:#000; --soft:#444; --line:#ccc; --blue:#1f5f8b; --red:#b83246;
  --green:#23774a; --amber:#b57400; --violet:#64498f; --paper:#fff; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10.5pt; }
  h2, h3 { break-after: avoid; } pre { max-height: none; white-space: pre-wrap; } tr { break-inside: avoid; } }
"""
)


def render_html(name: str, sections: Sequence[Section]) -> str:
    """Return the card as one HTML page."""
    body = [f"<h1>{_line(QuotedText(name, 120), plain=True)}</h1>"]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>" if section.title else "")
        body.extend(map(_block, section.blocks))
    return document(clipped(name, 120), "".join(body), style=_STYLE, head=_HEAD)


def _block(block: Block) -> str:
    match block:
        case Prose():
            return f'<p class="{block.kind}">{_line(block.line)}</p>'
        case Headlines():
            return headlines(block.shown)
        case Table():
            return _table(block)
        case Plot():
            return f"<div class='scroll alone'>{_figure(block, titled=False)}</div>"
        case Pictures():
            return f"<div class=grid>{''.join(map(_figure, block.shown))}</div>"
        case Listing():
            return f"<pre>{escape(block.text)}</pre>"
        case ConversationBlock():
            turns = "".join(
                f"<div class=turn><b>{escape(role)}</b>{_text_div(text, _TURN)}</div>" for role, text in block.shown
            )
            return f"<div class=row>{turns}<div class=note>{_line(block.note)}</div></div>"
        case Dropped():
            return _dropped(block)
        case Folded():
            return f"<details><summary>{escape(block.summary)}</summary>{''.join(map(_block, block.blocks))}</details>"


def _line(line: Line, *, plain: bool = False) -> str:
    """Return a line as HTML. Quoted data gets its own face and its own reading direction."""
    parts = line if isinstance(line, tuple) else (line,)
    return "".join(_words(part, plain) if isinstance(part, QuotedText) else escape(part) for part in parts)


def _words(quoted: QuotedText, plain: bool) -> str:
    short = " short" if len(quoted.text) <= _SHORT else ""
    face = "" if plain or quoted.prose else f' class="said{short}"'
    return f"<bdi{face}>{escape(clipped(quoted.text, quoted.max_chars))}</bdi>" if quoted.text else ""


def _text_div(text: str, max_chars: int) -> str:
    return f"<div class=said dir=auto>{escape(clipped(text, max_chars))}</div>"


def _table(table: Table) -> str:
    def cells(tag: str, row: Iterable[Line]) -> str:
        marked = (
            f"<{tag}{' class=n' if n in table.numbers else ''}>{_line(cell)}</{tag}>" for n, cell in enumerate(row)
        )
        return f"<tr>{''.join(marked)}</tr>"

    head = cells("th", table.head) if any(table.head) else ""
    names = " class=names" if table.names else " class=wide" if len(table.head) > 4 else ""
    return f"<div class=scroll><table{names}>{head}{''.join(cells('td', row) for row in table.rows)}</table></div>"


def _figure(picture: Plot, *, titled: bool = True) -> str:
    """Return a plot as an HTML figure.

    titled: False for a plot that is alone in its section, which has the title already.
    """
    title = f"<h3>{escape(picture.title)}</h3>" if titled else ""
    note = f"<figcaption>{escape(picture.note)}</figcaption>" if picture.note else ""
    return f"<figure>{title}{inline(picture)}{note}</figure>"


def _dropped(block: Dropped) -> str:
    detail = f"<span>{_line(block.detail)}</span>"
    title = f"<div class=why><b>{_line(block.reason)}</b><span>{_line(block.where)}</span>{detail}</div>"
    kept_html = (
        f"<div><h4>{_line(block.kept_title)}</h4>{_pieces(block.kept_pieces)}</div>" if block.kept_title else ""
    )
    heading = "<h4>dropped:</h4>" if block.kept_pieces else ""
    dropped_html = f"<div class=gone>{heading}{_pieces(block.pieces)}</div>" if block.pieces else ""
    return f"<div class=row>{title}<div class=pair>{dropped_html}{kept_html}</div></div>"


def _pieces(pieces: Sequence[TextPiece]) -> str:
    parts = []
    for piece in pieces:
        if piece.left_out:
            parts.append(f"<i class=cut>… {piece.left_out:,} words …</i>")
        elif piece.differs:
            parts.append(f"<mark>{escape(piece.text)}</mark>")
        else:
            parts.append(escape(piece.text))
    return f"<div class=said dir=auto>{' '.join(parts)}</div>" if parts else ""


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
            head = [(label,) for _, label in block.shown]
            values = [f"**{_plain(value)}**" for value, _ in block.shown]
            return "\n".join((_row([_cell(*label) for label in head]), _rule(len(head), frozenset()), _row(values)))
        case Table():
            rows = [_row([_cell(cell) for cell in row]) for row in block.rows]
            return "\n".join(
                (_row([_cell(cell) for cell in block.head]), _rule(len(block.head), block.numbers), *rows)
            )
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
    return " ".join(
        f"(… {piece.left_out:,} words …)"
        if piece.left_out
        else f"{opening}{piece.text}{closing}"
        if piece.differs
        else piece.text
        for piece in pieces
    )


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
    parts = line if isinstance(line, tuple) else (line,)
    return "".join(_markdown_quoted(part, bar) if isinstance(part, QuotedText) else _plain(part) for part in parts)


def _markdown_quoted(quoted: QuotedText, bar: str) -> str:
    text = clipped(quoted.text, quoted.max_chars)
    return text if quoted.prose and _is_harmless(text) else code(text, bar)


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
