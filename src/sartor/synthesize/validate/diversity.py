"""How varied the rows are: distinct pairs of words, self-BLEU, the Vendi score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from sartor.core.records import Example
from sartor.curate.validate.options import Limits
from sartor.curate.validate.sides import Pool
from sartor.curate.validate.space import F32, Space
from sartor.curate.validate.verdicts import Finding, finding_of
from sartor.text.encoders import prompt_text
from sartor.text.example_text import words

_WORDS = 100  # of a row: those of a few long rows would be all there is
_BLOCK = 100
_SAMPLE = 100
_GRAMS = 4


def distinct(pool: Pool, members: F32, limits: Limits) -> Finding:
    """Distinct-2 (Li et al. 2016): different pairs of words over pairs of words, against as many rows drawn from both sides."""
    counts = _pairs_of_words([_said(row) for row in pool.rows])
    lengths = np.asarray(counts.sum(1)).ravel()
    values = np.empty(len(members))
    for start in range(0, len(members), _BLOCK):
        block = members[start : start + _BLOCK]
        values[start : start + _BLOCK] = ((counts.T @ block.T) > 0).sum(0) / np.maximum(block @ lengths, 1)
    usual = max(float(values[1:].mean()), 1e-9)
    detail = f"{values[0]:.2f} of the pairs of words are different ones; in as many rows of both sides {usual:.2f}"
    return finding_of("distinct", 1 - values / usual, limits.diversity, detail)


def vendi(space: Space, members: F32, limits: Limits) -> Finding:
    """The Vendi score of order 2 (Friedman and Dieng 2023; Pasarkar and Dieng 2023): how many unlike rows there are, in effect.

    1 / the mean squared likeness of two rows, so that all permutations cost one product.
    """
    squared = space.cosines**2
    values = (np.einsum("bn,bn->b", members @ squared, members) / members.sum(1, dtype=np.float64) ** 2).astype(np.float64)
    usual = float((1 / values[1:]).mean())
    detail = f"{1 / values[0]:.1f} unlike rows in effect; in as many rows of both sides {usual:.1f}"
    return finding_of("vendi", 1 - 1 / (values * usual), limits.diversity, detail)


def described(space: Space, seed: int) -> dict[str, dict[str, float]]:
    """Figures of each side, of equally many rows: distinct-1 to 3, self-BLEU, Vendi score of order 1. No test hangs on them."""
    rng = np.random.default_rng([seed, 4])
    own = space.pool.is_synthetic
    most = min(int(own.sum()), int((~own).sum()), _SAMPLE)
    found = {}
    for name, side in (("synthetic", own), ("real", ~own)):
        rows = rng.choice(np.flatnonzero(side), most, replace=False)
        texts = [_said(space.pool.rows[row]) for row in rows.tolist()]
        found[name] = {
            "rows": float(most),
            **{f"distinct_{size}": round(_distinct(texts, size), 4) for size in (1, 2, 3)},
            "self_bleu": round(self_bleu(texts), 4),
            "vendi": round(vendi_score(space.vectors[rows]), 2),
        }
    return found


def _said(row: Example) -> list[str]:
    return words(f"{prompt_text(row)}\n{row.reply}")[:_WORDS]


def _pairs_of_words(texts: Sequence[Sequence[str]]) -> sparse.csr_matrix:
    """(n, V) how often each pair of words stands in each text."""
    known: dict[tuple[str, ...], int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for pair in zip(text, text[1:], strict=False):
            rows.append(row)
            columns.append(known.setdefault(pair, len(known)))
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(texts), max(len(known), 1)))


def _grams(text: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[start : start + size]) for start in range(len(text) - size + 1))


def _distinct(texts: Sequence[Sequence[str]], size: int) -> float:
    all_of_them = Counter[tuple[str, ...]]()
    for text in texts:
        all_of_them.update(_grams(text, size))
    return len(all_of_them) / max(all_of_them.total(), 1)


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU of each text against all others as references (Zhu et al. 2018), 0..1: high where texts repeat one another.

    Up to runs of four words; from pairs on 1 is added to hits and total (Lin and Och 2004).
    """
    grams = [[_grams(text, size) for size in range(1, _GRAMS + 1)] for text in texts]
    tops = [_tops([of[size] for of in grams]) for size in range(_GRAMS)]
    lengths = [len(text) for text in texts]
    scores = [_bleu(place, grams[place], tops, lengths) for place in range(len(texts)) if lengths[place]]
    return sum(scores) / len(scores) if scores else 0.0


def _tops(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """run of words -> (most often in a text, which text, most often in another one)."""
    found: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for place, of in enumerate(counts):
        for gram, count in of.items():
            most, holder, second = found.get(gram, (0, -1, 0))
            found[gram] = (count, place, most) if count > most else (most, holder, max(second, count))
    return found


def _bleu(
    place: int,
    own: Sequence[Counter[tuple[str, ...]]],
    tops: Sequence[dict[tuple[str, ...], tuple[int, int, int]]],
    lengths: Sequence[int],
) -> float:
    logs = []
    for size, top in enumerate(tops):
        hits = 0
        for gram, count in own[size].items():
            most, holder, second = top[gram]
            hits += min(count, second if holder == place else most)
        smooth = 1 if size else 0
        if hits + smooth == 0:
            return 0.0
        logs.append(math.log((hits + smooth) / (own[size].total() + smooth)))
    others = (length for at, length in enumerate(lengths) if at != place)
    nearest = min(others, key=lambda length: (abs(length - lengths[place]), length), default=0)
    return math.exp(sum(logs) / _GRAMS + min(0.0, 1 - nearest / lengths[place]))


def vendi_score(vectors: F32) -> float:
    """exp of the entropy of the eigenvalues of the likeness of (n, D) unit vectors: 1 where all are one, n where all differ."""
    values = np.linalg.eigvalsh((vectors @ vectors.T).astype(np.float64) / len(vectors))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))
