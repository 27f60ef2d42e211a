"""What of people's feedback goes into the inbox: who said it, how often one may, what they agreed to, without personal data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from sartor.agents.feedback import Inbox
from sartor.agents.masking import Mask
from sartor.agents.rates import FeedbackRates
from sartor.agents.receipt_content import Digest
from sartor.agents.receipts import team_digest
from sartor.agents.team import FeedbackTerms
from sartor.core.records import Feedback, Voice


class Hearing:
    """One team's. state: its directory. Safe to use from several threads."""

    def __init__(self, terms: FeedbackTerms, state: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.inbox = Inbox(state / "inbox")
        self.rates = FeedbackRates(terms, clock)
        self._terms = terms
        self._state = state
        self._mask = Mask(terms.allow)

    def voice(self, key: str, user: str, consent: bool | None) -> Voice:
        """Who says it. user: an id as the client gives it; what is kept is a digest under the team's key."""
        agreed = self._terms.consent == "assumed" if consent is None else consent
        said = ("assumed" if consent is None else "given") if agreed else "refused"
        return Voice(key, self._digest("user", user), said)  # type: ignore[arg-type]

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
