"""Membership inference by loss threshold.

Yeom et al. 2018 (arXiv:1709.01604) guess by the loss, Watson et al. 2022 (arXiv:2111.08440) by how much lower it is
than a reference model's, which did not see the rows: that takes out rows that are easy for everybody. Judged, after
Carlini et al. 2022 (arXiv:2112.03570), by how many members are found where one in a hundred others is taken for one: a
mean hides the few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import beta, binomtest, norm, rankdata

from sartor.core.errors import ConfigError

FALSE_FRACTION, CONFIDENCE = 0.01, 0.95


@dataclass(frozen=True)
class Membership:
    """How well members were told from others. auc: 0.5 is guessing; auc_low, auc_high: its 95 % interval (DeLong et
    al. 1988).

    found_fraction: of the members, at the threshold above which one in a hundred of the others lies at most; low,
    high: its 95 % interval, in which both the members and the threshold are uncertain. Fewer than 436 others cannot
    say that a threshold takes only one in a hundred, and then low is 0.
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
    """The lower a row's loss, the likelier it was trained on. Raises ConfigError for fewer than two rows on a side."""
    return _judged("threshold", -np.asarray(members, float), -np.asarray(others, float))


def calibrated(
    members: Sequence[float],
    others: Sequence[float],
    reference_members: Sequence[float],
    reference_others: Sequence[float],
) -> Membership:
    """The further a row's loss is below the reference model's, the likelier. Row by row, (N,) and (M,) each."""
    gains = [
        np.asarray(reference, float) - np.asarray(losses, float)
        for reference, losses in ((reference_members, members), (reference_others, others))
    ]
    return _judged("calibrated", *gains)


def _judged(attack: Literal["threshold", "calibrated"], members: np.ndarray, others: np.ndarray) -> Membership:
    """Both: scores, higher for members."""
    count, other_count = len(members), len(others)
    if min(count, other_count) < 2 or not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise ConfigError(
            f"{count} members and {other_count} others; finite losses of two rows a side are the least",
            "split: {eval_fraction: 0.2} in the curation recipe, so that two rows or more are held out",
        )
    auc, half_width = _auc(members, others)
    thresholds = np.sort(others)[
        ::-1
    ]  # at the k-th so many others lie above it; how many do in truth is Beta(k + 1, rest - k)
    allowed, (strict_index, loose_index) = int(FALSE_FRACTION * other_count), _allowed(other_count)
    found_count = int((members > thresholds[allowed]).sum())
    low = _end(int((members > thresholds[strict_index]).sum()), count, "low") if strict_index >= 0 else 0.0
    high = _end(int((members > thresholds[loose_index]).sum()), count, "high") if loose_index < other_count else 1.0
    return Membership(
        attack,
        count,
        other_count,
        auc,
        found_count / count,
        low,
        high,
        max(0.0, auc - half_width),
        min(1.0, auc + half_width),
    )


def _auc(members: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The area, and half of its interval's width by the variance of the placements."""
    count, other_count = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    # of each member the fraction of the others below it, of each of the others that of the members above it
    member_placements = (ranks[:count] - rankdata(members)) / other_count
    other_placements = 1 - (ranks[count:] - rankdata(others)) / count
    deviation = float(np.sqrt(member_placements.var(ddof=1) / count + other_placements.var(ddof=1) / other_count))
    return float(member_placements.mean()), float(norm.ppf((1 + CONFIDENCE) / 2)) * deviation


def _allowed(other_count: int) -> tuple[int, int]:
    """(most others above a threshold that surely takes one in a hundred or fewer, least of one that surely takes
    more).
    """
    counts = np.arange(other_count)
    tail = (
        1 - CONFIDENCE
    ) / 4  # the threshold's part of what is left to chance on either side; the members' is the other
    surely_fewer = beta.ppf(1 - tail, counts + 1, other_count - counts) <= FALSE_FRACTION
    surely_more = beta.ppf(tail, counts + 1, other_count - counts) >= FALSE_FRACTION
    return int(surely_fewer.sum()) - 1, int(other_count - surely_more.sum())


def _end(found_count: int, count: int, side: Literal["low", "high"]) -> float:
    """An end of the members' interval (Clopper & Pearson 1934)."""
    interval = binomtest(found_count, count).proportion_ci((1 + CONFIDENCE) / 2, "exact")
    return float(getattr(interval, side))
