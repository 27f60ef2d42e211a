"""Attacks of somebody who can write to the registry's database, but cannot read the state directory."""

from __future__ import annotations

import hashlib
import multiprocessing
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import sartor
from dispatch_fakes import no_fsync, version
from postgres_server import postgres
from sartor.core import records
from sartor.core.database import Database
from sartor.core.errors import ConfigError, KeyRefusedError, UnavailableError
from sartor.core.row_seals import RowSeals
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.registry import registry_schema, registry_seals
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import open_database

__all__ = ["no_fsync"]
SECRET = "sartor-0123456789ab-" + "A" * 43
ADMIN_ROW = {
    "id": "0123456789ab",
    "name": "admin",
    "agents": "[]",
    "admin": 1,
    "digest": hashlib.sha256(SECRET.encode()).hexdigest(),
    "created": "2026-01-01T00:00:00Z",
    "expires": "",
    "revoked": "",
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database outside the state directory, as a database server would be."""
    return f"sqlite:///{tmp_path / 'registry.sqlite'}"


def write(url: str, *statements: str, row: dict[str, Any] | None = None) -> None:
    """As the attacker does: past every check, in the database alone."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        for statement in statements:
            connection.execute(statement)
        if row:
            marks = ", ".join(f":{name}" for name in row)
            connection.execute(f"insert into keys ({', '.join(row)}) values ({marks})", row)


def plain_sealed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the checksum that anybody can compute."""
    return RowSeals().sealed(row)


@pytest.fixture
def keys(url: str, state: Path) -> Iterator[ApiKeyStore]:
    with closing(ApiKeyStore(open_database(url, state), state=state)) as store:
        yield store


def plain_registry(url: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a registry of the version before keyed seals, and return an API key."""
    with monkeypatch.context() as patch:
        patch.setattr(registry_schema, "use_key", lambda *arguments: None)
        with closing(Registry.open(url, state)) as registry:
            registry.add(version("faq", "1"))
            secret, _ = ApiKeyStore(registry.database, state=state).make(["faq"])
    return secret


def test_admin_key_with_a_plain_checksum_is_refused(keys: ApiKeyStore, url: str) -> None:
    keys.make(["faq"])
    write(url, row=plain_sealed(ADMIN_ROW))
    with pytest.raises(KeyRefusedError, match="changed from outside"):
        keys.admit(SECRET)


def test_admin_key_sealed_by_another_key_is_refused(keys: ApiKeyStore, url: str) -> None:
    keys.make(["faq"])
    write(url, row=RowSeals(b"a guess of the attacker's, 32 by.").sealed(ADMIN_ROW))
    with pytest.raises(KeyRefusedError, match="changed from outside"):
        keys.admit(SECRET)


def test_a_seal_under_the_id_of_the_key_is_no_seal(keys: ApiKeyStore, url: str, state: Path) -> None:
    """The id of the key is in every row; without the key it makes nothing."""
    keys.make(["faq"])
    prefix = RowSeals((state / "registry.key").read_bytes()).prefix
    write(url, row={**ADMIN_ROW, "checksum": prefix + records.digest(ADMIN_ROW)})
    with pytest.raises(KeyRefusedError, match="changed from outside"):
        keys.admit(SECRET)


def test_no_restart_makes_a_forged_row_count(url: str, state: Path) -> None:
    """The change to keyed seals happens once: a row with a plain checksum that comes later is never taken over."""
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        keys.make(["faq"])
    write(url, row=plain_sealed(ADMIN_ROW))
    for _ in range(2):
        with closing(ApiKeyStore(open_database(url, state), state=state)) as keys, pytest.raises(KeyRefusedError):
            keys.admit(SECRET)


def test_a_registry_brought_back_to_plain_checksums_is_not_taken(url: str, state: Path) -> None:
    """The attacker replaces every seal, so that the database looks like one of an older version."""
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        keys.make(["faq"])
    write(url, "delete from keys", row=plain_sealed(ADMIN_ROW))
    write(url, "drop trigger events_update", "update events set checksum = 'plain'")
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys, pytest.raises(KeyRefusedError):
        keys.admit(SECRET)


def test_a_forged_mark_does_not_open_a_team(url: str, state: Path) -> None:
    """Without its keys and with a forged `keys removed`, the team still asks for a key."""
    with closing(ApiKeyStore(open_database(url, state))) as keys:
        keys.make(["faq"])
    event = {
        "generation": 9,
        "at": "2026-01-01T00:00:00Z",
        "who": "",
        "what": "keys removed",
        "agent": "",
        "version": "",
        "why": "",
        "was": "{}",
        "became": "{}",
        "numbers": "{}",
    }
    values = ", ".join(repr(value) for value in plain_sealed(event).values())
    write(url, "delete from keys", f"insert into events ({', '.join(plain_sealed(event))}) values ({values})")
    with closing(ApiKeyStore(open_database(url, state))) as keys, pytest.raises(UnavailableError):
        assert keys.is_open


def test_an_agent_row_with_a_plain_checksum_is_damaged(url: str, state: Path) -> None:
    with closing(Registry.open(url, state)) as registry:
        registry.add(version("faq", "1"))
        row = plain_sealed({**registry.read().agents["faq"].as_row(), "live": "0"})
        write(url, f"update agents set live = '0', checksum = '{row['checksum']}'")
        assert "faq" in registry.read().damaged and not registry.read().agents
        assert registry.repair("faq").live == "1"


def test_a_key_may_not_be_let_speak_by_a_plain_row(keys: ApiKeyStore, url: str) -> None:
    secret, key = keys.make(["faq"])
    row = plain_sealed({"key": key.id, "person": "*"})
    write(url, f"insert into speakers values ('{key.id}', '*', '{row['checksum']}')")
    assert not keys.admit(secret).may_speak_for("somebody")


def test_the_key_is_only_for_its_user_and_not_in_the_database(keys: ApiKeyStore, url: str, state: Path) -> None:
    keys.make(["faq"])
    file = state / "registry.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    database = Path(url.removeprefix("sqlite:///"))
    contents = b"".join(part.read_bytes() for part in database.parent.glob(f"{database.name}*") if part.is_file())
    assert file.read_bytes() not in contents and file.read_bytes().hex().encode() not in contents


def test_a_key_that_others_may_read_is_refused(url: str, state: Path) -> None:
    open_database(url, state).close()
    (state / "registry.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others") as caught:
        open_database(url, state)
    assert caught.value.remedy.startswith("chmod 600")


def test_the_first_start_seals_old_rows_and_no_damaged_one(
    url: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a version without keyed seals go on to work; one whose checksum was wrong does not start to count."""
    secret = plain_registry(url, state, monkeypatch)
    write(url, row={**ADMIN_ROW, "checksum": "0" * 64})
    with closing(Registry.open(url, state)) as registry:
        keys = ApiKeyStore(registry.database, state=state)
        assert keys.admit(secret).opens("faq") and registry.read().agents["faq"].live == "1"
        assert [event.what for event in registry.events("faq")] == ["added"]
        with pytest.raises(KeyRefusedError):
            keys.admit(SECRET)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        write(url, "update events set who = 'eve'")


def test_a_first_start_that_was_killed_is_repeated(url: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the commit nothing was changed; after it the key only lacks its name."""
    secret = plain_registry(url, state, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(registry_seals, "_write_seals", _killed)
        with pytest.raises(KeyboardInterrupt):
            open_database(url, state)
    assert not (state / "registry.key").exists()
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        assert keys.admit(secret).opens("faq")
    (state / "registry.key").rename(state / "registry.key.new")
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        assert keys.admit(secret).opens("faq")


def _killed(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_lost_key_is_an_error_with_a_remedy(url: str, state: Path, tmp_path: Path) -> None:
    """`sartor agents reseal` trusts the rows as they are, and lists the keys that count from then on."""
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        secret, key = keys.make(["faq"])
    (state / "registry.key").unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match="sealed by a key that .*state lacks") as caught:
            open_database(url, state)
        assert "sartor agents reseal" in caught.value.remedy and f"{state}/registry.key" in caught.value.remedy
    team = tmp_path / "team.yaml"
    team.write_text(f"base: tiny\nstate: {state}\nregistry: {url}\n")
    report = sartor.reseal_registry(team)
    assert report["resealed"]["keys"] == 1 and [item["id"] for item in report["keys"]] == [key.id]
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        assert keys.admit(secret).opens("faq")


def test_a_key_of_another_team_is_an_error(url: str, state: Path, tmp_path: Path) -> None:
    """A second server with a state directory of its own needs a copy of the key."""
    open_and_add(url, state)
    other = tmp_path / "other"
    with pytest.raises(ConfigError, match="sealed by a key that"):
        open_database(url, other)
    open_database(f"sqlite:///{tmp_path / 'another.sqlite'}", other).close()
    with pytest.raises(ConfigError, match="sealed by another key"):
        open_database(url, other)
    (other / "registry.key").write_bytes((state / "registry.key").read_bytes())
    with closing(Registry.open(url, other)) as registry:
        assert registry.read().agents["faq"].live == "1"


def open_and_add(url: str, state: Path) -> None:
    with closing(Registry.open(url, state)) as registry:
        registry.add(version("faq", "1"))


def test_servers_that_start_at_once_agree_on_a_key(url: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = plain_registry(url, state, monkeypatch)
    context = multiprocessing.get_context("fork")
    starts = [context.Process(target=_opened, args=(url, state)) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert [start.exitcode for start in starts] == [0] * 4
    with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
        assert keys.admit(secret).opens("faq")


def _opened(url: str, state: Path) -> None:
    database: Database = open_database(url, state)
    database.close()


@pytest.mark.services
def test_postgres_rows_are_sealed_by_the_state_key(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database's password alone makes no admin; the log stays append-only after the change to keyed seals."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    with postgres() as url:
        secret = plain_registry(url, state, monkeypatch)
        with closing(ApiKeyStore(open_database(url, state), state=state)) as keys:
            assert keys.admit(secret).opens("faq")
            with keys._database.change() as connection:
                connection.execute(registry_schema.keys.insert().values(plain_sealed(ADMIN_ROW)))
            with pytest.raises(KeyRefusedError):
                keys.admit(SECRET)
            with pytest.raises(Exception, match="append-only"), keys._database.change() as connection:
                connection.exec_driver_sql("update events set who = 'eve'")
        with pytest.raises(ConfigError, match="sealed by a key"):
            open_database(url, tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="no state directory was given"):
            open_database(url)
