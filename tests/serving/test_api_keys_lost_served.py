"""Real servers whose keys are emptied, and whose registry is lost for more than a minute: SQLite and Postgres."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import sartor
from postgres_server import postgres
from sartor.serving import api_keys
from sartor.serving.api_keys import FRESH_S, STALE_S
from server_process import serve_command

# What a request may take while the registry is lost; a server that waits for it takes minutes
PATIENCE_S = 25.0


@dataclass
class TeamFolder:
    """A team's directory. registry: "" is SQLite in its state."""

    folder: Path
    base: str
    commands: Mapping[str, str]
    registry: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir()
        registry = f"registry: {self.registry}\n" if self.registry else ""
        self.team.write_text(
            f"base: {self.base}\nworkers: {{count: 1, spare: 0, start_s: 600, hang_s: 300}}\nspeech: {{voice: 'off'}}\n{registry}"
        )

    @property
    def team(self) -> Path:
        return self.folder / "team.yaml"

    @property
    def file(self) -> Path:
        return self.folder / ".team" / "registry.sqlite"

    def key(self) -> str:
        return str(sartor.make_key(self.team, ["base"])["key"])

    @contextmanager
    def serving(self) -> Iterator[httpx.Client]:
        command = serve_command(self.commands)
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=log, text=True)
        with process:
            try:
                assert process.stdout
                line = process.stdout.readline()
                assert line, (self.folder / "log").read_text()
                ready = json.loads(line)
                assert ready["keys"] is True
                with httpx.Client(base_url=ready["address"], timeout=30) as client:
                    yield client
                process.send_signal(signal.SIGTERM)
                assert process.wait(120) == 143
            finally:
                process.kill()


def ask(client: httpx.Client, key: str, **fields: Any) -> httpx.Response:
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}
    return client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"} if key else {})


def refuses_everybody(client: httpx.Client, key: str) -> None:
    for sent in (key, ""):
        for answer in (
            ask(client, sent),
            ask(client, sent, stream=True),
            client.get("/v1/models"),
            client.get("/metrics"),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["kind"]) == (503, "UnavailableError"), answer.text
            assert "sartor agents key NAME" in error["remedy"]
    health = client.get("/health")
    assert health.status_code == 503 and "had API keys" in health.json()["troubles"]["API keys"]


def loses_its_keys(team: TeamFolder, empty: Callable[[], None], lose_marks: Callable[[], None]) -> None:
    key = team.key()
    with team.serving() as client:
        assert ask(client, key).status_code == 200 and ask(client, "").status_code == 401
        empty()
        time.sleep(FRESH_S + 0.2)
        refuses_everybody(client, key)
    lose_marks()
    with team.serving() as client:
        refuses_everybody(client, key)
        new = team.key()
        time.sleep(FRESH_S + 0.2)
        assert ask(client, new).status_code == 200
        assert ask(client, key).status_code == ask(client, "").status_code == 401
        assert client.get("/health").status_code == 200
    assert "Traceback" not in (team.folder / "log").read_text()


def change(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.services
def test_sqlite_server_whose_keys_are_emptied_stays_shut(
    tiny_base: Path, tmp_path: Path, commands: dict[str, str]
) -> None:
    team = TeamFolder(tmp_path / "team", str(tiny_base), commands)

    def lose_registry() -> None:
        for file in team.file.parent.glob("registry.sqlite*"):
            file.unlink()

    loses_its_keys(team, lambda: change(team.file, "delete from keys"), lose_registry)


@contextmanager
def rows(url: str) -> Iterator[Any]:
    import psycopg

    plain = url.replace("+psycopg", "").replace("${DB_PASSWORD}", os.environ["DB_PASSWORD"])
    with psycopg.connect(plain, autocommit=True) as connection:
        yield connection


@pytest.mark.services
def test_postgres_server_whose_keys_are_emptied_stays_shut(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: dict[str, str]
) -> None:
    """Both servers of a team refuse; one keeps its state directory while the registry is emptied, one the other way round."""
    monkeypatch.setenv("DB_PASSWORD", "s3cret")
    with postgres() as url:
        team = TeamFolder(tmp_path / "team", str(tiny_base), commands, url)

        def empty(*tables: str) -> None:
            with rows(url) as connection:
                connection.execute(f"truncate {', '.join(tables)}")

        loses_its_keys(team, lambda: empty("keys"), (team.folder / ".team" / api_keys.FILE).unlink)
        empty("keys", "events", "generation")
        with team.serving() as client:
            refuses_everybody(client, "")
        other = TeamFolder(tmp_path / "other", str(tiny_base), commands, url)
        # a state directory of its own and the same database: it needs the key of the rows' seals
        (other.folder / ".team").mkdir(mode=0o700, exist_ok=True)
        shutil.copy2(team.folder / ".team" / "registry.key", other.folder / ".team" / "registry.key")
        with other.serving() as client:
            refuses_everybody(client, "")


@dataclass
class Watch:
    """What a client was answered while the registry was lost: (seconds since, status, seconds that it took)."""

    client: httpx.Client
    key: str
    answers: list[tuple[float, int, float]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def follow(self, lost_at: float, until: float) -> None:
        while (began := time.monotonic()) < until:
            status = ask(self.client, self.key).status_code
            self.answers.append((began - lost_at, status, time.monotonic() - began))
            began = time.monotonic()
            self.client.get("/health")
            self.waits.append(time.monotonic() - began)
            time.sleep(1)

    def check(self) -> None:
        """200 at first, 503 from a minute on, and every answer in time."""
        statuses = [status for _, status, _ in self.answers]
        changed = statuses.index(503)
        assert statuses == [200] * changed + [503] * (len(statuses) - changed), self.answers
        assert STALE_S - 10 < self.answers[changed][0] < STALE_S + PATIENCE_S, self.answers
        assert max(took for _, _, took in self.answers) < PATIENCE_S > max(self.waits)
        error = ask(self.client, self.key).json()["error"]
        assert "does not answer" in error["message"] and "sartor agents key --list" in error["remedy"]

    def is_back(self, status: int) -> None:
        until = time.monotonic() + 20
        while (answered := ask(self.client, self.key).status_code) == 503 and time.monotonic() < until:
            time.sleep(0.5)
        assert answered == status


def processes_of(url: str) -> list[int]:
    """The server's process and those that it has for its clients."""
    with rows(url) as connection:
        folder = connection.execute("show data_directory").fetchone()[0]
    first = int((Path(folder) / "postmaster.pid").read_text().split()[0])
    return [first, *(int(pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split())]


@pytest.mark.alone
@pytest.mark.services
def test_keys_hold_for_a_minute_while_the_registry_is_lost(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: dict[str, str]
) -> None:
    """SQLite is moved away and a key revoked in it; Postgres hangs, so that nothing ever fails there and nothing answers."""
    monkeypatch.setenv("DB_PASSWORD", "s3cret")
    with ExitStack() as stack:
        url = stack.enter_context(postgres())
        files = TeamFolder(tmp_path / "files", str(tiny_base), commands)
        server = TeamFolder(tmp_path / "server", str(tiny_base), commands, url)
        watches = [
            Watch(stack.enter_context(team.serving()), key) for team in (files, server) for key in (team.key(),)
        ]
        assert [ask(watch.client, watch.key).status_code for watch in watches] == [200, 200]
        change(files.file, "pragma wal_checkpoint(truncate)")
        hidden = files.file.with_name("hidden.sqlite")
        files.file.rename(hidden)
        hanging = processes_of(url)
        for pid in hanging:
            os.kill(pid, signal.SIGSTOP)
        try:
            lost_at = time.monotonic()
            threads = [
                threading.Thread(target=watch.follow, args=(lost_at, lost_at + STALE_S + 40)) for watch in watches
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for watch in watches:
                watch.check()
        finally:
            for pid in hanging:
                with contextlib.suppress(ProcessLookupError):  # a backend whose client gave it up
                    os.kill(pid, signal.SIGCONT)
        watches[1].is_back(200)
        change(hidden, "update keys set revoked = '2026-01-01T00:00:00Z'")
        for file in files.file.parent.glob("registry.sqlite*"):
            file.unlink()
        hidden.rename(files.file)
        watches[0].is_back(401)
