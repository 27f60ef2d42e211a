"""Both sides as vectors: one encoder over all rows, likeness of every pair, a kernel, neighbours, topics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sartor.core.records import Example
from sartor.curate.validate.sides import I64, Pool
from sartor.text.encoders import MOST_CHARACTERS, Chosen, prompt_text

F32 = NDArray[np.float32]
_TOPICS = (8, 16, 32)
_ROWS_PER_TOPIC = 8
_DRAWS = 3  # of each: one k-means is a matter of where it began
_DIRECTIONS = 40


@dataclass(frozen=True)
class Encoded:
    """(N, D) unit vectors; in the columns from `replies_at` on stand the replies. cut: texts that were cut."""

    vectors: F32
    replies_at: int
    cut: int


def encoded(chosen: Chosen, some: Sequence[Example]) -> Encoded:
    """What is asked and what is replied as vectors side by side, so that neither drowns.

    A row of one part alone, such as a document, has the other part empty.
    """
    texts = ([prompt_text(row) for row in some], [row.reply[:MOST_CHARACTERS] for row in some])
    parts = [part for part in texts if any(text.strip() for text in part)]
    if not parts:
        return Encoded(np.zeros((len(some), 1), np.float32), 0, 0)
    # read at once, so that the same word is the same in a prompt and in a reply
    read = np.asarray(chosen.encoder.encode([text for part in parts for text in part]), np.float32)
    vectors = np.concatenate(np.split(read, len(parts)), axis=1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    replies_at = read.shape[1] if len(parts) == 2 else 0
    return Encoded(np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32), replies_at, chosen.encoder.cut)


@dataclass(frozen=True)
class Space:
    """n rows of a pool as (n, D) unit vectors. From the column `replies_at` on stand the replies, where it is not 0."""

    pool: Pool
    vectors: F32
    seed: int
    replies_at: int = 0

    @cached_property
    def cosines(self) -> F32:
        """(n, n)."""
        return np.asarray(self.vectors @ self.vectors.T)

    @cached_property
    def kernel(self) -> F32:
        """(n, n) Gaussian kernel, as wide as the median distance of two rows (Gretton et al. 2012, section 8)."""
        squared = np.maximum(2 - 2 * self.cosines, 0)
        above = squared[np.triu_indices(len(squared), 1)]
        width = float(np.median(above[above > 1e-6])) if (above > 1e-6).any() else 1.0
        return np.exp(-squared / width).astype(np.float32)

    @cached_property
    def _order(self) -> I64:
        return self._by_likeness(self.cosines)

    @cached_property
    def _coarse_order(self) -> I64:
        lengths = np.linalg.norm(self._about, axis=1, keepdims=True)
        unit = np.asarray(self._about / np.where(lengths > 0, lengths, 1), np.float32)
        return self._by_likeness(unit @ unit.T)

    def _by_likeness(self, cosines: F32) -> I64:
        """(n, n) rows by likeness to each, rows of its own unit last."""
        likeness = cosines.copy()
        likeness[self.pool.units[:, None] == self.pool.units[None, :]] = -2
        # of equally near ones the order is by a draw: by number all synthetic ones would come first
        shuffled = np.random.default_rng([self.seed, 2]).permutation(len(likeness))
        return shuffled[np.argsort(-likeness[:, shuffled], axis=1, kind="stable")]

    def neighbours(self, count: int, *, coarse: bool = False) -> Any:
        """(n, n) sparse 0/1: row i has a 1 for each of its `count` nearest rows of other units.

        coarse: by what a row is about, as `topics` have it, and not by its single words.
        """
        near = (self._coarse_order if coarse else self._order)[:, :count]
        rows = np.repeat(np.arange(len(near)), near.shape[1])
        return sparse.csr_matrix((np.ones(near.size, np.float32), (rows, near.ravel())), shape=self.cosines.shape)

    @cached_property
    def topics(self) -> list[I64]:
        """(n,) the cluster of each row, by k-means over both sides, coarse to fine and each several times over.

        A drift may be of few topics or of many.
        """
        from sklearn.cluster import KMeans

        counts = [count for count in _TOPICS if count * _ROWS_PER_TOPIC <= len(self.vectors)] or [2]
        draws = [(count, _DRAWS * self.seed + draw) for count in counts for draw in range(_DRAWS)]
        made = (KMeans(count, n_init=1, random_state=seed).fit_predict(self._about) for count, seed in draws)
        return [np.asarray(found, np.int64) for found in made]

    @cached_property
    def _about(self) -> F32:
        """(n, up to _DIRECTIONS) what rows are about: prompt and reply in one, along the directions in which they differ most.

        Latent semantic analysis (Deerwester et al. 1990): in the directions that are left out are the words of single rows.
        """
        said = self.vectors
        if self.replies_at:
            said = said[:, : self.replies_at] + said[:, self.replies_at :]
        centred = said - said.mean(0)
        values, directions = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        kept = slice(-_DIRECTIONS, None)
        return np.asarray(directions[:, kept] * np.sqrt(np.maximum(values[kept], 0)), np.float32)
