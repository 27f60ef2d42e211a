"""The command that lets agents learn from use: retrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sartor
from sartor.cli.app import REPLACE, Flags, app, notice
from sartor.core.errors import ConfigError


@app.command
def retrain(
    team: Path,
    *flags: Flags,
    agent: str = "",
    due: REPLACE = False,
    watch: REPLACE = False,
    promote: REPLACE = False,
    anyway: REPLACE = False,
    believe: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    waive: tuple[str, ...] = (),
    by: str = "",
    reason: str = "",
) -> Any:
    """Feedback -> a new version of an agent, on trial, or a refusal with reasons. One that was killed is gone on with.

    A refusal is an answer: `decision` says it and the command exits 0. Options of the team can be given as flags
    (--retrain.every_hours 24).

    Args:
        team: the team's YAML file
        agent: who is to learn
        due: begin nothing; say of each agent whether it is due, and why
        watch: look every minute, and retrain whoever is due, until a signal ends it
        promote: where nobody serves the team, make a better version live at once
        anyway: with less feedback than retrain.at_least asks for
        believe: id of a key whose ratings are right though they are unlike everybody else's; also several
        ignore: id of a key of which nothing is to be learnt; also several
        waive: let a failed check of the Release's gate pass; needs --by and --reason, which are signed in
        by: who waives
        reason: why
    """
    if bool(agent) + due + watch != 1:
        raise ConfigError("name an agent, or one of --due and --watch", f"sartor retrain {team} --agent faq")
    if due:
        return sartor.retrain_due(team, flags)
    if watch:
        sartor.retrain_watch(team, flags, notice=notice)
        return None
    waivers = tuple(sartor.Waiver(check, by, reason) for check in waive)
    wishes = sartor.Wishes(promote, anyway, believe, ignore, waivers)
    return sartor.retrain(team, agent, wishes=wishes, flags=flags, steps_back=True, notice=notice)
