"""`sartor studio` as a process: its address, the owner's one-time link, users and backups, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import sartor
from sartor.cli import main

PASSWORD = "four words are enough"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    return int(str(ended.value.code)), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_users_are_added_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ("--folder", str(tmp_path))
    code, added = call(capsys, "studio", "user", "add", "Ada", "--role", "owner", *folder)
    assert code == 0 and added["link"].startswith("/welcome/")
    call(capsys, "studio", "user", "add", "Ben", *folder)
    rows = call(capsys, "studio", "user", "list", *folder)[1]["users"]
    assert [(row["name"], row["role"], row["has_password"]) for row in rows] == [
        ("Ada", "owner", False),
        ("Ben", "viewer", False),
    ]
    assert call(capsys, "studio", "user", "remove", "Ben", *folder)[0] == 0
    code, answer = call(capsys, "studio", "user", "remove", "Ada", *folder)
    assert code == 2 and "only owner" in answer["error"]["problem"]


def test_backup_is_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = ("--folder", str(tmp_path)), str(tmp_path / "studio.zip")
    assert call(capsys, "studio", "backup", file, *folder)[0] == 2
    call(capsys, "studio", "user", "add", "Ada", *folder)
    assert call(capsys, "studio", "backup", file, *folder)[0] == 0
    call(capsys, "studio", "user", "add", "Ben", *folder)
    assert call(capsys, "studio", "restore", file, *folder)[1]["users"] == 1
    assert len(call(capsys, "studio", "user", "list", *folder)[1]["users"]) == 1


def test_folder_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "studio", str(tmp_path / "none"))[0] == 2


@pytest.mark.services
def test_owner_logs_in_by_the_link_and_the_studio_ends_by_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sartor", "studio", str(tmp_path), "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            facts = json.loads(process.stdout.readline())
            assert facts["address"].startswith("http://127.0.0.1:")
            with httpx.Client(trust_env=False) as client:
                page = client.get(facts["owner_link"])
                csrf = re.search(r'name=csrf value="(\w+)"', page.text)
                assert csrf
                fields = {"csrf": csrf[1], "name": "Ada", "password": PASSWORD, "repeated": PASSWORD}
                assert client.post(facts["owner_link"], data=fields).status_code == 303
                home = client.get(facts["address"] + "/")
                assert home.status_code == 200 and "Ada" in home.text
                assert client.get(facts["owner_link"]).status_code == 403
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM or process.returncode == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_other_host_is_listened_on_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        def __init__(self, app: Any, host: str, port: int) -> None:
            self.address = f"http://{host}:{port}"

        async def serve(self) -> None:
            pass

    monkeypatch.setattr("sartor.studio.studio_server.StudioServer", Server)
    with pytest.raises(SystemExit):
        main(["studio", str(tmp_path), "--host", "0.0.0.0"])
    shown = capsys.readouterr()
    assert "warning" in shown.err and "passwords" in shown.err
    assert "listening on http://0.0.0.0:8765" in shown.out and "/welcome/" in shown.out
    with pytest.raises(SystemExit):
        main(["studio", str(tmp_path)])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("is_adapter", [False, True])
def test_serve_shows_the_pages_below_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_adapter: bool
) -> None:
    mounted: dict[str, Any] = {}

    def serve(team: Path, flags: list[str], *, mounts: dict[str, Any], **callbacks: Any) -> None:
        mounted.update(mounts)

    monkeypatch.setattr(sartor, "serve_adapter" if is_adapter else "serve", serve, raising=False)
    target = tmp_path / "adapter" if is_adapter else tmp_path / "team.yaml"
    target.mkdir() if is_adapter else target.touch()
    with pytest.raises(SystemExit):
        main(["serve", str(target), "--studio", str(tmp_path)])
    assert list(mounted) == ["/studio"] and "/studio/welcome/" in capsys.readouterr().err
    mounted.clear()
    with pytest.raises(SystemExit):
        main(["serve", str(target)])
    assert mounted == {}
