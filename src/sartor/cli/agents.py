"""Commands about a served team: its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App

import sartor
from sartor.cli.app import REPLACE, app
from sartor.core.errors import ConfigError

agents_app = App(name="agents", help="The agents of a team: who may ask them.")
app.command(agents_app)

TEAM = Path("team.yaml")


@agents_app.command
def key(
    *names: str, team: Path = TEAM, admin: REPLACE = False, expires: str = "", revoke: str = "", list: REPLACE = False
) -> Any:
    """Make an API key that opens the agents named; it is shown once. With --list or --revoke, what keys there are.

    Parameters
    ----------
    names: agents that the key opens; '*' opens every one, base and auto are names too
    team: the team's YAML file
    admin: make an admin's key, which promotes and rolls back, and opens no agent
    expires: 30d, 12h, 2w, or a date after which the key opens nothing
    revoke: id of a key that is to open nothing from now on
    list: every key, without its secret
    """
    if (bool(names) or admin) + bool(revoke) + list != 1:
        raise ConfigError("name an agent, or one of --admin, --revoke ID and --list", "sartor agents key faq")
    if list:
        return sartor.list_keys(team)
    return sartor.revoke_key(team, revoke) if revoke else sartor.make_key(team, names, is_admin=admin, expires=expires)
