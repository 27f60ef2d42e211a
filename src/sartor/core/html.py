"""Templates, escaping and number formats of HTML pages.

A page is one HTML file without scripts, fonts or images from elsewhere. All data goes through `escape`, so that no row
becomes markup, changes the reading direction or hides in invisible characters.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import markupsafe

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


def format_value(value: Any) -> str:
    """Return a value as readable text: thousands separators, and four significant digits for a float."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def facts_table(title: str, facts: Mapping[str, Any]) -> str:
    """Return a small table for a notebook. It has no colours of its own, so that it suits light and dark themes."""
    rows = "".join(
        f'<tr><th style="text-align:left;font-weight:normal;opacity:.7">{escape(name)}</th>'
        f'<td style="text-align:left;white-space:pre-wrap">{escape(clipped(format_value(value), _LONGEST_CELL))}</td>'
        "</tr>"
        for name, value in facts.items()
    )
    head = f'<tr><th colspan="2" style="text-align:left">{escape(title)}</th></tr>'
    return f"<table><thead>{head}</thead>{rows}</table>"


_LONGEST_CELL = 400  # characters


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one; its keys are joined by dots."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return result


class _JoinLines(jinja2.ext.Extension):
    """Leave line breaks and indentation of a template out of the page. Style sheets keep theirs."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Return the source that is compiled."""
        return source if str(name).endswith(".css") else re.sub(r"\n\s*", "", source)


def _escape_output(value: Any) -> markupsafe.Markup:
    return value if isinstance(value, markupsafe.Markup) else markupsafe.Markup(escape(value))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("sartor", ""),
    autoescape=True,
    # before autoescape: it makes control characters visible too, and writes quotation marks as `html.escape` does
    finalize=_escape_output,
    undefined=jinja2.StrictUndefined,
    extensions=[_JoinLines],
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"clipped": clipped, "format_value": format_value}


def render_template(name: str, /, **context: Any) -> str:
    """Return a page or plot written by a template of the package; everything in `context` is escaped.

    name: its path below the package, as "core/page.html.j2".
    """
    return _ENVIRONMENT.get_template(name).render(context)
