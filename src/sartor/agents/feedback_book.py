"""The inbox of a team as verbs, for the command line and for scripts: who said how much, who is trusted; lines taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.agents.book import Rows
from sartor.agents.feedback import Inbox
from sartor.agents.receipts import team_digest
from sartor.agents.team import Team, load
from sartor.core.errors import ConfigError
from sartor.core.records import Feedback
from sartor.curate.sources import feedback_inbox


@dataclass(frozen=True)
class _Asked:
    """Whose feedback. user: a digest, as it stands in the inbox. "" is anybody."""

    key: str
    user: str

    def is_by(self, said: Feedback) -> bool:
        return self.key in ("", said.by.key) and self.user in ("", said.by.user)


@dataclass
class _Counted:
    """What one voice said."""

    rows: int = 0
    good: int = 0
    bad: int = 0
    corrections: int = 0
    without_consent: int = 0
    masked: int = 0
    dates: list[str] = field(default_factory=list)

    def count(self, said: Feedback) -> None:
        self.rows += 1
        self.good += (said.rating or 0) > 0
        self.bad += (said.rating or 0) < 0
        self.corrections += bool(said.correction)
        self.without_consent += said.by.consent == "refused"
        self.masked += sum(said.masked.values())
        self.dates = [min([*self.dates, said.date]), max([*self.dates, said.date])]

    def as_json(self) -> dict[str, Any]:
        said = {name: value for name, value in vars(self).items() if name != "dates"}
        return {**said, "first": self.dates[0], "last": self.dates[-1]}


def list_feedback(team: Team | Path | str, *, key: str = "", user: str = "") -> Rows:
    """Every key that spoke, and every user of a key that has several: how much, and whether it is trusted.

    user: the id as clients send it. Raises ConfigError for a team's file that cannot be read.
    """
    made, asked = _asked(team, key, user)
    inbox = _inbox(made)
    counted = _counted(kept.said for kept in inbox.lines() if kept.said and asked.is_by(kept.said))
    standings = {(one.key, one.user): one for one in feedback_inbox.of_folder(inbox.path).standings}
    return Rows([_row(standings[voice], counted[voice]) for voice in sorted(counted) if voice in standings])


def remove_feedback(team: Team | Path | str, *, key: str = "", user: str = "") -> dict[str, Any]:
    """Take everything out of the inbox that a key said, or a user, or a user of a key; and every line that was cut short.

    `places` names the lines, as the origins of Examples do: what was learnt from them is `sartor revoke`'s to find. Raises
    ConfigError where neither is given, MissingError where the disk does not take it.
    """
    if not key and not user:
        raise ConfigError("neither a key nor a user is named", "--key ID, as `sartor agents feedback` lists it, or --user ID")
    made, asked = _asked(team, key, user)
    gone = _inbox(made).remove(asked.is_by)
    places = [kept.place for kept in gone if kept.said]
    return {"removed": len(places), "damaged": len(gone) - len(places), "places": places}


def _asked(team: Team | Path | str, key: str, user: str) -> tuple[Team, _Asked]:
    made = team if isinstance(team, Team) else load(Path(team))
    return made, _Asked(key, team_digest(Path(made.state))("user", user) if user else "")


def _inbox(team: Team) -> Inbox:
    return Inbox(Path(team.state) / "inbox")


def _counted(every: Iterable[Feedback]) -> Mapping[feedback_inbox.Giver, _Counted]:
    found: dict[feedback_inbox.Giver, _Counted] = {}
    for said in every:
        for voice in ((said.by.key, feedback_inbox.WHOLE), (said.by.key, said.by.user)):
            found.setdefault(voice, _Counted()).count(said)
    return found


def _row(standing: feedback_inbox.Standing, counted: _Counted) -> dict[str, Any]:
    return {
        "key": standing.key,
        "user": "" if standing.user == feedback_inbox.WHOLE else standing.user,
        **counted.as_json(),
        "compared": standing.compared,
        "against": standing.against,
        "trust": round(standing.score, 3),
        "set_aside": standing.is_aside,
        "why": standing.why if standing.is_aside else "",
    }
