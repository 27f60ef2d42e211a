"""The walk back: from any artefact to its parents, its sources, their digests and licences.

Every manifest carries the sources of everything that it was made from, so the walk needs no other file; parents that
still stand are opened and compared on top.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sartor.core import catalogue, licences
from sartor.core.artifacts import Artifact, open_artifact, read_manifest
from sartor.core.errors import ArtifactError
from sartor.core.example_lineage import inspect_example
from sartor.core.spdx import UNKNOWN
from sartor.core.lineage__records import tally  # noqa: F401

# the role of a Dataset whose rows were read beside those that an Adapter is for
REHEARSAL = "rehearsal"


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """One artefact on the walk back. `state`: opened | moved away | changed."""

    kind: str
    id: str
    path: str
    licence: str
    state: str


def walk(artifact: Artifact) -> list[Ancestor]:
    """The artefact's ancestors, nearest first. One that has gone stays in the list, and says so."""
    steps: list[Ancestor] = []
    waiting = [(parent, artifact.path) for parent in artifact.manifest.get("parents", [])]
    seen: set[str] = set()
    while waiting:
        parent, child = waiting.pop(0)
        if parent["id"] in seen:
            continue
        seen.add(parent["id"])
        path = catalogue.locate(parent["id"], parent.get("path", ""), str(child.parent / Path(parent["path"]).name))
        if path is None:
            steps.append(Ancestor(parent["kind"], parent["id"], parent.get("path", ""), UNKNOWN, "moved away"))
            continue
        manifest = read_manifest(path)
        state = "opened"
        try:
            open_artifact(path)
        except ArtifactError as error:
            state = f"changed: {error.problem}"
        steps.append(Ancestor(manifest["kind"], manifest["id"], str(path), manifest.get("licence", UNKNOWN), state))
        waiting += [(grandparent, path) for grandparent in manifest.get("parents", [])]
    return steps


def find_parent(artifact: Artifact, kind: str) -> Artifact | None:
    """The nearest ancestor of a kind that still stands and is whole."""
    for step in walk(artifact):
        if step.kind == kind and step.state == "opened":
            return open_artifact(step.path)
    return None


def learnt_from(artifact: Artifact) -> list[Artifact]:
    """The Datasets that still stand and are whole of those that its tuning read, rehearsal included, and the tuning of each
    adapter that it went on from; nearest first. What a Dataset was made of was not learnt.
    """
    steps = walk(artifact)
    tuned = [open_artifact(step.path) for step in steps if step.kind in ("adapter", "release") and step.state == "opened"]
    read = {
        parent["id"] for one in (artifact, *tuned) for parent in one.manifest.get("parents", []) if parent["kind"] == "dataset"
    }
    return [open_artifact(step.path) for step in steps if step.id in read and step.state == "opened"]


def find_parents(artifact: Artifact, kind: str) -> list[Artifact]:
    """Its own parents of a kind, as far as they still stand and are whole; where it has none, the nearest ancestor.

    What was only rehearsed is no parent here.
    """
    parents = artifact.manifest.get("parents", [])
    own = {parent["id"] for parent in parents if parent["kind"] == kind and parent.get("role") != REHEARSAL}
    found = [open_artifact(step.path) for step in walk(artifact) if step.id in own and step.state == "opened"]
    nearest = None if own else find_parent(artifact, kind)
    return found or ([nearest] if nearest else [])


def inspect(path: Path | str, *, example: str = "") -> dict[str, Any]:
    """With `example`, one row of a Dataset: origins, ancestors, duplicates. Else the artefact.

    What an artefact is: kind, id, licence and what it demands, sources with digests and licences, and the walk back.
    """
    if example:
        return inspect_example(path, example)
    artifact = open_artifact(path)
    manifest = artifact.manifest
    known = ("name", "version", "use", "created", "base", "counts", "gate", "versions", "metrics")
    made_from = licences.made_from(manifest)
    return {
        "kind": artifact.kind,
        "id": artifact.id,
        "path": str(artifact.path),
        "licence": artifact.licence,
        "licence_conflicts": manifest.get("licence_conflicts", licences.conflicts(made_from)),
        "obligations": licences.obligations(made_from),
        "parents": [dataclasses.asdict(step) for step in walk(artifact)],
        "sources": manifest.get("sources", []),
        **{key: manifest[key] for key in known if key in manifest},
    }
