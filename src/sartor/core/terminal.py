"""Text for a terminal, without the control characters that it would obey."""

from __future__ import annotations

import re

# C0 except tab and newline, DEL, and C1, whose U+009B begins a command on some terminals, as ESC [ does on all; and
# surrogates, as which bytes that are no UTF-8 are decoded and which no UTF-8 stream takes
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with each control character and surrogate spelled out as JSON does.

    JSON keeps its value by that. It works on each piece of a stream alone.
    """
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
