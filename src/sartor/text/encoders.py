"""`tfidf`: the encoder that needs no model. Words and pieces of words, hashed, weighted by rarity, turned to 256 dimensions.

It knows what texts share, not what they mean. It is fitted on the texts at hand, so vectors of two calls do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sartor.core.errors import need

BITS = 16  # 2^16 columns for words, as many for pieces of words
WIDTH = 256
FITTED = 20_000  # texts that the turning is fitted on; more would not change it
COMMON = 0.2  # the least weight of a column: texts of common words alone are compared by these
CHUNK = 10_000
MOST_CHARACTERS = 20_000  # of a text
_STOPS = re.compile(r"[.,;:!?\"'()\[\]{}\u2010-\u2027\u3001\u3002\uff01\uff0c\uff1f\u0964\u060c\u061f]+")


class Tfidf:
    """Latent semantic analysis (Deerwester et al. 1990) by a seeded randomised SVD (Halko et al. 2011)."""

    name = "tfidf"
    tokens = 0

    def __init__(self) -> None:
        self._cut = 0

    @property
    def cut(self) -> int:
        """See Encoder."""
        return self._cut

    def encode(self, texts: Sequence[str]) -> Any:
        """See Encoder. Up to WIDTH texts keep their exact cosines."""
        self._cut = sum(len(text) > MOST_CHARACTERS for text in texts)
        if not texts:
            return np.zeros((0, 1), dtype=np.float32)
        weights = np.maximum(rarity(texts), COMMON)
        if len(texts) <= WIDTH:
            vectors = _exact(counts(texts).multiply(weights).tocsr())
        else:
            turn = _fitted(texts, weights)
            vectors = np.vstack([(counts(chunk).multiply(weights).tocsr() @ turn) for chunk in chunks(texts)])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(lengths > 1e-6, lengths, 1)).astype(np.float32)


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts, CHUNK at a time: what bounds the memory."""
    for start in range(0, len(texts), CHUNK):
        yield texts[start : start + CHUNK]


def counts(texts: Sequence[str]) -> Any:
    """Damped counts (1 + log n) of hashed words, pairs of words and pieces of 2 to 5 characters: a sparse float32 matrix."""
    sparse, words, pieces = _parts()
    cut = [_STOPS.sub(" ", text[:MOST_CHARACTERS]) for text in texts]
    found = sparse.hstack([words.transform(cut), pieces.transform(cut)], format="csr", dtype=np.float32)
    found.data = 1 + np.log(found.data)
    return found


def _parts() -> tuple[Any, Any, Any]:
    try:
        import scipy.sparse
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise need("scikit-learn") from None
    shared = {"n_features": 1 << BITS, "norm": None, "alternate_sign": False, "dtype": np.float32}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **shared)
    return scipy.sparse, words, HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **shared)


def rarity(texts: Sequence[str]) -> Any:
    """The (1, D) weight of each column: log((1 + N) / (1 + texts that have it)); 0 for what every text has."""
    having = np.zeros(2 << BITS, dtype=np.int64)
    for chunk in chunks(texts):
        having += np.bincount(counts(chunk).indices, minlength=2 << BITS)
    return np.log((1 + len(texts)) / (1 + having)).astype(np.float32)[None, :]


def _fitted(texts: Sequence[str], weights: Any) -> Any:
    from sklearn.utils.extmath import randomized_svd

    rows = np.random.default_rng(0).choice(len(texts), min(len(texts), FITTED), replace=False)
    sample = counts([texts[row] for row in np.sort(rows)]).multiply(weights).tocsr()
    used = np.unique(sample.indices)
    width = min(WIDTH, len(used))
    _, _, right = randomized_svd(_unit(sample[:, used]), width, n_iter=3, random_state=0)
    turn = np.zeros((2 << BITS, width), dtype=np.float32)
    turn[used] = right.T
    return turn


def _exact(rows: Any) -> Any:
    """Dense vectors with the cosines of a few sparse rows: the root of their Gram matrix."""
    values, vectors = np.linalg.eigh((_unit(rows) @ _unit(rows).T).toarray().astype(np.float64))
    return vectors * np.sqrt(np.maximum(values, 0))


def _unit(rows: Any) -> Any:
    from sklearn.preprocessing import normalize

    return normalize(rows)
