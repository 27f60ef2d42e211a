"""Semantic pairs: proposed by the vectors, verified by the words. Texts in, verified pairs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sartor.curate import alike, neighbours

# Replies of so few content words, and JSON, are labels or values: these are equal or not, but never alike.
FEW_WORDS = 3


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
    """The verified pairs; how many pairs were near by their vectors, and what the words had against the others, counted."""

    pairs: list[Pair] = field(default_factory=list)
    candidates: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rules:
    """`threshold`: cosine of the vectors from which a pair is looked at; `agreement`: share of words in common from which
    it is one; `most`: nearest rows of each row that are looked at.
    """

    threshold: float
    agreement: float
    most: int


def pairs(texts: Sequence[str], vectors: Any, rules: Rules, replies: Sequence[str] | None = None) -> Found:
    """The pairs of N texts that say the same, by vectors (N, D) and words. With `replies`, theirs must agree as well."""
    found = Found()
    read = _reader(texts)
    answer = _reader(replies) if replies is not None else None
    weights = alike.rarities(texts)
    answer_weights = alike.rarities(replies) if replies is not None else {}
    for a, b, likeness in neighbours.pairs_above(vectors, rules.threshold, rules.most):
        found.candidates += 1
        verdict = alike.compare(read(a), read(b), weights)
        said = ""
        if answer is not None and replies is not None and not verdict.objection and verdict.score >= rules.agreement:
            reply = same_reply(replies[a], replies[b], answer(a), answer(b), answer_weights)
            said = "reply_" if reply.objection or reply.score < min(verdict.score, rules.agreement) else ""
            verdict = min((verdict, reply), key=lambda one: one.score)
        if verdict.objection or verdict.score < rules.agreement:
            found.refused[said + (verdict.objection or "words")] += 1
        else:
            found.pairs.append(Pair(a, b, likeness, verdict.score))
    return found


def _reader(texts: Sequence[str]) -> Callable[[int], alike.Read]:
    known: dict[int, alike.Read] = {}

    def read(row: int) -> alike.Read:
        if row not in known:
            known[row] = alike.Read.of(texts[row])
        return known[row]

    return read


def same_reply(text: str, other_text: str, one: alike.Read, other: alike.Read, weights: dict[str, float]) -> alike.Verdict:
    """`alike.compare` for replies: values and JSON must be equal, since one letter of them may be another thing."""
    if is_value(text, one) or is_value(other_text, other):
        return alike.Verdict(1.0 if " ".join(text.split()) == " ".join(other_text.split()) else 0.0)
    return alike.compare(one, other, weights)


def is_value(text: str, read: alike.Read) -> bool:
    """Whether a reply is a value rather than a sentence."""
    return text.lstrip()[:1] in ("{", "[", "<") or len(read.content) <= FEW_WORDS
