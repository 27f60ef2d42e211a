"""Recognizer of introduced, titled or signed person names.

Names in free text need a language model. This module finds only "my name is Ana Ruiz", "Dear Mr Ruiz", "Frau Dr.
Weber" and similar forms; the scanner finds the same name elsewhere in the row.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from sartor.text.pii.entities import NormalizedText, PiiEntity

_U = "A-ZÀ-ÖØ-Þ"
_LOW = "a-zß-öø-ÿ"
_WORD = rf"[{_U}](?:['’][{_U}])?[{_LOW}]+(?:[{_U}][{_LOW}]+)?(?:['’-][{_U}][{_LOW}]+)*"
_FULL = (
    rf"(?:{_WORD}|[{_U}]\.)(?: (?:(?:van|von|de|der|den|del|della|di|da|la|le|bin|al|ter) ){{0,2}}"
    rf"(?:{_WORD}|[{_U}]\.(?= [{_U}]))){{0,3}}"
)
_INTRODUCED = re.compile(
    rf"(?<![\w'])(?:[Mm]y (?:full |first |last |real |maiden )?name(?:'s| is|:)|[Mm]y name is(?: actually| simply)?"
    rf"|I am called|I'm called|[Tt]hey call me|[Yy]ou can call me|[Pp]lease call me|[Cc]all me"
    rf"|[Ii]ch heiße|[Mm]ein Name ist|[Jj]e m['’]appelle|[Mm]on nom est|[Mm]e llamo|[Mm]i nombre es|[Mm]i chiamo"
    rf"|[Ii]k heet|[Mm]ijn naam is"
    rf"|(?:[Ff]ull )?[Nn]ame:|[Pp]atient(?: name)?:|[Cc]ustomer(?: name)?:|[Cc]ontact(?: person)?:|[Ss]igned,?"
    rf"|[Kk]ind regards,|[Bb]est regards,|[Ss]incerely,|[Mm]it freundlichen Grüßen,?|[Cc]ordialement,) *\n?({_FULL})"
)
_NAME_IS = re.compile(r"(?<!\w)my name(?:'s| is) ([a-z]{3,14})(?= ?(?:[.,!?\n\x00]|and\b|from\b|$))")
_TITLED = re.compile(
    rf"(?<![\w.])(?:(?:Mr|Mrs|Ms|Mx|Miss|Mister|Herrn?|Frau|Monsieur|Madame|Mme|Señor|Señora|Sra?|Signora?|Sig\.ra"
    rf"|Mevrouw|Meneer)\.?(?: (?:Dr|Prof)\.?)*|(?:Dr|Prof)\.|Doctor|Professor) ({_FULL})"
)
_SPEAKING = re.compile(
    rf"(?<!\w)(?:[Tt]his is|[Hh]ier (?:ist|spricht)) ({_FULL})(?= (?:speaking|here|calling|am Apparat)\b)"
)
# capitalised words that begin a sentence or are no person's name
_NO_NAME = re.compile(
    r"a|an|the|not|it|its|is|are|was|can|do|does|did|when|where|then|also|my|me|this|that|what|who|why|how|i|you|he|she"
    r"|we|they|just|so|but|and|or|if|in|on|at|of|to|for|from|with|no|yes|hello|hi|hey|thanks|thank|please|sorry|well|ok"
    r"|okay|good|great|nice|dear|sir|madam|right|wrong|up|down|potato|robot|rogers|president|minister|chair|general"
    r"|question|here|there|mine|unknown|mr|mrs|ms|miss|dr|prof|doctor|professor|herr|frau|none|null|n/a|tbd|name|first"
    r"|last|user|customer|patient",
    re.IGNORECASE,
)


# a text without any of these words is not searched with the patterns, which are slower
_INTRODUCTIONS = (
    "name",
    "call",
    "heiße",
    "appelle",
    "llamo",
    "nombre",
    "chiamo",
    "heet",
    "naam",
    "patient",
    "customer",
    "contact",
    "regards",
    "sign",
    "sincerely",
    "grüßen",
    "cordial",
    "nom est",
)
_TITLES = (
    "mr",
    "ms",
    "miss",
    "mister",
    "dr.",
    "prof",
    "herr",
    "frau",
    "monsieur",
    "madame",
    "mme",
    "señor",
    "sr.",
    "sra.",
    "sig",
    "doctor",
    "mevrouw",
    "meneer",
    "mx",
)
_SPEAKERS = ("speaking", "here", "calling", "from", "apparat")


def people(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield names that are introduced, addressed with a title, or in a signature."""
    flat = normalized.flat
    if normalized.has(*_INTRODUCTIONS):
        for match in _INTRODUCED.finditer(flat):
            yield from _person(match, "introduced", 0.8)
        for match in _NAME_IS.finditer(flat):
            yield from _person(match, "introduced", 0.6)
    if normalized.has(*_TITLES):
        for match in _TITLED.finditer(flat):
            yield from _person(match, "titled", 0.7)
    if normalized.has(*_SPEAKERS):
        for match in _SPEAKING.finditer(flat):
            yield from _person(match, "introduced", 0.6)


def _person(match: re.Match[str], subtype: str, score: float) -> Iterator[PiiEntity]:
    """Yield the name up to the first word that is no name: `Dr. Doolittle Or why ...`."""
    words = match[1].split(" ")
    names = list(itertools.takewhile(lambda word: not _NO_NAME.fullmatch(word.strip(".,")), words))
    if names:
        name = " ".join(names)
        yield PiiEntity(
            match.start(1),
            match.start(1) + len(name),
            entity="person",
            subtype=subtype,
            score=score,
            value=name.casefold(),
        )
