"""Scorers: (reply, reference) -> score in 0..1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
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
    said, wanted = _words(reply), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    # punctuation parts words in JSON (`"a":"b"`), where SQuAD's plain deletion would glue them together
    parted = re.sub(r'[{}\[\]":,]', " ", text.lower())
    return _ARTICLES.sub(" ", parted.translate(_PUNCTUATION)).split()


SCORERS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1}
