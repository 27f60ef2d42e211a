"""Street addresses in the forms of seven countries, postcodes that are addresses by themselves, and dates of birth."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

from sartor.curate.personal.findings import Finding, Sight

_U = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪĮİĶĹĻĽŁŃŅŇŌŐŒŔŘŚŞŠŢŤŪŮŰŲŸŹŻŽ"
_NAME = rf"(?:(?:St|Ste|Dr|Mt|Ft|[{_U}])\.|[{_U}][\w'’-]*)"  # a word with a capital, or one cut short with a dot
_GAP = r"(?:,?[ \n]|, |,\n)"
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|PR|RI|SC|SD"
    "|TN|TX|UT|VT|VA|WA|WV|WI|WY"
)
_WAYS = (
    r"(?:Street|St|Avenue|Ave|Av|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Terrace|Ter|Square|Sq|Circle|Cir|Parkway"
    r"|Pkwy|Highway|Hwy|Trail|Trl|Close|Crescent|Cres|Gardens|Grove|Mews|Row|Alley|Plaza|Loop|Pike|Turnpike|Crossing|Ridge|Heights|Walk)"
)
_SHORT_WAYS = {
    "Way",
    "Place",
    "Row",
    "Court",
    "Ridge",
    "Heights",
    "Walk",
    "Close",
    "Loop",
    "Square",
    "Circle",
    "Crossing",
    "Plaza",
    "Drive",
    "Trail",
}
_UNIT = r"(?:,? (?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|#)\.? ?#?\w{1,6})?"
_US_TOWN = rf"{_NAME}(?: {_NAME}){{0,3}}"
_UK_CODE = (
    r"(?:GIR 0AA|(?:A[BL]|B[ABDHLNRST]?|C[ABFHMORTVW]|D[ADEGHLNTY]|E[CHNX]?|F[KY]|G[LUY]?|H[ADGPRSUX]|I[GMPV]|JE|K[ATWY]|L[ADELNSU]?|M[EKL]?"
    r"|N[EGNPRW]?|O[LX]|P[AEHLOR]|R[GHM]|S[AEGKLMNOPRSTWY]?|T[ADFNQRSW]|UB|W[ACDFNRSV]?|YO|ZE)\d[\dA-Z]? ?\d[ABD-HJLNP-UW-Z]{2})"
)
_ENGLISH = re.compile(
    rf"(?<![\w.,$€£#-])(\d{{1,6}}(?:-\d{{1,5}}|[A-Za-z])?,? (?:(?:North|South|East|West|N|S|E|W|NE|NW|SE|SW)\.? )?"
    rf"(?:(?:{_NAME}|\d{{1,3}}(?:st|nd|rd|th)|of|the|de|la) ){{1,4}}?(?P<way>{_WAYS})\b\.?(?: (?:North|South|East|West|N|S|E|W|NE|NW|SE|SW)\b\.?)?"
    rf"{_UNIT}(?P<town>{_GAP}(?:{_US_TOWN}{_GAP})?(?:(?:{_STATES})\b\.?(?:,? \d{{5}}(?:-\d{{4}})?)?|{_UK_CODE}|\d{{5}}(?:-\d{{4}})?)(?!\w))?)"
)  # fmt: skip
_BOX = re.compile(
    rf"(?<!\w)((?:P\.? ?O\.? ?Box|Post Office Box|Postfach|Apartado|BP) \d{{1,6}}(?:,? {_US_TOWN},? (?:{_STATES})\b(?: \d{{5}}(?:-\d{{4}})?)?|,? \d{{5}} {_NAME})?)"
)
_POSTCODE = re.compile(rf"(?<![\w-]){_UK_CODE}(?![\w-])")
_DE_TOWN = rf"(?:(?:D-|A-|CH-)?\d{{4,5}} {_NAME}(?:[ -](?:(?:am|an der|im|ob der|bei|in der|vor der) )?{_NAME}){{0,3}})"
_DE_NUMBER = r"\d{1,4}(?: ?[a-z](?![\w]))?(?: ?[-/] ?\d{1,4})?"
_GERMAN = re.compile(
    rf"(?<![\w-])((?:(?:Am|An der|Im|Zum|Zur|Auf der|Unter den|Alte|Neue|Große|Kleine|[{_U}][\w.-]+) ){{0,2}}"
    rf"(?:[{_U}][\w.-]*(?:straße|strasse|str\.|gasse|allee|weg|platz|ring|damm|ufer|chaussee|steig|hof|markt|graben)"
    rf"|(?:Straße|Strasse|Str\.|Gasse|Allee|Weg|Platz|Ring|Damm|Ufer|Chaussee|Markt)(?: (?:des|der|von) {_NAME}(?: {_NAME})?)?"
    rf"|(?:Am|An der|Im|Zum|Zur|Auf der|Unter den) {_NAME})"
    rf" {_DE_NUMBER}(?!\w|[.,:]\d)(?P<town>(?:, ?|,? ?\n| )(?:\d\. (?:Stock|OG), ?)?{_DE_TOWN})?)"
)
_DE_SURE = re.compile(r"(?:stra(?:ß|ss)e|str\.|gasse|allee)(?: |$)", re.IGNORECASE)
_FR_TOWN = rf"(?:(?:F-)?\d{{5}} {_NAME}(?:[ -](?:(?:sur|sous|en|de|la|le|les|lès|du|des)[ -])?{_NAME}|-(?:sur|sous|en|de|la|le|les|lès)-{_NAME})*(?: Cedex(?: \d+)?)?)"
_FRENCH = re.compile(
    r"(?<![\w.,])(\d{1,4}(?: ?(?:bis|ter|quater))?,? (?:[Rr]ue|[Aa]venue|[Aa]v\.|[Bb]oulevard|[Bb]d\.?|[Pp]lace|[Aa]ll[ée]e|[Cc]hemin|[Ii]mpasse|[Qq]uai|[Cc]ours"
    rf"|[Rr]oute|[Ss]quare|[Pp]assage|[Ff]aubourg) (?:(?:de la|de l['’]|des|du|de|d['’]|le|la|les|l['’]|aux?|à) ?)?{_NAME}(?:[ -](?:(?:de|du|des|la|le|et)[ -])?{_NAME}){{0,4}}"
    rf"(?P<town>(?:, ?|,? ?\n| ){_FR_TOWN})?)"
)
_SPANISH = re.compile(
    r"(?<!\w)((?:C/|C\.|Calle|Avda\.?|Avenida|Av\.|Plaza|Pza\.?|Paseo|Pº|Carrer|Camino|Ronda|Rua|Travessa|Largo|Praça|Carrera) ?(?:(?:de la|de los|de las|del|de|do|da|dos|das|la|el) )?"
    rf"{_NAME}(?: (?:(?:de la|de los|del|de|y|do|da) )?{_NAME}){{0,4}},? (?:n[ºo°.]{{1,2}} ?|núm\.? )?\d{{1,4}}(?!\d|[.,]\d|/)"
    rf"(?:, ?\d{{1,2}}[ºªo°](?: ?[A-Z])?)?(?:(?:, ?|,? ?\n| )\d{{4,5}}(?:-\d{{3}})? {_NAME}(?: (?:(?:de|del|la) )?{_NAME}){{0,2}})?)"
)
_ITALIAN = re.compile(
    rf"(?<!\w)((?:Via|Viale|Piazza|Piazzale|Corso|Vicolo|Largo) (?:(?:della|delle|dei|degli|del|di|dell['’]|san|XX) ?)?{_NAME}(?: (?:(?:di|e|da) )?{_NAME}){{0,3}},? (?:n\. ?)?\d{{1,4}}(?:/?[a-zA-Z](?!\w))?"
    rf"(?!\d|[.,]\d)(?P<town>(?:, ?| - | )\d{{5}} {_NAME}(?: {_NAME}){{0,2}}(?: \([A-Z]{{2}}\))?)?)"
)
_DUTCH = re.compile(
    rf"(?<!\w)((?:{_NAME} ){{0,2}}[{_U}][\w'’.-]*(?:straat|laan|weg|plein|gracht|kade|dijk|singel|hof|steeg|dreef)(?: ?\d{{1,4}})(?:[ -]?[a-zA-Z](?!\w))?(?:, ?|,? ?\n| )\d{{4}} ?[A-Z]{{2}} {_NAME}(?: {_NAME})?)"
    rf"|(?<!\w)([{_U}][\w'’.-]*(?:straat|laan|gracht|kade|plein|singel) \d{{1,4}}(?: ?[a-z](?!\w))?)(?!\w|[.,]\d)"
)

_MONTHS = (
    r"(?:jan(?:uary|uar|v(?:ier)?|\.)?|enero|ene\.?|feb(?:ruary|ruar|rero|\.)?|f[ée]vr(?:ier|\.)?|mar(?:ch|zo|s|\.)?|m[äa]rz|apr(?:il|\.)?|avril|abril|may|mai|mayo|june?|juni"
    r"|juin|junio|july?|juli|juillet|julio|aug(?:ust|\.)?|ao[ûu]t|agosto|sep(?:t|tember|tembre|tiembre)?\.?|o[ck]t(?:ober|obre|ubre|\.)?|nov(?:ember|embre|iembre|\.)?|de[czs](?:ember|\.)?"
    r"|d[ée]cembre|diciembre|jänner|gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|dicembre)"
)
_DAY = (
    rf"(?:\d{{1,2}}[ ]?[./-][ ]?\d{{1,2}}[ ]?[./-][ ]?(?P<y1>(?:1[89]|20)\d\d|\d\d)|(?P<y2>(?:1[89]|20)\d\d)[./-]\d{{1,2}}[./-]\d{{1,2}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|er|\.|º)? (?:of |de )?{_MONTHS},?(?: de| del)? (?P<y3>(?:1[89]|20)\d\d)|{_MONTHS} \d{{1,2}}(?:st|nd|rd|th)?,? (?P<y4>(?:1[89]|20)\d\d)"
    rf"|{_MONTHS}-\d{{1,2}}-(?P<y5>(?:1[89]|20)\d\d)|\d{{1,2}}-{_MONTHS}-(?P<y6>(?:1[89]|20)?\d\d))(?![\d/-]|\.\d)"
)
_BORN = re.compile(
    r"(?<![\w-])(?:born(?: on)?|date[ _-]of[ _-]birth|birth[ _-]?date|birth[ _-]?day|d\.?o\.?b\.?|geboren(?: am)?|geb\.|geburts(?:datum|tag)|n[ée]e? le|date[ _]de[ _]naissance"
    r"|nacid[oa] el|naci el|nací el|fecha[ _]de[ _]nacimiento|nat[oa] il|data[ _]di[ _]nascita|geboortedatum|nascid[oa] em|data[ _]de[ _]nascimento)(?!\w)"
    rf"(?:[\s:=\"'(*\x00-]|is\b|was\b|on\b|ist\b|am\b|der\b|den\b|the\b|est\b|es\b|le\b|el\b|as\b|dd/mm/yyyy|mm/dd/yyyy|yyyy-mm-dd|in [{_U}]\w+(?=,? on)){{0,24}}({_DAY})",
    re.IGNORECASE,
)
_THIS_YEAR = datetime.date.today().year


def addresses(sight: Sight) -> Iterator[Finding]:
    """Streets with a house number, with the town where it follows; British postcodes; boxes at a post office."""
    if not sight.has_digit:
        return
    flat = sight.flat
    for match in _ENGLISH.finditer(flat):
        score = (
            0.9
            if match["town"]
            else 0.45
            if match["way"] in _SHORT_WAYS and "." not in match[0] and not _home(sight, match.start())
            else 0.65
        )
        yield _address(match, "street_english", score)
    for match in _POSTCODE.finditer(flat):
        if " " in match[0] or len(match[0]) >= 6:
            yield _address(match, "postcode_british", 0.65 if " " in match[0] else 0.5 if _home(sight, match.start()) else 0.3)
    if sight.has("box", "postfach", "apartado", "bp "):
        for match in _BOX.finditer(flat):
            yield _address(match, "box", 0.8)
    for match in _GERMAN.finditer(flat):
        sure = _DE_SURE.search(match[1].split("\n")[0]) is not None
        yield _address(
            match, "street_german", 0.9 if match["town"] and sure else 0.7 if match["town"] else 0.65 if sure else 0.3
        )
    for match in _FRENCH.finditer(flat):
        yield _address(
            match,
            "street_french",
            0.9 if match["town"] else 0.6 if "ue" in match[0][:12] or _home(sight, match.start()) else 0.5,
        )
    for match in _SPANISH.finditer(flat):
        yield _address(match, "street_spanish", 0.75)
    for match in _ITALIAN.finditer(flat):
        yield _address(match, "street_italian", 0.9 if match["town"] else 0.6)
    for match in _DUTCH.finditer(flat):
        yield _address(match, "street_dutch", 0.85 if match[1] else 0.6)


_HOME = re.compile(
    r"\b(?:live|lives|living|lived|address|deliver(?:y|ed)?|ship(?:ped)?|moved?|reside|home|house|mail|send|sent|visit|located|office|at|adresse|anschrift|wohne?)\b", re.IGNORECASE
)  # fmt: skip


def _home(sight: Sight, place: int) -> bool:
    return _HOME.search(sight.before(place, 32)) is not None


def _address(match: re.Match[str], what: str, score: float) -> Finding:
    text = match[0].rstrip(" .,\n") if not match[0].endswith(("St.", "Rd.", "Ave.")) else match[0]
    return Finding(match.start(), match.start() + len(text), "address", what, score, " ".join(text.casefold().split()))


def birth_dates(sight: Sight) -> Iterator[Finding]:
    """Dates after a word for birth. Of people who may be alive: a year before 1900 is history."""
    if not sight.has_digit or not sight.has(
        "born", "birth", "d.o.b", "dob", "geb", "né", "nee ", "ne le", "naci", "nat", "nasc", "naissance", "geboorte"
    ):
        return
    for match in _BORN.finditer(sight.flat):
        year = next(value for name, value in match.groupdict().items() if value)
        if len(year) == 2 or 1900 <= int(year) <= _THIS_YEAR:
            yield Finding(match.start(1), match.end(1), "birth_date", "birth_date", 0.85, match[1].casefold())
