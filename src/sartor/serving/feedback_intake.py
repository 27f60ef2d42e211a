"""Consent, rate and masking rules of incoming feedback.

All texts of one feedback are masked together: a value that occurs in the prompt, the reply and the correction gets one
placeholder. Images and recordings are not searched.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from sartor.core.records import Agreed, Example, Feedback, FeedbackAuthor, Message, Origin, Part
from sartor.curate.steps.personal_data import PersonalData
from sartor.media.content_parts import is_media
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.rate_limits import FeedbackRates
from sartor.serving.receipts import Digest, team_digest
from sartor.serving.team_config import FeedbackTerms

_NAMES = ("role", "type")  # fields whose values are words of the protocol
_OWN = ("text", "reply", "correction", "comment")
Change = Callable[[str], str]
THREADS = 2
T = TypeVar("T")


class Mask:
    """Masking of personal data in feedback.

    allow: values that stay, as in the `allow` of the curation step. Raises ConfigError for an invalid expression.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self._masking = PersonalData(allow=tuple(allow)).masking()
        self._lock = threading.Lock()

    def __call__(self, feedback: Feedback) -> Feedback:
        """Return the feedback without personal data; `masked` counts what was found, by kind."""
        messages = []
        for texts in _texts(feedback):
            messages.append(Message("user", tuple(Part("text", text) for text in texts)))
        row = Example(tuple(messages), _NOWHERE)
        counts: Counter[str] = Counter()
        with self._lock:
            self._masking.tally.clear()
            masked_row = self._masking.everywhere(row)
            for name, count in self._masking.tally.items():
                counts[name.partition(".")[0]] += count
        if masked_row is row:
            return feedback
        # the masked texts stand in the order in which `_texts` yields them
        masked_texts = iter([part.text for message in masked_row.messages for part in message.content])
        masked_messages = tuple(_walk(message, lambda text: next(masked_texts)) for message in feedback.messages)
        own_texts: dict[str, Any] = {name: next(masked_texts) for name in _OWN}
        return replace(feedback, messages=masked_messages, masked=dict(sorted(counts.items())), **own_texts)


_NOWHERE = (Origin("", ""),)


def _texts(feedback: Feedback) -> Iterator[list[str]]:
    """Yield the texts of each message, then each text field of the feedback."""
    for message in feedback.messages:
        texts: list[str] = []

        def collect(text: str, texts: list[str] = texts) -> str:
            texts.append(text)
            return text

        _walk(message, collect)
        yield texts
    for name in _OWN:
        yield [getattr(feedback, name)]


def _walk(value: Any, change: Change) -> Any:
    """Return the value with `change` applied to every text in it, except protocol fields and media."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        if is_media(value):
            return value
        return {key: inner if key in _NAMES else _walk(inner, change) for key, inner in value.items()}
    return [_walk(inner, change) for inner in value] if isinstance(value, list | tuple) else value


class FeedbackIntake:
    """Intake of feedback for one team. Safe to use from several threads.

    state: the team's state directory.
    """

    def __init__(self, terms: FeedbackTerms, state: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.inbox = FeedbackStore(state / "inbox")
        self.rates = FeedbackRates(terms, clock)
        self._terms = terms
        self._state = state
        self._mask = Mask(terms.allow)
        self._threads = ThreadPoolExecutor(THREADS, "sartor-feedback")

    def voice(self, key: str, user: str, consent: bool | None) -> FeedbackAuthor:
        """Return the author of a feedback.

        user: the client's id of the user; only its digest under the team's key is stored.
        """
        consent_state: Agreed
        if consent is None:
            consent_state = "assumed" if self._terms.consent == "assumed" else "refused"
        else:
            consent_state = "given" if consent else "refused"
        return FeedbackAuthor(key, self._digest("user", user), consent_state)

    def keep(self, feedback: Feedback, is_erased: Callable[[], bool] = lambda: False) -> Feedback:
        """Write a feedback without personal data, and without texts if consent is refused; return what is written.

        is_erased: returns whether a user of it was forgotten meanwhile. Raises ConflictError then, MissingError if the
        disk fails.
        """
        if feedback.by.consent == "refused":
            feedback = replace(feedback, correction="", comment="", messages=(), text="", reply="")
        stored = self._mask(feedback)
        self.inbox.add(stored, is_erased)
        return stored

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return the result of a function of this object in its own threads.

        The masking of long texts takes seconds, one at a time: in the event loop's threads it would hold up receipts.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    @cached_property
    def _digest(self) -> Digest:
        return team_digest(self._state)
