"""Recognizer of street addresses, postcodes and birth dates.

Each form of an address contains a number and is tried only at numbers, so text without numbers costs nothing.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

from sartor.text.pii.entities import NormalizedText, PiiEntity

_U = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪĮİĶĹĻĽŁŃŅŇŌŐŒŔŘŚŞŠŢŤŪŮŰŲŸŹŻŽ"
_NAME = rf"(?:(?:St|Ste|Dr|Mt|Ft|[{_U}])\.|[{_U}][\w'’-]*)"  # a capitalised word, or an abbreviation with a dot
_GAP = r"(?:,?[ \n]|, |,\n)"
_THEN = r"(?:, ?|,? ?\n| )"
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA"
    "|PR|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY"
)
_ZIP = r"\d{5}(?:-\d{4})?"
_WAYS = (
    "Street|St|Avenue|Ave|Av|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Terrace|Ter|Square|Sq|Circle|Cir"
    "|Parkway|Pkwy|Highway|Hwy|Trail|Trl|Close|Crescent|Cres|Gardens|Grove|Mews|Row|Alley|Plaza|Loop|Pike|Turnpike|Crossing"
    "|Ridge|Heights|Walk"
)
# words that occur in other contexts too ("12 Angry Men Way"); they count with a town, or after a word such as "lives"
_SHORT_WAYS = re.compile(
    "Way|Place|Row|Court|Ridge|Heights|Walk|Close|Loop|Square|Circle|Crossing|Plaza|Drive|Trail|Dr|Pl|Ter|Av"
)
_COMPASS = r"(?:North|South|East|West|NE|NW|SE|SW|N|S|E|W)\b\.?"
_UNIT = r"(?:,? (?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|#)\.? ?#?\w{1,6})?"
_TOWN = rf"{_NAME}(?: {_NAME}){{0,3}}"
_UK_AREA = (
    "A[BL]|B[ABDHLNRST]?|C[ABFHMORTVW]|D[ADEGHLNTY]|E[CHNX]?|F[KY]|G[LUY]?|H[ADGPRSUX]|I[GMPV]|JE|K[ATWY]|L[ADELNSU]?|M[EKL]?"
    "|N[EGNPRW]?|O[LX]|P[AEHLOR]|R[GHM]|S[AEGKLMNOPRSTWY]?|T[ADFNQRSW]|UB|W[ACDFNRSV]?|YO|ZE"
)
_UK_CODE = rf"(?:{_UK_AREA})\d[\dA-Z]? ?\d[ABD-HJLNP-UW-Z]{{2}}"
_ENGLISH = re.compile(
    rf"\d{{1,6}}(?:-\d{{1,5}}|[A-Za-z])?,? (?:{_COMPASS} )?(?:(?:{_NAME}|\d{{1,3}}(?:st|nd|rd|th)|de|la) ){{1,4}}?"
    rf"(?P<way>{_WAYS})\b\.?(?: {_COMPASS})?{_UNIT}"
    rf"(?P<town>{_GAP}(?:{_TOWN}{_GAP})?(?:(?:{_STATES})\b\.?(?:,? {_ZIP})?|{_UK_CODE}|{_ZIP})(?!\w))?"
)
_BOX_BEFORE = re.compile(r"(?<!\w)(?:P\.? ?O\.? ?Box|Post Office Box|Postbox|Postfach|Apartado) $")
_POSTCODE = re.compile(rf"(?<![\w-])({_UK_CODE})(?![\w-])")
_DE_TOWN = (
    rf"(?:(?:D-|A-|CH-)?\d{{4,5}} {_NAME}(?:[ -](?:(?:am|an der|im|ob der|bei|in der|vor der) )?{_NAME}){{0,3}}"
    r"(?: \((?:Oder|Saale|Westf\.?)\))?)"
)
_DE_WAYS = "straße|strasse|str\\.|gasse|allee|weg|platz|ring|damm|ufer|chaussee|steig|hof|markt|graben"
_DE_STREET = re.compile(
    rf"(?:(?<![\w-])(?:Am|An der|An den|Im|Zum|Zur|Auf der|Unter den|Alte|Alter|Neue|Neuer|Große|Kleine|[{_U}][\w-]+) "
    rf")?"
    rf"(?<![\w])(?:[{_U}][\w-]*(?:{_DE_WAYS})|(?:Straße|Strasse|Str\.|Gasse|Allee|Weg|Platz|Ring|Damm|Ufer|Chaussee|Markt)"
    rf"(?: (?:des|der|von) {_NAME}(?: {_NAME})?)?|(?:Am|An der|Im|Zum|Zur|Auf der|Unter den) {_NAME}) $"
)
_DE_WORD = re.compile(
    rf"(?:{_DE_WAYS}|Straße|Strasse|Gasse|Allee|Platz|Markt|\b(?:Am|An der|Im|Zum|Zur|Auf der|Unter "
    rf"den|des|der|von)\b.*) $"
)
_DE_NUMBER = re.compile(
    rf"\d{{1,4}}(?: ?[a-z](?![\w]))?(?: ?[-/] ?\d{{1,4}})?(?!\w|[.,:]\d)(?P<town>{_THEN}(?:\d\. (?:Stock|OG), "
    rf"?)?{_DE_TOWN})?"
)
_DE_SURE = re.compile(r"(?:stra(?:ß|ss)e|str\.|gasse|allee)\b", re.IGNORECASE)
_FR_TOWN = (
    rf"(?:F-)?\d{{5}} {_NAME}(?:[ -](?:(?:sur|sous|en|de|la|le|les|lès|du|des)[ -])?{_NAME}"
    rf"|-(?:sur|sous|en|de|la|le|les|lès)-{_NAME})*(?: Cedex(?: \d+)?)?"
)
_FRENCH = re.compile(
    r"\d{1,4}(?: ?(?:bis|ter|quater))?,? "
    r"(?P<way>[Rr]ue|[Aa]venue|[Aa]v\.|[Bb]oulevard|[Bb]d\.?|[Pp]lace|[Aa]ll[ée]e|[Cc]hemin"
    r"|[Ii]mpasse|[Qq]uai|[Cc]ours|[Rr]oute|[Ss]quare|[Pp]assage|[Ff]aubourg) "
    r"(?:(?:de la|de l['’]|des|du|de|d['’]|le|la|les|l['’]|aux?|à) ?)?"
    rf"{_NAME}(?:[ -](?:(?:de|du|des|la|le|et)[ -])?{_NAME}){{0,4}}(?P<town>{_THEN}{_FR_TOWN})?"
)
_ES_BEFORE = re.compile(
    r"(?<![\w.])(?:C/|C\.|Calle|Avda\.?|Avenida|Av\.|Plaza|Pza\.?|Paseo|Pº|Carrer|Camino|Ronda|Rua|Travessa|Largo"
    r"|Praça|Carrera) ?"
    rf"(?:(?:de la|de los|de las|del|de|do|da|dos|das|la|el) )?{_NAME}(?: (?:(?:de la|de los|del|de|y|do|da) "
    rf")?{_NAME}){{0,4}}"
    r",? (?:n[ºo°.]{1,2} ?|núm\.? )?$"
)
_ES_NUMBER = re.compile(
    rf"\d{{1,4}}(?!\d|[.,]\d|/)(?:, ?\d{{1,2}}[ºªo°](?: ?[A-Z])?)?(?P<town>{_THEN}\d{{4,5}}(?:-\d{{3}})? {_NAME}"
    rf"(?: (?:(?:de|del|la) )?{_NAME}){{0,2}})?"
)
_IT_BEFORE = re.compile(
    r"(?<!\w)(?:Via|Viale|Piazza|Piazzale|Corso|Vicolo|Largo) (?:(?:della|delle|dei|degli|del|di|dell['’]|san|XX) ?)?"
    rf"{_NAME}(?: (?:(?:di|e|da) )?{_NAME}){{0,3}},? (?:n\. ?)?$"
)
_IT_NUMBER = re.compile(
    rf"\d{{1,4}}(?:/?[a-zA-Z](?!\w))?(?!\d|[.,]\d)(?P<town>(?:, ?| - "
    rf"| )\d{{5}} {_NAME}(?: {_NAME}){{0,2}}(?: \([A-Z]{{2}}\))?)?"
)
_NL_BEFORE = re.compile(
    rf"(?<!\w)(?:{_NAME} ){{0,2}}[{_U}][\w'’.-]*(?:straat|laan|weg|plein|gracht|kade|dijk|singel|hof|steeg|dreef) $"
)
_NL_NUMBER = re.compile(
    rf"\d{{1,4}}(?:[ -]?[a-zA-Z](?!\w))?(?!\w|[.,]\d)(?P<town>{_THEN}\d{{4}} ?[A-Z]{{2}} {_NAME}(?: {_NAME})?)?"
)
_NL_SURE = re.compile(r"(?:straat|laan|gracht|kade|plein|singel) $")
# streets of other languages: capitalised words and a number, followed by a town with its postcode
_CODE = (
    rf"(?:\d{{3}} ?\d{{2}}|\d{{2}}-\d{{3}}|\d{{4,5}}-\d{{3}}|{_ZIP}|\d{{4}} [A-Z]{{2}}|(?!(?:1[5-9]|20)\d\d)\d{{4}}"
    rf"|[A-Z]\d[A-Z] \d[A-Z]\d|{_UK_CODE})(?![\w-])"
)
_ANY_BEFORE = re.compile(
    rf"(?<![\w.])(?:(?:ul\.|al\.|R) )?(?:{_NAME} (?:(?:da|de|do|das|dos|la|le|el|van|u\.|út|utca|gate|vej) "
    rf"){{0,2}}){{1,4}}$"
)
_ANY_NUMBER = re.compile(
    rf"(?!(?:1[5-9]|20)\d\d)\d{{1,4}}\.?(?: ?[a-zA-Z](?!\w))?(?:/\d{{1,4}})?(?P<town>, {_TOWN},? {_CODE}"
    rf"|, {_CODE} {_NAME}(?: {_NAME}){{0,2}})"
)
# postcode after the town, as in forms: `Via Roma 5, Milano, 20121`
_TAIL = re.compile(rf",? {_TOWN},? {_CODE}")
_ANY_WORD = re.compile(rf"[{_U}][\w'’.-]* (?:(?:da|de|do|das|dos|la|le|el|van|u\.|út|utca|gate|vej) )?$")
# (subtype, pattern of the street before the number, pattern of number and town, score with a town, score without)
BEFORE = (
    ("street_german", _DE_STREET, _DE_NUMBER, 0.9, 0.3),
    ("street_spanish", _ES_BEFORE, _ES_NUMBER, 0.9, 0.75),
    ("street_italian", _IT_BEFORE, _IT_NUMBER, 0.9, 0.6),
    ("street_dutch", _NL_BEFORE, _NL_NUMBER, 0.9, 0.3),
    (
        "box",
        _BOX_BEFORE,
        re.compile(rf"\d{{1,6}}(?P<town>,? {_TOWN},? (?:{_STATES})\b(?: {_ZIP})?|,? \d{{5}} {_NAME})?"),
        0.8,
        0.8,
    ),
    (
        "box",
        re.compile(r"(?<!\w)BP $"),
        re.compile(rf"\d{{1,6}}(?!\w|/)(?P<town>,? \d{{5}} {_NAME})?"),
        0.8,
        0.0,
    ),  # BP may be blood pressure
    ("street", _ANY_BEFORE, _ANY_NUMBER, 0.55, 0.0),
)
# fast check of the word before the number, before the long patterns are tried
_WAY_BEFORE = re.compile(
    rf"(?:{_DE_WAYS}|straat|laan|plein|gracht|kade|dijk|singel|steeg|dreef|[Bb]ox|Postfach|Apartado|BP"
    r"|(?:Am|der|des|den|von|Im|Zum|Zur|Straße|Strasse|C/|C\.|Calle|Avda\.?|Avenida|Av\.|Plaza|Pza\.?|Paseo|Pº"
    r"|Carrer|Camino|Ronda|Rua"
    r"|Travessa|Largo|Praça|Carrera|Via|Viale|Piazza|Piazzale|Corso|Vicolo)\b.{0,60}),? (?:n[º.o°]{1,2} ?|núm\.? )?$",
    re.DOTALL,
)
_HOME = re.compile(
    r"\b(?:to|from|near|meet|come|live|lives|living|lived|address|deliver(?:y|ed)?|ship(?:ped)?|moved?|reside|home"
    r"|house|mail|send|sent|visit|located"
    r"|office|at|adresse|anschrift|wohne?)\b",
    re.IGNORECASE,
)

_YEAR_COMMA = re.compile(r"(?:19|20)\d\d, ")
_SAINT = re.compile(r"\.? [A-Z][a-z]")
_GOES_ON = re.compile(r" [a-z]{3}")

_MONTHS = (
    r"(?:jan(?:uary|uar|v(?:ier)?|\.)?|enero|ene\.?|feb(?:ruary|ruar|rero|\.)?|f[ée]vr(?:ier|\.)?|mar(?:ch|zo|s|\.)?|m[äa]rz"
    r"|apr(?:il|ile|\.)?|avril|abril|may|mai|mayo|maggio|june?|juni|juin|junio|giugno|july?|juli|juillet|julio"
    r"|luglio|aug(?:ust|\.)?"
    r"|ao[ûu]t|agosto|sep(?:t|tember|tembre|tiembre)?\.?|settembre|o[ck]t(?:ober|obre|ubre|\.)?|ottobre|nov(?:ember"
    r"|embre|iembre|\.)?"
    r"|de[czs](?:ember|\.)?|d[ée]cembre|diciembre|dicembre|jänner|gennaio|febbraio)"
)
_YEAR = r"(?:1[89]|20)\d\d"
_DAY = (
    rf"(?:\d{{1,2}} ?[./-] ?\d{{1,2}} ?[./-] ?(?P<y1>{_YEAR}|\d\d)|(?P<y2>{_YEAR})[./-]\d{{1,2}}[./-]\d{{1,2}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|er|\.|º)? (?:of |de )?{_MONTHS},?(?: de| del)? (?P<y3>{_YEAR})"
    rf"|{_MONTHS} \d{{1,2}}(?:st|nd|rd|th)?,? (?P<y4>{_YEAR})|{_MONTHS}-\d{{1,2}}-(?P<y5>{_YEAR})"
    rf"|\d{{1,2}}-{_MONTHS}-(?P<y6>(?:1[89]|20)?\d\d))(?![\d/-]|\.\d)"
)
_BORN = re.compile(
    r"(?<![\w-])(?:born(?: on)?|date[ _-]?of[ _-]?birth|birth[ _-]?date|birth[ _-]?day|d\.?o\.?b\.?|geboren(?: "
    r"am)?|geb\."
    r"|geburts(?:datum|tag)|n[ée]e? le|date[ _]de[ _]naissance|nacid[oa] el|naci el|nací el"
    r"|fecha[ _]de[ _]nacimiento|nat[oa] il"
    r"|data[ _]di[ _]nascita|geboortedatum|nascid[oa] em|data[ _]de[ _]nascimento)(?!\w)"
    r"(?:[\s:=\"'(*?\x00-]|is\b|was\b|on\b|ist\b|am\b|der\b|den\b|the\b|est\b|es\b|le\b|el\b|as\b|dd/mm/yyyy"
    r"|mm/dd/yyyy|yyyy-mm-dd"
    rf"|in [{_U}]\w+(?=,? on)){{0,24}}({_DAY})",
    re.IGNORECASE,
)
_BIRTH_WORDS = (
    "born",
    "birth",
    "d.o.b",
    "dob",
    "geb",
    "né",
    "nee le",
    "ne le",
    "naci",
    "nato ",
    "nata ",
    "nasc",
    "naissance",
)
_THIS_YEAR = datetime.date.today().year


def addresses(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield streets with a house number, British postcodes, and post office boxes.

    A street includes the town if it follows.
    """
    flat = normalized.flat
    for start, end in normalized.numbers:
        before = normalized.at(start - 1)
        if end - start <= 6 and before not in ".,$€£#-" and normalized.at(end) in " ,-abcdefABCDEF":
            yield from _number_first(normalized, start)
        if before == " " or flat[max(0, start - 2) : start] == "nº":
            yield from _street_first(normalized, start)
        if end - start == 1 and normalized.at(end).isupper():
            match = _POSTCODE.search(flat, max(0, start - 5), end + 3)
            if match and match.end() == end + 2 and len(match[0]) >= 6:
                score = 0.5 if _home(normalized, match.start()) else 0.3
                if " " in match[0]:
                    score = 0.65
                yield _address(normalized, match, "postcode_british", score)


def _number_first(normalized: NormalizedText, start: int) -> Iterator[PiiEntity]:
    if normalized.at(start - 1).isalnum():
        return
    match = _ENGLISH.match(normalized.flat, start)
    if match:
        # "12 Wall Street analysts": if a lower-case word follows, a word such as "lives" must precede
        if _is_no_street(match, normalized):
            return
        is_long_way = not _SHORT_WAYS.fullmatch(match["way"])
        if match["town"]:
            score = 0.9
        elif _home(normalized, start) or (is_long_way and not _GOES_ON.match(normalized.flat, match.end())):
            score = 0.65
        else:
            score = 0.45
        yield _address(normalized, match, "street_english", score)
    match = _FRENCH.match(normalized.flat, start)
    if match and not _YEAR_COMMA.match(match[0]):
        if match["town"]:
            score = 0.9
        elif match["way"].lower() in ("rue", "avenue", "boulevard") or _home(normalized, start):
            score = 0.65
        else:
            score = 0.4
        yield _address(normalized, match, "street_french", score)


def _is_no_street(match: re.Match[str], normalized: NormalizedText) -> bool:
    """Return whether a match is a court or a saint: `131 S. Ct. 2507`, `2017, Judge Amy J. St. Eve`."""
    words = match[0][: match.start("way") - match.start()].split()[1:]
    if all(
        word.endswith(".") or word[0].isdigit() and match["way"] in ("Cir", "Ct", "Dr") for word in words
    ) or _YEAR_COMMA.match(match[0]):
        return True
    return (
        match["way"] in ("St", "Ct")
        and not match["town"]
        and _SAINT.match(normalized.flat, match.end("way")) is not None
    )


def _street_first(normalized: NormalizedText, start: int) -> Iterator[PiiEntity]:
    window = normalized.before(start, 90)
    has_way = _WAY_BEFORE.search(window) is not None
    if not has_way and not (_ANY_WORD.search(window) and _ANY_NUMBER.match(normalized.flat, start)):
        return
    for subtype, street, number, town_score, no_town_score in BEFORE:
        before = street.search(window)
        match = number.match(normalized.flat, start) if before else None
        if before is None or match is None:
            continue
        first = start - (len(window) - before.start())
        score = town_score if match.groupdict().get("town") else no_town_score
        if subtype == "street" and not any(sign.islower() for sign in before[0]):
            continue  # `ISO 9001, ISO 14001`
        if (subtype == "street_german" and _DE_SURE.search(before[0])) or (
            subtype == "street_dutch" and _NL_SURE.search(before[0])
        ):
            score = max(score, 0.65)
        elif subtype == "street_german" and not _DE_WORD.search(before[0]):
            continue
        yield _finding(normalized, first, match.end(), subtype=subtype, score=score, has_town=score == town_score)


def _home(normalized: NormalizedText, position: int) -> bool:
    return _HOME.search(normalized.before(position, 32)) is not None


def _address(normalized: NormalizedText, match: re.Match[str], subtype: str, score: float) -> PiiEntity:
    has_town = bool(match.groupdict().get("town"))
    return _finding(normalized, match.start(), match.end(), subtype=subtype, score=score, has_town=has_town)


def _finding(
    normalized: NormalizedText, start: int, end: int, *, subtype: str, score: float, has_town: bool
) -> PiiEntity:
    """Return the address without punctuation at its end, extended by a town that precedes its postcode."""
    tail = None if has_town else _TAIL.match(normalized.flat, end)
    if tail:
        end, score = tail.end(), max(score, 0.85)
    text = normalized.flat[start:end].rstrip(" ,\n")
    return PiiEntity(
        start,
        start + len(text),
        entity="address",
        subtype=subtype,
        score=score,
        value=" ".join(text.casefold().split()),
    )


def birth_dates(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield dates after a word for birth.

    A four-digit year must be from 1900 to the current year; people born earlier are not alive.
    """
    if not normalized.numbers or not normalized.has(*_BIRTH_WORDS):
        return
    for match in _BORN.finditer(normalized.flat):
        year = next(value for name, value in match.groupdict().items() if value)
        if len(year) == 2 or 1900 <= int(year) <= _THIS_YEAR:
            yield PiiEntity(
                match.start(1),
                match.end(1),
                entity="birth_date",
                subtype="birth_date",
                score=0.85,
                value=match[1].casefold(),
            )
