"""Recognizer of national tax and identity numbers.

A number of digits only has a correct check digit by chance one time in ten. It therefore counts only if its form is of
one country alone (`standalone`), or if a word before it announces it.
"""

from __future__ import annotations

import datetime
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.text.pii.entities import NormalizedText, PiiEntity, digits
from sartor.text.pii.payment import luhn
from sartor.text.pii.presidio_loader import recogniser


def _weighted(text: str, weights: Sequence[Any]) -> int:
    return sum(int(digit) * int(weight) for digit, weight in zip(text, weights, strict=False))


def _date(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return True


def _day(text: str) -> bool:
    """Return whether six digits DDMMYY are a date of the 20th or 21st century."""
    return _date(2000 + int(text[4:6]), int(text[2:4]), int(text[:2])) or _date(
        1900 + int(text[4:6]), int(text[2:4]), int(text[:2])
    )


def us_ssn(text: str) -> bool:
    """Return whether area, group and serial of a US SSN may be issued; there is no check digit."""
    number = digits(text)
    return (
        number[:3] not in ("000", "666")
        and number[0] != "9"
        and number[3:5] != "00"
        and number[5:] != "0000"
        and len(set(number)) > 1
    )


def us_itin(text: str) -> bool:
    """Return whether the IRS uses the group of a US ITIN."""
    group = int(digits(text)[3:5])
    return 50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99


def fr_nir(text: str) -> bool:
    """Return whether the key of a French NIR (INSEE number) is correct.

    key = 97 - (number mod 97); Corsica's 2A and 2B count as 19 and 18.
    """
    number = text.replace(" ", "")
    month = int(number[3:5])
    if len(number) != 15 or not (1 <= month <= 12 or 20 <= month <= 42 or month >= 50):
        return False
    body = number[:13].replace("2A", "19").replace("2B", "18")
    return body.isdigit() and 97 - int(body) % 97 == int(number[13:])


def nl_bsn(text: str) -> bool:
    """Return whether a Dutch BSN passes the eleven test: sum_i w_i d_i = 0 mod 11, w = 9, 8, ..., 2, -1."""
    number = digits(text)
    return len(set(number)) > 1 and _weighted(number, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def be_rn(text: str) -> bool:
    """Return whether the check digits of a Belgian national number are correct.

    check = 97 - (first nine digits mod 97), with a 2 before them for births since 2000.
    """
    number = digits(text)
    if not 0 <= int(number[2:4]) % 20 <= 12 or int(number[4:6]) > 31:
        return False
    return int(number[9:]) in (97 - int(number[:9]) % 97, 97 - int("2" + number[:9]) % 97)


def ean(text: str) -> bool:
    """Return whether an EAN-13 check digit is correct; the Swiss AHV number has one."""
    number = digits(text)
    return len(number) == 13 and _weighted(number, "1313131313131") % 10 == 0


def at_svnr(text: str) -> bool:
    """Return whether the check digit of an Austrian SVNR is correct: modulo 11 over serial and date of birth."""
    number = digits(text)
    return (
        number[0] != "0"
        and 1 <= int(number[6:8]) <= 15
        and _weighted(number[:3] + number[4:], "379584216") % 11 == int(number[3])
    )


def pt_nif(text: str) -> bool:
    """Return whether the check digit of a Portuguese NIF is correct, modulo 11."""
    number = digits(text)
    remainder = 11 - _weighted(number[:8], "98765432") % 11
    return (0 if remainder > 9 else remainder) == int(number[8])


def br_cpf(text: str) -> bool:
    """Return whether both check digits of a Brazilian CPF are correct, modulo 11."""
    number = digits(text)
    first = _weighted(number[:9], (10, 9, 8, 7, 6, 5, 4, 3, 2)) * 10 % 11 % 10
    second = _weighted(number[:10], (11, 10, 9, 8, 7, 6, 5, 4, 3, 2)) * 10 % 11 % 10
    return len(set(number)) > 1 and number[9:] == f"{first}{second}"


def cn_id(text: str) -> bool:
    """Return whether a Chinese ID has a valid date and check character (ISO 7064 MOD 11-2)."""
    if not _date(int(text[6:10]), int(text[10:12]), int(text[12:14])):
        return False
    remainder = _weighted(text[:17], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)) % 11
    return "10X98765432"[remainder] == text[17].upper()


def dk_cpr(text: str) -> bool:
    """Return whether a Danish CPR begins with a date; its check digit is not reliable since 2007."""
    return _day(digits(text))


def no_fnr(text: str) -> bool:
    """Return whether a Norwegian number has a valid date and correct check digits, modulo 11.

    There are two check digits. A D-number has 4 added to its first digit.
    """
    number = digits(text)
    day = f"{int(number[0]) % 4}{number[1:6]}"
    return _day(day) and _weighted(number, "37618945210") % 11 == 0 and _weighted(number, "54327654321") % 11 == 0


def cz_rc(text: str) -> bool:
    """Return whether a Czech or Slovak birth number is divisible by 11 and has a valid month and day.

    Women have 50 added to the month.
    """
    number = digits(text)
    return 1 <= int(number[2:4]) % 50 % 20 <= 12 and 1 <= int(number[4:6]) <= 31 and int(number) % 11 == 0


def mx_curp(text: str) -> bool:
    """Return whether the check digit of a Mexican CURP is correct.

    Modulo 10 over the values of digits and letters, with Ñ between N and O.
    """
    signs = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    total = sum(signs.index(sign) * (18 - index) for index, sign in enumerate(text[:17]))
    return str((10 - total % 10) % 10) == text[17]


def cl_rut(text: str) -> bool:
    """Return whether the check character of a Chilean RUT is correct: modulo 11, with K for ten."""
    body, sign = re.sub(r"[.\s]", "", text).upper().split("-")
    total = sum(int(digit) * (2 + index % 6) for index, digit in enumerate(reversed(body)))
    return "0K987654321"[total % 11] == sign


def ro_cnp(text: str) -> bool:
    """Return whether a Romanian CNP has a correct check digit, modulo 11, and a valid month and day."""
    remainder = _weighted(text[:12], "279146358279") % 11
    return (
        1 <= int(text[3:5]) <= 12
        and 1 <= int(text[5:7]) <= 31
        and (1 if remainder == 10 else remainder) == int(text[12])
    )


def luhn_any(text: str) -> bool:
    """Return whether Luhn's check digit is correct and the digits are not all equal."""
    return luhn(digits(text)) and len(set(digits(text))) > 1


def sg_nric(text: str) -> bool:
    """Return whether the check letter of a Singapore NRIC or FIN is correct."""
    total = _weighted(text[1:8], "2765432") + {"T": 4, "G": 4, "M": 3}.get(text[0], 0)
    letters = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "F": "XWUTRQPNMLK", "G": "XWUTRQPNMLK", "M": "XWUTRQPNJLK"}[
        text[0]
    ]
    remainder = total % 11 if text[0] != "M" else 10 - total % 11
    return letters[remainder] == text[8]


def gb_nino(text: str) -> bool:
    """Return whether the prefix of a British NINO is issued."""
    return text[:2] not in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")


# words, of any country, that announce a personal number
_ANY_WORD = (
    r"national (?:id|identity|insurance)|(?:id|identity|identification|personal|insurance|tax) ?(?:card )?(?:number"
    r"|no\b|nr\b|code)"
    r"|social security|tax ?payer|tax ?id|ausweis|personnummer|steuer-?id|sozialversicherung"
    r"|num[ée]ro de s[ée]curit[ée] sociale"
)


@dataclass(frozen=True)
class Number:
    """National number.

    form: pattern of the number.
    check: function that validates a match.
    words: pattern of the words that announce it.
    standalone: pattern of the forms that count without such a word; None for no form.
    """

    country: str
    subtype: str
    form: re.Pattern[str]
    check: Callable[[str], bool]
    words: re.Pattern[str]
    standalone: re.Pattern[str] | None


def _number(
    country: str, subtype: str, form: str, check: Callable[[str], bool], words: str, standalone: str = ""
) -> Number:
    return Number(
        country,
        subtype,
        re.compile(rf"(?<![\w]){form}(?![\w]|[.-]\d)"),
        check,
        re.compile(rf"(?<![\w])(?:{words}|{_ANY_WORD})", re.IGNORECASE),
        re.compile(standalone) if standalone else None,
    )


ANY = r"[\s\S]+"
SARTOR_NUMBERS = (
    _number("US", "us_ssn", r"\d{3}([ .\-]?)\d{2}\1\d{4}", us_ssn, r"ssns?\b|social\b|ss#", r"\d{3}-\d\d-\d{4}"),
    _number("FR", "fr_nir", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d", fr_nir, r"nir\b|s[ée]cu|insee", ANY),
    _number("NL", "nl_bsn", r"\d{3}([ .]?)\d{3}\1\d{3}|\d{4}\.\d\d\.\d{3}", nl_bsn, r"bsn\b|burgerservice|sofi"),
    _number("BE", "be_rn", r"\d\d\.?\d\d\.?\d\d-?\d{3}\.?\d\d", be_rn, r"rijksreg|registre nat|niss|insz", r".*\..*-"),
    _number("CH", "ch_ahv", r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d\d", ean, r"ahv|avs\b|sozialvers", ANY),
    _number("AT", "at_svnr", r"\d{4} ?\d{6}", at_svnr, r"svnr|sv-?n|sozialvers|versicherungsnummer"),
    _number("PT", "pt_nif", r"[1-3]\d{2} ?\d{3} ?\d{3}", pt_nif, r"nif\b|contribuinte"),
    _number("BR", "br_cpf", r"\d{3}\.?\d{3}\.?\d{3}-?\d\d", br_cpf, r"cpf\b", r".*\..*-"),
    _number("CN", "cn_id", r"\d{6}(?:19|20)\d{9}[\dXx]", cn_id, r"身份证", ANY),
    _number("DK", "dk_cpr", r"\d{6}-?\d{4}", dk_cpr, r"cpr\b|personnummer", r".*-"),
    _number("NO", "no_fnr", r"\d{6} ?\d{5}", no_fnr, r"f[øo]dselsnummer|fnr\b|personnummer", ANY),
    _number("CZ", "cz_rc", r"\d{6}/\d{4}", cz_rc, r"rodn[ée]", ANY),
    _number("SK", "sk_rc", r"\d{6}/\d{4}", cz_rc, r"rodn[ée]", ANY),
    _number("MX", "mx_curp", r"[A-Z][AEIOUX][A-Z]{2}\d{6}[HM][A-Z]{5}[A-Z\d]\d", mx_curp, r"curp", ANY),
    _number("CL", "cl_rut", r"\d{1,2}\.?\d{3}\.?\d{3}-[\dkK]", cl_rut, r"rut\b|run\b", r".*\..*\."),
    _number("RO", "ro_cnp", r"[1-8]\d{12}", ro_cnp, r"cnp\b|cod numeric"),
    _number("IL", "il_id", r"\d{8}-?\d", luhn_any, r"teudat|זהות|israeli id"),
    _number("SG", "sg_nric", r"[STFGM]\d{7}[A-Z]", sg_nric, r"nric|\bfin\b", ANY),
    _number("IN", "in_pan", r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]", lambda text: True, r"\bpan\b", ANY),
    _number(
        "GB", "gb_nino", r"(?:[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]|QQ)(?: ?\d\d){3} ?[A-D]", gb_nino, r"nino?", ANY
    ),
    _number("US", "us_itin", r"9\d\d([ -]?)[5-9]\d\1\d{4}", us_itin, r"itin\b", r"9\d\d-\d\d-"),
)
# (country, subtype, presidio's module, words besides its context words, standalone pattern)
PRESIDIO_NUMBERS = (
    ("AU", "au_tfn", "australia.au_tfn", r"tfn", ""),
    ("AU", "au_medicare", "australia.au_medicare", r"medicare", ""),
    ("CA", "ca_sin", "canada.ca_sin", r"sin\b|social insurance|nas\b", ""),
    ("DE", "de_tax_id", "germany.de_tax_id", r"steuer|idnr|tin\b", ""),
    ("DE", "de_insurance", "germany.de_social_security", r"versicherungs", ANY),
    ("DE", "de_health", "germany.de_health_insurance", r"krankenvers|versicherten", ""),
    ("DE", "de_id_card", "germany.de_id_card", r"personalausweis", ""),
    ("DE", "de_passport", "germany.de_passport", r"reisepass|passport", ""),
    ("ES", "es_nif", "spain.es_nif", r"dni\b|nif\b", r"\d{8}-?[A-Z]$"),
    ("ES", "es_nie", "spain.es_nie", r"nie\b", r"[XYZ]\d{7}-?[A-Z]$"),
    ("FI", "fi_hetu", "finland.fi_personal_identity_code", r"hetu|henkil[öo]tunnus", ANY),
    ("GB", "gb_nhs", "uk.uk_nhs", r"nhs\b", ""),
    ("IN", "in_aadhaar", "india.in_aadhaar", r"a+dh?aa?r|uidai|\buid\b", ""),
    ("IT", "it_fiscal_code", "italy.it_fiscal_code", r"codice fiscale", ANY),
    ("KR", "kr_rrn", "korea.kr_rrn", r"주민|rrn\b|resident", r"\d{6}-"),
    ("NG", "ng_nin", "nigeria.ng_nin", r"\bnin\b", ""),
    ("PL", "pl_pesel", "poland.pl_pesel", r"pesel", ""),
    ("SE", "se_personnummer", "sweden.se_personnummer", r"personnummer|pnr\b|samordning", r"(?:\d{6}|\d{8})[-+]"),
    ("TH", "th_id", "thai.th_tnin", r"thai id|บัตร", ""),
    ("TR", "tr_id", "turkey.tr_national_id", r"t\.?c\.? ?kimlik|tckn|kimlik", ""),
    ("ZA", "za_id", "south_africa.za_id_number", r"\bid\b|rsa id|south african", ""),
)
COUNTRIES = tuple(sorted({number.country for number in SARTOR_NUMBERS} | {row[0] for row in PRESIDIO_NUMBERS}))
# number of a passport or licence after its name; it has no form or check digit that could be verified
_DOCUMENT = re.compile(
    r"\b(?:passport|reisepass|passeport|pasaporte|passaporto|driver'?s?'? licen[cs]e|driving licen[cs]e"
    r"|f[üu]hrerschein|identity card"
    r"|personalausweis)(?:[- ]?(?:number|num|no|nr|nummer|id|#|n[°º]))?\.?\s*(?:is|ist|est|es|:|=|#)?\s*#?"
    r"((?=[A-Z]*\d)(?=(?:[A-Z]*\d){4})[A-Z0-9]{1,4}[ -]?[A-Z0-9]{4,14})(?![\w-])",
    re.IGNORECASE,
)


def opener(countries: Sequence[str]) -> Callable[[NormalizedText], Iterable[PiiEntity]]:
    """Return the recognizer for the numbers of `countries`; () means all in COUNTRIES.

    Raises ExtraError if presidio is not installed.
    """
    wanted = set(countries or COUNTRIES)
    numbers = [number for number in SARTOR_NUMBERS if number.country in wanted]
    numbers += [_presidio_number(*row) for row in PRESIDIO_NUMBERS if row[0] in wanted]

    def find(normalized: NormalizedText) -> Iterator[PiiEntity]:
        if not normalized.numbers:
            return
        for start, end in _places(normalized):
            before = normalized.before(start, 60)
            for number in numbers:
                yield from _in_span(normalized, start, end, before, number)
        if normalized.has("pass", "licen", "führerschein", "fuhrerschein", "pasaporte", "identity card", "ausweis"):
            for match in _DOCUMENT.finditer(normalized.flat):
                yield PiiEntity(match.start(1), match.end(1), "national_id", "document", 0.7, _bare(match[1]))

    return find


def _places(normalized: NormalizedText) -> list[tuple[int, int]]:
    """Return the spans to search, each once.

    They are runs of digits with adjacent letters, and tokens of letters and digits.
    """
    spans = [(_extend_left(normalized, start), _extend_right(normalized, end)) for start, end in normalized.runs]
    starts = [start for start, _ in spans]  # sorted, as the runs are
    for start, end in normalized.tokens:
        before = bisect_right(starts, start) - 1
        if 8 <= end - start <= 24 and (before < 0 or spans[before][1] < end):
            spans.append((start, end))
    return spans


def _extend_left(normalized: NormalizedText, position: int) -> int:
    space = 1 if position and normalized.at(position - 1) == " " else 0
    while position - space > 0 and normalized.at(position - space - 1).isalnum() and space < 6:
        space += 1
    return position - space


def _extend_right(normalized: NormalizedText, position: int) -> int:
    space = 1 if normalized.at(position) in " -+" else 0
    while normalized.at(position + space).isalnum() and space < 6:
        space += 1
    return position + space


def _in_span(normalized: NormalizedText, start: int, end: int, before: str, number: Number) -> Iterator[PiiEntity]:
    for match in number.form.finditer(normalized.flat, start, end):
        text = match[0]
        if (
            normalized.at(match.end()).isalnum()
            or normalized.at(match.start() - 1).isalnum()
            or not number.check(text)
        ):
            continue
        if match.start() > start:
            before = normalized.before(match.start(), 60)
        is_announced = number.words.search(before) is not None
        if is_announced or (number.standalone is not None and number.standalone.match(text)):
            score = 0.95 if is_announced else 0.75
            yield PiiEntity(match.start(), match.end(), "national_id", number.subtype, score, _bare(text))


def _bare(text: str) -> str:
    return re.sub(r"[\W_]", "", text).upper()


def _presidio_number(country: str, subtype: str, module_path: str, words: str, standalone: str) -> Number:
    """Return a Number from a presidio recognizer: its patterns, its check, and its context words besides ours."""
    presidio = recogniser(f"country_specific.{module_path}")

    def check(text: str) -> bool:
        verdict = presidio.validate_result(text)
        return verdict is not False and not presidio.invalidate_result(text)

    form = _alternation([pattern.regex for pattern in presidio.patterns], presidio.global_regex_flags)
    context_words = [re.escape(word) for word in presidio.context or [] if len(word) > 3]
    return Number(
        country,
        subtype,
        form,
        check,
        re.compile(rf"(?<![\w])(?:{'|'.join([words, *context_words])}|{_ANY_WORD})", re.IGNORECASE),
        re.compile(standalone) if standalone else None,
    )


def _alternation(patterns: Sequence[str], flags: int) -> Any:
    """Return one pattern for several; presidio's patterns are written for the `regex` module."""
    import regex

    return regex.compile("|".join(f"(?:{pattern})" for pattern in patterns), flags=flags)
