"""Time left of a run, on a simulated clock: evaluations, a kill at 40 %, a slow first update, a limit of minutes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sartor.tune.remaining_time import LEAST_UPDATES, RemainingTime

UPDATES, TOKENS = 200, 100
START_S, FIRST_S, UPDATE_S = 12.0, 9.0, 1.0


@dataclass
class SimulatedRun:
    """A run whose every duration is known.

    evaluation_s: of each evaluation, at equal distances and at the end.
    forecast_tokens: tokens of an evaluation as the run states them.
    """

    evaluations: int = 2
    evaluation_s: float = 30.0
    forecast_tokens: float = 0.0
    limit_s: float | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0
    done: int = 0

    def process(self, until: float = 1.0) -> Iterator[tuple[float, float | None, float]]:
        """Yield (fraction, seconds left as foreseen, clock) after each update of one process."""
        clock = RemainingTime(self.forecast_tokens, self.limit_s, list(self.lines))
        points = [(index + 1) / self.evaluations for index in range(self.evaluations)]
        points = [point for point in points if point > self.done / UPDATES]
        self.wall_s += START_S
        first = self.done
        while self.done < UPDATES * until:
            self.wall_s += FIRST_S if self.done == first else UPDATE_S
            self.done += 1
            fraction = self.done / UPDATES
            clock.observe_update(fraction, self.done * TOKENS, self.wall_s)
            self.lines.append({"wall_s": self.wall_s, "update": self.done, "loss": 1.0})
            yield fraction, clock.seconds(len(points)), self.wall_s
            if points and fraction >= points[0]:
                points.pop(0)
                self.wall_s += self.evaluation_s
                clock.observe_evaluation(self.evaluation_s)
                self.lines.append({"wall_s": self.wall_s, "update": self.done, "eval_loss": 1.0})


def at(steps: list[tuple[float, float | None, float]], fraction: float) -> tuple[float, float]:
    """Seconds left as foreseen at a fraction, and the clock then."""
    left_s, clock = next((left_s, clock) for reached, left_s, clock in steps if reached >= fraction)
    assert left_s is not None
    return left_s, clock


@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_left_is_right_within_a_tenth_after_a_kill(evaluations: int) -> None:
    """At 25 % by the forecast of the evaluations, at 50 and 75 % of the resumed run by what was measured."""
    update_tokens = 100
    forecast_tokens = 30.0 / UPDATE_S * update_tokens / 0.4  # an evaluation costs 30 updates' seconds
    run = SimulatedRun(evaluations=evaluations, forecast_tokens=forecast_tokens)
    before = list(run.process(until=0.4))
    left_s, _ = at(before, 0.25)
    # of the work alone: the start of a second process could not be foreseen
    coming = evaluations - len([line for line in run.lines if "eval_loss" in line and line["update"] < 0.25 * UPDATES])
    assert left_s == pytest.approx(0.75 * UPDATES * UPDATE_S + coming * 30.0, rel=0.1)
    after = list(run.process())
    for fraction in (0.5, 0.75):
        left_s, clock = at(after, fraction)
        assert left_s == pytest.approx(run.wall_s - clock, rel=0.1), fraction


def test_evaluation_forecast_wrongly_is_known_once_measured() -> None:
    run = SimulatedRun(evaluations=2, evaluation_s=90.0, forecast_tokens=0.0)
    list(run.process(until=0.6))
    after = list(run.process())
    left_s, clock = at(after, 0.65)
    assert left_s == pytest.approx(run.wall_s - clock, rel=0.05)


def test_nothing_is_said_before_the_pace_is_known() -> None:
    """The first update takes nine times as long as the others, and no page may be told so."""
    steps = list(SimulatedRun(forecast_tokens=7500.0).process())
    assert [left_s for _, left_s, _ in steps[: LEAST_UPDATES - 1]] == [None] * (LEAST_UPDATES - 1)
    for fraction, left_s, clock in steps[LEAST_UPDATES - 1 : 60]:
        assert left_s == pytest.approx(steps[-1][2] + 30.0 - clock, rel=0.1), fraction
    assert steps[-1][1] == pytest.approx(30.0)  # the last evaluation comes after the last update


def test_later_updates_count_more_than_earlier_ones() -> None:
    """The first epoch stores activations and is slower; the second half of the updates gives the pace."""
    clock = RemainingTime(0.0, None, [])
    wall_s = 0.0
    for update in range(1, 81):
        wall_s += 4.0 if update <= 30 else 1.0
        clock.observe_update(update / 100, update * TOKENS, wall_s)
    assert clock.seconds(0) == pytest.approx(20.0)


def test_limit_of_minutes_ends_the_run_whatever_its_pace() -> None:
    clock = RemainingTime(0.0, 60.0, [])
    for update in range(1, 11):
        clock.observe_update(update / 1000, update * TOKENS, float(update))
    assert clock.seconds(0) == pytest.approx(50.0)
    clock.observe_evaluation(5.0)
    assert clock.seconds(1) == pytest.approx(55.0)
