"""State of a fleet for a page that shows it: its versions with the evidence for a halt, and each device.

The counts are those of `fleet_monitor`: only reports that count are shown as a device's. Nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sartor.edge.update import repository as repositories
from sartor.edge.update import tuf_roles
from sartor.edge.update.device_reports import Report
from sartor.edge.update.fleet_monitor import SILENT, FleetPolicy, RolloutTally, is_silent, tally
from sartor.edge.update.tuf_roles import Documents
from sartor.edge.update.version_metadata import Offer, ring_of

# evidence above this is shown as this
MOST_EVIDENCE = 1e12


@dataclass(frozen=True)
class VersionState:
    """A version of a fleet's repository.

    tally: its votes, the ends of its confidence sequence, and what `sartor edge watch` would do.
    offer: whom it is offered to, and since when (`published`, Unix time, s).
    halt_evidence: e-value against the fraction of failures that is allowed; 1 is no evidence.
    widen_evidence: e-value of the newest ring against the fraction of failures that forbids a widening.
    """

    tally: RolloutTally
    offer: Offer
    halt_evidence: float
    widen_evidence: float


@dataclass(frozen=True)
class DeviceState:
    """A device of a fleet, by the newest report on its newest version.

    ring: 0..99.
    outcome: pass, fail, started, deferred or silent; empty if nothing was heard of it that counts.
    reason: word for why it failed. seen_at: Unix time of its newest report by its own clock, s; 0 for never.
    """

    id: str
    ring: int
    name: str = ""
    version: str = ""
    outcome: str = ""
    reason: str = ""
    seen_at: int = 0


@dataclass(frozen=True)
class FleetOverview:
    """State of a fleet.

    versions: by name, the newest first. devices: by id.
    refused: number of reports that do not count, by reason.
    expires: role of the metadata -> when it expires, UTC.
    threshold: e-value at which a version is halted or widened.
    """

    versions: Sequence[VersionState]
    devices: Sequence[DeviceState]
    refused: dict[str, int]
    expires: dict[str, str]
    policy: FleetPolicy
    threshold: float


def fleet_overview(
    repository: Path | str,
    reports: Path | str = "",
    devices: Path | str = "",
    *,
    policy: FleetPolicy | None = None,
) -> FleetOverview:
    """Return the state of the fleet of an update repository.

    reports: folder of the devices' reports. devices: folder of their public keys, ID.pub. Without them nothing is
    known of a device. Raises ArtifactError for metadata that cannot be read.
    """
    repository, policy = Path(repository), policy or FleetPolicy()
    documents = Documents.open(repository / "metadata")
    keys = Path(devices) if devices else repository / "no-devices"
    counted = tally(Path(reports) if reports and devices else [], repository, keys, policy)
    offers = {
        (name, offer.version): offer
        for name in repositories.names_of(documents)
        for offer in repositories.offers_of(documents, name)
    }
    versions = [_version_state(item, offers[item.name, item.version], policy) for item in counted.tallies]
    enrolled = sorted(file.stem for file in keys.glob("*.pub")) if keys.is_dir() else []
    return FleetOverview(
        versions,
        _device_states(enrolled, counted.votes, offers, policy),
        counted.refused,
        tuf_roles.expiries(repository / "metadata"),
        policy,
        1 / (1 - policy.confidence),
    )


def _version_state(item: RolloutTally, offer: Offer, policy: FleetPolicy) -> VersionState:
    failures, ring = item.votes.fewest_failures, item.ring.most_failures
    is_above = failures.seen > 0 and failures.fraction > policy.halt_above
    is_below = ring.seen > 0 and ring.fraction < policy.widen_below
    return VersionState(
        item,
        offer,
        halt_evidence=_evidence(failures.against(policy.halt_above)) if is_above else 1.0,
        widen_evidence=_evidence(ring.against(policy.widen_below)) if is_below else 1.0,
    )


def _evidence(log_evidence: float) -> float:
    """Return the e-value of its natural log, at most MOST_EVIDENCE."""
    return MOST_EVIDENCE if log_evidence > math.log(MOST_EVIDENCE) else math.exp(log_evidence)


def _device_states(
    enrolled: Sequence[str],
    votes: Iterable[Report],
    offers: dict[tuple[str, str], Offer],
    policy: FleetPolicy,
) -> list[DeviceState]:
    """Return the devices: of each the report on the newest version that it has reported on."""
    newest: dict[str, Report] = {}
    seen_at: dict[str, int] = {}
    for vote in votes:
        seen_at[vote.device] = max(vote.time, seen_at.get(vote.device, 0))
        known = newest.get(vote.device)
        order = (offers[vote.name, vote.version].order, vote.time)
        if known is None or order > (offers[known.name, known.version].order, known.time):
            newest[vote.device] = vote
    result = []
    for device in sorted({*enrolled, *newest}):
        report = newest.get(device)
        if report is None:
            result.append(DeviceState(device, ring_of(device)))
            continue
        outcome = SILENT if is_silent(report, policy) else report.outcome
        result.append(
            DeviceState(
                device,
                report.ring,
                name=report.name,
                version=report.version,
                outcome=outcome,
                reason=report.reason,
                seen_at=seen_at[device],
            )
        )
    return result
