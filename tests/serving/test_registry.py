from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from dispatch_fakes import no_fsync, sqlite_url, version
from postgres_server import postgres
from sartor.core import database
from sartor.core.errors import (
    ArtifactError,
    BusyError,
    ConfigError,
    ConflictError,
    MissingError,
    SartorError,
    UnknownAgentError,
)
from sartor.serving.registry import registry_schema
from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.registry_schema import MOST_EARLIER

__all__ = ["no_fsync"]
FAQ = [version("faq", str(number)) for number in range(4)]


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    opened = Registry.open(sqlite_url(tmp_path))
    yield opened
    opened.close()


def execute(tmp_path: Path, *statements: str) -> None:
    """As somebody with an editor would: past every check."""
    with sqlite3.connect(tmp_path / "registry.sqlite") as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_the_first_version_is_live_and_each_change_is_logged(registry: Registry) -> None:
    for one in FAQ[:3]:
        registry.add(one, cause=ChangeCause("ada", "a first team"))
    registry.promote("faq", "1", expected="0", cause=ChangeCause("ben", "better", {"gain": 0.25}))
    registry.start_canary("faq", "2", 0.1, expected="1")
    registry.rollback("faq")
    agent = registry.rollback("faq", expected="1")
    assert (agent.live, agent.previous, agent.candidate) == ("0", "", "")
    told = [
        (event.what, event.version, event.was.get("live"), event.became["live"]) for event in registry.events("faq")
    ]
    assert told == [
        ("added", "0", None, "0"),
        ("added", "1", "0", "0"),
        ("added", "2", "0", "0"),
        ("promoted", "1", "0", "1"),
        ("canary", "2", "1", "1"),
        ("rolled back", "2", "1", "1"),
        ("rolled back", "1", "1", "0"),
    ]
    third = registry.events()[3]
    assert (third.who, third.why, third.numbers) == ("ben", "better", {"gain": 0.25})
    assert [event.generation for event in registry.events()] == list(range(1, 8)) and registry.generation() == 7
    assert {name: one.status for name, one in registry.read().versions.items()} == {
        "faq@0": "admitted",
        "faq@1": "rolled_back",
        "faq@2": "rolled_back",
    }


def test_a_version_means_one_release_for_ever(registry: Registry) -> None:
    registry.add(FAQ[0])
    before = registry.generation()
    registry.add(FAQ[0])
    assert registry.generation() == before
    with pytest.raises(ConflictError, match="never another one"):
        registry.add(replace(FAQ[0], release_id="other"))
    registry.add(replace(FAQ[0], release="/moved"))
    assert registry.read().versions["faq@0"].release == "/moved"
    registry.remove("faq")
    with pytest.raises(ConflictError):
        registry.add(replace(FAQ[0], release_id="other"))
    with pytest.raises(UnknownAgentError):
        registry.promote("faq", "0")
    assert registry.add(FAQ[1]).live == "1"


def test_what_is_not_so_is_refused_with_what_stands_there(registry: Registry) -> None:
    registry.add(FAQ[0])
    registry.add(FAQ[1])
    before = registry.read()
    refused: list[tuple[type[SartorError], str, Callable[[], Any]]] = [
        (ConflictError, "'0' live", lambda: registry.promote("faq", "1", expected="7")),
        (UnknownAgentError, "it has: 0, 1", lambda: registry.promote("faq", "9")),
        (UnknownAgentError, "there are: faq", lambda: registry.promote("faz", "1")),
        (ConflictError, "no previous", lambda: registry.rollback("faq")),
        (ConflictError, "nothing on trial", lambda: registry.rollback("faq", trial="1")),
        (ConflictError, "live already", lambda: registry.start_canary("faq", "0", 0.5)),
        (ConfigError, "0..1", lambda: registry.start_canary("faq", "1", 1.5)),
        (ConfigError, "no request", lambda: registry.start_shadow("faq", "1", 0.0)),
        (ConflictError, "as it was written", lambda: registry.repair("faq")),
    ]
    for kind, words, change in refused:
        with pytest.raises(kind, match=words) as caught:
            change()
        assert caught.value.remedy and "faq-9" not in caught.value.remedy, "no path is invented"
    assert registry.read() == before and registry.generation() == before.generation


def test_how_often_one_may_go_back_is_bounded(registry: Registry) -> None:
    for one in FAQ:
        registry.add(one)
    for turn in range(20):
        registry.promote("faq", str((turn + 1) % 4))
    assert len(registry.read().agents["faq"].earlier) == MOST_EARLIER


def test_externally_changed_rows_are_damaged_and_others_are_read(registry: Registry, tmp_path: Path) -> None:
    """Damaged rows refuse changes; repair, a promotion or adding the same Release mends them."""
    for one in (*FAQ[:2], version("home", "1"), version("ops", "1")):
        registry.add(one)
    registry.promote("faq", "1")
    execute(
        tmp_path,
        "update agents set live = '0' where name = 'faq'",
        "update agents set canary_fraction = 'x' where name = 'ops'",
        "update versions set facts = cast(x'ff' as text) where agent = 'faq' and version = '0'",
    )
    read = registry.read()
    assert set(read.damaged) == {"faq", "ops", "faq@0"} and set(read.agents) == {"home"}
    assert all("sartor agents" in why for why in read.damaged.values())
    for change in (
        lambda: registry.rollback("faq"),
        lambda: registry.promote("faq", "1", expected="0"),
        lambda: registry.drain("ops"),
    ):
        with pytest.raises(ArtifactError, match="changed from outside"):
            change()
    assert registry.repair("faq").live == "1"
    assert registry.promote("ops", "1").live == "1"
    with pytest.raises(ArtifactError, match="faq@0"):
        registry.promote("faq", "0")
    with pytest.raises(ConflictError):  # a damaged row does not make room for another Release
        registry.add(replace(FAQ[0], release_id="other"))
    registry.add(FAQ[0])
    assert not registry.read().damaged
    execute(tmp_path, "delete from generation")
    assert registry.promote("faq", "0").generation > read.generation


def test_a_row_that_vanished_is_written_anew_as_the_log_has_it(registry: Registry, tmp_path: Path) -> None:
    registry.add(FAQ[0], fallback=("base",))
    execute(tmp_path, "delete from agents")
    assert registry.repair("faq").fallback == ("base",)
    with pytest.raises(ArtifactError, match="log does not know"):
        registry.repair("home")


def test_the_log_is_append_only_and_a_forged_event_is_left_out(registry: Registry, tmp_path: Path) -> None:
    registry.add(FAQ[0])
    for verb in ("update events set who = 'eve'", "delete from events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            execute(tmp_path, verb)
    execute(
        tmp_path,
        "insert into events select 9, generation, at, 'eve', what, agent, version, why, was, became, numbers, checksum from events",
    )
    assert [event.who for event in registry.events()] == [""]


def test_open_refuses_newer_schema_and_non_database(tmp_path: Path) -> None:
    """An in-memory URL and an unknown database dialect are refused as well."""
    Registry.open(sqlite_url(tmp_path)).close()
    execute(tmp_path, "update alembic_version set version_num = '9999'")
    with pytest.raises(ArtifactError, match="'9999'.*does not know"):
        Registry.open(sqlite_url(tmp_path))
    (tmp_path / "registry.sqlite").write_bytes(b"this is no database at all, whatever it is called" * 99)
    with pytest.raises(ArtifactError, match="damaged"):
        Registry.open(sqlite_url(tmp_path))
    with pytest.raises(ConfigError, match="memory"):
        Registry.open("sqlite://")
    with pytest.raises(ConfigError, match="neither"):
        Registry.open("mssql+pyodbc://host/db")


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "migrations"
    shutil.copytree(registry_schema.MIGRATIONS, broken, ignore=shutil.ignore_patterns("__pycache__"))
    revision = broken / "versions" / "r0001_registry.py"
    revision.write_text(revision.read_text() + "\n    op.execute('select no_such_thing')\n")
    monkeypatch.setattr(registry_schema, "MIGRATIONS", broken)
    with pytest.raises(ArtifactError, match="no_such_thing"):
        Registry.open(sqlite_url(tmp_path / "state"))
    monkeypatch.undo()
    assert sqlite3.connect(tmp_path / "state" / "registry.sqlite").execute(
        "select count(*) from sqlite_master"
    ).fetchone() == (0,)
    Registry.open(sqlite_url(tmp_path / "state")).add(FAQ[0])


def test_an_older_form_comes_to_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Registry.open(sqlite_url(tmp_path)).add(FAQ[0])
    newer = tmp_path / "migrations"
    shutil.copytree(registry_schema.MIGRATIONS, newer, ignore=shutil.ignore_patterns("__pycache__"))
    (newer / "versions" / "r0004_more.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '0004', '0003'\n"
        "def upgrade():\n    op.create_table('more', sa.Column('id', sa.Integer, primary_key=True))\n"
    )
    monkeypatch.setattr(registry_schema, "MIGRATIONS", newer)
    opened = Registry.open(sqlite_url(tmp_path))
    assert opened.read().agents["faq"].live == "0"
    execute(tmp_path, "insert into more values (1)")


def test_no_room_for_the_index_of_the_log_is_a_full_disk(registry: Registry) -> None:
    """SQLite says an I/O error there, when nobody else has the file open."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    with pytest.raises(MissingError, match="full.*nothing was changed"), registry.database.read():
        raise DBAPIError("begin immediate", (), error)


def test_a_full_disk_and_a_locked_file_change_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(FAQ[0])
    registry.add(FAQ[1])
    before = registry.read()

    def small(connection: sqlite3.Connection, record: object) -> None:
        connection.execute("pragma max_page_count = 1").fetchall()  # SQLite's own full disk: no further page

    full = Registry.open(sqlite_url(tmp_path))
    event.listen(full.database._engine, "connect", small)
    with pytest.raises(MissingError, match="full.*nothing was changed") as caught:
        for _ in range(200):  # until the pages that it has are used up
            full.note("faq", "x" * 4000)
    assert caught.value.remedy.startswith("df -h ")
    assert registry.read().agents["faq"].live == "0" and registry.read().damaged == {}
    assert registry.read().generation == registry.events()[-1].generation
    before = registry.read()
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    other = sqlite3.connect(tmp_path / "registry.sqlite", isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(BusyError, match="locked"):
        registry.promote("faq", "1")
    assert registry.read() == before  # readers do not wait for a writer
    other.execute("rollback")
    other.close()
    assert registry.promote("faq", "1").live == "1"


def test_who_listens_is_told_of_each_change_made_here(registry: Registry) -> None:
    told: list[int] = []
    with registry.subscribed(lambda: told.append(registry.generation())):
        registry.add(FAQ[0])
        with pytest.raises(ConflictError):
            registry.rollback("faq")
    registry.drain("faq")
    assert told == [1]


def test_of_threads_that_race_one_wins(registry: Registry) -> None:
    for one in FAQ:
        registry.add(one)
    won: list[str] = []
    together = threading.Barrier(3)

    def race(number: str) -> None:
        together.wait()
        try:
            registry.promote("faq", number, expected="0")
            won.append(number)
        except ConflictError:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in ("1", "2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and registry.read().agents["faq"].live == won[0]


class Machine(RuleBasedStateMachine):
    """The registry, by two handles on one file, against a model of a few lines."""

    versions = st.sampled_from(["0", "1", "2", "3"])
    expected = st.sampled_from([None, "0", "1", "2"])

    @initialize()
    def begin(self) -> None:
        self.path = Path(TEMPLATE[0]) / f"{time.monotonic_ns():x}"
        self.path.mkdir()
        shutil.copy(Path(TEMPLATE[0]) / "registry.sqlite", self.path)
        self.handles = [Registry.open(sqlite_url(self.path)) for _ in range(2)]
        self.turn = 0
        self.live, self.earlier, self.candidate, self.state = "0", ["0"] * 0, "", "absent"
        self.known: set[str] = set()

    def teardown(self) -> None:
        for handle in getattr(self, "handles", []):
            handle.close()

    def attempt(self, may: bool, change: Callable[[Registry], Any]) -> bool:
        """Make a change by the other handle; it must succeed exactly if the model says so."""
        self.turn += 1
        handle = self.handles[self.turn % 2]
        before = handle.read()
        if may:
            assert change(handle).generation > before.generation or before.generation == handle.generation()
            return True
        with pytest.raises((ConflictError, UnknownAgentError)):
            change(handle)
        assert handle.read() == before
        return False

    @rule(number=versions)
    def add(self, number: str) -> None:
        self.attempt(True, lambda registry: registry.add(version("faq", number)))
        self.known.add(number)
        if self.state in ("absent", "removed"):
            self.live, self.earlier, self.candidate, self.state = number, [], "", "serving"

    @property
    def is_there(self) -> bool:
        return self.state in ("serving", "draining")

    @rule(number=versions, expected=expected)
    def promote(self, number: str, expected: str | None) -> None:
        may = self.is_there and number in self.known and expected in (None, self.live)
        if self.attempt(may, lambda registry: registry.promote("faq", number, expected=expected)):
            if number != self.live:
                self.earlier = [*self.earlier, self.live][-MOST_EARLIER:]
            self.live, self.candidate, self.state = number, "", "serving"

    @rule(expected=expected)
    def rollback(self, expected: str | None) -> None:
        may = self.is_there and expected in (None, self.live) and bool(self.candidate or self.earlier)
        if self.attempt(may, lambda registry: registry.rollback("faq", expected=expected)):
            if self.candidate:
                self.candidate = ""
            else:
                self.live, self.state = self.earlier.pop(), "serving"

    @rule(number=versions)
    def canary(self, number: str) -> None:
        may = self.is_there and number in self.known and number != self.live and self.candidate in ("", number)
        if self.attempt(may, lambda registry: registry.start_canary("faq", number, 0.5)):
            self.candidate = number

    @rule()
    def drain(self) -> None:
        if self.attempt(self.is_there, lambda registry: registry.drain("faq")):
            self.state = "draining"

    @rule()
    def remove(self) -> None:
        if self.attempt(self.is_there, lambda registry: registry.remove("faq")):
            self.state, self.candidate = "removed", ""

    @rule()
    def hurt_and_repair(self) -> None:
        if self.state != "absent":
            execute(self.path, "update agents set note = 'eve was here'")
            assert set(self.handles[0].read().damaged) == {"faq"}
            self.handles[0].repair("faq")

    @invariant()
    def agrees(self) -> None:
        if getattr(self, "handles", None) and self.state != "absent":
            read = self.handles[0].read()
            agent = read.agents["faq"]
            assert (agent.live, list(agent.earlier), agent.candidate, agent.state) == (
                self.live,
                self.earlier,
                self.candidate,
                self.state,
            )
            assert {one.version for one in read.versions.values()} == self.known and not read.damaged
            assert self.handles[1].events("faq", limit=1)[-1].became == agent.as_json()


TEMPLATE: list[str] = []


@pytest.fixture
def template(tmp_path: Path) -> None:
    Registry.open(sqlite_url(tmp_path)).close()
    TEMPLATE[:] = [str(tmp_path)]


Machine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.usefixtures("template")
class TestMachine(Machine.TestCase):
    """Any sequence of changes, by two handles in turn, is what the model says."""


RACE = """
import sys
from sartor.core import database
from sartor.core.errors import ConflictError
from sartor.serving.registry.registry import Registry
database.SYNCHRONOUS = "off"  # of three that write at once one waits long for a slow disk
url, mine = sys.argv[1:]
registry = Registry.open(url)
print("ready", flush=True)
won = 0
for turn in sys.stdin:
    try:
        registry.promote("faq", mine, expected=turn.strip())
        print("won", flush=True)
    except ConflictError:
        print("lost", flush=True)
"""


@pytest.mark.services
def test_racing_processes_have_one_winner_per_promotion(
    tmp_path: Path,
) -> None:
    """The three processes also create and migrate a new registry file at the same time."""
    url = sqlite_url(tmp_path)
    command = [sys.executable, "-c", RACE, url]
    racers = [
        subprocess.Popen(
            [*command, mine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        for mine in ("1", "2", "3")
    ]  # nobody has made the file: all three migrate it at once
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
        registry = Registry.open(url)
        for one in FAQ:
            registry.add(one)
        for _ in range(30):
            live = registry.promote("faq", "0").live
            for racer in racers:
                racer.stdin.write(live + "\n")
                racer.stdin.flush()
            told = [racer.stdout.readline().strip() for racer in racers]
            assert sorted(told) == ["lost", "lost", "won"]
            assert registry.read().agents["faq"].live == str(told.index("won") + 1)
        registry.close()
    finally:
        for racer in racers:
            racer.communicate()
    assert [racer.returncode for racer in racers] == [0, 0, 0]


KILL = """
import sys
from sartor.serving.registry.registry import Registry
registry = Registry.open(sys.argv[1])
turn = 0
while True:
    registry.promote("faq", str(turn % 4))
    turn += 1
    if turn == 3:
        print("at work", flush=True)
"""


@pytest.mark.services
def test_killed_process_leaves_only_whole_changes(tmp_path: Path) -> None:
    """After each kill the agent and the generation equal the last event, and nothing is damaged."""
    registry = Registry.open(sqlite_url(tmp_path))
    for one in FAQ:
        registry.add(one)
    for turn in range(6):
        killed = subprocess.Popen(
            [sys.executable, "-c", KILL, sqlite_url(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert killed.stdout.readline() == "at work\n"
        time.sleep(0.007 * turn)
        killed.kill()
        killed.wait()
        killed.stdout.close()
        read, (event,) = registry.read(), registry.events(limit=1)
        assert (
            not read.damaged and read.agents["faq"].as_json() == event.became and read.generation == event.generation
        )
    registry.close()


@pytest.mark.services
def test_postgres_keeps_a_registry_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hunter:2/@%")
    with postgres() as url:
        handles = []
        opening = [threading.Thread(target=lambda: handles.append(Registry.open(url))) for _ in range(2)]
        for thread in opening:
            thread.start()
        for thread in opening:
            thread.join()
        one, other = handles
        for each in FAQ:
            one.add(each)
        assert other.promote("faq", "1", expected="0").live == "1"
        with pytest.raises(ConflictError):
            one.promote("faq", "2", expected="0")
        won: list[bool] = []

        def race(handle: Registry, number: str) -> None:
            try:
                handle.promote("faq", number, expected="1")
                won.append(True)
            except ConflictError:
                won.append(False)

        racers = [threading.Thread(target=race, args=pair) for pair in ((one, "2"), (other, "3"))]
        for thread in racers:
            thread.start()
        for thread in racers:
            thread.join()
        assert sorted(won) == [False, True]
        with one.database.change() as connection:
            connection.exec_driver_sql("update agents set live = '0'")
        assert set(other.read().damaged) == {"faq"}
        other.repair("faq")
        with pytest.raises(MissingError, match="append-only"), one.database.change() as connection:
            connection.exec_driver_sql("delete from events")
        one.close()
        other.close()
        monkeypatch.setenv("DB_PASSWORD", "wrong:3/@%")
        with pytest.raises(MissingError) as caught:
            Registry.open(url)
        assert "wrong:3" not in str(caught.value)
