"""What a reader says of a row or file that cannot be used, before it is a Drop."""

from __future__ import annotations


class Malformed(Exception):
    """A row or file that cannot be used: the word it is counted under, and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class SetAside(Malformed):
    """A row that is as it should be, and is not used for a reason of its source: a Drop, and no fault under `--strict`."""
