"""Replies of which it is known whether they are good: rows of a file, as crowdsourcing holds workers against gold questions.

The reply of a row is right, and its `rejected` is wrong. Of other replies to the same question nothing is known, unless both
are JSON: then another value is a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sartor.core.errors import ConfigError
from sartor.core.filesystem import file_digest
from sartor.core.records import Example, Feedback, Malformed, Origin, canonical, digest
from sartor.curate.inbox.lines import asked
from sartor.curate.sources import forms, readers

_ROW_BYTES = 4 << 20


@dataclass(frozen=True)
class Known:
    """Question -> its right replies and its wrong ones."""

    right: Mapping[str, set[str]] = field(default_factory=dict)
    wrong: Mapping[str, set[str]] = field(default_factory=dict)

    def sign(self, said: Feedback) -> int:
        """1 for a reply that is known to be right, -1 for a wrong one, 0 where it is not known."""
        if not self.right or not said.has_words:
            return 0
        question, reply = digest(asked(said, with_system=False)), _plain(said.reply)
        if reply in self.right.get(question, ()):
            return 1
        if reply in self.wrong.get(question, ()):
            return -1
        values = [one for one in self.right.get(question, ()) if one.startswith("{")]
        return -1 if values and reply.startswith("{") else 0


def mark(path: str) -> str:
    """Digest of the file, "" for none: with other replies known, other lines are rows. Raises ConfigError as `read`."""
    return file_digest(Path(path).expanduser()) if read(path).right else ""


def read(path: str) -> Known:
    """The rows of a file in any form that `curate` reads. Raises ConfigError for one that is not there, or holds none."""
    if not path:
        return Known()
    right: dict[str, set[str]] = {}
    wrong: dict[str, set[str]] = {}
    for _, row in readers.read(Path(path).expanduser(), _ROW_BYTES):
        example = _example(row)
        if example is None:
            continue
        turns = [[message.role, message.text] for message in example.prompt if message.role != "system"]
        question = digest(turns)
        right.setdefault(question, set()).add(_plain(example.reply))
        wrong.setdefault(question, set()).update(_plain(message.text) for message in example.rejected)
    if not right:
        raise ConfigError(f"inbox.known: {path!r} holds no question with a reply", "rows such as {question: ..., answer: ...}")
    return Known(right, wrong)


def _example(row: Any) -> Example | None:
    if isinstance(row, Malformed) or not isinstance(row, Mapping) or (form := forms.detect(row)) is None:
        return None
    try:
        return forms.parse(row, form, Origin("", ""), _no_media)
    except Malformed:
        return None


def _no_media(kind: str, value: str) -> NoReturn:
    raise Malformed("media", "what is known is known of text alone")


def _plain(reply: str) -> str:
    """A reply without what changes nothing: white space; of a JSON object, its form."""
    text = " ".join(reply.split())
    if text.startswith("{"):
        try:
            return canonical(json.loads(text)).decode()
        except (ValueError, RecursionError):
            pass
    return text
