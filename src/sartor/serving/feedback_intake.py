"""Consent, rate and masking rules of incoming feedback.

All texts of one feedback are looked at together: a value that stands in the prompt, the reply and the correction has
one placeholder. Pictures and recordings are not looked into.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sartor.core.records import Example, Feedback, FeedbackAuthor, Message, Origin, Part
from sartor.curate.steps.personal_data import PersonalData
from sartor.media.content_parts import is_media
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.rate_limits import FeedbackRates
from sartor.serving.receipts import Digest, team_digest
from sartor.serving.team_config import FeedbackTerms

_NAMES = ("role", "type")  # whose values are words of the protocol
_OWN = ("text", "reply", "correction", "comment")
Change = Callable[[str], str]


class Mask:
    """Masks feedback. allow: values that stay, as the step's `allow` has them. Raises ConfigError for a bad
    expression.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self._masking = PersonalData(allow=tuple(allow)).masking()
        self._lock = threading.Lock()

    def __call__(self, feedback: Feedback) -> Feedback:
        """The feedback as it may be written; `masked` counts what was found, by kind."""
        row = Example(
            tuple(Message("user", tuple(Part("text", text) for text in texts)) for texts in _texts(feedback)), _NOWHERE
        )
        counts: Counter[str] = Counter()
        with self._lock:
            self._masking.tally.clear()
            masked_row = self._masking.everywhere(row)
            for name, count in self._masking.tally.items():
                counts[name.partition(".")[0]] += count
        if masked_row is row:
            return feedback
        words = iter([part.text for message in masked_row.messages for part in message.content])
        return replace(_map_texts(feedback, lambda text: next(words)), masked=dict(sorted(counts.items())))


_NOWHERE = (Origin("", ""),)


def _texts(feedback: Feedback) -> Iterator[list[str]]:
    """The texts of each message, then each of the feedback's own, in the order of `_map_texts`."""
    for message in feedback.messages:
        texts: list[str] = []
        _walk(message, lambda text, texts=texts: texts.append(text) or text)  # type: ignore[misc]
        yield texts
    yield from ([getattr(feedback, name)] for name in _OWN)


def _map_texts(feedback: Feedback, change: Change) -> Feedback:
    messages = tuple(_walk(message, change) for message in feedback.messages)
    own_texts: dict[str, Any] = {name: change(getattr(feedback, name)) for name in _OWN}
    return replace(feedback, messages=messages, **own_texts)


def _walk(value: Any, change: Change) -> Any:
    """The value with every text in it changed, but for what the protocol says and for media."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        if is_media(value):
            return value
        return {key: inner if key in _NAMES else _walk(inner, change) for key, inner in value.items()}
    return [_walk(inner, change) for inner in value] if isinstance(value, list | tuple) else value


class FeedbackIntake:
    """One team's. state: its directory. Safe to use from several threads."""

    def __init__(self, terms: FeedbackTerms, state: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.inbox = FeedbackStore(state / "inbox")
        self.rates = FeedbackRates(terms, clock)
        self._terms = terms
        self._state = state
        self._mask = Mask(terms.allow)

    def voice(self, key: str, user: str, consent: bool | None) -> FeedbackAuthor:
        """Who says it. user: an id as the client gives it; what is kept is a digest under the team's key."""
        agreed = self._terms.consent == "assumed" if consent is None else consent
        basis = ("assumed" if consent is None else "given") if agreed else "refused"
        return FeedbackAuthor(key, self._digest("user", user), basis)  # type: ignore[arg-type]

    def keep(self, feedback: Feedback) -> Feedback:
        """Write it, without words unless there is consent, and without personal data. Returns what is written.

        Raises MissingError when the disk does not take it.
        """
        if feedback.by.consent == "refused":
            feedback = replace(feedback, correction="", comment="", messages=(), text="", reply="")
        stored = self._mask(feedback)
        self.inbox.add(stored)
        return stored

    @cached_property
    def _digest(self) -> Digest:
        return team_digest(self._state)
