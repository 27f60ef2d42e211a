"""Markdown -> plain text, by markdown-it (CommonMark with tables and strikethrough)."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from sartor.core.errors import need
from sartor.text.example_text import split_code

_HINT = re.compile(r"[*_`\[#~|]|^\s{0,3}(?:>|[-+] |\d+[.)] |-{3}|={3})", re.M)
_SIGNS = {
    "heading_open": "headings",
    "strong_open": "bold",
    "em_open": "italics",
    "s_open": "strikethrough",
    "link_open": "links",
    "image": "images",
    "code_inline": "code",
    "fence": "code blocks",
    "bullet_list_open": "lists",
    "ordered_list_open": "lists",
    "blockquote_open": "quotations",
    "table_open": "tables",
    "hr": "rules",
}
_CODE = ("code_inline", "fence")
_LISTS = ("bullet_list_open", "ordered_list_open", "bullet_list_close", "ordered_list_close")
# CommonMark reads 2*3*4 as italics; people do not write them inside a word
_TIMES = re.compile(r"(?<=\w)\*(?=\w)")


@cache
def _parser() -> Any:
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise need("markdown-it-py") from None
    # indented code and raw HTML off: in chat they are prose
    return (
        MarkdownIt("commonmark", {"html": False})
        .enable(["table", "strikethrough"])
        .disable(["code", "html_block", "html_inline", "entity"])
    )


def signs(text: str, keeps_code: bool) -> list[str]:
    """Which kinds of Markdown a text has; of code only where it is not kept."""
    if not _HINT.search(text):
        return []
    kinds = [token.type for token in _flat(_tokens(text))]
    return sorted({_SIGNS[kind] for kind in kinds if kind in _SIGNS and not (keeps_code and kind in _CODE)})


def plain_text(text: str, keeps_code: bool) -> str:
    """The text without Markdown: list marks and line breaks stay; links become their text. `keeps_code`: code keeps its marks.

    A text without Markdown comes back as it is.
    """
    if not _HINT.search(text):
        return text
    tokens = _tokens(text)
    kinds = {token.type for token in _flat(tokens)} & set(_SIGNS)
    if kinds <= (
        {*_CODE, "bullet_list_open", "ordered_list_open"} if keeps_code else {"bullet_list_open", "ordered_list_open"}
    ):
        return text
    return _blocks(tokens, keeps_code)


def _tokens(text: str) -> list[Any]:
    if "*" in text:
        text = "".join(piece if is_code else _TIMES.sub(r"\\*", piece) for is_code, piece in split_code(text))
    return list(_parser().parse(text))


def _flat(tokens: list[Any]) -> list[Any]:
    return [inner for token in tokens for inner in (token, *(token.children or []))]


def _blocks(tokens: list[Any], keeps_code: bool) -> str:
    """Blocks, one after another, apart as in the source; an item of a list begins with its mark."""
    lines: list[str] = []
    marks: list[str] = []
    cells: list[str] = []
    depth = upto = 0  # of lists; lines of the source that are done
    for place, token in enumerate(tokens):
        if token.type in _LISTS:
            depth += token.nesting
        elif token.type == "list_item_open":
            marks.append(f"{token.info}{token.markup}" if token.info else "-")
        elif token.type == "tr_close":
            lines.append(" | ".join(cells))
            cells = []
        elif token.type == "inline" and tokens[place - 1].type in ("td_open", "th_open"):
            cells.append(_inline(token.children, keeps_code))
            upto = token.map[1] if token.map else upto
        elif token.type in ("inline", "fence"):
            if lines and token.map[0] > upto:
                lines.append("")
            upto = token.map[1]
            body = _inline(token.children, keeps_code) if token.type == "inline" else _fence(token, keeps_code)
            lines += _indented(body, f"{marks.pop()} " if marks else "  " if depth else "", depth)
    return "\n".join(lines)


def _indented(body: str, mark: str, depth: int) -> list[str]:
    outer = "  " * max(depth - 1, 0)
    return [outer + (" " * len(mark) if place else mark) + line for place, line in enumerate(body.split("\n"))]


def _fence(token: Any, keeps_code: bool) -> str:
    body = token.content.removesuffix("\n")
    return f"{token.markup}{token.info}\n{body}\n{token.markup}" if keeps_code else body


def _inline(children: list[Any], keeps_code: bool) -> str:
    pieces = []
    for token in children:
        if token.type in ("softbreak", "hardbreak"):
            pieces.append("\n")
        elif token.type == "code_inline" and keeps_code:
            pieces.append(f"{token.markup}{token.content}{token.markup}")
        else:
            pieces.append(token.content)
    return "".join(pieces)
