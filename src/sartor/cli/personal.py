"""Commands for personal versions of served agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App

import sartor
from sartor.cli.app import app, notice

personal_app = App(name="personal", help="Versions of a served agent for one user, on top of the live one.")
app.command(personal_app)


@personal_app.command
def tune(
    team: Path,
    *,
    agent: str,
    user: str,
    data: str = "inbox",
    rank: int = 0,
    epochs: float = 5.0,
    learning_rate: float = 5e-4,
    eval_fraction: float = 0.25,
    seed: int = 0,
) -> Any:
    """Tune a user's own ranks on an agent's live version; they answer that user if they are not worse.

    Exits 5 if they are worse.

    Args:
        team: the team's YAML file
        agent: the agent on whose live version it is based
        user: the id that clients send as user; it is stored as a keyed digest
        data: inbox, the user's feedback on that agent's replies; or a file in any form that curate reads
        rank: 1 to 4; 0 is personal.rank of the team's file
        epochs: passes over the rows
        learning_rate: of the user's ranks
        eval_fraction: fraction of the rows held out for the gate, by group
        seed: of the split, the initialisation and the order of rows
    """
    options = sartor.PersonalOptions(
        agent,
        user,
        data,
        rank=rank,
        epochs=epochs,
        learning_rate=learning_rate,
        eval_fraction=eval_fraction,
        seed=seed,
    )
    return sartor.tune_personal(team, options, notice=notice)


@personal_app.command(name="list")
def personal_list(team: Path, *, user: str = "") -> Any:
    """List every personal version, or those of one user: its agent, base version and whether it answers.

    Args:
        team: the team's YAML file
        user: only versions of this user
    """
    return sartor.list_personal(team, user)


@personal_app.command
def show(team: Path, *, user: str) -> Any:
    """Show all stored data of a user: versions with their gates, feedback, receipts, rows of the registry.

    Args:
        team: the team's YAML file
        user: the id that clients send
    """
    return sartor.show_personal(team, user)


@personal_app.command
def allow(team: Path, *, key_id: str, user: str, withdraw: bool = False) -> Any:
    """Let an API key act for a user: the user's own versions answer its requests with that user.

    Args:
        team: the team's YAML file
        key_id: of the key, as listed by sartor agents key --list
        user: the id that clients send; * is anybody
        withdraw: take it back; a running server follows within a second
    """
    return sartor.allow_personal(team, key_id, user, withdraw=withdraw)


@personal_app.command
def forget(team: Path, *, user: str, by: str = "", within_s: float = 300.0) -> Any:
    """Remove all data of a user, search for traces, and sign a proof, whose verdict has three values.

    Exits 4 while a server still holds data, 5 if words of the user are found. What was tuned on them stands, is
    listed, and is no error: `complete` is false then.

    Args:
        team: the team's YAML file
        user: the id that clients send
        by: name of the person who orders it, for the log and the proof
        within_s: seconds that running servers may take
    """
    return sartor.forget_personal(team, user, by=by, within_s=within_s, notice=notice)


@personal_app.command
def proof(file: Path, *, public_key: Path | None = None) -> Any:
    """Show the content of a proof of deletion, after checking its signature.

    Args:
        file: the proof
        public_key: the team's (STATE/keys/sartor.pub); by default those in SARTOR_HOME/trusted
    """
    return sartor.check_personal_proof(file, public_key)
