"""Words by which a text grants or denies something."""

from __future__ import annotations

import re
from typing import Literal

Decision = Literal["favourable", "unfavourable"]

# in lower case
FAVOURABLE = frozenset(
    [
        "accept",
        "accepted",
        "admit",
        "admitted",
        "approve",
        "approved",
        "eligible",
        "grant",
        "granted",
        "hire",
        "hired",
        "interview",
        "invite",
        "invited",
        "low risk",
        "pass",
        "passed",
        "qualified",
        "select",
        "selected",
        "shortlist",
        "shortlisted",
        "yes",
    ]
)
UNFAVOURABLE = frozenset(
    [
        "decline",
        "declined",
        "denied",
        "deny",
        "fail",
        "failed",
        "high risk",
        "ineligible",
        "no",
        "refuse",
        "refused",
        "regret",
        "reject",
        "rejected",
        "turn down",
        "turned down",
        "unsuccessful",
    ]
)
_OPPOSITE: dict[Decision, Decision] = {"favourable": "unfavourable", "unfavourable": "favourable"}
_WORDS_AFTER_NOT = 3  # "cannot in good conscience approve"
_WORD = re.compile(
    r"\b(?:(?P<favourable>"
    + "|".join(sorted(FAVOURABLE))
    + ")|(?P<unfavourable>"
    + "|".join(sorted(UNFAVOURABLE))
    + r"))\b"
)
_NOT = re.compile(rf"(?:\b(?:not|never|cannot|unable to)|n't)(?: \w+){{0,{_WORDS_AFTER_NOT}}} $")


def decision_of(text: str) -> Decision | None:
    """Return the decision of a text by its first decision word, inverted after a negation; None without such a word.

    >>> decision_of("We cannot grant this loan."), decision_of("Approved, with thanks."), decision_of("It is late.")
    ('unfavourable', 'favourable', None)
    """
    lowered = text.lower().replace("\u2019", "'")
    match = _WORD.search(lowered)
    if match is None:
        return None
    decided: Decision = "favourable" if match.lastgroup == "favourable" else "unfavourable"
    return _OPPOSITE[decided] if _NOT.search(lowered[: match.start()]) else decided
