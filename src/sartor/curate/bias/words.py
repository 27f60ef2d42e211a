"""What stands beside a group: pointwise mutual information of groups with words and with outcomes, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sartor.core.records import Example
from sartor.curate.bias.membership import Memberships, spoken_of
from sartor.text import equivalence
from sartor.text.demographics import group_terms
from sartor.text.example_text import words

RESAMPLES = 400
FEWEST, MOST_WORDS, SHOWN = 5, 400, 5


@dataclass(frozen=True)
class Beside:
    """A word that rows of a group have, and in how many. pmi: log2 of how much more often than in all rows that name a group,
    with a 95 % interval by bootstrap over rows.
    """

    attribute: str
    group: str
    word: str
    rows: int
    pmi: float
    low: float
    high: float


def beside(rows: Sequence[Example], people: Memberships, seed: int = 0) -> list[dict[str, Any]]:
    """The words that stand beside each group more than beside the others: those that are beyond chance, strongest first.

    Words that name the group are left out: that he is a man is no finding.
    """
    said = [_telling(row) for row in rows]
    found: list[Beside] = []
    for attribute, values in people.items():
        spoken = [place for place, value in enumerate(values) if value is not None]
        counts = Counter(word for place in spoken for word in said[place])
        vocabulary = [word for word, count in counts.most_common(MOST_WORDS) if FEWEST <= count < len(spoken)]
        if not vocabulary:
            continue
        has = np.array([[word in said[place] for word in vocabulary] for place in spoken], np.float32)
        drawn = np.random.default_rng(seed).multinomial(len(spoken), np.full(len(spoken), 1 / len(spoken)), RESAMPLES)
        times = np.concatenate([np.ones((1, len(spoken))), drawn]).astype(np.float32)
        for group in sorted({values[place] or "" for place in spoken}):
            inside = np.array([values[place] == group for place in spoken], np.float32)
            found += _strongest(attribute, group, vocabulary, has, inside, times)
    return [asdict(one) for one in found]


def _strongest(
    attribute: str, group: str, vocabulary: Sequence[str], has: NDArray[Any], inside: NDArray[Any], times: NDArray[Any]
) -> list[Beside]:
    rows = times.shape[1]
    joint, alone, share = times @ (has * inside[:, None]), times @ has, times @ inside
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log2(joint * rows / (alone * share[:, None]))
    again = np.nan_to_num(pmi[1:], neginf=-20, nan=0.0)
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    # named only where even an interval for all words at once (Bonferroni, normal) excludes 0: of 400 words ten would by chance
    sure = pmi[0] - stats.norm.isf(0.025 / len(vocabulary)) * again.std(0)
    together = (has * inside[:, None]).sum(0)
    order = [place for place in np.argsort(-low).tolist() if sure[place] > 0 and together[place] >= FEWEST]
    return [
        Beside(attribute, group, vocabulary[at], int(together[at]), float(pmi[0, at]), float(low[at]), float(high[at]))
        for at in order[:SHOWN]
    ]


def _telling(row: Example) -> frozenset[str]:
    """The words of a row, without those that only join others and those that name a group."""
    text = f"{spoken_of(row)}\n{row.reply}"
    named = {word for kind in group_terms.KINDS for one in group_terms.mentions(text, kind) for word in words(one.text)}
    return frozenset(word for word in words(text) if not word.isdigit()) - named - equivalence.words().function
