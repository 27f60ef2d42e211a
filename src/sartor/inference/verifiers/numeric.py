"""Verifier `numeric`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.inference.verifiers.submission import Submission

# digits with or without commas between thousands; bounded, so that no text takes long
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,8}|\d{1,40})(?:\.\d{1,40})?(?:[eE][-+]?\d{1,3})?")


@dataclass(frozen=True)
class NumericVerifier:
    """1 if the last number of a reply is that of the reference, within a tolerance, else 0."""

    tolerance: float = option(1e-6, "largest difference that counts as equal")
    relative: float = option(0.0, "the same as a fraction of the reference; the larger of both applies")
    kind: Literal["numeric"] = "numeric"

    def __post_init__(self) -> None:
        for name, value in (("tolerance", self.tolerance), ("relative", self.relative)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be at least 0", f"{name}: 0.0")

    def missing(self, row: Submission) -> str:
        """Return that the reference has no number, if so."""
        return "" if last_number(row.reference) is not None else "a number in its reply"

    def right_reply(self, row: Submission) -> str:
        """Return the reference."""
        return row.reference

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return 1 for each reply whose last number is near that of the reference."""
        results = []
        for submission in submissions:
            number, reference = last_number(submission.reply), last_number(submission.reference)
            is_near = False
            if number is not None and reference is not None:
                is_near = abs(number - reference) <= max(self.tolerance, self.relative * abs(reference))
            results.append(float(is_near))
        return results


def last_number(text: str) -> float | None:
    """Return the last number of a text, or None. Commas between thousands are read; infinities are not numbers.

    >>> last_number("3 of 1,250.5 kg, so 2e3."), last_number("none")
    (2000.0, None)
    """
    match = last_number_match(text)
    return _value(match) if match else None


def last_number_match(text: str) -> re.Match[str] | None:
    """Return the place of the last finite number of a text, or None."""
    finite = [match for match in _NUMBER.finditer(text) if math.isfinite(_value(match))]
    return finite[-1] if finite else None


def _value(match: re.Match[str]) -> float:
    return float(match.group().replace(",", ""))
