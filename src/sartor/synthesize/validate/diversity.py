"""Diversity scores, and near-copies of seeds, of held-out rows and within a set.

In all tests, members: (B, n) 0/1, the synthetic rows as they are and under B - 1 permutations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from sartor.core.records import Example
from sartor.curate.dedup import near_duplicates, shingles
from sartor.curate.dedup.pair_scoring import METHODS, rules_for
from sartor.curate.steps.text_duplicates import text_of
from sartor.synthesize.validate.permutation_tests import StatisticResult, finding_of, not_tested
from sartor.synthesize.validate.samples import F32, Pool, SampleSpace
from sartor.synthesize.validate.types import ValidationLimits
from sartor.text.encoders import prompt_text
from sartor.text.example_text import words

_WORDS = 100  # words used of a row, so that a few long rows do not dominate
_BLOCK = 100
_SAMPLE = 100
_GRAMS = 4


def distinct(pool: Pool, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test distinct-2 (Li et al. 2016), the fraction of word pairs that are different ones.

    It is compared with as many rows drawn from both sides. members: (B, n).
    """
    counts = _pairs_of_words([_first_words(row) for row in pool.rows])
    lengths = np.asarray(counts.sum(1)).ravel()
    values = np.empty(len(members))
    for start in range(0, len(members), _BLOCK):
        block = members[start : start + _BLOCK]
        # distinct-2 of a membership m: |{pairs that occur in a member}| / number of pairs in members; counts: (n, V)
        values[start : start + _BLOCK] = ((counts.T @ block.T) > 0).sum(0) / np.maximum(block @ lengths, 1)
    usual = max(float(values[1:].mean()), 1e-9)
    detail = f"{values[0]:.2f} of the pairs of words are different ones; in as many rows of both sides {usual:.2f}"
    return finding_of("distinct", 1 - values / usual, limits.diversity, detail)


def vendi(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the Vendi score of order 2, the effective number of dissimilar rows.

    Friedman and Dieng 2023; Pasarkar and Dieng 2023. It is 1 / the mean squared cosine of two rows, so that all
    permutations cost one product. members: (B, n).
    """
    # with K the (n, n) cosines and m a membership:  1 / score = m^T (K * K) m / (sum m)^2
    squared = space.cosines**2
    values = (np.einsum("bn,bn->b", members @ squared, members) / members.sum(1, dtype=np.float64) ** 2).astype(
        np.float64
    )
    usual = float((1 / values[1:]).mean())
    detail = f"{1 / values[0]:.1f} unlike rows in effect; in as many rows of both sides {usual:.1f}"
    return finding_of("vendi", 1 - 1 / (values * usual), limits.diversity, detail)


def diversity_report(space: SampleSpace, seed: int) -> dict[str, dict[str, float]]:
    """Return diversity figures of each side, from equally many rows.

    They are distinct-1 to 3, self-BLEU and the Vendi score of order 1. No test depends on them.
    """
    rng = np.random.default_rng([seed, 4])
    is_synthetic = space.pool.is_synthetic
    sample_size = min(int(is_synthetic.sum()), int((~is_synthetic).sum()), _SAMPLE)
    result = {}
    for name, side in (("synthetic", is_synthetic), ("real", ~is_synthetic)):
        rows = rng.choice(np.flatnonzero(side), sample_size, replace=False)
        texts = [_first_words(space.pool.rows[row]) for row in rows.tolist()]
        result[name] = {
            "rows": float(sample_size),
            **{f"distinct_{size}": round(_distinct(texts, size), 4) for size in (1, 2, 3)},
            "self_bleu": round(self_bleu(texts), 4),
            "vendi": round(vendi_score(space.vectors[rows]), 2),
        }
    return result


def _first_words(row: Example) -> list[str]:
    return words(f"{prompt_text(row)}\n{row.reply}")[:_WORDS]


def _pairs_of_words(texts: Sequence[Sequence[str]]) -> sparse.csr_matrix:
    """Return (n, V) counts of each pair of words in each text."""
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
    gram_counts = Counter[tuple[str, ...]]()
    for text in texts:
        gram_counts.update(_grams(text, size))
    return len(gram_counts) / max(gram_counts.total(), 1)


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Return the mean BLEU of each text against all others (Zhu et al. 2018), 0..1.

    It is high if texts repeat one another. Runs of up to four words count; from pairs on, 1 is added to hits and total
    (Lin and Och 2004).
    """
    grams = []  # of each text, its runs of 1, 2, ... words
    for text in texts:
        grams.append([_grams(text, size) for size in range(1, _GRAMS + 1)])
    tops = []
    for size in range(_GRAMS):
        tops.append(_tops([text_grams[size] for text_grams in grams]))
    lengths = [len(text) for text in texts]
    scores = [_bleu(index, grams[index], tops, lengths) for index in range(len(texts)) if lengths[index]]
    return sum(scores) / len(scores) if scores else 0.0


def _tops(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Return run of words -> (highest count in a text, index of that text, highest count in another)."""
    result: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for index, text_counts in enumerate(counts):
        for gram, count in text_counts.items():
            max_count, holder, second = result.get(gram, (0, -1, 0))
            result[gram] = (count, index, max_count) if count > max_count else (max_count, holder, max(second, count))
    return result


def _bleu(
    index: int,
    grams: Sequence[Counter[tuple[str, ...]]],
    tops: Sequence[dict[tuple[str, ...], tuple[int, int, int]]],
    lengths: Sequence[int],
) -> float:
    # BLEU = exp(mean_g log p_g + min(0, 1 - r / c)), with p_g the clipped precision of runs of g words,
    # c the length of the text and r the closest length of another one
    logs = []
    for size, top in enumerate(tops):
        hits = 0
        for gram, count in grams[size].items():
            max_count, holder, second = top[gram]
            hits += min(count, second if holder == index else max_count)
        smooth = 1 if size else 0
        if hits + smooth == 0:
            return 0.0
        logs.append(math.log((hits + smooth) / (grams[size].total() + smooth)))
    others = (length for other_index, length in enumerate(lengths) if other_index != index)
    nearest = min(others, key=lambda length: (abs(length - lengths[index]), length), default=0)
    return math.exp(sum(logs) / _GRAMS + min(0.0, 1 - nearest / lengths[index]))


def vendi_score(vectors: F32) -> float:
    """Return the Vendi score of order 1: 1 if all rows are equal, n if all are orthogonal.

    vectors: (n, D) unit vectors.
    """
    # score = exp(-sum_i l_i log l_i), with l_i the eigenvalues of X X^T / n
    values = np.linalg.eigvalsh((vectors @ vectors.T).astype(np.float64) / len(vectors))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


@dataclass(frozen=True)
class CopyPair:
    """Two near-equal rows.

    a, b: positions in a list of rows.
    """

    a: int
    b: int
    score: float
    method: str


def near_copies(rows: Sequence[Example]) -> list[CopyPair]:
    """Return the verified near-duplicate pairs of rows, with the default settings of `near_duplicates`.

    Prompt and reply are compared together.
    """
    shingling = shingles.resolve("words", 0, ())
    rules = rules_for(shingling)
    sketches = shingles.sketch([text_of(row, "both") for row in rows], shingling)
    pairs = near_duplicates.near_duplicates(sketches.shingles, sketches.offsets, sketches.digests, rules).pairs
    pairs = pairs.judged(rules.threshold, rules.contained)
    scores, methods = pairs.score(rules.threshold).tolist(), pairs.method(rules.threshold).tolist()
    return [
        CopyPair(a, b, score, METHODS[method])
        for a, b, score, method in zip(pairs.a.tolist(), pairs.b.tolist(), scores, methods, strict=True)
    ]


def of_seeds(pool: Pool, seeds: Sequence[Example], members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test whether synthetic rows are near-copies of seeds more often than real rows are.

    Real rows may resemble the seeds too, which is no copying. members: (B, n).
    """
    if not seeds:
        return not_tested("copies_of_seeds", limits.copies, "no seeds are known: --seeds DATASET")
    count = pool.count
    copies = np.zeros(count, np.float32)
    for pair in near_copies([*pool.rows, *seeds]):
        if pair.a < count <= pair.b:
            copies[pair.a] = 1
    n_members = members.sum(1, dtype=np.float64)
    rate = (members @ copies) / n_members
    other_rate = (copies.sum() - members @ copies) / (count - n_members)
    detail = f"{rate[0]:.0%} of the synthetic rows are near-copies of a seed; of the real rows {other_rate[0]:.0%}"
    ids = [pool.rows[row].id for row in np.flatnonzero(copies * members[0]).tolist()]
    return finding_of(
        "copies_of_seeds",
        rate - other_rate,
        limit=limits.copies,
        detail=detail,
        rows=ids,
        effect=float(rate[0] - other_rate[0]),
    )


def of_held_out(pool: Pool, pairs: Sequence[CopyPair], members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test whether synthetic rows are near-copies of held-out rows more often than by chance.

    Such copies mean that evaluation rows have leaked. members: (B, n).
    """
    across = _graph(pool, [pair for pair in pairs if pool.units[pair.a] != pool.units[pair.b]])
    copies = ((across @ (1 - members).T) > 0).T * members
    values = (copies.sum(1) / members.sum(1)).astype(np.float64)
    detail = (
        f"{values[0]:.0%} of the synthetic rows are near-copies of a held-out row; chance gives "
        f"{values[1:].mean():.0%}"
    )
    ids = [pool.rows[row].id for row in np.flatnonzero(copies[0]).tolist()]
    return finding_of("copies_of_held_out", values, limit=limits.copies, detail=detail, rows=ids)


def repeated(pool: Pool, pairs: Sequence[CopyPair], members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test whether synthetic rows are near-copies of one another more often than by chance. members: (B, n)."""
    graph = _graph(pool, pairs)
    repeats = ((graph @ members.T) > 0).T * members
    values = (repeats.sum(1) / members.sum(1)).astype(np.float64)
    detail = f"{values[0]:.0%} of the synthetic rows nearly repeat another one; chance gives {values[1:].mean():.0%}"
    ids = [pool.rows[row].id for row in np.flatnonzero(repeats[0]).tolist()]
    return finding_of("repeated", values, limit=limits.copies, detail=detail, rows=ids)


def _graph(pool: Pool, pairs: Sequence[CopyPair]) -> sparse.csr_matrix:
    ends = np.array([(pair.a, pair.b) for pair in pairs], np.int64).reshape(-1, 2)
    rows, columns = np.concatenate([ends, ends[:, ::-1]]).T
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(pool.count, pool.count))
