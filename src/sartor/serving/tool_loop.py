"""Tool-calling loop of an agent.

Stands between plans and `dispatch`, so steps of plans have their agents' tools too. A call whose arguments do not obey the
tool's schema is not run. After `ROUNDS` rounds, or when a call is made a second time, the agent is asked once more without
tools. A tool that fails is told to the agent, and to the client in the reason. Every call is a line in STATE/tools, without a
word of what it was: digests by the team's key.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core.errors import RequestError, SartorError
from sartor.inference.engine import Event, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.mcp_client import McpConnection, OfferedTool
from sartor.serving.plans.plan_dispatch import Replier
from sartor.serving.plans.plan_log import DayFiles
from sartor.serving.plans.step_messages import read_json, schema_errors
from sartor.serving.receipts import Digest, team_digest
from sartor.serving.registry.user_versions import SUFFIX
from sartor.serving.team_config import Team
from sartor.serving.types import AgentReply, AgentRequest

SCHEMA = 1
ROUNDS = 4
# Of one round: a reply that calls more is told so
MOST_CALLS = 8


class ToolServers:
    """The tool servers of a team, and which agent is offered what."""

    def __init__(self, team: Team) -> None:
        folder = Path(team.state) / "tools"
        self._held = {terms.name: McpConnection(terms, folder) for terms in team.tools}
        self._of = {member.name: member.tools for member in team.agents if member.tools}

    @property
    def troubles(self) -> dict[str, str]:
        """What cannot be offered, and why."""
        return {name: why for held in self._held.values() for name, why in held.troubles.items()}

    async def start(self) -> None:
        """Open every server, side by side; one that cannot be is a trouble. Raises ExtraError."""
        await asyncio.gather(*(held.start() for held in self._held.values()))

    async def close(self) -> None:
        """End them."""
        await asyncio.gather(*(held.close() for held in self._held.values()))

    def of(self, agent: str) -> dict[str, OfferedTool]:
        """What an agent may call, by name; of two tools of one name the first server's."""
        found: dict[str, OfferedTool] = {}
        for name in self._of.get(agent, ()):
            found = {**self._held[name].tools, **found}
        return found

    def declared(self, agent: str) -> tuple[Mapping[str, Any], ...]:
        """The same as a prompt has it."""
        return tuple(tool.declared for tool in self.of(agent).values())


@dataclass
class _Course:
    """What was done for one request so far. notes: what went wrong."""

    due: float
    seen: set[tuple[str, str]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    prompt: int = 0
    reply: int = 0
    cached: int = 0
    is_looping: bool = False

    def count(self, done: ReplyDone) -> None:
        """Add a round's tokens."""
        self.prompt += done.prompt_tokens
        self.reply += done.reply_tokens
        self.cached += done.cached_tokens


class ToolCallingAgent:
    """Answers as `replies` does, by agents that have tools. digest: of what is logged; by default the team's."""

    def __init__(self, replies: Replier, box: ToolServers, team: Team, digest: Digest | None = None) -> None:
        self._replies, self._box = replies, box
        state = Path(team.state)
        self._digest = digest or team_digest(state)
        self._files = DayFiles(state / "tools", "tools", team.limits.receipts_days)
        self.lost = 0

    @property
    def troubles(self) -> dict[str, str]:
        """What could not be logged."""
        return {"tools": f"{self.lost} calls could not be logged"} if self.lost else {}

    async def open(self, request: AgentRequest) -> AgentReply:
        """Begin a reply; one of an agent with tools is whole by then. Raises what `replies.open` raises."""
        course, asked = _Course(time.monotonic() + request.deadline_s), request
        for number in range(ROUNDS + 1):
            left_s = max(0.001, course.due - time.monotonic())
            answer = await self._replies.open(replace(asked, deadline_s=left_s))
            name = answer.agent.partition("@")[0]
            tools = self._box.of(name) if request.tools is None and not request.schema else {}
            if not tools and not number:
                return answer
            async with aclosing(answer.events) as source:
                events = [event async for event in source]
            end = events[-1]
            calls = end.tool_calls if isinstance(end, ReplyDone) and asked.tools is None else ()
            if not calls:
                return _told(answer, events, course)
            assert isinstance(end, ReplyDone)
            course.count(end)
            said = "".join(event.text for event in events if isinstance(event, TextDelta))
            turn = {"role": "assistant", "content": said, "tool_calls": list(calls)}
            results = [await self._result(answer, tools, call, place, course) for place, call in enumerate(calls)]
            model = name if answer.agent.endswith(SUFFIX) else answer.agent
            asked = replace(asked, model=model, messages=(*asked.messages, turn, *results))
            if course.is_looping or number == ROUNDS - 1:
                course.notes += [] if course.is_looping else [f"{ROUNDS} rounds of tools were used up"]
                asked = replace(asked, tools=())
        raise AssertionError("the last round has no tools")

    async def _result(
        self, answer: AgentReply, tools: Mapping[str, OfferedTool], call: Mapping[str, Any], place: int, course: _Course
    ) -> dict[str, Any]:
        """What one call came to, as a `tool` message."""
        name, said = str(call["function"]["name"]), str(call["function"]["arguments"])
        began, error = time.monotonic(), ""
        try:
            text = await self._run(tools, name, said, place, course)
        except SartorError as failed:
            error, text = failed.kind, f"error: {failed.problem}"
            course.notes.append(failed.problem)
        row = {
            "schema": SCHEMA, "receipt": answer.receipt, "agent": answer.agent, "tool": name if name in tools else "",
            "error": error, "asked": self._digest("asked", said), "said": self._digest("said", text),
            "took_s": round(time.monotonic() - began, 3),
        }  # fmt: skip
        await asyncio.to_thread(self._write, row)
        return {"role": "tool", "tool_call_id": str(call["id"]), "name": name, "content": text}

    async def _run(self, tools: Mapping[str, OfferedTool], name: str, said: str, place: int, course: _Course) -> str:
        value, tool = read_json(said), tools.get(name)
        if tool is None:
            raise RequestError(f"there is no tool {name[:80]!a}", ", ".join(tools))
        if place >= MOST_CALLS:
            raise RequestError(f"more than {MOST_CALLS} calls in one reply; {name} was not run", "fewer calls")
        if wrong := schema_errors(value, tool.schema):
            raise RequestError(f"the arguments of {name} are wrong: {'; '.join(wrong)}", "arguments of its schema")
        key = (name, json.dumps(value, sort_keys=True))
        if key in course.seen:
            course.is_looping = True
            raise RequestError(f"{name} was called twice with the same arguments; the calls were stopped", "another call")
        course.seen.add(key)
        return await tool.server.call(name, value, max(0.001, course.due - time.monotonic()))

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self._files.append(json.dumps(row).encode() + b"\n")
        except OSError:
            self.lost += 1


def _told(answer: AgentReply, events: Sequence[Event], course: _Course) -> AgentReply:
    """The last round's reply, with the tokens of all rounds and what went wrong."""
    before = TextDelta(events[-1].call, "", course.reply)
    end = events[-1]
    if isinstance(end, ReplyDone):
        course.count(end)
        end = replace(end, prompt_tokens=course.prompt, reply_tokens=course.reply, cached_tokens=course.cached)
    reason = "; ".join([answer.reason, *course.notes])
    return AgentReply(answer.agent, reason, answer.receipt, _Again([before, *events[:-1], end]))


class _Again:
    """Events that are there already, as `Events` has them."""

    def __init__(self, events: Sequence[Event | ReplyFailed]) -> None:
        self._left = list(events)

    def __aiter__(self) -> _Again:
        return self

    async def __anext__(self) -> Event:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)

    async def aclose(self) -> None:
        """See Events."""
        self._left.clear()
