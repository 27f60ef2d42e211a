"""SQLite catalogue of artefact locations; every stage writes to it, and `index` rebuilds it.

The manifests are authoritative; the catalogue only speeds up look-ups. A lost catalogue costs one `sartor index DIR`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sartor.core.artifacts import Artifact, artifact_of, kind_of, read_manifest
from sartor.core.errors import ArtifactError
from sartor.core.filesystem import touch_private
from sartor.core.home import home

_TABLES = """
create table if not exists artifacts (id text, path text primary key, kind text, created text);
create index if not exists artifacts_by_id on artifacts (id);
create table if not exists parents (child text, parent text, primary key (child, parent));
create table if not exists receipts (path text primary key);
"""


@dataclass(frozen=True)
class Descendant:
    """An artefact made from another one.

    state: "stands", or "not there" if it was moved, deleted, replaced or given away.
    """

    kind: str
    id: str
    path: str
    state: str


@contextlib.contextmanager
def _open() -> Iterator[sqlite3.Connection]:
    """Open a connection that commits at the end of the block.

    A file that is not a database is renamed to `.broken`, and ArtifactError is raised: the catalogue can be rebuilt.
    """
    file = home() / "catalogue.sqlite"
    touch_private(file)
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as connection, connection:
        try:
            connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            if "not a database" not in str(error) and "malformed" not in str(error):
                raise
            file.rename(file.with_suffix(".broken"))
            raise ArtifactError(
                f"{file} was no SQLite file; it is now {file.stem}.broken", "run `sartor index DIR`"
            ) from None
        yield connection


def register(artifact: Artifact) -> None:
    """Record the location of an artefact.

    A read-only home is ignored: it must not fail a finished run.
    """
    manifest = artifact.manifest
    with contextlib.suppress(sqlite3.OperationalError), _open() as connection:
        connection.execute(
            "insert or replace into artifacts values (?, ?, ?, ?)",
            (artifact.id, str(artifact.path), artifact.kind, manifest.get("created", "")),
        )
        connection.executemany(
            "insert or ignore into parents values (?, ?)",
            [(artifact.id, parent["id"]) for parent in manifest.get("parents", [])],
        )


def forget(path: Path) -> list[str]:
    """Delete the records of artefacts at or below a path, with `secure_delete`; return their ids."""
    prefix = f"{path.absolute()}/"
    if not (home() / "catalogue.sqlite").exists():
        return []
    with _open() as connection:
        connection.execute("pragma secure_delete = on")
        rows = connection.execute("select id, path from artifacts").fetchall()
        ids = [identity for identity, location in rows if f"{location}/".startswith(prefix)]
        for identity in ids:
            connection.execute("delete from parents where child = ? or parent = ?", (identity, identity))
            connection.execute("delete from artifacts where id = ?", (identity,))
    return ids


def register_receipts(folder: Path) -> None:
    """Record the folder of a served team's receipts, so that `revoke` finds the replies of a Release."""
    with contextlib.suppress(sqlite3.OperationalError), _open() as connection:
        connection.execute("insert or ignore into receipts values (?)", (str(folder.absolute()),))


def receipt_folders() -> list[Path]:
    """Return the folders in which teams on this machine keep, or kept, their receipts."""
    with _open() as connection:
        return [Path(row[0]) for row in connection.execute("select path from receipts order by path")]


def locate(artifact_id: str, *hints: str) -> Path | None:
    """Return the current path of the artefact with this id, or None.

    The `hints` are tried first, then the paths in the catalogue.
    """
    return next(copies(artifact_id, *hints), None)


def copies(artifact_id: str, *hints: str) -> Iterator[Path]:
    """Yield the paths with a manifest of this id: the `hints`, then those in the catalogue."""
    with _open() as connection:
        rows = connection.execute("select path from artifacts where id = ?", (artifact_id,)).fetchall()
    for text in dict.fromkeys([*hints, *(row[0] for row in rows)]):
        with contextlib.suppress(ArtifactError):
            if text and read_manifest(Path(text))["id"] == artifact_id:
                yield Path(text)


def children(artifact_id: str, kind: str) -> list[Path]:
    """Return existing artefacts of a kind that name this one as a parent, newest first."""
    query = (
        "select a.path from artifacts a join parents p on p.child = a.id "
        "where p.parent = ? and a.kind = ? order by a.created desc, a.rowid desc"
    )
    with _open() as connection:
        rows = connection.execute(query, (artifact_id, kind)).fetchall()
    return [Path(row[0]) for row in rows if kind_of(Path(row[0])) == kind]


def existing(kind: str) -> list[Path]:
    """Return the paths of all known artefacts of a kind that still exist."""
    with _open() as connection:
        rows = connection.execute("select path from artifacts where kind = ? order by path", (kind,)).fetchall()
    return [Path(row[0]) for row in rows if kind_of(Path(row[0])) == kind]


def descendants(artifact_id: str) -> list[Descendant]:
    """Return every artefact made from this one, directly or not, oldest first."""
    query = (
        "with recursive down(id) as (select ? union select p.child from parents p join down d on p.parent = d.id) "
        "select a.kind, a.id, a.path from artifacts a join down d on a.id = d.id where a.id != ? order by a.created, "
        "a.rowid"
    )
    with _open() as connection:
        rows = connection.execute(query, (artifact_id, artifact_id)).fetchall()
    result = []
    for kind, child, path in rows:
        state = "not there"
        with contextlib.suppress(ArtifactError):
            if read_manifest(Path(path))["id"] == child:
                state = "stands"
        result.append(Descendant(kind, child, path, state))
    return result


def index(root: Path) -> list[Artifact]:
    """Register every artefact below `root` and return them.

    Links are not followed; artefacts with unreadable manifests are left out.
    """
    result = []
    for folder in [root, *sorted(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
        # hidden folders are unfinished work of other writers; a Report inside a Release belongs to the Release
        is_hidden = any(part.startswith(".") for part in folder.relative_to(root).parts)
        is_nested = folder != root and kind_of(folder.parent) is not None
        if not (is_hidden or is_nested) and kind_of(folder) is not None:
            with contextlib.suppress(ArtifactError):
                artifact = artifact_of(folder.absolute(), read_manifest(folder))
                register(artifact)
                result.append(artifact)
    return result
