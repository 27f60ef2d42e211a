"""Semantic pairs: proposed by the vectors, verified by the words. Texts in, verified pairs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sartor.curate.dedup.graph import components, places_of
from sartor.text import encoders, equivalence

# Replies of so few content words, and JSON, are labels or values: these are equal or not, but never alike.
FEW_WORDS = 3
_ROUNDS = 8


@dataclass(frozen=True)
class Pair:
    """Rows a < b that say the same: `likeness` is their vectors' cosine, `words` the share of words in common (of two fields
    the lower).
    """

    a: int
    b: int
    likeness: float
    words: float


@dataclass
class Found:
    """The verified pairs; how many pairs were near by their vectors, and what the words had against the others, counted.

    `crowded` rows have as many near rows as are looked at, and perhaps more; like ones of those were looked for.
    """

    pairs: list[Pair] = field(default_factory=list)
    candidates: int = 0
    crowded: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rules:
    """`threshold`: cosine of the vectors from which a pair is looked at; `agreement`: share of words in common from which
    it is one; `most`: nearest rows of each row that are looked at.
    """

    threshold: float
    agreement: float
    most: int


class _Verifier:
    """Takes pairs of rows, keeps those that say the same."""

    def __init__(self, texts: Sequence[str], vectors: Any, rules: Rules, replies: Sequence[str] | None) -> None:
        self.found, self.rules = Found(), rules
        self._vectors, self._replies = vectors, replies
        self._read, self._weights = equivalence.reader(texts), equivalence.rarities(texts)
        self._answer = equivalence.reader(replies or ())
        self._answer_weights = equivalence.rarities(replies or ())
        self._tried: set[tuple[int, int]] = set()

    def verify(self, a: int, b: int) -> bool:
        """Whether two rows say the same. Counts a pair once, however often it is asked about."""
        a, b = min(a, b), max(a, b)
        likeness = min(float(self._vectors[a] @ self._vectors[b]), 1.0)
        if (a, b) in self._tried or likeness < self.rules.threshold:
            return False
        self._tried.add((a, b))
        self.found.candidates += 1
        verdict = equivalence.compare(self._read(a), self._read(b), self._weights)
        where = ""
        if self._replies is not None and not verdict.objection and verdict.score >= self.rules.agreement:
            reply = same_reply((self._replies[a], self._replies[b]), self._answer(a), self._answer(b), self._answer_weights)
            where = "" if reply.score >= self.rules.agreement else "reply_"
            verdict = min((verdict, reply), key=lambda one: one.score)
        if verdict.objection or verdict.score < self.rules.agreement:
            self.found.refused[where + (verdict.objection or "words")] += 1
            return False
        self.found.pairs.append(Pair(a, b, likeness, verdict.score))
        return True


def pairs(texts: Sequence[str], vectors: Any, rules: Rules, replies: Sequence[str] | None, rank: Any) -> Found:
    """The pairs of N texts that say the same, by vectors (N, D) and words. With `replies`, theirs must agree as well.

    `rank` (N,) is what the choice of a survivor goes by: of many rows that say the same, more than a row's nearest are looked
    at, so that each is held against the one that stays.
    """
    verifier = _Verifier(texts, vectors, rules, replies)
    near = encoders.NearPairs(vectors, rules.threshold, rules.most)
    for a, b, _ in near:
        verifier.verify(a, b)
    if near.crowded:
        _complete(verifier, len(texts), places_of(rank))
    verifier.found.crowded = near.crowded
    verifier.found.pairs.sort(key=lambda pair: (pair.a, pair.b))
    return verifier.found


def _complete(verifier: _Verifier, count: int, place: Any) -> None:
    """Hold the rows of each connected component against its first-placed row; those that are unlike it, against the next."""
    ends = np.array([(pair.a, pair.b) for pair in verifier.found.pairs], np.int64).reshape(-1, 2)
    labels: Any = components(count, ends[:, 0], ends[:, 1])
    left: dict[int, list[int]] = {}
    for row in np.unique(ends).tolist():
        left.setdefault(int(labels[row]), []).append(row)
    linked = {(pair.a, pair.b) for pair in verifier.found.pairs}
    for rows in left.values():
        rows.sort(key=lambda row: int(place[row]))
        for _ in range(_ROUNDS):
            if len(rows) < 3:
                break
            head = rows[0]
            rows = [
                row for row in rows[1:] if (min(head, row), max(head, row)) not in linked and not verifier.verify(head, row)
            ]


def same_reply(
    texts: tuple[str, str], one: equivalence.Read, other: equivalence.Read, weights: dict[str, float]
) -> equivalence.Verdict:
    """`alike.compare` for replies: values and JSON must be equal, since one letter of them may be another thing."""
    if is_value(texts[0], one) or is_value(texts[1], other):
        return equivalence.Verdict(1.0 if texts[0].split() == texts[1].split() else 0.0)
    return equivalence.compare(one, other, weights)


def is_value(text: str, read: equivalence.Read) -> bool:
    """Whether a reply is a value rather than a sentence."""
    return text.lstrip()[:1] in ("{", "[", "<") or len(read.content({})) <= FEW_WORDS
