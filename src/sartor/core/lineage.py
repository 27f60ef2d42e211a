"""The walk back: from any artefact to its parents, its sources, their digests and licences.

Every manifest carries the sources of everything that it was made from, so the walk needs no other file; parents that
still stand are opened and compared on top.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.core import catalogue
from sartor.core.artifacts import Artifact, open_artifact, read_manifest
from sartor.core.errors import ArtifactError

UNKNOWN = "NOASSERTION"  # SPDX's word for a licence that nobody stated

# Licence families that forbid shipping a tuned adapter at all, or for pay. SPDX ids; matched by substring on purpose:
# `CC-BY-NC-SA-4.0` must be caught by `-NC`.
_FORBIDS = {"-ND": "forbids derived works", "-NC": "forbids commercial use"}


def combine(licences: Iterable[str]) -> str:
    """The SPDX expression that holds for a thing made from all of these: their conjunction, each once, sorted.

    >>> combine(["MIT", "CC-BY-4.0", "MIT"])
    'CC-BY-4.0 AND MIT'
    """
    parts = {part for licence in licences for part in _conjuncts(licence or UNKNOWN)}
    return " AND ".join(sorted(parts)) or UNKNOWN


def _conjuncts(expression: str) -> list[str]:
    if " OR " in re.sub(r"\([^)]*\)", "", expression):  # outside of brackets
        return [f"({expression})"]
    return [part.strip() for part in re.split(r" AND (?![^(]*\))", expression)]


def objections(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the licences of these sources do not permit a commercial release; empty when they do.

    Of `MIT OR CC-BY-NC-4.0` the branch that permits is taken. A source may declare `use: [non-commercial]`.
    """
    found = []
    for source in sources:
        licence, name = source.get("licence") or UNKNOWN, source.get("source", "?")
        branches = [_objections_to(branch) for branch in licence.strip("()").split(" OR ")]
        found += [f"{name} {why}" for why in min(branches, key=len)]
        if "non-commercial" in source.get("use", []):
            found.append(f"{name} is declared for non-commercial use")
    return found


def _objections_to(licence: str) -> list[str]:
    unknown = ["states no licence"] if UNKNOWN in licence else []
    return unknown + [f"is {licence}, which {why}" for mark, why in _FORBIDS.items() if mark in licence]


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


def inspect(path: Path | str) -> dict[str, Any]:
    """What an artefact is: kind, id, licence, sources with digests and licences, and the walk back."""
    artifact = open_artifact(path)
    manifest = artifact.manifest
    known = ("name", "version", "created", "base", "counts", "gate", "versions", "metrics")
    return {
        "kind": artifact.kind,
        "id": artifact.id,
        "path": str(artifact.path),
        "licence": artifact.licence,
        "parents": [dataclasses.asdict(step) for step in walk(artifact)],
        "sources": manifest.get("sources", []),
        **{key: manifest[key] for key in known if key in manifest},
    }


def tally(words: Iterable[str]) -> dict[str, int]:
    """How often each word occurs, most frequent first: the form of every count in a manifest."""
    return dict(Counter(words).most_common())
