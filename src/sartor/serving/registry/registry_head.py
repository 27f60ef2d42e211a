"""Head of the registry: which rows are newest, so that an old sealed row does not count.

The table `heads` has one row for each sealed table, with the seal of every current row by a digest of its key, and a
root with the seals of those rows, the newest generation, and a number that rises with every change. Rows of the log
are history and count whenever they were written; what is derived from them (freezes, forgotten users, the mark of API
keys, the newest event of each agent) stands in the head of the log, so that nothing is undone by events that are put
back, inserted or removed.

    STATE/registry.head     {"number"}      the highest number that this machine has seen; no database goes below it

The file is written after the commit: a process that is killed in between leaves it one behind, and the next one that
reads the registry raises it. A registry without any row is a new one, and continues the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select

from sartor.core import records
from sartor.core.database import sealed, seals_of
from sartor.core.errors import ArtifactError
from sartor.core.filesystem import PRIVATE, write_file_atomic
from sartor.core.row_seals import COLUMN, RowSeals

FILE = "registry.head"
# changes that begin or end a trial or a watch; the newest of them says whether it is frozen
FROZEN = "frozen"
ROLLOUT_CHANGES = (FROZEN, "promoted", "rolled back", "canary", "shadow", "removed")
FORGOTTEN = "person forgotten"
KEYED, UNKEYED = "keys asked for", "keys removed"

_ROOT = "root"
_INFO = "sartor_registry_head"
# hex digits of a row's key and seal in a head; both are HMACs that only the holder of the key can compute
_KEY_DIGITS, _SEAL_DIGITS = 16, 32


@dataclass
class LogState:
    """What the events of the log amount to.

    newest: agent -> seal of its newest event that describes it.
    frozen: agent -> version and reason of the freeze that holds.
    forgotten: generation, in decimal -> digest of the person who was forgotten by it.
    mark: KEYED, UNKEYED or "".
    """

    newest: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, tuple[str, str]] = field(default_factory=dict)
    forgotten: dict[str, str] = field(default_factory=dict)
    mark: str = ""

    def add(self, event: Mapping[str, Any], seal: str) -> None:
        """Take the newest event, as a row."""
        agent, action = str(event["agent"]), str(event["what"])
        if agent and event["became"] != "{}":
            self.newest[agent] = _short(seal)
        if agent and action in ROLLOUT_CHANGES:
            self.frozen.pop(agent, None)
            if action == FROZEN:
                self.frozen[agent] = (str(event["version"]), str(event["why"]))
        elif not agent and action in (KEYED, UNKEYED):
            self.mark = action
        elif action == FORGOTTEN:
            self.forgotten[str(event["generation"])] = str(json.loads(event["numbers"])["person"])

    @classmethod
    def of_log(cls, connection: Connection, events: Table, seals: RowSeals) -> LogState:
        """Derive the state from the intact events of the whole log."""
        state = cls()
        for row in connection.execute(select(events).order_by(events.c.generation, events.c.id)).mappings():
            event = {name: value for name, value in dict(row).items() if name != "id"}
            if seals.is_whole(event):
                state.add(event, event[COLUMN])
        return state


class HeadTransaction:
    """Head of the registry within one transaction; tables are read when they are needed."""

    def __init__(self, head: RegistryHead, connection: Connection, floor: int) -> None:
        self._head = head
        self._connection = connection
        self._floor = floor
        self._tables: dict[str, dict[str, str]] = {}
        self._log: LogState | None = None
        self._changed: set[str] = set()
        self._is_read = False
        self.number = 0
        self._generation = 0
        self._table_seals: dict[str, str] = {}

    @property
    def generation(self) -> int:
        """Newest generation; a change sets it."""
        self._read_root()
        return self._generation

    @generation.setter
    def generation(self, generation: int) -> None:
        self._read_root()
        self._generation = generation
        self._changed.add(_ROOT)

    @property
    def log(self) -> LogState:
        """State of the log. Whoever changes it calls `add_event`."""
        if self._log is None:
            fields = self._entries(self._head.events.name)
            self._log = LogState(**fields) if fields else LogState()
        return self._log

    def is_current(self, table: Table, row: Mapping[str, Any]) -> bool:
        """Return whether an intact row is the newest one of its key."""
        return self._rows(table).get(self._key(table, row)) == _short(str(row[COLUMN]))

    def has_row(self, table: Table, **key: Any) -> bool:
        """Return whether there must be a row with this key."""
        return self._key(table, key) in self._rows(table)

    def count(self, table: Table) -> int:
        """Return the number of rows that there must be."""
        return len(self._rows(table))

    def put(self, table: Table, row: Mapping[str, Any]) -> None:
        """Take a sealed row that is being written."""
        self._rows(table)[self._key(table, row)] = _short(str(row[COLUMN]))
        self._changed |= {_ROOT, table.name}

    def drop(self, table: Table, row: Mapping[str, Any]) -> None:
        """Take the key of a row that is being removed."""
        self._rows(table).pop(self._key(table, row), None)
        self._changed |= {_ROOT, table.name}

    def write_event(self, event: Mapping[str, Any]) -> None:
        """Seal an event and write it into the log."""
        row = sealed(self._connection, event)
        self._connection.execute(insert(self._head.events).values(row))
        self.log.add(row, row[COLUMN])
        self._changed |= {_ROOT, self._head.events.name}

    def is_missing(self) -> bool:
        """Return whether there are rows and no root. Raises ArtifactError if this machine has seen one."""
        self._read_root()
        return self._stored(_ROOT) is None and self._has_rows()

    def rebuild(self, generation: int) -> None:
        """Take every intact row of the registry for the newest, whatever the head was.

        generation: of the counter; that of the log counts if it is higher.
        """
        seals = seals_of(self._connection)
        root = self._stored(_ROOT)
        # a number counts by the seal of its row alone
        number = int(root["number"]) if root is not None and seals.is_whole(root) else 0
        self.number, self._is_read = max(number, self._floor), True
        logged = self._connection.execute(select(func.max(self._head.events.c.generation))).scalar()
        self._generation = max(generation, int(logged or 0))
        self._log = LogState.of_log(self._connection, self._head.events, seals)
        for table in self._head.tables:
            rows = [dict(row) for row in self._connection.execute(select(table)).mappings()]
            self._tables[table.name] = {
                self._key(table, row): _short(row[COLUMN]) for row in rows if seals.is_whole(row)
            }
        self._changed = {_ROOT, self._head.events.name, *self._tables}

    def save(self) -> int:
        """Write what has changed, and return the number of the head."""
        if self._changed:
            self._read_root()
            self.number += 1
            for name in sorted(self._changed - {_ROOT}):
                entries = asdict(self.log) if name == self._head.events.name else self._tables[name]
                self._table_seals[name] = self._write(name, entries)
            self._write(_ROOT, {"generation": self._generation, "tables": self._table_seals})
            self._changed = set()
        return self.number

    def _rows(self, table: Table) -> dict[str, str]:
        if table.name not in self._tables:
            self._tables[table.name] = self._entries(table.name)
        return self._tables[table.name]

    def _entries(self, name: str) -> dict[str, Any]:
        self._read_root()
        if name not in self._table_seals:
            return {}
        row = self._stored(name)
        if row is None or row[COLUMN] != self._table_seals[name] or not seals_of(self._connection).is_whole(row):
            raise self._refused(f"the head of its table {name} was changed or put back from outside")
        entries: dict[str, Any] = json.loads(row["entries"])
        return entries

    def _read_root(self) -> None:
        if self._is_read:
            return
        row = self._stored(_ROOT)
        if row is None:
            if self._floor and self._has_rows():
                raise self._refused("its head was removed from outside")
            self.number = self._floor
        elif not seals_of(self._connection).is_whole(row):
            raise self._refused("its head was changed from outside")
        elif int(row["number"]) < self._floor:
            change = f"change {row['number']}; change {self._floor} was seen here"
            raise self._refused(f"it was put back to an earlier state, {change}")
        else:
            fields = json.loads(row["entries"])
            self.number = int(row["number"])
            self._generation, self._table_seals = int(fields["generation"]), dict(fields["tables"])
            self._head.saw(self.number)
        self._is_read = True

    def _has_rows(self) -> bool:
        tables = (*self._head.tables, self._head.events)
        return any(self._connection.execute(select(table.c[COLUMN]).limit(1)).first() for table in tables)

    def _stored(self, name: str) -> dict[str, Any] | None:
        heads = self._head.heads
        row = self._connection.execute(select(heads).where(heads.c.name == name)).mappings().first()
        return None if row is None else dict(row)

    def _write(self, name: str, entries: Mapping[str, Any]) -> str:
        content = records.canonical(dict(entries)).decode()
        row = sealed(self._connection, {"name": name, "number": self.number, "entries": content})
        heads = self._head.heads
        if not self._connection.execute(heads.update().where(heads.c.name == name).values(row)).rowcount:
            self._connection.execute(insert(heads).values(row))
        return str(row[COLUMN])

    def _key(self, table: Table, row: Mapping[str, Any]) -> str:
        key = {column.name: row[column.name] for column in table.primary_key.columns}
        return seals_of(self._connection).seal({"table": table.name, **key})[-64:][:_KEY_DIGITS]

    def _refused(self, problem: str) -> ArtifactError:
        return ArtifactError(
            f"the registry {self._head.name} is not believed: {problem}",
            "cp BACKUP the newest copy of it; if you restored it yourself: sartor agents reseal, which trusts every "
            "row as it is",
        )


class RegistryHead:
    """Head of one registry. Safe to use from several threads and processes.

    heads: the table of the heads. tables: those whose rows are bound to it. events: the log.
    name: of the database, without secrets.
    state: the state directory; without one the number is kept in memory alone.
    """

    def __init__(self, heads: Table, tables: Sequence[Table], events: Table, name: str, state: Path | None) -> None:
        self.heads, self.tables, self.events, self.name = heads, tables, events, name
        self._file = state / FILE if state is not None else None
        self._seen = 0

    def begin(self, connection: Connection) -> None:
        """Begin a transaction. The file is read first: a snapshot that begins later cannot be older than it."""
        floor = max(self._seen, self._stored_number())
        connection.info[_INFO] = HeadTransaction(self, connection, floor)

    def before_commit(self, connection: Connection) -> int:
        """Write the changes of the transaction, and return the number of the head."""
        return transaction_of(connection).save()

    def after_commit(self, number: int) -> None:
        """Keep the number of a head that is committed."""
        self.saw(number)

    def saw(self, number: int) -> None:
        """Raise the highest number that was seen, here and in the file. A full disk leaves the file as it is."""
        self._seen = max(self._seen, number)
        if self._file is None or self._stored_number() >= number:
            return
        if not self._file.parent.is_dir():  # a state directory that was removed is not created again
            return
        try:
            # not durable: after a power cut the file may be behind the database, never before it
            write_file_atomic(self._file, records.canonical({"number": number}), mode=PRIVATE, durable=False)
        except OSError:
            return

    def _stored_number(self) -> int:
        if self._file is None:
            return 0
        try:
            return int(json.loads(self._file.read_bytes())["number"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _short(seal: str) -> str:
    """Return the digits of a seal that a head has."""
    return seal[-64:][:_SEAL_DIGITS]


def transaction_of(connection: Connection) -> HeadTransaction:
    """Return the head of the registry within a transaction."""
    head: HeadTransaction = connection.info[_INFO]
    return head


def is_current(connection: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Return whether a row that was read through `connection` is intact, and the newest one of its key."""
    return seals_of(connection).is_whole(row) and transaction_of(connection).is_current(table, row)


def put_row(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    """Seal and write a row, replacing the one with its key."""
    values = sealed(connection, row)
    key = {column.name: row[column.name] for column in table.primary_key.columns}
    if not connection.execute(table.update().filter_by(**key).values(values)).rowcount:
        connection.execute(insert(table).values(values))
    transaction_of(connection).put(table, values)


def remove_rows(connection: Connection, table: Table, **where: Any) -> int:
    """Remove the rows with these values, all without any, and return their number."""
    columns = select(*table.primary_key.columns).filter_by(**where)
    for row in connection.execute(columns).mappings().all():
        transaction_of(connection).drop(table, dict(row))
    return connection.execute(delete(table).filter_by(**where)).rowcount
