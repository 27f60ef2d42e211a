"""Signed reports of devices about a version.

    {"schema": 1, "kind": "fleet-report", "device": "sensor-0017", "name": "faq", "version": "1.1", "ring": 42,
     "outcome": "fail", "reason": "canary", "time": 1780000000, "signature": {...}}

The reason is a word of a closed list: the device's own prompts and the replies stay on the device. The outcome
follows from the store: a version that is refused failed, and the current one passed once its trial is over. `started`
is sent before a version is checked and made current, so that the publisher notices a device that falls silent. It is
sent again at each later sync of the trial: a device that reports is not silent, however long the trial is. `deferred`
withdraws it if nothing came of the trial: the check could not be made, or a newer version took its place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import records, signing, strict_json
from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.filesystem import write_file_atomic
from sartor.edge.health_reason import HealthReason
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update.downloader import Fetcher
from sartor.edge.update.version_metadata import ring_of

SCHEMA, KIND = 1, "fleet-report"
MOST_BYTES = 4096
Outcome = Literal["pass", "fail", "started", "deferred"]
# Reports before the outcome of a version is known
UNDECIDED = ("started", "deferred")
_MEMORY = "reported.json"


@dataclass(frozen=True)
class Report:
    """Report of one device on one version.

    time: seconds since 1970 by the device's clock.
    reason: a HealthReason; else "".
    """

    device: str
    name: str
    version: str
    ring: int
    outcome: Outcome
    reason: str
    time: int

    def document(self) -> bytes:
        """Return the signed bytes."""
        return records.canonical({"schema": SCHEMA, "kind": KIND, **asdict(self)})

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """Return the bytes to send: the document with its signature."""
        fields = json.loads(self.document())
        return records.canonical({**fields, "signature": signing.signature_of(self.document(), key, "fleet")}) + b"\n"


def read_report(content: bytes) -> tuple[Report, Any]:
    """Return a report and its signature, which is not checked here. Raises ArtifactError for no report."""
    try:
        fields = strict_json.loads(content) if len(content) <= MOST_BYTES else None
        if not isinstance(fields, dict):
            raise TypeError("no JSON object of a report's size")
        signature = fields.pop("signature")
        if (fields.pop("schema"), fields.pop("kind")) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        report = Report(**fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(
            f"this is no report of a device: {error}", "rm the file of the report; sartor edge watch counts without it"
        ) from None
    numbers = type(report.ring) is int and type(report.time) is int
    words = report.outcome in get_args(Outcome) and report.reason in ("", *HealthReason)
    if not (numbers and words and all(map(is_valid_name, (report.device, report.name, report.version)))):
        raise ArtifactError(
            "a field of this report has another form", "rm the file of the report; sartor edge watch counts without it"
        )
    return report, signature


def check_id(device: str) -> None:
    """Raise ConfigError for a device's id that is no file name: its key is enrolled under it."""
    if not is_valid_name(device):
        raise ConfigError(
            f"{device!r:.80} is no id that can report", "--device: lower-case letters, digits, '.', '_' and '-'"
        )


def due(
    store: ReleaseStore, name: str, device: str, outcomes: dict[str, str], *, announced: str = ""
) -> Iterator[Report]:
    """Yield the reports on `name` that were not sent yet, and `started` for a current version on trial.

    outcomes: version -> outcome that was sent last.
    announced: version whose start this sync has reported already.
    """
    now, ring = int(time.time()), ring_of(device)

    def report(version: str, outcome: Outcome, reason: str = "") -> Report:
        """Return a report of this device, made now."""
        return Report(device, name, version, ring=ring, outcome=outcome, reason=reason, time=now)

    for version, reason in store.refused(name).items():
        if outcomes.get(version) != "fail":
            yield report(version, "fail", HealthReason.parse(reason).value)
    current = store.current(name)
    for version, outcome in outcomes.items():
        if (
            outcome == "started"
            and version not in store.refused(name)
            and not (current and current.version == version)
        ):
            yield report(version, "deferred")
    if current and current.trial and current.version != announced:
        yield report(current.version, "started")
    if current and not current.trial and outcomes.get(current.version) != "pass":
        yield report(current.version, "pass")


def send_due(
    store: ReleaseStore, name: str, device: str, key: Path, destination: str, folder: Path, *, announced: str = ""
) -> list[Report]:
    """Send the signed reports of `due`, to a folder or by POST to an http(s) address.

    Returns the reports that were sent; `folder` keeps a record of them. Raises MissingError if a report cannot be
    sent: the next sync sends it again.
    """
    check_id(device)
    outbox = Outbox(device, signing.open_private(key, "fleet"), destination, folder)
    sent = []
    for report in due(store, name, device, outbox.outcomes(name), announced=announced):
        outbox.send(report)
        sent.append(report)
    return sent


@dataclass(frozen=True)
class Outbox:
    """Destination of a device's reports, and the record of those sent.

    key: signs the reports.
    folder: folder of the record.
    """

    device: str
    key: Ed25519PrivateKey
    destination: str
    folder: Path

    def outcomes(self, name: str) -> dict[str, str]:
        """Return the outcome that was last sent, by version."""
        return _read_memory(self.folder).get(name, {})

    def send(self, report: Report) -> None:
        """Sign, send and record a report. Raises MissingError if it cannot be sent."""
        document = report.signed(self.key)
        if self.destination.startswith(("http://", "https://")):
            Fetcher().post(self.destination, document)
        else:
            file = Path(self.destination) / f"{report.device}.{report.name}.{report.version}.json"
            write_file_atomic(file, document)
        memory = _read_memory(self.folder)
        memory.setdefault(report.name, {})[report.version] = report.outcome
        write_file_atomic(self.folder / _MEMORY, records.canonical(memory))

    def send_started(self, name: str, version: str) -> None:
        """Send the report that a version is about to be checked and made current.

        Raises MissingError if it cannot be sent.
        """
        ring = ring_of(self.device)
        self.send(Report(self.device, name, version, ring=ring, outcome="started", reason="", time=int(time.time())))


def _read_memory(folder: Path) -> dict[str, dict[str, str]]:
    """Return the record of sent reports: name -> version -> outcome.

    A lost record costs one more report, which counts once.
    """
    try:
        fields = json.loads((folder / _MEMORY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) and all(isinstance(item, dict) for item in fields.values()) else {}
