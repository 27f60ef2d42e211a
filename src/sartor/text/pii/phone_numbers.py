"""Recognizer of phone numbers by Google's numbering plans."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sartor.core.errors import missing_package
from sartor.text.pii.entities import NormalizedText, PiiEntity, digits

REGIONS = (
    "US",
    "GB",
    "DE",
    "FR",
    "ES",
    "IT",
    "NL",
    "BE",
    "AT",
    "CH",
    "PL",
    "SE",
    "NO",
    "DK",
    "FI",
    "IE",
    "PT",
    "CZ",
    "SK",
    "HU",
    "RO",
    "GR",
    "BG",
    "HR",
    "SI",
    "LT",
    "LV",
    "EE",
    "LU",
    "CA",
    "AU",
    "NZ",
    "IN",
    "PK",
    "BD",
    "PH",
    "SG",
    "MY",
    "ID",
    "TH",
    "VN",
    "JP",
    "KR",
    "CN",
    "HK",
    "TW",
    "TR",
    "IL",
    "AE",
    "SA",
    "EG",
    "ZA",
    "NG",
    "KE",
    "MA",
    "BR",
    "MX",
    "AR",
    "CL",
    "CO",
    "PE",
    "UA",
    "RU",
)
EXTENSION = r"(?:\s?(?:x|ext\.?|extension|durchwahl|poste)\s?\d{1,6})?"
_ABROAD = re.compile(
    r"(?<![\w+])(?:\+\s?|00(?=[1-9])|00[ -](?=[1-9])|\(\+)[1-9]\d{0,2}\)?(?:[ .\-/]{0,2}\(?\d{1,11}\)?){1,7}"
    + EXTENSION
    + r"(?!\w)",
    re.IGNORECASE,
)
# North American form; fictional numbers (555) are not valid, but count as phone numbers
_NANP = re.compile(
    r"(?<![\w.+/-])(?:1[ .-]?)?(?:\([2-9]\d{2}\)[ -]?|[2-9]\d{2}[ .\-/])[0-9]\d{2}[ .-]\d{4}"
    + EXTENSION
    + r"(?![\w-]|[.,/]\d)",
    re.IGNORECASE,
)
_TRUNK = re.compile(
    r"(?<![\w.,+/-])(?<!\d )\(?0\d{1,5}\)?(?:[ .\-/]{1,3}\d{2,8}|(?<=\))\d{3,8}){1,5}" + EXTENSION + r"(?!\w|[.,-]\d)",
    re.IGNORECASE,
)
_ANY = re.compile(r"(?<![\w.,+])\(?\d(?:[ .\-/()]{0,3}\d){5,14}" + EXTENSION + r"(?![\w])", re.IGNORECASE)
_SHORT = re.compile(r"(?<![\w.,+/-])\d{3}[ .-]\d{4}(?![\w-]|[.,/]\d)")
_DATE = re.compile(r"\d{1,2}([./-])\d{1,2}\1(?:\d{4}|\d{2})(?![./-]?\d)|\d{4}([./-])\d{1,2}\2\d{1,2}(?![./-]?\d)")
_SURE = re.compile(
    r"(?<![\w-])(?:(?:tele)?phones?|phone ?n(?:o|r|umber)s?|tel|mob|mobiles?|cell(?:phone)?s?|fax|whats\s?app|sms"
    r"|viber|telegram|hotline"
    r"|helpline|ph|landline|(?:my|his|her|your|our|their|contact) (?:new |old )?numbers?|handy\w*|telefon\w*"
    r"|mobil(?:nummer|telefon|funk)?"
    r"|rufnummer|durchwahl|t[ée]l[ée]phone|portable|m[óo]vil(?:es)?|tel[ée]fonos?|celular(?:es)?|cellulare"
    r"|telefoon\w*|gsm)(?!\w)",
    re.IGNORECASE,
)
_PERHAPS = re.compile(
    r"(?<![\w-])(?:calls?|calling|signal|text(?:ed|ing)? "
    r"(?:me|us|him|her|them)|dial|ring|reach(?:ed)?|answer(?:ing)?|contact"
    r"|numbers? (?:is|was)|anrufen|rufen|ruf|rückruf|erreichen"
    r"|erreichbar|appele[rz]|joindre|ll[áa]m\w*|chiama\w*|bel|bellen)(?!\w)",
    re.IGNORECASE,
)
_NO = re.compile(
    r"(?<![\w-])(?:orders?|invoices?|articles?|items?|parts?|sku|ref|references?|tickets?|case|tracking|isbn|issn"
    r"|versions?|(?<!language )models?|serial"
    r"|accounts?|acct|customer|ids?|patents?|doi|pmid|bestell\w*|rechnung\w*|artikel\w*|art|kunden\w*|sendung\w*"
    r"|commande|facture|pedido"
    r"|factura|batch|lot|imei|vin|ean|upc|gtin|asin|parcel|shipment|booking|pnr|coordinates|population|revenue"
    r"|routing|barcode|member"
    r"|policy|claim|product|catalog(?:ue)?|iban|ssn|passport|size|price|total|sum|timestamp|epoch|hash|code|bug"
    r"|issue|paragraph|no|nr"
    r"|ordinance|docket|act|law|section|years?|between|during|season|v|vs)(?:[ -]?(?:numbers?|no|nr|id"
    r"|code)\b\.?)?(?: is\b| was\b)?(?!\w)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?:no|nr)", re.IGNORECASE)
_DECIMAL = re.compile(r"\d*\.\d+|\d{1,3}(?:\.\d{3})+")
_BETWEEN = re.compile(r"(?: (?:me|us|him|her|them|at|on|under|back|now))+ $")
_YEARS = re.compile(r"\(?(?:1[5-9]|20)\d\d(?: ?[-/] ?| )(?:(?:1[5-9]|20)\d\d|\d\d)\)?$")


def opener(countries: Sequence[str]) -> Callable[[NormalizedText], Iterable[PiiEntity]]:
    """Return the recognizer for international numbers, and for national forms of `countries`.

    countries: ISO 3166 codes; () means REGIONS. Raises ExtraError if phonenumbers is not installed.
    """
    try:
        import phonenumbers
    except ImportError:
        raise missing_package("phonenumbers") from None
    regions = [country for country in countries if country in phonenumbers.SUPPORTED_REGIONS] or REGIONS
    nanp = bool({"US", "CA"} & set(regions))

    def find(normalized: NormalizedText) -> Iterator[PiiEntity]:
        if normalized.runs:
            yield from _abroad(normalized, phonenumbers)
            yield from _national(normalized, phonenumbers, regions, nanp)

    return find


def _abroad(normalized: NormalizedText, library: Any) -> Iterator[PiiEntity]:
    for match in _ABROAD.finditer(normalized.flat):
        text = match[0]
        number = digits(re.sub(r"[a-z].*", "", text, flags=re.IGNORECASE)).removeprefix("00")
        if not 8 <= len(number) <= 15 or len(set(number)) < 3:
            continue
        evidence = _context_evidence(normalized, match.start())
        parsed = _parsed("+" + number, None, library)
        is_valid = parsed is not None and library.is_valid_number(parsed)
        plus = "+" in text
        if evidence < 0 and not plus:
            continue
        is_in_groups = len(re.findall(r"\d+", text)) >= 3 or len(digits(text)) >= 10
        if is_valid:
            score = 0.95 if plus else 0.8
        elif plus and is_in_groups:
            score = 0.65
        else:
            score = 0.6 if evidence > 0 else 0.4
        yield PiiEntity(
            match.start(),
            match.end(),
            entity="phone",
            subtype="international",
            score=score,
            value=_value(parsed, number, library),
        )


def _national(normalized: NormalizedText, library: Any, regions: Sequence[str], nanp: bool) -> Iterator[PiiEntity]:
    yield from _by_form(normalized, library, regions, nanp)
    for start, end in normalized.runs:
        begin = start - 1 if normalized.at(start - 1) == "(" else start
        match = _ANY.match(normalized.flat, begin, end + 8)
        evidence = _context_evidence(normalized, match.start()) if match else 0
        if match is None or evidence <= 0 or _is_date(match[0]) or _is_sum(match[0]):
            continue
        number = digits(match[0])
        # a weak context word must precede the number directly; words such as "me", "at" and "on" do not count
        before = _BETWEEN.sub(" ", normalized.before(match.start(), 40))
        is_near = evidence > 1 or _last(_PERHAPS, before) >= len(before) - 2
        min_digits = 7 if is_near else 8
        if min_digits <= len(number) <= 15 and len(set(number)) > 2:
            yield _finding(normalized, match, subtype="after_its_name", score=0.6, library=library, regions=regions)


def _by_form(normalized: NormalizedText, library: Any, regions: Sequence[str], nanp: bool) -> Iterator[PiiEntity]:
    if nanp:
        for match in _NANP.finditer(normalized.flat):
            if _context_evidence(normalized, match.start()) >= 0 and not _is_date(match[0]):
                yield _finding(
                    normalized, match, subtype="north_american", score=0.75, library=library, regions=["US"]
                )
        for match in _SHORT.finditer(normalized.flat):
            min_evidence = 2 if " " in match[0] else 1  # "contact: 108 2011" may be a room and a year
            if _context_evidence(normalized, match.start()) >= min_evidence:
                yield _finding(normalized, match, subtype="local", score=0.55, library=library, regions=[])
    for match in _TRUNK.finditer(normalized.flat):
        number = digits(match[0])
        evidence = _context_evidence(normalized, match.start())
        if 8 <= len(number) <= 17 and evidence >= 0 and not _is_date(match[0]):
            finding = _finding(normalized, match, subtype="national", score=0.7, library=library, regions=regions)
            if evidence > 0 or finding.value.startswith("+") or len(number) in (10, 11):
                yield finding


def _finding(
    normalized: NormalizedText,
    match: re.Match[str],
    *,
    subtype: str,
    score: float,
    library: Any,
    regions: Sequence[str],
) -> PiiEntity:
    plain = re.sub(r"[A-Za-z].*", "", match[0])
    for region in regions:
        parsed = _parsed(plain, region, library)
        if parsed is not None and library.is_valid_number(parsed):
            score += 0.15 if _context_evidence(normalized, match.start()) > 0 else 0.05
            score = min(1.0, score)
            return PiiEntity(
                match.start(),
                match.end(),
                entity="phone",
                subtype=subtype,
                score=score,
                value=_value(parsed, "", library),
            )
    return PiiEntity(
        match.start(), match.end(), entity="phone", subtype=subtype, score=score, value=digits(plain).lstrip("0")
    )


def _parsed(text: str, region: str | None, library: Any) -> Any:
    try:
        return library.parse(text, region)
    except library.NumberParseException:
        return None


def _value(parsed: Any, number: str, library: Any) -> str:
    return str(library.format_number(parsed, library.PhoneNumberFormat.E164)) if parsed is not None else number


def _is_sum(text: str) -> bool:
    """Return whether a run of digits is no phone number: years, a decimal, or arithmetic.

    Thousands with dots count as a decimal.
    """
    plain = _YEARS.match(text) or _DECIMAL.fullmatch(text)
    return plain is not None or " - " in text and "." in text or text.count("(") != text.count(")")


def _is_date(text: str) -> bool:
    return _DATE.match(text.lstrip("(")) is not None


def _context_evidence(normalized: NormalizedText, position: int) -> int:
    """Return the evidence of the nearest context word before a number.

    2: a phone number. 1: perhaps a phone number. -1: another number. 0: none.
    """
    before = normalized.before(position, 56)
    sure_end = _last(_SURE, before)
    perhaps_end = _last(_PERHAPS, before)
    other_end = _last(_NO, before)
    if other_end >= max(sure_end, perhaps_end) and other_end >= 0:
        if _NUMBERED.search(before[max(0, other_end - 2) : other_end]) and sure_end >= 0 and other_end - sure_end < 8:
            return 2  # "Tel. Nr."
        return -1 if len(before) - other_end < 24 else 0
    if sure_end >= 0:
        return 2
    return 1 if perhaps_end >= 0 and len(before) - perhaps_end < 28 else 0


def _last(words: re.Pattern[str], text: str) -> int:
    return max((match.end() for match in words.finditer(text)), default=-1)
