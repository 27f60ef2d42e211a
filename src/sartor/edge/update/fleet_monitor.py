"""Halts or widens a rollout by device reports.

A vote counts if it is signed by the key that is enrolled for its device, `DEVICES/ID.pub`, if the version was offered to that
device, and if it is that device's newest on this version. What does not count is counted by why. The fraction of failures has a
Wilson interval (1927): halted is what fails in more than `halt_above` of the devices even at its lower end, widened what fails
in fewer than `widen_below` even at its upper end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sartor.core import signing
from sartor.core.errors import ArtifactError, ConfigError, SartorError, SignatureError
from sartor.edge.update import device_reports
from sartor.edge.update import repository as publish
from sartor.edge.update.device_reports import MOST_BYTES, Report
from sartor.edge.update.tuf_roles import Documents
from sartor.edge.update.version_metadata import Offer, ring_of

Action = Literal["halt", "widen", "wait", "done", "halted"]
# A device's clock may be this far from the publisher's
_CLOCK_S = 86_400


@dataclass(frozen=True)
class FleetPolicy:
    """When to act. Fractions 0..1 of the devices that report; `rings`: percents that a version is widened to, in turn."""

    least_reports: int = 5
    halt_above: float = 0.05
    widen_below: float = 0.25
    confidence: float = 0.95
    rings: tuple[int, ...] = (10, 25, 50, 100)

    def __post_init__(self) -> None:
        if not (self.least_reports >= 1 and 0 <= self.halt_above < 1 and 0 < self.widen_below <= 1):
            raise ConfigError(f"a rule for a fleet is out of range: {self}", "--least-reports 5 --halt-above 0.05")
        if not 0 < self.confidence < 1 or not all(0 < ring <= 100 for ring in self.rings):
            raise ConfigError(f"a rule for a fleet is out of range: {self}", "--confidence 0.95, --rings 10,25,50,100")


@dataclass(frozen=True)
class RolloutTally:
    """What is known of one version. `low`, `high`: of the fraction of failures. `to`: the percent that it is widened to."""

    name: str
    version: str
    percent: int
    passed: int
    failed: int
    low: float
    high: float
    action: Action
    to: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As the command says it."""
        return {**asdict(self), "low": round(self.low, 4), "high": round(self.high, 4)}


@dataclass(frozen=True)
class Counted:
    """Every version that somebody votes on or may. `refused`: reports that do not count, by why."""

    tallies: tuple[RolloutTally, ...]
    refused: dict[str, int]


def tally(reports: Path | Iterable[bytes], repository: Path, devices: Path, policy: FleetPolicy | None = None) -> Counted:
    """Count reports (a folder of files, or their bytes). `devices`: a folder of public keys, ID.pub. Changes nothing."""
    policy = policy or FleetPolicy()
    documents = Documents.open(repository / "metadata")
    offers = {
        (name, offer.version): offer for name in publish.names_of(documents) for offer in publish.offers_of(documents, name)
    }
    refused: Counter[str] = Counter()
    votes = _votes(_contents(reports) if isinstance(reports, Path) else reports, offers, devices, refused)
    tallies = (_tally_offer(name, offer, votes, policy) for (name, _), offer in sorted(offers.items(), key=_newest_first))
    return Counted(tuple(tallies), dict(sorted(refused.items())))


def watch(repository: Path, keys: Path | None, counted: Counted, *, widen: bool = False) -> list[RolloutTally]:
    """Do what the tallies say: halt, and with `widen` widen. Returns what was done.

    `keys`: of targets, snapshot and timestamp; without them nothing is done. Raises what `repository.halt` raises.
    """
    executed = []
    for item in counted.tallies if keys else ():
        assert keys
        if item.action == "halt":
            publish.halt(repository, keys, item.name, item.version)
        elif item.action == "widen" and widen:
            publish.widen(repository, keys, item.name, item.version, item.to)
        else:
            continue
        executed.append(item)
    return executed


def _newest_first(item: tuple[tuple[str, str], Offer]) -> tuple[str, int]:
    return item[0][0], -item[1].order


def _contents(folder: Path) -> Iterator[bytes]:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "--reports: where the devices' reports are gathered")
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as stream:
                yield stream.read(MOST_BYTES + 1)


def _votes(
    reports: Iterable[bytes], offers: dict[tuple[str, str], Offer], devices: Path, refused: Counter[str]
) -> dict[tuple[str, str, str], Report]:
    """(name, version, device) -> that device's newest report."""
    votes: dict[tuple[str, str, str], Report] = {}
    for content in reports:
        try:
            report, signature = device_reports.read_report(content)
        except ArtifactError:
            refused["malformed"] += 1
            continue
        if reason := _refusal_reason(report, signature, offers, devices):
            refused[reason] += 1
            continue
        key = (report.name, report.version, report.device)
        if (earlier := votes.get(key)) is not None:
            refused["replayed"] += 1  # a copy of it, or what that device said before
        if earlier is None or report.time > earlier.time:
            votes[key] = report
    return votes


def _refusal_reason(report: Report, signature: Any, offers: dict[tuple[str, str], Offer], devices: Path) -> str:
    """Why a report does not count; empty where it does."""
    file = devices / f"{report.device}.pub"
    if not file.is_file():
        return "unknown device"
    try:
        signing.check_signature(report.document(), signature, file, report.device, [signing.open_public(file)])
    except SignatureError:
        return "forged"
    except SartorError:
        return "unknown device"  # what is enrolled is no key
    offer = offers.get((report.name, report.version))
    if offer is None:
        return "unknown version"
    if not offer.published - _CLOCK_S <= report.time <= time.time() + _CLOCK_S:
        return "of another time"
    return "" if report.ring == ring_of(report.device) < offer.percent else "not offered to it"


def _tally_offer(name: str, offer: Offer, votes: dict[tuple[str, str, str], Report], policy: FleetPolicy) -> RolloutTally:
    version_votes = [vote for (vote_name, version, _), vote in votes.items() if (vote_name, version) == (name, offer.version)]
    failed = sum(vote.outcome == "fail" for vote in version_votes)
    low, high = _interval(failed, len(version_votes), policy.confidence)
    action, to = _decide_action(offer, len(version_votes), low, high, policy)
    reasons = dict(sorted(Counter(vote.reason for vote in version_votes if vote.outcome == "fail").items()))
    return RolloutTally(name, offer.version, offer.percent, len(version_votes) - failed, failed, low, high, action, to, reasons)


def _interval(failed: int, count: int, confidence: float) -> tuple[float, float]:
    if not count:
        return 0.0, 1.0
    from scipy.stats import binomtest  # not above: on a small device every command would wait for it

    interval = binomtest(failed, count).proportion_ci(confidence, "wilson")
    return float(interval.low), float(interval.high)


def _decide_action(offer: Offer, count: int, low: float, high: float, policy: FleetPolicy) -> tuple[Action, int]:
    if offer.halted:
        return "halted", 0
    if count >= policy.least_reports and low > policy.halt_above:
        return "halt", 0
    if offer.percent >= 100:
        return "done", 0
    to = next((ring for ring in sorted(policy.rings) if ring > offer.percent), 100)
    return ("widen", to) if count >= policy.least_reports and high < policy.widen_below else ("wait", 0)
