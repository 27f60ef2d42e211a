"""Commands about a served team: its keys, and the receipts of its replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App

import sartor
from sartor.cli.app import REPLACE, app, notice
from sartor.core.errors import ConfigError

agents_app = App(name="agents", help="The agents of a team: who may ask them.")
app.command(agents_app)
receipt_app = App(name="receipt", help="Signed records of replies.")
app.command(receipt_app)

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


@receipt_app.command
def verify(
    file: Path, *, team: Path | None = None, key: Path | None = None, messages: Path | None = None, reply: str | None = None
) -> Any:
    """Check a receipt: its signature; the digests of what was asked and said; and of a greedy reply that it is said again.

    Parameters
    ----------
    file: what GET /v1/receipts/ID answered, or JSON of it under `receipt`, with the `messages` and the `reply`
    team: the team's YAML file: its public key, its key of digests, its base and engine
    key: trust this public key instead of the team's or those in SARTOR_HOME/trusted
    messages: JSON file of the messages, or of the whole body of the request
    reply: the text of the reply
    """
    return sartor.verify_receipt(file, team=team, key=key, messages=messages, reply=reply, notice=notice)
