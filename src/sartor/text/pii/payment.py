"""Recognizer of card numbers, IBANs and crypto wallets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from stdnum import luhn

from sartor.text.pii.entities import NormalizedText, PiiEntity, Span, digits

# issuer ranges (ISO/IEC 7812) with their lengths
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
_CARD_WORD = re.compile(
    r"\b(?:cards?|visa|credit|debit|karten?\w*|kreditkarte\w*|carte|tarjeta|cc|payment)\b", re.IGNORECASE
)
_GROUP = re.compile(r"\d+")
_CARD_MARK = re.compile(r"[ \-./]|  ")

# length of an IBAN by country: SWIFT's IBAN registry, release 99
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU XK MN",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM TL SO",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[ ]?\d{2}(?:[ .\-]?[A-Za-z0-9]){11,32}")
_BASE58 = re.compile(r"[13LMDTX][1-9A-HJ-NP-Za-km-z]{25,34}")
_BECH32 = re.compile(r"(?:bc1|tb1|ltc1)[02-9ac-hj-np-z]{20,80}", re.IGNORECASE)
_ETHER = re.compile(r"0x[0-9a-fA-F]{40}")
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def is_card(number: str) -> bool:
    """Return whether digits have an issuer's range and length and a correct check digit.

    One digit repeated is no card number.
    """
    return any(card.fullmatch(number) for card in CARDS) and luhn.is_valid(number) and len(set(number)) > 1


def is_iban(text: str) -> bool:
    """Return whether letters and digits without spaces are an IBAN (ISO 13616).

    It has the length of its country, and is 1 modulo 97.
    """
    text = text.upper()
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(sign, 36)) for sign in text[4:] + text[:4])) % 97 == 1


def cards(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield card numbers, written without gaps, in groups or digit by digit."""
    for start, end in normalized.runs:
        if end - start < 13:
            continue
        start, end = _trimmed(normalized, start, end)
        for groups in _even_groups(normalized.flat, start, end):
            for first, last in _card_in(normalized.flat, groups):
                number = digits(normalized.flat[first:last])
                # 13 digits that begin with 4 are more often barcodes (EAN) than old Visa numbers
                old = len(number) == 13 and not _CARD_WORD.search(normalized.before(first))
                yield PiiEntity(
                    first, last, entity="credit_card", subtype="card_number", score=0.3 if old else 0.95, value=number
                )


def _trimmed(normalized: NormalizedText, start: int, end: int) -> Span:
    """Return a run without a group at either end that belongs to a word, if a space separates it.

    An example is `invoice2 4111...`.
    """
    if normalized.at(start - 1).isalnum():
        space = normalized.flat.find(" ", start, end)
        start = end if space < 0 else space + 1
    if normalized.at(end).isalnum():
        end = max(start, normalized.flat.rfind(" ", start, end))
    return start, end


def _even_groups(flat: str, start: int, end: int) -> Iterator[list[Span]]:
    """Yield lists of digit groups separated by one space, dash, dot or slash (or two spaces).

    A comma or a bracket separates two numbers.
    """
    groups: list[Span] = []
    for match in _GROUP.finditer(flat, start, end):
        if groups and not _CARD_MARK.fullmatch(flat[groups[-1][1] : match.start()]):
            yield groups
            groups = []
        groups.append(match.span())
    yield groups


def _card_in(flat: str, groups: list[Span]) -> Iterator[Span]:
    number = "".join(flat[start:end] for start, end in groups)
    if 13 <= len(number) <= 19 and is_card(number):
        yield groups[0][0], groups[-1][1]
        return
    first = 0
    while first < len(groups):
        next_first = first + 1
        for stop in range(min(first + 5, len(groups)), first, -1):
            sizes = tuple(end - start for start, end in groups[first:stop])
            is_usual = sizes in USUAL_GROUPS or (len(sizes) == 1 and 13 <= sizes[0] <= 19)
            if is_usual and is_card("".join(flat[start:end] for start, end in groups[first:stop])):
                yield groups[first][0], groups[stop - 1][1]
                next_first = stop
                break
        first = next_first


def ibans(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield IBANs with the correct length and check digits."""
    for start, end in normalized.numbers:
        start -= 3 if normalized.at(start - 1) == " " else 2
        if end - start < 4 or start < 0 or normalized.flat[start : start + 2].upper() not in IBAN_LENGTHS:
            continue
        match = _IBAN.match(normalized.flat, start)
        if match is None:
            continue
        positions = [index for index, sign in enumerate(match[0]) if sign.isalnum()]
        text = "".join(match[0][position] for position in positions[: IBAN_LENGTHS[match[0][:2].upper()]])
        end = start + positions[len(text) - 1] + 1
        if is_iban(text) and not normalized.at(end).isalnum() and _is_written_as_one(normalized.flat[start:end]):
            yield PiiEntity(
                start, end, entity="iban", subtype=f"iban_{text[:2].lower()}", score=1.0, value=text.upper()
            )


def _is_written_as_one(text: str) -> bool:
    """Return whether a text is in one piece, in groups of four, or all in capitals.

    At least 40 % of its characters must be digits. One sentence in ten thousand ("at 30 seconds ...") is 1 modulo 97
    by chance.
    """
    groups = re.split(r"[^A-Za-z0-9]+", text)
    whole = "".join(groups)
    even = len(groups) == 1 or all(len(group) == 4 for group in groups[:-1])
    return sum(map(str.isdigit, whole)) * 5 >= len(whole) * 2 and (even or whole.isupper())


def base58_checked(text: str) -> bool:
    """Return whether a text is Base58Check: 25 bytes, the last four from the double SHA-256 of the others."""
    number = 0
    for sign in text:
        number = number * 58 + _ALPHABET.index(sign)
    if number.bit_length() > 200:
        return False
    raw = number.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(raw[:-4]).digest()).digest()[:4] == raw[-4:]


_BECH32_SIGNS = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BECH32_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_BECH32_SUMS = (1, 0x2BC830A3)  # of Bech32 (BIP 173) and of Bech32m (BIP 350)


def bech32_checked(text: str) -> bool:
    """Return whether `hrp1data`, in lower or in upper case, ends in the checksum of Bech32 or Bech32m."""
    if text not in (text.lower(), text.upper()):
        return False
    prefix, _, data = text.lower().rpartition("1")
    expanded = [ord(sign) >> 5 for sign in prefix] + [0] + [ord(sign) & 31 for sign in prefix]
    checksum = 1
    for value in expanded + [_BECH32_SIGNS.index(sign) for sign in data]:
        top = checksum >> 25
        checksum = (checksum & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_BECH32_GENERATOR):
            checksum ^= generator if top >> bit & 1 else 0
    return checksum in _BECH32_SUMS


def wallets(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield addresses of Bitcoin and its kin (Base58Check, Bech32) and of Ethereum (by form
    alone).
    """
    for start, end in normalized.tokens:
        text = normalized.flat[start:end]
        if len(text) < 26:
            continue
        if _BASE58.fullmatch(text) and base58_checked(text):
            yield PiiEntity(start, end, entity="crypto_wallet", subtype="base58", score=1.0, value=text)
        elif _BECH32.fullmatch(text) and bech32_checked(text):
            yield PiiEntity(start, end, entity="crypto_wallet", subtype="bech32", score=1.0, value=text.lower())
        elif _ETHER.fullmatch(text):
            yield PiiEntity(start, end, entity="crypto_wallet", subtype="ethereum", score=0.7, value=text.lower())
