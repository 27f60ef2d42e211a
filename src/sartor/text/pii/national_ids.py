"""Numbers that a state gives to a person: tax, insurance and identity numbers, by country, with their check digits.

A number that is digits alone passes a check digit by chance one time in ten: it counts only where its form is of one country
alone (`alone`), or where a word before it says what it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.curate.personal import checks
from sartor.curate.personal.bundled import recogniser
from sartor.curate.personal.findings import Finding, Sight

# words of any country that say "a number of a person follows"
_ANY_WORD = (
    r"national (?:id|identity|insurance)|(?:id|identity|identification|personal|insurance|tax) ?(?:card )?(?:number"
    r"|no\b|nr\b|code)"
    r"|social security|tax ?payer|tax ?id|ausweis|personnummer|steuer-?id|sozialversicherung"
    r"|num[ée]ro de s[ée]curit[ée] sociale"
)


@dataclass(frozen=True)
class Number:
    """A country's number: its form, its check (None: presidio's own), the words that announce it.

    `alone`: a regular expression of the forms that count without such a word; "" is none.
    """

    country: str
    what: str
    form: re.Pattern[str]
    check: Callable[[str], bool]
    words: re.Pattern[str]
    alone: re.Pattern[str] | None


def _number(country: str, what: str, form: str, check: Callable[[str], bool], words: str, alone: str = "") -> Number:
    return Number(
        country,
        what,
        re.compile(rf"(?<![\w]){form}(?![\w]|[.-]\d)"),
        check,
        re.compile(rf"(?<![\w])(?:{words}|{_ANY_WORD})", re.IGNORECASE),
        re.compile(alone) if alone else None,
    )


ANY = r"[\s\S]+"
OWN = (
    _number("US", "us_ssn", r"\d{3}([ .\-]?)\d{2}\1\d{4}", checks.us_ssn, r"ssns?\b|social\b|ss#", r"\d{3}-\d\d-\d{4}"),
    _number("FR", "fr_nir", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d", checks.fr_nir, r"nir\b|s[ée]cu|insee", ANY),
    _number("NL", "nl_bsn", r"\d{3}([ .]?)\d{3}\1\d{3}|\d{4}\.\d\d\.\d{3}", checks.nl_bsn, r"bsn\b|burgerservice|sofi"),
    _number("BE", "be_rn", r"\d\d\.?\d\d\.?\d\d-?\d{3}\.?\d\d", checks.be_rn, r"rijksreg|registre nat|niss|insz", r".*\..*-"),
    _number("CH", "ch_ahv", r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d\d", checks.ean, r"ahv|avs\b|sozialvers", ANY),
    _number("AT", "at_svnr", r"\d{4} ?\d{6}", checks.at_svnr, r"svnr|sv-?n|sozialvers|versicherungsnummer"),
    _number("PT", "pt_nif", r"[1-3]\d{2} ?\d{3} ?\d{3}", checks.pt_nif, r"nif\b|contribuinte"),
    _number("BR", "br_cpf", r"\d{3}\.?\d{3}\.?\d{3}-?\d\d", checks.br_cpf, r"cpf\b", r".*\..*-"),
    _number("CN", "cn_id", r"\d{6}(?:19|20)\d{9}[\dXx]", checks.cn_id, r"身份证", ANY),
    _number("DK", "dk_cpr", r"\d{6}-?\d{4}", checks.dk_cpr, r"cpr\b|personnummer", r".*-"),
    _number("NO", "no_fnr", r"\d{6} ?\d{5}", checks.no_fnr, r"f[øo]dselsnummer|fnr\b|personnummer", ANY),
    _number("CZ", "cz_rc", r"\d{6}/\d{4}", checks.cz_rc, r"rodn[ée]", ANY),
    _number("SK", "sk_rc", r"\d{6}/\d{4}", checks.cz_rc, r"rodn[ée]", ANY),
    _number("MX", "mx_curp", r"[A-Z][AEIOUX][A-Z]{2}\d{6}[HM][A-Z]{5}[A-Z\d]\d", checks.mx_curp, r"curp", ANY),
    _number("CL", "cl_rut", r"\d{1,2}\.?\d{3}\.?\d{3}-[\dkK]", checks.cl_rut, r"rut\b|run\b", r".*\..*\."),
    _number("RO", "ro_cnp", r"[1-8]\d{12}", checks.ro_cnp, r"cnp\b|cod numeric"),
    _number("IL", "il_id", r"\d{8}-?\d", checks.luhn_any, r"teudat|זהות|israeli id"),
    _number("SG", "sg_nric", r"[STFGM]\d{7}[A-Z]", checks.sg_nric, r"nric|\bfin\b", ANY),
    _number("IN", "in_pan", r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]", lambda text: True, r"\bpan\b", ANY),
    _number("GB", "gb_nino", r"(?:[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]|QQ)(?: ?\d\d){3} ?[A-D]", checks.gb_nino, r"nino?", ANY),
    _number("US", "us_itin", r"9\d\d([ -]?)[5-9]\d\1\d{4}", checks.us_itin, r"itin\b", r"9\d\d-\d\d-"),
)  # fmt: skip
# (country, what, presidio's module, words in addition to its own, alone)
BORROWED = (
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
)  # fmt: skip
COUNTRIES = tuple(sorted({number.country for number in OWN} | {row[0] for row in BORROWED}))
# a passport's or licence's number after its name: no form of its own that could be checked
_DOCUMENT = re.compile(
    r"\b(?:passport|reisepass|passeport|pasaporte|passaporto|driver'?s?'? licen[cs]e|driving licen[cs]e"
    r"|f[üu]hrerschein|identity card"
    r"|personalausweis)(?:[- ]?(?:number|num|no|nr|nummer|id|#|n[°º]))?\.?\s*(?:is|ist|est|es|:|=|#)?\s*#?"
    r"((?=[A-Z]*\d)(?=(?:[A-Z]*\d){4})[A-Z0-9]{1,4}[ -]?[A-Z0-9]{4,14})(?![\w-])",
    re.IGNORECASE,
)


def opener(countries: Sequence[str]) -> Callable[[Sight], Iterable[Finding]]:
    """The recogniser for the numbers of `countries`; () is all in COUNTRIES. Raises ExtraError without presidio."""
    wanted = set(countries or COUNTRIES)
    numbers = [number for number in OWN if number.country in wanted]
    numbers += [_borrowed(*row) for row in BORROWED if row[0] in wanted]

    def find(sight: Sight) -> Iterator[Finding]:
        if not sight.numbers:
            return
        for start, end in _places(sight):
            before = sight.before(start, 60)
            for number in numbers:
                yield from _in_place(sight, start, end, before, number)
        if sight.has("pass", "licen", "führerschein", "fuhrerschein", "pasaporte", "identity card", "ausweis"):
            for match in _DOCUMENT.finditer(sight.flat):
                yield Finding(match.start(1), match.end(1), "national_id", "document", 0.7, _bare(match[1]))

    return find


def _places(sight: Sight) -> list[tuple[int, int]]:
    """Spans to look into: runs of digits with the letters beside them, and words of letters and digits; each seen once."""
    spans = [(_left(sight, start), _right(sight, end)) for start, end in sight.runs]
    starts = [start for start, _ in spans]  # in order, as the runs are
    for start, end in sight.tokens:
        before = bisect_right(starts, start) - 1
        if 8 <= end - start <= 24 and (before < 0 or spans[before][1] < end):
            spans.append((start, end))
    return spans


def _left(sight: Sight, place: int) -> int:
    space = 1 if place and sight.at(place - 1) == " " else 0
    while place - space > 0 and sight.at(place - space - 1).isalnum() and space < 6:
        space += 1
    return place - space


def _right(sight: Sight, place: int) -> int:
    space = 1 if sight.at(place) in " -+" else 0
    while sight.at(place + space).isalnum() and space < 6:
        space += 1
    return place + space


def _in_place(sight: Sight, start: int, end: int, before: str, number: Number) -> Iterator[Finding]:
    for match in number.form.finditer(sight.flat, start, end):
        text = match[0]
        if sight.at(match.end()).isalnum() or sight.at(match.start() - 1).isalnum() or not number.check(text):
            continue
        if match.start() > start:
            before = sight.before(match.start(), 60)
        told = number.words.search(before) is not None
        if told or (number.alone is not None and number.alone.match(text)):
            score = 0.95 if told else 0.75
            yield Finding(match.start(), match.end(), "national_id", number.what, score, _bare(text))


def _bare(text: str) -> str:
    return re.sub(r"[\W_]", "", text).upper()


def _borrowed(country: str, what: str, place: str, words: str, alone: str) -> Number:
    """One of presidio's recognisers: its patterns as one, its check, its context words and ours."""
    presidio = recogniser(f"country_specific.{place}")

    def check(text: str) -> bool:
        said = presidio.validate_result(text)
        return said is not False and not presidio.invalidate_result(text)

    form = _either([pattern.regex for pattern in presidio.patterns], presidio.global_regex_flags)
    own = [re.escape(word) for word in presidio.context or [] if len(word) > 3]
    return Number(
        country,
        what,
        form,
        check,
        re.compile(rf"(?<![\w])(?:{'|'.join([words, *own])}|{_ANY_WORD})", re.IGNORECASE),
        re.compile(alone) if alone else None,
    )


def _either(patterns: Sequence[str], flags: int) -> Any:
    """Patterns of the `regex` module as one: it is what presidio's are written for."""
    import regex

    return regex.compile("|".join(f"(?:{pattern})" for pattern in patterns), flags=flags)
