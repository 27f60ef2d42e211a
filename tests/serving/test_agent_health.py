"""The circuit breaker as a state machine against a model that keeps everything, and the intensity of restarts."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clock import Clock
from sartor.core.errors import UnavailableError
from sartor.serving.team_config import CircuitBreakerOptions as Rules
from sartor.serving.team_config import WorkerOptions
from sartor.serving.workers.agent_health import CircuitBreaker, Restarts

RULES = Rules(failures=3, window_s=30.0, open_s=10.0, quarantine=2)


class Agreement(RuleBasedStateMachine):
    """What the breaker does, against rules told plainly: a list of failures, and whether one call tries."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker("a@1", RULES, self.clock)
        self.inside: list[bool] = []
        self.failures: list[float] = []
        self.opened_at: float | None = None
        self.closed_at = float("-inf")
        self.relapses = 0
        self.trying = False

    def expected(self) -> str:
        if self.relapses >= RULES.quarantine:
            return "quarantined"
        if self.opened_at is None:
            return "closed"
        return "open" if self.clock.now < self.opened_at + RULES.open_s * 2**self.relapses else "half-open"

    def open(self, relapse: bool) -> None:
        self.relapses = self.relapses + 1 if relapse else 0
        self.opened_at, self.trying, self.failures = self.clock.now, False, []

    @rule(seconds=st.sampled_from([0.5, 4.0, 9.0, 25.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def enter(self) -> None:
        before = self.expected()
        try:
            trial = self.breaker.enter()
        except UnavailableError as error:
            assert before in ("open", "quarantined") or (before == "half-open" and self.trying)
            assert error.remedy
            return
        assert before == "closed" or (before == "half-open" and not self.trying)
        assert trial == (before == "half-open")
        self.trying = self.trying or trial
        self.inside.append(trial)

    @precondition(lambda self: self.inside)
    @rule(place=st.integers(0, 99))
    def succeed(self, place: int) -> None:
        trial = self.inside.pop(place % len(self.inside))
        self.breaker.succeed(trial)
        if trial and self.expected() == "half-open":
            self.opened_at, self.closed_at, self.failures = None, self.clock.now, []

    @precondition(lambda self: self.inside)
    @rule(place=st.integers(0, 99))
    def leave(self, place: int) -> None:
        trial = self.inside.pop(place % len(self.inside))
        self.breaker.leave(trial)
        self.trying = self.trying and not (trial and self.expected() == "half-open")

    @precondition(lambda self: self.inside)
    @rule(place=st.integers(0, 99))
    def fail(self, place: int) -> None:
        trial = self.inside.pop(place % len(self.inside))
        state = self.expected()
        self.breaker.fail("why", trial)
        if state == "half-open" and trial:
            self.open(relapse=True)
        elif state == "closed":
            self.failures = [at for at in [*self.failures, self.clock.now] if self.clock.now - at <= RULES.window_s]
            if len(self.failures) >= RULES.failures:
                self.open(relapse=self.clock.now - self.closed_at <= RULES.window_s)

    @precondition(lambda self: not self.inside)
    @rule()
    def release(self) -> None:
        self.breaker.release()
        self.failures, self.opened_at, self.relapses, self.closed_at = [], None, 0, float("-inf")

    @invariant()
    def agree(self) -> None:
        assert self.breaker.state == self.expected()
        if self.expected() != "half-open":
            self.trying = False


Agreement.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgreement = Agreement.TestCase


def test_open_time_doubles_up_to_sixteen_times() -> None:
    clock = Clock()
    breaker = CircuitBreaker("a@1", Rules(quarantine=99, open_s=1.0, failures=1), clock)
    breaker.fail("first", breaker.enter())
    waits = []
    for _ in range(7):
        began = clock.now
        while breaker.state == "open":
            clock.now += 0.25
        waits.append(clock.now - began)
        breaker.fail("again", breaker.enter())
    assert waits == [1, 2, 4, 8, 16, 16, 16]


def test_quarantine_is_left_by_release_alone() -> None:
    clock = Clock()
    breaker = CircuitBreaker("faq@2", Rules(quarantine=1, failures=1), clock)
    breaker.fail("a logit is not finite", breaker.enter())
    clock.now += 10
    breaker.fail("a logit is not finite", breaker.enter())
    clock.now += 1e9
    with pytest.raises(UnavailableError, match=r"faq@2 is in quarantine.*a logit is not finite") as caught:
        breaker.enter()
    assert "promote or roll back faq" in caught.value.remedy
    breaker.release()
    assert breaker.enter() is False and breaker.is_blank


def test_restarts_wait_longer_and_are_given_up() -> None:
    clock = Clock()
    restarts = Restarts(
        WorkerOptions(backoff_s=0.2, backoff_most_s=1.0, restarts=4, window_s=60.0), clock, draw=lambda: 1.0
    )
    waits = []
    for _ in range(4):
        waits.append(restarts.ended())
        clock.now += 1
    assert waits == [0.2, 0.4, 0.8, 1.0] and not restarts.is_given_up
    assert restarts.ended() == 60.0 - 4 and restarts.is_given_up
    clock.now += 56
    restarts.starting()
    clock.now += 4  # all but the last have left the window
    assert restarts.ended() == 0.4 and not restarts.is_given_up and restarts.count == 6


def test_jitter_takes_at_most_half() -> None:
    rules = WorkerOptions(backoff_s=1.0)
    assert [Restarts(rules, Clock(), draw=lambda: chance).ended() for chance in (0.0, 0.5, 1.0)] == [0.5, 0.75, 1.0]
