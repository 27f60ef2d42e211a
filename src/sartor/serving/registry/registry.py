"""Live, previous and candidate version of every agent.

    registry = Registry.open("sqlite:///team/registry.sqlite")
    registry.promote("faq", "1.1", expected="1.0", cause=ChangeCause("ada", "better on refunds"))   # compare and swap

A change names the state that it expects, and raises ConflictError with the actual state if it differs. Every change
raises the number `generation`, which a running server polls; `subscribed` reports changes of this object at once. A
row with a wrong seal, one that was put back and one that is missing are named in `Snapshot.damaged`; the others are
read as usual.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, Table, select

from sartor.core import records
from sartor.core.database import Database, seals_of
from sartor.core.errors import ArtifactError, ConflictError, UnknownAgentError
from sartor.serving.registry import registry_schema
from sartor.serving.registry.registry_head import FROZEN, is_current, put_row, transaction_of
from sartor.serving.registry.registry_schema import Agent, AgentVersion, Event
from sartor.serving.registry.version_rules import VersionRules
from sartor.serving.team_config import Team

Change = Callable[[Agent], Agent]


@dataclass(frozen=True)
class ChangeCause:
    """Author and reason of a change, for the log.

    numbers: figures behind the decision.
    """

    by: str = ""
    reason: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


NOBODY = ChangeCause()


@dataclass(frozen=True)
class Freeze:
    """Trial or watch in which the monitors change nothing any more until an admin does."""

    version: str
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """Complete registry at one generation.

    versions: by `agent@version`.
    damaged: what cannot be read -> reason.
    frozen: trials and watches that wait for an admin, by agent.
    """

    generation: int
    agents: Mapping[str, Agent]
    versions: Mapping[str, AgentVersion]
    damaged: Mapping[str, str]
    frozen: Mapping[str, Freeze] = field(default_factory=dict)


class Registry:
    """Agents of one team. Safe to use from several threads and processes."""

    def __init__(self, database: Database, rules: VersionRules | None = None) -> None:
        self.database = database
        self._rules = rules
        self._listeners: list[Callable[[], object]] = []

    @classmethod
    def open(cls, url: str, state: Path | None = None, rules: VersionRules | None = None) -> Registry:
        """Open the registry at a SQLAlchemy URL; create it if absent, and upgrade an older one.

        state: as of `open_database`.
        rules: what a version must meet to become live or go on trial; None only reads.
        Raises as `open_database`.
        """
        return cls(registry_schema.open_database(url, state), rules)

    @classmethod
    def of(cls, team: Team) -> Registry:
        """Open the registry of a team, with the team's rules. Raises as `open_database`."""
        return cls.open(team.registry_url, Path(team.state), VersionRules.of(team))

    def close(self) -> None:
        """Close the database connections."""
        self.database.close()

    @contextmanager
    def subscribed(self, listener: Callable[[], object]) -> Iterator[None]:
        """Call `listener` after each change made through this object, until the context ends.

        It runs in the thread that made the change.
        """
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def generation(self) -> int:
        """Return the number of the newest change by any process."""
        with self.database.read() as connection:
            return registry_schema.generation_of(connection)

    def read(self) -> Snapshot:
        """Return a consistent snapshot of everything except the log."""
        damaged: dict[str, str] = {}
        with self.database.read() as connection:
            generation = registry_schema.generation_of(connection)
            agent_rows = _rows(connection, select(registry_schema.agents))
            version_rows = _rows(connection, select(registry_schema.versions))
            frozen = self._freezes(connection)
            agents, versions = {}, {}
            for row in agent_rows:
                if is_current(connection, registry_schema.agents, row):
                    agents[str(row["name"])] = Agent.from_row(row)
                else:
                    damaged[str(row["name"])] = f"its row was changed from outside; sartor agents repair {row['name']}"
            for row in version_rows:
                name = f"{row['agent']}@{row['version']}"
                if is_current(connection, registry_schema.versions, row):
                    versions[name] = AgentVersion.from_row(row)
                else:
                    damaged[name] = (
                        f"its row was changed from outside; sartor agents add {shlex.quote(str(row['release']))}"
                    )
            head = transaction_of(connection)
            if head.count(registry_schema.agents) > len(agents):
                for name in head.log.newest.keys() - agents.keys() - damaged.keys():
                    if head.has_row(registry_schema.agents, name=name):
                        damaged[name] = f"its row was removed from outside; sartor agents repair {name}"
        known = {name: freeze for name, freeze in frozen.items() if name in agents}
        return Snapshot(generation, agents, versions, damaged, known)

    def events(self, agent: str = "", *, limit: int = 100) -> list[Event]:
        """Return the newest `limit` changes of one agent or of all, oldest first.

        Rows that were changed from outside are left out.
        """
        with self.database.read() as connection:
            return self._events(connection, agent, limit)

    def add(
        self, version: AgentVersion, *, fallback: Sequence[str] = ("previous", "base"), cause: ChangeCause = NOBODY
    ) -> Agent:
        """Register an admitted Release. It is live at once for a new or removed agent, else it waits for a promotion.

        The same Release again changes only its path and facts. Raises ConflictError if name and version already belong
        to another Release.
        """
        version = replace(version, added=_now())

        def write(connection: Connection) -> Agent:
            before = self._known_agent(connection, version.agent, removed=True)
            is_new = before is None or before.state == "removed" or not before.live
            new_agent = Agent(version.agent, version.version, fallback=tuple(fallback))
            agent = before if before is not None and not is_new else new_agent
            if before is None:
                put_row(connection, registry_schema.agents, agent.as_row())
            action = self._put_version(connection, version)
            if not is_new and not action:
                return agent
            return self._record(
                connection, action or "added", before=before, after=agent, version=version.version, cause=cause
            )

        return self._change(write)

    def refuse(
        self, name: str, reason: str, *, fallback: Sequence[str] = ("previous", "base"), cause: ChangeCause = NOBODY
    ) -> Agent:
        """Register a name without a version, with the reason why its Release was not admitted.

        Nothing changes if that is recorded already. Raises ConflictError if the agent has a version by now.
        """

        def write(connection: Connection) -> Agent:
            before = self._known_agent(connection, name)
            if before is not None and not before.is_blank:
                raise ConflictError(f"{before.name}@{before.live} has been added meanwhile", "sartor agents list")
            if before is not None and before.note == reason:
                return before
            agent = Agent(name, "", fallback=tuple(fallback), note=reason)
            return self._record(connection, "refused", before=before, after=agent, version="", cause=cause)

        return self._change(write)

    def promote(
        self,
        name: str,
        version: str,
        *,
        expected: str | None = None,
        heeds_freeze: bool = False,
        cause: ChangeCause = NOBODY,
    ) -> Agent:
        """Make a registered version live, if `expected` is the live version (None: any).

        It also ends a trial, a drain or a quarantine. Without an expectation it repairs a row that was changed from
        outside.
        Raises ConflictError with the actual state, UnknownAgentError, and what `Database.change` raises; then nothing
        changed.
        heeds_freeze: whether a frozen trial raises ConflictError, as it does for the monitors.
        """
        return self._edit(
            name,
            "promoted",
            lambda agent: agent.expecting(expected).promoted(version),
            cause=cause,
            version=version,
            heals=expected is None,
            heeds_freeze=heeds_freeze,
        )

    def freeze(
        self,
        name: str,
        version: str,
        *,
        expected: str | None = None,
        trial: str | None = None,
        renews: bool = False,
        cause: ChangeCause = NOBODY,
    ) -> Agent:
        """Record that the trial or watch of a version waits for an admin; nothing else changes.

        It lasts until the agent is promoted, rolled back or removed, or its fractions are set anew. Nothing changes if
        it is frozen already. Raises as `rollback`.
        renews: whether another reason than that of a freeze that holds is recorded, too.
        """

        def write(connection: Connection) -> Agent:
            agent = self._agent(connection, name).expecting(expected, trial)
            freeze = self._freezes(connection).get(name)
            if freeze is not None and (not renews or freeze.reason == cause.reason):
                return agent
            return self._record(connection, FROZEN, before=agent, after=agent, version=version, cause=cause)

        return self._change(write)

    def rollback(
        self, name: str, *, expected: str | None = None, trial: str | None = None, cause: ChangeCause = NOBODY
    ) -> Agent:
        """Undo the newest step: end a running trial, or else make the previous version live again.

        trial: the version that must be on trial, "" for none.
        The version that is withdrawn is marked. Raises as `promote`.
        """

        def write(connection: Connection) -> Agent:
            before = self._agent(connection, name).expecting(expected, trial)
            withdrawn = before.candidate or before.live
            after = before.rolled_back()
            self._mark(connection, f"{name}@{withdrawn}", "rolled_back")
            self._mark(connection, f"{name}@{after.live}", "admitted")
            return self._record(connection, "rolled back", before=before, after=after, version=withdrawn, cause=cause)

        return self._change(write)

    def start_canary(
        self, name: str, version: str, fraction: float, *, expected: str | None = None, cause: ChangeCause = NOBODY
    ) -> Agent:
        """Let a registered version answer a fraction of the requests. Raises as `promote`, and ConfigError."""
        return self._edit(
            name,
            "canary",
            lambda agent: agent.expecting(expected).with_trial(version, canary_fraction=fraction),
            cause=cause,
            version=version,
        )

    def start_shadow(
        self, name: str, version: str, fraction: float, *, expected: str | None = None, cause: ChangeCause = NOBODY
    ) -> Agent:
        """Let a registered version also answer a fraction of the requests, without sending its replies.

        Raises as `start_canary`.
        """
        return self._edit(
            name,
            "shadow",
            lambda agent: agent.expecting(expected).with_trial(version, shadow_fraction=fraction),
            cause=cause,
            version=version,
        )

    def bring_in(
        self,
        name: str,
        version: str,
        *,
        canary: float = 0.0,
        shadow: float = 0.0,
        ends_trial: bool = True,
        expected: str | None = None,
        cause: ChangeCause = NOBODY,
    ) -> Agent:
        """Start a trial of a registered version; without fractions, make it live.

        A version that is on trial already becomes live (`ends_trial`), or gets new fractions. Raises as `promote` and
        `start_canary`.
        """

        def change(agent: Agent) -> Agent:
            agent = agent.expecting(expected)
            if not (canary or shadow) or version == agent.live or (ends_trial and version == agent.candidate):
                return agent.promoted(version)
            return agent.with_trial(version, canary_fraction=canary, shadow_fraction=shadow)

        heals = expected is None and not (canary or shadow)
        return self._edit(name, "", change=change, cause=cause, version=version, heals=heals)

    def drain(self, name: str, *, cause: ChangeCause = NOBODY) -> Agent:
        """Let an agent finish its running requests and accept no new ones, until a version is promoted."""
        return self._edit(name, "drained", lambda agent: replace(agent, state="draining"), cause)

    def remove(self, name: str, *, cause: ChangeCause = NOBODY) -> Agent:
        """Remove an agent from service. Its versions stay recorded, so their names never mean another Release."""
        return self._edit(name, "removed", lambda agent: replace(agent.without_trial(), state="removed"), cause)

    def note(self, name: str, text: str, *, cause: ChangeCause = NOBODY) -> Agent:
        """Store a note with an agent."""
        return self._edit(name, "noted", lambda agent: replace(agent, note=text), cause)

    def repair(self, name: str, *, cause: ChangeCause = NOBODY) -> Agent:
        """Rewrite an agent's row from the log.

        Raises ConflictError if the row is intact, ArtifactError if the log does not know the agent.
        """

        def write(connection: Connection) -> Agent:
            row = self._row(connection, registry_schema.agents, name=name)
            if row is not None and is_current(connection, registry_schema.agents, row):
                raise ConflictError(f"the row of {name} is as it was written", f"sartor agents events {name}")
            return self._record(
                connection, "repaired", before=None, after=self._recall(connection, name), version="", cause=cause
            )

        return self._change(write)

    def _edit(
        self,
        name: str,
        action: str,
        change: Change,
        cause: ChangeCause,
        version: str = "",
        heals: bool = False,
        heeds_freeze: bool = False,
    ) -> Agent:
        """Make one change of one agent.

        heals: take the agent from the log if its row was changed from outside.
        heeds_freeze: as in `promote`.
        """

        def write(connection: Connection) -> Agent:
            before = self._agent(connection, name, heals=heals)
            if heeds_freeze and name in self._freezes(connection):
                raise ConflictError(
                    f"the trial of {name} is frozen; nothing was changed", f"see `sartor agents events {name}`"
                )
            if version:
                self._check_version(connection, name, version)
            after = change(before)
            if version:
                self._mark(connection, f"{name}@{version}", "admitted")
            logged_action = action
            if not action:  # it follows from the agent's state after the change
                if after.live == version:
                    logged_action = "promoted"
                else:
                    logged_action = "canary" if after.canary_fraction else "shadow"
            return self._record(
                connection,
                logged_action,
                before=before,
                after=after,
                version=version,
                cause=cause,
            )

        return self._change(write)

    def _change(self, write: Callable[[Connection], Agent]) -> Agent:
        with self.database.change() as connection:
            agent = write(connection)
        for listener in list(self._listeners):
            listener()
        return agent

    def _agent(self, connection: Connection, name: str, *, heals: bool = False, removed: bool = False) -> Agent:
        row = self._row(connection, registry_schema.agents, name=name)
        if row is None:
            is_intact = not transaction_of(connection).has_row(registry_schema.agents, name=name)
        else:
            is_intact = is_current(connection, registry_schema.agents, row)
        if not is_intact:
            if heals:
                return self._recall(connection, name)
            raise ArtifactError(f"the row of {name} was changed from outside", f"sartor agents repair {name}")
        if row is None or (row["state"] == "removed" and not removed):
            served = connection.execute(
                select(registry_schema.agents.c.name).where(registry_schema.agents.c.state != "removed")
            ).scalars()
            raise UnknownAgentError(
                f"no agent has the name {name!r}; there are: {', '.join(sorted(served)) or 'none'}",
                "sartor agents list",
            )
        return Agent.from_row(row)

    def _known_agent(self, connection: Connection, name: str, *, removed: bool = False) -> Agent | None:
        """Return an agent; None for a new name. Raises as `_agent`."""
        row = self._row(connection, registry_schema.agents, name=name)
        if row is None and not transaction_of(connection).has_row(registry_schema.agents, name=name):
            return None
        return self._agent(connection, name, removed=removed)

    def _recall(self, connection: Connection, name: str) -> Agent:
        """Return the agent as its newest event left it. Raises ArtifactError if the log lacks that event."""
        newest = transaction_of(connection).log.newest.get(name, "")
        if not newest:
            raise ArtifactError(
                f"the row of {name} is damaged and the log does not know it", "sartor agents add RELEASE"
            )
        column = registry_schema.events.c
        query = select(registry_schema.events).where(column.agent == name, column.checksum.contains(newest))
        for row in _rows(connection, query):
            if seals_of(connection).is_whole(_sealed_fields(dict(row))):
                return Agent.from_json(Event.from_row(dict(row)).became)
        raise ArtifactError(
            f"the row of {name} is damaged, and its newest event was removed from the log from outside",
            "cp BACKUP the newest copy of the registry; or sartor agents reseal, which trusts every row as it is",
        )

    def _check_version(self, connection: Connection, name: str, version: str) -> None:
        row = self._row(connection, registry_schema.versions, agent=name, version=version)
        if row is None:
            column = registry_schema.versions.c
            versions = connection.execute(
                select(column.version).where(column.agent == name).order_by(column.added)
            ).scalars()
            raise UnknownAgentError(
                f"{name} has no version {version!r}; it has: {', '.join(versions) or 'none'}",
                "sartor agents add RELEASE, which registers the version of a Release",
            )
        if not is_current(connection, registry_schema.versions, row):
            raise ArtifactError(
                f"the row of {name}@{version} was changed from outside",
                f"sartor agents add {shlex.quote(str(row['release']))}",
            )

    def _check_rules(self, connection: Connection, name: str, version: str) -> None:
        if self._rules is not None:
            row = self._row(connection, registry_schema.versions, agent=name, version=version)
            self._rules.check(name, version, str(row["release_id"]) if row else "")

    def _put_version(self, connection: Connection, version: AgentVersion) -> str:
        """Write a version that is new, has moved, or has a damaged row; return the action, "" for none."""
        row = self._row(connection, registry_schema.versions, agent=version.agent, version=version.version)
        if row is None and not transaction_of(connection).has_row(
            registry_schema.versions, agent=version.agent, version=version.version
        ):
            put_row(connection, registry_schema.versions, version.as_row())
            return "added"
        is_intact = row is not None and is_current(connection, registry_schema.versions, row)
        known_id = str(row["release_id"]) if row is not None else ""
        if not is_intact:  # the id that the log has for this version, "" if it has none
            known_id = ""
            for event in self._events(connection, version.agent, 1000):
                if event.version == version.version and "release_id" in event.numbers:
                    known_id = str(event.numbers["release_id"])
                    break
        if known_id not in ("", version.release_id):
            raise ConflictError(
                f"{version.name} is the Release {known_id[:16]}, not {version.release_id[:16]}; a version is never "
                "another one",
                f"release it under a new version: sartor release ... --name {version.agent} --version NEW",
            )
        current = AgentVersion.from_row(row) if row is not None and is_intact else version
        if is_intact and current.release == version.release and current.facts == version.facts:
            return ""
        moved = replace(current, release=version.release, facts=version.facts, adapter=version.adapter)
        put_row(connection, registry_schema.versions, moved.as_row())
        return "moved" if is_intact else "repaired"

    def _mark(self, connection: Connection, name: str, status: Any) -> None:
        agent, _, version = name.rpartition("@")
        row = self._row(connection, registry_schema.versions, agent=agent, version=version)
        if row is None or not is_current(connection, registry_schema.versions, row) or row["status"] == status:
            return
        put_row(connection, registry_schema.versions, replace(AgentVersion.from_row(row), status=status).as_row())

    def _record(
        self, connection: Connection, action: str, before: Agent | None, after: Agent, version: str, cause: ChangeCause
    ) -> Agent:
        """Write the agent and the event of its change, both under the next generation.

        Raises what `VersionRules.check` raises for a version that becomes live or goes on trial by it.
        """
        if action != "repaired":
            if after.live and (before is None or after.live != before.live):
                self._check_rules(connection, after.name, after.live)
            if after.candidate and (before is None or after.candidate != before.candidate):
                self._check_rules(connection, after.name, after.candidate)
        after = replace(after, generation=registry_schema.next_generation(connection), changed=_now())
        put_row(connection, registry_schema.agents, after.as_row())
        numbers = dict(cause.numbers)
        if action in ("added", "moved", "repaired") and version:
            row = self._row(connection, registry_schema.versions, agent=after.name, version=version)
            numbers["release_id"] = "" if row is None else row["release_id"]
        event = {
            "generation": after.generation,
            "at": after.changed,
            "who": cause.by,
            "what": action,
            "agent": after.name,
            "version": version,
            "why": cause.reason,
            "was": records.canonical(before.as_json() if before else {}).decode(),
            "became": records.canonical(after.as_json()).decode(),
            "numbers": records.canonical(numbers).decode(),
        }
        transaction_of(connection).write_event(event)
        return after

    def _events(self, connection: Connection, agent: str, limit: int) -> list[Event]:
        """Return intact events, oldest first; one that was put back under another number counts once."""
        column = registry_schema.events.c
        query = select(registry_schema.events).order_by(column.generation.desc(), column.id)
        if agent:
            query = query.where(column.agent == agent)
        events: dict[str, Event] = {}
        for stored_row in connection.execute(query, execution_options={"yield_per": 500}).mappings():
            if len(events) == limit:
                break
            row = dict(stored_row)
            if row["checksum"] not in events and seals_of(connection).is_whole(_sealed_fields(row)):
                events[str(row["checksum"])] = Event.from_row(row)
        return list(events.values())[::-1]

    def _freezes(self, connection: Connection) -> dict[str, Freeze]:
        """Return the freezes that hold, by agent, as the head has them: no event of the log undoes one."""
        return {name: Freeze(*freeze) for name, freeze in transaction_of(connection).log.frozen.items()}

    def _row(self, connection: Connection, table: Table, **key: str) -> Mapping[str, Any] | None:
        row = connection.execute(select(table).filter_by(**key)).mappings().first()
        return None if row is None else dict(row)


def _rows(connection: Connection, query: Select[Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _sealed_fields(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of an event that its seal covers: its number is assigned after it is sealed."""
    return {name: value for name, value in event.items() if name != "id"}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
