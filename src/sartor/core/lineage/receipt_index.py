"""SQLite index of receipts on disk.

    receipts-00000001.jsonl     one signed receipt per line; a line without a line end was cut by a kill and is ignored
    index.sqlite                id, release, agent, date -> segment, offset, length; it is rebuilt from the lines

`serving/receipts.py` writes receipts. This module holds the part that `revoke` needs too: the replies of a Release.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATTERN = "receipts-*.jsonl"
INDEX = "index.sqlite"
_TABLES = """
create table if not exists receipts (
  id text primary key, release_id text, agent text, created text, segment text, start integer, length integer
);
create index if not exists receipts_by_release on receipts (release_id);
create table if not exists segments (name text primary key, bytes integer, damaged integer);
"""
_PIECE = 1 << 24
_ASKED = 500  # releases per query


@dataclass(frozen=True)
class ReceiptLocation:
    """One receipt and the position of its line in its segment.

    start, length: bytes; the line end is not counted.
    """

    id: str
    release_id: str
    agent: str
    created: str
    segment: str
    start: int
    length: int


class ReceiptIndex:
    """Index of one folder. A file that is not a database is renamed to `.broken` and rebuilt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, locations: Sequence[ReceiptLocation]) -> None:
        """Add receipts just written to the end of one segment, and any earlier lines of it that are missing."""
        segment, start, end = locations[0].segment, locations[0].start, locations[-1].start + locations[-1].length + 1
        with self._open() as connection:
            row = connection.execute("select bytes from segments where name = ?", (segment,)).fetchone()
            if (row[0] if row else 0) < start:
                _read(connection, self.folder / segment, row[0] if row else 0)
            else:
                _note(connection, locations)
                _reach(connection, segment, end, 0)

    def find(self, identity: str) -> dict[str, Any] | None:
        """Return the receipt with this id as it was written, or None."""
        with self._open() as connection:
            row = connection.execute(
                "select segment, start, length from receipts where id = ?", (identity,)
            ).fetchone()
        if row is None:
            return None
        try:
            with (self.folder / row[0]).open("rb") as stream:
                stream.seek(row[1])
                fields = json.loads(stream.read(row[2]))
        except (OSError, ValueError):
            return None
        return fields if isinstance(fields, dict) and fields.get("id") == identity else None

    def of_releases(self, releases: Sequence[str]) -> Iterator[ReceiptLocation]:
        """Yield the receipts of all replies of these Releases, oldest first."""
        with self._open() as connection:
            for start in range(0, len(releases), _ASKED):
                batch = list(releases[start : start + _ASKED])
                placeholders = ", ".join("?" * len(batch))
                query = f"select * from receipts where release_id in ({placeholders}) order by created, rowid"
                yield from (ReceiptLocation(*row) for row in connection.execute(query, batch))

    def catch_up(self) -> int:
        """Index every complete line that is missing; return the number of invalid lines in all segments."""
        with self._open() as connection:
            segment_sizes = dict(connection.execute("select name, bytes from segments").fetchall())
            torn_count = 0
            for file in sorted(self.folder.glob(PATTERN)):
                if file.stat().st_size > segment_sizes.get(file.name, 0):
                    torn_count += _read(connection, file, segment_sizes.get(file.name, 0))
            return torn_count + int(connection.execute("select coalesce(sum(damaged), 0) from segments").fetchone()[0])

    def forget(self, segment: str) -> None:
        """Delete the receipts of a removed segment from the index."""
        with self._open() as connection:
            connection.execute("delete from receipts where segment = ?", (segment,))
            connection.execute("delete from segments where name = ?", (segment,))

    def leave_out(self, segment: str, starts: Sequence[int]) -> None:
        """Delete receipts whose lines were blanked, by their start, with `secure_delete`.

        No trace of them stays in the index's file.
        """
        self.catch_up()
        with self._open() as connection:
            connection.execute("pragma secure_delete = on")
            connection.executemany(
                "delete from receipts where segment = ? and start = ?", [(segment, start) for start in starts]
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open a connection that commits at the end of the block."""
        file = self.folder / INDEX
        with contextlib.closing(sqlite3.connect(file, timeout=10)) as connection:
            try:
                # only the lines must be durable: an index lost in a power cut is rebuilt from them
                connection.execute("pragma synchronous = off")
                connection.executescript(_TABLES)
            except sqlite3.DatabaseError as error:
                if "not a database" not in str(error) and "malformed" not in str(error):
                    raise
                self._set_aside(file)
                rebuilt = ReceiptIndex(self.folder)
                rebuilt.catch_up()
                with rebuilt._open() as other:
                    yield other
                return
            with connection:
                yield connection

    def _set_aside(self, file: Path) -> None:
        """Rename a damaged index and its journals, which SQLite would else apply to the new one.

        A process that still has it open writes to the renamed file; the new one reads every line again, so that
        nothing is lost. Of two processes that see the damage at once, the second may set aside a new index, which is
        then made once more.
        """
        for suffix in ("", "-journal", "-wal", "-shm"):
            part = file.with_name(file.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                part.rename(part.with_name(f"{file.stem}.broken{suffix}"))


def _note(connection: sqlite3.Connection, locations: Sequence[ReceiptLocation]) -> None:
    connection.executemany(
        "insert or ignore into receipts values (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                location.id,
                location.release_id,
                location.agent,
                location.created,
                location.segment,
                location.start,
                location.length,
            )
            for location in locations
        ],
    )


def _read(connection: sqlite3.Connection, file: Path, start: int) -> bool:
    """Index the complete lines of a segment from byte `start` on, a piece at a time.

    Returns whether the segment ends within a line.
    """
    damaged = 0
    with file.open("rb") as stream:
        stream.seek(start)
        rest = b""
        while piece := stream.read(_PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            locations = []
            for line in lines:
                if (location := _parse_line(line, file.name, start)) is not None:
                    locations.append(location)
                elif line.strip():  # a blank line is a deleted receipt
                    damaged += 1
                start += len(line) + 1
            _note(connection, locations)
    _reach(connection, file.name, start, damaged)
    return bool(rest)


def _reach(connection: sqlite3.Connection, segment: str, end: int, damaged: int) -> None:
    """Set a segment's progress: every line before byte `end` is indexed."""
    connection.execute(
        "insert into segments values (?, ?, ?) "
        "on conflict (name) do update set bytes = max(bytes, excluded.bytes), damaged = damaged + excluded.damaged",
        (segment, end, damaged),
    )


def _parse_line(line: bytes, segment: str, start: int) -> ReceiptLocation | None:
    try:
        fields = json.loads(line)
        texts = (fields["id"], fields["release"], fields["agent"], fields["created"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return ReceiptLocation(*texts, segment, start, len(line)) if all(isinstance(text, str) for text in texts) else None
