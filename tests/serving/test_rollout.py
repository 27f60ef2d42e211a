from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch_fakes import FakeCrew, admit, asked, dispatching, no_fsync, registry, said, team, until, version
from sartor.core.confidence_sequences import FailureRate, log_evidence
from sartor.core.errors import ModelError
from sartor.serving.dispatch.agent_admin import AgentAdmin
from sartor.serving.dispatch.rollout import ObservedReply, Rollouts, RolloutVerdict, in_fraction, is_json
from sartor.serving.dispatch.sequential_tests import (
    FALSE_ALARM,
    MONITORS,
    WINDOW_REPLIES,
    Histogram,
    VersionTally,
    first_alarm,
)
from sartor.serving.registry.registry_schema import Agent
from sartor.serving.team_config import Rollout

__all__ = ["no_fsync"]
RULES = Rollout(least_requests=20, watch_s=100.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def trial(rollouts: Rollouts, **fields: Any) -> None:
    rollouts.follow(Agent("faq", "1"), None)
    rollouts.follow(Agent("faq", "1", candidate="2", canary_fraction=0.5, **fields), Agent("faq", "1"))


def feed(rollouts: Rollouts, version: str, count: int, **seen: Any) -> list[RolloutVerdict]:
    told = [
        rollouts.observe_reply(
            ObservedReply(f"faq@{version}", **{"failed": False, "is_json": True, "token_s": 0.01, **seen})
        )
        for _ in range(count)
    ]
    return [verdict for verdict in told if verdict]


def test_in_fraction_draw_is_stable_and_takes_the_fraction() -> None:
    """A larger fraction keeps the ids of a smaller one; another version draws other ids."""
    ids = [f"{number:x}" for number in range(4000)]
    taken = [id for id in ids if in_fraction(0.1, "faq@2", id)]
    assert taken == [id for id in ids if in_fraction(0.1, "faq@2", id)]
    assert len(taken) == pytest.approx(400, abs=60)
    assert set(taken) <= {
        id for id in ids if in_fraction(0.2, "faq@2", id)
    }  # a canary that grows keeps those that it had
    assert set(taken) != {id for id in ids if in_fraction(0.1, "faq@3", id)}
    assert all(in_fraction(1.0, "x", id) and not in_fraction(0.0, "x", id) for id in ids)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ('{"a": 1}', True),
        (" [1, 2]\n", True),
        ("3", False),
        ('"a"', False),
        ("{", False),
        ('{"a": 1} and more', False),
        ("", False),
        ("[" * 9999, False),
    ],
)
def test_what_counts_as_json(text: str, holds: bool) -> None:
    assert is_json(text) is holds


def test_log_evidence_is_zero_within_margin_and_grows_beyond() -> None:
    """Without any reply of the live version the evidence is zero too."""
    live = FailureRate(1000, 10)
    assert log_evidence(FailureRate(100, 6), live, 0.05) == 0.0
    grown = [log_evidence(FailureRate(100, bad), live, 0.05) for bad in (10, 20, 40, 100)]
    assert grown == sorted(grown) and grown[0] < 3 < grown[1] < 20 < grown[2]
    assert log_evidence(FailureRate(20, 20), FailureRate(0, 0), 0.05) == 0.0  # nothing is known to compare with
    assert FailureRate(5, 5).against(0.0) == math.inf and FailureRate(5, 0).against(1.0) == math.inf


def test_evidence_has_mean_one_at_the_true_rate() -> None:
    """Exactly, by summing over every outcome: the mixture's likelihood over the true one has the mean 1 at each count."""
    for rate in (0.02, 0.3, 0.5):
        for seen in (1, 7, 40):
            mean = sum(
                math.comb(seen, bad)
                * rate**bad
                * (1 - rate) ** (seen - bad)
                * math.exp(FailureRate(seen, bad).against(rate))
                for bad in range(seen + 1)
            )
            assert mean == pytest.approx(1.0)


def simulate(seed: int, candidate: float, live: float, requests: int, slower: float = 1.0) -> int:
    """A canary of a fifth of the requests; after how many of its replies there was an alarm, 0 for none."""
    draw = random.Random(seed)
    mine, theirs = VersionTally(), VersionTally()
    for _ in range(requests):
        is_mine = draw.random() < 0.2
        tally, rate, factor = (mine, candidate, slower) if is_mine else (theirs, live, 1.0)
        time_s, load = draw.lognormvariate(-4, 0.4), draw.choice((1, 3, 9, 30))
        tally.count_reply(
            failed=draw.random() < rate, is_json=draw.random() > rate, token_s=time_s * factor * load, in_flight=load
        )
        if is_mine and first_alarm(mine, theirs, RULES):
            return mine.failures.seen
    return 0


def test_false_alarms_are_as_rare_as_said_at_the_very_margin() -> None:
    """The worst candidate that is allowed: 5 points more failures and broken formats, twice the time; looked at each time."""
    runs = 40
    alarms = sum(bool(simulate(seed, 0.07, 0.02, 300, slower=RULES.latency_factor * 0.95)) for seed in range(runs))
    assert alarms / runs <= FALSE_ALARM


@pytest.mark.services
def test_false_alarms_over_many_simulated_trials() -> None:
    for candidate, live in ((0.05, 0.0), (0.1, 0.05), (0.35, 0.3), (0.02, 0.02)):
        runs = 40
        alarms = sum(bool(simulate(seed, candidate, live, 1000)) for seed in range(runs))
        assert alarms / runs <= FALSE_ALARM, (candidate, live)


def test_a_bad_candidate_is_found_soon() -> None:
    for rate, within in ((1.0, 20), (0.5, 30), (0.25, 120)):
        found = [simulate(seed, rate, 0.01, 2500) for seed in range(12)]
        assert all(found) and sorted(found)[6] <= within, (rate, found)
    slow = [simulate(seed, 0.0, 0.0, 2500, slower=4.0) for seed in range(12)]
    assert all(slow)


def test_each_monitor_finds_what_it_is_for() -> None:
    def tally(**bad: int) -> VersionTally:
        made = VersionTally()
        for number in range(100):
            made.count_reply(
                failed=number < bad.get("failures", 0),
                is_json=number >= bad.get("format", 0),
                token_s=0.01 * bad.get("latency", 1),
                in_flight=1,
            )
            made.feedback.count(number < bad.get("feedback", 0))
        return made

    assert first_alarm(tally(), tally(), RULES) is None
    for monitor, bad in (("failures", 40), ("format", 40), ("feedback", 50), ("latency", 4)):
        found = first_alarm(tally(**{monitor: bad}), tally(), RULES)
        assert found is not None and found.monitor == monitor and monitor in found.reason
        assert first_alarm(tally(**{monitor: bad}), tally(**{monitor: bad}), RULES) is None
        assert first_alarm(tally(), tally(**{monitor: bad}), RULES) is None
    assert set(MONITORS) == {"failures", "format", "feedback", "latency"}
    text = tally(format=100)  # an agent that answers in words is not held to JSON
    assert first_alarm(text, tally(format=100), RULES) is None
    assert first_alarm(tally(failures=10), VersionTally(), RULES) is None
    assert (
        first_alarm(tally(failures=40), VersionTally(), RULES) is not None
    )  # of the live one nothing is known: then it does not fail


def test_time_per_token_is_compared_like_with_like() -> None:
    """A candidate that answers while the machine is full is not slower than a live version that had it for itself."""
    mine, theirs = VersionTally(), VersionTally()
    for _ in range(200):
        theirs.count_reply(failed=False, is_json=True, token_s=0.01, in_flight=1)
        mine.count_reply(failed=False, is_json=True, token_s=0.2, in_flight=40)
    assert first_alarm(mine, theirs, RULES) is None
    for _ in range(200):
        theirs.count_reply(failed=False, is_json=True, token_s=0.02, in_flight=40)
    assert first_alarm(mine, theirs, RULES) is not None


def test_a_histogram_knows_its_median_and_how_well() -> None:
    histogram = Histogram()
    draw = random.Random(0)
    for _ in range(2000):
        histogram.count(draw.lognormvariate(-4, 0.5))
    assert histogram.median_s() == pytest.approx(math.exp(-4), rel=0.08)
    assert math.exp(-4) <= histogram.median_at_most_s(0.01) <= math.exp(-4) * 1.15
    assert histogram.is_mostly_above(math.exp(-4) * 0.8, 0.01) and not histogram.is_mostly_above(math.exp(-4), 0.01)
    for time_s in (0.0, -1.0, 1e9):
        histogram.count(time_s)
    assert Histogram().median_s() == 0.0 and Histogram().median_at_most_s(0.01) == math.inf


def test_trial_has_one_verdict_until_the_registry_answers() -> None:
    """An undecided verdict is given again; the registry's answer ends the trial."""
    rollouts = Rollouts(RULES, Clock())
    trial(rollouts)
    assert not feed(rollouts, "1", 50) and not feed(rollouts, "2", 19, failed=True)
    (verdict,) = feed(rollouts, "2", 5, failed=True)
    assert (verdict.action, verdict.version) == ("roll back", "2") and verdict.numbers["monitor"] == "failures"
    assert verdict.numbers["candidate"]["failures"] == {"seen": 20, "bad": 20}
    assert not feed(rollouts, "2", 30, failed=True)
    rollouts.undecided("faq")  # the disk was full, say
    assert len(feed(rollouts, "2", 5, failed=True)) == 1
    rollouts.follow(Agent("faq", "1"), Agent("faq", "1", candidate="2"))
    assert rollouts.status("faq") == {} and not feed(rollouts, "2", 30, failed=True)


def test_what_goes_wrong_late_is_found_in_its_window() -> None:
    rollouts = Rollouts(RULES, Clock())
    trial(rollouts)
    for _ in range(3 * WINDOW_REPLIES):
        assert not feed(rollouts, "1", 1) and not feed(rollouts, "2", 1)
    for number in range(400):
        feed(rollouts, "1", 1)
        if verdicts := feed(rollouts, "2", 1, failed=number % 3 == 0):
            assert verdicts[0].numbers["window"] == 4 and number < 150
            return
    raise AssertionError("never found")


def test_promoted_version_is_watched_against_its_predecessor() -> None:
    """The watch ends with its time; a rollback is not watched."""
    clock = Clock()
    rollouts = Rollouts(RULES, clock)
    rollouts.follow(Agent("faq", "1"), None)
    feed(rollouts, "1", 100)
    promoted = Agent("faq", "2", earlier=("1",))
    rollouts.follow(promoted, Agent("faq", "1"))
    assert rollouts.status("faq")["kind"] == "watch"
    verdicts = feed(rollouts, "2", 60, is_json=False)
    assert verdicts[0].numbers["monitor"] == "format" and verdicts[0].action == "roll back"
    back = Agent("faq", "1")
    rollouts.follow(back, promoted)  # a rollback is not watched: there is nothing to go back to
    assert rollouts.status("faq") == {}
    rollouts.follow(promoted, back)
    clock.now = 101.0
    assert not feed(rollouts, "2", 60, failed=True) and rollouts.status("faq") == {}
    rollouts.forget("faq")
    assert rollouts.observe_rating("faq@2", True) is None


def test_ratings_and_a_quarantine_send_a_candidate_back() -> None:
    rollouts = Rollouts(replace(RULES, feedback_margin=0.2), Clock())
    trial(rollouts)
    feed(rollouts, "2", 40)
    told = [rollouts.observe_rating("faq@2", True) or rollouts.observe_rating("faq@1", False) for _ in range(40)]
    verdict = next(verdict for verdict in told if verdict)
    assert verdict.numbers["monitor"] == "feedback"
    trial(other := Rollouts(RULES, Clock()))
    assert other.condemn("faq@1", "quarantined") is None
    condemned = other.condemn("faq@2", "quarantined")
    assert condemned is not None and condemned.reason == "quarantined"


def test_canary_without_alarm_is_promoted_after_its_requests() -> None:
    """The team sets canary_requests, the number of replies before the promotion."""
    rollouts = Rollouts(replace(RULES, canary_requests=30), Clock())
    trial(rollouts)
    feed(rollouts, "1", 50)
    (verdict,) = feed(rollouts, "2", 50)
    assert verdict.action == "promote" and "30 replies" in verdict.reason


async def test_failing_canary_is_rolled_back_without_failed_replies(
    tmp_path: Path,
) -> None:
    """The event holds the monitors' numbers; the live version answers each request of the trial."""
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    crew.faults["faq-2"] = ModelError("a logit is not finite", "tune again")
    rules = Rollout(canary_fraction=0.5)
    async with dispatching(team(tmp_path, rollout=rules), crew, made) as dispatch:
        await AgentAdmin(dispatch, crew, admit, rules).promote("faq", "", "2", "1")
        for _ in range(80):
            assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        await until(lambda: not dispatch.served.agents["faq"].candidate)
        event = made.events("faq")[-1]
        assert (event.what, event.who, event.version, event.became["live"]) == (
            "rolled back",
            "monitors",
            "2",
            "1",
        )
        assert event.numbers["candidate"]["failures"]["bad"] >= 20 and "failures" in event.why
        assert made.read().versions["faq@2"].status == "rolled_back"


async def test_a_promoted_version_that_breaks_the_format_goes_back(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    crew.replies = {"faq-1": '{"a": 1}', "faq-2": "I think"}
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        for _ in range(60):
            await said(dispatch, asked("faq"))
        await AgentAdmin(dispatch, crew, admit, Rollout()).promote("faq", "", "2", "1")
        for _ in range(60):
            await said(dispatch, asked("faq"))
        await until(lambda: dispatch.served.agents["faq"].live == "1")
        assert made.events("faq")[-1].numbers["monitor"] == "format"


async def test_a_shadow_is_compared_unseen_and_hurts_no_reply(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    made.start_shadow("faq", "2", 1.0)
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        for number in range(10):
            assert (await said(dispatch, asked("faq", f"question {number}")))[:2] == ("faq@1", "by faq-1")
            await until(lambda: dispatch.shadows.answered == number + 1)
        assert [call.adapter for call in crew.calls] == ["faq-1", "faq-2"] * 10
        assert {call.messages[-1]["content"] for call in crew.calls} == {f"question {number}" for number in range(10)}
        status = dispatch.rollouts.status("faq")
        assert status["replies"] == 10 and status["differing"] == {"seen": 10, "bad": 10}
        crew.faults["faq-2"] = "ModelError"
        for _ in range(40):
            assert (await said(dispatch, asked("faq")))[1] == "by faq-1"
            await asyncio.sleep(0.001)
        await until(lambda: not dispatch.served.agents["faq"].candidate)
        assert made.events("faq")[-1].who == "monitors"


async def test_a_shadow_waits_for_room_and_what_waits_is_bounded(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    crew.rows = 4
    made.start_shadow("faq", "2", 1.0)
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        held = [
            await dispatch.open(asked("base")) for _ in range(2)
        ]  # the crew is busy: more than a quarter of its rows
        for _ in range(40):
            await said(dispatch, asked("faq"))
        assert dispatch.shadows.answered == 0 and dispatch.shadows.left_out == 24
        for answer in held:
            await answer.events.aclose()
        await until(lambda: dispatch.shadows.answered == 16)
