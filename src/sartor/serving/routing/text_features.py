"""Lexical and dense features of prompts.

What both are measured by (rarity, mean, spread) is fitted on general prompts alone, so that no agent changes
another's.

Both are linear features, so all that the classifier needs of two texts is their inner product, which is also how alike
they
are, -1..1: the mean of the two cosines. Words alone mistake other questions of the same form for an agent's, an
encoder alone mistakes others of the same subject; docs/decisions/010-auto.md has the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.text.encoders import COMMON, counts, rarity

F32 = Any  # numpy arrays of float32
NEIGHBOURS = 3


@dataclass(frozen=True)
class Lexical:
    """Weights of hashed words and pieces, by their rarity among the general prompts: (1, D) float32."""

    weights: F32

    @classmethod
    def of(cls, texts: Sequence[str]) -> Lexical:
        """Fitted on these texts."""
        return cls(np.maximum(rarity(texts), COMMON))

    def __call__(self, texts: Sequence[str]) -> Any:
        """(N, D) sparse rows of unit length; a text without a word has no entries."""
        import scipy.sparse

        rows = scipy.sparse.csr_matrix(counts(texts).multiply(self.weights), dtype=np.float32)
        lengths = np.sqrt(rows.multiply(rows).sum(axis=1)).A1
        return scipy.sparse.diags(1 / np.where(lengths > 0, lengths, 1)).dot(rows).tocsr()


@dataclass(frozen=True)
class Dense:
    """How an encoder's vectors are spread over the general prompts: what all have in common tells nothing. (1, D)
    each.
    """

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
class TextFeatures:
    """Of N texts: sparse words, and an encoder's rows where there is an encoder."""

    words: Any
    dense: F32 | None = None

    def likeness(self, others: TextFeatures) -> F32:
        """(N, M): how alike each of these is to each of the others."""
        result = np.asarray((self.words @ others.words.T).todense(), dtype=np.float32)
        if self.dense is None or others.dense is None:
            return result
        return (result + self.dense @ others.dense.T) / 2

    @property
    def count(self) -> int:
        """N."""
        return int(self.words.shape[0])

    def at(self, rows: Any) -> TextFeatures:
        """Of some of the texts."""
        return TextFeatures(self.words[rows], self.dense[rows] if self.dense is not None else None)

    def as_arrays(self, name: str) -> dict[str, Any]:
        """Plain arrays whose names begin with `name`."""
        words = self.words.tocsr()
        arrays = {"data": words.data, "indices": words.indices, "indptr": words.indptr, "shape": np.array(words.shape)}
        arrays |= {"dense": self.dense} if self.dense is not None else {}
        return {f"{name}_{key}": array for key, array in arrays.items()}

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, Any]) -> TextFeatures:
        """What `as_arrays` told of."""
        import scipy.sparse

        parts = tuple(arrays[f"{name}_{key}"] for key in ("data", "indices", "indptr"))
        return cls(scipy.sparse.csr_matrix(parts, tuple(arrays[f"{name}_shape"])), arrays.get(f"{name}_dense"))


def stacked(parts: Sequence[TextFeatures]) -> TextFeatures:
    """One below the other."""
    import scipy.sparse

    dense = [part.dense for part in parts if part.dense is not None]
    words = scipy.sparse.vstack([part.words for part in parts], format="csr")
    return TextFeatures(words, np.vstack(dense) if dense else None)


def neighbours(likeness: F32) -> F32:
    """(N,): mean of the NEIGHBOURS largest of each row of (N, M), or of as many as there are."""
    n_largest = min(NEIGHBOURS, likeness.shape[1])
    if not n_largest:
        return np.zeros(len(likeness), dtype=np.float32)
    return np.partition(likeness, likeness.shape[1] - n_largest, axis=1)[:, likeness.shape[1] - n_largest :].mean(
        axis=1
    )


def neighbours_of(likeness: F32, labels: Any, classes: int) -> F32:
    """(N, classes): the same over the columns of each class; labels: (M,)."""
    return np.stack([neighbours(likeness[:, labels == label]) for label in range(classes)], axis=1)
