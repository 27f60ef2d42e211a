"""The attack report beside an adapter, bound to its files; an epsilon that is shown to be above the claimed one fails it.

attacks.json    {"schema": 1, "kind": "attack-report", "adapter": {file: sha256}, "claimed": ..., what each attack found}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sartor.core.errors import ArtifactError, GateError
from sartor.edge.files import write_whole
from sartor.edge.tuning.receipt import digests
from sartor.evaluate.audit.membership import Membership
from sartor.federate.privacy.accountant import Budget
from sartor.federate.privacy.attacks.audit import Audit
from sartor.federate.privacy.attacks.canaries import Exposure
from sartor.federate.privacy.attacks.inversion import Inversion

SCHEMA, KIND, FILE = 1, "attack-report", "attacks.json"


@dataclass(frozen=True)
class AttackReport:
    """claimed: the privacy that the adapter is said to have, None for none. adapter: {file: sha256}, once written."""

    claimed: Budget | None
    membership: tuple[Membership, ...] = ()
    canaries: tuple[Exposure, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    audit: Audit | None = None

    def check(self) -> None:
        """Raise GateError where epsilon was shown to be above the claimed one, or is claimed and was not audited."""
        if self.claimed is None:
            return
        claimed = f"epsilon {self.claimed.epsilon:g} at delta {self.claimed.delta:g}"
        if self.audit is None:
            raise GateError(
                f"{claimed} is claimed, and no audit was made", "train on canaries by coin, and give their scores to `one_run`"
            )
        if self.audit.delta > self.claimed.delta:
            problem = f"{claimed} is claimed, and the audit was made at delta {self.audit.delta:g}"
            raise GateError(problem, f"audit at delta {self.claimed.delta:g}")
        if self.audit.epsilon_low > self.claimed.epsilon:
            shown = f"{self.audit.right} of {self.audit.guesses} guesses show epsilon {self.audit.epsilon_low:.2f} or more"
            raise GateError(
                f"{claimed} is claimed; {shown}", "look for rows that bypass the noise; claim nothing until it is found"
            )

    def sentences(self) -> Iterator[str]:
        """What was found, a line each."""
        yield (
            f"claimed: epsilon {self.claimed.epsilon:g} at delta {self.claimed.delta:g}"
            if self.claimed
            else "no privacy is claimed"
        )
        for found in (*self.membership, *self.canaries, *self.inversions):
            yield str(found)
        yield str(self.audit) if self.audit else "no audit was made"

    def write(self, folder: Path) -> Path:
        """Write it beside the adapter in `folder`, whole, also where `check` refuses. Returns the file.

        Raises ArtifactError where no adapter lies there.
        """
        bound = digests(folder)
        if not bound:
            raise ArtifactError(f"{folder} holds no adapter, so there is nothing to report of", "give the adapter's folder")
        said = {"schema": SCHEMA, "kind": KIND, "adapter": bound, **asdict(self)}
        write_whole(folder / FILE, json.dumps(said, indent=1).encode() + b"\n")
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
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no attack report: {error!r}", "attack the adapter, and write one") from None
    if said["adapter"] != digests(folder):
        raise ArtifactError(f"{file} speaks of other files than lie beside it", "attack the adapter again")
    return report
