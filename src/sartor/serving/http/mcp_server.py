"""Agents and plans as MCP tools.

    /mcp           tool `ask` (a prompt; an agent, or `auto`), and one tool for each agent and plan that the key opens
    /mcp/AGENT     the tool of that agent only

API keys, limits, names, receipts and reasons are those of the other routes. The server is stateless: each POST gets a
JSON answer of its own, so clients notice no restart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sartor.core.errors import RequestError, SartorError, missing_package
from sartor.serving.api_keys import Principal
from sartor.serving.http.app_state import SPECIAL, AppState, get_record
from sartor.serving.http.http_errors import BUG, HttpError, to_http_error
from sartor.serving.http.reply_collection import CollectedReply, ReplyGroup
from sartor.serving.http.request_conversion import chat_request, open_replies
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.request_models import ChatRequest
from sartor.serving.http.shutdown import ClientDisconnectedError, until_disconnect
from sartor.serving.plans.step_messages import schema_errors
from sartor.serving.team_config import Team
from sartor.serving.types import AgentListing

if TYPE_CHECKING:
    from mcp.server import ServerRequestContext
    from mcp_types import CallToolRequestParams, CallToolResult, ListToolsResult, PaginatedRequestParams, Tool


ABOUT_AUTO = "Answer a prompt by the agent of this team that it is for."
ABOUT_BASE = "Answer a prompt by the model that all agents of this team stand on, without any of them."


@dataclass(frozen=True)
class ToolDescription:
    """Name and description of one agent or plan.

    version: live version.
    about: its purpose, the description of its tool.
    """

    name: str
    version: str
    about: str


def abouts(team: Team) -> Mapping[str, str]:
    """Return the descriptions (`about`) of the agents in TEAM.yaml, by name."""
    return {member.name: member.about for member in team.agents if member.about}


async def abilities(state: AppState, principal: Principal, about_texts: Mapping[str, str]) -> list[ToolDescription]:
    """Return the ready agents and plans that the client's key opens."""
    listed = (*await state.services.agent_admin.listed(), *state.services.plans)
    return [_ability(listing, about_texts) for listing in listed if listing.is_ready and principal.opens(listing.name)]


def _ability(listing: AgentListing, about_texts: Mapping[str, str]) -> ToolDescription:
    plan = listing.state.get("plan")
    subject = (
        f"the plan {listing.name} ({plan}: several agents for one request)" if plan else f"the agent {listing.name}"
    )
    return ToolDescription(
        listing.name, listing.live, about_texts.get(listing.name, "") or f"Answer a prompt by {subject} of this team."
    )


ASK = "ask"
PROMPT = {"type": "string", "minLength": 1, "description": "What is asked."}


class McpServer:
    """MCP server over the application's state. Raises ExtraError if the package `mcp` is not installed.

    bug: called with the request's record and each unexpected exception.
    """

    def __init__(self, state: AppState, team: Team, bug: Callable[[RequestRecord, Exception], object]) -> None:
        try:
            from mcp.server.lowlevel import Server
            from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
        except ImportError:
            raise missing_package("mcp", "mcp") from None
        self._state, self._bug, self._about_texts = state, bug, abouts(team)
        server: Any = Server("sartor", version=state.fingerprint(), on_list_tools=self._list, on_call_tool=self._call)
        # without the package's own spans: `AuthMiddleware` makes one span a request, free of private content
        server.middleware.clear()
        self._sessions = StreamableHTTPSessionManager(
            server, json_response=True, stateless=True, max_request_body_size=team.limits.body_bytes
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the server answering while the context is open; it can be entered once.

        The session manager runs in a task of its own. A signal is raised in the server's task, and the manager's task
        group there would wrap it in another exception.
        """
        is_open = asyncio.Event()

        async def hold() -> None:
            async with self._sessions.run():
                is_open.set()
                await asyncio.Event().wait()

        session_task = asyncio.ensure_future(hold())
        try:
            await is_open.wait()
            yield
        finally:
            session_task.cancel()
            await asyncio.gather(session_task, return_exceptions=True)

    def response_to(self, body: bytes) -> Response:
        """Return the response to a request whose body has been read."""
        return _MountedResponse(self._sessions.handle_request, body)

    async def _list(
        self, context: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        from mcp_types import ListToolsResult

        request: Request = context.request  # type: ignore[assignment]
        return ListToolsResult(tools=list((await self._tools(request)).values()))

    async def _call(self, context: ServerRequestContext[Any], params: CallToolRequestParams) -> CallToolResult:
        from mcp.shared.exceptions import MCPError
        from mcp_types import INTERNAL_ERROR, INVALID_PARAMS

        request: Request = context.request  # type: ignore[assignment]
        record = get_record(request)
        try:
            tool = (await self._tools(request)).get(params.name)
            if tool is None:
                record.error = "UnknownAgentError"
                raise MCPError(
                    INVALID_PARAMS, f"there is no tool {params.name[:80]!a} here; tools/list says which there are"
                )
            return await self._answer(request, tool, params.arguments or {})
        except ClientDisconnectedError:
            record.error = "Gone"
            raise MCPError(INTERNAL_ERROR, "the client is gone") from None
        except SartorError as error:
            return _error_result(record, to_http_error(error))
        except MCPError:
            raise
        except Exception as error:
            self._bug(record, error)
            return _error_result(record, BUG)

    async def _answer(self, request: Request, tool: Tool, arguments: Mapping[str, Any]) -> CallToolResult:
        state, record = self._state, get_record(request)
        if problems := schema_errors(dict(arguments), tool.input_schema):
            raise RequestError(
                f"the arguments of {tool.name!a} are wrong: {'; '.join(problems)}",
                "call tools/list: the tool's inputSchema says which arguments it takes",
            )
        state.services.rates.begin(record.principal.key)
        model = request.path_params.get("agent") or (arguments.get("agent", "auto") if tool.name == ASK else tool.name)
        await state.check_model(model, record.principal)
        body = ChatRequest.model_validate(
            {"model": model, "messages": [{"role": "user", "content": arguments["prompt"]}]}
        )
        group = await open_replies(request, [chat_request(body, state.limits)])
        try:
            (reply,) = await until_disconnect(request.receive, group.whole())
        finally:
            await group.close()
        return _tool_result(group, reply)

    async def _tools(self, request: Request) -> dict[str, Tool]:
        """Return the tools that the request's path and key open, by name."""
        from mcp_types import Tool

        principal, agent = get_record(request).principal, request.path_params.get("agent", "")
        descriptions = await abilities(self._state, principal, self._about_texts)
        if agent:
            tool = _tool(_description_of(agent, descriptions))
            return {tool.name: tool}
        names = [
            *(name for name in SPECIAL if principal.opens(name)),
            *(description.name for description in descriptions),
        ]
        if not names:
            return {}
        agent_schema = {"enum": names, "description": "Who is asked; auto, which it is if left out, chooses."}
        input_schema = _object({"prompt": PROMPT, "agent": agent_schema})
        tools = {ASK: Tool(name=ASK, description=ABOUT_AUTO, input_schema=input_schema)}
        for description in descriptions:
            if description.name != ASK:  # an agent of that name has no tool of its own: clients pass it as `agent`
                tool = _tool(description)
                tools[tool.name] = tool
        return tools


def _description_of(model: str, descriptions: list[ToolDescription]) -> ToolDescription:
    """Return the description of the agent, version, `base` or `auto` in a path.

    `check_model` has accepted the name.
    """
    name = model.partition("@")[0]
    special = {"base": ABOUT_BASE, "auto": ABOUT_AUTO}
    return next(
        (description for description in descriptions if description.name == name),
        ToolDescription(name, "", special.get(name, f"Ask {name}.")),
    )


def _tool(description: ToolDescription) -> Tool:
    from mcp_types import Tool

    return Tool(name=description.name, description=description.about, input_schema=_object({"prompt": PROMPT}))


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": ["prompt"], "additionalProperties": False}


def _tool_result(group: ReplyGroup, reply: CollectedReply) -> CallToolResult:
    """Return a reply as a tool result.

    Calls of the client's own tools are returned as JSON text, since the server does not run them.
    """
    from mcp_types import CallToolResult, TextContent

    tool_calls = list(reply.done.tool_calls)
    text = json.dumps({"tool_calls": tool_calls}, ensure_ascii=False) if tool_calls else reply.text
    answer = group.first
    facts = {"agent": answer.agent, "reason": answer.reason, "receipt": group.receipts, "finish": reply.done.finish}
    return CallToolResult(content=[TextContent(type="text", text=text)], _meta=_meta(facts))


def _error_result(record: RequestRecord, fault: HttpError) -> CallToolResult:
    """Return an error as a tool result, so that the calling model reads the remedy."""
    from mcp_types import CallToolResult, TextContent

    record.error = fault.kind
    fields: dict[str, Any] = {"kind": fault.kind, "code": fault.code, "status": fault.status}
    if "retry-after" in fault.headers:
        fields["retry_after_s"] = int(fault.headers["retry-after"])
    text = f"{fault.problem}; try: {fault.remedy}"
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=True, _meta=_meta(fields))


def _meta(facts: Mapping[str, Any]) -> Any:
    return {f"sartor/{name}": value for name, value in facts.items()}


class _MountedResponse(Response):
    """Response by another ASGI application, which receives the body that was already read."""

    def __init__(self, handle: Callable[[Scope, Receive, Send], Any], body: bytes) -> None:
        super().__init__()
        self._handle, self._request_body = handle, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_sent = False

        async def again() -> Message:
            nonlocal is_sent
            if is_sent:
                return await receive()
            is_sent = True
            return {"type": "http.request", "body": self._request_body, "more_body": False}

        await self._handle(scope, again, send)
