"""Anytime-valid comparison of candidate and live version.

The evidence is an e-process (`core/confidence_sequences.py`), at which one may look as often as one likes. The product
of both versions' e-processes, at the pair of rates that suits the candidate best, tests "the candidate's rate is at
most the live version's plus the margin". Four monitors share FALSE_ALARM, and window k of each spends 1/(k(k+1)) of
its part: a candidate that is no worse than the margins allow is sent back, in its whole trial, with a probability of
FALSE_ALARM at most.

Counts and histograms: bounded memory, whatever the traffic.
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
# After so many replies of the candidate both versions are counted anew, so that what goes wrong late is seen too
WINDOW_REPLIES = 1000
# Seconds per token fall into buckets of this ratio, so a latency is known to 5 %
_RATIO = 1.05
_FASTEST_S = 1e-5
# Replies in flight: time per token is compared like with like, since a full machine is slow for every version
_LOADS = (1, 4, 16)
_CLASSES = len(_LOADS) + 1


class Histogram:
    """Times, counted in buckets: at most a few hundred numbers."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.seen = 0

    def count(self, time_s: float) -> None:
        """One more."""
        self._buckets[max(0, math.floor(math.log(max(time_s, _FASTEST_S) / _FASTEST_S) / math.log(_RATIO)))] += 1
        self.seen += 1

    def median_s(self) -> float:
        """The middle one, to the bucket's lower edge; 0 where none was seen."""
        return self._edge(self._first_where(lambda below: below >= self.seen / 2)) if self.seen else 0.0

    def median_at_most_s(self, alpha: float) -> float:
        """A time that the true median exceeds with a probability of at most `alpha`; infinite where too few were
        seen.
        """
        return self._edge(self._first_where(lambda below: _is_most(below, self.seen, alpha)) + 1)

    def is_mostly_above(self, time_s: float, alpha: float) -> bool:
        """Whether the true median is above `time_s`, wrongly said with a probability of at most `alpha`."""
        above = sum(count for bucket, count in self._buckets.items() if self._edge(bucket) >= time_s)
        return _is_most(above, self.seen, alpha)

    def add(self, other: Histogram) -> None:
        """Count what another one has counted."""
        self._buckets += other._buckets
        self.seen += other.seen

    def _first_where(self, holds: Any) -> float:
        """The first bucket up to which so many lie that it `holds`."""
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
    """What was seen of one version. latency: by how full the machine was."""

    failures: FailureRate = field(default_factory=FailureRate)
    format: FailureRate = field(default_factory=FailureRate)
    feedback: FailureRate = field(default_factory=FailureRate)
    latency: tuple[Histogram, ...] = field(default_factory=lambda: tuple(Histogram() for _ in range(_CLASSES)))

    def count_reply(self, *, failed: bool, is_json: bool, token_s: float, in_flight: int) -> None:
        """One more reply; of a failed one nothing else is known. token_s: seconds per token, 0 for a reply without
        any.
        """
        self.failures.count(failed)
        if failed:
            return
        self.format.count(not is_json)
        if token_s > 0:
            self.latency[sum(in_flight > load for load in _LOADS)].count(token_s)

    def add(self, other: VersionTally) -> None:
        """Count what another one has counted."""
        for mine, theirs in zip(self._rates(), other._rates(), strict=True):
            mine.seen, mine.bad = mine.seen + theirs.seen, mine.bad + theirs.bad
        for histogram, other_histogram in zip(self.latency, other.latency, strict=True):
            histogram.add(other_histogram)

    def as_json(self) -> dict[str, Any]:
        """The numbers, for the log of events and /health."""
        rates = {
            name: {"seen": rate.seen, "bad": rate.bad} for name, rate in zip(MONITORS, self._rates(), strict=False)
        }
        times = [round(histogram.median_s(), 6) for histogram in self.latency]
        return {**rates, "median_token_s": times}

    def _rates(self) -> tuple[FailureRate, FailureRate, FailureRate]:
        return self.failures, self.format, self.feedback


@dataclass(frozen=True)
class Alarm:
    """The candidate is worse: by which monitor, in a sentence, and by what numbers."""

    monitor: str
    reason: str
    numbers: Mapping[str, Any]


def first_alarm(candidate: VersionTally, live: VersionTally, rules: Rollout, window: int = 1) -> Alarm | None:
    """The first monitor that says that the candidate is worse, in this window of its trial (1 is the first); None if
    none does.

    A live version of which nothing was seen counts as one that does not fail; its format and its ratings judge nobody.
    """
    if candidate.failures.seen < rules.least_requests:
        return None
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
    """Whether more than half of all, not only of those seen, are so; wrongly said with a probability of at most
    `alpha`.
    """
    return 2 * count > total and FailureRate(total, count).against(0.5) >= -math.log(alpha)
