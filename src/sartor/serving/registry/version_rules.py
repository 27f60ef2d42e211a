"""Which versions a team may serve at all: not below an agent's `min_version`, and no revoked Release.

The rules are checked at each admission, so that no server loads what they forbid, and before each change of the
registry, so that promote, canary, shadow and rollback are refused with a reason instead of ending in an agent that
cannot answer. A running server asks for the revoked ids at each full read of the registry.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sartor.core import revoked_releases, signing
from sartor.core.errors import AdmissionError
from sartor.serving.team_config import Team

_TOKEN = re.compile(r"[0-9]+|[a-z]+")


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return the key by which versions are ordered.

    Numbers and words are compared one by one, numbers by value: 1.9 < 1.10, faq-2 < faq-10. A word comes before the
    end and the end before a number, as for prereleases: 1.0-rc1 < 1.0 < 1.0.1. Capitals are as small letters.
    """
    tokens = [(2, int(token), "") if token.isdigit() else (0, 0, token) for token in _TOKEN.findall(version.lower())]
    return (*tokens, (1, 0, ""))


def check_min_version(agent: str, version: str, min_version: str) -> None:
    """Raise AdmissionError (`min_version`) for a version below an agent's minimum; "" is no minimum."""
    if min_version and version != min_version and version_key(version) < version_key(min_version):
        raise AdmissionError(
            f"{agent}@{version} is below the agent's min_version {min_version}",
            f"sartor agents promote {agent} VERSION, with {min_version} or a later one; or lower min_version in "
            "TEAM.yaml",
            "min_version",
        )


@dataclass(frozen=True)
class VersionRules:
    """Rules of one team.

    min_versions: agent -> smallest version; agents without one are absent.
    trust: the team's own trusted key, whose list of revoked Releases counts too; None for none.
    """

    min_versions: Mapping[str, str] = field(default_factory=dict)
    trust: Path | None = None

    @classmethod
    def of(cls, team: Team) -> VersionRules:
        """Return the rules in TEAM.yaml."""
        minima = {member.name: member.min_version for member in team.agents if member.min_version}
        return cls(minima, Path(team.trust) if team.trust else None)

    def check(self, agent: str, version: str, release_id: str) -> None:
        """Raise AdmissionError for a version below the minimum, SignatureError for a revoked Release."""
        check_min_version(agent, version, self.min_versions.get(agent, ""))
        revoked_releases.check_ids([release_id], f"{agent}@{version}", self._trusted())

    def revoked_ids(self) -> Collection[str]:
        """Return the ids of all revoked Releases. Raises SignatureError if a list cannot be believed."""
        return revoked_releases.revoked(self._trusted()).keys()

    def _trusted(self) -> Sequence[signing.PublicKey]:
        remedy = "trust: DIR/sartor.pub, as sartor keygen DIR made it"
        return [signing.open_public(self.trust, remedy=remedy)] if self.trust else []
