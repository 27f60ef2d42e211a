"""Scorers of one reply: exact match, F1, ROUGE-L and word error rate."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq, Levenshtein

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_APOSTROPHE, _NO_WORD = re.compile("['\u2019]"), re.compile(r"[\W_]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(reply: str, reference: str) -> float:
    r"""1 where both are the same text but for white space at the ends.

    >>> exact_match(' yes\n', 'yes')
    1.0
    """
    return float(reply.strip() == reference.strip())


def f1(reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016).

    Lower case, without punctuation and English articles. Two texts that are both empty then are equal.

    >>> round(f1('the red car', 'a red bus'), 2)
    0.5
    """
    reply_words, reference_words = _words(reply), _words(reference)
    if not reply_words or not reference_words:
        return float(reply_words == reference_words)
    common = sum((Counter(reply_words) & Counter(reference_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(reply_words), common / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    # punctuation parts words in JSON (`"a":"b"`), where SQuAD's plain deletion would glue them together
    spaced = re.sub(r'[{}\[\]":,]', " ", text.lower())
    return _ARTICLES.sub(" ", spaced.translate(_PUNCTUATION)).split()


def rouge_l(reply: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): harmonic mean of precision and recall of the longest common subsequence of words.

    Lower case, letters and digits alone, without stemming. Two texts that are both empty then are equal.

    >>> round(rouge_l('the cat sat', 'the cat was sitting'), 2)
    0.57
    """
    reply_words, reference_words = _spoken_words(reply), _spoken_words(reference)
    if not reply_words or not reference_words:
        return float(reply_words == reference_words)
    return 2 * LCSseq.similarity(reply_words, reference_words) / (len(reply_words) + len(reference_words))


def spoken(text: str) -> str:
    """A text as it is heard: lower case, without punctuation, words parted by one space.

    >>> spoken("Don't stop -- Roll 4, please!")
    'dont stop roll 4 please'
    """
    return " ".join(_spoken_words(text))


def word_errors(reply: str, reference: str) -> tuple[int, int]:
    """(words wrong, words of the reference), of both as they are heard. Their sums' ratio is the word error rate.

    Wrong are words to change, leave out or put in (Levenshtein), as jiwer counts.

    >>> word_errors('stop a line now', 'Stop the line.')
    (2, 3)
    """
    reply_words, reference_words = _spoken_words(reply), _spoken_words(reference)
    return int(Levenshtein.distance(reply_words, reference_words)), len(reference_words)


def _spoken_words(text: str) -> list[str]:
    return _NO_WORD.sub(" ", _APOSTROPHE.sub("", text.lower())).split()


def is_never_decided(reply_so_far: str, reference: str) -> bool:
    """Return False: more words change an overlap of words."""
    return False


def is_mismatch(reply_so_far: str, reference: str) -> bool:
    r"""Return whether no continuation of a reply is the same text as its reference but for white space at the ends.

    >>> is_mismatch(' ye', 'yes'), is_mismatch('yes\n', 'yes'), is_mismatch('yes.', 'yes'), is_mismatch('no', 'yes')
    (False, False, True, True)
    """
    # white space at the end belongs to the text as soon as anything else follows it
    reply, target = reply_so_far.lstrip(), reference.strip()
    return not (target.startswith(reply) or (reply.startswith(target) and not reply[len(target) :].strip()))


@dataclass(frozen=True)
class Scorer:
    """A score of a reply against its reference.

    is_decided: whether no continuation of a reply so far can change the score, so that the reply need not be written on.
    """

    score: Callable[[str, str], float]
    is_decided: Callable[[str, str], bool] = is_never_decided


SCORERS = {"exact_match": Scorer(exact_match, is_mismatch), "f1": Scorer(f1), "rouge_l": Scorer(rouge_l)}
