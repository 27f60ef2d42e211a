"""Scorers of one reply: exact match, F1, ROUGE-L and word error rate.

In scripts that write no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word.
So the word error rate there is the character error rate, as is usual for them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq, Levenshtein

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_APOSTROPHE, _NO_WORD = re.compile("['\u2019]"), re.compile(r"[\W_]+")
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(reply: str, reference: str) -> float:
    r"""Return 1 if both texts are the same except for white space at the ends, else 0.

    >>> exact_match(' yes\n', 'yes')
    1.0
    """
    return float(reply.strip() == reference.strip())


def f1(reply: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016).

    Texts are compared in lower case, without punctuation of any script (as in MLQA, Lewis et al. 2020) and English
    articles. If nothing is left of both texts, they are compared as they are.

    >>> round(f1('the red car', 'a red bus'), 2), f1('the', 'a'), f1('+', '-'), f1('¿Dónde?', 'dónde')
    (0.5, 0.0, 0.0, 1.0)
    """
    reply_words, reference_words = _words(reply), _words(reference)
    if not reply_words or not reference_words:
        return _wordless_match(reply, reference, reply_words == reference_words)
    common = sum((Counter(reply_words) & Counter(reference_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(reply_words), common / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def _wordless_match(reply: str, reference: str, both_empty: bool) -> float:
    """Return the score of two texts, at least one of which has no word.

    It is 1 if neither has a word and both are the same except for case, else 0.
    """
    return float(both_empty and exact_match(_folded(reply), _folded(reference)))


def _folded(text: str) -> str:
    """Return the text in lower case, composed (NFC): an accent may be a character of its own."""
    return unicodedata.normalize("NFC", text).lower()


def _spaced(text: str) -> str:
    """Return the text with spaces around each character of a script that writes none between words."""
    return _UNSPACED.sub(r" \1 ", text)


def count_words(text: str) -> int:
    """Return the number of words; in scripts without spaces, the number of characters.

    >>> count_words("turn it on"), count_words("你好吗")
    (3, 3)
    """
    return len(_spaced(text).split())


def _words(text: str) -> list[str]:
    """Return the words of a text as F1 compares them: lower case, no punctuation, no English articles."""
    # punctuation separates words in JSON (`"a":"b"`), where SQuAD's plain deletion would join them
    spaced = re.sub(r'[{}\[\]":,]', " ", _spaced(_folded(text)))
    text = spaced.translate(_PUNCTUATION)
    if not text.isascii():
        # asked of each character: a table of all of Unicode would take 0.2 s at import
        text = "".join(letter for letter in text if unicodedata.category(letter)[0] != "P")
    return _ARTICLES.sub(" ", text).split()


def rouge_l(reply: str, reference: str) -> float:
    """Return ROUGE-L (Lin 2004): F1 over the longest common subsequence of words.

    ROUGE-L = 2 LCS / (m + n) for texts of m and n words. Texts are in lower case, letters and digits alone, without
    stemming. If nothing is left of both texts, they are compared as they are.

    >>> round(rouge_l('the cat sat', 'the cat was sitting'), 2)
    0.57
    """
    reply_words, reference_words = _spoken_words(reply), _spoken_words(reference)
    if not reply_words or not reference_words:
        return _wordless_match(reply, reference, reply_words == reference_words)
    return 2 * LCSseq.similarity(reply_words, reference_words) / (len(reply_words) + len(reference_words))


def spoken(text: str) -> str:
    """Return the text as it is spoken: lower case, no punctuation, words separated by one space.

    >>> spoken("Don't stop -- Roll 4, please!")
    'dont stop roll 4 please'
    """
    return " ".join(_spoken_words(text))


def word_errors(reply: str, reference: str) -> tuple[int, int]:
    """Return word errors and reference words, both counted on the texts as spoken.

    The ratio of their sums is the word error rate. Errors are substitutions, deletions and insertions (Levenshtein),
    as jiwer counts.

    >>> word_errors('stop a line now', 'Stop the line.')
    (2, 3)
    """
    reply_words, reference_words = _spoken_words(reply), _spoken_words(reference)
    return int(Levenshtein.distance(reply_words, reference_words)), len(reference_words)


def _spoken_words(text: str) -> list[str]:
    """Return the words of a text as spoken: lower case, letters and digits, without apostrophes."""
    text = _APOSTROPHE.sub("", _folded(text))
    if not text.isascii():
        # the vowel signs of Hindi and other scripts are marks, which belong to their words
        letters = []
        for letter in text:
            is_of_word = letter.isalnum() or unicodedata.category(letter)[0] == "M"
            letters.append(letter if is_of_word else " ")
        return _spaced("".join(letters)).split()
    return _NO_WORD.sub(" ", text).split()


def is_never_decided(reply_so_far: str, reference: str) -> bool:
    """Return False: further words always change an overlap of words."""
    return False


def is_mismatch(reply_so_far: str, reference: str) -> bool:
    r"""Return whether no continuation of a reply can match its reference.

    White space at the ends is ignored, as in `exact_match`.

    >>> is_mismatch(' ye', 'yes'), is_mismatch('yes\n', 'yes'), is_mismatch('yes.', 'yes'), is_mismatch('no', 'yes')
    (False, False, True, True)
    """
    # white space at the end becomes part of the text as soon as anything else follows it
    reply, target = reply_so_far.lstrip(), reference.strip()
    return not (target.startswith(reply) or (reply.startswith(target) and not reply[len(target) :].strip()))


@dataclass(frozen=True)
class Scorer:
    """Score of a reply against its reference.

    is_decided: whether no continuation of a reply so far can change the score, so that the reply may end there.
    """

    score: Callable[[str, str], float]
    is_decided: Callable[[str, str], bool] = is_never_decided


SCORERS = {"exact_match": Scorer(exact_match, is_mismatch), "f1": Scorer(f1), "rouge_l": Scorer(rouge_l)}
