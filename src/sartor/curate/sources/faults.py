"""What a reader says of a row or file that cannot be used, before it is a Drop."""

from __future__ import annotations

from sartor.core import reply_markup
from sartor.core.errors import TemplateMarkupError
from sartor.core.records import Example


class Malformed(Exception):
    """A row or file that cannot be used: the word it is counted under, and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class SetAside(Malformed):
    """A row that is as it should be, and is not used for a reason of its source: a Drop, and no fault under `--strict`."""


def with_fields(example: Example) -> Example:
    """Return a row whose replies spell no markup of chat templates: calls and reasoning are fields. Raises Malformed."""
    try:
        return reply_markup.read_example(example)
    except TemplateMarkupError as error:
        raise Malformed(error.reason, error.problem) from None
