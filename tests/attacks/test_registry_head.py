"""Attacks of somebody who can write to the registry's database, and puts back what Sartor itself once sealed."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

import sartor
from dispatch_fakes import no_fsync, version
from postgres_server import postgres
from sartor.core.errors import ArtifactError, ConflictError, KeyRefusedError
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import open_database
from sartor.serving.registry.user_versions import FORGOTTEN, UserVersion, UserVersionStore

__all__ = ["no_fsync"]
ADA = "a" * 64
FORGED = {
    "at": "2026-01-01T00:00:00Z",
    "who": "",
    "agent": "",
    "version": "",
    "why": "",
    "was": "{}",
    "became": "{}",
    "numbers": "{}",
    "checksum": "forged",
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database outside the state directory, as a database server's would be."""
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(file: Path, state: Path) -> Iterator[Registry]:
    with closing(opened(file, state)) as registry:
        registry.add(version("faq", "1"))
        registry.add(version("faq", "2"))
        yield registry


def opened(file: Path, state: Path) -> Registry:
    return Registry.open(f"sqlite:///{file}", state)


def run(file: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """As the attacker does: past every check, in the database alone."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("drop trigger if exists events_delete")
        return connection.execute(statement, values).fetchall()


def put_back(file: Path, table: str, rows: list[tuple[Any, ...]], where: str = "1") -> None:
    """Replace the rows of a table by copies that were made earlier."""
    run(file, f"delete from {table} where {where}")
    for row in rows:
        run(file, f"insert into {table} values ({', '.join('?' * len(row))})", *row)


def forge_event(file: Path, **fields: Any) -> None:
    row = {**FORGED, **fields}
    run(file, f"insert into events ({', '.join(row)}) values ({', '.join('?' * len(row))})", *row.values())


# --- single rows


def test_old_agent_row_put_back_is_damaged(registry: Registry, file: Path) -> None:
    """The attacker undoes a promotion by a row that was sealed when the version before was live."""
    old = run(file, "select * from agents")
    registry.promote("faq", "2")
    put_back(file, "agents", old)
    read = registry.read()
    assert "faq" in read.damaged and not read.agents
    with pytest.raises(ArtifactError, match="changed from outside"):
        registry.drain("faq")
    assert registry.repair("faq").live == "2" and not registry.read().damaged


def test_old_version_row_put_back_is_damaged(registry: Registry, file: Path) -> None:
    """The path of a Release that was moved, or the mark of one that was rolled back, does not come back."""
    old = run(file, "select * from versions where version = '1'")
    registry.promote("faq", "2")
    registry.promote("faq", "1")
    registry.rollback("faq")
    put_back(file, "versions", old, "version = '1'")
    assert "faq@1" in registry.read().damaged


def test_revoked_key_put_back_is_refused(file: Path, state: Path) -> None:
    with closing(ApiKeyStore(open_database(f"sqlite:///{file}", state), state=state)) as keys:
        secret, key = keys.make(["faq"])
        keys.make(["home"])
        old = run(file, "select * from keys where id = ?", key.id)
        keys.revoke(key.id)
        put_back(file, "keys", old, f"id = '{key.id}'")
    for _ in range(2):
        with (
            closing(ApiKeyStore(open_database(f"sqlite:///{file}", state), state=state)) as keys,
            pytest.raises(KeyRefusedError, match="changed from outside"),
        ):
            keys.admit(secret)


def test_withdrawn_right_to_speak_put_back_is_none(file: Path, state: Path) -> None:
    with closing(ApiKeyStore(open_database(f"sqlite:///{file}", state), state=state)) as keys:
        secret, key = keys.make(["faq"])
        people = UserVersionStore(keys._database)
        people.allow(key.id, ADA)
        old = run(file, "select * from speakers")
        people.withdraw(key.id, ADA)
        put_back(file, "speakers", old)
        assert not keys.admit(secret).may_speak_for(ADA)


def test_forgotten_person_put_back_has_no_version(registry: Registry, file: Path) -> None:
    people = UserVersionStore(registry.database)
    people.put(UserVersion(ADA, "faq", "1", "r", "a", "x", "/p"))
    old = run(file, "select * from people")
    people.forget(ADA)
    put_back(file, "people", old)
    assert not people.read().versions and people.read().damaged_count == 1


def test_no_change_makes_an_old_row_count(registry: Registry, file: Path) -> None:
    """Later changes of other rows, and a restart, do not take over what was put back."""
    registry.add(version("home", "1"))
    old = run(file, "select * from agents where name = 'faq'")
    registry.promote("faq", "2")
    put_back(file, "agents", old, "name = 'faq'")
    registry.note("home", "a change of another agent")
    assert set(registry.read().damaged) == {"faq"} and set(registry.read().agents) == {"home"}


def test_removed_agent_row_is_named_and_not_added_anew(registry: Registry, file: Path, state: Path) -> None:
    """Else a restart would register the Release of TEAM.yaml again, however old it is."""
    registry.promote("faq", "2")
    run(file, "delete from agents")
    with closing(opened(file, state)) as restarted:
        assert "faq" in restarted.read().damaged
        with pytest.raises(ArtifactError, match="changed from outside"):
            restarted.add(version("faq", "1"))
        assert restarted.repair("faq").live == "2"


# --- the head itself


def test_old_head_of_a_table_put_back_is_refused(registry: Registry, file: Path) -> None:
    """A row together with the head of its table: the root says which head is the newest."""
    rows, heads = run(file, "select * from agents"), run(file, "select * from heads where name = 'agents'")
    registry.promote("faq", "2")
    put_back(file, "agents", rows)
    put_back(file, "heads", heads, "name = 'agents'")
    with pytest.raises(ArtifactError, match="put back from outside"):
        registry.read()


@pytest.mark.parametrize("is_restarted", [False, True])
def test_whole_database_put_back_is_refused(
    registry: Registry, file: Path, state: Path, tmp_path: Path, is_restarted: bool
) -> None:
    """`STATE/registry.head` has the highest number; who restored the copy says so by `agents reseal`."""
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(tmp_path / "old.sqlite")) as copy:
        source.backup(copy)
    registry.promote("faq", "2")
    for path in tmp_path.glob("registry.sqlite*"):
        path.unlink()
    shutil.copy(tmp_path / "old.sqlite", file)
    with pytest.raises(ArtifactError, match="put back to an earlier state") as caught:
        (opened(file, state) if is_restarted else registry).read()
    assert "sartor agents reseal" in caught.value.remedy
    team = tmp_path / "team.yaml"
    team.write_text(f"base: tiny\nstate: {state}\nregistry: sqlite:///{file}\n")
    assert sartor.reseal_registry(team)["resealed"]["agents"] == 1
    assert registry.read().agents["faq"].live == "1"
    assert registry.promote("faq", "2").live == "2"


def test_removed_or_forged_head_is_refused(registry: Registry, file: Path, state: Path) -> None:
    run(file, "update heads set number = 1000 where name = 'root'")
    with pytest.raises(ArtifactError, match="changed from outside"):
        registry.read()
    run(file, "delete from heads")
    with pytest.raises(ArtifactError, match="removed from outside"):
        opened(file, state)


def test_head_file_behind_the_database_is_raised(registry: Registry, file: Path, state: Path) -> None:
    """As after a kill between the commit and the file."""
    newest = (state / "registry.head").read_bytes()
    for content in (b'{"number":1}', b""):
        (state / "registry.head").write_bytes(content)
        with closing(opened(file, state)) as restarted:
            assert restarted.read().agents["faq"].live == "1"
        assert (state / "registry.head").read_bytes() == newest


def test_registry_of_before_heads_is_bound_once(registry: Registry, file: Path, state: Path) -> None:
    """Its intact rows are trusted at the first start, a freeze goes on, and a damaged row does not start to count."""
    registry.start_canary("faq", "2", 0.5)
    registry.freeze("faq", "2")
    registry.add(version("home", "1"))
    run(file, "update agents set live = '9' where name = 'home'")
    run(file, "delete from heads")
    (state / "registry.head").unlink()
    for _ in range(2):
        with closing(opened(file, state)) as upgraded:
            read = upgraded.read()
            assert set(read.agents) == {"faq"} and set(read.damaged) == {"home"} and set(read.frozen) == {"faq"}
            assert upgraded.generation() == 5


def test_empty_registry_is_a_new_one(registry: Registry, file: Path, state: Path) -> None:
    """Named in docs/security.md: whoever empties the whole database begins a new one, whose keys stay asked for."""
    for table in ("versions", "agents", "events", "heads"):
        run(file, f"delete from {table}")
    with closing(opened(file, state)) as new:
        assert not new.read().agents
        assert new.add(version("faq", "1")).live == "1"


def _promote(file: Path, state: Path) -> None:
    with closing(opened(file, state)) as registry:
        for number in range(8):
            registry.promote("faq", str(1 + number % 2))
            assert not registry.read().damaged


def test_processes_that_change_at_once_see_no_damage(registry: Registry, file: Path, state: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_promote, args=(file, state)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not registry.read().damaged
    assert [writer.exitcode for writer in writers] == [0] * 3 and registry.generation() == 26


# --- events


def frozen(registry: Registry) -> list[str]:
    return list(registry.read().frozen)


def test_no_event_from_outside_undoes_a_freeze(registry: Registry, file: Path) -> None:
    """Forged, put back under a new number, or the freeze itself removed."""
    registry.promote("faq", "2")
    registry.promote("faq", "1")
    old = run(file, "select * from events where what = 'promoted'")[0]
    registry.start_canary("faq", "2", 0.5)
    registry.freeze("faq", "2")
    forge_event(file, generation=99, what="promoted", agent="faq", version="2")
    assert frozen(registry) == ["faq"]
    run(file, f"insert into events values ({', '.join('?' * len(old))})", 999, *old[1:])
    assert frozen(registry) == ["faq"]
    run(file, "delete from events where what = 'frozen'")
    assert frozen(registry) == ["faq"]
    with pytest.raises(ConflictError, match="frozen"):
        registry.promote("faq", "2", heeds_freeze=True)
    registry.rollback("faq")
    assert frozen(registry) == []


def test_forged_freeze_freezes_nothing(registry: Registry, file: Path) -> None:
    registry.start_canary("faq", "2", 0.5)
    forge_event(file, generation=99, what="frozen", agent="faq", version="2")
    assert frozen(registry) == []


def test_removed_or_late_event_hides_no_erasure(registry: Registry, file: Path) -> None:
    """The event is removed, and the counter was raised for a moment so that servers think that they are further."""
    people = UserVersionStore(registry.database)
    run(file, "update generation set value = 1000000")
    before = people.read().generation
    run(file, "update generation set value = 2")
    generation, _ = people.forget(ADA)
    assert generation > before
    run(file, "delete from events where what = ?", FORGOTTEN)
    assert people.forgotten_since(before) == [ADA]


def test_forged_event_forgets_nobody(registry: Registry, file: Path) -> None:
    """Else servers would let go of a person's version, and a tuning that goes on would be refused."""
    people = UserVersionStore(registry.database)
    forge_event(file, generation=99, what=FORGOTTEN, numbers=f'{{"person":"{ADA}"}}')
    assert people.forgotten_since(0) == []


def test_repair_takes_no_older_event(registry: Registry, file: Path) -> None:
    """Who removes the newest event and harms the row does not get the state before by the admin's own hand."""
    registry.promote("faq", "2")
    run(file, "delete from events where what = 'promoted'")
    run(file, "update agents set live = '1'")
    with pytest.raises(ArtifactError, match="newest event was removed"):
        registry.repair("faq")


def test_event_put_back_is_listed_once(registry: Registry, file: Path) -> None:
    old = run(file, "select * from events where what = 'added'")[0]
    registry.promote("faq", "2")
    run(file, f"insert into events values ({', '.join('?' * len(old))})", 999, *old[1:])
    assert [event.what for event in registry.events("faq")] == ["added", "added", "promoted"]


@pytest.mark.services
def test_postgres_rows_put_back_do_not_count(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row, and the whole database; a second server with the key and a state directory of its own agrees."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    with postgres() as url, closing(Registry.open(url, state)) as registry:
        registry.add(version("faq", "1"))
        registry.add(version("faq", "2"))
        with registry.database._engine.begin() as connection:
            for table in ("agents", "heads"):
                connection.execute(text(f"create table old_{table} as select * from {table}"))
        registry.promote("faq", "2")
        second = tmp_path / "second"
        second.mkdir(mode=0o700)
        shutil.copy2(state / "registry.key", second / "registry.key")
        with closing(Registry.open(url, second)) as other:
            assert other.read().agents["faq"].live == "2"
            with registry.database._engine.begin() as connection:
                connection.execute(text("set local session_replication_role = replica"))  # no foreign keys
                connection.execute(text("delete from agents"))
                connection.execute(text("insert into agents select * from old_agents"))
            assert set(other.read().damaged) == set(registry.read().damaged) == {"faq"}
            with registry.database._engine.begin() as connection:
                connection.execute(text("delete from heads"))
                connection.execute(text("insert into heads select * from old_heads"))
            for server in (registry, other):
                with pytest.raises(ArtifactError, match="put back to an earlier state"):
                    server.read()
