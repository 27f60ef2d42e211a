"""Tool-calling loop of an agent.

It runs between plans and `dispatch`, so the steps of plans have their agents' tools too. A call whose arguments
violate the tool's schema is not run. After `ROUNDS` rounds, or if a call is repeated, the agent is asked once more
without tools. The error of a tool goes to the agent, and to the client in the reason. Every call is a line in
STATE/tools that holds digests by the team's key and no text.
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
from sartor.serving.plans.plan_log import DayFiles
from sartor.serving.plans.step_messages import read_json, schema_errors
from sartor.serving.receipts import Digest, team_digest
from sartor.serving.registry.user_versions import SUFFIX
from sartor.serving.team_config import Team
from sartor.serving.types import AgentReply, AgentRequest, Replier

SCHEMA = 1
ROUNDS = 4
# Most calls that are run in one round; further calls of the reply get an error
MOST_CALLS = 8


class ToolServers:
    """Tool servers of a team, and the tools of each agent."""

    def __init__(self, team: Team) -> None:
        folder = Path(team.state) / "tools"
        self._connections = {terms.name: McpConnection(terms, folder) for terms in team.tools}
        self._server_names = {member.name: member.tools for member in team.agents if member.tools}

    @property
    def troubles(self) -> dict[str, str]:
        """Reasons why something is not offered."""
        troubles = {}
        for connection in self._connections.values():
            troubles.update(connection.troubles)
        return troubles

    async def start(self) -> None:
        """Open all servers in parallel; a failure becomes a trouble. Raises ExtraError."""
        await asyncio.gather(*(connection.start() for connection in self._connections.values()))

    async def close(self) -> None:
        """Close all servers."""
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))

    def of(self, agent: str) -> dict[str, OfferedTool]:
        """Return the tools of an agent by name; of two with one name, the first server's."""
        result: dict[str, OfferedTool] = {}
        for name in self._server_names.get(agent, ()):
            result = {**self._connections[name].tools, **result}
        return result

    def declared(self, agent: str) -> tuple[Mapping[str, Any], ...]:
        """Return the tools of an agent in the form of a prompt."""
        return tuple(tool.declared for tool in self.of(agent).values())


@dataclass
class _Progress:
    """State of one request.

    notes: problems so far.
    """

    deadline: float
    earlier_calls: set[tuple[str, str]] = field(default_factory=set)
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
    """Replier that runs the tool calls of agents around another Replier.

    digest: of what is logged; by default the team's.
    """

    def __init__(self, replies: Replier, tool_servers: ToolServers, team: Team, digest: Digest | None = None) -> None:
        self._replies, self._tool_servers = replies, tool_servers
        state = Path(team.state)
        self._digest = digest or team_digest(state)
        self._files = DayFiles(state / "tools", "tools", team.limits.receipts_days)
        self.lost = 0

    @property
    def troubles(self) -> dict[str, str]:
        """Number of calls that could not be logged, as text."""
        return {"tools": f"{self.lost} calls could not be logged"} if self.lost else {}

    async def open(self, request: AgentRequest) -> AgentReply:
        """Begin a reply. The reply of an agent with tools is complete by then. Raises what `replies.open` raises."""
        progress = _Progress(time.monotonic() + request.deadline_s)
        round_request, tool_rounds = request, 0
        while True:
            remaining_s = max(0.001, progress.deadline - time.monotonic())
            answer = await self._replies.open(replace(round_request, deadline_s=remaining_s))
            name = answer.agent.partition("@")[0]
            tools: Mapping[str, OfferedTool] = {}
            if request.tools is None and not request.schema:
                tools = self._tool_servers.of(name)
            if not tools and not tool_rounds:
                return answer
            async with aclosing(answer.events) as source:
                events = [event async for event in source]
            done = events[-1]
            if round_request.tools is not None or not isinstance(done, ReplyDone) or not done.tool_calls:
                return _final_answer(answer, events, progress)

            progress.count(done)
            text = "".join(event.text for event in events if isinstance(event, TextDelta))
            turns: list[dict[str, Any]] = [{"role": "assistant", "content": text, "tool_calls": list(done.tool_calls)}]
            for index, tool_call in enumerate(done.tool_calls):
                turns.append(await self._result(answer, tools, tool_call, index=index, progress=progress))
            # the version that called the tools also reads their results, but a person's own version is found again
            model = name if answer.agent.endswith(SUFFIX) else answer.agent
            round_request = replace(
                round_request,
                model=model,
                messages=(*round_request.messages, *turns),
                server_turns=round_request.server_turns + len(turns),
            )
            tool_rounds += 1
            if tool_rounds == ROUNDS and not progress.is_looping:
                progress.notes.append(f"{ROUNDS} rounds of tools were used up")
            if tool_rounds == ROUNDS or progress.is_looping:
                round_request = replace(round_request, tools=())  # the next round ends the reply

    async def _result(
        self,
        answer: AgentReply,
        tools: Mapping[str, OfferedTool],
        tool_call: Mapping[str, Any],
        index: int,
        progress: _Progress,
    ) -> dict[str, Any]:
        """Run one tool call, log it, and return its result as a `tool` message."""
        name, arguments = str(tool_call["function"]["name"]), str(tool_call["function"]["arguments"])
        began, error = time.monotonic(), ""
        try:
            text = await self._run(tools, name, arguments, index=index, progress=progress)
        except SartorError as tool_error:
            error, text = tool_error.kind, f"error: {tool_error.problem}"
            progress.notes.append(tool_error.problem)
        row = {
            "schema": SCHEMA,
            "receipt": answer.receipt,
            "agent": answer.agent,
            "tool": name if name in tools else "",
            "error": error,
            "asked": self._digest("asked", arguments),
            "said": self._digest("said", text),
            "took_s": round(time.monotonic() - began, 3),
        }
        try:
            await asyncio.to_thread(self._files.append, json.dumps(row).encode() + b"\n")
        except OSError:
            self.lost += 1
        return {"role": "tool", "tool_call_id": str(tool_call["id"]), "name": name, "content": text}

    async def _run(
        self, tools: Mapping[str, OfferedTool], name: str, arguments: str, index: int, progress: _Progress
    ) -> str:
        value, tool = read_json(arguments), tools.get(name)
        if tool is None:
            raise RequestError(f"there is no tool {name[:80]!a}", ", ".join(tools))
        if index >= MOST_CALLS:
            raise RequestError(
                f"more than {MOST_CALLS} calls in one reply; {name} was not run",
                f"make at most {MOST_CALLS} calls in one reply",
            )
        if problems := await asyncio.to_thread(schema_errors, value, tool.schema):
            raise RequestError(
                f"the arguments of {name} are wrong: {'; '.join(problems)}",
                f"call {name} with arguments that its schema allows",
            )
        key = (name, json.dumps(value, sort_keys=True))
        if key in progress.earlier_calls:
            progress.is_looping = True
            raise RequestError(
                f"{name} was called twice with the same arguments; the calls were stopped",
                "call another tool, or answer without one",
            )
        progress.earlier_calls.add(key)
        return await tool.server.call(name, value, max(0.001, progress.deadline - time.monotonic()))


def _final_answer(answer: AgentReply, events: Sequence[Event], progress: _Progress) -> AgentReply:
    """Return the last round's reply with the tokens of all rounds, and the problems in its reason."""
    paid_delta = TextDelta(events[-1].call, "", progress.reply)
    last_event = events[-1]
    if isinstance(last_event, ReplyDone):
        progress.count(last_event)
        last_event = replace(
            last_event, prompt_tokens=progress.prompt, reply_tokens=progress.reply, cached_tokens=progress.cached
        )
    reason = "; ".join([answer.reason, *progress.notes])
    return AgentReply(answer.agent, reason, answer.receipt, _ReplayedEvents([paid_delta, *events[:-1], last_event]))


class _ReplayedEvents:
    """Stored events as an EventStream."""

    def __init__(self, events: Sequence[Event | ReplyFailed]) -> None:
        self._remaining = list(events)

    def __aiter__(self) -> _ReplayedEvents:
        return self

    async def __anext__(self) -> Event:
        if not self._remaining:
            raise StopAsyncIteration
        return self._remaining.pop(0)

    async def aclose(self) -> None:
        """Drop the remaining events."""
        self._remaining.clear()
