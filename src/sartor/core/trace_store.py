"""Store of what attribution computes from training rows: SARTOR_HOME/trace/ADAPTER_ID.

    origin.json       the Datasets and the path of the adapter
    calibration.json  measured trust of each method (trace/calibration.py)
    LABEL/            sketches of the rows at one set of weights (sketch_matrix.py), and those weights
    retrieval-KEY/    the rows and their index of words (trace/retrieval_store.py)

Sketches of gradients and states of training lead back to the rows' text, and the index holds it. So every folder has
mode 0700 and every file 0600. Nothing here is part of an artefact, and so of no Release or export. `sartor revoke`
lists the folders that it reaches; `sartor personal forget` and `sartor edge forget` remove them whole, since all of it
can be computed again.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, BusyError
from sartor.core.filesystem import PRIVATE, Content, make_private_folder, write_file_atomic
from sartor.core.home import home

TRACE = "trace"
ORIGIN = "origin.json"
_TRIES = 5
_RETRY_AFTER_S = 60.0


def adapter_id(artifact: Artifact) -> str:
    """Return the id under which an Adapter, or a Release made from it, has its folder."""
    parents = artifact.manifest.get("parents", []) if artifact.kind == "release" else []
    return next((str(parent["id"]) for parent in parents if parent["kind"] == "adapter"), artifact.id)


def trace_path(adapter_id: str) -> Path:
    """Return the path of an adapter's folder, which need not exist."""
    return home() / TRACE / adapter_id


def trace_folder(adapter_id: str) -> Path:
    """Return the folder of an adapter, created with mode 0700 if absent."""
    path = trace_path(adapter_id)
    make_private_folder(path)
    return path


def write_trace_file(file: Path, content: Content) -> None:
    """Write a file of the store atomically, with mode 0600; missing folders get 0700."""
    write_file_atomic(file, content, mode=PRIVATE)


def read_trace_json(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file of the store; None if it is absent. Raises ArtifactError if it is damaged."""
    try:
        fields = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file} cannot be read: {error}", f"rm {shlex.quote(str(file))}; it is computed again"
        ) from None
    if not isinstance(fields, dict):
        raise ArtifactError(f"{file} holds no JSON object", f"rm {shlex.quote(str(file))}; it is computed again")
    return fields


def record_origin(artifact: Artifact, dataset_ids: Sequence[str]) -> Path:
    """Add the Datasets from whose rows an adapter's folder is computed, and return the folder.

    Call it before anything computed from rows is written: by this file an erasure finds the folder.
    artifact: Adapter, or Release made from it.
    """
    folder = trace_folder(adapter_id(artifact))
    known = read_trace_json(folder / ORIGIN) or {}
    fields = {"datasets": sorted({*dataset_ids, *known.get("datasets", [])}), "path": str(artifact.path)}
    if known != fields:
        write_trace_file(folder / ORIGIN, json.dumps(fields).encode())
    return folder


def find_traces(
    *, adapter_ids: Collection[str] = (), dataset_ids: Collection[str] = (), below: Path | None = None
) -> list[Path]:
    """Return the folders of these adapters, and those computed from rows of these Datasets.

    below: also those of adapters at or below this path. A folder whose origin cannot be read is returned in any case.
    """
    root = home() / TRACE
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            origin = read_trace_json(folder / ORIGIN) or {}
        except ArtifactError:
            found.append(folder)
            continue
        path = Path(str(origin.get("path", "")))
        is_reached = folder.name in adapter_ids or not set(dataset_ids).isdisjoint(origin.get("datasets", []))
        if is_reached or (below is not None and path.is_absolute() and path.is_relative_to(below)):
            found.append(folder)
    return found


def remove_traces(folders: Sequence[Path]) -> list[str]:
    """Remove folders of the store, and return their paths.

    Raises BusyError if one cannot be removed, for instance because a preparation writes to it.
    """
    for folder in folders:
        for _ in range(_TRIES):
            shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise BusyError(
                f"{folder} cannot be removed: another process writes to it, or may not be removed",
                f"wait for a running `sartor trace`, or rm -r {folder}; then the same command again",
                _RETRY_AFTER_S,
            )
    return [str(folder) for folder in folders]
