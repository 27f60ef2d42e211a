"""Consent, rate and masking rules of incoming feedback.

All texts of one feedback are looked at together: a value that stands in the prompt, the reply and the correction has one
placeholder. Pictures and recordings are not looked into.
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
    """Masks feedback. allow: values that stay, as the step's `allow` has them. Raises ConfigError for a bad expression."""

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self._masking = PersonalData(allow=tuple(allow)).masking()
        self._lock = threading.Lock()

    def __call__(self, said: Feedback) -> Feedback:
        """The feedback as it may be written; `masked` counts what was found, by kind."""
        row = Example(tuple(Message("user", tuple(Part("text", text) for text in texts)) for texts in _texts(said)), _NOWHERE)
        counts: Counter[str] = Counter()
        with self._lock:
            self._masking.tally.clear()
            clean = self._masking.everywhere(row)
            for name, count in self._masking.tally.items():
                counts[name.partition(".")[0]] += count
        if clean is row:
            return said
        words = iter([part.text for message in clean.messages for part in message.content])
        return replace(_changed(said, lambda text: next(words)), masked=dict(sorted(counts.items())))


_NOWHERE = (Origin("", ""),)


def _texts(said: Feedback) -> Iterator[list[str]]:
    """The texts of each message, then each of the feedback's own, in the order of `_changed`."""
    for message in said.messages:
        texts: list[str] = []
        _walk(message, lambda text, texts=texts: texts.append(text) or text)  # type: ignore[misc]
        yield texts
    yield from ([getattr(said, name)] for name in _OWN)


def _changed(said: Feedback, change: Change) -> Feedback:
    messages = tuple(_walk(message, change) for message in said.messages)
    own: dict[str, Any] = {name: change(getattr(said, name)) for name in _OWN}
    return replace(said, messages=messages, **own)


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
        said = ("assumed" if consent is None else "given") if agreed else "refused"
        return FeedbackAuthor(key, self._digest("user", user), said)  # type: ignore[arg-type]

    def keep(self, said: Feedback) -> Feedback:
        """Write it, without words unless there is consent, and without personal data. Returns what is written.

        Raises MissingError when the disk does not take it.
        """
        if said.by.consent == "refused":
            said = replace(said, correction="", comment="", messages=(), text="", reply="")
        kept = self._mask(said)
        self.inbox.add(kept)
        return kept

    @cached_property
    def _digest(self) -> Digest:
        return team_digest(self._state)
