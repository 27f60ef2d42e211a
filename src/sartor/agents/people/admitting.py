"""What a personal adapter must pass before a worker loads it: what is looked at of a Release's adapter, but for the signature.

It was made on this team's state directory, and the registry knows the id that its manifest must have: that stands in the
signature's stead, and the gate of `sartor personal tune` in that of the canaries.
"""

from __future__ import annotations

from pathlib import Path

from sartor.agents.admission import Ground, check_ground, check_values, projectors
from sartor.agents.entries import Version
from sartor.core.artifacts import open_artifact
from sartor.inference.engine import adapter_digest


def admit_personal(path: Path, agent: str, ground: Ground) -> Version:
    """The Adapter in a directory as a version of an agent. Raises what `admission.admit_by` raises of base and values."""
    found = open_artifact(path, "adapter")
    check_ground(found, ground.about)
    check_values(path, projectors.read(path, found.manifest["files"], ground.about), ground)
    return Version(agent, "", str(path), found.id, adapter_digest(found.manifest["files"]))
