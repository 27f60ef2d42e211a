"""What every agent's part stands on and none changes: the general prompts, and features that are fitted on them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.agents.routing.exemplars import FOLDS, fold, general, shortened
from sartor.agents.routing.features import F32, Dense, Features, Lexical, neighbours


@dataclass(frozen=True)
class Space:
    """Of G general prompts. folds: (G,) by their kind; likeness: (G, G); foreign: (G,) mean likeness to the nearest prompts of
    other folds, which is what a general prompt of a kind that is not on the list would have.
    """

    encoder: str
    lexical: Lexical
    dense: Dense | None
    general: Features
    folds: Any
    likeness: F32
    foreign: F32

    def features(self, texts: Sequence[str], vectors: F32 | None) -> Features:
        """Of N texts; `vectors` are the encoder's (N, D), None for words alone."""
        return Features(self.lexical(texts), self.dense(vectors) if self.dense is not None else None)


def general_texts() -> list[str]:
    """As they are compared, in the order of a Space."""
    return [shortened(prompt.text) for prompts in general().values() for prompt in prompts]


def make(encoder: str, vectors: F32 | None) -> Space:
    """vectors: of `general_texts()` by the encoder, None for words alone."""
    texts = general_texts()
    folds = np.array([fold(kind) for kind, prompts in general().items() for _ in prompts])
    lexical, dense = Lexical.of(texts), Dense.of(vectors) if vectors is not None else None
    found = Features(lexical(texts), dense(vectors) if dense is not None else None)
    likeness = found.likeness(found)
    foreign = np.zeros(len(texts), dtype=np.float32)
    for one in range(FOLDS):
        inside, outside = np.flatnonzero(folds == one), np.flatnonzero(folds != one)
        if len(inside) and len(outside):
            foreign[inside] = neighbours(likeness[np.ix_(inside, outside)])
    return Space(encoder, lexical, dense, found, folds, likeness, foreign)
