"""Scan of one text with all recognizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sartor.core.errors import ConfigError
from sartor.text.pii import (
    credentials,
    national_ids,
    network_addresses,
    payment,
    person_names,
    phone_numbers,
    postal_addresses,
)
from sartor.text.pii.entities import (
    BREAK,
    NormalizedText,
    PiiEntity,
    Recogniser,
    digits,
    normalize,
    outside_placeholders,
    resolve_overlaps,
)

# entity -> function that opens its recognizer for a list of countries
OPENERS: Mapping[str, Callable[[Sequence[str]], Recogniser]] = {
    "email": lambda countries: network_addresses.emails,
    "phone": phone_numbers.opener,
    "credit_card": lambda countries: payment.cards,
    "iban": lambda countries: payment.ibans,
    "national_id": national_ids.opener,
    "ip_address": lambda countries: network_addresses.ip_addresses,
    "mac_address": lambda countries: network_addresses.mac_addresses,
    "secret": lambda countries: credentials.secrets,
    "crypto_wallet": lambda countries: payment.wallets,
    "address": lambda countries: postal_addresses.addresses,
    "birth_date": lambda countries: postal_addresses.birth_dates,
    "person": lambda countries: person_names.people,
}
BY_DIGITS = ("phone", "credit_card", "national_id")  # entities whose value does not depend on the grouping of digits
BY_CONTEXT = (
    "phone",
    "national_id",
    "secret",
    "birth_date",
    "person",
)  # entities that are found by a context word, which other occurrences may lack
MANY = 64
_WORD = re.compile(r"[^\s,;:!?\"'()<>]+")
NAMES_AND_WORDS = re.compile(
    r"may|will|mark|bill|grace|hope|joy|rose|dawn|art|frank|grant|june|april|august|drew|pat|rich|summer|king",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Allowed:
    """Values that are not personal data: in any spelling, or as regular expressions for a whole finding."""

    values: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, entries: Sequence[str], recognisers: Iterable[Recogniser]) -> Allowed:
        """Parse the entries of `allow`; an entry between slashes is a regular expression.

        Raises ConfigError for an invalid regular expression.
        """
        values: set[str] = set()
        patterns = []
        recognisers = list(recognisers)
        for item in entries:
            if len(item) > 2 and item[0] == item[-1] == "/":
                patterns.append(_compiled(item))
                continue
            values.add(_plain(item))
            for find in recognisers:
                values |= {finding.value for finding in find(normalize(item))}
        return cls(frozenset(values), tuple(patterns))

    def holds(self, finding: PiiEntity, text: str) -> bool:
        """Return whether a finding with this text is allowed."""
        return (
            finding.value in self.values
            or _plain(text) in self.values
            or any(pattern.fullmatch(text) for pattern in self.patterns)
        )


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression[1:-1], re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"allow: {expression!r} is no regular expression: {error}", "mend it, or write the value without slashes"
        ) from None


def _plain(text: str) -> str:
    """Return the form of a value for comparison: only digits for a number, else case-folded with single spaces."""
    number = digits(text)
    if len(number) >= 6 and not any(sign.isalpha() for sign in text):
        return number
    return " ".join(text.casefold().split())


class Scanner:
    """Scanner for personal data in a text.

    Raises ExtraError on creation if a library for one of the entities is not installed.
    """

    def __init__(
        self, entities: Sequence[str], countries: Sequence[str], min_score: float, allow: Sequence[str]
    ) -> None:
        self.entities = tuple(entities)
        self._recognisers = [OPENERS[entity](countries) for entity in entities]
        self._min_score = min_score
        self._allowed = Allowed.of(allow, self._recognisers) if allow else None

    def find(self, text: str, *, escapes: bool = False) -> list[PiiEntity]:
        """Return the findings of at least `min_score`, in order and without overlaps.

        escapes: as in `normalize`. Existing placeholders are left alone. A finding ends at a BREAK.
        """
        normalized = normalize(text, escapes=escapes)
        findings = [
            finding for find in self._recognisers for finding in find(normalized) if finding.score >= self._min_score
        ]
        if not findings:
            return []
        findings = outside_placeholders(findings, normalized.flat)
        if self._allowed is not None:
            findings = [
                finding
                for finding in findings
                if not self._allowed.holds(finding, normalized.flat[finding.start : finding.end])
            ]
        findings = resolve_overlaps(_cut(findings, normalized.flat))
        echoes = outside_placeholders(list(_echoes(findings, normalized)), normalized.flat)
        findings = resolve_overlaps([*findings, *echoes]) if echoes else findings
        return [normalized.in_source(finding) for finding in _of_one_value(findings, normalized.flat)]


def _of_one_value(findings: list[PiiEntity], flat: str) -> Iterator[PiiEntity]:
    """Yield the findings with equal values for equal digits.

    The value of a number can differ between occurrences, since it may be valid in a region or in none.
    """
    values: dict[tuple[str, str], str] = {}
    for finding in findings:
        text = flat[finding.start : finding.end]
        by_digits = finding.entity in BY_DIGITS and not any(sign.isalpha() for sign in text)
        value = values.setdefault((finding.entity, digits(text)), finding.value) if by_digits else finding.value
        yield finding if value == finding.value else replace(finding, value=value)


def _cut(findings: list[PiiEntity], flat: str) -> list[PiiEntity]:
    """Return the findings, cut at the end of their field."""
    return [
        replace(finding, end=finding.start + at)
        if (at := flat[finding.start : finding.end].find(BREAK)) > 0
        else finding
        for finding in findings
        if not flat.startswith(BREAK, finding.start)
    ]


def _echoes(findings: list[PiiEntity], normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield other occurrences of the found values, where no context word identifies them."""
    by_number: dict[str, PiiEntity] = {}
    by_spelling: dict[str, PiiEntity] = {}
    for finding in findings:
        text = normalized.flat[finding.start : finding.end]
        if finding.entity in BY_DIGITS and not any(sign.isalpha() for sign in text):
            by_number.setdefault(digits(text), finding)
        if finding.entity in BY_CONTEXT:
            by_spelling |= {spelling: finding for spelling in _spellings(finding, text) if spelling not in by_spelling}
    for start, end in normalized.runs if by_number else ():
        original = by_number.get(digits(normalized.flat[start:end]))
        if original is not None:
            yield _echo(original, start, end)
    for spelling, start, end in _occurrences(by_spelling, normalized.flat):
        yield _echo(by_spelling[spelling], start, end)


def _occurrences(by_spelling: Mapping[str, PiiEntity], flat: str) -> Iterator[tuple[str, int, int]]:
    if (
        len(by_spelling) > MANY
    ):  # many values: one pass over the words instead of one pass over the text for each value
        yield from ((match[0], *match.span()) for match in _WORD.finditer(flat) if match[0] in by_spelling)
        return
    for spelling, finding in by_spelling.items():
        if flat.count(spelling) > (spelling == flat[finding.start : finding.end]):
            for match in re.finditer(rf"(?<!\w){re.escape(spelling)}(?!\w)", flat):
                yield spelling, match.start(), match.end()


def _echo(finding: PiiEntity, start: int, end: int) -> PiiEntity:
    """Return the finding at another position, with a lower score than a finding of that position's own."""
    return replace(finding, start=start, end=end, score=finding.score - 0.1)


def _spellings(finding: PiiEntity, text: str) -> list[str]:
    """Return the texts to search for elsewhere: the value, and for a name also its parts.

    Texts that are too short or ordinary words are left out.
    """
    if finding.entity != "person" or finding.subtype != "introduced":
        return [text] if len(text) >= 4 else []
    parts = [
        part for part in text.split() if len(part) >= 3 and part[0].isupper() and not NAMES_AND_WORDS.fullmatch(part)
    ]
    return [text, *parts] if len(text) >= 3 and not NAMES_AND_WORDS.fullmatch(text) else parts
