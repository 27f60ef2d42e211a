"""A text as two unit vectors side by side: its words and pieces of words, and what an encoder makes of it.

Both are linear features, so all that the classifier needs of two texts is their inner product, which is also how alike they
are, -1..1: the mean of the two cosines. Words alone mistake other questions of the same form for an agent's, an encoder alone
mistakes others of the same subject; docs/decisions/010-auto.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.curate.likeness.tfidf import COMMON, counts, rarity

F32 = Any  # numpy arrays of float32


@dataclass(frozen=True)
class Lexical:
    """Weights of hashed words and pieces, by their rarity among the texts that the router was fitted on: (1, D) float32."""

    weights: F32

    @classmethod
    def of(cls, texts: Sequence[str]) -> Lexical:
        """Fitted on these texts."""
        return cls(np.maximum(rarity(texts), COMMON))

    def __call__(self, texts: Sequence[str]) -> Any:
        """(N, D) sparse rows of unit length; a text without a word has no entries."""
        import scipy.sparse

        found = scipy.sparse.csr_matrix(counts(texts).multiply(self.weights), dtype=np.float32)
        lengths = np.sqrt(found.multiply(found).sum(axis=1)).A1
        return scipy.sparse.diags(1 / np.where(lengths > 0, lengths, 1)).dot(found).tocsr()


@dataclass(frozen=True)
class Dense:
    """How an encoder's vectors are spread over the texts of the fit: what all have in common tells nothing. (1, D) each."""

    mean: F32
    scale: F32

    @classmethod
    def of(cls, vectors: F32) -> Dense:
        """Fitted on these (N, D) vectors."""
        return cls(vectors.mean(axis=0, keepdims=True), 1 / np.maximum(vectors.std(axis=0, keepdims=True), 1e-6))

    def __call__(self, vectors: F32) -> F32:
        """(N, D) rows of unit length."""
        spread = (vectors - self.mean) * self.scale
        return spread / np.maximum(np.linalg.norm(spread, axis=1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class Features:
    """Of N texts: sparse words, and an encoder's rows where there is an encoder."""

    words: Any
    dense: F32 | None = None

    def likeness(self, others: Features) -> F32:
        """(N, M): how alike each of these is to each of the others."""
        found = np.asarray((self.words @ others.words.T).todense(), dtype=np.float32)
        if self.dense is None or others.dense is None:
            return found
        return (found + self.dense @ others.dense.T) / 2
