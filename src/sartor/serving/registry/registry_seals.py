"""Key of the registry's row seals, STATE/registry.key, and the change from plain checksums to it.

The first start after an upgrade creates the key and seals every intact row, in one transaction. Until it is committed
the key is called `registry.key.new`: a start that was killed is repeated by the next one. Once `registry.key` exists,
no plain checksum counts ever again, so that nobody can bring a registry back to them.

Servers of one team share the key: those with one STATE do so by themselves. A server with another STATE and the same
Postgres database needs a copy, and is refused without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Connection, Table, func, select

from sartor.core.database import Database
from sartor.core.errors import ConfigError
from sartor.core.filesystem import FileSystem
from sartor.core.row_seals import COLUMN, PREFIX, RowSeals, create_key, read_key
from sartor.serving.registry.registry_head import RegistryHead, transaction_of

FILE = "registry.key"


EVENTS = "events"
# the trigger of migration 0001 that is missing while the events are sealed anew
_KEEP_SQLITE = (
    "create trigger events_update before update on events begin select raise(abort, 'the log of events is "
    "append-only'); end"
)


def use_key(database: Database, head: RegistryHead, state: Path, tables: Sequence[Table]) -> None:
    """Seal the rows of a registry by the key of a state directory from now on; create it at the first start.

    head: its numbers are kept in the state directory.
    Raises ConfigError if the key is lost, is another one, or can be read by others; ArtifactError if the head was
    changed, or put back to an earlier state.
    """
    file = state / FILE
    if not file.exists():
        _introduce(database, file, tables)
    seals = RowSeals(read_key(file))
    with database.read() as connection:
        used = _seal_ids(connection, tables)
    if used and seals.id not in used:
        raise _other_key(database, f"another key than {file}", file)
    database.seals, database.observer = seals, head
    _bind_rows(database)


def use_no_key(database: Database, head: RegistryHead, tables: Sequence[Table]) -> None:
    """Keep plain checksums, for a database that is opened without a state directory.

    Raises ConfigError if rows are sealed by a key.
    """
    with database.read() as connection:
        used = _seal_ids(connection, tables)
    if used:
        raise ConfigError(
            f"the rows of the registry {database.name} are sealed by a key, and no state directory was given",
            "Registry.of(team), or Registry.open(url, state)",
        )
    database.observer = head
    _bind_rows(database)


def _bind_rows(database: Database) -> None:
    """Make the head of a registry of an older version, whose intact rows are trusted that once."""
    with database.read() as connection:
        if not transaction_of(connection).is_missing():
            return
    with database.change() as connection:
        if transaction_of(connection).is_missing():
            transaction_of(connection).rebuild(_counter(database, connection))


def _counter(database: Database, connection: Connection) -> int:
    return int(connection.execute(select(database.form.counter)).scalar_one_or_none() or 0)


def reseal(database: Database, head: RegistryHead, state: Path, tables: Sequence[Table]) -> dict[str, int]:
    """Seal every row as it is now, whoever wrote it, and return the number of rows by table.

    For a lost key and for a restored copy. The caller has made sure that nobody changed the rows.
    """
    database.observer = head
    with database.change() as connection:
        database.seals = RowSeals(create_key(state / FILE))
        counts = _write_seals(connection, database.seals, tables, every=True)
        transaction_of(connection).rebuild(_counter(database, connection))
    return counts


def _introduce(database: Database, file: Path, tables: Sequence[Table]) -> None:
    pending = file.with_name(f"{FILE}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # the database's lock ends with the commit, before the key has its name
        with FileLock(f"{file}.lock"):
            if file.exists():  # another process was first
                return
            _seal_first(database, pending, file, tables)
            FileSystem().take_name(pending, file)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be made: {error.strerror}", f"give {file.parent} to the user who starts Sartor"
        ) from None


def _seal_first(database: Database, pending: Path, file: Path, tables: Sequence[Table]) -> None:
    """Create the key as `pending`, and seal the rows by it in one transaction."""
    with database.change() as connection:
        used = _seal_ids(connection, tables)
        if used and not pending.exists():
            raise _other_key(database, f"a key that {file.parent} lacks", file)
        database.seals = seals = RowSeals(create_key(pending))
        if used - {seals.id}:
            raise _other_key(database, f"another key than {pending}", file)
        if not used:
            _write_seals(connection, seals, tables, every=False)
            transaction_of(connection).rebuild(_counter(database, connection))


def _other_key(database: Database, key: str, file: Path) -> ConfigError:
    return ConfigError(
        f"the rows of the registry {database.name} are sealed by {key}",
        f"cp BACKUP/{FILE} {file}, from a backup or from another server of the team; if it is lost: sartor agents "
        "reseal, which trusts every row as it is",
    )


def _seal_ids(connection: Connection, tables: Sequence[Table]) -> set[str]:
    """Return the ids of the keys by which rows are sealed."""
    ids: set[str] = set()
    for table in tables:
        start = func.substr(table.c[COLUMN], 1, len(PREFIX) + 17)
        rows = connection.execute(select(start).where(table.c[COLUMN].like(f"{PREFIX}:%")).distinct()).scalars()
        ids |= {str(row).split(":")[1] for row in rows}
    return ids


def _write_seals(connection: Connection, seals: RowSeals, tables: Sequence[Table], *, every: bool) -> dict[str, int]:
    """Seal the rows that are intact by their plain checksum, or every row."""
    plain = RowSeals()
    counts = {}
    _allow_event_changes(connection, is_allowed=True)
    for table in tables:
        counts[table.name] = 0
        for row in [dict(row) for row in connection.execute(select(table)).mappings()]:
            content = _content(table, row)
            if every or plain.is_whole(content):
                key = {column.name: row[column.name] for column in table.primary_key}
                connection.execute(table.update().filter_by(**key).values({COLUMN: seals.seal(content)}))
                counts[table.name] += 1
    _allow_event_changes(connection, is_allowed=False)
    return counts


def _content(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a seal covers: the number of an event is assigned after it is sealed."""
    is_numbered = table.name == EVENTS
    return {name: value for name, value in row.items() if not (is_numbered and name == "id")}


def _allow_event_changes(connection: Connection, *, is_allowed: bool) -> None:
    """Switch the trigger off and on that keeps events from being changed, within this transaction."""
    if connection.dialect.name == "sqlite":
        if is_allowed:
            connection.exec_driver_sql("drop trigger if exists events_update")
        else:
            connection.exec_driver_sql(_KEEP_SQLITE)
    else:
        switch = "disable" if is_allowed else "enable"
        connection.exec_driver_sql(f"alter table events {switch} trigger events_kept")
