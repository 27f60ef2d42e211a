"""What was fitted, on disk: a file for each agent's part and one for the general prompts. Plain arrays, never pickled.

Where the engine's own base made the vectors, a file states by which arithmetic (core/numerics.py): one of another is made
anew.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.agents.routing.part import Part, as_arrays, from_arrays
from sartor.core.errors import ArtifactError
from sartor.core.filesystem import Content, write_file_atomic
from sartor.core.numerics import difference, numerics
from sartor.core.records import digest as digest_of

SCHEMA = 2
GENERAL = "general"


def save_part(folder: Path, encoder: str, part: Part, dtype: str = "") -> None:
    """Write one agent's part. dtype: in which Sartor's engine made the encoder's vectors; "" where it did not."""
    _save(_file(folder, encoder, part.digest), part.digest, as_arrays(part), {"ids": part.ids, **_made_by(dtype)})


def open_part(folder: Path, encoder: str, digest: str, dtype: str = "") -> Part | None:
    """The part of an agent with these exemplars; None if there is none, or of another arithmetic in `dtype`.

    Raises ArtifactError for a damaged one.
    """
    file = _file(folder, encoder, digest)
    found = _open(file, digest, dtype)
    if found is None:
        return None
    arrays, said = found
    try:
        return from_arrays(digest, tuple(said["ids"]), arrays)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(file, error) from None


def save_vectors(folder: Path, encoder: str, digest: str, vectors: Any, dtype: str = "") -> None:
    """Write an encoder's vectors of the general prompts. dtype: as in `save_part`."""
    _save(_file(folder, encoder, GENERAL), digest, {"vectors": vectors}, _made_by(dtype))


def open_vectors(folder: Path, encoder: str, digest: str, dtype: str = "") -> Any:
    """These; None if there are none of this digest and arithmetic. Raises ArtifactError for damaged ones."""
    found = _open(_file(folder, encoder, GENERAL), digest, dtype)
    return None if found is None else found[0].get("vectors")


def save_figures(folder: Path, encoder: str, figures: Mapping[str, Any]) -> None:
    """Write what a router gets right of what was held out, for people: `figures.json` beside its parts."""
    _write(_file(folder, encoder, GENERAL).with_name("figures.json"), json.dumps(figures, indent=1).encode())


def keep_only(folder: Path, digests: Collection[str]) -> None:
    """Remove the parts of agents that are no more: they hold prompts of theirs, as words."""
    kept = {GENERAL, *(_name(digest) for digest in digests)}
    for file in folder.glob("*/*.npz"):
        if file.stem not in kept:
            file.unlink(missing_ok=True)
    for file in (*folder.glob("*.npz"), *folder.glob("*.json")):  # of older versions
        file.unlink(missing_ok=True)


def _save(file: Path, digest: str, arrays: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    told = json.dumps({"schema": SCHEMA, "digest": digest, **said})
    _write(file, lambda stream: np.savez(stream, **arrays, said=np.frombuffer(told.encode(), dtype=np.uint8)))


def _made_by(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "numerics": numerics(dtype)} if dtype else {}


def _open(file: Path, digest: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if not file.is_file():
        return None
    try:
        # numpy leaves a damaged file open
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            found = dict(arrays)
        said = json.loads(found.pop("said").tobytes())
        is_current = not dtype or not difference(said.get("numerics"), str(said.get("dtype", dtype)))
        return (found, said) if is_current and (said["schema"], said["digest"]) == (SCHEMA, digest) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{file} cannot be read: {error}", f"rm {file}; it is made anew")


def _file(folder: Path, encoder: str, digest: str) -> Path:
    """Below a folder named for the encoder, which may be a path."""
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in encoder)[-64:]
    return folder / f"{stem}-{digest_of(encoder)[:8]}" / f"{_name(digest)}.npz"


def _write(file: Path, content: Content) -> None:
    """Write a file below a folder of the team's own."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file_atomic(file, content)


def _name(digest: str) -> str:
    return digest[:32]
