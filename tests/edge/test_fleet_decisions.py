"""How often a fleet is halted or widened wrongly, and how soon a bad version is halted: simulated through the real decisions."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from sartor.edge.update.device_reports import Report
from sartor.edge.update.fleet_monitor import FleetPolicy, RolloutTally, VoteCounts, decide_action, tally_offer
from sartor.edge.update.version_metadata import Offer

POLICY = FleetPolicy()
LEVEL = 1 - POLICY.confidence
DAY_S = 86_400


@functools.cache
def action(passed: int, failed: int, pending: int = 0, percent: int = 10) -> str:
    counts = VoteCounts(passed, failed, pending=pending)
    return decide_action(Offer("1.0", 1, percent, False, 0), counts, counts, POLICY)[0]


def looks_until(wanted: str, seed: int, rate: float, looks: int) -> int:
    """A report comes, and one looks, again and again; after how many `wanted` was decided, 0 for never."""
    draw, failed = random.Random(seed), 0
    for count in range(1, looks + 1):
        failed += draw.random() < rate
        if action(count - failed, failed) == wanted:
            return count
    return 0


@pytest.mark.parametrize(("looks", "runs"), [(100, 1000), (1000, 200)])
@pytest.mark.parametrize(("wanted", "rate"), [("halt", POLICY.halt_above), ("widen", POLICY.widen_below)])
def test_wrong_decisions_stay_within_level(wanted: str, rate: float, looks: int, runs: int) -> None:
    """At the very limit. A Wilson interval that is looked at as often halts 21 % of these fleets within 100 looks, and widens 11 %."""
    wrong = sum(bool(looks_until(wanted, seed, rate, looks)) for seed in range(runs))
    assert wrong / runs <= LEVEL


@pytest.mark.parametrize(("rate", "reports"), [(1.0, 5), (0.5, 18), (0.3, 45), (0.2, 100)])
def test_bad_version_is_halted_within_reports(rate: float, reports: int) -> None:
    """In 95 of 100 fleets; the page has these figures."""
    runs = 400
    halted = [looks_until("halt", seed, rate, reports) for seed in range(runs)]
    assert sum(map(bool, halted)) / runs >= 0.95


@pytest.mark.parametrize(("rate", "reports"), [(0.0, 18), (0.01, 35), (0.05, 75)])
def test_good_version_is_widened_within_reports(rate: float, reports: int) -> None:
    runs = 400
    assert sum(bool(looks_until("widen", seed, rate, reports)) for seed in range(runs)) / runs >= 0.95


@pytest.mark.parametrize(
    ("failed", "count", "expected"),
    [
        (3, 5, "halt"),
        (2, 5, "wait"),
        (14, 100, "halt"),
        (13, 100, "wait"),
        (11, 100, "widen"),
        (12, 100, "wait"),
        (0, 18, "widen"),
        (0, 17, "wait"),
        (4, 4, "wait"),
    ],
)
def test_figures_of_the_page(failed: int, count: int, expected: str) -> None:
    assert action(count - failed, failed) == expected


def test_pending_devices_count_against_either_decision() -> None:
    assert action(0, 5) == "halt" and action(0, 5, pending=95) == "wait"
    assert action(18, 0) == "widen" and action(18, 0, pending=2) == "wait"
    assert action(96, 0, pending=4) == "widen"


# reports that come when devices send them: (start, outcome, when it is reported, or never), in days
Device = tuple[float, str, float]


def first_look(device: Callable[[random.Random], Device], seed: int, *, count: int, days: int, wanted: str) -> int:
    """A fleet of `count` devices, looked at daily; the day on which `wanted` was decided, 0 for never."""
    draw = random.Random(seed)
    devices = [device(draw) for _ in range(count)]
    for day in range(1, days + 1):
        if tally_at(devices, day).action == wanted:
            return day
    return 0


def tally_at(
    devices: list[Device], day: int, offer: Offer | None = None, policy: FleetPolicy = POLICY
) -> RolloutTally:
    votes = {}
    for number, (start, outcome, reported) in enumerate(devices):
        ring = number % (offer.percent if offer else 10)
        if start <= day:
            said, at = (outcome, reported) if reported <= day else ("started", start)
            votes["faq", "1.0", f"box-{number}"] = Report(
                f"box-{number}", "faq", "1.0", ring, said, "", int(at * DAY_S)
            )  # type: ignore[arg-type]
    return tally_offer("faq", offer or Offer("1.0", 1, 10, False, 0), votes, policy, day * DAY_S)


NEVER = 1e9


def slow_to_pass(rate: float, silent: float, draw: random.Random) -> Device:
    """Fails at once, passes within six days, or is never heard of again: as device_reports.py has it."""
    start = draw.uniform(0, 1)
    if draw.random() >= rate:
        return start, "pass", start + draw.uniform(1, 6)
    return start, "fail", NEVER if draw.random() < silent else start


@pytest.mark.parametrize("silent", [0.0, 1.0])
def test_early_failures_do_not_halt_a_good_version(silent: float) -> None:
    """A failure is reported days before a pass. Without the pending devices 73 % of the fleets that do so would be halted."""
    device = functools.partial(slow_to_pass, POLICY.halt_above, silent)
    runs = 60
    wrong = sum(bool(first_look(device, seed, count=150, days=12, wanted="halt")) for seed in range(runs))
    assert wrong / runs <= LEVEL


def test_late_silence_does_not_widen_a_bad_version() -> None:
    """A fourth falls silent, which shows after seven days. Without the pending devices every one of these would be widened."""
    device = functools.partial(slow_to_pass, POLICY.widen_below, 1.0)
    runs = 60
    wrong = sum(bool(first_look(device, seed, count=150, days=12, wanted="widen")) for seed in range(runs))
    assert wrong / runs <= LEVEL


def test_trials_that_a_newer_version_ends_do_not_halt_a_good_version() -> None:
    """Failures came at once; the others' trials ended with no outcome. Without them every one of these would be halted."""
    devices: list[Device] = [(0.0, "fail" if number < 5 else "deferred", 0.5) for number in range(495)]
    found = tally_at(devices, 1)
    assert (found.action, found.failed, found.votes.pending) == ("wait", 5, 490)


def test_devices_that_could_not_check_do_not_widen_a_version() -> None:
    devices: list[Device] = [(0.0, "pass" if number < 20 else "deferred", 0.5) for number in range(80)]
    assert tally_at(devices, 1).action == "wait"


def test_silent_devices_halt_a_version_after_the_deadline() -> None:
    """Half of the devices are never heard of again: nothing else would tell."""
    devices = [(0.0, "pass", NEVER if number % 2 else 0.5) for number in range(30)]
    assert [tally_at(devices, day).action for day in (1, 7, 8)] == ["wait", "wait", "halt"]
    last = tally_at(devices, 8)
    assert (last.passed, last.failed, last.votes.silent, last.votes.pending, last.reasons) == (
        15,
        15,
        15,
        0,
        {"silent": 15},
    )
    assert tally_at(devices, 8, policy=FleetPolicy(silent_after_days=10)).action == "wait"
    never = tally_at(devices, 365, policy=FleetPolicy(silent_after_days=0))
    assert (never.action, never.failed, never.votes.pending) == ("wait", 0, 15)


def test_each_ring_is_widened_by_its_own_devices() -> None:
    """A look that follows a widening at once has nothing new to go by."""
    devices: list[Device] = [(0.0, "pass", 0.5)] * 25
    first = tally_at(devices, 1, Offer("1.0", 1, 10, False, 0))
    assert (first.action, first.to, first.ring.passed) == ("widen", 25, 25)
    second = tally_at(devices, 1, Offer("1.0", 1, 25, False, 0, previous_percent=10))
    assert (second.action, second.passed, second.ring.passed) == ("wait", 25, 15)
    assert tally_at([*devices, *devices], 1, Offer("1.0", 1, 25, False, 0, previous_percent=10)).action == "widen"


@pytest.mark.parametrize("bad_from", [0, 10, 25])
def test_rings_together_stay_within_level(bad_from: int) -> None:
    """A version that is bad from one ring on, looked at after each report: its many passes from before widen nothing more."""
    runs, wrong = 200, 0
    for seed in range(runs):
        draw, offer, counts = random.Random(seed), Offer("1.0", 1, 10, False, 0), VoteCounts()
        while offer.percent < 100 and offer.previous_percent <= bad_from:
            offer, counts, was_added = after_ring(
                draw, offer, counts, POLICY.widen_below if offer.percent > bad_from else 0.0
            )
            wrong += was_added and offer.previous_percent > bad_from
            if not was_added:
                break
    assert wrong / runs <= LEVEL


def after_ring(draw: random.Random, offer: Offer, counts: VoteCounts, rate: float) -> tuple[Offer, VoteCounts, bool]:
    """Up to 200 reports of the newest ring; whether the next one was added."""
    ring = VoteCounts()
    policy = replace(POLICY, halt_above=0.99)  # what is widened wrongly is asked, not what is halted before
    for _ in range(200):
        bad = draw.random() < rate
        counts = VoteCounts(counts.passed + (not bad), counts.failed + bad)
        ring = VoteCounts(ring.passed + (not bad), ring.failed + bad)
        step, percent = decide_action(offer, counts, ring, policy)
        if step == "widen":
            return replace(offer, percent=percent, previous_percent=offer.percent), counts, True
    return offer, counts, False
