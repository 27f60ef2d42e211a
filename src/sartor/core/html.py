"""Shared HTML page layout, escaping and number formats.

A page is one HTML file without scripts, fonts or images from elsewhere. All data goes through `escape`, so that no row
becomes markup, changes the reading direction or hides in invisible characters.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink:#1d2730; --soft:#5f6f7d; --line:#e3e8ec; --blue:#1f5f8b; --red:#d1495b; --green:#2f8f5b;
  --paper:#fbfaf7; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8ecef; --soft:#9aa8b3; --line:#33404a; --blue:#6fb1dd; --red:#ef7c8b;
  --green:#6ccb97; --paper:#161c21; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 3rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.6rem 0 .8rem; }
.lead { color: var(--soft); margin: .3rem 0 1.8rem; } .big { display: flex; gap: 2.5rem; flex-wrap: wrap; }
.big b { display: block; font-size: 2.1rem; font-weight: 600; line-height: 1.2; }
.big span { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
td, th { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: .86em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.better { color: var(--green); } .worse { color: var(--red); }
svg { width: 100%; height: auto; } img { max-width: 100%; } details { margin: .4rem 0; }
"""

# Control characters, bidirectional controls, invisible characters (zero width, tags), surrogates and noncharacters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufdd0-\ufdef"
    "\ufff0-\uffff\U000e0000-\U000e0fff]|[\r\u2028\u2029]"
)
# Stacked combining marks cover neighbouring text; no script needs more than four on a letter. The ranges cover Latin,
# Cyrillic, Hebrew, Arabic and Thai.
_MARK = (
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    "\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]"
)
_PILE = re.compile(f"({_MARK}{{4}})({_MARK}+)")


def escape_control(text: str) -> str:
    r"""Return `text` with invisible and control characters made visible; lines end in `\n`.

    Combining marks beyond the fourth on one character are replaced by their number.

    >>> escape_control("a\x00b\u202ec")
    'a␀b‹U+202E›c'
    """
    visible = _UNSEEN.sub(_shown, text.replace("\r\n", "\n"))
    return visible if visible.isascii() else _PILE.sub(lambda pile: f"{pile[1]}‹+{len(pile[2]):,} marks›", visible)


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in "\r\u2028\u2029":
        return "\n"
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return match[0] if code == 0xFFFD else f"‹U+{code:04X}›"


def escape(value: Any) -> str:
    """Return text that is safe in HTML, in a quoted attribute and in SVG."""
    return html.escape(escape_control(str(value)))


def clipped(text: str, max_length: int) -> str:
    """Return the first `max_length` characters and the number of the remaining ones.

    >>> clipped("abcdef", 4)
    'abcd… (+2 characters)'
    """
    return (
        text if len(text) <= max_length else f"{text[:max_length].rstrip()}… (+{len(text) - max_length:,} characters)"
    )


def document(title: str, body: str, *, style: str = "", head: str = "") -> str:
    """Return a whole HTML page.

    title: plain text; it is escaped.
    body, style, head: trusted markup; not escaped.
    """
    opening = (
        f"<meta charset=utf-8>{head}<meta name=viewport content='width=device-width'><title>{escape(title)}</title>"
    )
    return f"<!doctype html><html lang=en>{opening}<style>{STYLE}{style}</style><body>{body}</body></html>\n"


def headlines(numbers: Iterable[tuple[str, str]]) -> str:
    """Return the markup of the headline numbers.

    numbers: pairs (value, label).
    """
    parts = (f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in numbers)
    return f"<div class=big>{''.join(parts)}</div>"


def definition_table(mapping: Mapping[str, Any]) -> str:
    """Return the markup of a table of names and values."""
    lines = (
        f"<tr><td>{escape(key.replace('_', ' '))}</td><td><code>{escape(format_value(value))}</code></td></tr>"
        for key, value in mapping.items()
    )
    return f"<table>{''.join(lines)}</table>"


def format_value(value: Any) -> str:
    """Return a value as readable text: thousands separators, and four significant digits for a float."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one; its keys are joined by dots."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return result
