"""Verifier `regex`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import BudgetError, ConfigError
from sartor.inference.verifiers.submission import Submission

# Time of one search, s
SEARCH_S = 1.0


@dataclass(frozen=True)
class RegexVerifier:
    """1 for a reply in which a regular expression is found, else 0; it needs no reference reply."""

    pattern: str = option(REQUIRED, "regular expression, found anywhere in the reply: ^ and $ bind it to the ends")
    kind: Literal["regex"] = "regex"

    def __post_init__(self) -> None:
        import regex  # 20 ms that most recipes do not need

        try:
            regex.compile(self.pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            problem = f"pattern {self.pattern!r:.80} is no regular expression: {error}"
            raise ConfigError(problem, "pattern: '^(yes|no)$'") from None

    def missing(self, row: Submission) -> str:
        """Return an empty string: the pattern is all that is needed."""
        return ""

    def right_reply(self, row: Submission) -> str:
        """Return the reference."""
        return row.reference

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return 1 for each reply with the pattern. Raises BudgetError if a search takes longer than SEARCH_S."""
        import regex

        results = []
        for submission in submissions:
            try:
                found = regex.search(self.pattern, submission.reply, timeout=SEARCH_S)
            except TimeoutError:
                raise BudgetError(
                    f"the verifier regex searched the reply to row {submission.row} for more than {SEARCH_S:g} s",
                    f"objective.verifier.pattern: one without nested repetitions (now {self.pattern!r:.80})",
                ) from None
            results.append(float(found is not None))
        return results
