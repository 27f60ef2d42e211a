"""Ancestors and sources of an artefact or of one row.

Every manifest contains the sources of everything from which the artefact was made, so sources need no other file.
Parents that still exist are opened and checked in addition.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core import catalogue
from sartor.core.artifacts import Artifact, Dataset, check_file, open_artifact, read_manifest
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.licences import compliance
from sartor.core.licences.spdx import UNKNOWN
from sartor.core.lineage import origin_index
from sartor.core.parquet_io import column, example_of, numbers, to_index_array, to_string_array
from sartor.core.splits import test_rows

ABSENT = "not in this Dataset"
COPIES = "evidence/copies.parquet"  # (id, parent, step, changes) of rows that a curation step made from others


def inspect_example(path: Path | str, example: str) -> dict[str, Any]:
    """Return the facts known about one Example of a Dataset. Only files with parts of it are read and checked.

    Raises ConfigError for an id that the Dataset does not hold, ArtifactError if its content has another digest.
    """
    path = Path(path).absolute()
    dataset = Dataset(path, read_manifest(path, ("dataset",)))
    index = origin_index.read(dataset, ["row", "id", "source", "locator", "parents"])
    example = origin_index.whole_id(column(index, "id"), example)
    is_match = numbers(pc.is_in(column(index, "id"), value_set=to_string_array([example])))
    if not is_match.any():
        drops = _drops(dataset, "id", [example])
        if drops:
            remedy = f"it was dropped: {drops[0]['reason']} at {drops[0]['locator']}"
        else:
            remedy = f"the `id` column of {dataset.path / 'examples'} has them"
        raise ConfigError(f"{path.name} has no example {example!r}", remedy)
    position = int(numbers(column(index, "row"))[np.flatnonzero(is_match)[0]])
    row = _row(dataset, position)
    if (digest := example_of(row).id) != example:
        raise ArtifactError(
            f"row {position:,} of {path} says that it is {example}; its content is {digest}",
            f"sartor curate RECIPE --out {path} --replace",
        )
    fields: dict[str, Any] = {name: row[name] for name in ("split", "group", "weight", "steps") if name in row}
    parents: list[str] = []
    for origin in row["origins"]:
        parents += origin["parents"]
    return {
        "dataset": str(path),
        "id": example,
        **fields,
        "origins": row["origins"],
        "ancestors": _ancestors(dataset, index, parents),
        "changes": _changes(dataset, example),
        "made_from_it": _made_from(index, example),
        "duplicates": _drops(dataset, "kept", [example]),
        "messages": [_plain(message) for message in row["messages"]],
        "rejected": [_plain(message) for message in row["rejected"]],
    }


def _row(dataset: Artifact, position: int) -> dict[str, Any]:
    """Return the row at this position among all Examples; only one row group is read."""
    for file in origin_index.example_files(dataset):
        with pq.ParquetFile(file) as parquet:
            if position >= parquet.metadata.num_rows:
                position -= parquet.metadata.num_rows
                continue
            check_file(dataset, file.relative_to(dataset.path).as_posix())
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if position < count:
                    row: dict[str, Any] = parquet.read_row_group(group).slice(position, 1).to_pylist()[0]
                    return row
                position -= count
    raise ArtifactError(
        f"{dataset.path} holds fewer rows than its index of lineage",
        f"sartor curate RECIPE --out {dataset.path} --replace",
    )


def _ancestors(dataset: Artifact, index: Any, parents: Sequence[str]) -> list[dict[str, Any]]:
    """Return the parents, then their parents, nearest first, each once.

    A parent that is not an Example of this Dataset has that state, or the reason for which it was dropped.
    """
    result: list[dict[str, Any]] = []
    visited: set[str] = set()
    level = list(dict.fromkeys(parents))
    while level:
        visited.update(level)
        is_member = numbers(pc.is_in(column(index, "id"), value_set=to_string_array(level)))
        origins: dict[str, list[dict[str, Any]]] = {}
        for origin in index.take(to_index_array(np.flatnonzero(is_member))).to_pylist():
            origins.setdefault(origin["id"], []).append(origin)
        absent = [identity for identity in level if identity not in origins]
        drops = {drop["id"]: drop for drop in _drops(dataset, "id", absent)}
        next_level: dict[str, None] = {}
        for item in level:
            records = list(origins.get(item, []))
            parent_ids: list[str] = []
            for origin in records:
                parent_ids += origin["parents"]
            state = "kept" if records else ABSENT
            if item in drops:
                state = f"dropped: {drops[item]['reason']}"
                records.append(drops[item])
            locations = [{"source": record["source"], "locator": record["locator"]} for record in records]
            result.append({"id": item, "state": state, "origins": locations, "parents": parent_ids})
            next_level |= dict.fromkeys(parent_ids)
        level = [identity for identity in next_level if identity not in visited]
    return result


def _made_from(index: Any, example: str) -> list[str]:
    """Return the ids of the Examples that name this one as a parent, each once."""
    parents = column(index, "parents")
    is_match = numbers(pc.is_in(pc.list_flatten(parents), value_set=to_string_array([example])))
    positions = numbers(pc.list_parent_indices(parents))[is_match]
    result: list[str] = column(index, "id").take(to_index_array(np.unique(positions))).unique().to_pylist()
    return result


def _changes(dataset: Artifact, example: str) -> list[str]:
    """Return what a curation step changed in a copy; empty for other rows."""
    if COPIES not in dataset.manifest["files"]:
        return []
    check_file(dataset, COPIES)
    with pq.ParquetFile(dataset.path / COPIES) as parquet:
        table = parquet.read(["id", "step", "changes"])
    is_match = numbers(pc.is_in(column(table.combine_chunks(), "id"), value_set=to_string_array([example])))
    rows = table.take(to_index_array(np.flatnonzero(is_match))).to_pylist()
    return [f"{row['step']}, {row['changes']}" for row in rows]


def _drops(dataset: Artifact, key: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the Drops whose column `key` is one of these ids.

    Their text is left out: it may be content that a step removed.
    """
    if not ids:
        return []
    rows: list[dict[str, Any]] = []
    value_set = to_string_array(ids)
    for file in origin_index.example_files(dataset, "drops/"):
        check_file(dataset, file.relative_to(dataset.path).as_posix())
        with pq.ParquetFile(file) as parquet:
            names = [name for name in parquet.schema_arrow.names if name not in ("text", "kept")]
            for group in range(parquet.num_row_groups):
                keys = parquet.read_row_group(group, columns=[key]).combine_chunks()
                is_match = numbers(pc.is_in(column(keys, key), value_set=value_set))
                if is_match.any():
                    table = parquet.read_row_group(group, columns=names)
                    rows += table.take(to_index_array(np.flatnonzero(is_match))).to_pylist()
    return rows


def count_duplicates(dataset: Artifact, ids: Sequence[str]) -> dict[str, int]:
    """Return the number of rows that were dropped as duplicates of each of these Examples, without zeros.

    Raises ArtifactError if a file of Drops was changed.
    """
    counts: Counter[str] = Counter()
    value_set = to_string_array(ids)
    for file in origin_index.example_files(dataset, "drops/"):
        check_file(dataset, file.relative_to(dataset.path).as_posix())
        with pq.ParquetFile(file) as parquet:
            kept = parquet.read(columns=["kept"]).combine_chunks()["kept"]
        counts.update(pc.filter(kept, pc.is_in(kept, value_set=value_set)).to_pylist())
    return dict(counts)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its empty columns."""
    content = []
    for part in message["content"]:
        content.append({name: value for name, value in part.items() if value is not None})
    fields = {
        name: value for name, value in message.items() if value not in (None, "") and name not in ("role", "content")
    }
    return {"role": message["role"], "content": content, **fields}


# role of a Dataset whose rows were trained on beside the task's own, against forgetting
REHEARSAL = "rehearsal"


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """One ancestor of an artefact.

    state: "opened", "moved away", or "changed" with the problem.
    """

    kind: str
    id: str
    path: str
    licence: str
    state: str


def walk(artifact: Artifact) -> list[Ancestor]:
    """Return the artefact's ancestors, nearest first. One that no longer exists stays in the list with that state."""
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
            steps.append(
                Ancestor(
                    kind=parent["kind"],
                    id=parent["id"],
                    path=parent.get("path", ""),
                    licence=UNKNOWN,
                    state="moved away",
                )
            )
            continue
        manifest = read_manifest(path)
        state = "opened"
        try:
            open_artifact(path)
        except ArtifactError as error:
            state = f"changed: {error.problem}"
        steps.append(
            Ancestor(
                kind=manifest["kind"],
                id=manifest["id"],
                path=str(path),
                licence=manifest.get("licence", UNKNOWN),
                state=state,
            )
        )
        waiting += [(grandparent, path) for grandparent in manifest.get("parents", [])]
    return steps


def find_parent(artifact: Artifact, kind: str) -> Artifact | None:
    """Return the nearest ancestor of a kind that still exists and is intact, or None."""
    for step in walk(artifact):
        if step.kind == kind and step.state == "opened":
            return open_artifact(step.path)
    return None


def training_datasets(artifact: Artifact) -> list[Artifact]:
    """Return the intact Datasets on which the artefact was trained, rehearsal included, nearest first.

    They include the training Datasets of each adapter that the tuning continued. The Datasets from which a Dataset was
    made are not included: they were not trained on.
    """
    steps = walk(artifact)
    tuned = [
        open_artifact(step.path) for step in steps if step.kind in ("adapter", "release") and step.state == "opened"
    ]
    dataset_ids = set()
    for item in (artifact, *tuned):
        parents = item.manifest.get("parents", [])
        dataset_ids |= {parent["id"] for parent in parents if parent["kind"] == "dataset"}
    return [open_artifact(step.path) for step in steps if step.id in dataset_ids and step.state == "opened"]


def find_all(artifact: Artifact, kind: str) -> list[Artifact]:
    """Return every ancestor of a kind that still exists and is intact, nearest first."""
    return [open_artifact(step.path) for step in walk(artifact) if step.kind == kind and step.state == "opened"]


def find_parents(artifact: Artifact, kind: str) -> list[Artifact]:
    """Return its direct parents of a kind that still exist and are intact; without any, the nearest ancestor.

    Rehearsal Datasets do not count as parents here.
    """
    parents = artifact.manifest.get("parents", [])
    parent_ids = {parent["id"] for parent in parents if parent["kind"] == kind and parent.get("role") != REHEARSAL}
    opened = [open_artifact(step.path) for step in walk(artifact) if step.id in parent_ids and step.state == "opened"]
    nearest = None if parent_ids else find_parent(artifact, kind)
    return opened or ([nearest] if nearest else [])


def test_datasets(artifact: Artifact) -> list[Artifact]:
    """Return the Datasets on whose test rows a release of the artefact must be measured; empty without a test split.

    They are its own Datasets with a test split. If none has one, as for a retrained version, they are the nearest
    Datasets from which its Datasets were made. Rehearsal does not count, nor do the Datasets of a version that the
    tuning continued: that version may have another task.
    """
    level = find_parents(artifact, "dataset")
    while level:
        if with_rows := [dataset for dataset in level if test_rows(dataset.manifest)]:
            return with_rows
        next_level: dict[str, Artifact] = {}
        for dataset in level:
            if any(parent["kind"] == "dataset" for parent in dataset.manifest["parents"]):
                next_level |= {parent.id: parent for parent in find_parents(dataset, "dataset")}
        level = list(next_level.values())
    return []


def inspect(path: Path | str, *, example: str = "") -> dict[str, Any]:
    """Return the facts about an artefact, or about one row of a Dataset.

    example: id of the row; the result then has its origins, ancestors and duplicates. Otherwise the result has the
        artefact's kind, id, licence, obligations, sources with digests and licences, and ancestors.
    """
    if example:
        return inspect_example(path, example)
    artifact = open_artifact(path)
    manifest = artifact.manifest
    keys = ("name", "version", "use", "created", "base", "counts", "gate", "versions", "metrics")
    sources = compliance.made_from(manifest)
    return {
        "kind": artifact.kind,
        "id": artifact.id,
        "path": str(artifact.path),
        "licence": artifact.licence,
        "licence_conflicts": manifest.get("licence_conflicts", compliance.conflicts(sources)),
        "obligations": compliance.obligations(sources),
        "parents": [dataclasses.asdict(step) for step in walk(artifact)],
        "sources": manifest.get("sources", []),
        **{key: manifest[key] for key in keys if key in manifest},
    }
