"""What a team keeps of its users: who has a version of which agent, what is known of one of them, who may speak for whom."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.lineage.receipt_index import PATTERN
from sartor.serving.api_keys import Keys
from sartor.serving.commands.agent_commands import Rows
from sartor.serving.feedback_store import Inbox
from sartor.serving.receipts import lines_with, team_digest
from sartor.serving.registry.registry import Cause, Registry, Snapshot
from sartor.serving.registry.user_versions import ANYBODY, PeopleBook, Personal, named
from sartor.serving.team_config import Team, load


def list_personal(team: Team | Path | str, user: str = "") -> Rows:
    """Every personal version, or one user's. Users are told by their digests: their ids are not kept."""
    with opened(team) as (made, registry):
        person = named(user, team_digest(Path(made.state))) if user else ""
        people, read = PeopleBook(registry.database).read(person), registry.read()
    return Rows([_row(one, read) for one in people.known.values()])


def show_personal(team: Team | Path | str, user: str) -> dict[str, Any]:
    """All that is kept of a user: personal versions with their gates, and how many lines of feedback and receipts."""
    with opened(team) as (made, registry):
        state = Path(made.state)
        person = named(user, team_digest(state))
        book, read = PeopleBook(registry.database), registry.read()
        versions = [{**_row(one, read), **dict(one.facts or {})} for one in book.read(person).known.values()]
        lines = sum(kept.said is not None and kept.said.by.user == person for kept in Inbox(state / "inbox").lines())
        needle = f'"person":"{person}"'.encode()
        receipts = sum(len(lines_with(file, needle)) for file in (state / "receipts").glob(PATTERN))
        return {"person": person, "versions": versions, "feedback": lines, "receipts": receipts, "rows": book.mentions(person)}


def allow_personal(team: Team | Path | str, key: str, user: str) -> dict[str, Any]:
    """Let a key speak for a user, or for anybody (`*`). Raises ConfigError for a key that does not exist."""
    with opened(team) as (made, registry):
        known = [one.id for one in Keys(registry.database).listed()]
        if key not in known:
            raise ConfigError(
                f"there is no key {key[:40]!a}; there are: {', '.join(known) or 'none'}", "sartor agents key NAME"
            )
        person = user if user == ANYBODY else named(user, team_digest(Path(made.state)))
        PeopleBook(registry.database).allow(key, person, Cause(getpass.getuser(), "sartor personal allow"))
        return {"key": key, "speaks_for": person}


@contextmanager
def opened(team: Team | Path | str) -> Iterator[tuple[Team, Registry]]:
    """A team and its registry."""
    made = team if isinstance(team, Team) else load(Path(team))
    with closing(Registry.open(made.registry_url)) as registry:
        yield made, registry


def _row(one: Personal, read: Snapshot) -> dict[str, Any]:
    live = read.agents[one.agent].live if one.agent in read.agents else ""
    stands_on = read.versions.get(f"{one.agent}@{live}")
    answers = bool(one.adapter) and stands_on is not None and stands_on.release_id == one.release_id
    state = "answers" if answers else "tuned on another version" if one.adapter else "refused"
    said = {"agent": one.agent, "version": one.version, "state": state, "person": one.person, "path": one.path}
    return {**said, "added": one.added, "note": one.note}
