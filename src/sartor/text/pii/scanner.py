"""Runs all recognizers over one text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sartor.core.errors import ConfigError
from sartor.text.pii import credentials, national_ids, network_addresses, payment, person_names, phone_numbers, postal_addresses
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

# entity -> how its recogniser is opened for a list of countries
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
BY_DIGITS = ("phone", "credit_card", "national_id")  # whose value is the same however its digits are grouped
BY_CONTEXT = ("phone", "national_id", "secret", "birth_date", "person")  # found by a word that need not stand there twice
MANY = 64
_WORD = re.compile(r"[^\s,;:!?\"'()<>]+")
NAMES_AND_WORDS = re.compile(
    r"may|will|mark|bill|grace|hope|joy|rose|dawn|art|frank|grant|june|april|august|drew|pat|rich|summer|king",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Allowed:
    """What is not personal: values in any spelling, and regular expressions between slashes that match a whole finding."""

    values: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, said: Sequence[str], recognisers: Iterable[Recogniser]) -> Allowed:
        """Raises ConfigError for a regular expression that does not compile."""
        values: set[str] = set()
        patterns = []
        recognisers = list(recognisers)
        for one in said:
            if len(one) > 2 and one[0] == one[-1] == "/":
                patterns.append(_compiled(one))
                continue
            values |= {_plain(one), *(found.value for find in recognisers for found in find(normalize(one)))}
        return cls(frozenset(values), tuple(patterns))

    def holds(self, finding: PiiEntity, text: str) -> bool:
        """Whether the finding, which reads `text`, is allowed."""
        return finding.value in self.values or _plain(text) in self.values or any(one.fullmatch(text) for one in self.patterns)


def _compiled(one: str) -> re.Pattern[str]:
    try:
        return re.compile(one[1:-1], re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"allow: {one!r} is no regular expression: {error}", "mend it, or write the value without slashes"
        ) from None


def _plain(text: str) -> str:
    """A value as it is compared: digits alone where it is a number, else without case and doubled spaces."""
    number = digits(text)
    return number if len(number) >= 6 and not any(sign.isalpha() for sign in text) else " ".join(text.casefold().split())


class Scanner:
    """Finds personal data in a text. Raises ExtraError at once where a library for one of the entities is absent."""

    def __init__(self, entities: Sequence[str], countries: Sequence[str], min_score: float, allow: Sequence[str]) -> None:
        self.entities = tuple(entities)
        self._recognisers = [OPENERS[entity](countries) for entity in entities]
        self._min_score = min_score
        self._allowed = Allowed.of(allow, self._recognisers) if allow else None

    def find(self, text: str, *, escapes: bool = False) -> list[PiiEntity]:
        """Findings of at least the least score, in order, none over another. `escapes` as in `look`.

        What was masked before is left alone. A finding ends at a BREAK.
        """
        sight = normalize(text, escapes=escapes)
        found = [one for find in self._recognisers for one in find(sight) if one.score >= self._min_score]
        if not found:
            return []
        found = outside_placeholders(found, sight.flat)
        if self._allowed is not None:
            found = [one for one in found if not self._allowed.holds(one, sight.flat[one.start : one.end])]
        found = resolve_overlaps(_cut(found, sight.flat))
        echoes = outside_placeholders(list(_elsewhere(found, sight)), sight.flat)
        found = resolve_overlaps([*found, *echoes]) if echoes else found
        return [sight.in_source(one) for one in _of_one_value(found, sight.flat)]


def _of_one_value(found: list[PiiEntity], flat: str) -> Iterator[PiiEntity]:
    """The findings, of which those of the same digits have the same value: a number may be valid in a region or in none."""
    values: dict[tuple[str, str], str] = {}
    for one in found:
        text = flat[one.start : one.end]
        by_digits = one.entity in BY_DIGITS and not any(sign.isalpha() for sign in text)
        value = values.setdefault((one.entity, digits(text)), one.value) if by_digits else one.value
        yield one if value == one.value else replace(one, value=value)


def _cut(found: list[PiiEntity], flat: str) -> list[PiiEntity]:
    """Findings that end where their field does."""
    return [
        replace(one, end=one.start + at) if (at := flat[one.start : one.end].find(BREAK)) > 0 else one
        for one in found
        if not flat.startswith(BREAK, one.start)
    ]


def _elsewhere(found: list[PiiEntity], sight: NormalizedText) -> Iterator[PiiEntity]:
    """The values that were found, at the other places where nothing around them says what they are."""
    by_number: dict[str, PiiEntity] = {}
    spelt: dict[str, PiiEntity] = {}
    for one in found:
        text = sight.flat[one.start : one.end]
        if one.entity in BY_DIGITS and not any(sign.isalpha() for sign in text):
            by_number.setdefault(digits(text), one)
        if one.entity in BY_CONTEXT:
            spelt |= {said: one for said in _spellings(one, text) if said not in spelt}
    for start, end in sight.runs if by_number else ():
        same = by_number.get(digits(sight.flat[start:end]))
        if same is not None:
            yield _echo(same, start, end)
    for said, start, end in _places_of(spelt, sight.flat):
        yield _echo(spelt[said], start, end)


def _places_of(spelt: Mapping[str, PiiEntity], flat: str) -> Iterator[tuple[str, int, int]]:
    if len(spelt) > MANY:  # a dump of values: one pass over the words, instead of one over the text for each value
        yield from ((match[0], *match.span()) for match in _WORD.finditer(flat) if match[0] in spelt)
        return
    for said, one in spelt.items():
        if flat.count(said) > (said == flat[one.start : one.end]):
            for match in re.finditer(rf"(?<!\w){re.escape(said)}(?!\w)", flat):
                yield said, match.start(), match.end()


def _echo(finding: PiiEntity, start: int, end: int) -> PiiEntity:
    """The same value at another place: less sure, so that what stands there by itself is called by its own name."""
    return replace(finding, start=start, end=end, score=finding.score - 0.1)


def _spellings(finding: PiiEntity, text: str) -> list[str]:
    """What to look for elsewhere: of a name also its parts; nothing too short to be told from other words."""
    if finding.entity != "person" or finding.what != "introduced":
        return [text] if len(text) >= 4 else []
    parts = [part for part in text.split() if len(part) >= 3 and part[0].isupper() and not NAMES_AND_WORDS.fullmatch(part)]
    return [text, *parts] if len(text) >= 3 and not NAMES_AND_WORDS.fullmatch(text) else parts
