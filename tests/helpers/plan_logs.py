"""A plan that is checked and mended, the lines of its log, and its run made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plan_fakes import DIGEST, FakeReplies, ask, asked
from sartor.serving.commands.plan_replay import Remaking, Replayed
from sartor.serving.plans.plan_log import read_runs
from sartor.serving.team_config import Team

PLAN: dict[str, Any] = {
    "name": "checked",
    "kind": "sequence",
    "steps": "home",
    "check": ["json", {"kind": "agent", "agent": "critic"}],
    "mend": {"agent": "fixer", "gets": ["request", "findings"]},
}

WORDS = {"messages": [{"role": "user", "content": "light in the hall"}]}

RIGHT = '{"right": true, "findings": []}'


def script(**changes: Any) -> FakeReplies:
    return FakeReplies(**{"home": "on", "critic": RIGHT, "fixer": '{"on": true}', **changes})


async def logged(tmp_path: Path, team: Team, replies: FakeReplies, **options: Any) -> list[dict[str, Any]]:
    """The lines of a run."""
    request = asked("checked", sampling={"seed": 5, "stop": ("END",)}, **options)
    await ask(team, replies, request)
    newest = max((tmp_path / "state/plans").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return list(read_runs(newest))[-1]


async def again(team: Team, rows: list[dict[str, Any]], replies: FakeReplies, words: Any = None) -> Replayed:
    return await Remaking(team, replies, DIGEST, words or {}).remake(rows)
