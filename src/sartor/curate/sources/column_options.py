"""Option `fields` of a source as text that can be typed: quoted for a recipe in YAML, and for a shell."""

from __future__ import annotations

import functools
import json
import re
import shlex

import yaml

_PLAIN = re.compile(r"[^\W\d_][\w ./-]*")
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


@functools.lru_cache(maxsize=1024)  # each row of an unknown form names the same columns
def quoted_scalar(text: str) -> str:
    """Return `text` as a YAML scalar, plain if YAML reads the same string.

    A column named `No` would be read as false.
    """
    if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def fields_option(**columns: str) -> str:
    """Return the option of a source in a recipe. columns: Sartor's name -> the column."""
    pairs = ", ".join(f"{name}: {quoted_scalar(column)}" for name, column in columns.items())
    return f"fields: {{{pairs}}}"


def fields_flag(**columns: str) -> str:
    """Return the --fields flag of `sartor tailor` quoted for a shell; a comma in a column's name is doubled."""
    pairs = ",".join(f"{name}={column.replace(',', ',,')}" for name, column in columns.items())
    return f"--fields {shlex.quote(pairs)}"
