"""`retrain:` of TEAM.yaml: which agents learn from what is said of them, from how much of it on, and what must not suffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sartor.core.config import option
from sartor.core.errors import ConfigError


def _fraction(where: str, **said: float) -> None:
    for name, value in said.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{where}{name} is {value}, no fraction", f"{where}{name}: a number in 0..1")


@dataclass(frozen=True)
class AtLeast:
    """How much has to be said anew; either is enough."""

    corrections: int = option(20, "corrections since the last retrain of the agent")
    ratings: int = option(100, "ratings since then; a retrain on fewer says nothing that an interval would bear out")

    def __post_init__(self) -> None:
        if min(self.corrections, self.ratings) < 2:
            raise ConfigError(
                f"at_least is {self.corrections} corrections, {self.ratings} ratings; one of two is held out",
                "at_least: {corrections: 20, ratings: 100}",
            )


@dataclass(frozen=True)
class Drift:
    """What else makes a retrain due, once there is enough to learn from at all (a quarter of `at_least`)."""

    bad_ratings: float = option(0.1, "the rate of bad ratings has risen by more since the last retrain; 1 never")
    input: float = option(0.3, "what the router finds of the agent's requests has moved by so much (0..1); 1 never")

    def __post_init__(self) -> None:
        _fraction("drift.", bad_ratings=self.bad_ratings, input=self.input)


@dataclass(frozen=True)
class NotWorse:
    """What the new version is held to beside the gate of every Release, against the version that is live."""

    margin: float = option(0.02, "the held-out mean may fall by at most this, at the lower end of what is likely")
    slice_margin: float = option(0.1, "in no slice may it fall by more than this, where the interval excludes 0")
    slices: tuple[str, ...] = option(
        (), "fields of the JSON replies that cut the rows into slices; empty takes all of few values"
    )
    slice_rows: int = option(6, "a slice of fewer rows is not judged, and named; fewer than six cannot tell")
    rows: int = option(400, "most held-out rows that the versions are compared on")

    def __post_init__(self) -> None:
        _fraction("gate.", margin=self.margin, slice_margin=self.slice_margin)
        if min(self.slice_rows, self.rows) < 2:
            raise ConfigError(f"gate has slice_rows {self.slice_rows} and rows {self.rows}", "gate: {slice_rows: 6, rows: 400}")


@dataclass(frozen=True)
class Retraining:
    """The section. Relative paths are seen from the file's directory."""

    agents: tuple[str, ...] = option((), "those that learn; by default all of the team")
    key: str = option("", "private key, or the directory that keygen made: what signs the new Release")
    at_least: AtLeast = option(AtLeast(), "how much has to be said anew")
    drift: Drift = option(Drift(), "what makes it due sooner")
    every_hours: float = option(0.0, "due after so many hours, if anything was said; 0 never by time alone")
    tuning: Any = option(None, "options of the tuning recipe that differ from the live version's: {budget: {epochs: 2}}")
    rehearsal: float = option(4.0, "rows of the live version's own Dataset for each row of feedback, against forgetting")
    eval_fraction: float = option(0.25, "of the feedback, held out")
    gate: NotWorse = option(NotWorse(), "what the new version is held to against the live one")
    canary: float = option(0.1, "of the requests, answered by the new version until the monitors or a person decide")
    nice: int = option(10, "how far the command steps back for everybody else, 0..19")
    memory_bytes: int = option(0, "most memory of the command; 0 is no limit but the machine's")

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction is {self.eval_fraction}; some has to be held out", "eval_fraction: 0.25")
        if not 0 < self.canary <= 1:
            raise ConfigError(f"canary is {self.canary}, no fraction of the requests", "canary: 0.1")
        if not 0 <= self.nice <= 19 or self.rehearsal < 0 or self.every_hours < 0 or self.memory_bytes < 0:
            said = (self.nice, self.rehearsal, self.every_hours, self.memory_bytes)
            problem = f"nice, rehearsal, every_hours and memory_bytes are {said}; one is out of range"
            raise ConfigError(problem, "nice: 10, rehearsal: 2.0, every_hours: 0, memory_bytes: 0")
