"""SQL database with migrations, one writing transaction at a time, and typed errors.

The default is SQLite (write-ahead log, foreign keys, a busy timeout for locks); a URL selects Postgres. The URL holds
no secret: `${NAME}` in it is filled from the environment, and filled values are removed from every message. A `Form`
describes the content: the registry of a team, or a review queue. Rows are sealed by `row_seals`.
"""

from __future__ import annotations

import os
import re
import shlex
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from filelock import FileLock, Timeout
from sqlalchemy import URL, Column, Connection, Engine, NullPool, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from sartor.core.errors import ArtifactError, BusyError, ConfigError, MissingError, SartorError, missing_package
from sartor.core.filesystem import make_private_folder, touch_private
from sartor.core.installation import upgrade_command
from sartor.core.row_seals import RowSeals

BUSY_S = 5.0
# a committed change survives a power cut
SYNCHRONOUS = "full"
OPEN_S = 60.0
# limits after which a connection that is not established or gets no answer is given up, in seconds;
# tcp_user_timeout is in milliseconds
_LIBPQ = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PARTS = ("username", "password", "host", "database")
# arbitrary number of the Postgres advisory lock that is held during a migration
_ADVISORY = 0x5A2704
# alembic keeps the context of a running migration in a module global
_one_migration = threading.Lock()
# SHMSIZE: the first process to open the file rebuilds the index of the write-ahead log and finds no room for it
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True)
class Form:
    """Description of a database: its tables, migrations and names in messages.

    noun: name of the database in errors.
    given_as: prefix of its URL in remedies.
    migrations: directory of the Alembic revisions, whose env.py calls `run_revisions`.
    counter: column of the single row that every change locks.
    version_table: table in which Alembic stores the revision; two forms in one Postgres database need two.
    is_private: whether a new SQLite file, and its folder, are for their owner alone; several reviewers share a queue.
    """

    noun: str
    given_as: str
    migrations: Path
    counter: Column[int]
    version_table: str = "alembic_version"
    is_private: bool = False


class TransactionObserver(Protocol):
    """What takes part in every transaction of a database, as the registry's head does."""

    def begin(self, connection: Connection) -> None:
        """Begin, before the transaction reads anything."""

    def before_commit(self, connection: Connection) -> int:
        """Write what belongs to the change, and return its number."""

    def after_commit(self, number: int) -> None:
        """Take the number of a change that is committed."""


class Database:
    """Connections of one database.

    name: its URL without secrets.
    seals: seals of its rows; plain checksums until a key is set.
    observer: takes part in every transaction; None for nobody.
    """

    def __init__(self, url: URL, secrets: dict[str, str], name: str, form: Form) -> None:
        self.name, self.form = name, form
        self.seals = RowSeals()
        self.observer: TransactionObserver | None = None
        self._secrets = secrets
        self._is_sqlite = url.get_backend_name() == "sqlite"
        # opening SQLite takes a millisecond; a pooled connection would keep a file open that a restored copy replaced
        if self._is_sqlite:
            pool: dict[str, Any] = {"poolclass": NullPool}
        else:
            # a Postgres server that stops answering is an error after some seconds, not minutes
            is_libpq = url.get_driver_name() in ("psycopg", "psycopg2")
            connect_args = {name: value for name, value in _LIBPQ.items() if is_libpq and name not in url.query}
            pool = {"pool_pre_ping": True, "pool_size": 4, "connect_args": connect_args}
        self._engine: Engine = create_engine(url, execution_options={"sartor_database": self}, **pool)
        if self._is_sqlite:
            event.listen(self._engine, "connect", _prepare)
            event.listen(self._engine, "begin", _begin)
        self._changing = self._engine.execution_options(sartor_changes=True)
        # each transaction of SQLite sees one state
        self._reading = (
            self._engine if self._is_sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one consistent state. Raises as `change` does."""
        with self._typed(), self._reading.begin() as connection:
            if self.observer is not None:
                self.observer.begin(connection)
            yield connection

    @contextmanager
    def change(self) -> Iterator[Connection]:
        """Open a writing transaction that excludes other writers. It is committed whole or, on any error, rolled back.

        Raises BusyError (another process holds the lock), MissingError (disk full, no server), ArtifactError (damaged
        file) or ConfigError (not writable).
        """
        with self._typed():
            with self._changing.begin() as connection:
                if self.observer is not None:
                    self.observer.begin(connection)
                # on Postgres this row lock serialises writers, as BEGIN IMMEDIATE does on SQLite
                connection.execute(select(self.form.counter).with_for_update())
                yield connection
                number = self.observer.before_commit(connection) if self.observer is not None else 0
            if self.observer is not None:
                self.observer.after_commit(number)

    def migrate(self) -> None:
        """Upgrade the tables to the newest revision, in one transaction.

        If they are up to date, no write lock is taken, so readers do not wait for a writer.
        """
        config = Config()
        config.set_main_option("script_location", str(self.form.migrations).replace("%", "%%"))
        head = ScriptDirectory.from_config(config).get_current_head()
        with self._typed(), _one_migration, self._opening():
            with self._engine.begin() as connection:
                if self._revision(connection) == head:
                    return
            with self._changing.begin() as connection:
                if not self._is_sqlite:
                    connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _ADVISORY})
                config.attributes |= {"connection": connection, "version_table": self.form.version_table}
                if (revision := self._revision(connection)) != head:
                    self._upgrade(config, revision)

    def _revision(self, connection: Connection) -> str | None:
        """Return the current revision of the tables; None if there are none."""
        opts = {"version_table": self.form.version_table}
        return MigrationContext.configure(connection, opts=opts).get_current_revision()

    def _upgrade(self, config: Config, revision: str | None) -> None:
        try:
            command.upgrade(config, "head")
        except CommandError:
            raise ArtifactError(
                f"the {self.form.noun} {self.name} has the form {revision!r}, which this version of Sartor does not "
                "know",
                upgrade_command(),
            ) from None

    def _opening(self) -> AbstractContextManager[Any]:
        """Return a lock held while SQLite opens the file and switches it to the write-ahead log.

        SQLite does not wait for a lock during that switch, so only one process may do it at a time.
        """
        file = self._engine.url.database
        if not self._is_sqlite or file is None:
            return nullcontext()
        try:
            if self.form.is_private:
                make_private_folder(Path(file).parent)
                touch_private(Path(file))
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            return FileLock(f"{file}.lock").acquire(timeout=OPEN_S)
        except Timeout:
            raise BusyError(
                f"another process has been opening {file} for {OPEN_S:.0f} s",
                f"fuser {file} names it; the same command again once it has ended, or after kill PID",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be made: {error.strerror}", "give a directory that can be written to"
            ) from None

    def scrub(self, *tables: str) -> str:
        """Remove all traces of deleted rows from the file; return a sentence on what was done.

        SQLite rewrites the whole file without free pages and empties the write-ahead log.
        tables: tables that Postgres rewrites.
        Raises as `change` does.
        """
        if self._is_sqlite:
            return scrub_file(Path(str(self._engine.url.database)))
        with self._typed(), self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in tables:
                connection.exec_driver_sql(f"vacuum full {table}")
        return (
            f"vacuum full of {', '.join(tables)}; the server's own log (WAL), its replicas and archives are not "
            "reached"
        )

    @property
    def directory(self) -> Path | None:
        """Directory of a SQLite file; None for a server's database."""
        return Path(str(self._engine.url.database)).parent if self._is_sqlite else None

    @property
    def files(self) -> list[Path]:
        """Existing files of a SQLite database; empty for a server's."""
        if not self._is_sqlite:
            return []
        file = Path(str(self._engine.url.database))
        return [item for item in (file, Path(f"{file}-wal"), Path(f"{file}-shm")) if item.exists()]

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise self._fault(error.orig if isinstance(error, DBAPIError) else error) from None

    def _fault(self, error: BaseException | None) -> SartorError:
        """Return the SartorError for a driver's error, with the secrets removed from its message."""
        message, file = str(error), self._engine.url.database or ""
        for name, value in self._secrets.items():
            message, file = (text.replace(value, f"${{{name}}}") for text in (message, file))
        code = getattr(error, "sqlite_errorcode", 0)  # only sqlite3's errors have one
        primary = code & 0xFF
        subject = f"the {self.form.noun} {self.name}"
        if primary in _BUSY:
            return BusyError(
                f"{subject} is locked by another process: {message}",
                f"fuser {file} names it; the same command again once it has ended",
                BUSY_S,
            )
        if primary in _DAMAGED or (
            primary == sqlite3.SQLITE_ERROR and message.startswith("no such")
        ):  # the file was overwritten or emptied
            return ArtifactError(
                f"{subject} is damaged: {message}",
                f"cp BACKUP {shlex.quote(str(file))}; or mv {shlex.quote(str(file))} ELSEWHERE, and start anew",
            )
        has_file = Path(self._engine.url.database or "").exists()
        if primary == sqlite3.SQLITE_READONLY or (primary == sqlite3.SQLITE_CANTOPEN and not has_file):
            return ConfigError(f"{subject} cannot be written to: {message}", "give a directory that can be written to")
        if code in _FULL or primary == sqlite3.SQLITE_FULL or "53100" in str(getattr(error, "sqlstate", "")):
            return MissingError(
                f"the disk of {subject} is full: {message}; nothing was changed",
                "df -h shows the full disk; remove files from it, then the same command again",
            )
        first_command = f"ls -l {file}" if self._is_sqlite else "start the database server"
        return MissingError(
            f"{subject} cannot be used: {message}; nothing was changed",
            f"{first_command}; then the same command again",
        )


def scrub_file(file: Path) -> str:
    """Rewrite a SQLite file without its free pages and empty its write-ahead log.

    Returns a sentence on what was done. Raises BusyError if other processes keep reading or writing it.
    """
    with closing(sqlite3.connect(file, timeout=BUSY_S, isolation_level=None)) as connection:
        try:
            connection.execute("vacuum")
            is_busy = next(connection.execute("pragma wal_checkpoint(truncate)"))[0]
        except sqlite3.OperationalError as error:
            raise BusyError(
                f"{file} is used by another process: {error}",
                f"fuser {file} names it; stop it, then the same command again",
                BUSY_S,
            ) from None
    if is_busy:
        raise BusyError(
            f"the write-ahead log of {file} is read by another process",
            f"fuser {file} names it; stop it, then the same command again",
            BUSY_S,
        )
    return "rewritten without free pages (vacuum), write-ahead log emptied"


def open_database(url: str, form: Form) -> Database:
    """Open the database at a SQLAlchemy URL and upgrade its tables. Two processes may do so at once.

    Raises ConfigError for an invalid URL or one that contains a password, ExtraError for a driver that is not
    installed, ArtifactError for a database of a newer Sartor, and the errors of `Database.change`.
    """
    parsed, secrets, name = _filled(url, form)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"the {form.noun} {name} is neither SQLite nor Postgres", f"{form.given_as}postgresql+psycopg://..."
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        problem = f"a {form.noun} in memory would be another one for each connection"
        raise ConfigError(problem, f"{form.given_as}sqlite:///{form.noun.split()[0]}.sqlite")
    try:
        database = Database(parsed, secrets, name, form)
    except ModuleNotFoundError as error:
        raise missing_package(str(error.name)) from None
    except NoSuchModuleError:
        problem = f"the {form.noun} {name} names a driver that SQLAlchemy lacks"
        raise ConfigError(problem, f"{form.given_as}postgresql+psycopg://...") from None
    database.migrate()
    return database


def _filled(url: str, form: Form) -> tuple[URL, dict[str, str], str]:
    """Return the URL with every ${NAME} filled in, the filled values by name, and the URL to show."""
    # in quotes, or a shell would fill the password in
    remedy = f"{form.given_as}'postgresql+psycopg://team:${{DB_PASSWORD}}@host/db'"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"the URL of the {form.noun} is none that SQLAlchemy knows", remedy) from None
    passwords = [parsed.password, *(value for key, value in parsed.query.items() if "pass" in key.lower())]
    if any(secret and not _NAME.fullmatch(str(secret)) for secret in passwords):
        raise ConfigError(f"the URL of the {form.noun} spells out a password", remedy)
    secrets: dict[str, str] = {}

    def look_up(match: re.Match[str]) -> str:
        name = match[1]
        secret = os.environ.get(name)
        if not secret:
            raise ConfigError(f"the URL of the {form.noun} names ${{{name}}}, which is not set", f"export {name}=...")
        secrets[name] = secret
        return secret

    def fill(part: str) -> str:
        return _NAME.sub(look_up, part)

    parts = {part: fill(value) for part in _PARTS if (value := getattr(parsed, part))}
    query = {key: fill(value) if isinstance(value, str) else value for key, value in parsed.query.items()}
    filled = URL.create(parsed.drivername, port=parsed.port, query=query, **parts)
    return filled, secrets, url


def run_revisions() -> None:
    """Run the migrations on the connection and in the transaction of `migrate`; a Form's env.py calls it."""
    attributes = context.config.attributes
    context.configure(connection=attributes["connection"], version_table=attributes["version_table"])
    context.run_migrations()


def _prepare(connection: sqlite3.Connection, record: object) -> None:
    """Configure a new SQLite connection.

    The driver's own transactions are switched off: only `_begin` starts them, so that they include DDL too.
    """
    connection.isolation_level = None
    # invalid UTF-8 in one row must not prevent reading the others; the row's checksum detects it
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    busy, synchronous = f"busy_timeout = {BUSY_S * 1000:.0f}", f"synchronous = {SYNCHRONOUS}"
    for pragma in (busy, "journal_mode = wal", "foreign_keys = on", synchronous):
        connection.execute(f"pragma {pragma}").fetchall()


def _begin(connection: Connection) -> None:
    changes = connection.get_execution_options().get("sartor_changes", False)
    connection.exec_driver_sql("begin immediate" if changes else "begin")


def seals_of(connection: Connection) -> RowSeals:
    """Return the seals of the database to which a connection belongs."""
    return cast(Database, connection.get_execution_options()["sartor_database"]).seals


def sealed(connection: Connection, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with its seal, to be written through `connection`."""
    return seals_of(connection).sealed(row)
