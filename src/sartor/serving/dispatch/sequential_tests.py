"""Anytime-valid comparison of candidate and live version.

The evidence is an e-process (`core/confidence_sequences.py`), which may be looked at any number of times. The null
hypothesis is "the candidate's rate p_c is at most the live version's rate p_l plus the margin m". Its evidence is the
product of both versions' e-processes at the least favourable pair of rates:

    E = min_q E_c(q + m) E_l(q);  alarm if E >= 1 / alpha_k

Four monitors share FALSE_ALARM, and window k of each spends alpha_k = FALSE_ALARM / 4 / (k (k + 1)), which sums over
all k to FALSE_ALARM / 4. A candidate that is no worse than the margins allow is therefore rolled back, in its whole
trial, with a probability of at most FALSE_ALARM.

Counts and histograms need bounded memory at any traffic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sartor.core.confidence_sequences import FailureRate, log_evidence
from sartor.serving.team_config import Rollout

FALSE_ALARM = 0.05
MONITORS = ("failures", "format", "feedback", "latency")
# Replies of the candidate in one window. Then both versions are counted anew, so that late failures are detected too.
WINDOW_REPLIES = 1000
# Ratio of adjacent buckets of seconds per token, so a latency is known to 5 %
_RATIO = 1.05
_FASTEST_S = 1e-5
# Upper limits of the load classes, in replies in flight. Time per token is compared within a class, since a full
# machine is slow for every version.
_LOADS = (1, 4, 16)
_CLASSES = len(_LOADS) + 1


class Histogram:
    """Histogram of times in logarithmic buckets: at most a few hundred numbers.

    seen: number of times counted.
    """

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.seen = 0

    def count(self, time_s: float) -> None:
        """Add one time."""
        # bucket b holds t_0 r^b <= t < t_0 r^(b+1), so b = floor(log(t / t_0) / log r)
        self._buckets[max(0, math.floor(math.log(max(time_s, _FASTEST_S) / _FASTEST_S) / math.log(_RATIO)))] += 1
        self.seen += 1

    def median_s(self) -> float:
        """Return the lower edge of the median's bucket; 0 if nothing was counted."""
        return self._edge(self._first_where(lambda below: below >= self.seen / 2)) if self.seen else 0.0

    def median_at_most_s(self, alpha: float) -> float:
        """Return a time that the true median exceeds with a probability of at most `alpha`; infinite for too few
        counts.
        """
        return self._edge(self._first_where(lambda below: _is_most(below, self.seen, alpha)) + 1)

    def is_mostly_above(self, time_s: float, alpha: float) -> bool:
        """Return whether the true median is above `time_s`. A wrong True has a probability of at most `alpha`."""
        above = sum(count for bucket, count in self._buckets.items() if self._edge(bucket) >= time_s)
        return _is_most(above, self.seen, alpha)

    def add(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self._buckets += other._buckets
        self.seen += other.seen

    def _first_where(self, holds: Any) -> float:
        """Return the first bucket whose cumulative count satisfies `holds`; infinity if there is none."""
        below = 0
        for bucket in sorted(self._buckets):
            below += self._buckets[bucket]
            if holds(below):
                return bucket
        return math.inf

    def _edge(self, bucket: float) -> float:
        return float(_FASTEST_S * _RATIO**bucket)


@dataclass
class VersionTally:
    """Counts of one version's replies.

    latency: one histogram of seconds per token for each load class.
    """

    failures: FailureRate = field(default_factory=FailureRate)
    format: FailureRate = field(default_factory=FailureRate)
    feedback: FailureRate = field(default_factory=FailureRate)
    latency: tuple[Histogram, ...] = field(default_factory=lambda: tuple(Histogram() for _ in range(_CLASSES)))

    def count_reply(self, *, failed: bool, is_json: bool, token_s: float, in_flight: int) -> None:
        """Count one reply; of a failed one only the failure.

        token_s: seconds per token; 0 for a reply without tokens. in_flight: number of replies that ran at once.
        """
        self.failures.count(failed)
        if failed:
            return
        self.format.count(not is_json)
        if token_s > 0:
            self.latency[sum(in_flight > load for load in _LOADS)].count(token_s)

    def add(self, other: VersionTally) -> None:
        """Add the counts of another tally."""
        for mine, theirs in zip(self._rates(), other._rates(), strict=True):
            mine.seen, mine.bad = mine.seen + theirs.seen, mine.bad + theirs.bad
        for histogram, other_histogram in zip(self.latency, other.latency, strict=True):
            histogram.add(other_histogram)

    def as_json(self) -> dict[str, Any]:
        """Return the counts, for the event log and /health."""
        rates = {
            name: {"seen": rate.seen, "bad": rate.bad} for name, rate in zip(MONITORS, self._rates(), strict=False)
        }
        times = [round(histogram.median_s(), 6) for histogram in self.latency]
        return {**rates, "median_token_s": times}

    def _rates(self) -> tuple[FailureRate, FailureRate, FailureRate]:
        return self.failures, self.format, self.feedback


@dataclass(frozen=True)
class Alarm:
    """Evidence that the candidate is worse: the monitor, the reason as a sentence, and the numbers."""

    monitor: str
    reason: str
    numbers: Mapping[str, Any]


def first_alarm(candidate: VersionTally, live: VersionTally, rules: Rollout, window: int = 1) -> Alarm | None:
    """Return the alarm of the first monitor that finds the candidate worse; None if none does.

    window: number of the trial's window, from 1.
    A live version without replies counts as one that never fails. Without its replies or ratings, format and feedback
    raise no alarm.
    """
    if candidate.failures.seen < rules.least_requests:
        return None
    # sum over k of 1 / (k (k + 1)) = 1, so all windows of all monitors together spend FALSE_ALARM
    alpha = FALSE_ALARM / len(MONITORS) / (window * (window + 1))
    margins = {"failures": rules.error_margin, "format": rules.format_margin, "feedback": rules.feedback_margin}
    for (name, margin), mine, theirs in zip(margins.items(), candidate._rates(), live._rates(), strict=True):
        if not theirs.seen and name == "failures":
            evidence = mine.against(margin) if mine.fraction > margin else 0.0
        else:
            evidence = log_evidence(mine, theirs, margin)
        if evidence >= -math.log(alpha):
            reason = f"{name}: {mine.bad} of {mine.seen} against {theirs.bad} of {theirs.seen} of the live version"
            return Alarm(name, f"{reason}; the margin is {margin}", _numbers(candidate, live, alpha, evidence))
    # Alarm if the candidate's median m_c > f m_l in any load class. Each class spends half of alpha / _CLASSES on an
    # upper limit of the live median m_l and half on a lower limit of m_c.
    for mine_s, theirs_s in zip(candidate.latency, live.latency, strict=True):
        part = alpha / _CLASSES / 2
        limit_s = rules.latency_factor * theirs_s.median_at_most_s(part)
        if mine_s.is_mostly_above(limit_s, part):
            reason = (
                f"latency: {mine_s.median_s():.4g} s per token against {theirs_s.median_s():.4g} s of the live version"
            )
            return Alarm(
                "latency",
                f"{reason}; the limit is {rules.latency_factor} times",
                _numbers(candidate, live, alpha, None),
            )
    return None


def _numbers(candidate: VersionTally, live: VersionTally, alpha: float, evidence: float | None) -> dict[str, Any]:
    fields = {"candidate": candidate.as_json(), "live": live.as_json(), "alpha": alpha}
    return fields if evidence is None else {**fields, "evidence": round(min(evidence, 1e9), 3)}


def _is_most(count: int, total: int, alpha: float) -> bool:
    """Return whether the true fraction is above 1/2, given `count` of `total` observations.

    A wrong True has a probability of at most `alpha`: it needs evidence E(1/2) >= 1 / alpha against the rate 1/2.
    """
    return 2 * count > total and FailureRate(total, count).against(0.5) >= -math.log(alpha)
