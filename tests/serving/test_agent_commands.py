from __future__ import annotations

import getpass
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import sartor
from dispatch_fakes import no_fsync, version
from release_fixtures import quiet_gates, switch_team
from sartor.cli import main
from sartor.serving.commands import agent_commands
from sartor.serving.registry.registry import Registry
from sartor.serving.team_config import load

__all__ = ["no_fsync"]


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A team of two agents, `faq` in three versions. Releases are not looked at: that is admission's, and tested there."""
    file = tmp_path / "team.yaml"
    file.write_text(
        "base: starter\nagents: [{name: faq, release: faq-1, fallback: [base]}]\nrollout: {canary_fraction: 0.2}\n"
    )
    monkeypatch.setattr(
        agent_commands, "_looked_at", lambda made, release, name: version(name or release.name[:-2], release.name[-1])
    )
    for release in ("faq-1", "faq-2", "faq-3", "home-1"):
        sartor.add_agent(file, release)
    return file


def command(team: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["agents", *arguments, "--team", str(team), "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_each_command_is_a_change_with_its_rows(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, Any]:
        return command(team, *arguments, capsys=capsys)

    code, said = run("list")
    assert code == 0 and {row["name"]: row["versions"] for row in said["rows"]} == {
        "faq": ["1", "2", "3"],
        "home": ["1"],
    }
    code, said = run("promote", "faq", "2", "--expected-version", "1", "--canary", "0", "--why", "better")
    assert (code, said["rows"][0]["live"], said["rows"][0]["previous"]) == (0, "2", "1")
    code, said = run("promote", "faq", "3", "--expected-version", "1")
    assert (code, said["error"]["kind"]) == (5, "ConflictError") and "'2' live" in said["error"]["problem"]
    code, said = run("promote", "faq", "3")  # the team's own fraction
    assert (said["rows"][0]["live"], said["rows"][0]["candidate"], said["rows"][0]["canary_fraction"]) == (
        "2",
        "3",
        0.2,
    )
    assert run("promote", "faq", "3")[1]["rows"][0]["live"] == "3"
    assert run("rollback", "faq", "--expected-version", "3")[1]["rows"][0]["live"] == "2"
    assert run("shadow", "faq", "3", "0.5")[1]["rows"][0]["shadow_fraction"] == 0.5
    assert run("canary", "faq", "3", "0.1")[1]["rows"][0] | {} == run("list")[1]["rows"][0]
    assert run("drain", "faq", "--by", "Ada")[1]["rows"][0]["state"] == "draining"
    assert run("remove", "home")[0] == 0 and [row["name"] for row in run("list")[1]["rows"]] == ["faq"]
    code, said = run("events", "faq", "--most", "7")
    assert [row["what"] for row in said["rows"]] == [
        "promoted",
        "canary",
        "promoted",
        "rolled back",
        "shadow",
        "canary",
        "drained",
    ]
    assert (said["rows"][0]["from"], said["rows"][0]["to"], said["rows"][0]["why"]) == ("1", "2", "better")
    assert said["rows"][0]["who"] == getpass.getuser() and said["rows"][-1]["who"] == "Ada"
    for arguments, kind, exit_code in (
        (("promote", "faz", "1"), "UnknownAgentError", 6),
        (("promote", "faq", "9"), "UnknownAgentError", 6),
        (("canary", "faq", "1", "7"), "ConfigError", 2),
        (("rollback", "home"), "UnknownAgentError", 6),
        (("repair", "faq"), "ConflictError", 5),
    ):
        code, said = run(*arguments)
        assert (code, said["error"]["kind"]) == (exit_code, kind)


def test_a_hurt_row_is_listed_and_repaired(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(team.parent / ".team" / "registry.sqlite") as connection:
        connection.execute("update agents set live = '3' where name = 'faq'")
    connection.close()
    code, said = command(team, "list", capsys=capsys)
    assert code == 0 and {row["name"]: row.get("hurt", "") for row in said["rows"]}["faq"].endswith(
        "sartor agents repair faq"
    )
    assert command(team, "rollback", "faq", capsys=capsys)[1]["error"]["kind"] == "ArtifactError"
    code, said = command(team, "repair", "faq", capsys=capsys)
    assert said["rows"][0]["live"] == "1"
    assert load(team).registry_url.startswith("sqlite:///")
    registry = Registry.open(load(team).registry_url)
    assert registry.read().agents["faq"].fallback == ("base",)
    registry.close()


def test_people_read_a_line_a_row(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["agents", "list", "--team", str(team)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("faq ") and "live 1" in first and "versions 1 2 3" in first and second.startswith("home ")


@pytest.fixture
def releases(tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A team file beside two signed Releases of the tiny base, `switch` 1.0 and 1.1."""
    quiet_gates(monkeypatch)
    sartor.tune(tune_recipe, tmp_path / "adapter", show=False)
    return switch_team(tmp_path, tmp_path / "adapter", tune_recipe["base"], "engine: {kind: local, threads: 1}\n")


@pytest.mark.services
def test_real_team_answers_and_checks_added_releases(releases: Path) -> None:
    """The reply equals that of ask; a Release with a changed byte of its weights is refused."""
    team = releases
    asked = {"sampling": {"max_tokens": 8}}
    reply = sartor.ask_team(team, "switch kitchen on", agent="switch", **asked)
    assert reply.agent == "switch@1.0", reply.reason
    assert reply.reply and reply.nearest[0]["reply"]
    same = sartor.ask(team.parent / "switch-1.0", "switch kitchen on", **asked)
    assert reply.reply == same.reply
    if shutil.which("espeak-ng"):
        spoken = sartor.speaking(team.parent / "reply.wav")(reply).spoken
        assert spoken is not None and spoken.seconds > 0.3 and (team.parent / "reply.wav").stat().st_size > 10_000
    sartor.add_agent(team, team.parent / "switch-1.1")
    assert sartor.promote_agent(team, "switch", "1.1", expected="1.0").rows[0]["live"] == "1.1"
    weights = team.parent / "switch-1.1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(sartor.SartorError, match=r"adapter_model.safetensors"):
        sartor.add_agent(team, team.parent / "switch-1.1", name="other")
