"""sartor serve ADAPTER: an Adapter that no gate has passed answers, and every reply says that it is unreleased."""

from __future__ import annotations

from pathlib import Path

import pytest

import sartor
from sartor.core.errors import ArtifactError, ConfigError, SignatureError
from sartor.serving.commands.serve_adapter import team_of

ONE_WORKER = ["--workers.spare", "0", "--router.encoder", "tfidf"]


def test_adapter_answers_as_unreleased(adapter: Path) -> None:
    lines: list[str] = []
    with team_of(adapter, ONE_WORKER, notice=lines.append) as team:
        [member] = team.agents
        reply = sartor.ask_team(team, "Hello?", agent=member.name, sampling={"max_tokens": 2})
        assert reply.agent == f"{member.name}@unreleased"
        with pytest.raises(SignatureError):
            sartor.verify(member.release)  # what this server trusts, no other command does
        assert not list(Path(team.trust).parent.glob("*.key")), "the key that signed is gone"
        folder = Path(team.state).parent
    assert not folder.exists()
    assert any("no gate has passed it" in line for line in lines)


def test_what_is_no_adapter_is_refused(dataset: Path) -> None:
    with pytest.raises(ArtifactError, match="is a dataset, not an adapter or release"), team_of(dataset):
        pass


def test_flags_reach_the_team(adapter: Path) -> None:
    with team_of(adapter, ["--http.port", "0", "--limits.reply_tokens", "7"]) as team:
        assert (team.http.port, team.limits.reply_tokens) == (0, 7)


def test_without_a_team_no_host_for_others_is_taken(adapter: Path) -> None:
    """No key made elsewhere would count, so the remedy is a team."""
    with pytest.raises(ConfigError, match="others can reach") as refused, team_of(adapter, ["--http.host", "0.0.0.0"]):
        pass
    assert "sartor serve team.yaml" in refused.value.remedy
