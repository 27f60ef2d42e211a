"""What becomes of the people of a row: the label of its reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.labels import target
from sartor.curate.labels.target import Target

_FEW, _ROWS_PER_REPLY = 12, 10


def outcomes(rows: Sequence[Example], form: str = "auto") -> Target:
    """The outcome of each row. form: as `target.find`, or the bare name of a field of JSON replies.

    `auto` also takes whole replies, however long, where a few of them are all there are. Raises ConfigError where `form` names
    what no row has.
    """
    return of_replies([row.reply for row in rows], form)


def of_replies(replies: Sequence[str], form: str = "auto") -> Target:
    """The same of the replies alone."""
    form = form if _is_form(form) else f"json:{form}"
    target.check(form)
    found = target.find(replies, form)
    if any(found.labels):
        return found
    if form not in ("auto", "text"):
        raise ConfigError(f"no reply has the outcome {form!r}", "auto, reply, json:KEY or regex:PATTERN")
    seen = Counter(text for reply in replies if (text := target.as_label(reply)))
    if form == "auto" and 2 <= len(seen) <= min(_FEW, len(replies) / _ROWS_PER_REPLY):
        labels = [target.as_label(reply) for reply in replies]
        return Target(labels, "reply", f"whole replies: {len(seen)} values in {seen.total():,} of {len(replies):,} rows")
    return found


def _is_form(form: str) -> bool:
    return form in ("auto", "reply", "text") or form.partition(":")[0] in ("json", "regex")
