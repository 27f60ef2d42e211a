"""Halting or widening of a rollout by device reports.

A vote counts if three conditions hold. It is signed by the key that is enrolled for its device, `DEVICES/ID.pub`. The
version was offered to that device. It is the device's newest outcome on this version, else its newest report. Votes
that do not count are counted by reason. A device that reported the start of a version and sent nothing on it for
`silent_after_days` counts as failed; a device that reported no start does not count.

The fraction of failures has a confidence sequence (`core/confidence_sequences.py`), so the reports may be checked as
often as one likes. A version is halted if it fails in more than `halt_above` of the devices even at the lower end. It
is widened if it fails in fewer than `widen_below` of its newest ring even at the upper end.

A failure is often reported sooner than a pass, silence later than both, and a newer version ends the trials of the
devices that had not yet failed. To keep this from deciding anything, a device whose outcome is pending counts as
passed at the lower end and as failed at the upper end. For one number of devices both ends grow with the number of
failures. So the lower end is at most, and the upper end at least, the one that the final outcomes give. With a
probability of at most 1 - `confidence` each,

- a version is ever halted of which at most `halt_above` of the devices ever count as failed;
- a version is ever widened that at least `widen_below` of the devices of that ring never pass. Rings are judged in
  turn, each by its own devices, so this holds for all of them together (fixed sequence of tests: Wiens, Pharm. Stat.
  2, 2003).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sartor.core import signing
from sartor.core.confidence_sequences import FailureRate
from sartor.core.errors import ArtifactError, ConfigError, SartorError, SignatureError
from sartor.edge.update import device_reports
from sartor.edge.update import repository as publish
from sartor.edge.update.device_reports import MOST_BYTES, UNDECIDED, Report
from sartor.edge.update.tuf_roles import Documents
from sartor.edge.update.version_metadata import Offer, ring_of

Action = Literal["halt", "widen", "wait", "done", "halted"]
_DAY_S = 86_400
# A device's clock may be this far from the publisher's
_CLOCK_S = _DAY_S
# Reason of a device that counts as failed because it fell silent
SILENT = "silent"


@dataclass(frozen=True)
class FleetPolicy:
    """Rules for halting and widening. Fractions 0..1 are of the devices that report.

    rings: percents that a version is widened to, in turn.
    confidence: 1 minus the probability of ever halting a version that is within `halt_above`, and of ever widening
    one that is not below `widen_below`.
    silent_after_days: after the start of a version, a device that sends nothing for so long counts as failed; 0 for
    never. Choose a longer time than a device of this fleet is ordinarily off.
    """

    least_reports: int = 5
    halt_above: float = 0.05
    widen_below: float = 0.25
    confidence: float = 0.95
    rings: tuple[int, ...] = (10, 25, 50, 100)
    silent_after_days: float = 7.0

    def __post_init__(self) -> None:
        is_right = {
            "--least-reports 5": self.least_reports >= 1,
            "--halt-above 0.05": 0 <= self.halt_above < 1,
            "--widen-below 0.25": 0 < self.widen_below <= 1,
            "--confidence 0.95": 0 < self.confidence < 1,
            "--rings 10,25,50,100": all(0 < ring <= 100 for ring in self.rings),
        }
        if not all(is_right.values()):
            remedy = " ".join(flag for flag in is_right if not is_right[flag])
            raise ConfigError(f"a rule for a fleet is out of range: {self}", remedy)
        if not 0 <= self.silent_after_days < math.inf:
            raise ConfigError(
                f"silent_after_days is {self.silent_after_days}; it must be 0 or a number of days",
                "--silent-after-days 7",
            )


@dataclass(frozen=True)
class VoteCounts:
    """Devices by outcome.

    failed: includes the devices that fell silent.
    pending: devices of which only a start or a `deferred` is known.
    """

    passed: int = 0
    failed: int = 0
    silent: int = 0
    pending: int = 0

    @property
    def decided(self) -> int:
        """Number of devices whose outcome is known."""
        return self.passed + self.failed

    @property
    def fewest_failures(self) -> FailureRate:
        """Failures if every pending device passes."""
        return FailureRate(self.decided + self.pending, self.failed)

    @property
    def most_failures(self) -> FailureRate:
        """Failures if no pending device passes."""
        return FailureRate(self.decided + self.pending, self.failed + self.pending)


@dataclass(frozen=True)
class RolloutTally:
    """Count and decision for one version.

    votes: of all devices.
    ring: of the devices that the last widening added, which decide the next one.
    low, high: interval of the fraction of failures.
    ring_high: upper end for the ring.
    to: percent that the version is widened to.
    reasons: failed devices by reason.
    """

    name: str
    version: str
    percent: int
    votes: VoteCounts
    ring: VoteCounts
    low: float
    high: float
    ring_high: float
    action: Action
    to: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        """Number of devices that passed."""
        return self.votes.passed

    @property
    def failed(self) -> int:
        """Number of devices that failed, or fell silent."""
        return self.votes.failed

    def as_json(self) -> dict[str, Any]:
        """Return the JSON of the command."""
        return {
            "name": self.name,
            "version": self.version,
            "percent": self.percent,
            **asdict(self.votes),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "action": self.action,
            "to": self.to,
            "reasons": self.reasons,
            "ring": {**asdict(self.ring), "high": round(self.ring_high, 4)},
        }


@dataclass(frozen=True)
class Counted:
    """Tallies of every version of the repository.

    refused: number of reports that do not count, by reason.
    votes: the reports that count, one for each device and version.
    """

    tallies: tuple[RolloutTally, ...]
    refused: dict[str, int]
    votes: tuple[Report, ...] = ()


def tally(
    reports: Path | Iterable[bytes], repository: Path, devices: Path, policy: FleetPolicy | None = None
) -> Counted:
    """Count reports (a folder of files, or their bytes), without changing anything.

    devices: folder of public keys, ID.pub.
    """
    policy = policy or FleetPolicy()
    documents = Documents.open(repository / "metadata")
    offers = {
        (name, offer.version): offer
        for name in publish.names_of(documents)
        for offer in publish.offers_of(documents, name)
    }
    refused: Counter[str] = Counter()
    votes = _votes(_contents(reports) if isinstance(reports, Path) else reports, offers, devices, refused)
    now = time.time()
    # by name, and of one name the newest version first
    in_order = sorted(offers.items(), key=lambda item: (item[0][0], -item[1].order))
    tallies = tuple(tally_offer(name, offer, votes, policy=policy, now=now) for (name, _), offer in in_order)
    return Counted(tallies, dict(sorted(refused.items())), tuple(votes.values()))


def watch(repository: Path, keys: Path | None, counted: Counted, *, widen: bool = False) -> list[RolloutTally]:
    """Execute the decisions of the tallies, and return the tallies that were acted on.

    A version is halted, or with `widen` widened.

    keys: of targets, snapshot and timestamp; without them nothing is done.

    Raises what `repository.halt` raises.
    """
    executed = []
    for item in counted.tallies if keys else ():
        assert keys
        if item.action == "halt":
            publish.halt(repository, keys, item.name, item.version)
        elif item.action == "widen" and widen:
            publish.widen(repository, keys, item.name, item.version, percent=item.to)
        else:
            continue
        executed.append(item)
    return executed


def _contents(folder: Path) -> Iterator[bytes]:
    """Yield the bytes of each report in a folder, cut just above the size limit."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "--reports: where the devices' reports are gathered")
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as stream:
                yield stream.read(MOST_BYTES + 1)


def _votes(
    reports: Iterable[bytes], offers: dict[tuple[str, str], Offer], devices: Path, refused: Counter[str]
) -> dict[tuple[str, str, str], Report]:
    """Return (name, version, device) -> that device's newest report.

    A device on trial reports its start at each sync: those reports differ by their time, and count once without a
    refusal.
    """
    votes: dict[tuple[str, str, str], Report] = {}
    undecided: set[Report] = set()
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
        earlier = votes.get(key)
        is_repeated_outcome = earlier is not None and not {report.outcome, earlier.outcome} & set(UNDECIDED)
        if is_repeated_outcome or report in undecided:
            refused["replayed"] += 1  # a copy, or an earlier outcome of that device
        if report.outcome in UNDECIDED:
            undecided.add(report)
        if earlier is None or _weight(report) > _weight(earlier):
            votes[key] = report
    return votes


def _weight(report: Report) -> tuple[bool, int, bool]:
    """Return the sort key of a device's reports on one version.

    An outcome comes before none, then the newest, then a `deferred`.
    """
    return report.outcome not in UNDECIDED, report.time, report.outcome == "deferred"


def _refusal_reason(report: Report, signature: Any, offers: dict[tuple[str, str], Offer], devices: Path) -> str:
    """Return why a report does not count; empty if it does."""
    file = devices / f"{report.device}.pub"
    if not file.is_file():
        return "unknown device"
    try:
        key = signing.open_public(file)
        signing.check_signature(
            report.document(), signature, file, subject=report.device, trusted=[key], purpose="fleet"
        )
    except SignatureError:
        return "forged"
    except SartorError:
        return "unknown device"  # the enrolled file is no key
    offer = offers.get((report.name, report.version))
    if offer is None:
        return "unknown version"
    if not offer.published - _CLOCK_S <= report.time <= time.time() + _CLOCK_S:
        return "of another time"
    return "" if report.ring == ring_of(report.device) < offer.percent else "not offered to it"


def tally_offer(
    name: str, offer: Offer, votes: Mapping[tuple[str, str, str], Report], policy: FleetPolicy, now: float
) -> RolloutTally:
    """Count the votes on one version at the time `now`, and decide.

    votes: (name, version, device) -> the report that counts.
    """
    version_votes = [
        vote for (vote_name, version, _), vote in votes.items() if (vote_name, version) == (name, offer.version)
    ]
    outcomes: list[str] = []
    newest: list[str] = []  # outcomes of the newest ring
    for vote in version_votes:
        outcome = SILENT if is_silent(vote, policy, now) else vote.outcome
        outcomes.append(outcome)
        if vote.ring >= offer.previous_percent:
            newest.append(outcome)
    counts, ring = _count(outcomes), _count(newest)
    action, to = decide_action(offer, counts, ring, policy)
    reasons = Counter(vote.reason for vote in version_votes if vote.outcome == "fail") + Counter(
        {SILENT: counts.silent}
    )
    return RolloutTally(
        name=name,
        version=offer.version,
        percent=offer.percent,
        votes=counts,
        ring=ring,
        low=counts.fewest_failures.lower_limit(policy.confidence),
        high=counts.most_failures.upper_limit(policy.confidence),
        ring_high=ring.most_failures.upper_limit(policy.confidence),
        action=action,
        to=to,
        reasons=dict(sorted(reasons.items())),
    )


def is_silent(vote: Report, policy: FleetPolicy, now: float | None = None) -> bool:
    """Return whether a device started a version and sent nothing on it until the deadline.

    now: Unix time, s; by default the clock's.
    """
    age_s = (time.time() if now is None else now) - vote.time
    return vote.outcome == "started" and 0 < policy.silent_after_days * _DAY_S < age_s


def _count(outcomes: Iterable[str]) -> VoteCounts:
    counts = Counter(outcomes)
    pending = sum(counts[outcome] for outcome in UNDECIDED)
    return VoteCounts(counts["pass"], counts["fail"] + counts[SILENT], counts[SILENT], pending)


def decide_action(offer: Offer, counts: VoteCounts, ring: VoteCounts, policy: FleetPolicy) -> tuple[Action, int]:
    """Return the action, and the percent to widen to.

    counts: of all devices.
    ring: of the newest ring's devices.
    """
    if offer.halted:
        return "halted", 0
    is_bad = counts.fewest_failures.is_above(policy.halt_above, policy.confidence)
    if is_bad and counts.decided >= policy.least_reports:
        return "halt", 0
    if offer.percent >= 100:
        return "done", 0
    is_good = ring.most_failures.is_below(policy.widen_below, policy.confidence)
    if not is_good or ring.decided < policy.least_reports:
        return "wait", 0
    return "widen", next((step for step in sorted(policy.rings) if step > offer.percent), 100)
