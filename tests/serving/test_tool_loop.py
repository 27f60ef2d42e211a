"""Tools of a real MCP server, called by an agent whose words are scripted."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import serving
from dispatch_fakes import FakeCrew, FakeRouter, asked, dispatching, no_fsync, registry, said, version
from sartor.core.errors import ConfigError, UnavailableError
from sartor.inference.engine import Event, ReplyDone, TextDelta
from sartor.serving.http.request_conversion import chat_request
from sartor.serving.http.request_models import ChatRequest
from sartor.serving.mcp_client import McpConnection
from sartor.serving.team_config import AgentOptions, RequestLimits, Team, ToolServer
from sartor.serving.tool_loop import ROUNDS, ToolCallingAgent, ToolServers
from sartor.serving.types import AgentReply, AgentRequest
from server_process import SMALL

__all__ = ["no_fsync"]
pytest.importorskip("mcp")


class Scripted:
    """Calls what the script says, a list of (tool, arguments) a round, then answers. asked: every Request."""

    def __init__(self, rounds: Sequence[Sequence[tuple[str, Any]]]) -> None:
        self._rounds, self.asked = list(rounds), list[AgentRequest]()

    async def open(self, request: AgentRequest) -> AgentReply:
        self.asked.append(request)
        may = request.tools is None and self._rounds
        calls = self._rounds.pop(0) if may else ()
        return AgentReply("faq@1.0", "asked by name", f"r{len(self.asked)}", self._events(calls))  # type: ignore[arg-type]

    async def _events(self, calls: Sequence[tuple[str, Any]]) -> AsyncIterator[Event]:
        made = [
            {"id": f"c{place}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for place, (name, arguments) in enumerate(calls)
        ]
        yield TextDelta("c", "" if made else "the end", 2)
        yield ReplyDone("c", "tool_calls" if made else "stop", 5, 2, 1, tuple(made))


def team(tmp_path: Path, **changes: Any) -> Team:
    terms = {"timeout_s": 120.0, **changes}
    server = ToolServer("small", SMALL, **terms)
    return serving.team(tmp_path, agents=(AgentOptions("faq", "faq", tools=("small",)),), tools=(server,))


async def run(tmp_path: Path, *rounds: Sequence[tuple[str, Any]], **changes: Any) -> dict[str, Any]:
    """What came of a request whose agent calls these tools."""
    made, replies = team(tmp_path, **changes), Scripted(rounds)

    box = ToolServers(made)
    await box.start()
    try:
        answer = await ToolCallingAgent(replies, box, made).open(
            AgentRequest("faq", ({"role": "user", "content": "q"},))
        )
        events = [event async for event in answer.events]
        came = {"answer": answer, "events": events, "declared": box.declared("faq"), "troubles": box.troubles}
    finally:
        await box.close()
    turns = [turn for turn in replies.asked[-1].messages if turn["role"] == "tool"]
    rows = [
        json.loads(row) for file in (tmp_path / "tools").glob("tools-*.jsonl") for row in file.read_text().splitlines()
    ]
    return {**came, "results": [turn["content"] for turn in turns], "asked": replies.asked, "rows": rows}


async def test_tool_result_reaches_the_agent(
    tmp_path: Path,
) -> None:
    """Long results are cut, the environment is filtered, and a tool with a broken schema is not offered."""
    came = await run(tmp_path, [("double", {"number": 21})], [("environment", {}), ("long", {})], result_bytes=500)
    assert came["results"][0] == "42"
    assert "PATH" in came["results"][1] and "PYTHONPATH" not in came["results"][1]
    assert came["results"][2].endswith("[cut: 49500 more bytes]")
    assert came["answer"].reason == "asked by name" and came["answer"].receipt == "r3"
    pieces = "".join(event.text for event in came["events"][:-1])
    done = came["events"][-1]
    assert (pieces, done.prompt_tokens, done.reply_tokens, done.tool_calls) == ("the end", 15, 6, ())
    assert [request.model for request in came["asked"]] == ["faq", "faq@1.0", "faq@1.0"]
    assert [turn["role"] for turn in came["asked"][1].messages] == ["user", "assistant", "tool"]
    assert "broken" not in [tool["function"]["name"] for tool in came["declared"]] and "double" in str(
        came["declared"]
    )
    assert "is no JSON Schema" in came["troubles"]["tools small.broken"]
    assert [row["tool"] for row in came["rows"]] == ["double", "environment", "long"]
    assert all(
        len(row[what]) == 64 and int(row[what], 16) for row in came["rows"] for what in ("asked", "said")
    )  # no words


async def test_what_goes_wrong_is_told_to_the_agent_and_in_the_reason(tmp_path: Path) -> None:
    calls = [("double", {"number": "x"}), ("nothing", {}), ("fails", {})]
    came = await run(tmp_path, *([call] for call in calls))
    wrong, unknown, fails = came["results"]
    assert "the arguments of double are wrong: at $.number: 'x' is not of type 'integer'" in wrong
    assert unknown == "error: there is no tool 'nothing'" and fails == "error: the tool fails says: no such room"
    assert (
        came["answer"].reason.startswith("asked by name; the arguments of double")
        and "no such room" in came["answer"].reason
    )
    assert [row["error"] for row in came["rows"]] == ["RequestError"] * 3


async def test_failed_tool_costs_only_its_result(tmp_path: Path) -> None:
    """The reason names a tool that hangs or dies, and its server is opened again."""
    made, replies = team(tmp_path), Scripted([[("dies", {})]])

    request = AgentRequest("faq", ({"role": "user", "content": "q"},))
    box = ToolServers(made)
    await box.start()
    server = box.of("faq")["slow"].server
    try:
        hanging = ToolCallingAgent(Scripted([[("slow", {})]]), box, made)
        late = await hanging.open(replace(request, deadline_s=1.0))
        answer = await ToolCallingAgent(replies, box, made).open(request)
        await asyncio.sleep(0.1)  # until its end is noticed
        async with asyncio.timeout(240):
            while "tools small" in box.troubles or not server.is_open:
                await asyncio.sleep(0.1)
        again = await server.call("double", {"number": 4}, 120)
    finally:
        await box.close()
    assert "the tool slow took longer than" in late.reason
    assert "the tool dies failed" in answer.reason and again == "8"


@contextmanager
def by_http(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A tool server of an address, which knows whoever says `open sesame`; and its port."""
    with subprocess.Popen([*SMALL, str(port), "open sesame"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


async def test_tool_url_is_called_with_the_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong or unset key is a trouble that does not show the key."""
    monkeypatch.setenv("SMALL_TOKEN", "open sesame")
    monkeypatch.setenv("WRONG_TOKEN", "open barley")

    said = []
    with by_http() as (_, port):
        for name in ("SMALL_TOKEN", "WRONG_TOKEN", "NO_TOKEN"):
            tool_server = ToolServer("small", url=f"http://127.0.0.1:{port}/mcp", token_env=name, timeout_s=120.0)
            server = McpConnection(tool_server, tmp_path)
            await server.start()
            said.append(await server.call("double", {"number": 21}, 120) if server.is_open else str(server.troubles))
            await server.close()
    right, wrong, none = said
    assert right == "42" and "NO_TOKEN is not set" in none
    assert "tools small" in wrong and "barley" not in wrong, wrong


async def test_an_address_that_goes_away_is_a_trouble_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_TOKEN", "open sesame")

    with by_http() as (process, port):
        server = McpConnection(
            ToolServer("small", url=f"http://127.0.0.1:{port}/mcp", token_env="SMALL_TOKEN", timeout_s=120.0),
            tmp_path,
        )
        await server.start()
        before = await server.call("double", {"number": 4}, 120)
        process.kill()
        process.wait()
        with pytest.raises(UnavailableError, match="the tool double failed"):
            await server.call("double", {"number": 3}, 120)
    while server.is_open:
        await asyncio.sleep(0.01)
    with by_http(port):
        async with asyncio.timeout(60):
            while not server.is_open:
                await asyncio.sleep(0.1)
        after = await server.call("double", {"number": 4}, 120)
        await server.close()
    result = before, after
    assert result == ("8", "8")


async def test_a_server_that_is_closed_while_it_breaks_off_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_TOKEN", "open sesame")

    with by_http() as (process, port):
        server = McpConnection(
            ToolServer("small", url=f"http://127.0.0.1:{port}/mcp", token_env="SMALL_TOKEN", timeout_s=120.0),
            tmp_path,
        )
        await server.start()
        process.kill()
        process.wait()
        with pytest.raises(UnavailableError):
            await server.call("double", {"number": 3}, 120)
        async with asyncio.timeout(20):  # at once: a cancellation reaches the package while it closes the session
            await server.close()


async def test_the_same_call_twice_and_too_many_rounds_are_stopped(tmp_path: Path) -> None:
    same = await run(tmp_path / "same", *[[("double", {"number": 1})]] * 3)
    assert "called twice with the same arguments" in same["answer"].reason and len(same["asked"]) == 3
    assert same["asked"][-1].tools == () and len(same["rows"]) == 2
    many = await run(tmp_path / "many", *[[("double", {"number": number})] for number in range(ROUNDS + 3)])
    assert len(many["asked"]) == ROUNDS + 1 and f"{ROUNDS} rounds of tools were used up" in many["answer"].reason


async def test_only_allowed_tools_are_offered(tmp_path: Path) -> None:
    """An unknown allowed tool and a tool server that cannot start are troubles."""
    some = await run(tmp_path, allow=("double", "absent"))
    assert [tool["function"]["name"] for tool in some["declared"]] == ["double"]
    assert "has no such tool" in some["troubles"]["tools small.absent"]
    made = serving.team(
        tmp_path, agents=(AgentOptions("faq", "faq", tools=("x",)),), tools=(ToolServer("x", ("/no/such/program",)),)
    )

    box = ToolServers(made)
    await box.start()
    await box.close()
    assert "No such file" in box.troubles["tools x"] and box.declared("faq") == ()


def test_invalid_tool_servers_are_refused_at_load(tmp_path: Path) -> None:
    """No command or url, a setting of the other kind, and an undeclared name raise ConfigError."""
    with pytest.raises(ConfigError, match="neither command and url"):
        ToolServer("x")
    for wrong in ({"command": SMALL, "token_env": "KEY"}, {"url": "http://127.0.0.1:1/mcp", "env": ("KEY",)}):
        with pytest.raises(ConfigError, match="a setting of the other kind"):
            ToolServer("x", **wrong)
    with pytest.raises(ConfigError, match="faq lists the tools 'small', and there are none"):
        serving.team(tmp_path, agents=(AgentOptions("faq", "faq", tools=("small",)),))


async def test_agent_tools_are_offered_unless_the_client_overrides(
    tmp_path: Path,
) -> None:
    """Requests by name, version and auto have them; tool_choice none offers no tools."""
    tool, own = (
        {"type": "function", "function": {"name": "double"}},
        {"type": "function", "function": {"name": "look"}},
    )

    crew, made = FakeCrew(), serving.team(tmp_path / "state")
    known = registry(tmp_path, version("faq", "1", tools=[own]), version("home", "1", tools=[own]))
    async with dispatching(made, crew, known, router=FakeRouter("faq")) as dispatch:
        dispatch.team_tools = lambda name: (tool,) if name == "faq" else ()
        expected = {"faq": (tool,), "faq@1": (tool,), "auto": (tool,), "home": (own,), "base": ()}
        for model, tools in expected.items():
            await said(dispatch, asked(model))
            assert crew.calls[-1].tools == tools, model
        question = [{"role": "user", "content": "q"}]
        told = {"model": "faq", "messages": question, "tools": [own], "tool_choice": "none"}
        for body, tools in [(told, ()), ({**told, "tool_choice": "auto"}, (own,))]:
            await said(dispatch, chat_request(ChatRequest.model_validate(body), RequestLimits()))
            assert crew.calls[-1].tools == tools


async def test_a_tools_command_is_never_read_by_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that a shell would run are arguments."""
    mark = tmp_path / "mark"
    start = f"import runpy, sys\nsys.argv = [{SMALL[1]!r}]\nrunpy.run_path({SMALL[1]!r}, run_name='__main__')"
    attack = [f"; touch {mark}", f"$(touch {mark})", f"`touch {mark}`", f"| touch {mark}"]
    monkeypatch.setitem(globals(), "SMALL", (SMALL[0], "-c", start, *attack))
    came = await run(tmp_path, [("double", {"number": 2})])
    assert came["results"] == ["4"] and not mark.exists()
