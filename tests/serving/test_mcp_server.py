"""The team as an MCP server, asked by the protocol's own client over loopback; and its A2A card."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving
from sartor.core.errors import ExtraError, UnavailableError
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer
from sartor.serving.team_config import AgentOptions, CardTerms, McpTerms, Team
from sartor.serving.types import AgentListing

pytest.importorskip("mcp")
PLAN = AgentListing("checked", "d1", ("d1",), {"plan": "sequence"})
CARD = "/.well-known/agent-card.json"


def made(tmp_path: Path, **changes: Any) -> Team:
    agents = (
        AgentOptions("faq", "releases/faq", about="Questions about the house."),
        AgentOptions("home", "releases/home"),
    )
    return serving.team(tmp_path, mcp=McpTerms(serve=True), agents=agents, **changes)


async def asked(
    tmp_path: Path,
    work: Callable[[Any], Awaitable[Any]],
    *,
    path: str = "/mcp",
    key: str = "",
    old: bool = False,
    **parts: Any,
) -> Any:
    """What `work` returns of a client that is connected; old: by the handshake of the protocol's versions before 2026."""
    import httpx2
    from mcp.client import Client
    from mcp.client.streamable_http import streamable_http_client

    server = HttpServer(serving.house(plans=[PLAN], **parts), made(tmp_path), log=RequestLog(serving.Log()))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with serving.running(server) as url:
        async with httpx2.AsyncClient(headers=headers, timeout=120) as http:
            transport = streamable_http_client(url + path, http_client=http)
            async with Client(transport, mode="legacy" if old else "auto") as client:
                return await work(client)


async def names(client: Any) -> dict[str, str]:
    return {tool.name: tool.description for tool in (await client.list_tools()).tools}


def ask(tool: str, **arguments: Any) -> Callable[[Any], Awaitable[Any]]:
    return lambda client: client.call_tool(tool, arguments)


@pytest.mark.parametrize("old", [False, True])
async def test_the_team_is_listed_and_answers_with_receipt_and_reason(tmp_path: Path, old: bool) -> None:
    replies = serving.Replies()

    async def work(client: Any) -> Any:
        return await names(client), await client.call_tool("faq", {"prompt": "hello"})

    listed, said = await asked(tmp_path, work, replies=replies, old=old)
    assert list(listed) == ["ask", "faq", "home", "checked"]
    assert listed["faq"] == "Questions about the house." and "sequence" in listed["checked"]
    assert (said.is_error, said.content[0].text) == (False, "the sky is blue ")
    facts = {name: said.meta[f"sartor/{name}"] for name in ("agent", "reason", "receipt", "finish")}
    assert facts == {"agent": "faq@1.0", "reason": "asked by näme\nand more", "receipt": "r1", "finish": "stop"}
    assert (replies.asked[0].model, replies.asked[0].messages) == ("faq", ({"role": "user", "content": "hello"},))
    assert replies.closed == ["r1"]


async def test_ask_chooses_by_auto_or_takes_the_agent_that_is_named(tmp_path: Path) -> None:
    replies = serving.Replies()

    async def work(client: Any) -> None:
        await client.call_tool("ask", {"prompt": "one"})
        await client.call_tool("ask", {"prompt": "two", "agent": "home"})
        await client.call_tool("checked", {"prompt": "three"})

    await asked(tmp_path, work, replies=replies)
    assert [request.model for request in replies.asked] == ["auto", "home", "checked"]


async def test_a_path_of_one_agent_has_that_one_alone(tmp_path: Path) -> None:
    replies = serving.Replies()

    async def work(client: Any) -> Any:
        return await names(client), await client.call_tool("home", {"prompt": "light"})

    listed, said = await asked(tmp_path, work, path="/mcp/home@0.9", replies=replies)
    assert list(listed) == ["home"] and said.meta["sartor/agent"] == "home@0.9"
    assert [request.model for request in replies.asked] == ["home@0.9"]


async def test_a_key_sees_and_calls_what_it_opens(tmp_path: Path) -> None:
    rates, replies = serving.Rates(), serving.Replies()

    async def work(client: Any) -> Any:
        from mcp.shared.exceptions import MCPError

        with pytest.raises(MCPError, match="there is no tool 'home'"):
            await client.call_tool("home", {"prompt": "light"})
        refused = await client.call_tool("ask", {"prompt": "light", "agent": "home"})
        return await names(client), refused, await client.call_tool("faq", {"prompt": "hello"})

    parts: dict[str, Any] = {"keys": serving.KEYS, "rates": rates, "replies": replies}
    listed, refused, said = await asked(tmp_path, work, key="key-faq", **parts)
    assert list(listed) == ["ask", "faq"] and not said.is_error
    assert refused.is_error and "'home' is not one of ['auto', 'faq']" in refused.content[0].text
    assert [request.openable for request in replies.asked] == [frozenset({"faq", "auto"})]
    assert rates.begun == 1 and rates.tokens == {
        "k1": 11
    }  # a call counts, and neither the handshake nor what was refused


async def test_what_goes_wrong_is_told_as_the_other_routes_tell_it(tmp_path: Path) -> None:
    wrong = await asked(tmp_path, ask("faq", text="hello"))
    assert wrong.is_error and "'prompt' is a required property" in wrong.content[0].text
    assert (wrong.meta["sartor/kind"], wrong.meta["sartor/status"]) == ("RequestError", 400)

    busy = await asked(tmp_path, ask("faq", prompt="hello"), rates=serving.Rates(most=0))
    assert busy.is_error and (busy.meta["sartor/status"], busy.meta["sartor/retry_after_s"]) == (429, 13)

    fails = serving.Replies(fail=UnavailableError("faq is in quarantine", "sartor agents release faq"))
    gone = await asked(tmp_path, ask("faq", prompt="hello"), replies=fails)
    assert gone.content[0].text == "faq is in quarantine; try: sartor agents release faq"

    bug = await asked(tmp_path, ask("faq", prompt="hello"), replies=serving.Replies(fail=ValueError("secret")))
    assert bug.is_error and bug.meta["sartor/kind"] == "Bug" and "secret" not in bug.content[0].text


def test_the_door_and_the_body_are_checked_before_the_protocol(tmp_path: Path) -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"accept": "application/json, text/event-stream"}
    house = serving.house(keys=serving.KEYS)
    server = HttpServer(house, made(tmp_path, limits={"body_bytes": 1000}), log=RequestLog(serving.Log()))
    with serving.running(server) as url, httpx.Client(base_url=url, headers=accept, timeout=120) as client:
        good = {"authorization": "Bearer key-faq"}
        assert client.post("/mcp", json=call).status_code == 401
        assert client.post("/mcp/home", json=call, headers=good).status_code == 403
        assert client.post("/mcp/nobody", json=call, headers=good).status_code == 404
        assert client.post("/mcp", json={**call, "params": {"x": "x" * 1000}}, headers=good).status_code == 413
        assert (
            client.post("/mcp", content=b"{", headers={**good, "content-type": "application/json"}).status_code == 400
        )
        assert client.get("/mcp", headers=good).status_code == 405
        listed = client.post("/mcp", json=call, headers=good)
        assert [tool["name"] for tool in listed.json()["result"]["tools"]] == ["ask", "faq"]


async def test_it_is_off_by_default_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving.client(serving.house(), serving.team(tmp_path)) as client:
        result = [(await client.post("/mcp", json={})).status_code, (await client.get(CARD)).status_code]
    assert result == [404, 404]
    monkeypatch.setitem(sys.modules, "mcp.server.lowlevel", None)
    with pytest.raises(ExtraError, match=r"mcp"):
        HttpServer(serving.house(), made(tmp_path), log=RequestLog(serving.Log()))


async def card(tmp_path: Path, keys: Any, **headers: str) -> Any:
    team = made(tmp_path, a2a=CardTerms(card=True, url="https://team.example/"))
    async with serving.client(serving.house(keys=keys), team) as client:
        return (await client.get(CARD, headers=headers)).json()


async def test_agent_card_lists_only_agents_that_the_key_opens(tmp_path: Path) -> None:
    """Without keys each agent is listed and no security scheme is declared."""

    open_to_all = await card(tmp_path, None)
    assert [skill["id"] for skill in open_to_all["skills"]] == ["auto", "faq", "home"]
    assert "securitySchemes" not in open_to_all
    assert [one["url"] for one in open_to_all["supportedInterfaces"]] == [
        "https://team.example/mcp",
        "https://team.example/v1/chat/completions",
    ]
    stranger = await card(tmp_path, serving.KEYS)
    assert [skill["id"] for skill in stranger["skills"]] == ["auto"] and "key" in stranger["securitySchemes"]
    known = await card(tmp_path, serving.KEYS, authorization="Bearer key-faq")
    assert [skill["id"] for skill in known["skills"]] == ["auto", "faq"]
