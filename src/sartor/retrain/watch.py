"""Which agents are due (`--due`, for a timer), and a loop that retrains those that are (`--watch`).

Each retrain of the loop is a process of its own: what it took is given back when it ends, and a fault of one ends no other.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError, SartorError
from sartor.retrain import news
from sartor.retrain.job import Notice, live_version, read_registry, settle
from sartor.retrain.work import held
from sartor.serving.team_config import Team, load

# How often the loop looks
EVERY_S = 60.0
# a retrain that ended with an error is tried again after that many looks
PAUSE_LOOKS = 30
Start = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Dues:
    """Every agent that learns, and whether it is due."""

    rows: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return {"rows": self.rows, "due": [row["agent"] for row in self.rows if row["due"]]}


def due(team: Path | str, flags: Sequence[str] = ()) -> Dues:
    """What a retrain of each agent would be begun for now, or what is lacking; nothing is begun. A trial is looked after."""
    made = load(Path(team), flags)
    state, rows = Path(made.state), []
    names = made.retrain.agents or sorted({*(member.name for member in made.agents), *read_registry(made).agents})
    for name in names:
        live = live_version(made, name)
        found = news.due(state, name, made.retrain, news.routed(state, name, live.release_id)).as_json()
        rows.append({**found, **_standing(made, name), "live": live.version})
    return Dues(rows)


def _standing(team: Team, name: str) -> dict[str, Any]:
    """What stands in the way of a new retrain, or has to be gone on with."""
    try:
        with held(Path(team.state), name):
            work = news.last(Path(team.state), name)
            if work is None:
                return {}
            if work.is_open:
                return {"due": True, "why": f"{work.folder} was not finished"}
            settle(team, work)
            return {"due": False, "why": work.record.reason} if work.record.decision == "canary" else {}
    except ConfigError as error:
        return {"due": False, "why": error.problem}


def watch(
    team: Path | str,
    flags: Sequence[str] = (),
    *,
    every_s: float = EVERY_S,
    looks: int = 0,
    start: Start = lambda command: subprocess.run(command, check=False).returncode,
    notice: Notice = lambda line: None,
) -> int:
    """Look every so often, and retrain what is due, one agent after the other; returns how many retrains were started.

    looks: 0 is for ever, until a signal ends the process; the retrain in work ends with it and is gone on with next time.
    """
    pausing: dict[str, int] = {}
    started, look, pause = 0, 0, threading.Event()
    while not looks or look < looks:
        look += 1
        for name in _due_now(team, flags, notice):
            if pausing.get(name, 0) > look:
                continue
            command = [sys.executable, "-m", "sartor", "retrain", str(team), "--agent", name, *flags]
            notice(f"retraining {name}")
            started += 1
            if code := start(command):
                pausing[name] = look + PAUSE_LOOKS
                notice(f"the retrain of {name} ended with {code}; it is tried again in {PAUSE_LOOKS * every_s:.0f} s")
        if look != looks:
            pause.wait(every_s)
    return started


def _due_now(team: Path | str, flags: Sequence[str], notice: Notice) -> list[str]:
    try:
        return [str(row["agent"]) for row in due(team, flags).rows if row["due"]]
    except SartorError as error:  # a registry that is locked, another retrain by hand: the next look may find it otherwise
        notice(f"{error.kind}: {error.problem}")
        return []
