"""What a reader says of a row or file that cannot be used, before it is a Drop."""

from __future__ import annotations

from pathlib import Path


class Malformed(Exception):
    """A row or file that cannot be used: the word it is counted under, and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def said_of(error: Exception, file: Path) -> str:
    """What a decoder says of a media file, in a line, by its name alone: where the work lies is no part of a Dataset."""
    first = (str(error).splitlines() or [""])[0]
    for path in (str(file), repr(str(file))[1:-1]):
        first = first.replace(path, file.name)
    return f"{type(error).__name__}: {first[:150]}"
