"""Membership inference by loss threshold.

The threshold attack of Yeom et al. 2018 (arXiv:1709.01604) scores a row by its loss. The calibrated attack of Watson
et al. 2022 (arXiv:2111.08440) scores it by how much lower the loss is than that of a reference model, which did not
see the rows. That removes rows that are easy for every model. As in Carlini et al. 2022 (arXiv:2112.03570), the
result is the fraction of members found at a false-positive rate of 1 %: a mean hides the few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import beta, binomtest, norm

from sartor.core.errors import ConfigError
from sartor.core.statistics import area_under_roc

FALSE_FRACTION, CONFIDENCE = 0.01, 0.95


@dataclass(frozen=True)
class Membership:
    """Result of a membership inference attack.

    attack: "threshold" or "calibrated".
    members, others: number of rows that were trained on, and that were not.
    auc: area under the ROC curve; 0.5 is guessing.
    auc_low, auc_high: its 95 % interval (DeLong et al. 1988).
    found_fraction: fraction of members above the threshold that at most 1 % of the others exceed.
    low, high: its 95 % interval, in which both the members and the threshold are uncertain. Fewer than 436 others
    cannot prove that only 1 % exceed a threshold, and then low is 0.
    """

    attack: Literal["threshold", "calibrated"]
    members: int
    others: int
    auc: float
    found_fraction: float
    low: float
    high: float
    auc_low: float = 0.0
    auc_high: float = 1.0

    def __str__(self) -> str:
        return (
            f"membership by {self.attack} loss: AUC {self.auc:.3f} in [{self.auc_low:.3f}, {self.auc_high:.3f}]; "
            f"{self.found_fraction:.1%} of {self.members} members found "
            f"({self.low:.1%} to {self.high:.1%}) where at most 1 % of {self.others} others are taken for members"
        )


def by_threshold(members: Sequence[float], others: Sequence[float]) -> Membership:
    """Return the result of the threshold attack: the lower a row's loss, the likelier it is a member.

    members, others: losses, (N,) and (M,).

    Raises ConfigError for fewer than two rows on a side, or for a loss that is not finite.
    """
    return _judged("threshold", -np.asarray(members, float), -np.asarray(others, float))


def calibrated(
    members: Sequence[float],
    others: Sequence[float],
    reference_members: Sequence[float],
    reference_others: Sequence[float],
) -> Membership:
    """Return the result of the calibrated attack, with score = reference loss - loss.

    members, reference_members: losses row by row, (N,).
    others, reference_others: losses row by row, (M,).

    Raises ConfigError as `by_threshold` does.
    """
    member_gains = np.asarray(reference_members, float) - np.asarray(members, float)
    other_gains = np.asarray(reference_others, float) - np.asarray(others, float)
    return _judged("calibrated", member_gains, other_gains)


def _judged(attack: Literal["threshold", "calibrated"], members: np.ndarray, others: np.ndarray) -> Membership:
    """Return the result for the scores of members, (N,), and others, (M,), higher for members."""
    count, other_count = len(members), len(others)
    if min(count, other_count) < 2 or not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise ConfigError(
            f"{count} members and {other_count} others; finite losses of two rows a side are the least",
            "split: {eval_fraction: 0.2} in the curation recipe, so that two rows or more are held out",
        )
    auc, deviation = area_under_roc(members, others)
    half_width = float(norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    # k of M others exceed thresholds[k]; the true fraction above it follows Beta(k + 1, M - k)
    thresholds = np.sort(others)[::-1]
    allowed, (strict_index, loose_index) = int(FALSE_FRACTION * other_count), _allowed(other_count)
    found_count = int((members > thresholds[allowed]).sum())
    low = _end(int((members > thresholds[strict_index]).sum()), count, "low") if strict_index >= 0 else 0.0
    high = _end(int((members > thresholds[loose_index]).sum()), count, "high") if loose_index < other_count else 1.0
    return Membership(
        attack,
        members=count,
        others=other_count,
        auc=auc,
        found_fraction=found_count / count,
        low=low,
        high=high,
        auc_low=max(0.0, auc - half_width),
        auc_high=min(1.0, auc + half_width),
    )


def _allowed(other_count: int) -> tuple[int, int]:
    """Return the indices of two thresholds that enclose the true 1 % threshold, of `other_count` others.

    The others are sorted from the highest score down. The first is the loosest that at most 1 % of others exceed with
    confidence; -1 if there is none. The second is the strictest that more than 1 % exceed with confidence;
    `other_count` if there is none.
    """
    counts = np.arange(other_count)
    tail = (
        1 - CONFIDENCE
    ) / 4  # Bonferroni: of the error on either side, half goes to the threshold and half to the members
    surely_fewer = beta.ppf(1 - tail, counts + 1, other_count - counts) <= FALSE_FRACTION
    surely_more = beta.ppf(tail, counts + 1, other_count - counts) >= FALSE_FRACTION
    return int(surely_fewer.sum()) - 1, int(other_count - surely_more.sum())


def _end(found_count: int, count: int, side: Literal["low", "high"]) -> float:
    """Return an end of the interval of the members' fraction (Clopper & Pearson 1934)."""
    interval = binomtest(found_count, count).proportion_ci((1 + CONFIDENCE) / 2, "exact")
    return float(getattr(interval, side))
