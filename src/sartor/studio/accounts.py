"""Users, one-time links, sessions and failed logins, in a SQLite file that its owner alone can read.

Secrets (tokens of links and sessions) are stored as digests, passwords as salted hashes (passwords.py). After
MAX_FAILURES failed logins in a row a name is locked, for a minute at first, then for twice as long after each further
failure, up to an hour. That holds for names that nobody has too, so that a lock tells nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    Integer,
    MetaData,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from sartor.core.database import Database, Form, open_database
from sartor.core.errors import ConfigError, KeyRefusedError, MissingError
from sartor.studio.passwords import hash_password, is_password

MAX_FAILURES = 5
LOCK_S, MAX_LOCK_S = 60.0, 3600.0
# names with failures that are remembered; the oldest are forgotten
MAX_FAILED_NAMES = 10_000
INVITATION_S = 24 * 3600.0
# a session ends after this time without a request, and after this time in all
IDLE_S, SESSION_S = 12 * 3600.0, 7 * 24 * 3600.0
# `seen_at` is written at most this often
SEEN_S = 60.0
MAX_NAME_CHARS = 60
_NAME = re.compile(r"[\w][\w .@+-]*")

metadata = MetaData()
users = Table(
    "users",
    metadata,
    Column("name", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("password", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)
invitations = Table(
    "invitations",
    metadata,
    Column("token_digest", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("expires_at", Float, nullable=False),
)
sessions = Table(
    "sessions",
    metadata,
    Column("token_digest", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
)
failed_logins = Table(
    "failed_logins",
    metadata,
    Column("name", Text, primary_key=True),
    Column("failures", Integer, nullable=False),
    Column("last_at", Float, nullable=False),
    Column("locked_until", Float, nullable=False),
)
settings = Table("settings", metadata, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))
counter = Table(
    "counter", metadata, Column("id", Integer, primary_key=True), Column("value", BigInteger, nullable=False)
)
FORM = Form(
    "studio's accounts",
    "",
    migrations=Path(__file__).parent / "migrations",
    counter=counter.c.value,
    is_private=True,
)


class Role(StrEnum):
    """Role of a user: viewers look, reviewers also decide and talk, owners also start jobs and manage users."""

    VIEWER = "viewer"
    REVIEWER = "reviewer"
    OWNER = "owner"

    def includes(self, other: Role) -> bool:
        """Return whether the role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class User:
    """A user of the studio.

    has_password: whether the one-time link was used.
    """

    name: str
    role: Role
    has_password: bool = True


@dataclass(frozen=True)
class Invitation:
    """A one-time link before its use. name: empty if its reader chooses the name."""

    name: str
    role: Role


class Accounts:
    """Accounts of one studio, safe to use from several threads and processes.

    now: clock, Unix time in s.
    Each call may raise what `Database.change` raises.
    """

    def __init__(self, file: Path, now: Callable[[], float] = time.time) -> None:
        self.file = file
        self._now = now
        self._database: Database = open_database(f"sqlite:///{file}", FORM)
        # one connection stays open: else SQLite makes its shared memory anew for each page, which a full disk refuses
        self._held = sqlite3.connect(file, check_same_thread=False)
        self._held.execute("select count(*) from users").fetchall()

    def close(self) -> None:
        """Close the database."""
        self._held.close()
        self._database.close()

    def list_users(self) -> list[User]:
        """Return all users by name."""
        with self._database.read() as connection:
            rows = connection.execute(select(users).order_by(users.c.name)).all()
        return [User(row.name, Role(row.role), bool(row.password)) for row in rows]

    def add_user(self, name: str, role: Role) -> str:
        """Add a user without a password; return the token of the one-time link by which they choose one.

        For an existing user, a new link is made: the role is changed and the old password counts until the link is
        used. Raises ConfigError for an invalid name, and for another role of the last owner.
        """
        name = checked_name(name)
        with self._database.change() as connection:
            known = connection.execute(select(users.c.name).where(users.c.name == name)).first()
            if known:
                self._set_role(connection, name, role)
            else:
                fields = {"name": name, "role": role.value, "password": "", "created_at": self._now()}
                connection.execute(insert(users).values(**fields))
            return self._invite(connection, name, role)

    def change_role(self, name: str, role: Role) -> None:
        """Give a user another role, at once. Raises ConfigError for an unknown user and for the last owner."""
        with self._database.change() as connection:
            if connection.execute(select(users.c.name).where(users.c.name == name)).first() is None:
                raise ConfigError(f"there is no user {name!r}", "sartor studio user list")
            self._set_role(connection, name, role)

    def _set_role(self, connection: Connection, name: str, role: Role) -> None:
        if role is not Role.OWNER:
            _check_other_owner(connection, name)
        connection.execute(update(users).where(users.c.name == name).values(role=role.value))
        connection.execute(update(invitations).where(invitations.c.name == name).values(role=role.value))

    def remove_user(self, name: str) -> None:
        """Remove a user, their sessions and links. Raises ConfigError for an unknown user and for the last owner."""
        with self._database.change() as connection:
            row = connection.execute(select(users).where(users.c.name == name)).first()
            if row is None:
                raise ConfigError(f"there is no user {name!r}", "sartor studio user list")
            if row.role == Role.OWNER.value:
                _check_other_owner(connection, name)
            for table in (users, sessions, invitations):
                connection.execute(delete(table).where(table.c.name == name))

    def invite_owner(self) -> str:
        """Return the token of a one-time link for the first owner; empty if there is an owner with a password.

        Earlier unused links for a first owner end.
        """
        with self._database.change() as connection:
            owner = select(users.c.name).where(users.c.role == Role.OWNER.value, users.c.password != "")
            if connection.execute(owner).first():
                return ""
            connection.execute(delete(invitations).where(invitations.c.name == ""))
            return self._invite(connection, "", Role.OWNER)

    def _invite(self, connection: Connection, name: str, role: Role) -> str:
        connection.execute(delete(invitations).where(invitations.c.expires_at < self._now()))
        if name:
            connection.execute(delete(invitations).where(invitations.c.name == name))
        token = secrets.token_urlsafe(24)
        fields = {"name": name, "role": role.value, "expires_at": self._now() + INVITATION_S}
        connection.execute(insert(invitations).values(token_digest=_digest(token), **fields))
        return token

    def invitation(self, token: str) -> Invitation | None:
        """Return the unused link with this token; None if there is none or it has expired."""
        with self._database.read() as connection:
            row = connection.execute(
                select(invitations).where(
                    invitations.c.token_digest == _digest(token), invitations.c.expires_at >= self._now()
                )
            ).first()
        return Invitation(row.name, Role(row.role)) if row else None

    def accept(self, token: str, name: str, password: str) -> User:
        """Set the password of a one-time link's user, and use the link up. Sessions of the user end.

        name: of the user, where the link leaves it open. Raises KeyRefusedError for an invalid link, ConfigError for
        an invalid name or password.
        """
        hashed = hash_password(password)
        with self._database.change() as connection:
            row = connection.execute(
                select(invitations).where(
                    invitations.c.token_digest == _digest(token), invitations.c.expires_at >= self._now()
                )
            ).first()
            if row is None:
                raise KeyRefusedError(
                    "this link was used, or is older than a day", "sartor studio user add NAME --role ROLE"
                )
            name = row.name or checked_name(name)
            known = connection.execute(select(users.c.name).where(users.c.name == name)).first()
            if known and not row.name:
                raise ConfigError(f"there is a user {name!r}", "choose another name")
            if known:
                connection.execute(update(users).where(users.c.name == name).values(password=hashed))
            else:
                fields = {"name": name, "role": row.role, "password": hashed, "created_at": self._now()}
                connection.execute(insert(users).values(**fields))
            connection.execute(delete(sessions).where(sessions.c.name == name))
            connection.execute(delete(invitations).where(invitations.c.token_digest == _digest(token)))
        return User(name, Role(row.role))

    def log_in(self, name: str, password: str) -> str:
        """Return the token of a new session. Raises KeyRefusedError for a wrong name or password, or a locked name."""
        key = name.strip()[:MAX_NAME_CHARS]
        with self._database.read() as connection:
            failed = connection.execute(select(failed_logins).where(failed_logins.c.name == key)).first()
            row = connection.execute(select(users).where(users.c.name == key)).first()
        if failed and failed.locked_until > self._now():
            seconds = failed.locked_until - self._now()
            raise KeyRefusedError(
                f"there were {failed.failures} failed logins under this name; it is locked for {seconds:.0f} s",
                "wait, then try again; an owner can make a new link: sartor studio user add NAME --role ROLE",
            )
        if not is_password(password, row.password if row else ""):
            self._count_failure(key)
            raise KeyRefusedError("the name or the password is wrong", "try again, or ask an owner for a new link")
        token = secrets.token_urlsafe(32)
        with self._database.change() as connection:
            connection.execute(delete(failed_logins).where(failed_logins.c.name == key))
            connection.execute(delete(sessions).where(sessions.c.seen_at < self._now() - IDLE_S))
            fields = {"name": key, "created_at": self._now(), "seen_at": self._now()}
            connection.execute(insert(sessions).values(token_digest=_digest(token), **fields))
        return token

    def _count_failure(self, name: str) -> None:
        now = self._now()
        with self._database.change() as connection:
            row = connection.execute(select(failed_logins).where(failed_logins.c.name == name)).first()
            count = row.failures + 1 if row else 1
            lock_s = min(MAX_LOCK_S, LOCK_S * 2 ** min(count - MAX_FAILURES, 10)) if count >= MAX_FAILURES else 0.0
            connection.execute(delete(failed_logins).where(failed_logins.c.name == name))
            fields = {"name": name, "failures": count, "last_at": now, "locked_until": now + lock_s}
            connection.execute(insert(failed_logins).values(**fields))
            if connection.execute(select(func.count()).select_from(failed_logins)).scalar_one() > MAX_FAILED_NAMES:
                oldest = select(failed_logins.c.name).order_by(failed_logins.c.last_at).limit(MAX_FAILED_NAMES // 10)
                connection.execute(delete(failed_logins).where(failed_logins.c.name.in_(oldest)))

    def user_of(self, token: str) -> User | None:
        """Return the user of a session; None if the token is unknown or the session has ended."""
        now = self._now()
        with self._database.read() as connection:
            row = connection.execute(
                select(users.c.name, users.c.role, sessions.c.created_at, sessions.c.seen_at)
                .join(users, users.c.name == sessions.c.name)
                .where(sessions.c.token_digest == _digest(token))
            ).first()
        if row is None or row.seen_at < now - IDLE_S or row.created_at < now - SESSION_S:
            return None
        if row.seen_at < now - SEEN_S:
            # a full disk must not shut out those who could free it
            with suppress(MissingError), self._database.change() as connection:
                connection.execute(
                    update(sessions).where(sessions.c.token_digest == _digest(token)).values(seen_at=now)
                )
        return User(row.name, Role(row.role))

    def log_out(self, token: str) -> None:
        """End a session."""
        with self._database.change() as connection:
            connection.execute(delete(sessions).where(sessions.c.token_digest == _digest(token)))

    def setting(self, name: str, default: Callable[[], str]) -> str:
        """Return a stored setting; store the default at its first use."""
        with self._database.read() as connection:
            row = connection.execute(select(settings.c.value).where(settings.c.name == name)).first()
        if row:
            return str(row.value)
        with self._database.change() as connection:
            row = connection.execute(select(settings.c.value).where(settings.c.name == name)).first()
            value = str(row.value) if row else default()
            if not row:
                connection.execute(insert(settings).values(name=name, value=value))
        return value


def checked_name(name: str) -> str:
    """Return a user's name without surrounding white space. Raises ConfigError if it is none."""
    name = name.strip()
    if not name or len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:40]!a} is no name", f"letters, digits, spaces, . @ + -: at most {MAX_NAME_CHARS}")
    return name


def _check_other_owner(connection: Connection, name: str) -> None:
    """Raise ConfigError if a user is the only owner."""
    owners = select(users.c.name).where(users.c.role == Role.OWNER.value)
    if [row.name for row in connection.execute(owners)] == [name]:
        raise ConfigError(f"{name} is the only owner", "sartor studio user add NAME --role owner, first")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
