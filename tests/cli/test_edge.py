"""`sartor edge ...`: what each command says as JSON, and how what is wrong comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sartor.cli import main
from sartor.core import signing
from sartor.core.errors import HealthError
from sartor.edge.update import health_check
from updating import World, adapter, release

COMMANDS = (
    "keygen",
    "publish",
    "widen",
    "halt",
    "refresh",
    "rotate",
    "withdraw",
    "watch",
    "sync",
    "status",
    "start",
    "confirm",
    "rollback",
    "verify",
    "ask",
)


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main(["edge", *map(str, arguments), "--json"])
        said = self.capsys.readouterr()
        assert ended.value.code == code, said.err + said.out
        found: dict[str, Any] = json.loads(said.out.splitlines()[-1])
        return found


@pytest.fixture
def edge(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Versions whose health check fails: the hand-made releases have no base to ask."""
    ill: set[str] = set()

    def check(self: Any, path: Path) -> None:
        if path.name in ill:
            raise HealthError("canary: 1 of 2 of the device's prompts: line 1 (exact)", "publish another")

    monkeypatch.setattr(health_check.Health, "__call__", check)
    return ill


def test_from_keys_to_a_version_on_a_device_and_back(
    world: World, edge: Shell, checks: set[str], tmp_path: Path
) -> None:
    keys, repository, store = tmp_path / "new-keys", tmp_path / "new", tmp_path / "box"
    made = {
        version: release(tmp_path / version, version, adapter(0, moved), world.key)
        for version, moved in (("1.0", 0.0), ("1.1", 0.05), ("1.2", 0.1))
    }
    assert set(edge("keygen", keys)["roles"]) == {"root", "targets", "snapshot", "timestamp"}
    said = edge("publish", made["1.0"], repository, "--keys", keys, "--key", world.key, "--days", 30)
    assert (said["name"], said["version"], said["percent"], said["deltas"]) == ("home", "1.0", 100, {})
    root = repository / "metadata" / "1.root.json"
    signing.keygen(tmp_path / "device-key", purposes=("fleet",))
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "box-1.pub").write_bytes((tmp_path / "device-key" / "sartor.pub").read_bytes())
    where = ["--store", store]
    bring = ["sync", repository.as_uri(), "home", "--device", "box-1", "--root", root, *where]
    report = ["--report", tmp_path / "gathered", "--key", tmp_path / "device-key"]

    said = edge(*bring, *report)
    assert (said["version"], said["changed"], said["trial"]) == ("1.0", True, None)
    assert Path(said["release"]).is_dir() and said["reported"] == [{"version": "1.0", "outcome": "pass", "reason": ""}]
    edge("publish", made["1.1"], repository, "--keys", keys, "--key", world.key, "--percent", 0)
    assert edge(*bring)["changed"] is False
    assert edge("widen", repository, "home", "1.1", 100, "--keys", keys)["percent"] == 100
    assert edge(*bring, "--starts", 2)["trial"] == {"left": 2, "of": 2}
    assert edge("start", "home", *where)["trial"] == {"left": 1, "of": 2}
    assert edge("confirm", "home", *where)["trial"] is None
    [state] = edge("status", *where)["releases"]
    assert (state["version"], state["previous"], state["refused"]) == ("1.1", "1.0", {})

    checks.add("1.2")
    edge("publish", made["1.2"], repository, "--keys", keys, "--key", world.key)
    error = edge(*bring, *report, code=5)["error"]
    assert error["kind"] == "HealthError" and "line 1 (exact); 1.1 stays current" in error["problem"]
    said = edge(
        "watch",
        repository,
        "--reports",
        tmp_path / "gathered",
        "--devices",
        tmp_path / "devices",
        "--least-reports",
        1,
        "--halt-above",
        0,
    )
    assert {one["version"]: (one["action"], one["reasons"]) for one in said["versions"]} == {
        "1.0": ("done", {}),
        "1.1": ("done", {}),
        "1.2": ("halt", {"canary": 1}),
    }
    assert said["done"] == [] and said["refused"] == {}
    said = edge(
        "watch",
        repository,
        "--reports",
        tmp_path / "gathered",
        "--devices",
        tmp_path / "devices",
        "--least-reports",
        1,
        "--halt-above",
        0,
        "--keys",
        keys,
    )
    assert said["done"] == [{"name": "home", "version": "1.2", "did": "halt"}]
    checks.clear()
    assert edge(*bring, "--again")["version"] == "1.1"  # halted by now
    assert edge("rollback", "home", "--reason", "too terse", *where)["version"] == "1.0"
    [state] = edge("status", "home", *where)["releases"]
    assert state["refused"]["1.1"] == "person: too terse"
    assert edge(*bring, "--again")["version"] == "1.1"
    assert edge("verify", *where) == {"damaged": [], "mended": []}

    assert edge("halt", repository, "home", "1.1", "--keys", keys)["halted"] is True
    assert edge(*bring)["version"] == "1.0"
    assert set(edge("refresh", repository, "--keys", keys)["expires"]) == {"root", "targets", "snapshot", "timestamp"}
    assert len(edge("rotate", repository, "timestamp", "--keys", keys, "--old", "timestamp-1")["keys"]) == 1
    assert edge("withdraw", repository, "home", "1.1", "--keys", keys)["freed_bytes"] > 0
    assert edge(*bring)["version"] == "1.0"


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["status", "--store", "absent"], 3, "StoreError"),
        (["verify", "--store", "absent"], 3, "StoreError"),
        (["start", "home", "--store", "absent"], 3, "StoreError"),
        (["ask", "home", "hello", "--store", "absent"], 3, "StoreError"),
        (["ask", "home", " ", "--store", "absent"], 2, "ConfigError"),
        (["sync", "file:///nowhere", "home", "--device", "d", "--root", "absent"], 2, "ConfigError"),
        (["sync", "http://x", "home", "--device", "d", "--root", "absent", "--private"], 2, "ConfigError"),
        (["sync", "file:///x", "home", "--device", "d", "--root", "absent", "--report", "out"], 2, "ConfigError"),
        (["sync", "file:///x", "home", "--root", "absent"], 2, "ConfigError"),
        (["watch", "absent", "--reports", "r", "--devices", "d"], 2, "ConfigError"),
        (["watch", "absent", "--reports", "r", "--devices", "d", "--least-reports", "0"], 2, "ConfigError"),
        (["watch", "absent", "--reports", "r", "--devices", "d", "--rings", "10,x"], 2, "ConfigError"),
        (["rotate", "absent", "queen"], 2, "ConfigError"),
        (["publish", "absent", "repository"], 3, "ArtifactError"),
    ],
)
def test_an_error_is_one_json_object_and_an_exit_code(
    arguments: list[str], code: int, kind: str, edge: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = edge(*arguments, code=code)["error"]
    assert error["kind"] == kind and error["problem"] and error["remedy"]
    assert not (tmp_path / "absent").exists()


def test_open_store_refuses_second_writer_but_allows_reads(world: World, edge: Shell, checks: set[str]) -> None:
    """While the store is open, sync and start exit with 4 (BusyError), and status works."""
    root = world.folder / "root.json"
    root.write_bytes(world.root)
    where = ["--store", world.store.folder]
    arguments = ["sync", world.repository.as_uri(), "home", "--device", "d", "--root", root, *where]
    assert edge(*arguments, code=4)["error"]["kind"] == "BusyError"  # the fixture holds it
    world.store.close()
    edge(*arguments)
    from sartor.edge.store.release_store import ReleaseStore

    with ReleaseStore(world.store.folder):
        assert edge("status", *where)["releases"][0]["version"] == "1.0"
        assert edge("start", "home", *where, code=4)["error"]["kind"] == "BusyError"


def test_damage_that_nothing_mends_is_exit_3(world: World, edge: Shell, checks: set[str]) -> None:
    root = world.folder / "root.json"
    root.write_bytes(world.root)
    world.store.close()
    said = edge(
        "sync", world.repository.as_uri(), "home", "--device", "d", "--root", root, "--store", world.store.folder
    )
    file = Path(said["release"]) / "adapter_model.safetensors"
    file.write_bytes(b"rot")
    assert "nothing here can mend it" in edge("verify", "--store", world.store.folder, code=3)["error"]["problem"]


def test_help_lists_every_command_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["edge", "--help"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert all(command in said.out for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["edge", "sync", "--help"])
    assert "--private" in capsys.readouterr().out
