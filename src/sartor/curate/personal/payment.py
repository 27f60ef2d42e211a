"""Card numbers, IBANs and wallets: what decides is the checksum."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from sartor.curate.personal.bundled import recogniser
from sartor.curate.personal.findings import Finding, Sight, digits

# Issuer ranges (ISO/IEC 7812) and their lengths
CARDS = tuple(
    re.compile(pattern)
    for pattern in (
        r"4(?:\d{12}|\d{15}|\d{18})",  # Visa
        r"(?:5[1-5]\d{2}|222[1-9]|22[3-9]\d|2[3-6]\d{2}|27[01]\d|2720)\d{12}",  # Mastercard
        r"3[47]\d{13}",  # American Express
        r"3(?:0[0-5]|[689]\d)\d{11}(?:\d{2})?",  # Diners Club
        r"(?:352[89]|35[3-8]\d)\d{12}",  # JCB
        r"(?:6011|64[4-9]\d|65\d{2}|60\d{2}|81\d{2}|82\d{2}|508\d)\d{12}",  # Discover, RuPay
        r"62\d{14,17}",  # UnionPay
        r"220[0-4]\d{12}",  # Mir
        r"(?:50|5[6-9]|6[37])\d{2}(?:\d{12}|\d{14,15})",  # Maestro
    )
)
USUAL_GROUPS = {(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 1), (4, 4, 5), (6, 13), (8, 8)}
_GROUP = re.compile(r"\d+")
_CARD_MARK = re.compile(r"[ \-./]{1,2}")

# Length of an IBAN by country: SWIFT's IBAN registry, release 99
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU XK MN", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM TL SO", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[ ]?\d{2}(?:[ .\-]?[A-Za-z0-9]){11,32}")
_BASE58 = re.compile(r"(?<![A-Za-z0-9])[13LMDTX][1-9A-HJ-NP-Za-km-z]{25,34}(?![A-Za-z0-9])")
_BECH32 = re.compile(r"(?<![A-Za-z0-9])(?:bc1|tb1|ltc1)[02-9ac-hj-np-z]{20,80}(?![A-Za-z0-9])", re.IGNORECASE)
_ETHER = re.compile(r"(?<![A-Za-z0-9])0x[0-9a-fA-F]{40}(?![A-Za-z0-9])")
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def luhn(number: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(number: str) -> bool:
    """Whether digits are of an issuer's range and length, and their check digit is right. One digit repeated is none."""
    return any(card.fullmatch(number) for card in CARDS) and luhn(number) and len(set(number)) > 1


def is_iban(text: str) -> bool:
    """Whether letters and digits without spaces are an IBAN: its country's length, and 1 modulo 97 (ISO 13616)."""
    text = text.upper()
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(sign, 36)) for sign in text[4:] + text[:4])) % 97 == 1


def cards(sight: Sight) -> Iterator[Finding]:
    """Card numbers, written in one, in groups or digit by digit."""
    for start, end in sight.runs:
        if end - start < 13:
            continue
        if sight.at(start - 1).isalnum() or sight.at(end).isalnum():
            continue
        for first, last in _card_in(sight.flat, start, end):
            yield Finding(first, last, "credit_card", "card_number", 0.95, digits(sight.flat[first:last]))


def _card_in(flat: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    groups = [(match.start(), match.end()) for match in _GROUP.finditer(flat, start, end)]
    number = digits(flat[start:end])
    if 13 <= len(number) <= 19 and _even(flat, groups) and is_card(number):
        yield start, end
        return
    place = 0
    while place < len(groups):
        found = next((last for last in range(min(place + 5, len(groups)), place, -1) if _usual(flat, groups[place:last])), 0)
        if found:
            yield groups[place][0], groups[found - 1][1]
        place = found or place + 1


def _even(flat: str, groups: list[tuple[int, int]]) -> bool:
    """Whether only a space, a dash, a dot or a slash stands between the groups: brackets do not stand in card numbers."""
    return all(_CARD_MARK.fullmatch(flat[left[1] : right[0]]) for left, right in zip(groups, groups[1:], strict=False))


def _usual(flat: str, groups: list[tuple[int, int]]) -> bool:
    sizes = tuple(end - start for start, end in groups)
    if sizes not in USUAL_GROUPS and not (len(sizes) == 1 and 13 <= sizes[0] <= 19):
        return False
    return _even(flat, groups) and is_card("".join(flat[start:end] for start, end in groups))


def ibans(sight: Sight) -> Iterator[Finding]:
    """IBANs whose length and check digits are right."""
    if not sight.has_digit:
        return
    for match in _IBAN.finditer(sight.flat):
        length = IBAN_LENGTHS.get(match[0][:2].upper())
        if length is None:
            continue
        places = [place for place, sign in enumerate(match[0]) if sign.isalnum()][:length]
        text = "".join(match[0][place] for place in places)
        end = match.start() + places[-1] + 1
        if is_iban(text) and not sight.at(end).isalnum():
            yield Finding(match.start(), end, "iban", f"iban_{text[:2].lower()}", 1.0, text.upper())


def base58_checked(text: str) -> bool:
    """Whether it is base58 of 25 bytes of which the last four are the others' double sha256 (Bitcoin's Base58Check)."""
    number = 0
    for sign in text:
        number = number * 58 + _ALPHABET.index(sign)
    if number.bit_length() > 200:
        return False
    raw = number.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(raw[:-4]).digest()).digest()[:4] == raw[-4:]


def wallets(sight: Sight) -> Iterator[Finding]:
    """Addresses of Bitcoin and its kin (Base58Check, Bech32 by presidio's recogniser) and of Ethereum (by form alone)."""
    if not sight.has_digit:
        return
    for match in _BASE58.finditer(sight.flat):
        if base58_checked(match[0]):
            yield Finding(match.start(), match.end(), "crypto_wallet", "base58", 1.0, match[0])
    if sight.has("bc1", "tb1", "ltc1"):
        checked = recogniser("generic.crypto").validate_bech32_address
        for match in _BECH32.finditer(sight.flat):
            if checked(match[0])[0]:
                yield Finding(match.start(), match.end(), "crypto_wallet", "bech32", 1.0, match[0].lower())
    if "0x" in sight.flat:
        for match in _ETHER.finditer(sight.flat):
            yield Finding(match.start(), match.end(), "crypto_wallet", "ethereum", 0.7, match[0].lower())
