"""Free text: where prompts that ask the same have replies that do not agree.

Prompts are paired by their vectors and verified by their words (`alike.py`), replies compared by equality, numbers, negations,
opposites and ROUGE-L. A row's quality is how far the replies of its like prompts agree with its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.curate.labels.folds import I64
from sartor.text import encoders, equivalence

MOST_NEIGHBOURS = 10
PRIOR = 0.5  # of agreement, as much as half a neighbour says: a lone contradiction weighs less than three
WRONG = 0.5  # quality under which more contradicts a row than agrees


@dataclass(frozen=True)
class Disagreement:
    """Of N rows: `quality` 0..1 (1 where nothing contradicts), `suggested` the row whose reply has most agreement, or -1.

    `compared` rows had a like prompt; `pairs` verified pairs of prompts, `contradicting` those whose replies do not agree.
    """

    quality: NDArray[np.float64]
    suggested: I64
    wrong: NDArray[np.bool_]
    near: dict[int, list[tuple[int, float]]]
    compared: int
    pairs: int
    contradicting: int

    @property
    def estimated_errors(self) -> int:
        """Wrong replies at least: of two that contradict each other one is, of three the odd one."""
        certain = np.flatnonzero(self.wrong)
        return round(sum(0.5 if len(self.near[int(row)]) == 1 else 1.0 for row in certain))


def disagreement(
    prompts: Sequence[str], replies: Sequence[str], vectors: Any, *, likeness: float, agreement: float
) -> Disagreement:
    """Compare the replies of like prompts: a cosine of `likeness` and a share of words of `agreement` at least."""
    asked, said = equivalence.reader(prompts), equivalence.reader(replies)
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    agrees: dict[tuple[int, int], float] = {}
    weights = equivalence.rarities(prompts)
    for a, b, _ in encoders.NearPairs(vectors, likeness, MOST_NEIGHBOURS):
        verdict = equivalence.compare(asked(a), asked(b), weights)
        if verdict.objection or verdict.score < agreement:
            continue
        agrees[a, b] = agrees[b, a] = replies_agree(said(a), said(b))
        near[a].append((b, verdict.score))
        near[b].append((a, verdict.score))
    quality = np.ones(len(prompts))
    suggested = np.full(len(prompts), -1, np.int64)
    for row, found in near.items():
        quality[row] = (PRIOR * 0.5 + sum(agrees[row, other] for other, _ in found)) / (PRIOR + len(found))
        if quality[row] < WRONG:
            # the neighbour that the other neighbours bear out; the nearest where none is
            suggested[row] = max(
                found, key=lambda pair: (sum(agrees.get((pair[0], o), 0.0) for o, _ in found), pair[1], -pair[0])
            )[0]
    contradicting = sum(1 for (a, b), share in agrees.items() if a < b and share < WRONG)
    return Disagreement(quality, suggested, quality < WRONG, near, len(near), len(agrees) // 2, contradicting)


def replies_agree(one: equivalence.Read, other: equivalence.Read) -> float:
    """0..1: how far two replies to the same question agree. Other numbers, a negation or an opposite are a contradiction."""
    from rapidfuzz.distance import LCSseq

    if one.tokens == other.tokens:
        return 1.0
    if not one.tokens or not other.tokens:
        return 0.0
    short, long = sorted((one, other), key=lambda read: len(read.tokens))
    if _contains(long.tokens, short.tokens):
        return 1.0
    if one.numbers and other.numbers and not _is_within(one.numbers, other.numbers):
        return 0.0
    if one.negations % 2 != other.negations % 2 or equivalence.opposite(one, other):
        return 0.0
    common = LCSseq.similarity(one.tokens, other.tokens)
    return 2 * common / (len(one.tokens) + len(other.tokens))


def _contains(tokens: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return f" {' '.join(part)} " in f" {' '.join(tokens)} " and len(part) >= 1 and not any(map(equivalence.is_negation, tokens))


def _is_within(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether all numbers of the shorter are in the longer."""
    short, long = sorted((list(one), list(other)), key=len)
    for number in short:
        if number not in long:
            return False
        long.remove(number)
    return True
