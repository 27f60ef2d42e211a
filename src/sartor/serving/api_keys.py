"""API keys stored as digests.

A key is `sartor-<id>-<secret>`: 12 hex digits that may be logged and listed, and 256 bits from the system's random
source. It is stored as one sha256. A slow hash (argon2, scrypt) protects passwords that can be guessed; 256 random
bits cannot be guessed at any price, and a slow hash at each request would let clients keep the server busy.

A key opens the agents that it names. `*` stands for every agent, now and later; `base` and `auto` are names like any
other. An admin key opens no agent: who promotes a Release need not read its replies, and the other way round.

A request waits at most WAIT_S for a read of the keys, because a dead database can block a connection for minutes.
After that it gets the last read with its time, and the caller decides how old it may be.

Two marks record that a team had keys, and each suffices: an event in the registry's log, which outlives the table of
keys and is shared by all servers of the team, and a file in the state directory, which outlives the registry.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import hashlib
import hmac
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from sartor.core import records
from sartor.core.database import Database
from sartor.core.errors import ArtifactError, ConfigError, KeyRefusedError, SartorError, UnavailableError
from sartor.core.filesystem import fsync_descriptor, fsync_directory, touch_private
from sartor.core.remedies import REPORT
from sartor.serving.registry import registry_schema
from sartor.serving.registry.registry import ChangeCause
from sartor.serving.registry.registry_head import KEYED, UNKEYED, is_current, put_row, remove_rows, transaction_of
from sartor.serving.registry.user_versions import ANYBODY, note, speakers
from sartor.serving.team_config import Team, load

WAIT_S = 2.0
# Longest wait for the first read, when a server starts
FIRST_WAIT_S = 60.0


@dataclass(frozen=True)
class KeyTable:
    """Keys of a team at one moment.

    rows: by id; None for a row that was changed from outside.
    speakers: the users for whom each key may speak.
    mark: KEYED, UNKEYED or "", from the registry's log.
    is_on_file: whether the state directory holds the mark that there were keys.
    """

    rows: Mapping[str, Mapping[str, Any] | None]
    speakers: Mapping[str, frozenset[str]]
    mark: str
    is_on_file: bool


@dataclass
class _Refresh:
    """Read in progress.

    started: by the cache's clock.
    until: by the system's monotonic clock; after it nobody waits for this read.
    """

    started: float
    until: float
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> bool:
        return self.done.wait(max(0.0, self.until - time.monotonic()))


class KeyCache:
    """Cache of the last result of `read`. Safe to use from several threads.

    clock: monotonic, in seconds.
    """

    def __init__(self, read: Callable[[], KeyTable], clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._refresh: _Refresh | None = None
        self._tried_at = -math.inf
        self._read_at = -math.inf
        self.last: KeyTable | None = None
        self.error: SartorError | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the last successful read began; a failed read does not change it."""
        return self._clock() - self._read_at

    def table(self, fresh_s: float) -> KeyTable:
        """Return the keys as read at most `fresh_s` ago, or older ones if the database does not answer.

        Raises the error of the read if no read ever succeeded.
        """
        requested_at = self._clock()
        while True:
            with self._lock:
                if requested_at - self._tried_at < fresh_s:
                    break
                refresh = self._refresh or self._begin()
            if not refresh.wait():
                break
        if self.last is None:
            raise self.error or UnavailableError(
                "the registry does not answer",
                "registry: in the team's file names the database: start its server, or look at its disk by df -h",
            )
        return self.last

    def poke(self, fresh_s: float) -> None:
        """Start a read if the keys are older than `fresh_s`, and do not wait for it."""
        with self._lock:
            if self._refresh is None and self._clock() - self._tried_at >= fresh_s:
                self._begin()

    def expire(self) -> None:
        """Mark the keys as outdated, because this process has changed one."""
        with self._lock:
            self._tried_at, self._refresh = -math.inf, None

    def _begin(self) -> _Refresh:
        refresh = _Refresh(self._clock(), time.monotonic() + (FIRST_WAIT_S if self.last is None else WAIT_S))
        try:
            # a daemon thread: a read that hangs must not keep the process alive
            threading.Thread(target=self._run, args=(refresh,), name="sartor-keys", daemon=True).start()
        except RuntimeError as fault:  # no thread left: counts as a failed read and is tried again later
            self._tried_at = refresh.started
            self.error = UnavailableError(
                f"the keys cannot be read: {fault}", "raise the limit of processes (ulimit -u)"
            )
            refresh.done.set()
            return refresh
        self._refresh = refresh
        return refresh

    def _run(self, refresh: _Refresh) -> None:
        table, error = None, None
        try:
            table = self._read()
        except SartorError as fault:
            error = fault
        except Exception as fault:  # drivers raise kinds of their own; waiting threads must be released in any case
            error = UnavailableError(f"the keys cannot be read: {type(fault).__name__}", REPORT)
        with self._lock:
            if self._refresh is refresh:
                self._refresh, self._tried_at, self.error = None, refresh.started, error
                if table is not None:
                    self.last, self._read_at = table, refresh.started
        refresh.done.set()


FILE = "keyed"
_TEXT = (
    "This team has had API keys: its server answers nobody without one. sartor agents key --remove-all takes that "
    "back.\n"
)


def read_mark(connection: Connection) -> str:
    """Return KEYED or UNKEYED, whichever the registry's head has for the newest, or "" if there is neither.

    Events that were inserted, put back or removed from outside change nothing of it.
    """
    return transaction_of(connection).log.mark


def write_mark(connection: Connection, mark: str, reason: str) -> None:
    """Write a mark into the registry's log, in the transaction of the change that it records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = ""
    note(connection, mark, agent="", version="", cause=ChangeCause(user, reason), numbers={})


def has_file(state: Path | None) -> bool:
    """Return whether the state directory says that there were keys; true if it cannot be read."""
    if state is None:
        return False
    try:
        (state / FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def write_file(state: Path | None) -> None:
    """Write the mark into the state directory, and fsync it. Raises OSError."""
    if state is None or has_file(state):
        return
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    touch_private(state / FILE)
    with (state / FILE).open("w", encoding="utf-8") as file:
        file.write(_TEXT)
        file.flush()
        fsync_descriptor(file.fileno())
    fsync_directory(state)


def remove_file(state: Path | None) -> None:
    """Remove the mark from the state directory. Raises OSError."""
    if state is None or not has_file(state):  # the directory itself may be absent
        return
    (state / FILE).unlink(missing_ok=True)
    fsync_directory(state)


ANY = "*"
PREFIX = "sartor"
MOST_CHARACTERS = 256
SECRET_BYTES = 32
FRESH_S, SOONER_S = 1.0, 0.1
# How long the last read of the keys applies if they cannot be read again; a revoked key may work that long
STALE_S = 60.0
# Seconds between reads of the keys on an idle server, and between tries to write a mark
IDLE_S, MARK_AGAIN_S = 5.0, 60.0
TROUBLE = "API keys"
_FORM = re.compile(rf"{PREFIX}-([0-9a-f]{{12}})-([A-Za-z0-9_-]{{43}})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SPAN = re.compile(r"(\d{1,5})\s*([hdw])")
_UNITS = {"h": datetime.timedelta(hours=1), "d": datetime.timedelta(days=1), "w": datetime.timedelta(weeks=1)}
# digest to compare with for an unknown id, so that the comparison takes as long as for a known one
_NOBODY = "0" * 64


@dataclass(frozen=True)
class Principal:
    """Holder of a key who sends a request.

    key: the id, never the secret.
    agents: those that the key opens; None for all.
    speaks_for: users (`registry.user_versions`) that the client may name as `user` and whose personal versions it may
    use; None for anybody.
    """

    key: str
    agents: frozenset[str] | None
    is_admin: bool
    speaks_for: frozenset[str] | None = frozenset()

    def opens(self, agent: str) -> bool:
        """Return whether the key opens an agent (name without version), `base` or `auto`."""
        return self.agents is None or agent in self.agents

    def may_speak_for(self, person: str) -> bool:
        """Return whether the key may use this person's versions."""
        return self.speaks_for is None or bool(self.speaks_for & {person, ANYBODY})


@dataclass(frozen=True)
class ApiKey:
    """Key as it is stored, without its secret.

    created, expires, revoked: UTC, ISO; `expires` and `revoked` are empty if they do not apply.
    """

    id: str
    agents: tuple[str, ...]
    is_admin: bool
    created: str
    expires: str
    revoked: str

    @property
    def state(self) -> str:
        """State of the key: valid, revoked or expired."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and self.expires <= _now() else "valid"

    def as_json(self) -> dict[str, Any]:
        """Return the key as a row of `sartor agents key --list`."""
        opens = "the admin's routes" if self.is_admin else ", ".join(self.agents)
        return {"id": self.id, "opens": opens, "state": self.state, "created": self.created, "expires": self.expires}


class ApiKeyStore:
    """Keys of one team in its registry's database. Safe to use from several threads and processes.

    Keys are read again after `FRESH_S`, so another process's revocation takes effect by then; for an unknown id they
    are read again after `SOONER_S`. If the database cannot be read, the last read applies for `STALE_S`.

    A team that once had keys never opens by itself: if its keys are gone, every request is refused.
    state: the team's directory, which holds one of the marks.
    clock: monotonic, in seconds.
    """

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.monotonic, *, state: Path | None = None
    ) -> None:
        self._database = database
        self._clock = clock
        self._state = state
        self._cache = KeyCache(self._read, clock)
        self._was_keyed = False
        self._seen_expired: set[str] = set()
        self._marked_at = -math.inf

    @classmethod
    def of(cls, team: Team) -> ApiKeyStore:
        """Open the keys of a team. Raises what `open_database` raises."""
        return cls(registry_schema.open_database(team.registry_url, Path(team.state)), state=Path(team.state))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @property
    def is_open(self) -> bool:
        """Whether no key was ever made, so that any client may send requests. A revoked key counts as made.

        Raises UnavailableError if keys were made and none can be checked: they are gone, or the last read is too old.
        """
        self._usable(FRESH_S)
        return not self._was_keyed

    @property
    def has_admin(self) -> bool:
        """Whether an admin key is valid; without one the admin routes are off."""
        return any(key.is_admin and self._is_valid(key) for key in self.listed())

    def troubles(self) -> dict[str, str]:
        """Return the problems of the keys at the last read.

        It starts a new read in the background, and waits for nothing.
        """
        self._cache.poke(IDLE_S)
        table, error = self._cache.last, self._cache.error
        if table is None or not self._was_keyed:
            return {}
        if error is not None or self._cache.age_s > STALE_S:
            reason = error.problem if error is not None else "it does not answer"
            return {TROUBLE: f"the keys cannot be read; those known hold for {STALE_S:.0f} s: {reason}"}
        return (
            {} if table.rows else {TROUBLE: f"the registry {self._database.name} has none any more: nobody is let in"}
        )

    def admit(self, secret: str) -> Principal:
        """Return the holder of this key. Raises KeyRefusedError, which never repeats the key."""
        match = _FORM.fullmatch(secret[:MOST_CHARACTERS])
        row = self._row(match[1]) if match else None
        digest = hashlib.sha256(secret[:MOST_CHARACTERS].encode("utf-8", "replace")).hexdigest()
        is_same = hmac.compare_digest(digest, row["digest"] if row else _NOBODY)
        if row is None or not is_same:
            raise KeyRefusedError("nobody has that API key", _REMEDY)
        key = _key(row)
        if not self._is_valid(key):
            state = "expired" if key.state == "valid" else key.state
            raise KeyRefusedError(f"the API key {key.id} is {state}", _REMEDY)
        agents: frozenset[str] | None
        if key.is_admin:
            agents = frozenset()
        elif ANY in key.agents:
            agents = None
        else:
            agents = frozenset(key.agents)
        speakers_of = self._usable(FRESH_S).speakers
        return Principal(key.id, agents, key.is_admin, speakers_of.get(key.id, frozenset()))

    def check(self, header: str) -> Principal:
        """Return the sender of this Authorization header (`Bearer KEY`). Raises KeyRefusedError."""
        scheme, _, secret = header.strip().partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise KeyRefusedError("no API key was sent", "send the header Authorization: Bearer KEY")
        return self.admit(secret.strip())

    def make(self, agents: Sequence[str], *, is_admin: bool = False, expires: str = "") -> tuple[str, ApiKey]:
        """Make a key, and return its secret and the stored form. The secret is not stored.

        Raises ConfigError for invalid names or an invalid expiry.
        """
        names = sorted(set(agents))
        if bool(names) == is_admin:
            raise ConfigError(
                "a key opens agents or the admin's routes, one of the two", "sartor agents key faq, or --admin"
            )
        for name in names:
            if name != ANY and not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{name!r} cannot be an agent's name", f"sartor agents key faq, or '{ANY}' for every agent"
                )
        ends = _ends(expires)
        identity = secrets.token_hex(6)
        secret = f"{PREFIX}-{identity}-{secrets.token_urlsafe(SECRET_BYTES)}"
        row: dict[str, Any] = {
            "id": identity,
            "name": ", ".join(names) or "admin",
            "agents": records.canonical(names).decode(),
            "admin": int(is_admin),
            "digest": hashlib.sha256(secret.encode()).hexdigest(),
            "created": _now(),
            "expires": ends,
            "revoked": "",
        }
        with self._database.change() as connection:
            if read_mark(connection) != KEYED:
                write_mark(connection, KEYED, "sartor agents key")
            put_row(connection, registry_schema.keys, row)
        self._changed()
        return secret, _key(row)

    def revoke(self, identity: str) -> ApiKey:
        """Revoke a key for ever. Raises ConfigError for an unknown id, ArtifactError for a changed row."""
        with self._database.change() as connection:
            row = _whole(connection, identity)
            if row is None:
                key_ids = (
                    ", ".join(str(item) for item in connection.execute(select(registry_schema.keys.c.id)).scalars())
                    or "none"
                )
                raise ConfigError(
                    f"there is no key {identity[:40]!a}; there are: {key_ids}", "sartor agents key --list"
                )
            row = {**row, "revoked": row["revoked"] or _now()}
            put_row(connection, registry_schema.keys, row)
        self._changed()
        return _key(row)

    def remove_all(self) -> int:
        """Remove every key, its permissions to speak for users, and the marks; return the number of keys.

        A running server refuses every request from then on. A server that is started afterwards needs no key.
        Raises ConfigError if the mark in the state directory cannot be removed.
        """
        with self._database.change() as connection:
            count = remove_rows(connection, registry_schema.keys)
            remove_rows(connection, registry_schema.speakers)
            write_mark(connection, UNKEYED, "sartor agents key --remove-all")
        try:
            remove_file(self._state)
        except OSError as error:
            problem = f"{self._state}/{FILE} cannot be removed: {error.strerror}"
            raise ConfigError(problem, "remove it as the user who owns it, then start the server") from None
        self._cache.expire()
        self._was_keyed = False
        return count

    def listed(self) -> list[ApiKey]:
        """Return the intact keys, oldest first. A key that was changed from outside opens nothing and is left out."""
        keys = [_key(row) for row in self._cache.table(FRESH_S).rows.values() if row is not None]
        return sorted(keys, key=lambda key: (key.created, key.id))

    def _is_valid(self, key: ApiKey) -> bool:
        """Return whether a key is valid; one that was seen expired stays so while this process runs.

        A clock that is set back, as by a battery that failed, does not revive it.
        """
        if key.state == "expired":
            self._seen_expired.add(key.id)
        return key.state == "valid" and key.id not in self._seen_expired

    def _row(self, identity: str) -> Mapping[str, Any] | None:
        rows = self._usable(FRESH_S).rows
        if identity not in rows:
            rows = self._usable(SOONER_S).rows
        row = rows.get(identity)
        if row is None and identity in rows:
            raise KeyRefusedError(
                f"the row of the key {identity} was changed from outside, so it opens nothing",
                "sartor agents key NAME makes another",
            )
        return row

    def _usable(self, fresh_s: float) -> KeyTable:
        """Return the keys of a team that has some or never had any.

        Raises UnavailableError if the keys are gone or the last read is older than STALE_S.
        """
        table = self._cache.table(fresh_s)
        if not self._was_keyed:
            return table
        if (age_s := self._cache.age_s) > STALE_S:
            raise UnavailableError(
                f"the registry was read {age_s:.0f} s ago and does not answer; until it does, no key is known to be "
                "valid",
                "see whether its disk or server is there: sartor agents key --list",
            )
        if not table.rows:
            raise _lost(table)
        return table

    def _read(self) -> KeyTable:
        """Read the keys in one transaction.

        From the first key or mark that is seen, the team counts as one that had keys.
        """
        is_on_file = has_file(self._state)
        with self._database.read() as connection:
            rows = [dict(row) for row in connection.execute(select(registry_schema.keys)).mappings()]
            mark, allowed = read_mark(connection), speakers(connection)
            table_rows = {
                str(row["id"]): row if is_current(connection, registry_schema.keys, row) else None for row in rows
            }
        for row in table_rows.values():
            if row is not None:
                self._is_valid(_key(row))
        if rows or is_on_file or mark == KEYED:
            self._was_keyed = True
        is_marked = mark == KEYED and (is_on_file or self._state is None)
        is_taken_back = mark == UNKEYED and not rows
        if self._was_keyed and not is_marked and not is_taken_back:
            self._mark()
        return KeyTable(table_rows, allowed, mark, is_on_file)

    def _mark(self) -> None:
        """Write missing marks, for keys of an older version or a registry that was replaced.

        If one cannot be written, the other still applies; the next try is after MARK_AGAIN_S.
        """
        if self._clock() - self._marked_at < MARK_AGAIN_S:
            return
        self._marked_at = self._clock()
        with contextlib.suppress(SartorError, OSError):
            write_file(self._state)
        with contextlib.suppress(SartorError), self._database.change() as connection:
            mark = read_mark(connection)
            has_rows = connection.execute(select(registry_schema.keys.c.id).limit(1)).first() is not None
            if mark == "" or (mark == UNKEYED and has_rows):
                write_mark(connection, KEYED, "a server saw keys")

    def _changed(self) -> None:
        """Expire the cache after a key was made or revoked, and write the mark into the state directory."""
        self._cache.expire()
        self._was_keyed = True
        with contextlib.suppress(OSError):  # the registry's mark applies, and a server writes the file when it starts
            write_file(self._state)


def _lost(table: KeyTable) -> UnavailableError:
    if table.mark != UNKEYED:
        return UnavailableError(
            "this team had API keys and its registry has none any more; nobody is let in",
            "sartor agents key NAME makes a new one; sartor agents key --remove-all and a restart ask for none",
        )
    remedy = "sartor agents key --remove-all, then restart the server" if table.is_on_file else "restart the server"
    return UnavailableError("the keys of this team were removed while its server asks for one", remedy)


def make_key(team: Path | str, agents: Sequence[str], *, is_admin: bool = False, expires: str = "") -> dict[str, Any]:
    """Make a key for a team (TEAM.yaml). The secret in `key` is shown only once.

    Raises ConfigError as `ApiKeyStore.make`.
    """
    with closing(ApiKeyStore.of(load(Path(team)))) as keys:
        secret, key = keys.make(agents, is_admin=is_admin, expires=expires)
    return {"key": secret, **key.as_json(), "note": "this key is shown once; what is kept of it is a digest"}


def revoke_key(team: Path | str, identity: str) -> dict[str, Any]:
    """Revoke a key of a team for ever. Raises ConfigError for an unknown id."""
    with closing(ApiKeyStore.of(load(Path(team)))) as keys:
        return keys.revoke(identity).as_json()


def remove_keys(team: Path | str) -> dict[str, Any]:
    """Remove every key of a team, so that a server started from then on needs none."""
    with closing(ApiKeyStore.of(load(Path(team)))) as keys:
        note = (
            "a server that is started from now on asks for no key and listens on loopback alone; restart one that runs"
        )
        return {"removed": keys.remove_all(), "note": note}


def list_keys(team: Path | str) -> dict[str, Any]:
    """Return every intact key of a team, without secrets."""
    with closing(ApiKeyStore.of(load(Path(team)))) as keys:
        return {"keys": [key.as_json() for key in keys.listed()]}


_REMEDY = "sartor agents key NAME makes one"


def _whole(connection: Connection, identity: str) -> Mapping[str, Any] | None:
    """Return the row of a key, or None. Raises ArtifactError if it was changed from outside."""
    stored_row = (
        connection.execute(select(registry_schema.keys).where(registry_schema.keys.c.id == identity))
        .mappings()
        .one_or_none()
    )
    if stored_row is None:
        return None
    if not is_current(connection, registry_schema.keys, row := dict(stored_row)):
        raise ArtifactError(
            f"the row of the key {identity} was changed from outside, so it opens nothing",
            "sartor agents key NAME makes another",
        )
    return row


def _key(row: Mapping[str, Any]) -> ApiKey:
    agents = tuple(json.loads(row["agents"]))
    return ApiKey(
        id=row["id"],
        agents=agents,
        is_admin=bool(row["admin"]),
        created=row["created"],
        expires=row["expires"],
        revoked=row["revoked"],
    )


def _ends(expires: str) -> str:
    """Return the time of expiry: `30d`, `12h` or `2w` from now, the end of an ISO day, or an ISO time.

    Empty for an empty text, which means never.
    """
    if not expires:
        return ""
    if span := _SPAN.fullmatch(expires.strip()):
        return _stamp(datetime.datetime.now(datetime.UTC) + int(span[1]) * _UNITS[span[2]])
    try:
        ends = datetime.datetime.fromisoformat(expires.strip())
    except ValueError:
        raise ConfigError(f"{expires!r} is no span and no date", "--expires 30d, or --expires 2027-12-31") from None
    if len(expires.strip()) == len("2027-12-31"):
        ends += datetime.timedelta(days=1)
    ends = ends.astimezone(datetime.UTC) if ends.tzinfo else ends.replace(tzinfo=datetime.UTC)
    if _stamp(ends) <= _now():
        raise ConfigError(f"{expires} is over already", "--expires 30d")
    return _stamp(ends)


def _stamp(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _now() -> str:
    return _stamp(datetime.datetime.now(datetime.UTC))
