"""Durable journal of a participant, in SQLite.

WAL with synchronous=FULL: a commit is durable when it returns. Only the owner may read the file (0600), since it holds
a client's secrets of the round. Only one process may open it: two would answer twice. Secrets are overwritten when
their round ends.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from sartor.core.errors import BusyError, ConfigError, MissingError, StoreError
from sartor.core.filesystem import fsync_directory
from sartor.core.installation import upgrade_command

SCHEMA = 1
State = Literal["open", "done", "left out", "abandoned"]
_TABLES = """
CREATE TABLE IF NOT EXISTS rounds (
  digest TEXT PRIMARY KEY, run TEXT NOT NULL, number INTEGER NOT NULL, manifest BLOB NOT NULL, secret BLOB,
  state TEXT NOT NULL,
  UNIQUE (run, number));
CREATE TABLE IF NOT EXISTS entries (
  place INTEGER PRIMARY KEY, round TEXT NOT NULL REFERENCES rounds (digest), kind TEXT NOT NULL,
  content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS entries_of_round ON entries (round, place);
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, content BLOB NOT NULL);
"""


@dataclass(frozen=True)
class StoredRound:
    """Round as stored in the journal.

    secret: a client's root, until the round ends.
    """

    digest: str
    run: str
    number: int
    manifest: bytes
    secret: bytes
    state: State


class RoundJournal:
    """Journal of one participant.

    path: its file; None keeps it in memory, for simulations.
    Raises ConfigError for a file that others may read, BusyError if another process has it open, StoreError if it is
    no journal, and from every method MissingError if the disk cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._label = str(path or "the journal in memory")
        if path:
            _make(path)
        with self._translated_errors():
            self._base = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=0)
            try:
                self._base.executescript(
                    "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA "
                    "secure_delete=ON;"
                )
                self._check_schema()
                self._base.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version={SCHEMA}; COMMIT;")
            except sqlite3.Error:
                self._base.close()
                raise

    def __enter__(self) -> RoundJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def begin(self, stored_round: StoredRound) -> None:
        """Store a round, before any message is sent in it."""
        with self._transaction():
            self._base.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?)", tuple(vars(stored_round).values()))

    def find(self, digest: str) -> StoredRound | None:
        """Return the round with that digest, or None."""
        return next(self._rounds("digest = ?", digest), None)

    def rounds(self, run: str) -> list[StoredRound]:
        """Return the rounds of a run, newest first."""
        return list(self._rounds("run = ?", run))

    def latest(self) -> StoredRound | None:
        """Return the round that was begun last, of any run, or None."""
        return next(self._rounds("rowid = (SELECT MAX(rowid) FROM rounds)"), None)

    def add(self, digest: str, *entries: tuple[str, bytes]) -> None:
        """Append entries of a round, each a kind and its bytes: all of them, or none."""
        with self._transaction():
            self._add(digest, entries)

    def entries(self, digest: str) -> list[tuple[str, bytes]]:
        """Return the entries of a round in their order."""
        with self._translated_errors():
            return self._base.execute(
                "SELECT kind, content FROM entries WHERE round = ? ORDER BY place", (digest,)
            ).fetchall()

    def bytes_of(self, digest: str, kind: str) -> int:
        """Return the total size of all entries of this kind of an open round, without reading them."""
        with self._translated_errors():
            row = self._base.execute(
                "SELECT SUM(LENGTH(content)) FROM entries WHERE round = ? AND kind = ?", (digest, kind)
            ).fetchone()
        return int(row[0] or 0)

    def load(self, name: str) -> bytes | None:
        """Return the content stored under a name, or None."""
        with self._translated_errors():
            row = self._base.execute("SELECT content FROM kept WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def keep(self, name: str, content: bytes) -> None:
        """Store content under a name, replacing what was there."""
        with self._transaction():
            self._keep(name, content)

    def end(
        self,
        digest: str,
        state: State,
        keep: Mapping[str, bytes | None] | None = None,
        transcript: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        """End a round in one commit: delete its secret, and all its entries except the transcript.

        keep: name -> content to store, or None to delete it.
        """
        with self._transaction():
            self._base.execute("UPDATE rounds SET state = ?, secret = NULL WHERE digest = ?", (state, digest))
            self._base.execute("DELETE FROM entries WHERE round = ?", (digest,))
            self._add(digest, transcript)
            for name, content in (keep or {}).items():
                self._keep(name, content)
        with self._translated_errors():
            # overwritten content stays in the write-ahead log until the log is emptied
            self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _add(self, digest: str, entries: Iterable[tuple[str, bytes]]) -> None:
        self._base.executemany(
            "INSERT INTO entries (round, kind, content) VALUES (?, ?, ?)", [(digest, *entry) for entry in entries]
        )

    def _keep(self, name: str, content: bytes | None) -> None:
        if content is None:
            self._base.execute("DELETE FROM kept WHERE name = ?", (name,))
        else:
            self._base.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (name, content))

    def _rounds(self, where: str, *values: str) -> Iterator[StoredRound]:
        with self._translated_errors():
            rows = self._base.execute(
                f"SELECT digest, run, number, manifest, secret, state FROM rounds WHERE {where} ORDER BY number DESC",
                values,
            ).fetchall()
        return (
            StoredRound(digest, run, number, manifest=manifest, secret=secret or b"", state=state)
            for digest, run, number, manifest, secret, state in rows
        )

    def _check_schema(self) -> None:
        schema = self._base.execute("PRAGMA user_version").fetchone()[0]
        if schema not in (0, SCHEMA):
            self._base.close()
            raise StoreError(
                f"{self._label} has schema {schema}; this version of Sartor reads {SCHEMA}", upgrade_command()
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated_errors():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                # a commit that failed on the disk may have ended the transaction itself
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise BusyError(
                    f"another process has {self._label} open",
                    f"fuser {self._label} names it; the same command again once it has ended",
                ) from None
            raise MissingError(
                f"{self._label} could not be used: {error}", f"ls -l {self._label}; then the same command again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"{self._label} is no journal, or is damaged: {error}", f"cp BACKUP {self._label}"
            ) from error


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        fsync_directory(path.parent)
    except OSError as error:
        raise MissingError(
            f"{path} cannot be opened: {error.strerror}", f"ls -ld {path.parent}; df -h {path.parent}"
        ) from error
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path} can be read by others (mode {path.stat().st_mode & 0o777:o})",
            f"chmod 600 {shlex.quote(str(path))}",
        )
