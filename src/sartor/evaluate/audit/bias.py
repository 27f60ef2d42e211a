"""What prompts that differ in a group alone show: how often each group gets an outcome, and whether that is chance. No torch.

A *block* is one prompt about somebody of each group of a kind. The rate of a group stands against the mean rate of the others
in the same blocks, so that merit is the same on both sides. Tested by flipping signs of whole blocks (Fisher 1935), all tests
of a section corrected together (Holm 1979). The ratio is that of the four-fifths rule (29 CFR 1607.4 D): a group's rate over
that of the group with the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

from sartor.core.family import holm
from sartor.evaluate import compare

Array = NDArray[np.float64]
# Fewer blocks say nothing: of 5, all of one sign, there are 32 ways to flip
LEAST_BLOCKS = 8
FLIPS = 9_999


@dataclass(frozen=True)
class Blocks:
    """Of one kind of group: names of groups (G), ids of the rows that blocks were made of (N), chances (2, N, G).

    chances: under base and tuned, how likely the outcome is, 0..1, or whether it was said, 0 or 1.
    """

    kind: str
    outcome: str
    groups: tuple[str, ...]
    ids: tuple[str, ...]
    chances: Array


@dataclass(frozen=True)
class Finding:
    """One group against the others, under the tuned model: rates of the outcome, 0..1, and their gap with its 95 % interval.

    p: two-sided, corrected by Holm over the section. ratio: of the four-fifths rule. base_gap: the same gap under the base;
    added_low, added_high: the interval of what tuning added to it. rows: ids where the group fared worst beside the others.
    """

    kind: str
    group: str
    outcome: str
    blocks: int
    rate: float
    others: float
    gap: tuple[float, float, float]
    ratio: float
    p: float
    base_gap: float
    added: tuple[float, float, float]
    rows: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For the Report; gap and added are [estimate, low, high]."""
        return asdict(self)


def findings(sections: Sequence[Blocks]) -> list[Finding]:
    """Every group of every kind and outcome, corrected together. Kinds with fewer than LEAST_BLOCKS blocks say nothing."""
    told = [found for blocks in sections if len(blocks.ids) >= LEAST_BLOCKS for found in _of_groups(blocks)]
    corrected = holm([p for _, p in told])
    return [Finding(**{**fields, "p": p}) for (fields, _), p in zip(told, corrected, strict=True)]


def _of_groups(blocks: Blocks) -> list[tuple[dict[str, Any], float]]:
    """(fields of a Finding, p) of each group; of two groups the one with the lower rate, since the other is its mirror."""
    rates = blocks.chances[1].mean(0)
    found = []
    for place in range(len(rates)) if len(rates) > 2 else [int(rates.argmin())]:
        base, tuned = (side[:, place] - np.delete(side, place, 1).mean(1) for side in blocks.chances)
        # of base to tuned where both are differences already, so that the comparison is what tuning added
        ids = [str(one) for one in range(len(tuned))]
        gap = compare.paired([0.0] * len(tuned), list(tuned), ids)
        added = compare.paired(list(base), list(tuned), ids)
        fields = {
            "kind": blocks.kind,
            "group": blocks.groups[place],
            "outcome": blocks.outcome,
            "blocks": len(blocks.ids),
            "rate": float(rates[place]),
            "others": float(np.delete(rates, place).mean()),
            "gap": (gap.difference, gap.low, gap.high),
            "ratio": float(rates[place] / rates.max()) if rates.max() > 0 else 1.0,
            "base_gap": float(base.mean()),
            "added": (added.difference, added.low, added.high),
            "rows": _worst(tuned, blocks.ids),
        }
        found.append((fields, flipped(tuned)))
    return found


def flipped(differences: Array) -> float:
    """Two-sided p of a mean of (N,) differences that would be as likely with the other sign."""
    if not differences.any():
        return 1.0
    found = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=FLIPS, vectorized=True, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def _worst(differences: Array, ids: Sequence[str], most: int = 5) -> tuple[str, ...]:
    """Rows where the group's difference is farthest from 0 in the direction of their mean."""
    order = np.argsort(-differences * np.sign(differences.mean() or 1), kind="stable")
    return tuple(ids[place] for place in order[:most] if differences[place])
