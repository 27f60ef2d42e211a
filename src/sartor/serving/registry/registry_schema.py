"""What the registry holds, as values: an Agent and how it changes, a Version, an Event; and each as a row and back.

The changes are functions from one Agent to the next and know nothing of a database: `registry` runs them in a transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sartor.core import records
from sartor.core.database import sealed
from sartor.core.errors import ConfigError, ConflictError

# versions that were live before, the newest last: how often one may go back
MOST_EARLIER = 8
State = Literal["serving", "draining", "removed"]


@dataclass(frozen=True)
class Agent:
    """One agent: the version that answers, those that did, and the one on trial.

    earlier: formerly live, the newest last. state: a draining agent ends what it began and takes nothing new. candidate:
    answers `canary_fraction` of the requests, and `shadow_fraction` of them unseen. generation: of its last change.
    """

    name: str
    live: str
    earlier: tuple[str, ...] = ()
    state: State = "serving"
    fallback: tuple[str, ...] = ("previous", "base")
    candidate: str = ""
    canary_fraction: float = 0.0
    shadow_fraction: float = 0.0
    generation: int = 0
    changed: str = ""
    note: str = ""

    @property
    def previous(self) -> str:
        """The version that was live before, which steps in first; empty if there is none."""
        return self.earlier[-1] if self.earlier else ""

    @property
    def is_blank(self) -> bool:
        """Whether it is a name alone: what was to answer was refused, and nothing else was ever added."""
        return not self.live and self.state != "removed"

    @property
    def versions(self) -> tuple[str, ...]:
        """What a server has to hold ready: live, previous, candidate."""
        return tuple(dict.fromkeys(version for version in (self.live, self.previous, self.candidate) if version))

    def expecting(self, version: str | None, trial: str | None = None) -> Agent:
        """Itself, if `version` is live and `trial` on trial (None expects nothing). Raises ConflictError with what stands."""
        if version is not None and version != self.live:
            raise ConflictError(
                f"{self.name} has the version {self.live!r} live, not {version!r}; nothing was changed",
                f"see `sartor agents events {self.name}`; then --expected-version {self.live}",
            )
        if trial is not None and trial != self.candidate:
            raise ConflictError(
                f"{self.name} has {self.candidate or 'nothing'} on trial, not {trial}; nothing was changed",
                f"see `sartor agents events {self.name}`",
            )
        return self

    def promoted(self, version: str) -> Agent:
        """`version` live, the one before it previous, and no trial: what it was compared with is no longer there."""
        earlier = self.earlier if self.live in ("", version) else (*self.earlier, self.live)[-MOST_EARLIER:]
        return replace(self.untried(), live=version, earlier=earlier, state="serving")

    def rolled_back(self) -> Agent:
        """Without its trial, if one runs; else with the version that was live before. Raises ConflictError if there is none."""
        if self.candidate:
            return self.untried()
        if not self.earlier:
            raise ConflictError(
                f"{self.name}@{self.live} has no previous version to go back to", f"sartor agents remove {self.name}"
            )
        return replace(self, live=self.earlier[-1], earlier=self.earlier[:-1], state="serving")

    def trying(self, version: str, *, canary_fraction: float = 0.0, shadow_fraction: float = 0.0) -> Agent:
        """With `version` on trial. Raises ConflictError while another is, ConfigError for a fraction out of range."""
        for name, fraction in (("canary", canary_fraction), ("shadow", shadow_fraction)):
            if not 0 <= fraction <= 1:
                raise ConfigError(f"the {name} fraction is {fraction}; it lies in 0..1", f"--{name} 0.1")
        if not (canary_fraction or shadow_fraction):
            raise ConfigError("a trial of no request at all shows nothing", "--canary 0.1, or --shadow 0.1")
        if version == self.live:
            raise ConflictError(f"{self.name}@{version} is live already", "give the version that is to be tried")
        if self.candidate not in ("", version):
            raise ConflictError(
                f"{self.name}@{self.candidate} is on trial", f"end it first: sartor agents rollback {self.name}"
            )
        return replace(
            self,
            candidate=version,
            canary_fraction=canary_fraction or self.canary_fraction,
            shadow_fraction=shadow_fraction or self.shadow_fraction,
        )

    def untried(self) -> Agent:
        """Without a trial."""
        return replace(self, candidate="", canary_fraction=0.0, shadow_fraction=0.0)

    def as_row(self) -> dict[str, Any]:
        """The row, sealed."""
        return sealed({**self.as_json(), "earlier": _json(self.earlier), "fallback": _json(self.fallback)})

    def as_json(self) -> dict[str, Any]:
        """Every field, as an event and `agents list` say it."""
        return {**vars(self), "earlier": list(self.earlier), "fallback": list(self.fallback)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Agent:
        """The agent of a row that is whole."""
        return cls.from_json({**row, "earlier": json.loads(row["earlier"]), "fallback": json.loads(row["fallback"])})

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Agent:
        """The agent that `as_json` said."""
        lists = {name: tuple(said[name]) for name in ("earlier", "fallback")}
        return cls(**{**{name: value for name, value in said.items() if name != "checksum"}, **lists})


@dataclass(frozen=True)
class Version:
    """One version of an agent: a Release that was admitted, and what is known of it.

    release: the directory; the same Release may move. adapter: the digest under which engines attach it. facts: what a
    request needs of the Release without opening it: system_prompt, sampling, base and template digest, licence, rank.
    """

    agent: str
    version: str
    release: str
    release_id: str
    adapter: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    status: Literal["admitted", "rolled_back"] = "admitted"
    added: str = ""

    @property
    def name(self) -> str:
        """`agent@version`."""
        return f"{self.agent}@{self.version}"

    def as_row(self) -> dict[str, Any]:
        """The row, sealed."""
        return sealed({**vars(self), "facts": _json(self.facts)})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Version:
        """The version of a row that is whole."""
        return cls(**{**{name: row[name] for name in row if name != "checksum"}, "facts": json.loads(row["facts"])})


@dataclass(frozen=True)
class Event:
    """One change: who made it, why, and the agent before and after it (`{}` where there was none). numbers: what decided."""

    id: int
    generation: int
    at: str
    who: str
    what: str
    agent: str
    version: str
    why: str
    was: Mapping[str, Any]
    became: Mapping[str, Any]
    numbers: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """A row of `sartor agents events`."""
        live = {"from": self.was.get("live", ""), "to": self.became.get("live", "")}
        said = {name: getattr(self, name) for name in ("id", "at", "who", "what", "agent", "version", "why")}
        return {**said, **live, "numbers": dict(self.numbers)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Event:
        """The event of a row that is whole."""
        plain = {name: row[name] for name in row if name != "checksum"}
        return cls(**{**plain, **{name: json.loads(row[name]) for name in ("was", "became", "numbers")}})


def _json(value: Any) -> str:
    return records.canonical(
        list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    ).decode()
