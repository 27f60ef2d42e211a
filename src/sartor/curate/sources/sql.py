"""Rows of one read-only SQL query: `sql:URL#QUERY`.

SQLAlchemy streams the result of one reading statement in a read-only transaction, which is rolled back.

The URL holds no secret: `${NAME}` in it is filled from the environment when the database is opened, and the filled
values are removed from every message.
"""

from __future__ import annotations

import datetime
import decimal
import os
import re
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from sartor.core.errors import ConfigError, HubError, missing_package
from sartor.core.installation import pip_command
from sartor.core.records import MalformedRow
from sartor.curate.sources.row_readers import Read, drop_nulls

_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_WHOLE_NAME = re.compile(r"(?:\$\{[A-Za-z_][A-Za-z0-9_]*\})+")
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|api_?key|credential|private_?key", re.I)
_SECRET_IN_DSN = re.compile(r"(?:password|passwd|pwd|secret|token)\s*=\s*(?!\$\{)[^;\s]", re.I)
# quoted text, quoted names and comments, inside which semicolons and keywords have no meaning
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/", re.S)
_READS = ("select", "with", "values", "table", "show", "from")
_SQLITE_READS = (
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_TRANSACTION,
)
STREAM_ROWS = 1000


def split(path: str) -> tuple[str, str]:
    """Split `sql:URL#QUERY` into (URL, query).

    Raises ConfigError for a secret in the URL, and for a query that does not only read.
    """
    url, mark, query = path.removeprefix("sql:").partition("#")
    if not mark or not query.strip() or not url.strip():
        raise ConfigError(
            "a SQL source is sql:URL#QUERY; one of the two is missing", "path: 'sql:sqlite:///shop.db#SELECT ...'"
        )
    _refuse_secrets(url)
    bare = _QUOTED.sub(" ", query).strip().rstrip(";").strip()
    word = re.match(r"[(\s]*([A-Za-z]*)", bare)
    into = re.search(r"\binto\b", bare, re.I)  # SELECT INTO creates a table, INTO OUTFILE a file on the server
    if into or ";" in bare or word is None or word[1].lower() not in _READS:
        raise ConfigError(
            f"the query of a SQL source must be one statement that reads: {query.strip()[:80]!r}",
            "path: 'sql:URL#SELECT question, answer FROM faq'",
        )
    return url, query


def _refuse_secrets(url: str) -> None:
    """Raise ConfigError if a URL spells out a secret, without showing the URL."""
    remedy = (
        "put it into the environment, and ${NAME} in its place: "
        "sql:postgresql://reader:${DB_PASSWORD}@host/shop#SELECT ..."
    )
    if _WHOLE_NAME.fullmatch(url):
        return
    parsed = _parse(url)
    if parsed.password and not _WHOLE_NAME.fullmatch(str(parsed.password)):
        raise ConfigError(
            "the URL of a SQL source spells out a password, which would stand in the recipe and the manifest", remedy
        )
    for key, values in parsed.query.items():
        for value in (values,) if isinstance(values, str) else values:
            is_spelled_out = _SECRET_KEY.search(key) and not _WHOLE_NAME.fullmatch(value)
            if is_spelled_out or _SECRET_IN_DSN.search(value):
                raise ConfigError(f"the URL of a SQL source spells out a secret in its option {key!r}", remedy)


def _parse(url: str) -> Any:
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError:
        raise missing_package("sqlalchemy") from None
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "the URL of a SQL source is none that SQLAlchemy knows",
            "dialect://user:${NAME}@host:port/database, such as sqlite:///shop.db",
        ) from None


def _filled(url: str) -> tuple[Any, dict[str, str]]:
    """Return the URL with every ${NAME} filled in, and the filled values by name."""
    secrets: dict[str, str] = {}

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        value = os.environ.get(name)
        if not value:
            raise ConfigError(f"the URL of a SQL source names ${{{name}}}, which is not set", f"export {name}=...")
        return secrets.setdefault(name, value)

    def fill(text: str | None) -> str | None:
        return None if text is None else _NAME.sub(value_of, text)

    if _WHOLE_NAME.fullmatch(url):
        whole = _parse(str(fill(url)))
        if whole.password:
            secrets[f"{_NAME.match(url)[1]}'s password"] = str(whole.password)  # type: ignore[index]
        return whole, secrets
    parsed = _parse(url)
    options: dict[str, Any] = {}
    for key, value in parsed.query.items():
        options[key] = fill(value) if isinstance(value, str) else tuple(map(fill, value))
    parts = {part: fill(getattr(parsed, part)) for part in ("username", "password", "host", "database")}
    return parsed.set(query=options, **{part: value for part, value in parts.items() if value is not None}), secrets


def rows(path: str, most_bytes: int, most_rows: int = 0) -> Read:
    """Yield the rows of the query, numbered from 1; only the first `most_rows` unless that is 0.

    Raises ConfigError if the database refuses the query, HubError if the database cannot be reached.
    """
    url, query = split(path)
    with _connection(url) as connection:
        import sqlalchemy

        result = connection.execute(sqlalchemy.text(re.sub(r"(?<!:):(?=\w)", r"\\:", query)))
        names = list(result.keys())
        if len(set(names)) != len(names):
            duplicates = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(
                f"the query names the column {duplicates[0]!r} more than once", f"SELECT ... AS other_{duplicates[0]}"
            )
        for number, values in enumerate(result, 1):
            yield str(number), _row(dict(zip(names, values, strict=True)), most_bytes)
            if number == most_rows:
                return


def _row(row: Mapping[str, Any], most_bytes: int) -> Any:
    size = sum(len(value) for value in row.values() if isinstance(value, (str, bytes)))
    if size > most_bytes:
        return MalformedRow(
            "oversize_row", f"the row has {size:,} characters; the limit is {most_bytes:,} (max_row_bytes)"
        )
    return drop_nulls({name: _plain(value) for name, value in row.items()})


def _plain(value: Any) -> Any:
    """Convert a value to a JSON type; dates stay dates."""
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, datetime.time):
        return value.isoformat()
    return bytes(value) if isinstance(value, memoryview) else value


@contextmanager
def _connection(url: str) -> Iterator[Any]:
    """Open a connection in a read-only transaction, which is rolled back at the end.

    No error message shows the values that were filled into the URL.
    """
    filled_url, secrets = _filled(url)
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        engine = _engine(filled_url, NullPool)
        options = {"stream_results": True, "max_row_buffer": STREAM_ROWS}
        if filled_url.get_backend_name() == "postgresql":
            options["postgresql_readonly"] = True
        with engine.connect().execution_options(**options) as connection:
            if filled_url.get_backend_name() in ("mysql", "mariadb"):
                connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")
                connection.rollback()
            try:
                yield connection
            finally:
                connection.rollback()
    except (SQLAlchemyError, sqlite3.Error, ImportError) as error:
        message = _scrub(str(getattr(error, "orig", None) or error), secrets)
        if isinstance(error, ImportError):
            raise ConfigError(
                f"the driver of the database is not installed: {message}",
                f"{pip_command()} install 'psycopg[binary]' for Postgres, or the driver that this names",
            ) from None
        if isinstance(error, DBAPIError) and error.connection_invalidated or not isinstance(error, DBAPIError):
            raise HubError(
                f"the database of a SQL source cannot be read: {message}",
                "path: 'sql:DIALECT://USER:${NAME}@HOST:PORT/DATABASE#SELECT ...', of a server that runs",
            ) from None
        raise ConfigError(
            f"the database refuses the query of a SQL source: {message}",
            "correct the query: 'sql:URL#SELECT question, answer FROM faq'",
        ) from None


def _engine(url: Any, pool: Any) -> Any:
    import sqlalchemy

    if url.get_backend_name() != "sqlite":
        return sqlalchemy.create_engine(url, poolclass=pool, hide_parameters=True)
    database = url.database or ""
    if not database or database == ":memory:":
        raise ConfigError("a SQLite source needs a file; one in memory is empty", "sql:sqlite:///shop.db#SELECT ...")
    file = database.removeprefix("file:").partition("?")[0]
    if not os.path.isfile(file):
        raise ConfigError(
            f"the source names no SQLite file: {file!r}",
            f"ls {os.path.dirname(file) or '.'}; the path is taken from the current directory",
        )
    return sqlalchemy.create_engine("sqlite://", creator=lambda: _open_sqlite(file), poolclass=pool)


def _open_sqlite(file: str) -> sqlite3.Connection:
    """Open a SQLite file read-only, with only reading statements allowed.

    ATTACH (which creates files), PRAGMA and extensions are denied.
    """
    connection = sqlite3.connect(f"file:{quote(os.path.abspath(file))}?mode=ro", uri=True, check_same_thread=False)

    def allow(action: int, first: str | None, second: str | None, *rest: Any) -> int:
        loads_extension = action == sqlite3.SQLITE_FUNCTION and second == "load_extension"
        # SQLAlchemy reads the isolation level when it connects
        asks_isolation_level = action == sqlite3.SQLITE_PRAGMA and first == "read_uncommitted" and second is None
        return (
            sqlite3.SQLITE_OK
            if asks_isolation_level or (action in _SQLITE_READS and not loads_extension)
            else sqlite3.SQLITE_DENY
        )

    connection.set_authorizer(allow)
    return connection


def _scrub(message: str, secrets: Mapping[str, str]) -> str:
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        for spelling in {value, quote(value), quote(value, safe="")}:
            message = message.replace(spelling, f"${{{name}}}")
    return (message.splitlines() or [""])[0][:300]
