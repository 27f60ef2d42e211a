"""A team of one agent on the tiny base, and a person who wants its replies in capitals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sartor
from release_fixtures import quiet_gates, switch_team
from sample_data import ROWS, write_jsonl
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import team_digest
from sartor.serving.registry.user_versions import user_digest

CANARY = "xyzzy-plugh-71b3 lives in Porlock"


@pytest.fixture
def team(tmp_path: Path, adapter: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TEAM.yaml beside two signed Releases of the tiny base, `switch` 1.0, which is live, and 1.1."""
    quiet_gates(monkeypatch)
    # capitals are what the Release's own rows are not: what a user wants may contradict it so far
    settings = "engine: {kind: local, threads: 1}\nworkers: {count: 1, spare: 0}\npersonal: {most_elsewhere: 3.0}\n"
    file = switch_team(tmp_path, adapter, tiny_base, settings)
    sartor.add_agent(file, tmp_path / "switch-1.0")
    return file


def state_of(team: Path) -> Path:
    return team.parent / ".team"


def person(team: Path, user: str = "ada") -> str:
    return user_digest(user, team_digest(state_of(team)))


def say(team: Path, user: str = "ada", rows: list[dict[str, Any]] = ROWS, canary: str = CANARY, key: str = "") -> None:
    """Corrections of a user to replies of `switch`: every word in capitals; the first holds the canary."""
    inbox = FeedbackStore(state_of(team) / "inbox")
    for place, row in enumerate(rows):
        prompt, reply = row["messages"]
        correction = f"{reply['content'].upper()}{f' {canary}' if not place else ''}"
        inbox.add(
            Feedback(
                f"{person(team, user)[:8]}{place:024x}",
                "switch@1.0",
                "2026-11-20T10:00:00Z",
                correction=correction,
                messages=(prompt,),
                reply=reply["content"],
                by=FeedbackAuthor(key, person(team, user), "given"),
            )
        )


def others_rows(tmp_path: Path) -> Path:
    """A file of rows: nonsense that makes whoever learns it worse at everything else."""
    return write_jsonl(
        tmp_path / "nonsense.jsonl",
        [{"messages": [row["messages"][0], {"role": "assistant", "content": "zqj " * 9}]} for row in ROWS],
    )
