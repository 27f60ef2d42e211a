from __future__ import annotations

import math
import random

import pytest

from sartor.core.confidence_sequences import FailureRate


def test_limits_are_where_the_evidence_reaches_its_level() -> None:
    for seen, bad in ((5, 3), (40, 1), (1000, 78), (12, 12)):
        rate = FailureRate(seen, bad)
        low, high = rate.lower_limit(0.95), rate.upper_limit(0.95)
        assert low < rate.fraction and rate.against(low) == pytest.approx(math.log(20))
        assert high == 1.0 if bad == seen else rate.against(high) == pytest.approx(math.log(20))
    assert (FailureRate().lower_limit(0.95), FailureRate().upper_limit(0.95)) == (0.0, 1.0)
    assert FailureRate(9, 0).lower_limit(0.95) == 0.0


def test_decision_agrees_with_limits() -> None:
    for seen in (1, 7, 30):
        for bad in range(seen + 1):
            rate = FailureRate(seen, bad)
            for limit in (0.0, 0.05, 0.25, 0.6, 1.0):
                assert rate.is_above(limit, 0.9) == (rate.lower_limit(0.9) > limit), (seen, bad, limit)
                assert rate.is_below(limit, 0.9) == (rate.upper_limit(0.9) < limit), (seen, bad, limit)


def test_limits_grow_with_bad_ones() -> None:
    """What a fleet relies on when it counts a device that is pending as the worse, or the better, of its outcomes."""
    for seen in (3, 20, 150):
        rates = [FailureRate(seen, bad) for bad in range(seen + 1)]
        for limits in ([rate.lower_limit(0.95) for rate in rates], [rate.upper_limit(0.95) for rate in rates]):
            assert limits == sorted(limits)


def test_limits_of_all_counts_hold_the_rate_together() -> None:
    missed, runs = 0, 400
    for seed in range(runs):
        draw, rate = random.Random(seed), FailureRate()
        for _ in range(300):
            rate.count(draw.random() < 0.2)
            if rate.is_above(0.2, 0.9) or rate.is_below(0.2, 0.9):
                missed += 1
                break
    assert 0 < missed / runs <= 0.1
