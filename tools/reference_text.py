"""Parts that the pages of docs/reference/ share: head, tables, anchors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

HEAD = "Written by `python tools/reference.py` from {source}; a test holds it to the code.\n"


def page_of(title: str, source: str, lines: Iterable[str]) -> str:
    """Return a page. source: what the code declares it by."""
    return "\n".join([f"# {title}", "", HEAD.format(source=source), *lines]).rstrip() + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table and an empty line after it; a column that is empty in all rows is left out."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    lines = [f"| {' | '.join(columns[index] for index in used)} |", f"|{'---|' * len(used)}"]
    lines += [f"| {' | '.join(row[index] for index in used)} |" for row in rows]
    return [*lines, ""]


def anchor_of(heading: str) -> str:
    """Return the address of a heading within its page, as GitHub and the site give it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def in_markdown(text: str) -> str:
    """Return a help text or docstring with what Markdown would take for a tag or emphasis escaped, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    text = text.replace("<", "&lt;")
    return re.sub(r"\*|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", text)
