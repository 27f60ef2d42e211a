"""One retrain on disk: what stands of it, and what it came to.

    STATE/retrain/AGENT/3/
      retrain.json     the record: which version is live, the facts of each stage that is done, the decision
      feedback/  data/  adapter/  ...     what the stages made: artefacts, each whole or absent

A stage is done when the record says so, and it says so after the stage's artefacts stand. A retrain that was killed is gone on
with at the first stage that the record lacks; that stage finds what it had finished itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.filesystem import write_file_atomic, writer_lock

SCHEMA = 1
FILE = "retrain.json"
# waiting: its stages are done, and the monitors or a person are still to say
Decision = Literal["", "promoted", "canary", "candidate", "refused", "rolled back"]
FINAL = ("promoted", "refused", "rolled back", "candidate")


@dataclass(frozen=True)
class Live:
    """The version that a retrain starts from and is held against. release: the directory; release_id: of its manifest."""

    version: str
    release: str
    release_id: str


@dataclass(frozen=True)
class Record:
    """What is known of a retrain. stages: facts by name, in the order in which they were done. gain: {estimate, low, high}."""

    agent: str
    number: int
    began: str
    live: Live
    stages: Mapping[str, Mapping[str, Any]]
    decision: Decision = ""
    reason: str = ""
    gain: Mapping[str, Any] | None = None
    ended: str = ""

    def as_json(self) -> dict[str, Any]:
        """The file; `from_json` makes an equal record of it."""
        return {"schema": SCHEMA, **vars(self), "live": vars(self.live)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Record:
        """Raises ArtifactError for another schema, KeyError or TypeError for no record."""
        if said.get("schema") != SCHEMA:
            raise ArtifactError(f"a retrain of schema {said.get('schema')!r}; this reads {SCHEMA}", "a newer Sartor")
        fields = {key: value for key, value in said.items() if key != "schema"}
        return cls(**{**fields, "live": Live(**fields["live"])})


class Work:
    """The folder of one retrain, and its record. Held by one process: see `held`."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def begun(cls, state: Path, agent: str, live: Live) -> Work:
        """The next retrain of an agent."""
        number = max((work.record.number for work in works(state, agent)), default=0) + 1
        work = cls(_home(state, agent) / str(number), Record(agent, number, now(), live, {}))
        work._write()
        return work

    @classmethod
    def opened(cls, folder: Path) -> Work:
        """What stands in a folder. Raises ArtifactError where the record is damaged."""
        file = folder / FILE
        try:
            return cls(folder, Record.from_json(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{file} is no whole record: {error}", f"move {folder} elsewhere: a new retrain begins"
            ) from None

    def done(self, stage: str) -> bool:
        """Whether the stage is."""
        return stage in self.record.stages

    def facts(self, stage: str) -> Mapping[str, Any]:
        """What a stage that is done has found."""
        return self.record.stages[stage]

    def finish(self, stage: str, facts: Mapping[str, Any]) -> None:
        """A stage is done; its artefacts stand."""
        self.record = replace(self.record, stages={**self.record.stages, stage: dict(facts)})
        self._write()

    def decide(self, decision: Decision, reason: str, gain: Mapping[str, Any] | None = None) -> None:
        """What it came to. May be said again while it is not final."""
        gain = self.record.gain if gain is None else gain
        self.record = replace(self.record, decision=decision, reason=reason, gain=gain, ended=now())
        self._write()

    @property
    def is_open(self) -> bool:
        """Whether stages are left to do."""
        return not self.record.decision

    def _write(self) -> None:
        text = json.dumps(self.record.as_json(), indent=1, ensure_ascii=False) + "\n"
        write_file_atomic(self.folder / FILE, text.encode())


def works(state: Path, agent: str) -> list[Work]:
    """Every retrain of an agent, the oldest first. A folder without a record was killed before it began, and is passed over."""
    found = (folder for folder in _home(state, agent).glob("*") if folder.name.isdigit() and (folder / FILE).exists())
    return [Work.opened(folder) for folder in sorted(found, key=lambda folder: int(folder.name))]


@contextmanager
def held(state: Path, agent: str) -> Iterator[None]:
    """Inside, no other process retrains this agent. Raises ConfigError where one does; a lock ends with its process."""
    home = _home(state, agent)
    home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    busy = True
    try:
        with writer_lock(home):
            busy = False
            yield
    except ConfigError:
        if not busy:
            raise
        raise ConfigError(f"another process retrains {agent}", "wait for it: its record is in " + str(home)) from None


def now() -> str:
    """UTC, ISO, to the second, as an inbox has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _home(state: Path, agent: str) -> Path:
    return state / "retrain" / agent
