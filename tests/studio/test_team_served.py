"""Promotion and rollback by the page of the server itself, while clients read streamed replies of the same agent."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from release_fixtures import quiet_gates, switch_team
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer, bind
from sartor.serving.http.startup import build_services
from sartor.serving.team_config import load
from sartor.studio.accounts import Role
from sartor.studio.studio_app import StudioApp
from serving import Log
from studio_site import PASSWORD

pytestmark = pytest.mark.circle
CSRF = re.compile(r'name=csrf value="([0-9a-f]{64})"')


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and trust are the test's own, also in this tier."""
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "sartor-home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@contextmanager
def served(team: Path, app: StudioApp) -> Iterator[str]:
    """A server of the team with its workers and the studio below /studio, in a thread; yields its address."""
    told: list[str] = []
    handles: list[tuple[asyncio.AbstractEventLoop, HttpServer]] = []
    is_ready = threading.Event()

    def ready(address: str) -> None:
        told.append(address)
        is_ready.set()

    async def run() -> None:
        options = load(team)
        async with build_services(options) as services:
            server = HttpServer(services, options, log=RequestLog(Log()), mounts={"/studio": app})
            handles.append((asyncio.get_running_loop(), server))
            await server.serve(bind(options), ready)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert is_ready.wait(300), "the server did not start"
        yield told[0]
    finally:
        for loop, server in handles:
            loop.call_soon_threadsafe(server.stop)
        thread.join(120)
        assert not thread.is_alive()


class Asker(threading.Thread):
    """Streams replies of `switch` one after the other. versions: that answered; faults: replies that did not end."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address, self.is_over = address, False
        self.versions: list[str] = []
        self.faults: list[str] = []

    def run(self) -> None:
        body = {"model": "switch", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True}
        with httpx.Client(trust_env=False, timeout=120) as client:
            while not self.is_over:
                with client.stream("POST", f"{self.address}/v1/chat/completions", json=body) as answer:
                    lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
                if answer.status_code != 200 or lines[-1:] != ["data: [DONE]"]:
                    self.faults.append(f"{answer.status_code}: {lines[-2:]}")
                    continue
                self.versions.append(json.loads(lines[0].removeprefix("data: "))["model"])


def change(client: httpx.Client, page: str, **fields: str) -> None:
    csrf = CSRF.search(client.get(page).text)
    assert csrf
    answer = client.post(page, data={"csrf": csrf[1], "agent": "switch", **fields})
    assert answer.status_code == 303, answer.text


def wait_for(asker: Asker, version: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if asker.versions[-3:] == [version] * 3:
            return
        time.sleep(0.1)
    raise AssertionError(f"{version} does not answer: {asker.versions[-5:]}, {asker.faults[:2]}")


def test_promote_and_rollback_lose_no_streamed_reply(
    adapter: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_gates(monkeypatch)
    (tmp_path / "work").mkdir()
    settings = "engine: {kind: local, threads: 1}\nworkers: {count: 1, spare: 0}\nhttp: {port: 0}\n"
    team = switch_team(tmp_path, adapter, tiny_base, settings)
    with closing(StudioApp(tmp_path / "work", team=team)) as app, served(team, app) as address:
        accounts = app.studio.accounts
        accounts.accept(accounts.add_user("ada", Role.OWNER), "ada", PASSWORD)
        with httpx.Client(base_url=f"{address}/studio", trust_env=False, timeout=60) as client:
            csrf: Any = CSRF.search(client.get("/login").text)
            client.post("/login", data={"csrf": csrf[1], "name": "ada", "password": PASSWORD, "next": "/"})
            asker = Asker(address)
            asker.start()
            try:
                wait_for(asker, "switch@1.0")
                add = ["agents", "add", str(tmp_path / "switch-1.1"), f"--team={team}"]
                app.studio.jobs.start(add, title="add", by="ada", cwd=tmp_path, is_heavy=False)
                until = time.monotonic() + 120
                while '<option value="1.1"' not in client.get("/team/server").text and time.monotonic() < until:
                    time.sleep(0.5)
                fields = {"action": "promote", "version": "1.1", "expected": "1.0", "reason": "better"}
                change(client, "/team/server", **fields)
                wait_for(asker, "switch@1.1")
                page = client.get("/team/server").text
                assert "1.0 → 1.1" in page and "<td>ada</td>" in page and "better" in page and address in page
                change(client, "/team/server", action="rollback", expected="1.1", reason="worse")
                wait_for(asker, "switch@1.0")
            finally:
                asker.is_over = True
                asker.join(120)
            page = client.get("/team/server").text
    assert asker.faults == [] and {"switch@1.0", "switch@1.1"} == set(asker.versions)
    assert "1.1 → 1.0" in page and "<td>ada</td>" in page and "worse" in page and "taken back" in page
