"""The attack report beside an adapter, bound to its files; an epsilon that is shown to be above the claimed one fails it.

attacks.json    {"schema": 1, "kind": "attack-report", "adapter": {file: sha256}, "claimed": ..., what each attack found}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sartor.core.artifacts import digests
from sartor.core.errors import ArtifactError, GateError
from sartor.core.filesystem import write_file_atomic
from sartor.evaluate.audit.membership_inference import Membership
from sartor.federate.privacy.accountant import Budget
from sartor.federate.privacy.attacks.audit import Audit
from sartor.federate.privacy.attacks.canaries import Exposure
from sartor.federate.privacy.attacks.inversion import Inversion
from sartor.release import gate
from sartor.release.gate import FILE, KIND, SCHEMA


@dataclass(frozen=True)
class AttackReport:
    """claimed: the privacy that the adapter is said to have, None for none. skipped: attack -> why it was not made."""

    claimed: Budget | None
    membership: tuple[Membership, ...] = ()
    canaries: tuple[Exposure, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    audit: Audit | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise GateError where epsilon was shown to be above the claimed one, or is claimed and was not audited."""
        claimed, audit = (asdict(one) if one else None for one in (self.claimed, self.audit))
        if found := gate.fault(claimed, audit):
            raise GateError(*found)

    def sentences(self) -> Iterator[str]:
        """What was found, a line each."""
        yield (f"claimed: {gate.claim(asdict(self.claimed))}" if self.claimed else "no privacy is claimed")
        for found in (*self.membership, *self.canaries, *self.inversions):
            yield str(found)
        if "audit" not in self.skipped:
            yield str(self.audit) if self.audit else "no audit was made"
        for attack, why in self.skipped.items():
            yield f"{attack}: not measured, {why}"

    def write(self, folder: Path) -> Path:
        """Write it beside the adapter in `folder`, whole, also where `check` refuses. Returns the file.

        Raises ArtifactError where no adapter lies there.
        """
        bound = digests(folder)
        if not bound:
            raise ArtifactError(f"{folder} holds no adapter, so there is nothing to report of", "give the adapter's folder")
        said = {"schema": SCHEMA, "kind": KIND, "adapter": bound, **asdict(self)}
        write_file_atomic(folder / FILE, json.dumps(said, indent=1).encode() + b"\n")
        return folder / FILE


def open_report(folder: Path) -> AttackReport:
    """The report beside an adapter. Raises ArtifactError where it is absent, not whole, or of other files."""
    file = folder / FILE
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if (said["schema"], said["kind"]) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        report = AttackReport(
            claimed=Budget(**said["claimed"]) if said["claimed"] else None,
            membership=tuple(Membership(**one) for one in said["membership"]),
            canaries=tuple(Exposure(**one) for one in said["canaries"]),
            inversions=tuple(Inversion(**one) for one in said["inversions"]),
            audit=Audit(**said["audit"]) if said["audit"] else None,
            skipped=dict(said.get("skipped", {})),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no attack report: {error!r}", "attack the adapter, and write one") from None
    if said["adapter"] != digests(folder):
        raise ArtifactError(f"{file} speaks of other files than lie beside it", "attack the adapter again")
    return report
