"""Recognizer of national tax and identity numbers.

Forms are those that the issuers publish, check digits those of python-stdnum where it has them. A number that is
digits alone passes a check digit by chance one time in ten: it counts only where its form is of one country alone
(`standalone`), or where a word before it says what it is.
"""

from __future__ import annotations

import datetime
import importlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stdnum import luhn, verhoeff

from sartor.text.pii.entities import NormalizedText, PiiEntity, digits

Check = Callable[[str], bool]


def us_ssn(text: str) -> bool:
    """Return whether the SSA may issue area, group and serial: there is no check digit.

    python-stdnum also refuses three numbers of advertisements, which people write down all the same.
    """
    number = digits(text)
    return (
        number[:3] not in ("000", "666")
        and number[0] != "9"
        and number[3:5] != "00"
        and number[5:] != "0000"
        and len(set(number)) > 1
    )


def sg_nric(text: str) -> bool:
    """Return whether the letter of a Singapore NRIC or FIN follows from its digits."""
    total = sum(int(digit) * weight for digit, weight in zip(text[1:8], (2, 7, 6, 5, 4, 3, 2), strict=True))
    total += {"T": 4, "G": 4, "M": 3}.get(text[0], 0)
    letters = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "F": "XWUTRQPNMLK", "G": "XWUTRQPNMLK", "M": "XWUTRQPNJLK"}
    remainder = total % 11 if text[0] != "M" else 10 - total % 11
    return letters[text[0]][remainder] == text[8]


def gb_nino(text: str) -> bool:
    """Return whether HMRC issues the prefix: there is no check digit."""
    return text[:2] not in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")


def au_medicare(text: str) -> bool:
    """Return whether the ninth digit is the weighted sum of the first eight modulo 10."""
    number = digits(text)
    weights = (1, 3, 7, 9, 1, 3, 7, 9)
    total = sum(int(digit) * weight for digit, weight in zip(number[:8], weights, strict=True))
    return total % 10 == int(number[8])


def _digit_sums(number: str, weights: Sequence[int]) -> int:
    """Return the sum of the digits of each weighted digit, as the German insurers' check digits have it."""
    return sum(sum(divmod(int(digit) * weight, 10)) for digit, weight in zip(number, weights, strict=True))


def _letter_value(letter: str) -> str:
    """Return the place of a letter in the alphabet as two digits: A is 01."""
    return f"{ord(letter.upper()) - ord('A') + 1:02d}"


def de_insurance(text: str) -> bool:
    """Return whether a German pension insurance number has a date and its check digit (VKVV, section 4)."""
    number = text.replace(" ", "")
    day, month = int(number[2:4]), int(number[4:6])
    if not (1 <= day <= 31 or 51 <= day <= 81) or not 1 <= month <= 12:
        return False
    body = number[:8] + _letter_value(number[8]) + number[9:11]
    return _digit_sums(body, (2, 1, 2, 5, 7, 1, 2, 1, 2, 1, 2, 1)) % 10 == int(number[11])


def de_health(text: str) -> bool:
    """Return whether a German health insurance number has its check digit (section 290 SGB V)."""
    return _digit_sums(_letter_value(text[0]) + text[1:9], (1, 2) * 5) % 10 == int(text[9])


def de_document(text: str) -> bool:
    """Return whether a German identity card's or passport's number may be one.

    Its nine signs have no check digit among them; where the tenth of the machine-readable zone follows, it is checked
    (ICAO Doc 9303, part 3, section 4.9).
    """
    text = text.upper()
    if len(text) == 9:
        return sum(map(str.isdigit, text)) >= 2  # a word in capitals is none
    total = sum(int(sign, 36) * weight for sign, weight in zip(text[:9], (7, 3, 1) * 3, strict=True))
    return total % 10 == int(text[9])


def es_dni(text: str) -> bool:
    """Return whether the letter of a Spanish DNI follows from its digits; the leading zero may be left out."""
    return _stdnum("es.dni")(text.replace("-", "").zfill(9))


def ng_nin(text: str) -> bool:
    """Return whether the last digit of a Nigerian number is Verhoeff's."""
    return verhoeff.is_valid(text)


def se_personnummer(text: str) -> bool:
    """Return whether a Swedish number has a date and Luhn's digit; a coordination number has 60 added to the day."""
    number = digits(text)[-10:]
    month, day = int(number[2:4]), int(number[4:6])
    try:
        datetime.date(
            2000 + int(number[:2]) % 4, month, day - 60 if day > 60 else day
        )  # 2000 to 2003: leap years count
    except ValueError:
        return False
    return luhn.is_valid(number)


def any_number(text: str) -> bool:
    """Accept what has the form: the number has no check digit, or the newer ones have none."""
    return True


def _stdnum(module: str) -> Check:
    """Return `is_valid` of a module of python-stdnum."""
    check: Check = importlib.import_module(f"stdnum.{module}").is_valid
    return check


# words, of any country, that announce a personal number
_ANY_WORD = (
    r"national (?:id|identity|insurance)|(?:id|identity|identification|personal|insurance|tax) ?(?:card )?(?:number"
    r"|no\b|nr\b|code)"
    r"|social security|tax ?payer|tax ?id|ausweis|personnummer|steuer-?id|sozialversicherung"
    r"|num[ée]ro de s[ée]curit[ée] sociale"
)


@dataclass(frozen=True)
class NationalId:
    """A country's number.

    form: regular expression of the number, between signs that are no part of a word.
    check: the check digit, as a function or as the module of python-stdnum that has it.
    words: regular expression of the words that announce it, besides those of any country.
    standalone: regular expression of the forms that count without such a word; empty for none.
    """

    country: str
    subtype: str
    form: str
    check: Check | str
    words: str
    standalone: str = ""


ANY = r"[\s\S]+"
_ICAO = "CFGHJKLMNPRTVWXYZ"  # letters of documents' numbers (ICAO Doc 9303): none that is taken for another sign
_DIGIT = "[0-9LMNPQRSTUV]"  # of an Italian code: letters stand for digits where two people's codes would be equal
NUMBERS = (
    NationalId(
        "AT", "at_svnr", form=r"\d{4} ?\d{6}", check="at.vnr", words=r"svnr|sv-?n|sozialvers|versicherungsnummer"
    ),
    NationalId("AU", "au_medicare", form=r"[2-6]\d{3} ?\d{5} ?\d", check=au_medicare, words=r"medicare"),
    NationalId("AU", "au_tfn", form=r"\d{3} ?\d{3} ?\d{3}", check="au.tfn", words=r"tfn|tax file"),
    NationalId(
        "BE",
        "be_rn",
        form=r"\d\d\.?\d\d\.?\d\d-?\d{3}\.?\d\d",
        check="be.nn",
        words=r"rijksreg|registre nat|niss|insz",
        standalone=r".*\..*-",
    ),
    NationalId(
        "BR", "br_cpf", form=r"\d{3}\.?\d{3}\.?\d{3}-?\d\d", check="br.cpf", words=r"cpf\b", standalone=r".*\..*-"
    ),
    NationalId(
        "CA",
        "ca_sin",
        form=r"[1-79]\d\d([- ]?)\d{3}\1\d{3}",
        check="ca.sin",
        words=r"sin\b|social insurance|nas\b|assurance sociale",
    ),
    NationalId(
        "CH",
        "ch_ahv",
        form=r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d\d",
        check="ch.ssn",
        words=r"ahv|avs\b|sozialvers",
        standalone=ANY,
    ),
    NationalId(
        "CL",
        "cl_rut",
        form=r"\d{1,2}\.?\d{3}\.?\d{3}-[\dkK]",
        check="cl.rut",
        words=r"rut\b|run\b",
        standalone=r".*\..*\.",
    ),
    NationalId("CN", "cn_id", form=r"\d{6}(?:19|20)\d{9}[\dXx]", check="cn.ric", words=r"身份证", standalone=ANY),
    NationalId("CZ", "cz_rc", form=r"\d{6}/\d{3,4}", check="cz.rc", words=r"rodn[ée]", standalone=r"\d{6}/\d{4}"),
    NationalId(
        "DE",
        "de_health",
        form=r"[A-Za-z]\d{9}",
        check=de_health,
        words=r"krankenvers|krankenkasse|versicherten|kvnr|gesundheitskarte|egk\b|gkv\b",
    ),
    NationalId(
        "DE",
        "de_id_card",
        form=rf"[{_ICAO}][{_ICAO}0-9]{{8}}\d?",
        check=de_document,
        words=r"ausweis|dokumentennummer|seriennummer|npa\b|identity card",
    ),
    NationalId(
        "DE",
        "de_insurance",
        form=r"\d{2} ?\d{6} ?[A-Za-z] ?\d{3}",
        check=de_insurance,
        words=r"versicherungs|rvnr|svnr|sv-nummer|renten|drv\b",
        standalone=ANY,
    ),
    NationalId(
        "DE",
        "de_passport",
        form=rf"[{_ICAO}][{_ICAO}0-9]{{8}}\d?",
        check=de_document,
        words=r"reisepass|passport|pass-?(?:nummer|nr)|dokumentennummer|mrz\b",
    ),
    NationalId("DE", "de_tax_id", form=r"[1-9]\d(?: ?\d{3}){3}", check="de.idnr", words=r"steuer|idnr|tin\b|bzst"),
    NationalId("DK", "dk_cpr", form=r"\d{6}-?\d{4}", check="dk.cpr", words=r"cpr\b|personnummer", standalone=r".*-"),
    NationalId(
        "ES",
        "es_nie",
        form=r"[XYZxyz]\d{7}-?[A-Za-z]",
        check="es.nie",
        words=r"nie\b|extranjero",
        standalone=r"[XYZ]\d{7}-?[A-Z]$",
    ),
    NationalId(
        "ES",
        "es_nif",
        form=r"\d{7,8}-?[A-Za-z]",
        check=es_dni,
        words=r"dni\b|nif\b|documento nacional|identificaci",
        standalone=r"\d{8}-?[A-Z]$",
    ),
    NationalId(
        "FI",
        "fi_hetu",
        form=r"\d{6}[-+A-FU-Ya-fu-y]\d{3}[0-9A-Ya-y]",
        check="fi.hetu",
        words=r"hetu|henkil[öo]tunnus|personbeteck",
        standalone=ANY,
    ),
    NationalId(
        "FR",
        "fr_nir",
        form=r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d",
        check="fr.nir",
        words=r"nir\b|s[ée]cu|insee",
        standalone=ANY,
    ),
    NationalId(
        "GB",
        "gb_nhs",
        form=r"\d{3}[- ]?\d{3}[- ]?\d{4}",
        check="gb.nhs",
        words=r"nhs\b|national health|health (?:services )?authority",
    ),
    NationalId(
        "GB",
        "gb_nino",
        form=r"(?:[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]|QQ)(?: ?\d\d){3} ?[A-D]",
        check=gb_nino,
        words=r"nino?",
        standalone=ANY,
    ),
    NationalId("IL", "il_id", form=r"\d{8}-?\d", check="il.idnr", words=r"teudat|זהות|israeli id"),
    NationalId(
        "IN", "in_aadhaar", form=r"\d{4}([- :]?)\d{4}\1\d{4}", check="in_.aadhaar", words=r"a+dh?aa?r|uidai|\buid\b"
    ),
    NationalId(
        "IN", "in_pan", form=r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]", check="in_.pan", words=r"\bpan\b", standalone=ANY
    ),
    NationalId(
        "IT",
        "it_fiscal_code",
        form=rf"(?i:[A-Z]{{6}}{_DIGIT}{{2}}[A-EHLMPRST]{_DIGIT}{{2}}[A-Z]{_DIGIT}{{3}}[A-Z])",
        check="it.codicefiscale",
        words=r"codice fiscale|c\.?f\.?\b",
        standalone=ANY,
    ),
    NationalId(
        "KR",
        "kr_rrn",
        form=r"\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])-?[1-4]\d{6}",
        check=any_number,  # those issued since October 2020 have no check digit
        words=r"주민|rrn\b|resident",
        standalone=r"\d{6}-",
    ),
    NationalId(
        "MX",
        "mx_curp",
        form=r"[A-Z][AEIOUX][A-Z]{2}\d{6}[HM][A-Z]{5}[A-Z\d]\d",
        check="mx.curp",
        words=r"curp",
        standalone=ANY,
    ),
    NationalId("NG", "ng_nin", form=r"\d{11}", check=ng_nin, words=r"\bnin\b|nimc|nigeria"),
    NationalId(
        "NL",
        "nl_bsn",
        form=r"\d{3}([ .]?)\d{3}\1\d{3}|\d{4}\.\d\d\.\d{3}",
        check="nl.bsn",
        words=r"bsn\b|burgerservice|sofi",
    ),
    NationalId(
        "NO",
        "no_fnr",
        form=r"\d{6} ?\d{5}",
        check="no.fodselsnummer",
        words=r"f[øo]dselsnummer|fnr\b|personnummer",
        standalone=ANY,
    ),
    NationalId("PL", "pl_pesel", form=r"\d{11}", check="pl.pesel", words=r"pesel"),
    NationalId("PT", "pt_nif", form=r"[1-3]\d{2} ?\d{3} ?\d{3}", check="pt.nif", words=r"nif\b|contribuinte"),
    NationalId("RO", "ro_cnp", form=r"[1-8]\d{12}", check="ro.cnp", words=r"cnp\b|cod numeric"),
    NationalId(
        "SE",
        "se_personnummer",
        form=r"(?:\d{2})?\d{6}[-+]?\d{4}",
        check=se_personnummer,
        words=r"personnummer|pnr\b|samordning|svensk id|personal identity",
        standalone=r"(?:\d{6}|\d{8})[-+]",
    ),
    NationalId("SG", "sg_nric", form=r"[STFGM]\d{7}[A-Z]", check=sg_nric, words=r"nric|\bfin\b", standalone=ANY),
    NationalId("SK", "sk_rc", form=r"\d{6}/\d{3,4}", check="cz.rc", words=r"rodn[ée]", standalone=r"\d{6}/\d{4}"),
    NationalId(
        "TH",
        "th_id",
        form=r"[1-8](?:-?\d){12}",
        check="th.pin",
        words=r"thai(?:land)? (?:national )?id|tnin|บัตร|ประชาชน",
    ),
    NationalId(
        "TR",
        "tr_id",
        form=r"[1-9]\d{10}",
        check="tr.tckimlik",
        words=r"t\.?c\.? ?(?:kimlik|no\b)|tckn|kimlik|n[üu]fus|turkish id",
    ),
    NationalId(
        "US",
        "us_itin",
        form=r"9\d\d([ -]?)[5-9]\d\1\d{4}",
        check="us.itin",
        words=r"itin\b",
        standalone=r"9\d\d-\d\d-",
    ),
    NationalId(
        "US",
        "us_ssn",
        form=r"\d{3}([ .\-]?)\d{2}\1\d{4}",
        check=us_ssn,
        words=r"ssns?\b|social\b|ss#",
        standalone=r"\d{3}-\d\d-\d{4}",
    ),
    NationalId(
        "ZA", "za_id", form=r"\d{10}[0-2]\d\d", check="za.idnr", words=r"\bid\b|identity|rsa id|south african|smart id"
    ),
)
COUNTRIES = tuple(sorted({number.country for number in NUMBERS}))
# a text without any of these words is not searched with _DOCUMENT
_DOCUMENT_WORDS = ("pass", "licen", "führerschein", "fuhrerschein", "pasaporte", "identity card", "ausweis")
# a passport's or licence's number after its name: no form of its own that could be checked
_DOCUMENT = re.compile(
    r"\b(?:passport|reisepass|passeport|pasaporte|passaporto|driver'?s?'? licen[cs]e|driving licen[cs]e"
    r"|f[üu]hrerschein|identity card"
    r"|personalausweis)(?:[- ]?(?:number|num|no|nr|nummer|id|#|n[°º]))?\.?\s*(?:is|ist|est|es|:|=|#)?\s*#?"
    r"((?=[A-Z]*\d)(?=(?:[A-Z]*\d){4})[A-Z0-9]{1,4}[ -]?[A-Z0-9]{4,14})(?![\w-])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Compiled:
    """A number's regular expressions and its check, ready to be used."""

    subtype: str
    form: re.Pattern[str]
    check: Check
    words: re.Pattern[str]
    standalone: re.Pattern[str] | None

    @classmethod
    def of(cls, number: NationalId) -> _Compiled:
        return cls(
            subtype=number.subtype,
            form=re.compile(rf"(?<![\w])(?:{number.form})(?![\w]|[.-]\d)"),
            check=_stdnum(number.check) if isinstance(number.check, str) else number.check,
            words=re.compile(rf"(?<![\w])(?:{number.words}|{_ANY_WORD})", re.IGNORECASE),
            standalone=re.compile(number.standalone) if number.standalone else None,
        )


def opener(countries: Sequence[str]) -> Callable[[NormalizedText], Iterable[PiiEntity]]:
    """Return the recogniser of the numbers of `countries`; () is all in COUNTRIES."""
    numbers = [_Compiled.of(number) for number in NUMBERS if number.country in (countries or COUNTRIES)]

    def find(normalized: NormalizedText) -> Iterator[PiiEntity]:
        if not normalized.numbers:
            return
        for start, end in _places(normalized):
            before = normalized.before(start, 60)
            for number in numbers:
                yield from _in_span(normalized, number, start=start, end=end, before=before)
        if normalized.has(*_DOCUMENT_WORDS):
            for match in _DOCUMENT.finditer(normalized.flat):
                yield PiiEntity(
                    match.start(1),
                    match.end(1),
                    entity="national_id",
                    subtype="document",
                    score=0.7,
                    value=_bare(match[1]),
                )

    return find


def _places(normalized: NormalizedText) -> list[tuple[int, int]]:
    """Return the spans to search, each once.

    They are runs of digits with adjacent letters, and tokens of letters and digits.
    """
    spans = []
    for start, end in normalized.runs:
        n_before = 1 if start and normalized.at(start - 1) == " " else 0
        while start - n_before > 0 and normalized.at(start - n_before - 1).isalnum() and n_before < 6:
            n_before += 1
        n_after = 1 if normalized.at(end) in " -+" else 0
        while normalized.at(end + n_after).isalnum() and n_after < 6:
            n_after += 1
        spans.append((start - n_before, end + n_after))
    starts = [start for start, _ in spans]  # sorted, as the runs are
    for start, end in normalized.tokens:
        before = bisect_right(starts, start) - 1
        if 8 <= end - start <= 24 and (before < 0 or spans[before][1] < end):
            spans.append((start, end))
    return spans


def _in_span(
    normalized: NormalizedText, number: _Compiled, *, start: int, end: int, before: str
) -> Iterator[PiiEntity]:
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
            yield PiiEntity(
                match.start(),
                match.end(),
                entity="national_id",
                subtype=number.subtype,
                score=score,
                value=_bare(text),
            )


def _bare(text: str) -> str:
    return re.sub(r"[\W_]", "", text).upper()
