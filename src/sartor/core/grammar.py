"""The little English grammar that a swap of pronouns needs: which `her` it is, verbs that agree, `a` or `an`, capitals.

Rules and short lists, no model: what they cannot decide is said (None), never guessed into a wrong sentence.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

WORDS = {
    name: frozenset(words.split())
    for name, words in tomllib.loads((Path(__file__).parent / "grammar.toml").read_text(encoding="utf-8")).items()
}
_FUNCTION = WORDS["function"]
LY_ADJECTIVES = WORDS["ly_adjectives"]
_GIVES = WORDS["gives"]
_GIVEN = WORDS["given"]
_LETS = WORDS["lets"]
_KEEPS = _LETS | WORDS["keeps"]
_INFINITIVES = WORDS["infinitives"]
ADVERBS = WORDS["adverbs"]
_IRREGULAR = {
    "is": "are", "was": "were", "has": "have", "does": "do", "goes": "go", "isn't": "aren't", "wasn't": "weren't",
    "hasn't": "haven't", "doesn't": "don't", "isn’t": "aren’t", "wasn’t": "weren’t", "hasn’t": "haven’t", "doesn’t": "don’t",
    "dies": "die", "lies": "lie", "ties": "tie", "focuses": "focus", "discusses": "discuss", "quizzes": "quiz",
}  # fmt: skip
_SINGULAR = {plural: single for single, plural in _IRREGULAR.items()}
_FIXED = WORDS["fixed"]
_BEFORE_NOUNS = WORDS["before_nouns"]
_IS_ADJECTIVE = WORDS["is_adjective"]
_HAS = WORDS["has"]
_AN_NUMBER = re.compile(r"(?:8\d*|11|18)(?!\d)")
_ARTICLE = re.compile(r"\b(an?) $", re.IGNORECASE)
_A_VOWEL = re.compile(r"(?:uni|use|usu|eu|one\b|ukr)", re.IGNORECASE)


def cased(word: str, like: str) -> str:
    """`word` in the capitals of `like`: all, the first, or its own."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def article(word: str) -> str:
    """`a` or `an` before that word or number."""
    if word[:1].isdigit():
        return "an" if _AN_NUMBER.match(word) else "a"
    return "an" if word[:1].lower() in "aeiou" and word[:1] and not _A_VOWEL.match(word) else "a"


def with_articles(text: str, places: list[int]) -> str:
    """The text with each `a` or `an` right before one of the places (offsets of words) made to fit that word."""
    for place in sorted(places, reverse=True):
        before = _ARTICLE.search(text, max(0, place - 3), place)
        if before and before[1] != "AN":
            text = text[: before.start(1)] + cased(article(text[place:]), before[1]) + text[before.end(1) :]
    return text


def is_function(word: str) -> bool:
    """Whether a word (lower case) cannot begin what somebody has: a preposition, an article, a verb like `is`, `yesterday`."""
    return word in _FUNCTION


def is_determiner(before: str, after: str, *, possessive: bool) -> bool:
    """Whether a `her` (or with `possessive` a `his`) stands before the noun that it belongs to: `her car`, not `saw her`.

    `before` and `after` are the words beside it, lower case, empty at a full stop, comma or end.
    """
    if not after or is_function(after) or (after.endswith("ly") and after not in LY_ADJECTIVES):
        return False
    if possessive:
        return not (before == "of" and after in _FIXED - _BEFORE_NOUNS)  # a friend of his drove it
    if before in _GIVES and after in _GIVEN:
        return False
    if before in _LETS and after in _INFINITIVES:
        return False
    return not (before in _KEEPS and after.endswith("ing"))


def plural_verb(word: str) -> str:
    """The verb as `they` has it: works -> work, is -> are, tries -> try; another word as it is."""
    low = word.lower()
    if low in ADVERBS or not low.endswith("s") and low not in _IRREGULAR or low.endswith(("ss", "'s", "’s")):
        return word
    if low in _IRREGULAR:
        return cased(_IRREGULAR[low], word)
    if low.endswith("ies") and len(low) > 4:
        return word[:-3] + "y"
    return word[:-2] if low.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")) else word[:-1]


def singular_verb(word: str) -> str:
    """The verb as `he` has it: work -> works, are -> is, try -> tries; a past form or a modal as it is."""
    low = word.lower()
    if low in _SINGULAR:
        return cased(_SINGULAR[low], word)
    if low in ADVERBS or low in _FIXED or low in _FUNCTION or not low.isalpha() or low.endswith(("ed", "ly")):
        return word
    if low.endswith("y") and low[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if low.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def plural_contraction(after: str) -> str | None:
    """What `'s` of `she's` is for `they`: `'re` or `'ve`, by the word behind it; None where it could be both."""
    if after in _HAS:
        return "ve"
    if after in ADVERBS:  # she's always late, she's always paid
        return None
    return None if after.endswith("ed") and after not in _IS_ADJECTIVE else "re"
