"""Lexical and dense features of prompts.

Their scales (rarity, mean, spread) are fitted on general prompts alone, so no agent changes another's features.

Both are linear features, so a classifier needs only the inner product of two texts. It is also their similarity,
-1..1: the mean of the two cosines. Words alone confuse questions of the same form, an encoder alone confuses questions
on the same subject; docs/decisions/010-auto.md has the figures.
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
    """Weights of hashed words and pieces by their rarity among the general prompts, (1, D) float32."""

    weights: F32

    @classmethod
    def of(cls, texts: Sequence[str]) -> Lexical:
        """Return the weights fitted on these texts."""
        return cls(np.maximum(rarity(texts), COMMON))

    def __call__(self, texts: Sequence[str]) -> Any:
        """Return sparse features (N, D) of unit length; the row of a text without words is empty."""
        import scipy.sparse

        rows = scipy.sparse.csr_matrix(counts(texts).multiply(self.weights), dtype=np.float32)
        lengths = np.sqrt(rows.multiply(rows).sum(axis=1)).A1
        return scipy.sparse.diags(1 / np.where(lengths > 0, lengths, 1)).dot(rows).tocsr()


@dataclass(frozen=True)
class Dense:
    """Mean and inverse spread of an encoder's vectors over the general prompts, (1, D) each.

    Standardising by them removes what all prompts have in common.
    """

    mean: F32
    scale: F32

    @classmethod
    def of(cls, vectors: F32) -> Dense:
        """Return the statistics of (N, D) vectors."""
        return cls(vectors.mean(axis=0, keepdims=True), 1 / np.maximum(vectors.std(axis=0, keepdims=True), 1e-6))

    def __call__(self, vectors: F32) -> F32:
        """Return standardised features (N, D) of unit length. vectors: (N, D)."""
        spread = (vectors - self.mean) * self.scale
        return spread / np.maximum(np.linalg.norm(spread, axis=1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class TextFeatures:
    """Features of N texts.

    words: (N, D) sparse.
    dense: (N, E) rows of an encoder, or None without one.
    """

    words: Any
    dense: F32 | None = None

    def likeness(self, others: TextFeatures) -> F32:
        """Return the (N, M) similarities of these texts to the others."""
        result = np.asarray((self.words @ others.words.T).todense(), dtype=np.float32)
        if self.dense is None or others.dense is None:
            return result
        # mean of both cosines: (N, D) (D, M) of words, (N, E) (E, M) of the encoder
        return (result + self.dense @ others.dense.T) / 2

    @property
    def count(self) -> int:
        """Number N of texts."""
        return int(self.words.shape[0])

    def at(self, rows: Any) -> TextFeatures:
        """Return the features of the texts selected by `rows`."""
        return TextFeatures(self.words[rows], self.dense[rows] if self.dense is not None else None)

    def as_arrays(self, name: str) -> dict[str, Any]:
        """Return plain arrays, whose names begin with `name`."""
        words = self.words.tocsr()
        arrays = {"data": words.data, "indices": words.indices, "indptr": words.indptr, "shape": np.array(words.shape)}
        arrays |= {"dense": self.dense} if self.dense is not None else {}
        return {f"{name}_{key}": array for key, array in arrays.items()}

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, Any]) -> TextFeatures:
        """Return the features from the result of `as_arrays`."""
        import scipy.sparse

        parts = tuple(arrays[f"{name}_{key}"] for key in ("data", "indices", "indptr"))
        return cls(scipy.sparse.csr_matrix(parts, tuple(arrays[f"{name}_shape"])), arrays.get(f"{name}_dense"))


def stacked(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Return the features of all parts, concatenated."""
    import scipy.sparse

    dense = [part.dense for part in parts if part.dense is not None]
    words = scipy.sparse.vstack([part.words for part in parts], format="csr")
    return TextFeatures(words, np.vstack(dense) if dense else None)


def neighbours(likeness: F32) -> F32:
    """Return (N,) means of the NEIGHBOURS largest values of each row of (N, M).

    With fewer columns all are used; with none the mean is 0.
    """
    n_largest = min(NEIGHBOURS, likeness.shape[1])
    if not n_largest:
        return np.zeros(len(likeness), dtype=np.float32)
    return np.partition(likeness, likeness.shape[1] - n_largest, axis=1)[:, likeness.shape[1] - n_largest :].mean(
        axis=1
    )


def neighbours_of(likeness: F32, labels: Any, classes: int) -> F32:
    """Return (N, classes) means of the NEIGHBOURS largest values in the columns of each class.

    likeness: (N, M). labels: (M,) class of each column.
    """
    return np.stack([neighbours(likeness[:, labels == label]) for label in range(classes)], axis=1)
